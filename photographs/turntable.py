"""Cameras of photographs from a turntable.

    python -m photographs.turntable photographs --focal 50 --elevation 20
    python -m photographs.turntable photographs --focal 26 --elevation 35 --degrees -180

The camera stands still and looks down on the turntable at one angle; between two photographs the turntable turns by the
same angle. Then their number, the lens and the angle are all that is needed. Writes `DIR/transforms.json`; `check.py
DIR` says whether the masks agree.

Shapes: `V` photographs.
"""
from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from cameras import look_at
from common import cli, files
from datasets.pictures import open_picture
from photographs.reading import ENDINGS, PICTURE_FOLDERS
from photographs.shots import AXES

DISTANCE = 4.0          # of the camera from the axis, in any unit
FULL_FRAME = 36.0       # mm: longer side of the picture that "35 mm equivalent" focal lengths are for


def turntable_poses(count: int, elevation: float, degrees: float = 360.0) -> Tensor:
    """Camera-to-world matrices (V, 4, 4), float64, in OpenGL's axes, of `count` photographs from a turntable.

    It turns by `degrees` in all, the last photograph a step before the first one again; seen from above it turns
    clockwise, or with negative degrees the other way. elevation: degrees above the table.
    """
    # Seen from the table the camera goes round it, the other way.
    angle = torch.arange(count, dtype=torch.float64) * math.radians(degrees) / count
    height = math.radians(elevation)
    level = math.cos(height)
    eye = torch.stack([level * angle.sin(), math.sin(height) + 0 * angle, level * angle.cos()], -1) * DISTANCE
    up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    R, _ = look_at(eye, torch.zeros(3, dtype=torch.float64), up)

    # The columns of R are the view's axes in the world.
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    poses[:, :3, :3] = R * torch.tensor(AXES["OpenGL"], dtype=torch.float64)
    poses[:, :3, 3] = eye
    return poses


def write_transforms(folder: Path, focal: float, elevation: float, degrees: float = 360.0) -> int:
    """Write `folder/transforms.json` for its photographs in the order of their names; returns how many there are.

    focal: mm, as on a 35 mm film. Raises `ValueError` where there are fewer than two, and `FileExistsError` where the
    file is there already.
    """
    # The first of the usual folders that has any.
    target = folder / "transforms.json"
    if target.exists():
        raise FileExistsError(f"{target} is there already; delete it to have it written anew")
    for name in PICTURE_FOLDERS:
        pictures = sorted(x for x in (folder / name).glob("*") if x.suffix.lower() in ENDINGS)
        if pictures:
            break
    if len(pictures) < 2:
        raise ValueError(f"{folder}: {len(pictures)} photographs in it or in its images/; a scene needs two or more")

    # Every picture has the size that it has.
    frames = []
    for picture, pose in zip(pictures, turntable_poses(len(pictures), elevation, degrees)):
        with open_picture(picture) as opened:
            width, height = opened.size
        pixels = focal / FULL_FRAME * max(width, height)
        frames.append({"file_path": picture.relative_to(folder).as_posix(), "transform_matrix": pose.tolist(),
                       "fl_x": pixels, "fl_y": pixels, "w": width, "h": height})
    files.save_json({"frames": frames}, target)
    return len(frames)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__, prog="python -m photographs.turntable")
    p.add_argument("folder", type=Path, metavar="DIR", help="photographs in it or in its images/, in order of names")
    p.add_argument("--focal", type=float, required=True, metavar="MM",
                   help="of the lens, as on a 35 mm film: EXIF's FocalLengthIn35mmFilm")
    p.add_argument("--elevation", type=float, required=True, metavar="DEGREES",
                   help="angle at which the camera looks down on the table")
    p.add_argument("--degrees", type=float, default=360.0,
                   help="of the table in all, clockwise seen from above; negative: the other way (default: 360)")
    return p


def command(args: argparse.Namespace) -> None:
    """Check the numbers, write the file."""
    if not 0 < args.focal < math.inf:
        raise ValueError(f"--focal {args.focal:g}: must be above 0 mm")
    if not abs(args.elevation) < 90:
        raise ValueError(f"--elevation {args.elevation:g}: must be between -90 and 90 degrees")
    if not 0 < abs(args.degrees) <= 360:
        raise ValueError(f"--degrees {args.degrees:g}: must be up to 360, either way, and not 0")
    count = write_transforms(args.folder, args.focal, args.elevation, args.degrees)
    print(f"{args.folder / 'transforms.json'}: {count} photographs, {abs(args.degrees) / count:g} degrees apart")


if __name__ == "__main__":
    cli.run(command, parser().parse_args())
