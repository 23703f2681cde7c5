"""The multi-resolution hash encoding of the field (Instant NGP, Mueller et al. 2022, Sec. 3; Sec. 3.2 of the paper).

In each of L grids, from coarse to fine, a point lies in one cell. Every corner of a grid has a row of C learned
features in a table; the rows of the cell's eight corners are interpolated trilinearly, and the results of all levels
stand side by side. A grid with more corners than it may have rows lets corners share them: by a spatial hash, or else
by a tiled index that leaves out axes.

Differences from the released code, which is a CUDA extension: plain torch, on any device, is the reference; on a GPU
the kernels of `gpu/hashgrid.cu` take its place, compiled at run time by what torch itself carries. The arithmetic of
both is the released kernel's, float32 and wrapping 32-bit integers, so that its tables can be used.

Shapes: `N` points, `L` levels, `C` features per level.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpu import hashgrid_kernel

# Factors of the spatial hash (Instant NGP, Eq. 4) as 32-bit integers, which have a sign in torch.
PRIMES = (1, 2654435761 - 2**32, 805459861)

ADDED = 2**14  # cells of a level whose gradients a CPU adds to the table at once


# ---------------------------------------------------------------------------------------------- grids and corners

class Level(NamedTuple):
    """One of the grids, and where its corners are in the one table of features."""
    scale: float                  # a point x of the unit cube is at x * scale + 0.5, in cells; a float32
    stride: tuple[int, int, int]  # factors of a corner's x, y and z in its index
    hashed: bool                  # the index is the exclusive or of these products, not their sum
    shared: bool                  # there are more corners than rows
    rows: int                     # number of the level's rows in the table
    offset: int                   # first of these rows


def level_table(levels: int, log2_hashmap_size: int, base_resolution: int, finest_resolution: int,
                hashed: bool) -> tuple[Level, ...]:
    """Grids of base_resolution to finest_resolution cells per side, a geometric series (Instant NGP, Eq. 2 and 3).

    A level has at most 2^log2_hashmap_size rows. If it has more corners, they are hashed, or else tiled: their index
    leaves out the axes whose stride exceeds the rows, and wraps around. Coarse to fine.
    """
    log2_growth = np.log2(finest_resolution / base_resolution) / max(levels - 1, 1)

    # Scales are float32 and computed once, since one unit in their last place moves fine features; the exponential
    # itself is rounded from double because float32 ones differ between processors.
    exponent = np.arange(levels, dtype=np.float32) * np.float32(log2_growth)
    growth = np.exp2(exponent.astype(np.float64)).astype(np.float32)
    scales = growth * np.float32(base_resolution) - np.float32(1)

    grids = []
    offset = 0
    for level, scale in enumerate(scales.tolist()):
        # A row for every corner if so many are allowed, and a multiple of eight [released: gridencoder/grid.py:96-119].
        cells = math.ceil(base_resolution * np.exp2(log2_growth) ** level)
        wanted = min(2**log2_hashmap_size, (cells + 1) ** 3)
        rows = math.ceil(wanted / 8) * 8

        # The index goes by another count of corners, the kernel's [released: gridencoder/src/gridencoder.cu:55-72].
        side = math.ceil(scale) + 2
        if hashed and (side**3 > rows or grids and grids[-1].hashed):  # no level behind a hashed one is dense
            grids.append(Level(scale, PRIMES, True, True, rows, offset))
        else:
            stride = tuple(side**axis if side**axis <= rows else 0 for axis in range(3))
            grids.append(Level(scale, stride, False, side**3 > rows, rows, offset))
        offset += rows
    return tuple(grids)


def corners(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """The corners of the cells around points (N, 3) of the unit cube: rows of the table and weights, (8, N) each.

    Rows are int32. Points are the last axis, since a CPU is fastest where neighbors in memory have the same done to
    them.
    """
    position = x.t() * level.scale + 0.5                           # (3, N), in cells
    cell = position.floor()
    fraction = position - cell                                     # of the way from the lower to the upper side

    # Along each axis a cell has a lower and an upper side: (2, 3, N), of which a corner has one per axis.
    side = torch.stack([cell, cell + 1]).int()
    share = torch.stack([1 - fraction, fraction])

    # A fine level hashes its corners with exclusive or (Instant NGP, Eq. 4); a coarse one counts them row by row.
    a, b, c = level.stride
    if level.hashed:
        index = over_corners(side[:, 0] * a, side[:, 1] * b, side[:, 2] * c, torch.bitwise_xor)
    else:
        index = over_corners(side[:, 0] * a, side[:, 1] * b, side[:, 2] * c, torch.add)

    # Where corners share rows, the index wraps around.
    if level.shared:
        index = modulo(index, level.rows)

    # Trilinear interpolation: a weight is the product of one share per axis.
    weights = over_corners(*share.unbind(1), torch.mul)
    return index + level.offset, weights


def over_corners(x: Tensor, y: Tensor, z: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The terms of the two sides of a cell along each axis, (2, N), combined for each of its corners: (8, N)."""
    xy = combine(x[:, None], y[None])                              # (2, 2, N)
    return combine(xy[:, :, None], z[None, None]).flatten(0, 2)


def modulo(index: Tensor, rows: int) -> Tensor:
    """int32 indices, whose 32 bits stand for an integer without a sign, modulo the rows of a level; int32."""
    if rows & (rows - 1) == 0:
        return index & (rows - 1)  # a power of two: the last bits
    return (index.long() % 2**32 % rows).int()


# ---------------------------------------------------------------------------------------------- the encoding

def encode(x: Tensor, table: Tensor, levels: tuple[Level, ...]) -> Tensor:
    """Points (N, 3) of the unit cube -> features (N, L * C), level by level; 0 outside of it.

    Differentiable in the table (rows, C), not in the points. On a GPU a first call compiles the kernels; a CUDA graph
    can capture any later one.
    """
    kernels = hashgrid_kernel.kernels_for(x, table)
    if kernels is None:
        return _Encode.apply(x, table, levels)
    return hashgrid_kernel.encode(x, table, levels, kernels)


class _Encode(torch.autograd.Function):
    """`encode` and its gradient in plain torch."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, levels: tuple[Level, ...]) -> Tensor:
        # Outside of the cube there are no features [released: gridencoder/src/gridencoder.cu:98-137].
        inside = ((x >= 0) & (x <= 1)).all(-1)                     # (N,)
        x = torch.where(inside, x.t().contiguous(), 0).t()

        # The mean of the rows of a cell's corners, by their weights. (To stack them is faster than to transpose.)
        features = []
        saved = []
        for level in levels:
            index, weights = corners(x, level)                     # (8, N) each
            bags = torch.stack(list(index), -1)                    # (N, 8)
            factors = torch.stack(list(weights), -1)
            features.append(F.embedding_bag(bags, table, per_sample_weights=factors, mode="sum"))
            saved += [index, weights]
        ctx.save_for_backward(inside, *saved)
        ctx.table_shape = table.shape
        return torch.cat(features, -1) * inside[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:
        """The gradient in the features (N, L * C) -> in the table, of its shape; points have none."""
        inside, *saved = ctx.saved_tensors
        rows, channels = ctx.table_shape
        at_once = grad.shape[0] if grad.is_cuda else ADDED
        grad = grad.t().contiguous() * inside
        grad = grad.unflatten(0, (-1, channels))                   # (L, C, N)
        table_grad = grad.new_zeros(channels, rows)

        # torch's own backward of embedding_bag sorts the indices; adding to every channel's column takes an eighth of
        # its time, if a CPU adds no more at once than its cache holds.
        for level_grad, index, weights in zip(grad, saved[::2], saved[1::2]):
            parts = zip(level_grad.split(at_once, -1), index.split(at_once, -1), weights.split(at_once, -1))
            for part_grad, part_index, part_weights in parts:
                shares = part_grad[:, None] * part_weights         # (C, 8, n)
                row = part_index.flatten().long()                  # (8 * n,)
                table_grad.scatter_add_(1, row.expand(channels, -1), shares.flatten(1))
        return None, torch.stack(list(table_grad), -1), None


# ---------------------------------------------------------------------------------------------- the module

class HashGrid(nn.Module):
    """The encoding of points in the cube [-bound, bound]^3, with its table; `level_table` explains the numbers."""

    def __init__(self, levels: int, features_per_level: int, log2_hashmap_size: int, base_resolution: int,
                 finest_resolution: int, hashed: bool, bound: float, generator: torch.Generator | None = None):
        super().__init__()
        self.bound = bound
        self.levels = level_table(levels, log2_hashmap_size, base_resolution, finest_resolution, hashed)

        table = torch.empty(sum(level.rows for level in self.levels), features_per_level)
        table.uniform_(-1e-4, 1e-4, generator=generator)           # [released: gridencoder/grid.py:131-133]
        self.table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        """Points (N, 3) -> features (N, L * C); 0 outside the cube."""
        unit = (x + self.bound) / (2 * self.bound)
        return encode(unit, self.table, self.levels)
