"""The frames of a transforms.json: nerfstudio's, instant-ngp's, NeRF-synthetic's (Mildenhall et al. 2020).

    {"camera_angle_x": 0.69, or "fl_x": ..., "fl_y", "cx", "cy", "w", "h", "k1", "k2", "p1", "p2": optional,
     "frames": [{"file_path": "images/1.jpg", "transform_matrix": [[...], [...], [...], [0, 0, 0, 1]]}, ...]}

A frame may have each of these numbers of its own. A pose is camera-to-world, for column vectors, with the axes of
OpenGL and Blender: x right, y up, z backward.
"""
from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from datasets.pictures import plain
from photographs.shots import Frame, pose


FOCAL = {"fl_x", "fl_y", "camera_angle_x", "camera_angle_y"}
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")  # nerfstudio's list `distortion_params`


def read_split(file: Path) -> tuple[list[Frame], list[Frame] | None]:
    """The frames of a file: inputs and targets where it has nerfstudio's lists of names `train_filenames`,
    `test_filenames` or `val_filenames`, else all of them and None.

    Raises as `read_frames` does, and `ValueError` for a name of no frame, or of inputs and targets.
    """
    # The names in each list.
    frames = read_frames(file)
    content = _read(file)
    lists = [content.get(f"{part}_filenames") or [] for part in ("train", "test", "val")]
    train, test, val = (set(map(_plain, names if isinstance(names, list) else [names])) for names in lists)
    if not train | test | val:
        return frames, None
    names = {_plain(frame.name) for frame in frames}
    for name in sorted((train | test | val) - names):
        raise ValueError(f"{file}: {name!r:.80} is in train_, test_ or val_filenames, and the file_path of no frame")

    # Without a list for one of both, it is what the others leave.
    targets = test or val or names - train
    inputs = train or names - test - val
    for name in sorted(inputs & targets):
        raise ValueError(f"{file}: {name!r:.80} is in train_filenames and in another list; no input can be a target")
    return tuple([frame for frame in frames if _plain(frame.name) in names] for names in (inputs, targets))


def read_frames(file: Path) -> list[Frame]:
    """All frames of a file. Raises `OSError`, or `ValueError` with one line that names the file and the key."""
    content = _read(file)
    frames = content.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{file}: frames: no list of frames")

    result = []
    for i, frame in enumerate(frames):
        where = f"{file}: frame {i}"
        if not isinstance(frame, dict):
            raise ValueError(f"{where}: not an object with file_path and transform_matrix")
        for key in ("file_path", "transform_matrix"):
            if key not in frame:
                raise ValueError(f"{where}: no {key}")
        matrix = pose(frame["transform_matrix"], f"{where}: transform_matrix")

        # A frame's own numbers go before those of all; one focal length is both of its own.
        common = content.keys() - (FOCAL if frame.keys() & FOCAL else set())
        lens = _lens({key: content[key] for key in common}, str(file)) | _lens(frame, where)
        result.append(Frame(where, frame["file_path"], frame.get("mask_path"), matrix, lens))
    return result


def _read(file: Path) -> dict:
    """The object in a file; an empty one where there is something else."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: not a JSON file ({e})") from None
    return content if isinstance(content, dict) else {}


def _lens(numbers: dict, where: str) -> dict:
    """Numbers with nerfstudio's list of distortion coefficients under their names."""
    listed = numbers.get("distortion_params")
    if listed is None:
        return numbers
    if not isinstance(listed, list) or len(listed) != len(DISTORTION):
        raise ValueError(f"{where}: distortion_params: not the {len(DISTORTION)} numbers {', '.join(DISTORTION)}")
    return numbers | dict(zip(DISTORTION, listed))


def _plain(name: object) -> str:
    """A path, however it is spelled."""
    return plain(PurePosixPath(str(name).replace("\\", "/")).as_posix())
