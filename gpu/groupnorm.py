"""The residual blocks of VAE and UNet in their fused form: group normalization (Wu and He 2018) with the modulation and
SiLU that follow it, and the sum at the end of a block.

The plain form is the blocks' own, in `vae.py` and `unet.py`; `fuse` puts these in its place in a network's copy for a
GPU. There, in half precision, the kernels of `groupnorm.cu` run: torch's own reorder a map whose channels are last in
memory before and after, and its moments, the modulation and SiLU are passes of their own. So is the bias of a
convolution, which here waits for the operation that reads the result (`Convolved`). Statistics are in float32 either
way.

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
    if bias is None or not _is_for_kernels(x, bias):
        return Convolved(layer(x))
    return Convolved(F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups), bias)


def group_norm(x: Tensor | Convolved, norm: nn.GroupNorm, silu: bool = True,
               modulation: Tensor | None = None) -> Tensor:
    """`norm` of a map (B, C, H, W), then (1 + scale) * it + shift, then SiLU if `silu`: like x.

    modulation (B, 2 C): scale and shift per channel, side by side. On a GPU and in half precision it is differentiable
    in x alone, and only without a modulation.
    """
    x = x if isinstance(x, Convolved) else Convolved(x)
    compiled = _kernels_for(x.map, norm.weight, _vector(norm))
    if compiled is not None:
        return _NormByKernels.apply(x.map, x.bias, norm, silu, modulation, compiled)

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
    compiled = _kernels_for(x.map, x.bias, math.gcd(x.map.shape[1], 8)) if alike else None
    if compiled is not None:
        return _SumByKernel.apply(shortcut.map, shortcut.bias, x.map, x.bias, gate, compiled)

    # Plain torch.
    if gate is None:
        return shortcut.complete() + x.complete()
    return torch.addcmul(shortcut.complete(), x.complete(), gate[..., None, None])


def _is_for_kernels(x: Tensor, weight: Tensor | None) -> bool:
    """Whether kernels are used: for a map and a weight that does not learn, on a GPU and in half precision."""
    if weight is None or not x.is_cuda or x.dtype != torch.float16 or weight.dtype != torch.float16:
        return False
    return not (weight.requires_grad and torch.is_grad_enabled())


class Kernels(NamedTuple):
    """The kernels of `groupnorm.cu` for columns of some channels."""
    moments: Callable
    apply: Callable
    gradient_moments: Callable
    gradient_apply: Callable
    add: Callable


def _kernels_for(x: Tensor, weight: Tensor | None, vector: int) -> Kernels | None:
    """The kernels for a map and a layer's weight, for columns of `vector` channels; None where plain torch is used."""
    if not _is_for_kernels(x, weight) or x.shape[1] // vector > MOST_COLUMNS or len(x) == 0:
        return None
    return _compile(vector, x.device.index)


def _vector(norm: nn.GroupNorm) -> int:
    """How many neighboring channels of one group a thread takes: up to eight, which are 16 bytes."""
    return math.gcd(norm.num_channels // norm.num_groups, 8)


@cache
def _compile(vector: int, device: int) -> Kernels | None:
    """The kernels for columns of `vector` channels on a GPU; None where they cannot be had."""
    compiled = kernels.compile_kernels(SOURCE, Kernels._fields, [f"-DVECTOR={vector}"], device)
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
    """`group_norm` and its gradient in x by `groupnorm.cu`."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, norm: nn.GroupNorm, silu: bool, modulation: Tensor | None,
                compiled: Kernels) -> Tensor:
        # What a gradient will need: the map and its sums, of which the normalization follows again.
        x = x.contiguous(memory_format=torch.channels_last)
        offset = _or_null(bias, x)
        where, chunks, pixels = _launch_of(x, _vector(norm))
        shape = [pixels, norm.num_groups]
        sums = x.new_empty(len(x), chunks, norm.num_groups, 2, dtype=torch.float32)
        y = torch.empty_like(x)
        ctx.save_for_backward(x, offset, sums)
        ctx.norm, ctx.silu, ctx.compiled = norm, silu, compiled
        ctx.modulated = modulation is not None

        # First the sums, then the map.
        given = [x, offset, sums, norm.weight, norm.bias, _or_null(modulation, x), y]
        with kernels.current_device(x.device):
            compiled.moments(**where, args=[x, offset, sums, *shape])
            compiled.apply(**where, args=[*given, int(silu), *shape, chunks, norm.eps])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """The gradient in y (B, C, H, W) -> in x, the same shape."""
        if ctx.modulated:
            raise NotImplementedError("a modulated group normalization in half precision has no gradient")

        # The same launch as forward, which knows the number of chunks.
        x, offset, sums = ctx.saved_tensors
        norm = ctx.norm
        where, chunks, pixels = _launch_of(x, _vector(norm))
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_sums = torch.empty_like(sums)
        grad_x = torch.empty_like(x)

        # First the sums, then the map.
        given = [x, offset, sums, norm.weight, norm.bias, grad]
        tail = [int(ctx.silu), pixels, norm.num_groups, chunks, norm.eps]
        with kernels.current_device(x.device):
            ctx.compiled.gradient_moments(**where, args=[*given, grad_sums, *tail])
            ctx.compiled.gradient_apply(**where, args=[*given, grad_sums, grad_x, *tail])
        return grad_x, None, None, None, None, None


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
