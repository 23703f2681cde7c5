"""Mistakes on purpose: cameras as a file has them after one of the usual slips, and the table of what `check.py` says.

    python -m tests.support.camera_mistakes DIR      a folder of NeRF-synthetic, the second half of its photographs
    python -m tests.support.camera_mistakes DIR --category C    the first sequence of a CO3D tree

Every mistake is made in the numbers of the file, not by the code that undoes it.
"""
from __future__ import annotations

import argparse
import math
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cameras import Cameras, Scene
from datasets.co3d import load_sequence, sequences
from photographs import examine
from photographs.capture import load_pictures
from photographs.reading import read_capture
from photographs.shots import CONVENTIONS, Convention, world_to_view

PHOTOGRAPHS = (2, 3, 6, 12)
COLUMNS = ("named", "cannot tell", "seen, not named", "missed", "wrongly named")
SIZE = 200  # pixels a side of the pictures
FLIPS = {"OpenCV": (-1, -1, 1), "OpenGL": (-1, 1, -1), "PyTorch3D": (1, 1, 1)}
NEGATED = {"x": np.diag([-1.0, 1, 1]), "y": np.diag([1.0, -1, 1]), "z": np.diag([1.0, 1, -1])}
EXCHANGED = np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])


class Mistake(NamedTuple):
    """A slip, and the words that `check.py` must find for it."""
    kind: str  # row of the table
    words: str
    cameras: Cameras


def mistakes(scene: Scene, convention: Convention, whole: bool) -> list[Mistake]:
    """Every mistake in the cameras of a scene whose file is read in a convention."""
    cameras = scene.cameras.to(torch.float64)
    right = written(cameras, convention)
    made = _wrong_intrinsics(cameras, whole)

    # Poses: written in another convention.
    for words, poses in _other_conventions(cameras, convention):
        kind = words if words == "R transposed" else "another convention"
        made.append(Mistake(kind, words, _with_poses(cameras, poses, convention)))

    # Mirrored axes, of the translation or of the camera.
    for words, change in _changes():
        moved = right.copy()
        moved[:, :3, 3] = right[:, :3, 3] @ change.T
        found = _with_poses(cameras, moved, convention)
        made.append(Mistake("the translation mirrored", f"the translation with {words}", found))
        P = torch.from_numpy(change.T)
        found = replace(cameras, R=cameras.R @ P, T=cameras.T @ P)
        made.append(Mistake("the camera mirrored", f"the camera's axes with {words}", found))
    return made


def _wrong_intrinsics(cameras: Cameras, whole: bool) -> list[Mistake]:
    """A wrong focal length, one side's unit for the other, pixels of another picture."""
    made = []
    for factor in (4, 2, 1.25, 1 / 1.25, 1 / 2, 1 / 4):
        words = f"the focal length times {factor:.3g}"
        made.append(Mistake(words, words, replace(cameras, focal=cameras.focal * factor)))

    # The sides of the picture exchanged.
    for axis, label in enumerate("xy"):
        for ratio in (4 / 3, 16 / 9, 3 / 4, 9 / 16):
            factors = torch.ones(2)
            factors[axis] = ratio
            words = f"the focal length in {label} times {ratio:.3g}"
            found = replace(cameras, focal=cameras.focal * factors)
            made.append(Mistake("one side's unit for the other", words, found))

    # All pixels are others in another copy of the picture.
    for factor in (4, 2, 1 / 2, 1 / 4) if whole else ():
        words = f"the intrinsics those of a picture {factor:.3g} times as large"
        principal = 1 - factor * (1 - cameras.principal)
        found = replace(cameras, focal=cameras.focal * factor, principal=principal)
        made.append(Mistake("a picture of another size", words, found))
    return made


def _with_poses(cameras: Cameras, poses: np.ndarray, convention: Convention) -> Cameras:
    """The cameras with the poses (V, 4, 4) of a file that is read in a convention."""
    R, T = world_to_view(torch.from_numpy(poses), convention)
    return replace(cameras, R=R, T=T)


def written(cameras: Cameras, convention: Convention) -> np.ndarray:
    """Poses (V, 4, 4) as a file in a convention has them."""
    flip = torch.tensor(convention.flip)
    poses = np.tile(np.eye(4), (len(cameras), 1, 1))
    poses[:, :3, :3] = (cameras.R * flip).transpose(1, 2).numpy()
    poses[:, :3, 3] = (cameras.T * flip).numpy()
    return np.linalg.inv(poses) if convention.camera_to_world else poses


def _other_conventions(cameras: Cameras, convention: Convention) -> list[tuple[str, np.ndarray]]:
    """The cameras, written in every convention but the one in which they will be read."""
    own = {flip: name for name, flip in FLIPS.items()}[convention.flip]
    made = []
    for other_way in (False, True):
        for transposed in (False, True):
            for axes, flip in FLIPS.items():
                # As somebody writes it who does not know better.
                poses = written(cameras, Convention(flip, convention.camera_to_world != other_way))
                if transposed:
                    poses[:, :3, :3] = poses[:, :3, :3].transpose(0, 2, 1).copy()

                # What it is called; nothing where it is the convention itself.
                words = []
                if transposed:
                    words.append("R transposed")
                if other_way:
                    words.append("camera-to-world and world-to-camera exchanged")
                if axes != own:
                    words.append(f"{axes}'s axes for {own}'s")
                if words:
                    made.append((" and ".join(words), poses))
    return made


def _changes() -> list[tuple[str, np.ndarray]]:
    """One axis negated, or two exchanged: for column vectors."""
    changes = [(f"{axis} negated", change) for axis, change in NEGATED.items()]
    changes.append(("y and z exchanged", EXCHANGED))
    changes.append(("y and z exchanged and y negated", NEGATED["y"] @ EXCHANGED))
    changes.append(("y and z exchanged and z negated", NEGATED["z"] @ EXCHANGED))
    return changes


def outcome(found: examine.Findings, words: str) -> str:
    """The column of the table for what was found about a mistake."""
    # Named: a factor of the focal length is right within a sixth of it.
    focal = words.startswith(examine.FOCAL)
    if found.mistake is not None:
        near = focal and found.mistake.startswith(examine.FOCAL)
        if near and abs(math.log(_number(found.mistake) / _number(words))) < math.log(7 / 6):
            return "named"
        return "named" if found.mistake == words else "wrongly named"

    # Not named, but seen that something is wrong; or it is said that the masks cannot tell; or neither.
    if not found.fits:
        return "seen, not named"
    inside = focal and found.focal[0] / 1.06 < 1 / _number(words) < found.focal[1] * 1.06
    return "cannot tell" if inside or not found.can_tell else "missed"


def _number(words: str) -> float:
    return float(words.split()[-1])


def photographs(root: Path, frames: range) -> Scene:
    """Training photographs of a folder of NeRF-synthetic."""
    return load_pictures(read_capture(root).at(list(frames)), SIZE)


def outcomes(scene: Scene, convention: Convention, whole: bool, args: argparse.Namespace) -> dict:
    """Outcomes for random subsets: (kind, number of photographs) -> how often each."""
    rows = defaultdict(Counter)
    for count in args.counts:
        rng = random.Random(args.seed)
        for _ in range(args.subsets):
            # The right cameras first: for them "named" means that nothing is.
            few = scene[sorted(rng.sample(range(len(scene)), count))]
            right = examine.examine(few, convention, whole)
            rows["none", count]["wrongly named" if right.mistake else "named"] += 1

            # Then every mistake; a line for each that has no name.
            for mistake in mistakes(few, convention, whole):
                found = examine.examine(replace(few, cameras=mistake.cameras), convention, whole)
                result = outcome(found, mistake.words)
                rows[mistake.kind, count][result] += 1
                rows["all mistakes", count][result] += 1
                if result != "named":
                    print(f"# {count}: {mistake.words}: {result} ({found.mistake or '; '.join(found.alike)}); "
                          f"misfit {found.given.total():.4f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--category", help="of a CO3D tree; without it the folder is one of NeRF-synthetic")
    parser.add_argument("--subsets", type=int, default=3, help="random subsets of each number of photographs")
    parser.add_argument("--frames", type=int, nargs=2, default=(50, 100), metavar=("FIRST", "LAST"),
                        help="of NeRF-synthetic (default: 50 100, on which nothing was tuned)")
    parser.add_argument("--counts", type=int, nargs="+", default=PHOTOGRAPHS, help="numbers of photographs")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)

    # All photographs.
    if args.category:
        sequence = sequences(args.root, args.category)[0]
        scene = load_sequence(args.root, args.category, sequence, SIZE)
        rows = outcomes(scene, examine.CO3D, False, args)
    else:
        scene = photographs(args.root, range(*args.frames))
        rows = outcomes(scene, CONVENTIONS["opengl"], True, args)
    print_table(rows, args.counts)


def print_table(rows: dict, counts: list[int]) -> None:
    """A row a kind of mistake, a column a number of photographs."""
    # The head.
    print(f"Cells: {' / '.join(COLUMNS)}")
    print("| mistake | " + " | ".join(f"{count} photographs" for count in counts) + " |")
    print("|---|" + "---|" * len(counts))

    # The rows, in the order in which they came up.
    for kind in dict.fromkeys(kind for kind, _ in rows):
        cells = []
        for count in counts:
            cells.append(" / ".join(str(rows[kind, count][column]) for column in COLUMNS))
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
