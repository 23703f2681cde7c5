"""Where space is empty: a coarse grid of cells, some ruled out by the input masks, some found empty by the field.

What the masks of all views leave is the visual hull. Only in cells that may hold something is the field ever asked
(Instant NGP, appendix E.2), and only where they are seen is there anything to show.

Letters: `G` occupancy cells a side, `K` some of the cells, `V` views, `H W` rows and columns.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameras import Cameras
from common.runtime import rand
from ngp import Field, FieldConfig, cube, in_chunks

DENSEST = math.exp(15)  # the largest density that is remembered of an occupancy cell
MASK_GAP = 2  # pixels that a mask may end before the picture's border and still count as touching it


class Occupancy(nn.Module):
    """Which of the G^3 cells of the cube may hold something (Instant NGP, appendix E.2); belongs in checkpoints."""

    def __init__(self, config: FieldConfig):
        super().__init__()
        self.config = config
        self.cell = 2 * config.bound / config.occupancy_cells  # side length
        self.threshold = -math.log(1 - config.occupancy_alpha) / self.cell  # density of a cell with that opacity

        # A cell starts at twice the threshold: only after several updates that find nothing is it empty.
        shape = (config.occupancy_cells,) * 3
        self.register_buffer("possible", torch.ones(shape, dtype=torch.bool))  # not ruled out by the masks
        self.register_buffer("density", torch.full(shape, 2 * self.threshold))  # running maximum
        self.register_buffer("occupied", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("box", cube(config))  # (2, 3) around the occupied cells: least and greatest corner

    def forward(self, x: Tensor) -> Tensor:
        """Are points (*, 3) in occupied cells? (*,) boolean; one outside the cube counts as in its nearest cell."""
        g = self.config.occupancy_cells
        cell = ((x + self.config.bound) / self.cell).int().clamp(0, g - 1)
        index = (cell[..., 0] * g + cell[..., 1]) * g + cell[..., 2]
        return self.occupied.flatten()[index]

    def set_occupied(self, occupied: Tensor) -> None:
        """Take over which cells are occupied, (G, G, G) boolean, and their bounding box."""
        self.occupied.copy_(occupied)
        cells = occupied.nonzero()  # (K, 3)
        self.box[0] = cells.amin(0) * self.cell - self.config.bound
        self.box[1] = (cells.amax(0) + 1) * self.cell - self.config.bound

    @torch.no_grad()
    def carve(self, masks: Tensor, cameras: Cameras, valid: Tensor | None = None) -> None:
        """Rule out the cells that some view shows to be empty: the visual hull (Laurentini 1994), conservatively.

        masks (V, 1, H, W) in [0, 1] and the V cameras they belong to; valid (V, 1, H, W) is 1 where an image shows
        anything (default: everywhere). A view refuses a cell if no pixel of its footprint is in the mask. What lies
        outside the image is unknown and not refused if the mask touches the image's border, or ends up to `MASK_GAP`
        pixels before it; where it does not, the view shows the whole object, so nothing is there. Without
        `config.carve` nothing is ruled out. Raises `ValueError` where no cell is left.
        """
        config = self.config
        if not config.carve:
            return
        valid = torch.ones_like(masks) if valid is None else valid
        corners = self.corners()

        # One refusal is enough where there are few views; of many, some are forgiven.
        refusals = torch.zeros_like(self.possible, dtype=torch.int32)
        for mask, shown, camera in zip(masks > config.mask_threshold, valid > 0.5, cameras):
            pixels = _possible_pixels(mask, shown)
            refusals += ~_footprint_hits(pixels, corners, camera)
        self.possible &= refusals <= len(masks) // config.forgiven_views

        if not self.possible.any():
            raise ValueError(f"masks and cameras: no part of the cube of half side {config.bound:g} round the world "
                             "origin lies in every mask; the object must be inside the cube")
        self.set_occupied(self.possible)

    @torch.no_grad()
    def silhouette(self, camera: Cameras, size: int) -> Tensor:
        """The pixels from which a camera () may see something, (size, size) boolean: the footprints of all possible
        cells.
        """
        cells = _Footprints(*(x[self.possible] for x in _footprints(self.corners(), camera, size, size)))
        cells = _Footprints(*(x[cells.front] for x in cells))

        # One more rectangle begins, or ends, at each of its corners: sums over rows and columns count them.
        side = size + 3
        changes = self.possible.new_zeros(side * side, dtype=torch.int32)
        for row, column, change in ((cells.top, cells.left, 1), (cells.bottom, cells.right, 1),
                                    (cells.top, cells.right, -1), (cells.bottom, cells.left, -1)):
            index = row * side + column
            changes.index_add_(0, index, torch.full_like(index, change, dtype=torch.int32))
        count = changes.view(side, side).cumsum(0).cumsum(1)
        return count[1:size + 1, 1:size + 1] > 0

    def corners(self) -> Tensor:
        """Of all cells: (G + 1, G + 1, G + 1, 3)."""
        bound = self.config.bound
        axis = torch.linspace(-bound, bound, self.config.occupancy_cells + 1, device=self.occupied.device)
        return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)

    @torch.no_grad()
    def update(self, field: Field, generator: torch.Generator | None = None) -> None:
        """Ask the field at one point of every possible cell and empty the cells that absorb nothing.

        The points are jittered by the generator; without one they are the centers.
        """
        cells = self.possible.nonzero()  # (K, 3)
        jitter = 0.5
        if generator is not None:
            jitter = rand(*cells.shape, generator=generator, device=cells.device)
        points = (cells + jitter) * self.cell - self.config.bound

        # The running maximum forgets slowly what a cell once held, and would never forget an infinite density.
        faded = self.density[self.possible] * self.config.occupancy_decay
        found = in_chunks(field.density, points).clamp(max=DENSEST)
        density = torch.maximum(faded, found)
        self.density[self.possible] = density

        # Half the mean as well (Instant NGP: the mean), so that a field that is thin everywhere stays visible.
        threshold = (density.mean() / 2).clamp(max=self.threshold)
        self.set_occupied(self.possible & (self.density >= threshold))


def _possible_pixels(mask: Tensor, shown: Tensor) -> Tensor:
    """Pixels of a view that may be object, (H + 2, W + 2) boolean; mask, shown (1, H, W).

    One more pixel around the image stands for everything outside of it.
    """
    unknown = F.pad(~shown, (1, 1, 1, 1), value=True)
    mask = F.pad(mask & shown, (1, 1, 1, 1))

    # Masks of cut objects often end a pixel or two too early: those pixels may be object, too.
    gap = _dilate(unknown, MASK_GAP) & _dilate(mask, MASK_GAP)

    # Where the mask touches what the view does not show, the object may go on there.
    if (mask & _dilate(unknown, MASK_GAP + 1)).any():
        mask = mask | gap | unknown
    return mask[0]


def _dilate(mask: Tensor, pixels: int) -> Tensor:
    """A mask (1, H, W), boolean, grown by some pixels to all sides."""
    return F.max_pool2d(mask.float(), 2 * pixels + 1, stride=1, padding=pixels) > 0


class _Footprints(NamedTuple):
    """The pixels that cells, (G, G, G) or (K,), may cover in a view: rectangles, wrong only by being too large."""
    left: Tensor    # first column, in an image with one pixel around it that stands for all outside
    top: Tensor
    right: Tensor   # the column behind the last
    bottom: Tensor
    front: Tensor   # whether any of the cell is in front of the camera


def _footprints(corners: Tensor, camera: Cameras, height: int, width: int) -> _Footprints:
    """Of cells (G, G, G) with these corners, (G + 1, G + 1, G + 1, 3), in an image of so many pixels."""
    # Bounds of X, Y, Z over each cell, in view coordinates, (3, G, G, G) each.
    view = camera.to_view(corners.reshape(-1, 3)).reshape(corners.shape)
    low, high = cell_bounds(view.movedim(-1, 0))

    # Bounds of the projection, NDC (2, G, G, G): the extremes of X / Z and Y / Z over these intervals.
    near = low[2].clamp(min=1e-6)
    far = high[2].clamp(min=1e-6)
    focal = camera.focal[:, None, None, None]
    principal = camera.principal[:, None, None, None]
    xy_low = focal * torch.minimum(low[:2] / near, low[:2] / far) + principal
    xy_high = focal * torch.maximum(high[:2] / near, high[:2] / far) + principal

    # NDC +x is left and +y is up: the largest are the first pixel.
    left, top = _padded_pixel(xy_high, height, width)
    right, bottom = _padded_pixel(xy_low, height, width) + 1
    return _Footprints(left, top, right, bottom, high[2] > 0)


def _footprint_hits(pixels: Tensor, corners: Tensor, camera: Cameras) -> Tensor:
    """Does the projection of each cell touch one of the given pixels? (G, G, G) boolean, wrong only by saying yes.

    pixels (H + 2, W + 2) as `_possible_pixels` returns them; corners (G + 1, G + 1, G + 1, 3) of the cells.
    """
    # How many of the pixels lie in the cell's rectangle, by a summed area table.
    cells = _footprints(corners, camera, pixels.shape[0] - 2, pixels.shape[1] - 2)
    total = F.pad(pixels.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    above = total[cells.top, cells.right] - total[cells.top, cells.left]
    count = total[cells.bottom, cells.right] - total[cells.bottom, cells.left] - above

    # What is behind the camera is outside the image, too.
    outside = bool(pixels[0, 0])
    return torch.where(cells.front, count > 0, outside)


def _padded_pixel(xy: Tensor, height: int, width: int) -> Tensor:
    """Columns and rows (2, ...) of NDC (2, ...) in an image with one pixel around it; 0 is before the image."""
    size = torch.tensor([width, height], device=xy.device)[:, None, None, None]
    pixel = ((1 - xy) / 2 * size).floor().clamp(min=-1).minimum(size)
    return pixel.long() + 1


def cell_bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value at the eight corners of each cell: (C, X + 1, Y + 1, Z + 1) -> (C, X, Y, Z) each."""
    low = -F.max_pool3d(-values[None], 2, stride=1)[0]
    high = F.max_pool3d(values[None], 2, stride=1)[0]
    return low, high
