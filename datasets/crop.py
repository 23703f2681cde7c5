"""How a photograph with a mask and a camera becomes a view of a scene (Sec. 4): cut, resized, the intrinsics adapted.

A photograph is cut to its object: the mask's box grown by 30 %, clipped to the photograph, rounded, not made square
[released: co3d_dataloader.py:260-261, 557-570]. The cut is scaled so that its longer side fills the output, and placed
in the output's top left corner, beside a map of where it is valid [released: co3d_dataloader.py:899-918]. Resizing is
without antialiasing, bilinear for colors and nearest for masks [released: co3d_dataloader.py:572, 904-910].
About one crop in ten comes out a pixel short, while its camera keeps the nominal scale (`crop_and_resize`).

Different from the released code: an all but empty mask is an error, not a crop of the whole photograph.

Shapes: `S` side of the square output in pixels, `H W` rows and columns of a photograph.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import CONTEXT, Cameras, Scene

MASK_THRESHOLD = 0.4  # foreground probability above which a pixel counts as the object
ROUNDING = 2e-3       # what products of a rotation's rows may be off, in files with few digits
FOCAL = (0.1, 100.0)  # focal lengths in longer sides of the picture: it spans 157 degrees at most, half of one at least
FAR = 1e6             # of a camera or an axis from the origin, in CO3D's units or in half sides of the picture, at most


# ---------------------------------------------------------------------------------------------- crop and resize

class Box(NamedTuple):
    """A rectangle of whole pixels of a photograph."""
    x: int  # column of the left edge
    y: int  # row of the top edge
    width: int
    height: int

    def corners(self) -> Tensor:
        """Top left and bottom right corner (column, row), (2, 2), float64."""
        corners = [[self.x, self.y], [self.x + self.width, self.y + self.height]]
        return torch.tensor(corners, dtype=torch.float64)


class Crop(NamedTuple):
    """One photograph cut to its object, with the camera of the result."""
    image: Tensor    # (3, S, S) in [0, 1], not yet masked
    mask: Tensor     # (1, S, S) in [0, 1]
    valid: Tensor    # (1, S, S) 0 or 1
    camera: Cameras  # one camera, without a leading axis; NDC of the output


def pixel_camera(camera: Cameras, intrinsics_format: str, height: int, width: int) -> Cameras:
    """One camera in CO3D's NDC of an H x W photograph, in pixels [released: co3d_dataloader.py:661-695].

    Pixels count from the top left corner right and down; the center of the first one is (0.5, 0.5).
    The NDC have one of two units: half the photograph's own width and height (`ndc_norm_image_bounds`), or half its
    shorter side for both axes (`ndc_isotropic`). Raises `ValueError` for another format.
    """
    half = torch.tensor([width, height], dtype=torch.float64) / 2
    units = {"ndc_norm_image_bounds": half, "ndc_isotropic": half.min()}
    if str(intrinsics_format).lower() not in units:
        raise ValueError(f"intrinsics format {intrinsics_format!r} is neither {' nor '.join(map(repr, units))}")

    # NDC point left and up, pixels right and down.
    unit = units[intrinsics_format.lower()]
    return Cameras(camera.R, camera.T, camera.focal * unit, half - camera.principal * unit)


def check_rotation(R: Tensor, where: str) -> None:
    """Raises `ValueError` unless R (*, 3, 3) keeps lengths, angles and handedness."""
    error = (R @ R.mT - torch.eye(3, dtype=R.dtype)).abs().max()
    if not error <= ROUNDING:
        raise ValueError(f"{where}: no rotation and shift: it scales or shears (its rows are up to {error:.2g} off)")
    if (torch.linalg.det(R) < 0).any():
        raise ValueError(f"{where}: a reflection (determinant -1): one axis of view or world points the wrong way")


def check_lens(focal: list[float], principal: list[float], sides: tuple[float, float], where: str) -> None:
    """Raises `ValueError` for a focal length or principal point (x, y), pixels, that no photograph with such sides has:
    their units are others, or the point counts from another corner.
    """
    low, high = (factor * max(sides) for factor in FOCAL)
    if not low <= min(focal) <= max(focal) <= high or not 1 < max(map(abs, principal)) <= high:
        raise ValueError(f"{where}: {[*focal, *principal]} are no pixels of {sides[0]:g} x {sides[1]:g}; another unit?")


def check_place(T: Tensor, principal: Tensor, where: str) -> None:
    """Raises `ValueError` for translations T (*, 3) or principal points (*, 2) with which float32 cannot calculate, and
    for a camera in the middle of the object.
    """
    if not T.any(-1).all():
        raise ValueError(f"{where}: T is 0, so a camera stands at the origin, where the object is")
    if max(T.abs().max(), principal.abs().max()) > FAR:
        raise ValueError(f"{where}: a number in them is above {FAR:g}: another unit?")


def crop_and_resize(image: np.ndarray, mask: np.ndarray, camera: Cameras, size: int) -> Crop:
    """Photograph (H, W, 3), mask (H, W), both uint8, and their camera in pixels -> the crop of `size` pixels a side.

    Raises `ValueError` for an empty mask, or one of another size than the photograph.
    """
    height, width = mask.shape
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask is {width} x {height} pixels, the image {image.shape[1]} x {image.shape[0]}")

    # The mask's box with its context, clipped to the photograph.
    probability = torch.from_numpy(mask).float() / 255
    x0, y0, crop_width, crop_height = box_of_crop(box_of_mask(probability), height, width)
    part = np.s_[y0:y0 + crop_height, x0:x0 + crop_width]

    # The sides are floored, so a longer side of 255 of 256 pixels happens [released: co3d_dataloader.py:900-911].
    scale = size / max(crop_width, crop_height)
    rows = max(int(crop_height * scale), 1)
    columns = max(int(crop_width * scale), 1)

    # Cut, resize, and fill up on the right and below.
    colors = torch.from_numpy(image[part]).permute(2, 0, 1).float() / 255
    foreground = probability[part][None]
    square_image = _place(colors, rows, columns, size, "bilinear")
    square_mask = _place(foreground, rows, columns, size, "nearest")
    square_valid = _place(torch.ones_like(foreground), rows, columns, size, "nearest")

    # The camera follows: pixels of the cut, pixels of the output, NDC of the output.
    half = size / 2
    principal_pixels = (camera.principal - torch.tensor([x0, y0])) * scale
    principal = (half - principal_pixels) / half
    focal = camera.focal * scale / half
    square_camera = Cameras(camera.R.float(), camera.T.float(), focal.float(), principal.float())
    return Crop(square_image, square_mask, square_valid, square_camera)


def box_of_crop(mask_box: Box, height: int, width: int) -> Box:
    """The part of an H x W photograph that shows a mask's box with its context, in whole pixels (half to even)."""
    bounds = torch.tensor([width, height, width, height])
    corners = torch.minimum(context_box(mask_box).clamp(min=0), bounds)
    x0, y0, x1, y1 = corners.round().int().tolist()
    return Box(x0, y0, x1 - x0, y1 - y0)


def context_box(box: Box | Tensor) -> Tensor:
    """Box (x, y, width, height) -> corners (x0, y0, x1, y1), float32: grown by `CONTEXT` about its center.

    At least 2 pixels a side.
    """
    box = torch.as_tensor(box, dtype=torch.float32)
    sides = box[2:]
    corner = box[:2] - sides * CONTEXT / 2
    grown = sides + sides * CONTEXT
    return torch.cat([corner, corner + grown.clamp(min=2)])


def box_of_mask(probability: Tensor) -> Box:
    """Tight box of the pixels of (H, W) over the threshold, which drops by 0.05 while at most one pixel is."""
    threshold = MASK_THRESHOLD
    while (probability > threshold).sum() <= 1:
        threshold -= 0.05
        if threshold < -0.01:
            raise ValueError("the mask is empty")

    return tight_box(probability > threshold)


def tight_box(inside: Tensor) -> Box:
    """Tight box of the True of (H, W), of which there must be one."""
    rows = inside.any(1).nonzero()[:, 0].tolist()
    columns = inside.any(0).nonzero()[:, 0].tolist()
    width = columns[-1] - columns[0] + 1
    height = rows[-1] - rows[0] + 1
    return Box(columns[0], rows[0], width, height)


def _place(x: Tensor, rows: int, columns: int, size: int, mode: str) -> Tensor:
    """(C, height, width) resized to `rows` x `columns`, in the top left corner of zeros: (C, S, S)."""
    resized = F.interpolate(x[None], (rows, columns), mode=mode)[0]
    return F.pad(resized, (0, size - columns, 0, size - rows))


def scene_of_crops(crops: list[Crop], names: list[str], sequence: str) -> Scene:
    """The scene of photographs cut to their object [released: co3d_dataloader.py:387]."""
    images = torch.stack([crop.image for crop in crops])
    masks = torch.stack([crop.mask for crop in crops])
    valid = torch.stack([crop.valid for crop in crops])
    cameras = Cameras.stack([crop.camera for crop in crops])
    return Scene(images * masks, masks, valid, cameras, names, sequence)
