"""The normalized world: the object of a capture where CO3D's are, and the way back to the user's world.

The object sits in the middle of the field's cube, and as large in it as CO3D's do. The axes are those of the first
camera, in which the field's cube lies anyway (`reconstruction.py`). So a capture whose world is turned, scaled or
shifted is the same scene; `Similarity` leads back.

Shapes: `V` photographs, `P` points, `G` points a side of a grid.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import HALF_SIDE, Cameras, Scene, Similarity, look_at, nearest_point_to_axes
from datasets.crop import MASK_THRESHOLD

SEARCH = 1.5         # half side of the cube where the object is looked for, in radii of the largest mask
GRID = 48            # points a side of that cube
COARSE = 64          # pixels a side of the masks at the first look, which may miss nothing thin
FINE = 128           # pixels a side of the masks at the later ones
FORGIVEN_VIEWS = 6   # one view of so many may be wrong about a point, as in `ngp.FieldConfig`
ENOUGH_POINTS = 20   # of COLMAP's, on the object, to tell how far away it is


def normalization(scene: Scene, points: Tensor) -> Similarity:
    """The world in which the object of a scene sits where CO3D's do; points (P, 3) of COLMAP's, if any.

    The middle and the longest side of its masks' hull decide, in the axes of the first camera. Raises `ValueError`
    where the cameras have one place, do not look at one, or the masks have nothing in common.
    """
    # Axes, unit and origin of the cameras themselves, so that the user's do not count.
    centers = scene.cameras.centers()
    middle = centers.mean(0)
    spread = (centers - middle).norm(dim=1).square().mean().sqrt().item()
    if not spread > 1e-9 * (1 + middle.norm().item()):
        raise ValueError("all cameras are at one place; the object has to be seen from several")
    first = Similarity(scene.cameras.R[0], spread, middle)
    cameras = first.normalized(scene.cameras)
    points = (points - middle) @ first.R / spread

    # Where the object is and how large at most: every mask spans an angle.
    masks = _Masks.of(scene, FINE)
    center = _common_point(cameras, masks)
    center = _refine_by_points(center, points, cameras, masks)
    depth = cameras.to_view(center.expand(len(scene), 1, 3))[:, 0, 2]
    if depth.min() <= 0:
        behind = scene.names[depth.argmin()]
        raise ValueError(f"the cameras do not look at one place: what the others see is behind the camera of {behind}; "
                         "the poses may be in another convention (docs/photographs.md)")
    radius = (depth * masks.half_sides / cameras.focal.amin(1)).max()

    # The box around the hull, more closely each time. What is so thin that a closer look misses it keeps its first box.
    low, high = center - SEARCH * radius, center + SEARCH * radius
    coarse = _Masks.of(scene, COARSE)
    for look in (coarse, masks, masks):
        inside, cell = _hull(low, high, cameras, look)
        if len(inside) > 0:
            low, high = inside.amin(0) - cell, inside.amax(0) + cell
        elif look is coarse:
            raise ValueError("masks and cameras: no part of space lies in every mask; the poses may be in another "
                             "convention (docs/photographs.md), or the masks of something else")
    unit = (high - low).max().item() / 2 / HALF_SIDE
    return Similarity(torch.eye(3, dtype=torch.float64), unit, (low + high) / 2).then(first)


class _Masks(NamedTuple):
    """Where the object may be in every view."""
    possible: Tensor    # (V, 1, m + 2, m + 2) 0 or 1, with one more pixel around it for all that is outside
    middles: Tensor     # (V, 2) NDC of the middle of the mask's box
    half_sides: Tensor  # (V,) half the longer side of that box, NDC

    @staticmethod
    def of(scene: Scene, side: int) -> _Masks:
        """The masks of a scene, at most `side` pixels a side, rather a little too large."""
        side = min(scene.masks.shape[-1], side)
        masks = (F.adaptive_max_pool2d(scene.masks, side) > MASK_THRESHOLD).float()
        unknown = F.adaptive_max_pool2d(1 - scene.valid, side)
        unknown = F.pad(unknown, (1, 1, 1, 1), value=1)

        # Where a mask touches what the view does not show, the object may go on there.
        possible = F.pad(masks, (1, 1, 1, 1))
        near_by = F.max_pool2d(unknown, 5, stride=1, padding=2)
        touches = (possible * near_by).amax((1, 2, 3), keepdim=True)
        possible = torch.maximum(possible, touches * unknown)

        # Boxes in NDC, which point left and up.
        axis = 1 - (torch.arange(side, dtype=torch.float64) + 0.5) * 2 / side
        across = torch.where(masks[:, 0].amax(1) > 0, axis, torch.nan)  # (V, m)
        along = torch.where(masks[:, 0].amax(2) > 0, axis, torch.nan)
        sides = torch.stack([across, along], 1)                         # (V, 2, m)
        greatest = sides.nan_to_num(-1).amax(2)
        least = sides.nan_to_num(1).amin(2)
        half_sides = (greatest - least).amax(1) / 2 + 1 / side
        return _Masks(possible, (greatest + least) / 2, half_sides)


def _in_masks(points: Tensor, cameras: Cameras, masks: _Masks) -> Tensor:
    """Those of points (P, 3) that lie in the masks of all views (V), but for a few that may be wrong: (N, 3)."""
    # View after view, and each looks only at what is left.
    forgiven = len(cameras) // FORGIVEN_VIEWS
    refusals = torch.zeros(len(points), dtype=torch.long)
    for possible, camera in zip(masks.possible, cameras):
        xy, depth = camera.project(points)

        # One pixel of the mask around the image stands for all that is outside.
        size = possible.shape[-1]
        grid = (-xy * (size - 2) / size).clamp(1 / size - 1, 1 - 1 / size)
        sampled = F.grid_sample(possible[None], grid.float()[None, None], mode="nearest", align_corners=False)
        seen = (sampled[0, 0, 0] > 0) & (depth > 0)

        refusals += ~seen
        left = refusals <= forgiven
        points = points[left]
        refusals = refusals[left]
    return points


def _common_point(cameras: Cameras, masks: _Masks) -> Tensor:
    """The point (3,) nearest to the rays through the middles of the masks, float64."""
    # Cameras at the same places that look there.
    rays_o, rays_d = cameras.rays(masks.middles.unsqueeze(1))
    eyes = rays_o[:, 0]
    R, T = look_at(eyes, eyes + rays_d[:, 0], cameras.R[:, :, 1])
    aimed = Cameras(R, T, cameras.focal, torch.zeros_like(cameras.principal))
    return nearest_point_to_axes(aimed)


def _refine_by_points(center: Tensor, points: Tensor, cameras: Cameras, masks: _Masks) -> Tensor:
    """The middle (3,) of COLMAP's points (P, 3) on the object, where there are enough: in a few views near to each
    other they know better than masks how far away it is. Else `center`.
    """
    inside = _in_masks(points, cameras, masks)
    if len(inside) < ENOUGH_POINTS:
        return center
    return inside.median(0).values


def _hull(low: Tensor, high: Tensor, cameras: Cameras, masks: _Masks) -> tuple[Tensor, Tensor]:
    """The visual hull in a box (Laurentini 1994), but for a few views: the middles of its cells (N, 3), and the sides
    of a cell (3,).
    """
    # The middles of all cells of the box.
    cell = (high - low) / GRID
    steps = torch.arange(GRID, dtype=torch.float64) + 0.5
    axes = [low[i] + steps * cell[i] for i in range(3)]
    points = torch.cartesian_prod(*axes)  # (G * G * G, 3)
    return _in_masks(points, cameras, masks), cell
