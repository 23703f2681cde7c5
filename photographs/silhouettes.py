"""Do masks and cameras fit together? What all other views allow, seen from one view.

The object lies inside the cone of every mask, so in the intersection of the cones (the visual hull, Laurentini 1994).
A ray through a pixel of one mask has to pass through a point that all other masks allow. Where cameras are wrong, many
rays do not. Rays along a mask's outline are the strictest: they only touch the object.

No grid in space is needed, and no box: along a ray, the rectangles round the other masks leave an interval of depths.

Shapes: `V` views, `J` = V - 1 other views, `P` rays of a view, `G` cells of a mask's grid a side, `D` depths along a
ray, `N` rays that may meet something.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from cameras import Cameras, Scene, Similarity, evenly_spaced
from datasets.crop import tight_box
from volume import MASK_GAP, dilate

GRID = 128       # cells a side of the grid that holds a mask and its surroundings
MARGIN = 6       # cells of it around the mask's box
REACH = 4        # cells: distances to an outline are known up to here
BORDER = MASK_GAP + 1  # cells from a mask's last one to the first outside of a picture that it touches
RAYS = 96        # rays through a mask, and as many along its outline
DEPTHS = 64      # points along a ray
FARTHEST = 20.0  # how far along a ray the object may be, in radii of the cameras' cloud
PASSES_BY = 1.5  # cells by which a ray through a mask passes the other masks by, to count as outside
BLUR = 0.5       # cells by which a ray along an outline may pass them by, for pixels are not points
BIG = 1e9        # what stands for infinity, which times zero is no number


class Silhouettes(NamedTuple):
    """The masks of views (V,), each on a grid round its box. Positions are NDC of the view."""
    distance: Tensor  # (V, G, G) cells from the outline, positive inside the mask; outside the picture nothing is known
    corner: Tensor    # (V, 2) the grid's top left corner
    side: Tensor      # (V,) of the grid
    bounds: Tensor    # (V, 2, 2) greatest and least corner of the rectangle outside which the object cannot be
    inside: Tensor    # (V, RAYS, 2) points of the mask
    outline: Tensor   # (V, RAYS, 2) points along its outline, just inside


def silhouettes(scene: Scene) -> Silhouettes:
    """The masks of a scene's views. Raises `ValueError` with one line for an empty one."""
    found = []
    for name, mask, valid in zip(scene.names, scene.masks, scene.valid):
        if not (mask > 0.5).any():
            raise ValueError(f"frame {name}: its mask is empty")
        found.append(_silhouette(mask[0].float(), valid[0].float()))
    return default_collate(found)


def _silhouette(mask: Tensor, valid: Tensor) -> Silhouettes:
    """The silhouette, without the axis V, of a soft mask (S, S), where `valid` (S, S) is 1."""
    # A grid as fine as the picture, or coarser.
    size = len(mask)
    box = tight_box(mask > 0.5).corners().float()
    cell = max(1.0, (box[1] - box[0]).max().item() / (GRID - 2 * MARGIN))  # pixels
    first = box[0] - MARGIN * cell
    corner = 1 - 2 * first / size
    side = torch.tensor(2 * GRID * cell / size)

    # The object may continue outside the picture where its mask touches the border.
    inside = _resample(mask, first, cell) > 0.5
    unknown = _resample(valid, first, cell) < 0.5
    touching = inside & dilate(unknown[None], BORDER)[0]
    possible = inside | unknown if touching.any() else inside

    # The outline runs between two cells, half a cell from the center of each.
    distance = _distance_to(~possible) - _distance_to(possible)
    distance = distance - distance.sign() / 2

    # No rectangle's edge on a side where the object may continue. NDC point left and up, so the last cell is the least.
    box = tight_box(inside).corners().float()
    edges = box + torch.tensor([[-2.0], [2.0]])
    if touching.any():
        touched = tight_box(touching).corners().float()
        edges[0, touched[0] < box[0] + BORDER] = -BIG
        edges[1, touched[1] > box[1] - BORDER] = BIG
    bounds = corner - side * edges / GRID

    # Where the picture's border cuts the object is no outline.
    outline = inside & dilate(~inside[None], 1)[0] & ~dilate(unknown[None], BORDER)[0]
    points = corner - side * _some_cells(inside) / GRID
    on_outline = corner - side * _some_cells(outline if outline.any() else inside) / GRID
    return Silhouettes(distance, corner, side, bounds, points, on_outline)


# ---------------------------------------------------------------------------------------------- views and other views

def clearance(views: Silhouettes, cameras: Cameras, view: int, points: Tensor) -> Tensor:
    """How far inside all other masks the rays through points (P, 2), NDC of one view, come: (P,), cells of a mask.

    Of each ray its best point counts. Negative where it passes the others by, -REACH where it meets nothing at all.
    The cameras (V,) must be `centered`.
    """
    # The rays as the other cameras see them: start + depth * step, (J, P, 3) each.
    others = [j for j in range(len(cameras)) if j != view]
    rays_o, rays_d = cameras[view].rays(points)
    cameras = cameras[others]
    start = cameras.to_view(rays_o.expand(len(others), -1, -1))
    step = rays_d @ cameras.R

    # Five planes bound what a camera may show of the object: those through its rectangle's sides, and its own.
    focal = cameras.focal.unsqueeze(1)
    principal = cameras.principal.unsqueeze(1)
    high, low = ((views.bounds[others] - principal) / focal).split(1, 1)  # (J, 1, 2) each

    def heights(x: Tensor) -> Tensor:
        """How far points (J, P, 3) in view coordinates are on the right side of each plane: (J, P, 5)."""
        across, along = x.split([2, 1], -1)
        return torch.cat([across - low * along, high * along - across, along], -1)

    # A ray is on the right side of each before a depth, or beyond one. Rays that are left no depth meet nothing.
    slope = heights(step)
    slope = torch.where(slope.abs() < 1e-9, 1e-9, slope)
    depth = -heights(start) / slope
    nearest = torch.where(slope > 0, depth, -BIG).amax((0, 2)).clamp(min=1e-3)
    farthest = torch.where(slope < 0, depth, BIG).amin((0, 2))
    farthest = torch.minimum(farthest, nearest + FARTHEST)
    meets = nearest < farthest

    # A point is as far inside as the strictest of the other masks says.
    fraction = (torch.arange(DEPTHS) + 0.5) / DEPTHS
    nearest = nearest[meets].unsqueeze(1)
    depth = (nearest + (farthest[meets].unsqueeze(1) - nearest) * fraction).unsqueeze(2)        # (N, D, 1)
    seen = start[:, meets].unsqueeze(2) + depth * step[:, meets].unsqueeze(2)                   # (J, N, D, 3)
    xy = focal.unsqueeze(1) * seen[..., :2] / seen[..., 2:].clamp(min=1e-6) + principal.unsqueeze(1)
    corner = views.corner[others, None, None]
    position = 2 * (corner - xy) / views.side[others, None, None, None] - 1
    distance = views.distance[others].unsqueeze(1)
    inside = F.grid_sample(distance, position, padding_mode="border", align_corners=False)[:, 0]  # (J, N, D)
    best = torch.full((len(points),), float(-REACH))
    best[meets] = inside.amin(0).amax(1)
    return best


def centered(cameras: Cameras) -> Cameras:
    """The same cameras, float32, in a world whose origin is their mean center and whose unit is the radius of their
    cloud."""
    # In double precision: georeferenced coordinates are large.
    centers = cameras.to(torch.float64).centers()
    mean = centers.mean(0)
    radius = (centers - mean).norm(dim=1).square().mean().sqrt().clamp(min=1e-12)
    return Similarity(torch.eye(3, dtype=torch.float64), radius, mean).normalized(cameras).to(torch.float32)


class Misfit(NamedTuple):
    """How badly the masks of V views fit some cameras."""
    outline: Tensor  # (V,) by how much rays along a mask's outline pass the other masks by, mean, cells
    outside: Tensor  # (V,) fraction of the mask outside what the others allow
    touching: Tensor  # (V,) fraction of the outline outside what the others allow

    def total(self) -> float:
        """One number, cells."""
        return self.outline.mean().item()


def misfit(views: Silhouettes, cameras: Cameras, most: float = math.inf) -> Misfit | None:
    """How badly silhouettes fit cameras (V,); None as soon as the total is sure to be above `most`."""
    cameras = centered(cameras)
    rows = []
    total = 0.0
    for i in range(len(cameras)):
        passes = -clearance(views, cameras, i, torch.cat([views.inside[i], views.outline[i]]))
        along = passes[RAYS:]
        outside = (passes[:RAYS] > PASSES_BY).float().mean()
        touching = (along > 2 * BLUR).float().mean()
        rows.append(torch.stack([(along - BLUR).clamp(min=0).mean(), outside, touching]))
        total += rows[-1][0].item() / len(cameras)
        if total > most:
            return None
    return Misfit(*torch.stack(rows, 1))


# ---------------------------------------------------------------------------------------------- masks

def _resample(image: Tensor, first: Tensor, cell: float) -> Tensor:
    """An image (S, S) averaged over the cells of a grid, (G, G); 0 outside.

    The grid begins at pixel `first` (column, row); a cell has `cell` pixels a side.
    """
    # Three by three points of every cell.
    points = first.unsqueeze(1) + cell * (torch.arange(3 * GRID) + 0.5) / 3  # (2, 3 G)
    columns, rows = 2 * points / len(image) - 1
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    sampled = F.grid_sample(image[None, None], torch.stack([x, y], -1)[None], align_corners=False)
    return F.avg_pool2d(sampled, 3)[0, 0]


def _distance_to(mask: Tensor) -> Tensor:
    """Distance of every cell to the nearest one of a mask (G, G), at most REACH."""
    # The least of the squares in a window round the cell.
    offset = torch.arange(-REACH, REACH + 1).square()
    away = (offset.unsqueeze(1) + offset).reshape(-1, 1)
    squared = torch.where(mask, 0.0, float(REACH**2))
    padded = F.pad(squared[None, None], [REACH] * 4, value=float(REACH**2))
    windows = F.unfold(padded, 2 * REACH + 1)[0]  # (cells of a window, G * G)
    return (windows + away).amin(0).clamp(max=REACH**2).sqrt().reshape(mask.shape)


def _some_cells(mask: Tensor) -> Tensor:
    """Centers (column, row) of RAYS cells of a mask, (RAYS, 2), evenly spaced in reading order; small ones repeat."""
    centers = mask.nonzero().flip(1) + 0.5
    chosen = evenly_spaced(len(centers), RAYS)
    return centers[torch.tensor(chosen).repeat(RAYS)[:RAYS]]
