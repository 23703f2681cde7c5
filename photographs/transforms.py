"""The frames of a transforms.json: nerfstudio's, instant-ngp's, NeRF-synthetic's (Mildenhall et al. 2020).

    {"camera_angle_x": 0.69, or "fl_x": ..., "fl_y", "cx", "cy", "w", "h", "k1", "k2", "p1", "p2": optional,
     "frames": [{"file_path": "images/1.jpg", "transform_matrix": [[...], [...], [...], [0, 0, 0, 1]]}, ...]}

A frame may have each of these numbers of its own. A pose is camera-to-world, for column vectors, with the axes of
OpenGL and Blender: x right, y up, z backward. Pixels count from the top left corner, as COLMAP's do.
"""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from photographs.colmap import PARAMETERS, Lens


class Frame(NamedTuple):
    """One frame as its file lists it."""
    where: str        # file and number, for messages
    name: str         # file_path, still unchecked
    mask: str | None  # mask_path (nerfstudio), likewise
    rows: list        # transform_matrix, likewise
    values: dict      # everything else of the frame, and of the file where the frame does not say

    def lens(self, width: int, height: int) -> Lens:
        """Its lens; so many pixels has the picture, where the file does not say. Raises `ValueError`."""
        # The sides that the numbers are meant for.
        width = _number(self, "w", width)
        height = _number(self, "h", height)
        if min(width, height) < 1:
            raise ValueError(f"{self.where}: w, h: {width:g} x {height:g} pixels")

        # The vertical focal length is often left out.
        fx = _focal_length(self, "x", width)
        fy = _focal_length(self, "y", height)
        if fx is None:
            raise ValueError(f"{self.where}: neither fl_x nor camera_angle_x, there or for all frames")
        numbers = {"fx": fx, "fy": fx if fy is None else fy}

        # The middle and no distortion, unless they are given.
        numbers["cx"] = _number(self, "cx", width / 2)
        numbers["cy"] = _number(self, "cy", height / 2)
        for key in ("k1", "k2", "p1", "p2"):
            numbers[key] = _number(self, key, 0.0)
        return Lens(_model(self), width, height, numbers)


def read_frames(file: Path) -> list[Frame]:
    """All frames of a file. Raises `OSError`, or `ValueError` with one line that names the file and the key."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as e:
        raise ValueError(f"{file}: not a JSON file ({e})") from None
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{file}: frames: no list of frames")

    # A frame's own numbers go before those of all.
    result = []
    for i, frame in enumerate(frames):
        where = f"{file}: frame {i}"
        if not isinstance(frame, dict):
            raise ValueError(f"{where}: not an object with file_path and transform_matrix")
        for key in ("file_path", "transform_matrix"):
            if key not in frame:
                raise ValueError(f"{where}: no {key}")
        values = content | frame
        result.append(Frame(where, frame["file_path"], frame.get("mask_path"), frame["transform_matrix"], values))
    return result


def _focal_length(frame: Frame, axis: str, side: float) -> float | None:
    """The focal length along an axis, pixels: `fl_x`, or by `camera_angle_x`; None where neither stands there."""
    if f"fl_{axis}" in frame.values:
        return _number(frame, f"fl_{axis}")

    # The angle that the picture spans.
    key = f"camera_angle_{axis}"
    if key not in frame.values:
        return None
    angle = _number(frame, key)
    if not 0 < angle < math.pi:
        raise ValueError(f"{frame.where}: {key}: {angle:g} is no angle between 0 and pi (radians)")
    return side / 2 / math.tan(angle / 2)


def _model(frame: Frame) -> str:
    """The name of its lens, as in COLMAP. Raises `ValueError` for one that cannot be undone."""
    # nerfstudio's names are COLMAP's; instant-ngp has a flag.
    model = frame.values.get("camera_model", "OPENCV")
    if frame.values.get("is_fisheye"):
        model = "is_fisheye"
    if model not in PARAMETERS:
        raise ValueError(f"{frame.where}: camera_model: {model} is none of {', '.join(PARAMETERS)}; undistort the "
                         "photographs first")

    # More coefficients than these five models have.
    for key in ("k3", "k4"):
        if _number(frame, key, 0.0) != 0:
            raise ValueError(f"{frame.where}: {key}: only k1, k2, p1 and p2 can be undone; undistort the photographs "
                             "first")
    return model


def _number(frame: Frame, key: str, default: float | None = None) -> float:
    """A finite number of a frame."""
    # JSON has true, texts, lists, and with Python also NaN.
    value = frame.values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{frame.where}: {key}: {value!r} is no finite number")
    return value
