"""Input views as hands and cameras make them, of drawn ones: masks that are some pixels off, waver, are bitten into or
have a bump, a shadow say; exposures and white balances that differ. What is asked for stays as it was drawn, so a prior
learns to see through it.

Shapes: `b` sequences, `V` input views of each, `S` side of a picture, `s` = S / 8.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.ranks import Draws

EXPOSURE, BALANCE = 0.15, 0.06  # standard deviations of logarithmic gains, of a picture and of its channels
GAMMA = 2.2
OFF, WAVER = 0.45, 0.25  # how far from one half the edge is in a blurred mask: most of a picture, of each eighth pixel
BITTEN = 0.15            # part of the masks; as many have a bump


class Roughness(NamedTuple):
    """Random numbers: standard normal `gains` and `waver`, all others in [0, 1)."""
    extent: Tensor  # (b, 1) how rough all views of a sequence are
    gains: Tensor   # (b, V, 4)
    edge: Tensor    # (b, V, 2) where it is, how sharp it is
    waver: Tensor   # (b, V, s, s)
    bite: Tensor    # (b, V, 3) whether there is one, or a bump instead, where, how large it is
    behind: Tensor  # (b, V, 4) what a mask that is too large shows: brightness, tint


def draw_roughness(draws: Draws, views: int, size: int) -> Roughness:
    """For V input views of S = `size` pixels a side."""
    return Roughness(draws.rand(1), draws.randn(views, 4), draws.rand(views, 2),
                     draws.randn(views, size // 8, size // 8), draws.rand(views, 3), draws.rand(views, 4))


def roughen(images: Tensor, rough: Roughness, most: float) -> Tensor:
    """Of views (b, V, 5, S, S), masked colors, mask and valid region in [0, 1], the same, rougher; most: 0 to 1."""
    views = images.shape[1]
    side = images.shape[-1]
    color, mask, valid = images.flatten(0, 1).split([3, 1, 1], 1)
    extent = most * rough.extent.repeat_interleave(views, 0)[..., None, None]
    gains, edge, bite, behind = (x.flatten(0, 1)[..., None, None] for x in (rough.gains, rough.edge, rough.bite,
                                                                          rough.behind))
    # Linear colors are multiplied, but those of a picture are its roots.
    gain = torch.exp(extent / GAMMA * (EXPOSURE * gains[:, :1] + BALANCE * gains[:, 1:]))

    # In a blurred mask the edge is where it is one half; this one is elsewhere.
    smooth = mask
    for _ in range(3):
        smooth = F.avg_pool2d(smooth, 3, 1, 1, count_include_pad=False)
    waver = F.interpolate(rough.waver.flatten(0, 1)[:, None], (side, side), mode="bicubic")
    off = (extent * (OFF * (2 * edge[:, :1] - 1) + WAVER * waver)).clamp(-0.48, 0.48)
    found = ((smooth - 0.5 + off) * (2 + 6 * edge[:, 1:]) + 0.5).clamp(0, 1) * (smooth > 0.02)
    found = torch.where(smooth > 0.97, 1.0, found)

    # A bite or a bump: a disc about a point near the border.
    area = mask.sum((2, 3), keepdim=True)
    pixel = torch.arange(side, device=mask.device) + 0.5
    row, column = ((mask * x).sum((2, 3), keepdim=True) / area.clamp(min=1) for x in (pixel[:, None], pixel))
    angle = 2 * math.pi * bite[:, 1:2]
    far = (area / math.pi).sqrt()
    distance = torch.hypot(pixel[:, None] - row - far * angle.sin(), pixel - column - far * angle.cos())
    inside = distance < extent * (0.1 + 0.2 * bite[:, 2:3]) * area.sqrt()
    found = torch.where(inside & (bite[:, :1] < BITTEN), 0.0, found)
    found = torch.where(inside & (bite[:, :1] >= 1 - BITTEN), 1.0, found) * valid

    backdrop = (behind[:, :1] + 0.2 * (behind[:, 1:] - 0.5)).clamp(0, 1)
    whole = color + (1 - mask) * backdrop
    return torch.cat([found * (whole * gain).clamp(0, 1), found, valid], 1).unflatten(0, (-1, views))
