"""A COLMAP model: cameras, images and points, from its text or its binary files (Schoenberger and Frahm 2016).

    cameras.txt   CAMERA_ID MODEL WIDTH HEIGHT PARAMETERS...                  or cameras.bin
    images.txt    IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME,               or images.bin
                  then a line X Y POINT3D_ID X Y POINT3D_ID ..., which some
                  programs leave empty or out
    points3D.txt  POINT3D_ID X Y Z ...                                        or points3D.bin, or neither

A row of either kind of file is a list of the same things in the same order, words or numbers. A pose is
world-to-camera, for column vectors, with OpenCV's axes: x right, y down, z forward.

Shapes: `P` points.
"""
from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from photographs.shots import PARAMETERS, Frame, pose

# All models of lenses in the order of their numbers in binary files.
MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE", "FULL_OPENCV", "FOV",
          "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE", "RAD_TAN_THIN_PRISM_FISHEYE")
POINTS = set("0123456789+-.eE \t\r")  # what a line of an image's points is made of: numbers, three each
LEAST = {"cameras": 4, "images": 10, "points3D": 4}  # words of a line


def find_models(folder: Path) -> list[Path]:
    """Where below a folder the files of models are: `sparse/0`, `sparse/1`, ... and other habits, or the folder itself.
    """
    for base in (folder / "sparse", folder / "colmap/sparse", folder):
        places = [*sorted(base.glob("*/")), base]
        found = [place for place in places if (place / "images.bin").is_file() or (place / "images.txt").is_file()]
        if found:
            return found
    return []


def read_model(folder: Path) -> tuple[list[Frame], Tensor, str]:
    """The model in a folder: its images in the order of their names, its points (P, 3), float64, and "binary" or
    "text". Binary files go before text files.

    Raises `FileNotFoundError` or `ValueError` with one line that names the file.
    """
    # Points are a help, not a need.
    kind = "binary" if (folder / "images.bin").is_file() else "text"
    ending = ".bin" if kind == "binary" else ".txt"
    cameras_file = folder / f"cameras{ending}"
    if not cameras_file.is_file():
        raise FileNotFoundError(f"{cameras_file}: no such file; a COLMAP model has cameras, images and points3D")
    points_file = folder / f"points3D{ending}"
    points = _parsed(points_file, _point) if points_file.is_file() else []

    # Every image with its lens.
    lenses = dict(_parsed(cameras_file, _camera))
    frames = []
    for name, camera, numbers in _parsed(folder / f"images{ending}", _image):
        if camera not in lenses:
            raise ValueError(f"{folder / f'images{ending}'}: image {name!r:.80} has the camera {camera}, which "
                             f"{cameras_file.name} does not list")
        where = f"{folder}: image {name!r:.80}"
        frames.append(Frame(where, name, None, pose(_matrix(numbers), where), lenses[camera]))
    frames.sort(key=lambda frame: frame.name)
    return frames, torch.tensor(points, dtype=torch.float64).reshape(-1, 3), kind


# ---------------------------------------------------------------------------------------------- what a row says

def _parsed(file: Path, parse) -> list:
    """`parse` of every row of a file; what is wrong with one is said with its place."""
    read = _binary_rows if file.suffix == ".bin" else _text_rows
    found = []
    for where, row in read(file):
        try:
            found.append(parse(row))
        except ValueError as e:
            raise ValueError(f"{where}: {e!s:.160}") from None
    return found


def _camera(row: list) -> tuple[int, dict]:
    """The number of a camera and its lens. Raises `ValueError` for a model that cannot be undone."""
    # Fisheyes and lenses with more coefficients.
    model = row[1]
    if model not in PARAMETERS:
        raise ValueError(f"the camera model {model} is none of {', '.join(PARAMETERS)}; run COLMAP's "
                         "image_undistorter first, which writes PINHOLE")

    # Each parameter with its name.
    names = PARAMETERS[model]
    if len(row) != 4 + len(names):
        raise ValueError(f"{model} has the {len(names)} parameters {', '.join(names)}, not {len(row) - 4}")
    lens = {"camera_model": model, "w": int(row[2]), "h": int(row[3])}
    for name, number in zip(names, row[4:]):
        lens[name] = float(number)
    return int(row[0]), lens


def _image(row: list) -> tuple[str, int, list[float]]:
    """The path of an image below the folder of images, its camera's number, quaternion (w, x, y, z) and translation."""
    numbers = [float(word) for word in row[1:8]]
    return row[9], int(row[8]), numbers


def _point(row: list) -> list[float]:
    """Where a point is."""
    return [float(word) for word in row[1:4]]


def _matrix(numbers: list[float]) -> Tensor:
    """World-to-camera, (3, 4), from a quaternion (w, x, y, z) of any length and a translation, as COLMAP does it."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    quaternion = numbers[:4] / numbers[:4].norm()
    w, x, y, z = quaternion.tolist()

    # The rotation is I + 2 (w K + K^2), where K v is the cross product (x, y, z) x v.
    K = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    rotation = torch.eye(3, dtype=torch.float64) + 2 * (w * K + K @ K)
    return torch.cat([rotation, numbers[4:, None]], 1)


# ---------------------------------------------------------------------------------------------- text and binary

def _text_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows of a text file, each with its place for messages."""
    text = _decoded(file.read_bytes(), file)

    # Comments and empty lines may stand anywhere, even between an image and the line of its points.
    images = file.stem == "images"
    after_image = False
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if after_image and len(line.split()) % 3 == 0 and POINTS.issuperset(line):
            after_image = False
            continue
        after_image = images

        # A name, the last word of an image, may have spaces.
        words = line.strip().split(None, 9 if images else -1)
        if len(words) < LEAST[file.stem]:
            raise ValueError(f"{file}, line {number}: {len(words)} words of {LEAST[file.stem]} or more")
        yield f"{file}, line {number}", words


def _decoded(content: bytes, file: Path) -> str:
    """Text in UTF-8, or in what a byte order mark says. Raises `ValueError` with the line that is none."""
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as e:
        line = content[:e.end].split(b"\n")[-1]
        raise ValueError(f"{file}: {line[-60:]!r}: not UTF-8; rename the pictures, or save the file in it") from None


def _binary_rows(file: Path) -> Iterator[tuple[str, list]]:
    """The rows of a binary file: a count, then so many rows without anything between them."""
    content = _Bytes(file)
    for _ in range(content.take("Q")[0]):
        if file.stem == "cameras":
            # How many parameters follow is the model's own.
            number, model, width, height = content.take("iiQQ")
            name = MODELS[model] if 0 <= model < len(MODELS) else f"number {model}"
            parameters = content.take(f"{len(PARAMETERS.get(name, ()))}d")
            row = [number, name, width, height, *parameters]
        elif file.stem == "images":
            # The points in it: x, y and a number each.
            row = [*content.take("i7di"), content.word()]
            content.skip(24 * content.take("Q")[0])
        else:
            # Number, place, color, error, the length of its track; an image and a position each for the track.
            row = content.take("Q3d3BdQ")
            content.skip(8 * row[-1])
        yield f"{file}: {file.stem.rstrip('s')} {row[0]}", row


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
        start = self.skip(struct.calcsize(f"<{layout}"))
        return struct.unpack_from(f"<{layout}", self.content, start)

    def word(self) -> str:
        """The text up to the next zero byte."""
        end = self.content.find(b"\0", self.position)
        length = end - self.position if end >= 0 else len(self.content)
        start = self.skip(length + 1)
        return _decoded(self.content[start:start + length], self.file)
