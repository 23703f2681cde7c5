"""Own photographs as a scene: `load_capture`.

    photographs.py   which pictures, masks and cameras a folder has, in the user's world
    capture.py       pictures decoded, lens distortion undone, squares of one size; the world normalized

A photograph is kept whole and padded to a square about its middle. The lens's distortion is undone at the photograph's
own size and intrinsics: what a barrel lens brings in from beyond that frame is lost, for a phone 2 % at each border.

In the normalized world the object sits where CO3D's do: in the middle of the field's cube, and as large in it. Its axes
are those of the first camera, in which the field's cube lies anyway (`reconstruction.py`). So a capture whose world is
turned, scaled or shifted is the same scene; `Similarity` leads back to the user's world.

Letters: `V` photographs, `P` points, `S` side of the square output, `H W` rows and columns of a photograph, `G` points
a side of a grid.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cameras import Cameras, look_at, nearest_point_to_axes
from common import files
from common.runtime import Progress
from datasets.crop import MASK_THRESHOLD, Scene, open_picture
from photographs.reading import Lens, Photograph, Photographs, read_capture

HALF_SIDE = 2.5      # of the box around the object, along its longest side; CO3D units. Toys and apple: 2.25 to 2.9
SEARCH = 1.5         # half side of the cube where the object is looked for, in radii of the largest mask
GRID = 48            # points a side of that cube
COARSE = 64          # pixels a side of the masks at the first look, which may miss nothing thin
FINE = 128           # pixels a side of the masks at the later ones
FORGIVEN_VIEWS = 6   # one view of so many may be wrong about a point, as in `ngp.FieldConfig`
ENOUGH_POINTS = 20   # of COLMAP's, on the object, to tell how far away it is


# ---------------------------------------------------------------------------------------------- what others call

class Similarity(NamedTuple):
    """From the normalized world to the user's: x_user = scale * R @ x + shift. Tensors are float64."""
    R: Tensor      # (3, 3) a rotation
    scale: float   # the user's units in one CO3D unit
    shift: Tensor  # (3,) where the user's world has the middle of the object

    def points(self, x: Tensor) -> Tensor:
        """Points (*, 3) of the normalized world in the user's, in the same dtype."""
        moved = self.scale * x.double() @ self.R.T.to(x.device) + self.shift.to(x.device)
        return moved.to(x.dtype)

    def cameras(self, cameras: Cameras) -> Cameras:
        """Cameras (*) of the normalized world in the user's, float64: a world may be far from its origin."""
        cameras = cameras.to("cpu", torch.float64)
        R = self.R @ cameras.R
        T = self.scale * cameras.T - torch.einsum("i,...ij->...j", self.shift, R)
        return Cameras(R, T, cameras.focal, cameras.principal)

    def normalized(self, cameras: Cameras) -> Cameras:
        """The inverse: cameras (*) of the user's world in the normalized one, float64."""
        cameras = cameras.to("cpu", torch.float64)
        T = cameras.T + torch.einsum("i,...ij->...j", self.shift, cameras.R)
        return Cameras(self.R.T @ cameras.R, T / self.scale, cameras.focal, cameras.principal)

    def then(self, after: Similarity) -> Similarity:
        """First this one, then another: from this one's normalized world to the other's user."""
        shift = after.points(self.shift)
        return Similarity(after.R @ self.R, after.scale * self.scale, shift)


class Capture(NamedTuple):
    """A folder of photographs as a scene."""
    scene: Scene               # all photographs, whole, masked, in the normalized world; their names are the files'
    inputs: list[int] | None   # positions that the files name as inputs; None where they do not say
    targets: list[int] | None  # likewise
    world: Similarity          # back to the user's world
    source: str                # one line: what was read


def load_capture(folder: str | Path, size: int | None = None) -> Capture:
    """The photographs in a folder, in squares of `size` pixels (None: the longest side of the largest photograph).

    Raises `FileNotFoundError` or `ValueError` with one line on what is missing or broken.
    """
    photographs = read_capture(folder)
    scene = load_pictures(photographs, size)
    try:
        world = normalization(scene, photographs.points)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None

    # Numbers of moderate size, from here on.
    cameras = world.normalized(scene.cameras).to(torch.float32)
    scene = Scene(scene.images, scene.masks, scene.valid, cameras, scene.names, scene.sequence)
    return Capture(scene, photographs.inputs, photographs.targets, world, photographs.source)


def stamp(folder: str | Path) -> str:
    """Sixteen hexadecimal digits of what a capture is read from: cameras, points, dates and sizes of its pictures.

    Equal stamps: nothing has changed since. Decodes nothing. Raises what `read_capture` raises.
    """
    photographs = read_capture(folder)
    numbers = [photographs.points]
    rows = [photographs.inputs, photographs.targets]
    for shot in photographs.shots:
        numbers += [shot.matrix, shot.lens.focal, shot.lens.principal, shot.lens.distortion]

        # Pictures by dates and sizes: there may be gigabytes of them.
        for file in (shot.file, shot.mask or shot.file):
            status = file.stat()
            rows.append([file.name, status.st_mtime_ns, status.st_size])
    text = json.dumps(rows) + files.digest(*numbers)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- pictures

def load_pictures(photographs: Photographs, size: int | None = None) -> Scene:
    """All photographs in squares of `size` pixels (None: the longest side of the largest), in the user's own world.

    The cameras are float64. Raises `ValueError` for a picture that cannot be decoded, and for an empty mask.
    """
    shots = photographs.shots
    if size is None:
        size = max(max(shot.lens.width, shot.lens.height) for shot in shots)

    # One at a time: decoded, they may be a hundred times as large as what is kept of them.
    layers = torch.empty(len(shots), 5, size, size)
    focal = torch.empty(len(shots), 2, dtype=torch.float64)
    principal = torch.empty(len(shots), 2, dtype=torch.float64)
    for i, shot in enumerate(Progress(shots, "reading photographs")):
        square = _square(_decode(shot), shot.lens, size)
        layers[i], focal[i], principal[i] = square

    images = layers[:, :3].clamp(0, 1)
    masks = layers[:, 3:4].clamp(0, 1)
    valid = (layers[:, 4:] > 0.5).float()
    cameras = photographs.cameras()
    cameras = Cameras(cameras.R, cameras.T, focal, principal)
    names = [shot.name for shot in shots]
    return Scene(images, masks, valid, cameras, names, photographs.folder.resolve().name)


class _Square(NamedTuple):
    """A photograph in a square."""
    layers: Tensor     # (5, S, S) masked colors, mask, and where the photograph is, in [0, 1]
    focal: Tensor      # (2,) NDC of the square
    principal: Tensor  # (2,) NDC of the square


def _square(layers: Tensor, lens: Lens, size: int) -> _Square:
    """Layers (5, H, W) of a photograph, undistorted, resized, and padded to a square about the middle."""
    if lens.distortion.any():
        layers = _undistort(layers, lens)

    # The longer side fills the square. Averaging over what a small pixel covers keeps fine texture from aliasing.
    longer = max(lens.width, lens.height)
    rows = max(round(lens.height * size / longer), 1)
    columns = max(round(lens.width * size / longer), 1)
    if (rows, columns) != (lens.height, lens.width):
        layers = F.interpolate(layers[None], (rows, columns), mode="bilinear", antialias=True)[0]

    # As much on both sides; an odd pixel goes right and below.
    top = (size - rows) // 2
    left = (size - columns) // 2
    layers = F.pad(layers, (left, size - columns - left, top, size - rows - top))

    # The camera follows: pixels of the photograph, pixels of the square, NDC of the square.
    scale = torch.tensor([columns / lens.width, rows / lens.height], dtype=torch.float64)
    corner = torch.tensor([left, top], dtype=torch.float64)
    half = size / 2
    principal = (half - (lens.principal * scale + corner)) / half
    return _Square(layers, lens.focal * scale / half, principal)


def _undistort(layers: Tensor, lens: Lens) -> Tensor:
    """What a pinhole camera with the same focal length and principal point sees, (C, H, W); 0 where nothing is known.

    OpenCV's model with the coefficients k1, k2 (radial) and p1, p2 (tangential).
    """
    k1, k2, p1, p2 = lens.distortion.tolist()
    focal_x, focal_y = lens.focal.tolist()
    center_x, center_y = lens.principal.tolist()

    # The direction of every pixel of the result.
    column = (torch.arange(lens.width) + 0.5 - center_x) / focal_x
    row = (torch.arange(lens.height) + 0.5 - center_y) / focal_y
    y, x = torch.meshgrid(row, column, indexing="ij")  # (H, W) each

    # Where the lens put it.
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * k2)
    distorted_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    distorted_y = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    grid_x = 2 * (distorted_x * focal_x + center_x) / lens.width - 1
    grid_y = 2 * (distorted_y * focal_y + center_y) / lens.height - 1

    # Far out the polynomial may turn back, and would show the picture a second time.
    folded = 1 + r2 * (3 * k1 + r2 * 5 * k2) <= 0
    grid = torch.stack([grid_x, grid_y], -1).masked_fill(folded[..., None], 2)
    return F.grid_sample(layers[None], grid[None], align_corners=False)[0]


def _decode(shot: Photograph) -> Tensor:
    """Masked colors, mask, and ones: (5, H, W) in [0, 1]."""
    with open_picture(shot.file) as picture:
        alpha = _alpha(picture, shot.file)
        colors = _pixels(picture, "RGB", shot.file)
    if shot.mask is None:
        mask = alpha
        source = shot.file
    else:
        mask = _read_mask(shot.mask)
        source = shot.mask
    if mask is None:
        raise ValueError(f"{source}: no mask: its alpha channel is opaque everywhere, and masks/ has no file for it")

    # An object is more than one pixel.
    probability = torch.from_numpy(mask).float() / 255
    if (probability > MASK_THRESHOLD).sum() <= 1:
        raise ValueError(f"{source}: the mask is empty")
    colors = torch.from_numpy(colors).permute(2, 0, 1).float() / 255
    return torch.cat([colors * probability, probability[None], torch.ones_like(probability)[None]])


def _read_mask(file: Path) -> np.ndarray:
    """A mask's file, (H, W) uint8: the alpha channel of a cut-out picture, or else its gray."""
    with open_picture(file) as picture:
        alpha = _alpha(picture, file)
        if alpha is not None:
            return alpha
        gray = _pixels(picture, "L", file)

    # Some programs write 1 for the object.
    return gray * np.uint8(255) if gray.max() == 1 else gray


def _alpha(picture: Image.Image, file: Path) -> np.ndarray | None:
    """The alpha channel, (H, W) uint8, unless there is none or it is opaque everywhere."""
    alpha = _pixels(picture, "RGBA", file)[..., 3] if picture.has_transparency_data else None
    return None if alpha is None or alpha.min() == 255 else alpha


def _pixels(picture: Image.Image, mode: str, file: Path) -> np.ndarray:
    """Decoded pixels of an open picture, uint8: (H, W) for mode "L", else (H, W, channels)."""
    try:
        # Pillow would clip 16 bits to 8.
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        return np.array(picture.convert(mode))
    # On broken bytes the decoders raise nearly anything.
    except Exception as e:
        raise ValueError(f"{file}: not a readable picture ({e})") from None


# ---------------------------------------------------------------------------------------------- the normalized world

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
