"""What a folder of own photographs has: pictures, masks, cameras, in the world that its files have.

    transforms.json         nerfstudio, instant-ngp
    transforms_train.json   NeRF-synthetic (Mildenhall et al. 2020): the inputs; transforms_test.json: the targets
    sparse/0                COLMAP (`colmap.py`), with pictures in images/

A mask is a file in masks/, white where the object is, or else the picture's alpha channel.

Nothing is decoded here and nothing is normalized: `capture.py` does that. The matrices stay as the files have them, so
that another reading of them can be tried (`Convention`). docs/photographs.md has a table of the axes.

Shapes: `V` photographs, `P` points.
"""
from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from cameras import Cameras
from datasets.crop import open_picture
from photographs import colmap, transforms

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")  # of pictures whose names lack one
PICTURE_FOLDERS = ("images", "input", ".")  # where the pictures of a COLMAP model lie
MASK_FOLDERS = ("masks", "mask")
ROUNDING = 2e-3                             # what products of a rotation's rows may be off, in files with few digits

# Names of masks; {0} is the picture's name, {1} the same without its ending.
MASK_NAMES = ("{0}.png", "{1}.png", "{0}", "{1}_mask.png", "mask_{1}.png", "{1}.mask.png", "{1}.jpg", "{1}_mask.jpg")
NO_MASK = ("{}: no mask ({} of {} photographs have none): each needs an alpha channel, or a file {} in {}, white where "
           "the object is; rembg, Segment Anything or GrabCut make such masks")


# ---------------------------------------------------------------------------------------------- what others call

class Convention(NamedTuple):
    """How a file writes a pose as a 4 x 4 matrix for column vectors."""
    flip: tuple[int, int, int]  # what its view axes are multiplied by to be PyTorch3D's (x left, y up, z forward)
    camera_to_world: bool       # False: world-to-camera


CONVENTIONS = {
    "opengl": Convention((-1, 1, -1), True),   # x right, y up, z backward: transforms.json, Blender
    "colmap": Convention((-1, -1, 1), False),  # x right, y down, z forward, as in OpenCV
}


class Lens(NamedTuple):
    """What a camera does with directions. Lengths are in pixels; tensors are float64."""
    width: int
    height: int
    focal: Tensor       # (2,) focal length (x, y)
    principal: Tensor   # (2,) (column, row) from the top left corner; the first pixel's center is (0.5, 0.5)
    distortion: Tensor  # (4,) OpenCV's k1, k2, p1, p2


class Photograph(NamedTuple):
    """One photograph, as its files describe it."""
    name: str                # unique in the capture, without folders
    file: Path
    mask: Path | None        # None: its alpha channel is the mask
    lens: Lens               # of the picture's own pixels
    listed: tuple[int, int]  # width and height that the camera's file gives: others, if the picture was resized
    matrix: Tensor           # (4, 4) as the file has it, float64


@dataclass(frozen=True)
class Photographs:
    """All photographs of a capture, in the user's world."""
    folder: Path
    shots: list[Photograph]
    axes: str                  # key of `CONVENTIONS`: what the matrices mean
    points: Tensor             # (P, 3) points that COLMAP saw, world, float64; P may be 0
    inputs: list[int] | None   # positions that the files name as inputs; None where they do not say
    targets: list[int] | None  # likewise
    source: str                # one line: what was read

    def matrices(self) -> Tensor:
        """The poses as the files have them, (V, 4, 4), float64."""
        return torch.stack([shot.matrix for shot in self.shots])

    def cameras(self, convention: Convention | None = None) -> Cameras:
        """The cameras (V,), float64, if the matrices are written in a convention (default: the files' own).

        In NDC of the photograph padded to a square about its middle. Lens distortion is not in them.
        """
        R, T = world_to_view(self.matrices(), convention or CONVENTIONS[self.axes])
        focal = torch.stack([shot.lens.focal for shot in self.shots])
        principal = torch.stack([shot.lens.principal for shot in self.shots])
        sides = torch.tensor([[shot.lens.width, shot.lens.height] for shot in self.shots], dtype=torch.float64)

        # NDC point left and up, pixels right and down.
        half = sides.amax(1, keepdim=True) / 2
        return Cameras(R, T, focal / half, (sides / 2 - principal) / half)


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


def read_capture(folder: str | Path) -> Photographs:
    """What a folder has. Decodes nothing.

    Raises `FileNotFoundError` or `ValueError` with one line that names the file and what in it is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of photographs")

    # Files may have changed since another folder, or this one, was read.
    _header.cache_clear()

    # Tools that make a transforms.json leave the COLMAP model that they made it from beside it.
    model = colmap.find_model(folder)
    if (folder / "transforms.json").is_file():
        photographs = _read_transforms(folder)
    elif (folder / "transforms_train.json").is_file():
        photographs = _read_splits(folder)
    elif model is not None:
        photographs = _read_colmap(folder, model)
    else:
        llff = "; poses_bounds.npy is not read" if (folder / "poses_bounds.npy").exists() else ""
        raise FileNotFoundError(f"{folder}: no transforms.json, no transforms_train.json and no COLMAP model "
                                f"(sparse/0/images.bin or .txt) there{llff}; docs/photographs.md says how to make one")

    # What belongs to all of them.
    _check(photographs)
    return photographs


def _check(photographs: Photographs) -> None:
    """Raises `ValueError` unless there are two photographs or more, with different names, each with a mask."""
    shots = photographs.shots
    if len(shots) < 2:
        raise ValueError(f"{photographs.folder}: {len(shots)} photograph; a scene needs two or more")
    name, count = Counter(shot.name for shot in shots).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{photographs.folder}: the photograph {name} is listed {count} times")

    # The first one that lacks a mask, and how many do.
    bare = [shot.file for shot in shots if shot.mask is None and not _header(shot.file).alpha]
    if bare:
        folder = photographs.folder / MASK_FOLDERS[0]
        raise ValueError(NO_MASK.format(bare[0], len(bare), len(shots), f"{bare[0].stem}.png", folder))


class Header(NamedTuple):
    """What a picture says of itself before it is decoded."""
    size: tuple[int, int]  # width and height, pixels
    alpha: bool            # whether it has an alpha channel


@cache
def _header(file: Path) -> Header:
    with open_picture(file) as picture:
        return Header(picture.size, picture.has_transparency_data)


# ---------------------------------------------------------------------------------------------- transforms.json

def _read_transforms(folder: Path) -> Photographs:
    """nerfstudio and instant-ngp: one file."""
    shots, absent = _shots_of(folder, "transforms.json")
    source = f"transforms.json, {len(shots)} photographs{_skipped(shots, absent)}, {_about(shots)}"
    return _photographs(folder, shots, "opengl", source)


def _read_splits(folder: Path) -> Photographs:
    """NeRF-synthetic: a file of inputs, and mostly one of targets."""
    inputs, absent = _shots_of(folder, "transforms_train.json")
    targets = []
    if (folder / "transforms_test.json").is_file():
        targets, more = _shots_of(folder, "transforms_test.json")
        absent += more

    # Positions: first the inputs, then the targets.
    shots = inputs + targets
    counts = f"{len(inputs)} + {len(targets)}" if targets else f"{len(inputs)}"
    source = f"NeRF-synthetic, {counts} photographs{_skipped(shots, absent)}, {_about(shots)}"
    positions = list(range(len(shots)))
    return _photographs(folder, shots, "opengl", source, positions[:len(inputs)], positions[len(inputs):] or None)


def _shots_of(folder: Path, name: str) -> tuple[list[Photograph], list[str]]:
    """The frames of one file, and what is said of each whose picture is absent."""
    shots = []
    absent = []
    for frame in transforms.read_frames(folder / name):
        # The picture, whose ending may be left out, and its mask.
        path = _below(folder, frame.name, f"{frame.where}: file_path")
        file = _with_ending(path)
        if file is None:
            absent.append(f"{frame.where}: file_path: no such file {path}")
            continue
        if frame.mask is None:
            mask = _find_mask(folder, file)
        else:
            mask = _below(folder, frame.mask, f"{frame.where}: mask_path")

        lens = frame.lens(*_header(file).size)
        matrix = _pose(frame.rows, f"{frame.where}: transform_matrix")
        shots.append(_photograph(folder, file, mask, lens, matrix, frame.where))
    return shots, absent


# ---------------------------------------------------------------------------------------------- COLMAP

def _read_colmap(folder: Path, place: Path) -> Photographs:
    """A COLMAP model and its pictures."""
    model = colmap.read_model(place)
    if not model.shots:
        raise ValueError(f"{place}: the COLMAP model has no image")

    # Its names are below a folder that it does not name.
    root = _picture_root(folder, [shot.name for shot in model.shots])
    shots = []
    absent = []
    for shot in model.shots:
        where = f"{place}: image {shot.name!r}"
        file = _below(root, shot.name, where)
        if not file.is_file():
            absent.append(f"{where}: no such file {file}")
            continue
        mask = _find_mask(folder, file)
        matrix = _pose(shot.matrix.tolist(), where)
        shots.append(_photograph(folder, file, mask, shot.lens, matrix, where))

    # Points at infinity are of no use.
    models = sorted({shot.lens.model for shot in model.shots})
    skipped = _skipped(shots, absent)
    source = f"COLMAP, {model.kind}, {len(shots)} photographs{skipped}, {', '.join(models)}, {len(model.points)} points"
    photographs = _photographs(folder, shots, "colmap", f"{source}, {_about(shots)}")
    finite = model.points.isfinite().all(1)
    return replace(photographs, points=model.points[finite])


def _picture_root(folder: Path, names: list[str]) -> Path:
    """The folder that a model's names are below: the first of the usual ones that has such a picture, or the first."""
    for place in PICTURE_FOLDERS:
        if any((folder / place / name).is_file() for name in names):
            return folder / place
    return folder / PICTURE_FOLDERS[0]


# ---------------------------------------------------------------------------------------------- either

def _skipped(shots: list[Photograph], absent: list[str]) -> str:
    """Some words on frames whose pictures are absent. Raises `FileNotFoundError` if fewer than two others are left."""
    if absent and len(shots) < 2:
        raise FileNotFoundError(absent[0])
    return f" ({len(absent)} more are listed and absent, {absent[0].rpartition('/')[2]} first)" if absent else ""


def _photographs(folder: Path, shots: list[Photograph], axes: str, source: str, inputs: list[int] | None = None,
                 targets: list[int] | None = None) -> Photographs:
    """The capture of some photographs, without points.

    They are named after their files, with the folders if two files have the same name.
    """
    alike = len({shot.file.name for shot in shots}) < len(shots)
    named = []
    for shot in shots:
        name = shot.name.replace("/", "_") if alike else shot.file.name
        named.append(shot._replace(name=name))
    points = torch.zeros(0, 3, dtype=torch.float64)
    return Photographs(folder, named, axes, points, inputs, targets, source)


def _photograph(folder: Path, file: Path, mask: Path | None, listed: colmap.Lens, matrix: Tensor,
                where: str) -> Photograph:
    """One photograph; its listed lens may be that of another size of it.

    Raises `FileNotFoundError` or `ValueError` where picture, mask and lens do not fit together.
    """
    # Pixel by pixel a mask says what its photograph shows.
    width, height = _header(file).size
    if mask is not None and _header(mask).size != (width, height):
        mask_width, mask_height = _header(mask).size
        raise ValueError(f"{mask}: the mask is {mask_width} x {mask_height} pixels, the photograph {file} "
                         f"{width} x {height}")

    # A resized picture has the same proportions, up to a rounded pixel; a turned one has not.
    scale_x = width / listed.width
    scale_y = height / listed.height
    if abs(scale_x * listed.height - height) > 1.01 and abs(scale_y * listed.width - width) > 1.01:
        raise ValueError(f"{where}: its camera is of {listed.width:g} x {listed.height:g} pixels, the picture {file} "
                         f"has {width} x {height} (turned by its EXIF tag, or cropped?)")

    lens = _scaled_lens(listed, width, height, where)
    name = file.relative_to(folder).as_posix()
    return Photograph(name, file, mask, lens, (int(listed.width), int(listed.height)), matrix)


def _scaled_lens(listed: colmap.Lens, width: int, height: int, where: str) -> Lens:
    """A listed lens for a picture of `width` x `height` pixels."""
    # Every model has a part of the largest one's numbers.
    numbers = listed.numbers
    focal = [numbers.get("fx", numbers.get("f")), numbers.get("fy", numbers.get("f"))]
    principal = [numbers["cx"], numbers["cy"]]
    distortion = [numbers.get(key, 0) for key in ("k1", "k2", "p1", "p2")]
    if min(focal) <= 0 or not all(map(math.isfinite, focal + principal + distortion)):
        raise ValueError(f"{where}: its lens has focal lengths that are not above 0, or numbers that are not finite")

    # Pixels of a resized picture; distortion is about directions and stays.
    scale = torch.tensor([width / listed.width, height / listed.height], dtype=torch.float64)
    focal = torch.tensor(focal, dtype=torch.float64) * scale
    principal = torch.tensor(principal, dtype=torch.float64) * scale
    return Lens(width, height, focal, principal, torch.tensor(distortion, dtype=torch.float64))


def _pose(rows: list, where: str) -> Tensor:
    """A pose of 4 x 4 or 3 x 4 numbers as (4, 4), float64. Raises `ValueError` unless it is a rotation and a shift."""
    # Whatever a file may hold.
    try:
        matrix = torch.tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        matrix = torch.zeros(0)
    if matrix.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{where}: not 4 rows of 4 numbers")
    if not matrix.isfinite().all():
        raise ValueError(f"{where}: a number in it is not finite")
    if len(matrix) == 3:
        matrix = torch.cat([matrix, torch.eye(4, dtype=torch.float64)[3:]])

    # A rotation keeps lengths, angles and handedness.
    rotation = matrix[:3, :3]
    error = (rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max()
    if error > ROUNDING or matrix[3].tolist() != [0, 0, 0, 1]:
        raise ValueError(f"{where}: no rotation and shift: it scales or shears (its rows are up to {error:.2g} off)")
    if torch.linalg.det(rotation) < 0:
        raise ValueError(f"{where}: a reflection (determinant -1): one axis of view or world points the wrong way")
    return matrix


def _below(root: Path, name: object, where: str) -> Path:
    """A path that a file gives, which has to stay below `root`."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: {name!r} is no name of a file")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise ValueError(f"{where}: {name!r} leads out of the folder {root}")
    return root / path


def _with_ending(path: Path) -> Path | None:
    """The file itself, or the one with a picture's ending where its name lacks it."""
    if path.is_file():
        return path
    for ending in ENDINGS:
        file = path.with_name(path.name + ending)
        if file.is_file():
            return file
    return None


def _find_mask(folder: Path, file: Path) -> Path | None:
    """The mask of a picture below `folder`, by the usual habits; None where there is none."""
    # Below masks/ as the picture is below the folder: with all of its folders, without the first, ..., with none.
    parts = file.parent.relative_to(folder).parts
    names = [name.format(file.name, file.stem) for name in MASK_NAMES]
    for mask_folder in MASK_FOLDERS:
        for first in range(len(parts) + 1):
            for name in names:
                mask = folder.joinpath(mask_folder, *parts[first:], name)
                if mask.is_file():
                    return mask

    # Or beside it.
    beside = file.with_name(f"{file.stem}_mask.png")
    return beside if beside.is_file() else None


def _about(shots: list[Photograph]) -> str:
    """Sizes, masks and lenses of photographs in a few words."""
    sizes = sorted({(shot.lens.width, shot.lens.height) for shot in shots})
    width, height = sizes[0]
    words = [f"{width} x {height} pixels" if len(sizes) == 1 else f"{len(sizes)} sizes of pictures"]

    # Where their masks are from.
    kinds = sorted({"alpha channels" if shot.mask is None else "files" for shot in shots})
    words.append(f"masks from {' and '.join(kinds)}")

    # What was done to the intrinsics.
    if any(shot.listed != (shot.lens.width, shot.lens.height) for shot in shots):
        words.append("intrinsics scaled to resized pictures")
    if any(shot.lens.distortion.any() for shot in shots):
        words.append("lens distortion undone")
    return ", ".join(words)
