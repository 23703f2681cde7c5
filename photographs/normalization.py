"""The normalized world: the object of a capture where CO3D's are, and the way back to the user's world.

The object sits in the middle of the field's cube, and as large in it as CO3D's do. The axes are those of the first
camera, in which the field's cube lies anyway (`reconstruction.py`). So a capture whose world is turned, scaled or
shifted is the same scene; `Similarity` leads back.

Shapes: `V` photographs, `P` points, `G` points a side of a grid.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import HALF_SIDE, Cameras, Scene, Similarity, nearest_point
from datasets.crop import MASK_THRESHOLD, box_of_mask
from volume import possible_pixels

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
    middle, spread = cloud(scene.cameras)
    first = Similarity(scene.cameras.R[0], spread, middle)
    cameras = first.normalized(scene.cameras)
    points = (points - middle) @ first.R / spread

    # Where the object is: in a few views near to each other COLMAP's points on it know better than masks how far away.
    masks = F.adaptive_max_pool2d(scene.masks, min(scene.masks.shape[-1], FINE))
    fine = _possible(scene, FINE)
    corners = mask_corners(masks)
    center = common_point(cameras, corners)
    on_object = _in_masks(points, cameras, fine)
    if len(on_object) >= ENOUGH_POINTS:
        center = on_object.median(0).values

    # How large it is at most: every mask spans an angle.
    depth = cameras.to_view(center.expand(len(scene), 1, 3))[:, 0, 2]
    if depth.min() <= 0:
        behind = scene.names[depth.argmin()]
        raise ValueError(f"the cameras do not look at one place: what the others see is behind the camera of {behind}; "
                         "the poses may be in another convention (docs/photographs.md)")
    half_sides = (corners[:, 0] - corners[:, 1]).amax(1) / 2
    radius = (depth * half_sides / cameras.focal.amin(1)).max()

    # The box around the visual hull (Laurentini 1994), more closely each time: of a grid's cells those whose middle is
    # in the masks. What is so thin that a closer look misses it keeps its first box.
    low, high = center - SEARCH * radius, center + SEARCH * radius
    for look in (_possible(scene, COARSE), fine, fine):
        cell = (high - low) / GRID
        steps = torch.arange(GRID, dtype=torch.float64) + 0.5
        middles = torch.cartesian_prod(*(low + steps.unsqueeze(1) * cell).T)  # (G * G * G, 3)
        inside = _in_masks(middles, cameras, look)
        if len(inside) > 0:
            low, high = inside.amin(0) - cell, inside.amax(0) + cell
        elif look is not fine:
            raise ValueError("masks and cameras: no part of space lies in every mask; the poses may be in another "
                             "convention (docs/photographs.md), or the masks of something else")
    unit = (high - low).max().item() / 2 / HALF_SIDE
    return Similarity(torch.eye(3, dtype=torch.float64), unit, (low + high) / 2).then(first)


def cloud(cameras: Cameras, where: str = "") -> tuple[Tensor, float]:
    """The mean center (3,) of cameras (V,) and how far they are from it, root mean square. Raises `ValueError` where
    they are all there; it begins with `where`.
    """
    centers = cameras.centers()
    middle = centers.mean(0)
    spread = (centers - middle).norm(dim=1).square().mean().sqrt().item()
    if not spread > 1e-9 * (1 + middle.norm().item()):
        raise ValueError(f"{where}all cameras are at one place; the object has to be seen from several")
    return middle, spread


def mask_corners(masks: Tensor) -> Tensor:
    """The corners of the boxes round soft masks (V, 1, S, S), (V, 2, 2), float64: greatest and least NDC (x, y)."""
    corners = torch.stack([box_of_mask(mask[0]).corners() for mask in masks])
    return 1 - 2 * corners / masks.shape[-1]


def common_point(cameras: Cameras, corners: Tensor) -> Tensor:
    """The point (3,) nearest to the rays of cameras (V,), float64, through the middles of boxes (V, 2, 2), NDC."""
    rays_o, rays_d = cameras.rays(corners.mean(1, keepdim=True))
    return nearest_point(rays_o[:, 0], rays_d[:, 0])


def _possible(scene: Scene, side: int) -> Tensor:
    """Where the object may be in every view, at most `side` = m pixels a side, rather a little too large: (V, m + 2,
    m + 2) boolean, with one more pixel around it for all that is outside.
    """
    side = min(scene.masks.shape[-1], side)
    masks = F.adaptive_max_pool2d(scene.masks, side) > MASK_THRESHOLD
    shown = F.adaptive_max_pool2d(1 - scene.valid, side) == 0
    return torch.stack([possible_pixels(mask, known) for mask, known in zip(masks, shown)])


def _in_masks(points: Tensor, cameras: Cameras, possible: Tensor) -> Tensor:
    """Those of points (P, 3) that lie in the masks of all views (V), but for a few that may be wrong: (N, 3)."""
    # View after view, and each looks only at what is left.
    forgiven = len(cameras) // FORGIVEN_VIEWS
    refusals = torch.zeros(len(points), dtype=torch.long)
    for mask, camera in zip(possible.float(), cameras):
        xy, depth = camera.project(points)

        # One pixel of the mask around the image stands for all that is outside.
        size = len(mask)
        grid = (-xy * (size - 2) / size).clamp(1 / size - 1, 1 - 1 / size)
        sampled = F.grid_sample(mask[None, None], grid.float()[None, None], mode="nearest", align_corners=False)
        seen = (sampled[0, 0, 0] > 0) & (depth > 0)

        refusals += ~seen
        left = refusals <= forgiven
        points = points[left]
        refusals = refusals[left]
    return points
