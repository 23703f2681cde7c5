"""The residual blocks of VAE and UNet in their fused form: group normalization (Wu and He 2018) with the modulation and
SiLU that follow it, and the sum at the end of a block.

The plain form is the blocks' own, in `vae.py` and `unet.py`; `fuse` puts these in its place in a network on a GPU.
There the kernels of `groupnorm.cu` run, in half precision and, for a network that learns, in bfloat16: torch's own
reorder a map whose channels are last in memory before and after, and its moments, the modulation and SiLU are passes of
their own. So is the bias of a convolution, which in half precision waits for the operation that reads the result
(`Convolved`). Statistics are in float32 either way.

Shapes: `B` images, `C` channels, `H W` rows and columns, `P` pixels of a map, `G` groups, `K` chunks of an image.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpu import kernels

SOURCE = Path(__file__).with_name("groupnorm.cu")
THREADS = 256      # of a block, about
BLOCKS = 528       # on the whole GPU, about: what keeps its processors busy
MOST_CHUNKS = 128  # of an image, whose sums every block adds up
MOST_COLUMNS = 1024  # of channels: a block has no more threads


# ---------------------------------------------------------------------------------------------- blocks

def fuse(network: nn.Module, blocks: dict[type, Callable]) -> nn.Module:
    """The same network, whose parts of some classes run a fused form, a function of the part and its inputs; so do all
    its group normalizations, and channels become pixels by `shuffle`.
    """
    forms = blocks | {
        nn.GroupNorm: lambda norm, x: group_norm(x, norm, silu=False),
        nn.PixelShuffle: lambda part, x: shuffle(x, part.upscale_factor),
    }
    for part in network.modules():
        if type(part) in forms:
            part.forward = partial(forms[type(part)], part)
    return network


def shuffle(x: Tensor, factor: int) -> Tensor:
    """`nn.PixelShuffle` of a map (B, C * factor^2, H, W) whose channels are last in memory, and stay so, where torch's
    would be reordered by all that follow.
    """
    x = x.permute(0, 2, 3, 1).unflatten(-1, (-1, factor, factor))              # (B, H, W, C, f, f)
    x = x.permute(0, 1, 4, 2, 5, 3)                                            # (B, H, f, W, f, C)
    return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def fused_vae_block(block: nn.Module, x: Tensor) -> Tensor:
    """`vae.VAEBlock`: (B, C_in, H, W) -> (B, C_out, H, W)."""
    h = convolve(group_norm(x, block.norm1), block.conv1)
    h = convolve(group_norm(h, block.norm2), block.conv2)
    return add(convolve(x, block.shortcut), h)


def fused_unet_block(block: nn.Module, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
    """`unet.ResBlock`: (B, C_in, H, W), the time (B, time_dim) and its tokens (B, T, token_dim) -> (B, C_out, H, W)."""
    h = convolve(group_norm(x, block.norm1), block.conv1)
    if block.cross_attention is not None:
        h = Convolved(block.attend(h.complete(), tokens))
    h = convolve(group_norm(h, block.norm2, modulation=block.time(t)), block.conv2)
    gate = None if block.gate is None else fused_gate(block.gate, h)
    return add(convolve(x, block.shortcut), h, gate)


def fused_gate(gate: nn.Module, x: Convolved) -> Tensor:
    """`unet.GlobalContext`: a map (B, C, H, W) -> a factor per channel, (B, C)."""
    # The key is linear, so its own bias and that of the map shift all keys alike, which the softmax does not see. The
    # mean does.
    weights = convolve(x.map, gate.key).map.flatten(2).softmax(dim=-1)        # (B, 1, P)
    pooled = torch.einsum("bcn,bin->bc", x.map.flatten(2), weights)
    if x.bias is not None:
        pooled = pooled + x.bias

    # As linear layers, which add their bias as they go; convolutions of a single pixel do not.
    narrow, activation, widen, factor = gate.net
    hidden = activation(F.linear(pooled, narrow.weight.flatten(1), narrow.bias))
    return factor(F.linear(hidden, widen.weight.flatten(1), widen.bias))


# ---------------------------------------------------------------------------------------------- their parts

class Convolved(NamedTuple):
    """What a convolution made, and its bias if that is still to be added."""
    map: Tensor                 # (B, C, H, W)
    bias: Tensor | None = None  # (C,)

    def complete(self) -> Tensor:
        """The map with its bias."""
        return self.map if self.bias is None else self.map + self.bias[:, None, None]


def convolve(x: Tensor, layer: nn.Conv2d | nn.Identity) -> Convolved:
    """A convolution of a map (B, C_in, H, W), or the map itself; on a GPU and in half precision without its bias."""
    bias = getattr(layer, "bias", None)
    if not _waits(x, bias):
        return Convolved(layer(x))
    return Convolved(F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups), bias)


def group_norm(x: Tensor | Convolved, norm: nn.GroupNorm, silu: bool = True,
               modulation: Tensor | None = None) -> Tensor:
    """`norm` of a map (B, C, H, W), then (1 + scale) * it + shift, then SiLU if `silu`: like x.

    modulation (B, 2 C): scale and shift per channel, side by side. Differentiable in all but a bias that waits.
    """
    x = x if isinstance(x, Convolved) else Convolved(x)
    alike = (x.map.dtype, norm.weight.dtype) in ((torch.float16, torch.float16), (torch.bfloat16, torch.float32))
    compiled = _kernels_for(x.map, _vector(norm)) if alike else None
    if compiled is not None:
        modulation = None if modulation is None else modulation.to(norm.weight.dtype)
        return _NormByKernels.apply(x.map, norm.weight, norm.bias, modulation, x.bias, norm, silu, compiled)

    # Plain torch; in place where no gradient needs the numbers before.
    x = F.group_norm(x.complete(), norm.num_groups, norm.weight, norm.bias, norm.eps)
    if modulation is not None:
        scale, shift = modulation[..., None, None].chunk(2, dim=1)            # (B, C, 1, 1) each
        x = torch.addcmul(shift, x, scale + 1)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


def add(shortcut: Convolved, x: Convolved, gate: Tensor | None = None) -> Tensor:
    """The sum of two maps (B, C, H, W), the second one times a gate (B, C) if there is one: like them.

    On a GPU and in half precision it is differentiable in the maps alone, and only without a gate.
    """
    alike = shortcut.map.dtype == x.map.dtype and shortcut.map.shape == x.map.shape
    alike = alike and _waits(x.map, x.bias)
    compiled = _kernels_for(x.map, math.gcd(x.map.shape[1], 8)) if alike else None
    if compiled is not None:
        return _SumByKernel.apply(shortcut.map, shortcut.bias, x.map, x.bias, gate, compiled)

    # Plain torch.
    if gate is None:
        return shortcut.complete() + x.complete()
    return torch.addcmul(shortcut.complete(), x.complete(), gate[..., None, None])


def _waits(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a bias is added later: to a map on a GPU and in half precision, and if it does not learn."""
    if bias is None or not x.is_cuda or x.dtype != torch.float16 or bias.dtype != torch.float16:
        return False
    return not (bias.requires_grad and torch.is_grad_enabled())


class Kernels(NamedTuple):
    """The kernels of `groupnorm.cu` for columns of some channels."""
    moments: Callable
    apply: Callable
    gradient_moments: Callable
    gradient_apply: Callable
    add: Callable


def _kernels_for(x: Tensor, vector: int) -> Kernels | None:
    """The kernels for a map and columns of `vector` channels; None where plain torch is used."""
    if not x.is_cuda or x.shape[1] // vector > MOST_COLUMNS or x.shape[0] == 0:
        return None
    return _compile(vector, x.dtype == torch.bfloat16, x.device.index)


def _vector(norm: nn.GroupNorm) -> int:
    """How many neighboring channels of one group a thread takes: up to eight, which are 16 bytes."""
    return math.gcd(norm.num_channels // norm.num_groups, 8)


@cache
def _compile(vector: int, bfloat: bool, device: int) -> Kernels | None:
    """The kernels for columns of `vector` channels, of maps in bfloat16 or in half precision, on a GPU; None where they
    cannot be had.
    """
    options = [f"-DVECTOR={vector}", f"-DBFLOAT={int(bfloat)}"]
    compiled = kernels.compile_kernels(SOURCE, Kernels._fields, options, device)
    return None if compiled is None else Kernels(*compiled)


def _launch_of(x: Tensor, vector: int) -> tuple[dict, int, int]:
    """How the kernels are started for a map: grid, block and shared memory; the chunks of an image; its pixels.

    Columns times rows of threads; as many chunks as keep the GPU busy, but with work for each thread.
    """
    batch, channels, height, width = x.shape
    columns = channels // vector
    rows = max(1, THREADS // columns)
    pixels = height * width
    chunks = min(math.ceil(pixels / rows), math.ceil(BLOCKS / batch), MOST_CHUNKS)
    where = {"grid": (chunks, batch, 1), "block": (columns, rows, 1), "shared_mem": 8 * columns * rows}
    return where, chunks, pixels


def _or_null(x: Tensor | None, like: Tensor) -> Tensor:
    """A tensor in one piece; one without numbers, whose pointer is null, where there is none."""
    return like.new_empty(0) if x is None else x.contiguous()


class _NormByKernels(torch.autograd.Function):
    """`group_norm` and its gradients by `groupnorm.cu`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, offset: Tensor | None,
                norm: nn.GroupNorm, silu: bool, compiled: Kernels) -> Tensor:
        # What a gradient will need: the map and its sums, of which the normalization follows again.
        x = x.contiguous(memory_format=torch.channels_last)
        where, chunks, pixels = _launch_of(x, _vector(norm))
        sums = x.new_empty(len(x), chunks, norm.num_groups, 2, dtype=torch.float32)
        y = torch.empty_like(x)
        given = [x, _or_null(offset, x), sums, weight, bias, _or_null(modulation, x)]
        ctx.save_for_backward(*given)
        ctx.tail = [int(silu), pixels, norm.num_groups, chunks, norm.eps]
        ctx.where, ctx.compiled, ctx.modulated = where, compiled, modulation is not None

        # First the sums, then the map.
        with kernels.current_device(x.device):
            compiled.moments(**where, args=[*given[:3], pixels, norm.num_groups])
            compiled.apply(**where, args=[*given, y, *ctx.tail])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in y (B, C, H, W) -> in x, the same shape, in weight and bias (C,), in a modulation (B, 2 C)."""
        x, _, sums, weight, bias, modulation = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        learns = any(ctx.needs_input_grad[1:4])
        channel_sums = sums.new_empty(*sums.shape[:2], len(weight) if learns else 0, 2)
        grad_sums = torch.empty_like(sums)
        grad_x = torch.empty_like(x)

        # First the sums, then the map.
        given = [*ctx.saved_tensors, grad]
        with kernels.current_device(x.device):
            ctx.compiled.gradient_moments(**ctx.where, args=[*given, channel_sums, grad_sums, *ctx.tail])
            ctx.compiled.gradient_apply(**ctx.where, args=[*given, grad_sums, grad_x, *ctx.tail])
        if not learns:
            return grad_x, *[None] * 7

        # Of every image and channel: the gradient in what follows the modulation, and its product with normalized x.
        summand, factor = channel_sums.sum(1).unbind(-1)                      # (B, C) each
        if ctx.modulated:
            scale = 1 + modulation[:, :len(weight)]
            modulation = torch.cat([factor * weight + summand * bias, summand], dim=1).to(weight.dtype)
            summand, factor = summand * scale, factor * scale
        grads = [part.sum(0).to(weight.dtype) for part in (factor, summand)]
        return grad_x, *grads, modulation if ctx.modulated else None, *[None] * 4


class _SumByKernel(torch.autograd.Function):
    """`add` and its gradient in the maps by `groupnorm.cu`."""

    @staticmethod
    def forward(ctx, a: Tensor, a_bias: Tensor | None, b: Tensor, b_bias: Tensor | None, gate: Tensor | None,
                compiled: Kernels) -> Tensor:
        a = a.contiguous(memory_format=torch.channels_last)
        b = b.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(a)
        ctx.gated = gate is not None
        where, _, pixels = _launch_of(a, math.gcd(a.shape[1], 8))
        offsets = _or_null(a_bias, a), _or_null(b_bias, a)
        with kernels.current_device(a.device):
            compiled.add(**where, args=[a, offsets[0], b, offsets[1], _or_null(gate, a), y, pixels])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        """The gradient in the sum (B, C, H, W), which is that in both maps."""
        if ctx.gated:
            raise NotImplementedError("a gated sum in half precision has no gradient")
        return grad, None, grad, None, None, None
