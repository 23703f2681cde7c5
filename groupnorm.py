"""Group normalization (Wu and He 2018) followed by a modulation and SiLU, as VAE and UNet have it everywhere.

Plain torch, on any device, is the reference. On a GPU in half precision the kernels of `groupnorm.cu` take its place:
torch's own reorder a map whose channels are last in memory before and after, and its moments, the modulation and SiLU
are passes of their own. Statistics are in float32 either way.

Letters: `B` images, `C` channels, `H W` rows and columns, `P` pixels of a map, `G` groups, `K` chunks of an image.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kernels

SOURCE = Path(__file__).with_name("groupnorm.cu")
THREADS = 256      # of a block, about
BLOCKS = 528       # on the whole GPU, about: what keeps its processors busy
MOST_CHUNKS = 128  # of an image, whose sums every block adds up


def group_norm(x: Tensor, norm: nn.GroupNorm, silu: bool = True, modulation: Tensor | None = None) -> Tensor:
    """`norm` of a map (B, C, H, W), then (1 + scale) * it + shift, then SiLU unless told otherwise: like x.

    modulation (B, 2 C): scale and shift a channel, side by side. On a GPU and in half precision it is differentiable in
    x alone, and only without a modulation.
    """
    compiled = _kernels_for(x, norm)
    if compiled is not None:
        return _ByKernels.apply(x, norm, silu, modulation, compiled)

    # Plain torch; in place where no gradient needs the numbers before.
    x = norm(x)
    if modulation is not None:
        scale, shift = modulation[..., None, None].chunk(2, dim=1)            # (B, C, 1, 1) each
        x = torch.addcmul(shift, x, scale + 1)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


class Kernels(NamedTuple):
    """The kernels of `groupnorm.cu` for columns of some channels."""
    moments: Callable
    apply: Callable
    gradient_moments: Callable
    gradient_apply: Callable


def _kernels_for(x: Tensor, norm: nn.GroupNorm) -> Kernels | None:
    """The kernels for a map; None where plain torch serves: on a CPU, in another precision, where weights learn."""
    if not x.is_cuda or x.dtype != torch.float16 or norm.weight.dtype != torch.float16:
        return None
    if norm.weight.requires_grad and torch.is_grad_enabled():
        return None
    if x.shape[1] // _vector(norm) > 1024:
        return None
    return _compile(_vector(norm), x.device.index)


def _vector(norm: nn.GroupNorm) -> int:
    """How many neighboring channels of one group a thread takes: up to eight, which are 16 bytes."""
    return math.gcd(norm.num_channels // norm.num_groups, 8)


@cache
def _compile(vector: int, device: int) -> Kernels | None:
    """The kernels for columns of `vector` channels on a GPU; None where they cannot be had."""
    compiled = kernels.compile_kernels(SOURCE, Kernels._fields, [f"-DVECTOR={vector}"], device)
    return None if compiled is None else Kernels(*compiled)


class Launch(NamedTuple):
    """How the kernels are started for a map."""
    chunks: int
    where: dict           # grid, block and shared memory
    shape: list[int]      # P and G


def _launch_of(x: Tensor, norm: nn.GroupNorm) -> Launch:
    """Columns times rows of threads; as many chunks of an image as keep the GPU busy, but with work for each thread."""
    batch, channels, height, width = x.shape
    columns = channels // _vector(norm)
    rows = max(1, THREADS // columns)
    pixels = height * width
    chunks = min(math.ceil(pixels / rows), math.ceil(BLOCKS / batch), MOST_CHUNKS)
    where = {"grid": (chunks, batch, 1), "block": (columns, rows, 1), "shared_mem": 8 * columns * rows}
    return Launch(chunks, where, [pixels, norm.num_groups])


class _ByKernels(torch.autograd.Function):
    """`group_norm` and its gradient in x by `groupnorm.cu`."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: nn.GroupNorm, silu: bool, modulation: Tensor | None,
                compiled: Kernels) -> Tensor:
        # What a gradient will need: the map and its sums, of which the normalization follows again.
        x = x.contiguous(memory_format=torch.channels_last)
        launch = _launch_of(x, norm)
        sums = x.new_empty(len(x), launch.chunks, norm.num_groups, 2, dtype=torch.float32)
        y = torch.empty_like(x)
        ctx.save_for_backward(x, sums)
        ctx.norm, ctx.silu, ctx.compiled = norm, silu, compiled
        ctx.modulated = modulation is not None

        # Without a modulation its pointer is not followed.
        factors = x if modulation is None else modulation.contiguous()
        flags = [int(ctx.modulated), int(silu)]
        tail = [*launch.shape, launch.chunks, norm.eps]

        # First the sums, then the map.
        with torch.cuda.device(x.device):
            compiled.moments(**launch.where, args=[x, sums, *launch.shape])
            compiled.apply(**launch.where, args=[x, sums, norm.weight, norm.bias, factors, y, *flags, *tail])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.modulated:
            raise NotImplementedError("a modulated group normalization in half precision has no gradient")

        # The same launch as forward, which knows the number of chunks.
        x, sums = ctx.saved_tensors
        norm = ctx.norm
        launch = _launch_of(x, norm)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_sums = torch.empty_like(sums)
        grad_x = torch.empty_like(x)

        # First the sums, then the map.
        given = [x, sums, norm.weight, norm.bias, grad]
        tail = [int(ctx.silu), *launch.shape, launch.chunks, norm.eps]
        with torch.cuda.device(x.device):
            ctx.compiled.gradient_moments(**launch.where, args=[*given, grad_sums, *tail])
            ctx.compiled.gradient_apply(**launch.where, args=[*given, grad_sums, grad_x, *tail])
        return grad_x, None, None, None, None
