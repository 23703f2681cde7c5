"""The hash encoding of `hashgrid.py` and its gradient on a GPU, by the kernels of `hashgrid.cu`.

The arithmetic is that of the reference in plain torch: float32 and wrapping 32-bit integers.

Shapes: `N` points, `L` levels, `C` features per level.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpu.kernels import compile_kernels, current_device, readable

SOURCE = Path(__file__).with_name("hashgrid.cu")
CHANNELS = (1, 2, 4, 8)  # C, features per level, that the kernels are written for
THREADS = 256            # threads of a block
RUN = 8                  # points, one behind the other, of a thread in the gradient

# The levels as the kernels read them: scale (L,), stride (L, 3), rows (L,), offset (L,), first hashed level.
Grids = tuple[Tensor, Tensor, Tensor, Tensor, int]
Kernels = list[Callable]  # `encode_forward` and `encode_backward`, for one number of features per level


def kernels_for(x: Tensor, table: Tensor) -> Kernels | None:
    """The kernels that encode points x by a table; None where plain torch does, as on CPUs and for other types."""
    if not x.is_cuda or x.device != table.device:
        return None
    if x.dtype != torch.float32 or table.dtype != torch.float32:
        return None

    # A kernel counts points in 32 bits.
    channels = table.shape[1]
    if channels not in CHANNELS or len(x) >= 2**31:
        return None
    return _compile(channels, x.device.index)


def encode(x: Tensor, table: Tensor, levels: tuple[NamedTuple, ...], kernels: Kernels) -> Tensor:
    """Points (N, 3) of the unit cube -> features (N, L * C), differentiable in the table (rows, C).

    levels: L of `hashgrid.Level`.
    """
    return _EncodeByKernels.apply(x, table, _grids(levels, x.device), kernels)


@functools.cache
def _grids(levels: tuple[NamedTuple, ...], device: torch.device) -> Grids:
    """The levels as the kernels read them. They are copied to a GPU once, since a CUDA graph cannot capture that."""
    scale = torch.tensor([level.scale for level in levels], dtype=torch.float32, device=device)
    stride = torch.tensor([level.stride for level in levels], dtype=torch.int32, device=device)
    rows = torch.tensor([level.rows for level in levels], dtype=torch.int32, device=device)
    offset = torch.tensor([level.offset for level in levels], dtype=torch.int32, device=device)
    return scale, stride, rows, offset, sum(not level.hashed for level in levels)


def kernel_options(channels: int) -> list[str]:
    """The compiler's options for tables of `channels` features per level."""
    return [f"-DCHANNELS={channels}", f"-DTHREADS={THREADS}", f"-DRUN={RUN}"]


@functools.cache
def _compile(channels: int, device: int) -> Kernels | None:
    """The kernels for `channels` features per level on a GPU; None where they cannot be had."""
    names = ("encode_forward", "encode_backward")
    return compile_kernels(SOURCE, names, kernel_options(channels), device)


class _EncodeByKernels(torch.autograd.Function):
    """`encode` and its gradient. Nothing but the points is kept for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, grids: Grids, kernels: Kernels) -> Tensor:
        x = readable(x)
        ctx.save_for_backward(x)
        ctx.table_shape = table.shape
        ctx.grids = grids
        ctx.kernels = kernels

        features = x.new_empty(len(x), len(grids[0]) * table.shape[1])
        _launch(kernels[0], 1, x, readable(table), grids, features)
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None, None]:
        """The gradient in the features (N, L * C) -> in the table, of its shape; points have none."""
        x, = ctx.saved_tensors
        table_grad = grad.new_zeros(ctx.table_shape)
        _launch(ctx.kernels[1], RUN, x, table_grad, ctx.grids, readable(grad))
        return None, table_grad, None, None


def _launch(kernel: Callable, run: int, x: Tensor, table: Tensor, grids: Grids, features: Tensor) -> None:
    """Run a kernel for points x (N, 3), `run` of them per thread. The table and features, or the gradients of both.

    Nothing compares these arguments with the kernel's: a tensor becomes a pointer and an integer an `int`.
    """
    points = len(x)
    if points == 0:
        return

    # A block's levels have 32 bytes of features per point.
    levels = len(grids[0])
    width = 8 // table.shape[1]
    height = THREADS // width
    grid = (math.ceil(points / (height * run)), math.ceil(levels / width), 1)
    with current_device(x.device):
        kernel(grid=grid, block=(width, height, 1), args=[x, table, *grids, points, levels, features])
