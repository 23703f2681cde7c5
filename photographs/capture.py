"""Own photographs as a scene: decoded, lens distortion undone, in squares of one size, in the normalized world.

A photograph is kept whole and padded to a square about its middle. The lens's distortion is undone at the photograph's
own size and intrinsics: what a barrel lens brings in from beyond that frame is lost, for a phone 2 % at each border.

Shapes: `V` photographs, `S` side of the square output, `H W` rows and columns of a photograph.
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

from cameras import Cameras, Scene
from common import files
from common.progress import Progress
from datasets.crop import MASK_THRESHOLD, open_picture
from photographs.normalization import Similarity, normalization
from photographs.reading import Lens, Photograph, Photographs


# ---------------------------------------------------------------------------------------------- what others call

class Capture(NamedTuple):
    """A folder of photographs as a scene."""
    scene: Scene               # all photographs, whole, masked, in the normalized world; their names are the files'
    inputs: list[int] | None   # positions that the files name as inputs; None where they do not say
    targets: list[int] | None  # likewise
    world: Similarity          # back to the user's world
    source: str                # one line: what was read


def load_capture(photographs: Photographs, size: int | None = None) -> Capture:
    """The photographs of a folder, in squares of `size` pixels (None: the longest side of the largest photograph).

    Raises `FileNotFoundError` or `ValueError` with one line on what is missing or broken.
    """
    scene = load_pictures(photographs, size)
    try:
        world = normalization(scene, photographs.points)
    except ValueError as e:
        raise ValueError(f"{photographs.folder}: {e}") from None

    # Numbers of moderate size, from here on.
    cameras = world.normalized(scene.cameras).to(torch.float32)
    scene = Scene(scene.images, scene.masks, scene.valid, cameras, scene.names, scene.sequence)
    return Capture(scene, photographs.inputs, photographs.targets, world, photographs.source)


def stamp(photographs: Photographs) -> str:
    """Sixteen hexadecimal digits of what a capture is read from: cameras, points, dates and sizes of its pictures.

    Equal stamps: nothing has changed since. Opens nothing.
    """
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
