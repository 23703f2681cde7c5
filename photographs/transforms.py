"""The frames of a transforms.json: nerfstudio's, instant-ngp's, NeRF-synthetic's (Mildenhall et al. 2020).

    {"camera_angle_x": 0.69, or "fl_x": ..., "fl_y", "cx", "cy", "w", "h", "k1", "k2", "p1", "p2": optional,
     "frames": [{"file_path": "images/1.jpg", "transform_matrix": [[...], [...], [...], [0, 0, 0, 1]]}, ...]}

A frame may have each of these numbers of its own. A pose is camera-to-world, for column vectors, with the axes of
OpenGL and Blender: x right, y up, z backward.
"""
from __future__ import annotations

import json
from pathlib import Path

from photographs.shots import Frame, pose


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
        matrix = pose(frame["transform_matrix"], f"{where}: transform_matrix")
        result.append(Frame(where, frame["file_path"], frame.get("mask_path"), matrix, content | frame))
    return result
