"""What a person can check: where the cameras stand round the object, and one picture of it (for `check.py`).

Three rows: the cameras from above and from the side; photographs with the outline of what all other views allow; and
points of one photograph with the lines on which the others must show them.

Shapes: `V` views, `S` side of their square pictures in pixels, `P` points.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from cameras import Cameras, Scene, evenly_spaced, pixel_grid, upright_axis
from photographs.normalization import common_point, mask_corners
from photographs.silhouettes import centered, clearance, silhouettes
from volume import dilate

TILE = 288     # pixels a side of a photograph in the picture
TEXT = 18      # pixels of a line of text
SHOWN = 4      # photographs in a row
CELLS = 144    # rays a side that are tested against the other masks
FARTHEST = 30  # how far an epipolar line is followed, in radii of the cameras' cloud
PAPER = (24, 24, 24)
INK = (225, 225, 225)
ALLOWED = (255, 150, 0)
MASK = (0, 225, 225)
FORBIDDEN = (255, 0, 70)
COLORS = ((255, 90, 90), (90, 225, 90), (120, 165, 255), (255, 225, 60))


# ---------------------------------------------------------------------------------------------- where cameras stand

class Stand(NamedTuple):
    """Where V cameras stand round the object; lengths in the world's unit, angles in degrees."""
    middle: Tensor     # (3,) the object's middle
    axes: Tensor       # (3, 3) rows: two directions along the ground, and the vertical as upright photographs have it
    offset: Tensor     # (V, 3) the cameras, along these axes, from the object's middle
    distance: Tensor   # (V,) from the object's middle
    elevation: Tensor  # (V,) over the object's horizon
    depth: Tensor      # (V,) of the object's middle in each view, negative behind it
    size: Tensor       # (V,) the diagonal of its mask's box at that depth
    around: float      # how much of the horizon the cameras are spread over


def stand(scene: Scene) -> Stand:
    """Where a scene's cameras stand round what its masks show."""
    # The object's middle, and the axes of upright photographs.
    cameras = scene.cameras.to(torch.float64)
    corners = mask_corners(scene.masks)
    middle = common_point(cameras, corners)
    vertical = upright_axis(cameras)
    ground = torch.linalg.svd(vertical[None]).Vh[1]
    axes = torch.stack([ground, torch.linalg.cross(vertical, ground), vertical])

    # Distances, angles, and the part of the horizon that is not its largest gap.
    offset = (cameras.centers() - middle) @ axes.T
    distance = offset.norm(dim=1).clamp(min=1e-12)
    elevation = torch.rad2deg(torch.asin(offset[:, 2] / distance))
    azimuth = torch.rad2deg(torch.atan2(offset[:, 1], offset[:, 0])).sort().values
    gaps = torch.cat([azimuth, azimuth[:1] + 360]).diff()

    # How large the object is where it is.
    depth = cameras.to_view(middle.expand(len(scene), 1, 3))[:, 0, 2]
    sides = (corners[:, 0] - corners[:, 1]) / cameras.focal
    size = sides.norm(dim=1) * depth.abs()
    return Stand(middle, axes, offset, distance, elevation, depth, size, 360 - gaps.max().item())


# ---------------------------------------------------------------------------------------------- the picture

def draw(scene: Scene) -> Image.Image:
    """The picture of a scene with two views or more: three rows (see the top of the file)."""
    sheet = Image.new("RGB", (SHOWN * TILE, 3 * (TILE + TEXT)), PAPER)

    # The cameras from above and from two sides.
    place = stand(scene)
    _paste(sheet, _map(scene, place, 0, 1), 0, 0, "from above")
    _paste(sheet, _map(scene, place, 0, 2), 1, 0, "from the side")
    _paste(sheet, _map(scene, place, 1, 2), 2, 0, "from another side")
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((3 * TILE + 10, TEXT + 10), LEGEND, fill=INK, spacing=9)

    # What the others allow.
    views = silhouettes(scene)
    cameras = centered(scene.cameras)
    chosen = evenly_spaced(len(scene), SHOWN)
    for column, view in enumerate(chosen):
        rows = [clearance(views, cameras, view, rays) for rays in pixel_grid(CELLS, CELLS).split(16 * CELLS)]
        inside = _resized(torch.cat(rows).reshape(1, CELLS, CELLS))
        tile = _outlines(scene, view, inside[0] > -0.5)
        _paste(sheet, tile, column, 1, f"frame {scene.names[view]}: what the others allow")

    # The leftmost, rightmost, lowest and highest point of the first one's outline, and their lines in the others.
    first = chosen[0]
    outline = views.outline[first]
    points = outline[outline.argmax(0).tolist() + outline.argmin(0).tolist()]
    for column, view in enumerate(chosen):
        tile = _lines(scene, cameras, first, view, points)
        _paste(sheet, tile, column, 2, f"frame {scene.names[view]}: {'their lines' if column else 'four points'}")
    return sheet


LEGEND = """row 1: cameras (lines: where they look),
the object in orange
row 2: orange, the outline of what the other
masks allow; cyan, that of the mask; red, the
part of it that they forbid. Where all is
right, orange lies on cyan or outside of it.
row 3: each point is on the line of its color"""


def _paste(sheet: Image.Image, tile: Image.Image, column: int, row: int, title: str) -> None:
    top = row * (TILE + TEXT)
    sheet.paste(tile, (column * TILE, top + TEXT))
    ImageDraw.Draw(sheet).text((column * TILE + 4, top + 3), title, fill=INK)


def _map(scene: Scene, place: Stand, x: int, y: int) -> Image.Image:
    """The cameras in the plane of two axes: where they are, and where they look."""
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    pen = ImageDraw.Draw(tile)
    scale = TILE / (2.3 * place.distance.max().item())  # pixels per unit of length

    # The object, as large as its masks say.
    half = scale * place.size.median().item() / 2
    pen.circle((TILE / 2, TILE / 2), half, outline=ALLOWED, width=2)

    # The cameras; a line of a quarter of their distance along the optical axis.
    axis = scene.cameras.R[:, :, 2].double() @ place.axes.T
    ahead = place.offset + axis * place.distance.unsqueeze(1) / 4
    ends = torch.stack([place.offset, ahead], 1)[..., [x, y]]  # (V, 2, 2)
    ends = TILE / 2 + scale * ends * torch.tensor([1.0, -1.0])
    for name, (column, row, *end) in zip(scene.names, ends.flatten(1).tolist()):
        pen.line([column, row, *end], fill=INK)
        pen.circle((column, row), 3, fill=MASK)
        label = Path(name).stem[-4:].strip("_-")
        pen.text((column + 5, row - 5), label, fill=INK)
    return tile


def _outlines(scene: Scene, view: int, allowed: Tensor) -> Image.Image:
    """A photograph with the outline of an allowed region (TILE, TILE), and of its mask."""
    mask = _resized(scene.masks[view].float())[0] > 0.5
    pixels = _picture(scene, view)
    forbidden = mask & ~allowed
    pixels[forbidden] = 0.4 * pixels[forbidden] + 0.6 * torch.tensor(FORBIDDEN)

    # An outline is what a region loses when it shrinks by a pixel.
    for region, color in ((mask, MASK), (allowed, ALLOWED)):
        pixels[region & dilate(~region[None], 1)[0]] = torch.tensor(color).float()
    return Image.fromarray(pixels.byte().numpy())


def _lines(scene: Scene, cameras: Cameras, first: int, view: int, points: Tensor) -> Image.Image:
    """A photograph with points (P, 2), NDC of the view `first`, or in another view with their epipolar lines."""
    tile = Image.fromarray(_picture(scene, view).byte().numpy())
    pen = ImageDraw.Draw(tile)
    rays_o, rays_d = cameras[first].rays(points)
    depth = FARTHEST * torch.logspace(-3, 0, 400).unsqueeze(1)
    for start, step, color in zip(rays_o, rays_d, COLORS):
        # Points near and far along the ray, as columns and rows.
        xy, z = cameras[view].project(start + depth * step)
        near = (xy.abs() < 3).all(1) & (z > 1e-3)
        shown = [tuple(place) for place in (TILE * (1 - xy[near]) / 2).tolist()]
        if view == first:
            pen.circle(shown[0], 4, outline="white", fill=color)
        elif len(shown) > 1:
            pen.line(shown, fill=color, width=2)
    return tile


def _picture(scene: Scene, view: int) -> Tensor:
    """The picture of a view, (TILE, TILE, 3), from 0 to 255."""
    image = _resized(scene.images[view].float())
    return image.clamp(0, 1).permute(1, 2, 0) * 255


def _resized(image: Tensor) -> Tensor:
    """(C, S, S) as large as a tile."""
    return F.interpolate(image[None], (TILE, TILE), mode="bilinear", antialias=True)[0]
