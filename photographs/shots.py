"""A photograph with its camera: what every reader of files lists, and what becomes of it.

A reader (`colmap.py`, `transforms.py`) lists frames: names and numbers in its file, the numbers under the keys of
transforms.json. With the picture at hand a frame becomes a `Shot`, whose intrinsics are of the picture's own pixels.
The matrix stays as the file has it, so that another reading of it can be tried (`Convention`).

In all files pixels count from the top left corner, and the first pixel's center is (0.5, 0.5).

Shapes: `V` photographs, `*` any leading shape.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.crop import check_lens, check_rotation
from datasets.pictures import open_picture, orientation

LAST_ROW = torch.tensor([[0, 0, 0, 1]], dtype=torch.float64)  # of a pose
ROUNDING = 1e-5  # what it may be off, after products and inverses

# What the parameters of a lens are, in COLMAP's order, for the models that can be undone. nerfstudio has their names.
PARAMETERS = {
    "SIMPLE_PINHOLE": ("fl_x", "cx", "cy"),
    "PINHOLE": ("fl_x", "fl_y", "cx", "cy"),
    "SIMPLE_RADIAL": ("fl_x", "cx", "cy", "k1"),
    "RADIAL": ("fl_x", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2"),
}
OTHER_LENSES = ("is_fisheye", "ftheta_p0", "latlong", "equirectangular", "orthographic")  # instant-ngp's flags


# ---------------------------------------------------------------------------------------------- poses

class Convention(NamedTuple):
    """How a file writes a pose as a 4 x 4 matrix for column vectors."""
    flip: tuple[int, int, int]  # what its view axes are multiplied by to be PyTorch3D's (x left, y up, z forward)
    camera_to_world: bool       # False: world-to-camera


# Values of `Convention.flip`: x right, y down, z forward; x right, y up, z backward; x left, y up, z forward.
AXES = {"OpenCV": (-1, -1, 1), "OpenGL": (-1, 1, -1), "PyTorch3D": (1, 1, 1)}
CONVENTIONS = {
    "opengl": Convention(AXES["OpenGL"], True),   # transforms.json, Blender
    "colmap": Convention(AXES["OpenCV"], False),
}


def pose(rows, where: str) -> Tensor:
    """A pose of 4 x 4 or 3 x 4 numbers as (4, 4), float64. Raises `ValueError` unless it is a rotation and a shift."""
    # Whatever a file may hold.
    try:
        matrix = torch.as_tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        matrix = torch.zeros(0)
    if matrix.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{where}: not 4 rows of 4 numbers")
    if not matrix.isfinite().all():
        raise ValueError(f"{where}: a number in it is not finite")
    check_rotation(matrix[:3, :3], where)
    if len(matrix) == 4 and (matrix[3:] - LAST_ROW).abs().max() > ROUNDING:
        raise ValueError(f"{where}: its last row is {matrix[3].tolist()}, not 0, 0, 0, 1 (is it transposed?)")
    return torch.cat([matrix[:3], LAST_ROW])


def world_to_view(matrices: Tensor, convention: Convention) -> tuple[Tensor, Tensor]:
    """R (*, 3, 3) and T (*, 3), as in `Cameras`, of poses (*, 4, 4) written in a convention."""
    # Rounded numbers are made a rotation again: the nearest one.
    U, _, V = torch.linalg.svd(matrices[..., :3, :3])
    rotation = U @ V
    translation = matrices[..., :3, 3]
    flip = torch.tensor(convention.flip).to(matrices)

    # Row vectors: X_view = X_world R + T. Camera-to-world has the view's axes as its columns.
    if convention.camera_to_world:
        R = rotation * flip
        return R, -torch.einsum("...i,...ij->...j", translation, R)
    R = rotation.transpose(-1, -2) * flip
    return R, translation * flip


# ---------------------------------------------------------------------------------------------- listed, then opened

class Frame(NamedTuple):
    """A photograph as a file lists it."""
    where: str        # file and place in it, for messages
    name: object      # path of the picture, still unchecked
    mask: object      # path of the mask, likewise; None: the file does not say
    matrix: Tensor    # (4, 4) its pose
    numbers: dict     # of its lens, under the keys of transforms.json

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number of its lens. Raises `ValueError` for anything else."""
        # JSON has true, texts, lists, and with Python also NaN.
        value = self.numbers.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            raise ValueError(f"{self.where}: {key}: {value!r:.40} is no number, or not finite")
        return value

    def focal_length(self, axis: str, side: float) -> float | None:
        """The focal length along an axis, in pixels of a picture with `side` of them: `fl_x`, or by `camera_angle_x`;
        None where neither stands there. Raises `ValueError` for one that is not above 0.
        """
        if f"fl_{axis}" in self.numbers:
            focal = self.number(f"fl_{axis}")
            if focal <= 0:
                raise ValueError(f"{self.where}: fl_{axis}: a focal length of {focal:g}, not above 0")
            return focal

        # The angle that the picture spans.
        key = f"camera_angle_{axis}"
        if key not in self.numbers:
            return None
        angle = self.number(key)
        if not 0 < angle < math.pi:
            raise ValueError(f"{self.where}: {key}: {angle:g} is no angle between 0 and pi (radians)")
        return side / 2 / math.tan(angle / 2)

    def pinhole(self, width: float, height: float) -> tuple[Tensor, Tensor]:
        """Focal lengths (x, y) and principal point (column, row) in pixels of a picture of this size: (2,) each,
        float64. Raises `ValueError` where they are missing or those of no camera.
        """
        # The vertical focal length is often left out; so is the middle.
        focal_x = self.focal_length("x", width)
        if focal_x is None:
            raise ValueError(f"{self.where}: neither fl_x nor camera_angle_x, there or for all frames")
        focal_y = self.focal_length("y", height) or focal_x
        center = [self.number("cx", width / 2), self.number("cy", height / 2)]
        check_lens([focal_x, focal_y], center, (width, height), f"{self.where}: fl_x, fl_y, cx, cy")
        focal = torch.tensor([focal_x, focal_y], dtype=torch.float64)
        return focal, torch.tensor(center, dtype=torch.float64)

    def check_lens(self) -> None:
        """Raises `ValueError` for a distortion that cannot be undone."""
        # nerfstudio's names are COLMAP's; instant-ngp has flags.
        flags = [key for key in OTHER_LENSES if self.numbers.get(key)]
        model = flags[0] if flags else str(self.numbers.get("camera_model", "OPENCV")).upper()
        if model not in PARAMETERS:
            raise ValueError(f"{self.where}: camera_model: {model:.40} is none of {', '.join(PARAMETERS)}; undistort "
                             "the photographs first")

        # More coefficients than these five models have.
        for key in ("k3", "k4", "k5", "k6"):
            if self.number(key, 0.0) != 0:
                raise ValueError(f"{self.where}: {key}: only k1, k2, p1 and p2 can be undone; undistort the "
                                 "photographs first")


class Shot(NamedTuple):
    """One photograph and its camera. Lengths are in pixels; tensors are float64."""
    name: str
    file: Path | None    # None: a picture from elsewhere, of `arrays.py`
    mask: Path | None    # the picture's own file where its alpha channel is the mask; None: there is no mask
    width: int           # of the picture
    height: int
    focal: Tensor        # (2,) focal length (x, y)
    principal: Tensor    # (2,) (column, row) from the top left corner
    distortion: Tensor   # (4,) OpenCV's k1, k2, p1, p2
    matrix: Tensor       # (4, 4) its pose, as the file has it
    resized: bool = False  # whether its camera was listed for another size of the picture
    turned: bool = False   # whether picture and mask are turned as their EXIF tags say


def open_shot(frame: Frame, name: str, file: Path, mask: Path | None) -> Shot:
    """The photograph of a frame whose picture and mask, if any, are these files. Decodes nothing.

    Raises `FileNotFoundError` or `ValueError` where picture, mask and lens do not fit together.
    """
    # Pixel by pixel a mask says what its photograph shows.
    with open_picture(file) as picture:
        sizes = [picture.size]
        tags = [orientation(picture)]
        if mask is None and picture.has_transparency_data:
            mask = file
    if mask not in (None, file):
        with open_picture(mask) as picture:
            sizes.append(picture.size)
            tags.append(orientation(picture))

    # A camera's picture may be resized, then it has the same proportions, but neither turned nor cropped.
    sizes, turned = _turned(frame, file, sizes, tags)
    width, height = sizes[0]
    if sizes[-1] != sizes[0]:
        raise ValueError(f"{mask}: the mask is {sizes[-1][0]} x {sizes[-1][1]} pixels, the photograph {file} "
                         f"{width} x {height} (resized, or turned by an EXIF tag?)")
    listed_width = frame.number("w", width)
    listed_height = frame.number("h", height)
    if not _proportional(frame, width, height):
        raise ValueError(f"{frame.where}: its camera is of {listed_width:g} x {listed_height:g} pixels, the picture "
                         f"{file} has {width} x {height} (turned by its EXIF tag, or cropped?)")

    # Pixels of the picture; distortion is about directions and stays.
    frame.check_lens()
    focal, principal = frame.pinhole(listed_width, listed_height)
    scale = torch.tensor([width / listed_width, height / listed_height], dtype=torch.float64)
    distortion = torch.tensor([frame.number(key, 0.0) for key in ("k1", "k2", "p1", "p2")], dtype=torch.float64)
    resized = (width, height) != (listed_width, listed_height)
    return Shot(name, file, mask, width, height, focal * scale, principal * scale, distortion, frame.matrix, resized,
                turned)


def _turned(frame: Frame, file: Path, sizes: list[tuple], tags: list[int]) -> tuple[list[tuple], bool]:
    """The sizes of a picture and of its mask, if that has a file, turned as their EXIF tags say if only then they fit
    each other and the camera; and whether they are turned. Raises `ValueError` where sizes do not tell.
    """
    upright = [size[::-1] if tag >= 5 else size for size, tag in zip(sizes, tags)]
    fits, fits_turned = (x[0] == x[-1] and _proportional(frame, *x[0]) for x in (sizes, upright))
    if fits and fits_turned and set(tags) != {1}:
        raise ValueError(f"{file}: an EXIF tag (orientation {max(tags)}) turns it or its mask, and by their sizes mask "
                         "and camera may be of either; turn the pixels (mogrify -auto-orient), or remove the tag")
    return (upright, True) if fits_turned and not fits else (sizes, False)


def _proportional(frame: Frame, width: int, height: int) -> bool:
    """Has a picture the proportions that a frame's camera is listed for, up to a rounded pixel?"""
    listed_width = frame.number("w", width)
    listed_height = frame.number("h", height)
    if min(listed_width, listed_height) < 1:
        raise ValueError(f"{frame.where}: w, h: {listed_width:g} x {listed_height:g} pixels")
    off = min(abs(width / listed_width * listed_height - height), abs(height / listed_height * listed_width - width))
    return off <= 1.01
