"""Own photographs as a scene: decoded, lens distortion undone, in squares of one size, in the normalized world.

A photograph is cut to its object as CO3D's are (`datasets/crop.py`), so that its pixels show the object, and kept whole
beside that: the whole masks say what is empty, and whole pictures are measured. Either is padded to a square about its
middle. The lens's distortion is undone at the photograph's own size and intrinsics: what a barrel lens brings in from
beyond that frame is lost, for a phone 2 % at each border.

Shapes: `P` points, `S` side of the square output, `H W` rows and columns of a photograph.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from cameras import Cameras, Scene
from common.progress import Progress
from datasets.annotations import date_and_size
from datasets.crop import MASK_THRESHOLD, Box, box_of_crop, box_of_mask
from datasets.pictures import LOOK, alpha_mask, inverted, open_picture, pixels, read_mask
from photographs.normalization import normalization
from photographs.shots import Convention, Shot, world_to_view
from volume import MASK_GAP

AT_ONCE = 50_000_000  # pixels of decoded photographs in memory, at most, if there is more than one (20 bytes each)
COVERED = 0.995  # part of a photograph that a mask covers at most
GRAY = 0.6       # part of a mask that may be neither black nor white, of what is not black


# ---------------------------------------------------------------------------------------------- what others call

@dataclass(frozen=True)
class Photographs:
    """Photographs of one object with masks and cameras, in the user's world; nothing is decoded before `load`. Views
    are told by their positions.
    """
    folder: Path
    shots: list[Shot]          # with different names
    convention: Convention     # of their matrices
    points: Tensor             # (P, 3) points that COLMAP saw, world, float64; P may be 0
    source: str = ""           # one line: what was read
    inputs: list[int] | None = None   # positions that the files name as inputs; None where they do not say
    targets: list[int] | None = None  # likewise
    index = 0                  # in a list, which seeds a sequence; they stand in none

    @property
    def sequence(self) -> str:
        """What their results are called."""
        return self.folder.resolve().name

    @property
    def names(self) -> list[str]:
        """What the views are called: their files."""
        return [shot.name for shot in self.shots]

    def at(self, positions: list[int]) -> Photographs:
        """Some of the photographs, of which none is named as an input or a target."""
        return replace(self, shots=[self.shots[i] for i in positions], inputs=None, targets=None)

    def settings(self) -> dict:
        """What they are, as plain data, cameras and points by sixteen hexadecimal digits: equal ones say that nothing
        has changed. Opens nothing.
        """
        points = hashlib.sha256(self.points.numpy().tobytes()).hexdigest()
        rows = [points, self.inputs, self.targets]
        for shot in self.shots:
            numbers = torch.cat([shot.matrix.flatten(), shot.focal, shot.principal, shot.distortion])

            # Pictures by dates and sizes: there may be gigabytes of them.
            rows += [numbers.tolist(), date_and_size(shot.file), date_and_size(shot.mask)]
        return {"capture": self.sequence, "pictures": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}

    def load(self, size: int | None = None, cut: bool = True) -> Scene:
        """All views in squares of `size` pixels (None: the longest side of the largest photograph), cut to the object
        or whole, in the normalized world.

        Raises `FileNotFoundError` or `ValueError` with one line on what is missing or broken.
        """
        try:
            return normalized(load_pictures(self, size, cut), self.points)
        except ValueError as e:
            raise ValueError(f"{self.folder}: {e}") from None


def normalized(scene: Scene, points: Tensor) -> Scene:
    """A scene of the user's world, with float64 cameras, in the normalized one: numbers of moderate size.

    points (P, 3): where the user's world has something; P may be 0. Raises `ValueError` where cameras and masks do not
    determine it.
    """
    world = normalization(scene.whole or scene, points)
    scene = scene.with_cameras(lambda cameras: world.normalized(cameras).to(torch.float32))
    return replace(scene, world=world)


# ---------------------------------------------------------------------------------------------- pictures

def load_pictures(photographs: Photographs, size: int | None = None, cut: bool = False) -> Scene:
    """All photographs in squares of `size` pixels (None: the longest side of the largest), in the user's own world;
    with `cut` cut to the object, and whole beside that.

    The cameras are float64. Raises `ValueError` for a picture that cannot be decoded, and for an empty mask.
    """
    return scene_of_layers(photographs, lambda i: _decode(photographs.shots[i]), size, cut, "reading photographs")


def scene_of_layers(photographs: Photographs, decode: Callable[[int], Tensor], size: int | None, cut: bool,
                    title: str | None = None) -> Scene:
    """The same of photographs that a function decodes by their number: masked colors, mask, and ones, (5, H, W) in
    [0, 1] each. `title` shows progress.
    """
    shots = photographs.shots
    largest = max(max(shot.width, shot.height) for shot in shots)
    size = size or largest
    cut = cut and largest > size  # else there is nothing to gain, and what is enlarged is blurred

    def squares(i: int) -> list[tuple[Tensor, ...]]:
        """The whole photograph `i`, and with `cut` what shows the object."""
        shot = shots[i]
        layers = _without_distortion(decode(i), shot)
        boxes = [Box(0, 0, shot.width, shot.height)]
        if cut:
            boxes.append(object_box(layers[3]))
        return [_square(layers, shot, box, size) for box in boxes]

    # A few at a time: decoded, they may be a hundred times as large as what is kept of them.
    together = max(1, min(os.cpu_count() or 1, AT_ONCE // largest**2))
    found = []
    with ThreadPoolExecutor(together) as pool:
        for i in Progress(range(len(shots)), title):
            if i == len(found):
                found += pool.map(squares, range(i, min(i + together, len(shots))))

    # As many scenes as boxes.
    whole, *crops = (_scene_of_squares(photographs, column) for column in zip(*found))
    return replace(crops[0], whole=whole) if crops else whole


def _without_distortion(layers: Tensor, shot: Shot) -> Tensor:
    """Layers (5, H, W) of a photograph as a pinhole camera sees them. Raises `ValueError` for a mask that is none."""
    _check_mask(layers[3:], shot.mask or f"masks[{shot.name}]")
    if not shot.distortion.any():
        return layers
    layers = _undistort(layers, shot)
    if not layers[3].any():
        raise ValueError(f"{shot.mask}: with its lens distortion undone, the mask is empty")
    return layers


def _scene_of_squares(photographs: Photographs, squares: list[tuple[Tensor, ...]]) -> Scene:
    """The scene of what `_square` gives for each photograph."""
    images, masks, valid, focal, principal = default_collate(squares)
    R, T = world_to_view(torch.stack([shot.matrix for shot in photographs.shots]), photographs.convention)
    return Scene(images, masks, valid, Cameras(R, T, focal, principal), photographs.names, photographs.sequence)


def object_box(mask: Tensor) -> Box:
    """The part of a photograph with a mask (H, W) that shows the object: all of it where its border cuts the object.

    Then the object may continue there, and what is beside it in the photograph is worth as much.
    """
    height, width = mask.shape
    box = box_of_mask(mask)
    if min(box.x, box.y, width - box.x - box.width, height - box.y - box.height) < MASK_GAP:
        return Box(0, 0, width, height)
    return box_of_crop(box, height, width)


def _square(layers: Tensor, shot: Shot, box: Box, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A part of the layers (5, H, W) of a photograph, resized and padded to a square of `size` pixels about the middle.

    Returns image (3, S, S), mask and valid (1, S, S), and in NDC of the square focal length and principal point (2,).
    """
    layers = layers[:, box.y:box.y + box.height, box.x:box.x + box.width]

    # The longer side fills the square. Averaging over what a small pixel covers keeps fine texture from aliasing.
    longer = max(box.width, box.height)
    rows = max(round(box.height * size / longer), 1)
    columns = max(round(box.width * size / longer), 1)
    if (rows, columns) != (box.height, box.width):
        layers = F.interpolate(layers[None], (rows, columns), mode="bilinear", antialias=True)[0]

    # As much on both sides; an odd pixel goes right and below.
    top = (size - rows) // 2
    left = (size - columns) // 2
    layers = F.pad(layers, (left, size - columns - left, top, size - rows - top))

    # The camera follows: pixels of the photograph, pixels of the square, NDC of the square.
    scale = torch.tensor([columns / box.width, rows / box.height], dtype=torch.float64)
    corner = torch.tensor([left, top], dtype=torch.float64)
    half = size / 2
    pixel = (shot.principal - torch.tensor([box.x, box.y])) * scale + corner
    focal = shot.focal * scale / half
    colors_and_mask = layers[:4].clamp(0, 1)
    return colors_and_mask[:3], colors_and_mask[3:], (layers[4:] > 0.5).float(), focal, (half - pixel) / half


def _undistort(layers: Tensor, shot: Shot) -> Tensor:
    """What a pinhole camera with the same focal length and principal point sees, (C, H, W); 0 where nothing is known.

    OpenCV's model with the coefficients k1, k2 (radial) and p1, p2 (tangential).
    """
    k1, k2, p1, p2 = shot.distortion.tolist()
    focal_x, focal_y = shot.focal.tolist()
    center_x, center_y = shot.principal.tolist()

    # The direction of every pixel of the result.
    column = (torch.arange(shot.width) + 0.5 - center_x) / focal_x
    row = (torch.arange(shot.height) + 0.5 - center_y) / focal_y
    y, x = torch.meshgrid(row, column, indexing="ij")  # (H, W) each

    # Where the lens put it.
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * k2)
    distorted_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    distorted_y = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    grid_x = 2 * (distorted_x * focal_x + center_x) / shot.width - 1
    grid_y = 2 * (distorted_y * focal_y + center_y) / shot.height - 1

    # Far out the polynomial may turn back, and would show the picture a second time.
    folded = 1 + r2 * (3 * k1 + r2 * 5 * k2) <= 0
    grid = torch.stack([grid_x, grid_y], -1).masked_fill(folded[..., None], 2)
    return F.grid_sample(layers[None], grid[None], align_corners=False)[0]


def _decode(shot: Shot) -> Tensor:
    """Masked colors, mask, and ones: (5, H, W) in [0, 1]."""
    with open_picture(shot.file) as picture:
        mask = alpha_mask(picture, shot.file, shot.turned) if shot.mask == shot.file else None
        colors = pixels(picture, "RGB", shot.file, turned=shot.turned)
    if shot.mask != shot.file:
        mask = read_mask(shot.mask, shot.turned)
    if mask is None:
        raise ValueError(f"{shot.mask}: no mask: its alpha channel is opaque everywhere, and masks/ has no file for it")

    # Whatever number stands for the object: without white, what most of it has.
    full = 255 if mask.max() in (0, 255) else np.median(mask[mask > mask.max() // 2])
    probability = (torch.from_numpy(mask).float() / full).clamp(max=1)
    colors = torch.from_numpy(colors).permute(2, 0, 1).float() / 255
    return torch.cat([colors * probability, probability[None], torch.ones_like(probability)[None]])


def _check_mask(layers: Tensor, where: Path | str) -> None:
    """Raises `ValueError` for a mask that is empty, covers all, or is none or inverted by its looks.

    layers (2, H, W): the mask in [0, 1], and ones.
    """
    # An object is more than one pixel.
    mask = layers[0]
    inside = mask > MASK_THRESHOLD
    if inside.sum() <= 1:
        raise ValueError(f"{where}: the mask is empty, no pixel is above {MASK_THRESHOLD} of white")
    if inside.float().mean() > COVERED:
        raise ValueError(f"{where}: the mask covers all of the photograph; white is where the object is")
    step = 1 + max(mask.shape) // LOOK
    if inverted(*layers[:, None, None, ::step, ::step]):
        raise ValueError(f"{where}: the mask is white along the border, so probably inverted; white is the object")
    gray = (mask > 0.1) & (mask < 0.9)
    if gray.sum() > GRAY * (mask > 0.1).sum():
        raise ValueError(f"{where}: most of the mask is gray; white is where the object is, black elsewhere")
