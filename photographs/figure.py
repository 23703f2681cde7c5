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

from cameras import Cameras, Scene, evenly_spaced
from photographs.silhouettes import centered, clearance, silhouettes

TILE = 288     # pixels a side of a photograph in the picture
TEXT = 18      # pixels of a line of text
SHOWN = 4      # photographs in a row
CELLS = 144    # rays a side that ask what the others allow
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
    # The object's middle: the point nearest to the rays through the middles of the masks.
    cameras = scene.cameras.to(torch.float64)
    boxes = torch.stack([_mask_box(mask[0]) for mask in scene.masks])
    _, rays_d = cameras.rays(boxes.mean(1, keepdim=True))
    along = F.normalize(rays_d[:, 0], dim=1)
    onto = along.unsqueeze(2) * along.unsqueeze(1)
    across = torch.eye(3, dtype=torch.float64) - onto  # (V, 3, 3)
    centers = cameras.centers()
    projected = (across @ centers.unsqueeze(2)).mean(0)
    inverse = torch.linalg.pinv(across.mean(0), rtol=1e-5, hermitian=True)
    middle = (inverse @ projected)[:, 0]

    # Distances, angles, and the part of the horizon that is not its largest gap.
    axes = _axes(cameras)
    offset = (centers - middle) @ axes.T
    distance = offset.norm(dim=1).clamp(min=1e-12)
    elevation = torch.rad2deg(torch.asin(offset[:, 2] / distance))
    azimuth = torch.rad2deg(torch.atan2(offset[:, 1], offset[:, 0]))
    azimuth = azimuth.sort().values
    last_gap = azimuth[:1] + 360 - azimuth[-1:]
    gaps = torch.cat([azimuth.diff(), last_gap])

    # How large the object is where it is.
    view = cameras.to_view(middle.expand(len(scene), 1, 3))
    depth = view[:, 0, 2]
    sides = (boxes[:, 0] - boxes[:, 1]) / cameras.focal
    size = sides.norm(dim=1) * depth.abs()
    return Stand(middle, axes, offset, distance, elevation, depth, size, 360 - gaps.max().item())


def _mask_box(mask: Tensor) -> Tensor:
    """Corners (2, 2) of the box round a mask (S, S), NDC: greatest and least (x, y)."""
    places = (mask > 0.5).nonzero().flip(1).double()
    edges = torch.stack([places.amin(0), places.amax(0) + 1])
    return 1 - 2 * edges / len(mask)


def _axes(cameras: Cameras) -> Tensor:
    """Two directions along the ground and the vertical, (3, 3), as cameras (V,) that are held upright suggest them."""
    # At right angles to their horizontal axes; where those leave a choice, near to their mean up axis.
    sideways = cameras.R[:, :, 0]
    up = cameras.R[:, :, 1].mean(0)
    scatter = sideways.T @ sideways / len(sideways) - 0.01 * up.outer(up)
    axes = torch.linalg.eigh(scatter).eigenvectors.T.flip(0)
    vertical = axes[2] if axes[2] @ up >= 0 else -axes[2]
    return torch.stack([axes[0], torch.linalg.cross(vertical, axes[0]), vertical])


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
    pen.multiline_text((3 * TILE + 10, TEXT + 10), LEGEND, fill=INK, spacing=6)

    # What the others allow.
    views = silhouettes(scene)
    cameras = centered(scene.cameras)
    chosen = evenly_spaced(len(scene), SHOWN)
    for column, view in enumerate(chosen):
        inside = clearance(views, cameras, view, _grid(CELLS))
        inside = _resized(inside.reshape(1, CELLS, CELLS))
        tile = _outlines(scene, view, inside[0] > -0.5)
        _paste(sheet, tile, column, 1, f"frame {scene.names[view]}: what the others allow")

    # Points of the first, lines in the others.
    first = chosen[0]
    points = _extremes(views[first].outline)
    tile = _dots(scene, first, points)
    _paste(sheet, tile, 0, 2, f"frame {scene.names[first]}: four points")
    for column, view in enumerate(chosen[1:], 1):
        tile = _lines(scene, first, view, points)
        _paste(sheet, tile, column, 2, f"frame {scene.names[view]}: their lines")
    return sheet


LEGEND = """row 1: cameras (lines: where they
  look), the object in orange

row 2: orange, the outline of what
  the other masks allow; cyan, that
  of the mask; red, the part of it
  that they forbid
  Where all is right, orange lies on
  cyan or outside of it.

row 3: each point is somewhere on
  the line of its color"""


def _paste(sheet: Image.Image, tile: Image.Image, column: int, row: int, title: str) -> None:
    top = row * (TILE + TEXT)
    sheet.paste(tile, (column * TILE, top + TEXT))
    ImageDraw.Draw(sheet).text((column * TILE + 4, top + 3), title, fill=INK)


def _map(scene: Scene, place: Stand, x: int, y: int) -> Image.Image:
    """The cameras in the plane of two axes: where they are, and where they look."""
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    pen = ImageDraw.Draw(tile)
    scale = TILE / (2.3 * place.distance.max().item())  # pixels a unit of length

    def spot(position: Tensor) -> tuple[float, float]:
        """Column and row on the tile of a position (3,) in the world."""
        column = TILE / 2 + scale * position[x].item()
        row = TILE / 2 - scale * position[y].item()
        return column, row

    # The object, as large as its masks say.
    half = scale * place.size.median().item() / 2
    least = TILE / 2 - half
    most = TILE / 2 + half
    pen.ellipse((least, least, most, most), outline=ALLOWED, width=2)

    # The cameras; a line of a quarter of their distance along the optical axis.
    axis = scene.cameras.R[:, :, 2].double() @ place.axes.T
    ahead = place.offset + axis * place.distance.unsqueeze(1) / 4
    for name, start, end in zip(scene.names, place.offset, ahead):
        column, row = spot(start)
        pen.line([(column, row), spot(end)], fill=INK)
        pen.ellipse((column - 3, row - 3, column + 3, row + 3), fill=MASK)
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
        outside = (~region).float()
        grown = F.max_pool2d(outside[None], 3, stride=1, padding=1)[0]
        pixels[region & (grown > 0)] = torch.tensor(color).float()
    return _to_image(pixels)


def _dots(scene: Scene, view: int, points: Tensor) -> Image.Image:
    """A photograph with points (P, 2), NDC."""
    tile = _to_image(_picture(scene, view))
    pen = ImageDraw.Draw(tile)
    for (x, y), color in zip(_pixels(points), COLORS):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline="white", fill=color)
    return tile


def _lines(scene: Scene, first: int, view: int, points: Tensor) -> Image.Image:
    """A photograph with the epipolar lines of points (P, 2), NDC of the view `first`."""
    tile = _to_image(_picture(scene, view))
    pen = ImageDraw.Draw(tile)

    # Points near and far along each ray.
    cameras = centered(scene.cameras)
    rays_o, rays_d = cameras[first].rays(points)
    depth = FARTHEST * torch.logspace(-3, 0, 400).unsqueeze(1)
    for start, step, color in zip(rays_o, rays_d, COLORS):
        xy, z = cameras[view].project(start + depth * step)
        near = (xy.abs() < 3).all(1)
        shown = _pixels(xy[near & (z > 1e-3)])
        if len(shown) > 1:
            pen.line(shown, fill=color, width=2)
    return tile


def _picture(scene: Scene, view: int) -> Tensor:
    """The picture of a view, (TILE, TILE, 3), from 0 to 255."""
    image = _resized(scene.images[view].float())
    return image.clamp(0, 1).permute(1, 2, 0) * 255


def _resized(image: Tensor) -> Tensor:
    """(C, S, S) as large as a tile."""
    return F.interpolate(image[None], (TILE, TILE), mode="bilinear", antialias=True)[0]


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.byte().numpy())


def _grid(cells: int) -> Tensor:
    """NDC of the middles of a grid's cells, row by row, (cells * cells, 2)."""
    line = 1 - 2 * (torch.arange(cells) + 0.5) / cells
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([columns, rows], 2).reshape(-1, 2)


def _extremes(points: Tensor) -> Tensor:
    """The leftmost, rightmost, lowest and highest of points (P, 2): (4, 2)."""
    most = points.argmax(0).tolist()
    least = points.argmin(0).tolist()
    return points[most + least]


def _pixels(xy: Tensor) -> list[tuple[float, float]]:
    """NDC (P, 2) as columns and rows of a tile."""
    places = TILE * (1 - xy) / 2
    return [tuple(place) for place in places.tolist()]
