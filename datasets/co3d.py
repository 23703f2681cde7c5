"""CO3Dv2 sequences as scenes (Sec. 4 of the paper; CO3D: Reizenstein et al., ICCV 2021).

Reads, without PyTorch3D, a dataset folder as CO3D's own downloader leaves it,

    <root>/<category>/frame_annotations.jgz       which frames there are, and their cameras (`annotations.py`)
    <root>/<category>/set_lists/set_lists_*.json  optional: which frames are train, val and test
    <root>/<category>/<sequence>/images, masks    wherever the annotations say

(`sequence_annotations.jgz`, the depth maps and the point clouds hold nothing that the method needs), or the released
preprocessed toy data `<root>/<category>/<category>_toy.pt` [released: co3d_toy_dataloader.py:17-30].

Different from the released code: frames of a short sequence are never repeated to make up a number
[released: co3d_dataloader.py:362-363], and no sequence is left out by name [released: co3d_dataloader.py:337-342].

Shapes: `V` frames (views) of a sequence, `S` side of the square output in pixels, `H W` rows and columns of a
photograph.
"""
from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import Cameras, Scene
from common import files
from datasets.annotations import ANNOTATIONS_FILE, Annotations, Frame, date_and_size
from datasets.crop import (Crop, check_lens, check_place, check_rotation, crop_and_resize, pixel_camera,
                           scene_of_crops)
from datasets.pictures import find_file, open_picture, orientation, pixels, read_mask

SHAPES = {"R": (3, 3), "T": (3,), "focal_length": (2,), "principal_point": (2,)}  # what a camera has
LISTED = 5  # names that an error message lists


# ---------------------------------------------------------------------------------------------- what others call

def sequences(root: str | Path, category: str, split: str | None = None) -> list[str]:
    """Names of the sequences of a category.

    `split`, such as "fewview_dev/test": only those with frames listed as `test` in
    `set_lists/set_lists_fewview_dev.json`.
    """
    return _source(root, category).sequences(split)


def frame_numbers(root: str | Path, category: str, sequence: str, split: str | None = None) -> list[int]:
    """Numbers of the frames of a sequence in order of time, optionally of one `split` only. Decodes nothing.

    Frames without a mask, with an empty one (annotated area of at most one pixel) or without a camera do not count.
    """
    return _numbers(_source(root, category), sequence, split)


def splits(root: str | Path, category: str) -> list[str]:
    """The splits of a category, such as "fewview_dev/test"; none for a tree without set lists."""
    return _source(root, category).splits()


def categories(root: str | Path) -> list[str]:
    """Names of the categories that a dataset folder holds, sorted."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; the root of a dataset has a folder for each category")

    # In either layout.
    names = sorted(folder.name for folder in root.iterdir())
    return [name for name in names if _annotations_file(root, name).is_file() or _toy_file(root, name).is_file()]


def stamp(root: str | Path, category: str, sequence: str, frames: Iterable[int]) -> str:
    """Sixteen hexadecimal digits of what frames are read from: their cameras, and dates and sizes of their files.

    Equal stamps: nothing has changed since. Decodes nothing.
    """
    rows = _source(root, category).sources(sequence, list(frames))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def load_sequence(root: str | Path, category: str, sequence: str, size: int = 256,
                  frames: Iterable[int] | None = None) -> Scene:
    """A sequence, or those of its frames with the numbers `frames` in that order, cropped to `size` pixels a side.

    Raises `FileNotFoundError` or `ValueError` with one line on what is missing or broken.
    """
    # Chosen frames have to be among the usable ones.
    source = _source(root, category)
    usable = _numbers(source, sequence)
    chosen = usable if frames is None else list(frames)
    known = set(usable)
    absent = [number for number in chosen if number not in known]
    if absent:
        raise ValueError(f"{root}/{category}: sequence {sequence!r} has no usable frame {str(absent[0])[:40]}; "
                         f"it has {_some(usable)}")
    return source.load(sequence, size, chosen)


# ---------------------------------------------------------------------------------------------- a CO3Dv2 tree

class _Tree(Annotations):
    """One category of a dataset folder."""

    def __init__(self, root: Path, category: str):
        super().__init__(root / category)
        self.root = root
        self.file = _annotations_file(root, category)

    def sequences(self, split: str | None = None) -> list[str]:
        """Names of all sequences, or of those with frames in the split, sorted; there must be some."""
        names = super().sequences(split)
        if not names and split is not None:
            raise ValueError(f"{self.file.parent}/set_lists: no split {split!r}; there is {_some(self.splits())}")
        return names

    def numbers(self, sequence: str, split: str | None) -> list[int]:
        """Numbers of the frames in order of time; of an unknown sequence, none."""
        return [frame.number for frame in self.frames(sequence, split)]

    def sources(self, sequence: str, numbers: list[int]) -> list:
        """Of every file that these frames are read from its name, date and size; and their cameras."""
        # A missing file is known by its name; decoding it raises the error.
        rows = []
        for frame in self._chosen(sequence, numbers):
            for file in (frame.image, frame.mask):
                rows.append(date_and_size(file) if file.is_file() else [file.name])
            rows.append(frame.viewpoint)
        return rows

    def load(self, sequence: str, size: int, numbers: list[int]) -> Scene:
        """The frames with these numbers."""
        crops = [self._crop(frame, size) for frame in self._chosen(sequence, numbers)]
        return scene_of_crops(crops, [str(number) for number in numbers], sequence)

    def _chosen(self, sequence: str, numbers: list[int]) -> list[Frame]:
        """The frames with these numbers, in their order, with the paths of their files; none for a number that it has
        not.
        """
        frames = {frame.number: frame for frame in self.frames(sequence)}
        chosen = [frames[number] for number in numbers if number in frames]
        located = []
        for frame in chosen:
            image = files.below(self.root, frame.image, self.file)
            mask = files.below(self.root, frame.mask, self.file)
            located.append(frame._replace(image=find_file(image), mask=find_file(mask)))
        return located

    def _crop(self, frame: Frame, size: int) -> Crop:
        """One frame, decoded and cut to its object."""
        mask = read_mask(frame.mask)
        with open_picture(frame.image) as picture:
            image = pixels(picture, "RGB", frame.image)
            if orientation(picture) != 1:
                raise ValueError(f"{frame.image}: an EXIF tag turns it; turn the pixels (mogrify -auto-orient)")

        # What is wrong with a camera is in the annotations, what is wrong with a crop mostly in the mask.
        blamed = self.file
        try:
            camera = _parse_camera(json.loads(frame.viewpoint), *image.shape[:2])
            blamed = frame.mask
            return crop_and_resize(image, mask, camera, size)
        except ValueError as e:
            raise ValueError(f"{blamed}: {e!s:.160} (frame {frame.number} of {frame.sequence!r})") from None


def _parse_camera(viewpoint: dict, height: int, width: int) -> Cameras:
    """One camera in pixels of an H x W photograph, float64. Raises `ValueError` for one that no photograph has."""
    try:
        numbers = [torch.tensor(viewpoint[key], dtype=torch.float64).reshape(SHAPES[key]) for key in SHAPES]
        if not all(x.isfinite().all() for x in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"not a camera, finite numbers of the shapes {SHAPES}") from None
    R, T, focal, principal = numbers

    # As for own photographs.
    check_rotation(R, "R")
    check_place(T, principal, "T, principal_point")
    units = viewpoint.get("intrinsics_format", "ndc_norm_image_bounds")
    camera = pixel_camera(Cameras(R, T, focal, principal), units, height, width)
    check_lens(camera.focal.tolist(), camera.principal.tolist(), (width, height), "focal_length, principal_point")
    return camera


# ---------------------------------------------------------------------------------------------- the released toy data

class _Toy:
    """`<category>_toy.pt`: {category: [{images, R, T, f, c, masks, valid_region, ...}]}, cropped and masked already."""

    def __init__(self, root: Path, category: str):
        self.file = _toy_file(root, category)
        try:
            # Mapped where the format allows it: only what is used is read.
            data = files.load(self.file, zipfile.is_zipfile(self.file))
            self.items = {f"toy{i}": item for i, item in enumerate(data[category])}
            self.counts = {name: len(item["R"]) for name, item in self.items.items()}
        except Exception as e:
            reason = str(e).strip().split("\n")[0][:100]
            raise ValueError(f"{self.file}: not a toy dataset {{{category!r}: [sequences]}} "
                             f"that loads safely ({reason})") from None

    def sequences(self, split: str | None) -> list[str]:
        """`toy0`, `toy1`, ... in the file's order; the file has no splits."""
        return list(self.items)

    def splits(self) -> list[str]:
        """None: the file is a choice already."""
        return []

    def sources(self, sequence: str, numbers: list[int]) -> list:
        """Date and size of the file."""
        return [date_and_size(self.file)]

    def numbers(self, sequence: str, split: str | None) -> list[int]:
        """0, 1, ...; of an unknown sequence, none."""
        return list(range(self.counts.get(sequence, 0)))

    def load(self, sequence: str, size: int, numbers: list[int]) -> Scene:
        """The frames with these numbers, resized where the file has another size."""
        try:
            # What makes up a scene, of the frames wanted.
            keys = ("R", "T", "f", "c", "images", "masks", "valid_region")
            item = {key: torch.as_tensor(self.items[sequence][key])[numbers] for key in keys}
            if any(x.is_complex() or not x.isfinite().all() for x in item.values()):
                raise ValueError("a number in it is not finite and real")

            # Intrinsics are in NDC of the square image already.
            R = item["R"].float().reshape(len(numbers), 3, 3)
            T = item["T"].float().reshape(len(numbers), 3)
            focal = item["f"].float().reshape(len(numbers), 2)
            principal = item["c"].float().reshape(len(numbers), 2)

            # Masks stay as sharp as they are.
            images = _resized(item["images"], 3, size, "bilinear")
            masks = _resized(item["masks"], 1, size, "nearest")
            valid = _resized(item["valid_region"], 1, size, "nearest")
        except (KeyError, TypeError, IndexError, RuntimeError, ValueError) as e:
            raise ValueError(f"{self.file}: {sequence} is not a sequence of the toy dataset "
                             f"({type(e).__name__}: {' '.join(str(e).split())[:100]})") from None

        # As in a tree.
        where = f"{self.file}: {sequence}"
        check_rotation(R, f"{where}: R")
        check_place(T, principal, where)
        lengths = [focal.min().item() * size / 2, focal.max().item() * size / 2]
        check_lens(lengths, [size / 2], (size, size), f"{where}: f")
        cameras = Cameras(R, T, focal, principal)
        return Scene(images, masks, valid, cameras, [str(number) for number in numbers], sequence)


def _resized(x: Tensor, channels: int, size: int, mode: str) -> Tensor:
    """(V, C, H, W), or (V, H, W) for one channel, floats in [0, 1] or bytes -> (V, C, S, S) floats in [0, 1]."""
    # Bytes count to 255, unless they are a mask of 0 and 1.
    full = 255 if x.dtype == torch.uint8 and x.max() > 1 else 1
    x = x.float() / full

    height, width = x.shape[-2:]
    x = x.reshape(len(x), channels, height, width)
    if (height, width) == (size, size):
        return x
    return F.interpolate(x, (size, size), mode=mode)


# ---------------------------------------------------------------------------------------------- either

def _source(root: str | Path, category: str) -> _Tree | _Toy:
    """The dataset of a category under `root`, in either layout."""
    # The downloader's layout goes before a toy file beside it.
    root = Path(root)
    if _annotations_file(root, category).is_file():
        return _Tree(root, category)
    if _toy_file(root, category).is_file():
        return _Toy(root, category)

    # Say what there is instead.
    raise FileNotFoundError(f"{root / category}: no {ANNOTATIONS_FILE} or {category}_toy.pt there; "
                            f"categories of {root}: {_some(categories(root))}")


def _numbers(source: _Tree | _Toy, sequence: str, split: str | None = None) -> list[int]:
    """Numbers of the frames of a sequence, of which there must be some."""
    numbers = source.numbers(sequence, split)
    if not numbers:
        where = f" in split {split!r}" if split else ""
        known = _some(source.sequences(split))
        raise ValueError(f"{source.file}: no sequence {sequence!r:.60}{where}; there is {known}")
    return numbers


def _annotations_file(root: Path, category: str) -> Path:
    return root / category / ANNOTATIONS_FILE


def _toy_file(root: Path, category: str) -> Path:
    return root / category / f"{category}_toy.pt"


def _some(names: list) -> str:
    """The first few of a list of names, for a message."""
    if not names:
        return "none"
    text = ", ".join(map(str, names[:LISTED]))
    return f"{text}, ... ({len(names)} in all)" if len(names) > LISTED else text
