"""What a folder of own photographs has: pictures, masks, cameras, in the world that its files have.

    transforms.json         nerfstudio, instant-ngp
    transforms_train.json   NeRF-synthetic (Mildenhall et al. 2020): the inputs; transforms_test.json: the targets
    sparse/0                COLMAP (`colmap.py`), with pictures in images/

A mask is a file in masks/, white where the object is, or else the picture's alpha channel.

Nothing is decoded here and nothing is normalized: `Photographs.load` does that. docs/photographs.md has a table of the
axes.

Shapes: `P` points.
"""
from __future__ import annotations

import os
import shlex
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cameras import Cameras
from common import files
from datasets.pictures import find_file
from photographs import colmap, transforms
from photographs.capture import Photographs
from photographs.shots import CONVENTIONS, Frame, Shot, open_shot, world_to_view

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")  # of pictures whose names lack one
PICTURE_FOLDERS = ("images", "input", ".")  # where the pictures of a COLMAP model lie
MASK_FOLDERS = ("masks", "mask")
MASK_NAMES = ("{0}.png", "{1}.png", "{0}", "{1}_mask.png", "mask_{1}.png", "{1}.mask.png")  # IMG_1.jpg; IMG_1
NO_MASK = ("{}: no mask ({} of {} photographs have none): each needs an alpha channel, or a file {} in {}, white where "
           "the object is; rembg, Segment Anything or GrabCut make such masks")


def read_capture(folder: str | Path) -> Photographs:
    """What a folder has. Decodes nothing.

    Raises `FileNotFoundError` or `ValueError` with one line that names the file and what in it is wrong.
    """
    folder = Path(folder)
    poses = find_poses(folder)
    if poses not in (None, folder):
        name = shlex.quote(str(poses))
        raise FileNotFoundError(f"{folder}: not the folder with the poses, which is {poses}: python check.py {name}, "
                                f"python distill.py --capture {name}")
    if not folder.is_dir():
        what = "a file, no" if folder.is_file() else "no such"
        raise FileNotFoundError(f"{folder}: {what} folder of photographs; docs/photographs.md says what it holds")

    # Tools that make a transforms.json leave the COLMAP model that they made it from beside it.
    if (folder / "transforms.json").is_file():
        return _photographs(folder, "transforms.json", *transforms.read_split(folder / "transforms.json"))
    if (folder / "transforms_train.json").is_file():
        frames = transforms.read_frames(folder / "transforms_train.json")
        files = [file for part in ("test", "val") if (file := folder / f"transforms_{part}.json").is_file()]
        targets = transforms.read_frames(files[0]) if files else []
        return _photographs(folder, "NeRF-synthetic", frames, targets)
    models = [(*colmap.read_model(place), place) for place in colmap.find_models(folder)]
    if models:
        # What COLMAP cannot connect is in several models, each in a world of its own.
        frames, points, kind, place = max(models, key=lambda model: len(model[0]))
        if not frames:
            raise ValueError(f"{place}: the COLMAP model has no image")
        if len(models) > 1:
            kind += f" ({place.relative_to(folder)}, the largest of {len(models)} models)"
        lenses = sorted({frame.numbers["camera_model"] for frame in frames})
        kind = f"COLMAP, {kind}, {', '.join(lenses)}, {len(points)} points"
        return _photographs(folder, kind, frames, None, "colmap", points, _picture_root(folder, frames))

    # Nothing of all that.
    llff = "; poses_bounds.npy is not read" if (folder / "poses_bounds.npy").exists() else ""
    raise FileNotFoundError(f"{folder}: no transforms.json, no transforms_train.json and no COLMAP model "
                            f"(sparse/0/images.bin or .txt) there{llff}; docs/photographs.md says how to make one")


def find_poses(path: Path) -> Path | None:
    """The folder with poses that somebody means by a path: itself, or where a photograph, a transforms.json or a folder
    of photographs lies; `~` is the home. None where there is none.
    """
    path = Path(os.path.expanduser(path))
    for folder in (path, path.parent, path.parent.parent):
        listed = any(os.path.isfile(folder / f"transforms{part}.json") for part in ("", "_train"))
        # (A folder of many captures is above each of them, but none itself.)
        models = folder == path or os.path.isdir(folder / "sparse")
        if listed or models and colmap.find_models(folder):
            return folder
    return None


def read_path(file: Path) -> Cameras:
    """The cameras (T,), float64, in NDC of squares, of a file like transforms.json, whose pictures need not exist; lens
    distortion is left out. Raises as `transforms.read_frames` does, and `ValueError` for a lens that is none.
    """
    frames = transforms.read_frames(file)
    lenses = []
    for frame in frames:
        # An angle needs no size of the picture, so any will do.
        width = frame.number("w", None if "fl_x" in frame.numbers else 1000.0)
        height = frame.number("h", width)
        focal, principal = frame.pinhole(width, height)

        # NDC point left and up, pixels right and down.
        half = max(width, height) / 2
        middle = torch.tensor([width, height], dtype=torch.float64) / 2
        lenses.append(torch.stack([focal, middle - principal]) / half)
    R, T = world_to_view(torch.stack([frame.matrix for frame in frames]), CONVENTIONS["opengl"])
    return Cameras(R, T, *torch.stack(lenses, 1))


def _photographs(folder: Path, kind: str, frames: list[Frame], targets: list[Frame] | None = None,
                 convention: str = "opengl", points: Tensor | None = None, root: Path | None = None) -> Photographs:
    """The photographs of listed frames, whose names are below `root` (default: the folder).

    targets: frames that come after the others, which are inputs then; None: the files do not tell inputs from targets.
    """
    # Frames whose picture is absent are only counted.
    absent = []
    shots = _open_shots(folder, root or folder, frames, absent)
    count = len(shots)
    shots += _open_shots(folder, root or folder, targets or [], absent)
    if absent and len(shots) < 2:
        raise FileNotFoundError(absent[0])

    # They are named after their files, with the folders if two files have the same name.
    alike = len({shot.file.name for shot in shots}) < len(shots)
    shots = [shot._replace(name=shot.name.replace("/", "_") if alike else Path(shot.name).name) for shot in shots]
    _check(folder, shots)

    # In a line.
    counts = f"{count} + {len(shots) - count}" if count < len(shots) else f"{count}"
    skipped = f" ({len(absent)} more are listed and absent, {absent[0].rpartition('/')[2]} first)" if absent else ""
    source = f"{kind}, {counts} photographs{skipped}, {_about(shots)}"

    # Points at infinity are of no use.
    points = torch.zeros(0, 3, dtype=torch.float64) if points is None else points[points.isfinite().all(1)]
    photographs = Photographs(folder, shots, CONVENTIONS[convention], points, source)
    if targets is None:
        return photographs
    return replace(photographs, inputs=list(range(count)), targets=list(range(count, len(shots))) or None)


def _open_shots(folder: Path, root: Path, frames: list[Frame], absent: list[str]) -> list[Shot]:
    """The photographs of frames, whose names are below `root`; what is said of each that is not there goes to
    `absent`.
    """
    shots = []
    for frame in frames:
        # The picture, whose ending may be left out, and its mask.
        path = files.below(root, frame.name, f"{frame.where}: file_path")
        candidates = [find_file(path.with_name(path.name + ending)) for ending in ("", *ENDINGS)]
        file = next((x for x in candidates if x.is_file()), None)
        if file is None:
            absent.append(f"{frame.where}: no such file {path}")
            continue
        mask = _find_mask(folder, file)
        if frame.mask is not None:
            mask = find_file(files.below(folder, frame.mask, f"{frame.where}: mask_path"))
        name = unicodedata.normalize("NFC", file.relative_to(folder).as_posix())  # as keyboards spell it
        shots.append(open_shot(frame, name, file, mask))
    return shots


def _check(folder: Path, shots: list[Shot]) -> None:
    """Raises `ValueError` unless there are two photographs or more, with different names, each with its own mask."""
    if len(shots) < 2:
        raise ValueError(f"{folder}: {len(shots)} photograph; a scene needs two or more")

    # The first one that lacks a mask, and how many do.
    bare = [shot.file for shot in shots if shot.mask is None]
    if bare:
        where = folder / MASK_FOLDERS[0]
        raise ValueError(NO_MASK.format(bare[0], len(bare), len(shots), f"{bare[0].stem}.png", where))

    # One that two share.
    for what in ("name", "mask"):
        value, count = Counter(getattr(shot, what) for shot in shots).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{folder}: {count} photographs have the same {what}, {value}; each needs its own")


def _about(shots: list[Shot]) -> str:
    """Sizes, masks and lenses of photographs in a few words."""
    sizes = {(shot.width, shot.height) for shot in shots}
    kinds = sorted({"alpha channels" if shot.mask == shot.file else "files" for shot in shots})
    words = [f"{shots[0].width} x {shots[0].height} pixels" if len(sizes) == 1 else f"{len(sizes)} sizes of pictures",
             f"masks from {' and '.join(kinds)}"]

    # What was done to the intrinsics.
    if any(shot.resized for shot in shots):
        words.append("intrinsics scaled to resized pictures")
    if any(shot.distortion.any() for shot in shots):
        words.append("lens distortion undone")
    return ", ".join(words)


# ---------------------------------------------------------------------------------------------- files

def _picture_root(folder: Path, frames: list[Frame]) -> Path:
    """The folder that a model's names are below: the first of the usual ones that has such a picture, or the first."""
    for place in PICTURE_FOLDERS:
        if any(find_file(folder / place / frame.name).is_file() for frame in frames):
            return folder / place
    return folder / PICTURE_FOLDERS[0]


def _find_mask(folder: Path, file: Path) -> Path | None:
    """The mask of a picture below `folder`, by the usual habits; None where there is none."""
    # Below masks/ as the picture is below the folder: with all of its folders, without the first, ..., with none.
    parts = file.parent.relative_to(folder).parts
    places = [folder.joinpath(place, *parts[i:]) for place in MASK_FOLDERS for i in range(len(parts) + 1)]
    candidates = [place / name.format(file.name, file.stem) for place in places for name in MASK_NAMES]

    # Or beside it.
    candidates.append(file.with_name(f"{file.stem}_mask.png"))
    return next((mask for mask in map(find_file, candidates) if mask.is_file()), None)
