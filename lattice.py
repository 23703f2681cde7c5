"""Coarse renderings of fine pictures: every n-th pixel from a random first one, and back to full size (supplement).

The released code renders the same 128 x 128 rays in every iteration [released: distillation.py:85], so three quarters
of a picture's pixels are never looked at, and upsamples as if pixels of the small picture were squares [released:
distillation.py:287-288]. Here the first pixel is random, over time every pixel's ray is cast, and upsampling knows
where the rays went.

Letters: `s` side of a rendering, `S` side of the image, `B` batch, `C` channels.
"""
from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import pixel_grid


class Lattice(NamedTuple):
    """Every `step`-th pixel of a square picture of `full` pixels a side."""
    full: int
    step: int
    row: int     # of the first pixel
    column: int  # of the first pixel

    def pick(self, images: Tensor) -> Tensor:
        """The lattice's pixels of images (B, C, S, S): (B, C, s, s)."""
        return images[..., self.row::self.step, self.column::self.step]

    def centers(self, device) -> Tensor:
        """NDC of the pixel centers, row-major: (s * s, 2)."""
        grid = pixel_grid(self.full, self.full, device=device)
        grid = grid.reshape(self.full, self.full, 2)
        return grid[self.row::self.step, self.column::self.step].reshape(-1, 2)


def random_lattice(size: int, full: int, rng: random.Random) -> Lattice:
    """`size` x `size` pixels of `full` x `full`, evenly spaced from a random first one. `full` is a multiple of
    `size`.
    """
    # Else some pixels would never be cast.
    if full % size:
        raise ValueError(f"a rendering of {size} pixels a side does not divide an image of {full}")
    step = full // size
    row = rng.randrange(step)
    column = rng.randrange(step)
    return Lattice(full, step, row, column)


def upsample(images: Tensor, full: int, lattice: Lattice | None = None) -> Tensor:
    """Bilinear (B, C, s, s) -> (B, C, full, full), where samples are the pixels of the lattice.

    Without one the outer samples are the image's outermost pixels, as those of `cameras.pixel_grid` are.
    """
    # Where the samples are in the full image.
    side = images.shape[-1]
    if lattice is None:
        step = (full - 1) / (side - 1)
        row = column = 0
    else:
        step = lattice.step
        row, column = lattice.row, lattice.column

    def to_grid(first: int) -> Tensor:
        """Pixels of the full image in the coordinates of grid_sample, where the outer samples are -1 and 1."""
        sample = (torch.arange(full, device=images.device) - first) / step
        return sample * (2 / (side - 1)) - 1

    # Look every pixel up between them.
    y, x = torch.meshgrid(to_grid(row), to_grid(column), indexing="ij")
    grid = torch.stack([x, y], -1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)
