"""The multi-resolution hash encoding of the field (Instant NGP, Mueller et al. 2022, Sec. 3; Sec. 3.2 of the paper).

In each of L grids, from coarse to fine, a point lies in one cell. Every corner of a grid has a row of C learned
features in a table; the rows of the cell's eight corners are interpolated trilinearly, and the results of all levels
stand side by side. A grid with more corners than it may have rows lets corners share them: by a spatial hash, or else
by a tiled index that leaves out axes.

Differences from the released code, which is a CUDA extension: plain torch, on any device, in which all levels are one
gather, is the reference; on a GPU the kernels of `gpu/hashgrid.cu` take its place, compiled at run time by what
torch itself carries. The arithmetic of both is the released kernel's, float32 and wrapping 32-bit integers, so that its
tables can be used.

Shapes: `N` points, `L` levels, `C` features a level.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpu import hashgrid_kernel

PRIMES = (1, 2654435761, 805459861)  # factors of the spatial hash (Instant NGP, Eq. 4)

ADDED = 2**14  # cells of a level whose gradients a CPU adds to the table at once


# ---------------------------------------------------------------------------------------------- grids and corners

class Levels(NamedTuple):
    """The grids, coarse to fine, and where their corners are in the one table of features."""
    scale: Tensor     # (L, 1) float: a point x of the unit cube is at x * scale + 0.5, in cells
    stride: Tensor    # (L, 3) int32: what one cell along each axis adds to a corner's index; its factor in the hash
    rows: Tensor      # (L, 1) int32: number of the level's rows in the table
    offset: Tensor    # (L, 1) int32: first of these rows
    dense_to: int     # first level whose corners share rows; the coarser ones have one for each
    hashed_from: int  # first level with the spatial hash; the coarser ones have a running index
    full_from: int    # first level with the most rows that one can have, a power of two


def level_table(levels: int, log2_hashmap_size: int, base_resolution: int, finest_resolution: int,
                hashed: bool) -> Levels:
    """Grids of base_resolution to finest_resolution cells a side, a geometric series (Instant NGP, Eq. 2 and 3).

    A level has at most 2^log2_hashmap_size rows. If it has more corners, they are hashed, or else tiled: their index
    leaves out the axes whose stride exceeds the rows, and wraps around.
    """
    log2_growth = np.log2(finest_resolution / base_resolution) / max(levels - 1, 1)

    # Scales are float32 and computed once, since one unit in their last place moves fine features; the exponential
    # itself is rounded from double because float32 ones differ between processors.
    exponent = np.arange(levels, dtype=np.float32) * np.float32(log2_growth)
    growth = np.exp2(exponent.astype(np.float64)).astype(np.float32)
    scale = growth * np.float32(base_resolution) - np.float32(1)

    rows, strides = [], []
    dense_to = hashed_from = levels
    for level in range(levels):
        # A row for every corner where there is room, and a multiple of eight [released: gridencoder/grid.py:96-119].
        cells = math.ceil(base_resolution * np.exp2(log2_growth) ** level)
        wanted = min(2**log2_hashmap_size, (cells + 1) ** 3)
        size = math.ceil(wanted / 8) * 8
        rows.append(size)

        # The index goes by the corners that the kernel counts [released: gridencoder/src/gridencoder.cu:55-72].
        side = math.ceil(scale[level]) + 2
        if hashed and side**3 > size:
            hashed_from = min(hashed_from, level)
        if side**3 > size:
            dense_to = min(dense_to, level)
        running = [side**axis if side**axis <= size else 0 for axis in range(3)]
        strides.append(running if level < hashed_from else PRIMES)

    # The kernel's integers have no sign; sums and products with these are the same 32 bits.
    stride = np.array(strides, dtype=np.uint32).astype(np.int32)
    full_from = sum(size < 2**log2_hashmap_size for size in rows)
    rows = torch.tensor(rows, dtype=torch.int32)[:, None]
    offset = rows.cumsum(0, dtype=torch.int32) - rows
    return Levels(torch.tensor(scale)[:, None], torch.tensor(stride), rows, offset, dense_to, hashed_from, full_from)


def corners(x: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """The corners of the cells around points (N, 3) of the unit cube: rows of the table and weights, (8, L, N) each.

    Rows are int32. Outside the unit cube all weights are 0 [released: gridencoder/src/gridencoder.cu:98-137]. Points
    are the last axis, since a CPU is fastest where neighbors in memory have the same done to them.
    """
    x = x.t().contiguous()                                         # (3, N)
    inside = ((x >= 0) & (x <= 1)).all(0)                          # (N,)
    x = torch.where(inside, x, 0)
    position = x * levels.scale[..., None] + 0.5                   # (L, 3, N)
    cell = position.floor()
    fraction = position - cell                                     # of the way from the lower to the upper corner

    # Trilinear interpolation: a weight is the product of one factor an axis.
    weights = fraction.new_empty(8, len(levels.scale), x.shape[-1])
    _over_corners(weights, (1 - fraction) * inside, fraction * inside, torch.mul)

    # Coarse levels count their corners row by row; fine ones hash them with exclusive or.
    stride = levels.stride[..., None]
    lower = cell.int() * stride                                    # (L, 3, N)
    upper = lower + stride
    dense = slice(None, levels.hashed_from)
    hashed = slice(levels.hashed_from, None)
    index = lower.new_empty(weights.shape)
    _over_corners(index[:, dense], lower[dense], upper[dense], torch.add)
    _over_corners(index[:, hashed], lower[hashed], upper[hashed], torch.bitwise_xor)

    # Where corners share rows, the index wraps around: in a remainder by a power of two some bits are left out, and by
    # another number the sign must be undone that a hash has here.
    tiled = slice(levels.dense_to, levels.hashed_from)
    signed = slice(levels.hashed_from, max(levels.hashed_from, levels.full_from))
    full = slice(signed.stop, None)
    index[:, tiled].remainder_(levels.rows[tiled])
    if signed.start < signed.stop:
        index[:, signed] = (index[:, signed].long() % 2**32) % levels.rows[signed]
    index[:, full].bitwise_and_(levels.rows[full] - 1)
    return index.add_(levels.offset), weights


def _over_corners(out: Tensor, lower: Tensor, upper: Tensor, combine: Callable) -> None:
    """Combine the terms of the three axes for each corner of a cell, whose sides have the terms `lower` and `upper`.

    lower, upper (L, 3, N); out (8, L, N) is written: corner 4 i + 2 j + k is on side i of the x axis, j of y, k of z.
    """
    x, y, z = zip(lower.unbind(1), upper.unbind(1))
    for i, j in itertools.product((0, 1), repeat=2):
        xy = combine(x[i], y[j])
        for k in (0, 1):
            combine(xy, z[k], out=out[4 * i + 2 * j + k])


# ---------------------------------------------------------------------------------------------- the encoding

def encode(x: Tensor, table: Tensor, levels: Levels) -> Tensor:
    """Points (N, 3) of the unit cube -> features (N, L * C), level by level; 0 outside of it.

    Differentiable in the table (rows, C), not in the points. On a GPU a first call compiles the kernels; a CUDA graph
    can capture any later one.
    """
    kernels = hashgrid_kernel.kernels_for(x, table)
    if kernels is None:
        return _Encode.apply(x, table, levels)
    grids = (levels.scale, levels.stride, levels.rows, levels.offset, levels.hashed_from)
    return hashgrid_kernel.encode(x, table, grids, kernels)


class _Encode(torch.autograd.Function):
    """`encode` and its gradient in plain torch."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, levels: Levels) -> Tensor:
        index, weights = corners(x, levels)                        # (8, L, N) each
        ctx.save_for_backward(index, weights)
        ctx.table_shape = table.shape

        # A bag is the eight corners of a cell. (To stack them is faster than to transpose.)
        bags = torch.stack(list(index.flatten(1)), -1)             # (L * N, 8)
        factors = torch.stack(list(weights.flatten(1)), -1)        # (L * N, 8)
        features = F.embedding_bag(bags, table, per_sample_weights=factors, mode="sum")  # (L * N, C)
        features = features.view(len(levels.scale), len(x), table.shape[1])
        return features.transpose(0, 1).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:
        """The gradient in the features (N, L * C) -> in the table, of its shape; points have none."""
        index, weights = ctx.saved_tensors
        rows, channels = ctx.table_shape
        at_once = grad.shape[0] if grad.is_cuda else ADDED
        grad = grad.t().contiguous().unflatten(0, (-1, channels))  # (L, C, N)
        table_grad = grad.new_zeros(channels, rows)

        # torch's own backward of embedding_bag sorts the indices; adding to every channel's column, a core a column,
        # takes an eighth of its time, if a CPU adds no more at once than its cache holds.
        parts = zip(grad.split(at_once, -1), index.split(at_once, -1), weights.split(at_once, -1))
        for part_grad, part_index, part_weights in parts:
            for level in range(len(grad)):
                shares = part_grad[level, :, None] * part_weights[:, level]  # (C, 8, n)
                place = part_index[:, level].flatten().long()                # (8 * n,)
                table_grad.scatter_add_(1, place.expand(channels, -1), shares.flatten(1))
        return None, torch.stack(list(table_grad), -1), None


# ---------------------------------------------------------------------------------------------- the module

class HashGrid(nn.Module):
    """The encoding of points in the cube [-bound, bound]^3, with its table; `level_table` explains the numbers."""

    def __init__(self, levels: int, features_per_level: int, log2_hashmap_size: int, base_resolution: int,
                 finest_resolution: int, hashed: bool, bound: float, generator: torch.Generator | None = None):
        super().__init__()
        self.bound = bound

        # The grids follow from the numbers, so they are in no checkpoint.
        grids = level_table(levels, log2_hashmap_size, base_resolution, finest_resolution, hashed)
        self.register_buffer("scale", grids.scale, persistent=False)
        self.register_buffer("stride", grids.stride, persistent=False)
        self.register_buffer("rows", grids.rows, persistent=False)
        self.register_buffer("offset", grids.offset, persistent=False)
        self.dense_to = grids.dense_to
        self.hashed_from = grids.hashed_from
        self.full_from = grids.full_from

        table = torch.empty(int(grids.rows.sum()), features_per_level)
        table.uniform_(-1e-4, 1e-4, generator=generator)           # [released: gridencoder/grid.py:131-133]
        self.table = nn.Parameter(table)

    @property
    def levels(self) -> Levels:
        """The grids, on the device of the table."""
        return Levels(self.scale, self.stride, self.rows, self.offset, self.dense_to, self.hashed_from,
                      self.full_from)

    def forward(self, x: Tensor) -> Tensor:
        """Points (N, 3) -> features (N, L * C); 0 outside the cube."""
        unit = (x + self.bound) / (2 * self.bound)
        return encode(unit, self.table, self.levels)
