"""A COLMAP model: cameras, images and points, from its text or its binary files (Schoenberger and Frahm 2016).

    cameras.txt   CAMERA_ID MODEL WIDTH HEIGHT PARAMETERS...                  or cameras.bin
    images.txt    IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line   or images.bin
    points3D.txt  POINT3D_ID X Y Z ...                                        or points3D.bin, or neither

A pose is world-to-camera, for column vectors, with OpenCV's axes: x right, y down, z forward. Pixels count from the top
left corner, and the first pixel's center is (0.5, 0.5).

Shapes: `P` points.
"""
from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# What the parameters of a lens are: of those that can be undone.
PARAMETERS = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k1"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
}

# All names in the order of their numbers in binary files.
NAMES = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE", "FULL_OPENCV", "FOV",
         "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE", "RAD_TAN_THIN_PRISM_FISHEYE")


class Lens(NamedTuple):
    """What COLMAP calls a camera: the intrinsics that many images share. Lengths are in pixels."""
    model: str                       # key of `PARAMETERS`
    width: int
    height: int
    numbers: dict[str, float]        # f, or fx and fy; cx, cy; k1, k2, p1, p2 where the model has them


class Shot(NamedTuple):
    """What COLMAP calls an image."""
    name: str       # path below the folder of images, with "/"
    lens: Lens
    matrix: Tensor  # (4, 4) world-to-camera, float64


class Model(NamedTuple):
    """A whole model."""
    shots: list[Shot]  # in the order of their names
    points: Tensor     # (P, 3) float64, world
    kind: str          # "text" or "binary"


def find_model(folder: Path) -> Path | None:
    """Where below a folder the files of a model are: `sparse/0` and other habits, or the folder itself."""
    # COLMAP's mapper numbers its models; the first one is mostly the only one.
    for place in ("sparse/0", "sparse", "colmap/sparse/0", "."):
        for ending in (".bin", ".txt"):
            if (folder / place / f"images{ending}").is_file():
                return folder / place
    return None


def read_model(folder: Path) -> Model:
    """The model in a folder; its binary files go before its text files.

    Raises `FileNotFoundError` or `ValueError` with one line that names the file.
    """
    # One of the two ways to write the three files.
    binary = (folder / "images.bin").is_file()
    ending = ".bin" if binary else ".txt"
    lenses_file = folder / f"cameras{ending}"
    shots_file = folder / f"images{ending}"
    points_file = folder / f"points3D{ending}"

    # Points are a help, not a need.
    for file in (lenses_file, shots_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a COLMAP model has cameras, images and points3D")
    read = _read_binary if binary else _read_text
    lenses = dict(read(lenses_file, "cameras"))
    rows = list(read(shots_file, "images"))
    points = list(read(points_file, "points")) if points_file.is_file() else []

    # Every image with its lens.
    shots = []
    for row in rows:
        if row.lens not in lenses:
            raise ValueError(f"{shots_file}: image {row.name!r} has the camera {row.lens}, which {lenses_file.name} "
                             "does not list")
        matrix = _pose(row.numbers)
        shots.append(Shot(row.name, lenses[row.lens], matrix))
    shots.sort(key=lambda shot: shot.name)
    points = torch.tensor(points, dtype=torch.float64).reshape(-1, 3)
    return Model(shots, points, "binary" if binary else "text")


def _lens(model: str, width: int, height: int, parameters: list[float]) -> Lens:
    """A lens from its numbers in the model's order. Raises `ValueError` for a model that cannot be undone."""
    # Fisheyes and lenses with more coefficients.
    if model not in PARAMETERS:
        raise ValueError(f"the camera model {model} is none of {', '.join(PARAMETERS)}; run COLMAP's "
                         "image_undistorter first, which writes PINHOLE")

    # Each parameter with its name.
    names = PARAMETERS[model]
    if len(parameters) != len(names):
        raise ValueError(f"{model} has the {len(names)} parameters {', '.join(names)}, not {len(parameters)}")
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height} pixels")
    return Lens(model, width, height, dict(zip(names, parameters)))


def _pose(numbers: list[float]) -> Tensor:
    """World-to-camera, (4, 4), from a quaternion (w, x, y, z) of any length and a translation, as COLMAP does it."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    quaternion = numbers[:4] / numbers[:4].norm()
    w, x, y, z = quaternion.tolist()

    # The rotation is I + 2 (w K + K^2), where K v is the cross product (x, y, z) x v.
    K = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] += 2 * (w * K + K @ K)
    matrix[:3, 3] = numbers[4:]
    return matrix


class _Row(NamedTuple):
    """An image as its file lists it."""
    name: str
    lens: int             # the number of its camera
    numbers: list[float]  # quaternion (w, x, y, z) and translation


# ---------------------------------------------------------------------------------------------- text

def _read_text(file: Path, part: str) -> Iterator:
    """The rows of a text file: of cameras (number, Lens), of images `_Row`, of points [x, y, z]."""
    # How a line is understood, and how many words it has at least.
    parse, least = {"cameras": (_text_lens, 4), "images": (_text_shot, 10), "points": (_text_point, 4)}[part]
    lines = _lines(file)
    for number, line in lines:
        words = line.split()
        if not words:
            continue

        # What is wrong is said with the line's number.
        if len(words) < least:
            raise ValueError(f"{file}, line {number}: {len(words)} words, where {part} have {least} or more")
        try:
            yield parse(words)
        except ValueError as e:
            raise ValueError(f"{file}, line {number}: {e}") from None

        # The line after an image has the points in it, and may be empty.
        if part == "images":
            next(lines, None)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, without comments."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file") from None

    # Comments may stand anywhere, even between an image and its points.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.startswith("#"):
            yield number, line


def _text_lens(words: list[str]) -> tuple[int, Lens]:
    parameters = [float(word) for word in words[4:]]
    return int(words[0]), _lens(words[1], int(words[2]), int(words[3]), parameters)


def _text_shot(words: list[str]) -> _Row:
    numbers = [float(word) for word in words[1:8]]
    name = " ".join(words[9:])
    return _Row(name, int(words[8]), numbers)


def _text_point(words: list[str]) -> list[float]:
    return [float(word) for word in words[1:4]]


# ---------------------------------------------------------------------------------------------- binary

class _Bytes:
    """The bytes of a file, read from the first to the last; little endian."""

    def __init__(self, file: Path):
        self.file = file
        self.content = file.read_bytes()
        self.position = 0

    def skip(self, count: int) -> int:
        """Go on by so many bytes; the position before. Raises `ValueError` where there are not so many."""
        start = self.position
        self.position += count
        if self.position > len(self.content):
            raise ValueError(f"{self.file}: truncated: it ends after {len(self.content)} bytes")
        return start

    def take(self, layout: str) -> tuple:
        """The next numbers of a layout of `struct`."""
        layout = f"<{layout}"
        start = self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.content, start)

    def word(self) -> str:
        """The text up to the next zero byte."""
        end = self.content.find(b"\0", self.position)
        length = end - self.position if end >= 0 else len(self.content)
        start = self.skip(length + 1)
        return self.content[start:start + length].decode(errors="replace")


def _read_binary(file: Path, part: str) -> Iterator:
    """The rows of a binary file, as `_read_text` gives them."""
    # A count, then so many rows without anything between them.
    parse = {"cameras": _binary_lens, "images": _binary_shot, "points": _binary_point}[part]
    content = _Bytes(file)
    count, = content.take("Q")
    for _ in range(count):
        yield parse(content)


def _binary_lens(content: _Bytes) -> tuple[int, Lens]:
    # How many parameters follow is the model's own.
    number, model, width, height = content.take("iiQQ")
    name = NAMES[model] if 0 <= model < len(NAMES) else f"number {model}"
    known = len(PARAMETERS.get(name, ()))
    parameters = content.take(f"{known}d")
    try:
        return number, _lens(name, width, height, list(parameters))
    except ValueError as e:
        raise ValueError(f"{content.file}: camera {number}: {e}") from None


def _binary_shot(content: _Bytes) -> _Row:
    numbers = content.take("i7di")
    name = content.word()

    # The points in it: x, y and a number each.
    count, = content.take("Q")
    content.skip(24 * count)
    return _Row(name, numbers[8], list(numbers[1:8]))


def _binary_point(content: _Bytes) -> list[float]:
    # Number, place, color, error, the length of its track; an image and a position each for the track.
    numbers = content.take("Q3d3BdQ")
    content.skip(8 * numbers[8])
    return list(numbers[1:4])
