"""A CO3Dv2 tree of synthetic objects, drawn by several processes: what `toys.py` and `things.py` share.

An instance depends on (seed, index) only, not on how many are made; the same seed on the same device gives the same
bytes. The tree mimics what CO3D has (Sec. 4 of the paper): rectangular pictures, portrait and landscape, and both
intrinsics formats.

Shapes: `V` views, `H W` rows and columns.
"""
from __future__ import annotations

import argparse
import gzip
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cameras import Cameras
from common import cli
from common.files import write_atomically
from common.processes import map_processes
from common.progress import Progress

LONG_SIDE, SHORT_SIDE = 192, 144  # pixels; the crop of an object (its mask's box grown by 30 %) is then about 128
MOST_WORKERS = {"cpu": 16, "cuda": 8}  # processes; on a GPU one draws 40 toys a second and needs seconds to begin
OBJECTS_A_WORKER = 16             # for fewer it is not worth to start another process
OBJECTS_A_SEED = 100_000          # seeds are so far apart, so no two of them share an object
LAST_SEED = 40_000                # torch's generator takes numbers of 32 bits


class Photographs(NamedTuple):
    """One object as it was photographed."""
    cameras: Cameras     # (V), isotropic NDC: half the shorter side is 1
    pixels: np.ndarray   # (V, H, W, 4) uint8: colors and mask
    qualities: list[int]  # of the V JPEGs, to 100
    attributes: list[float] | None  # what a network can learn to tell from the pictures, each in [0, 1]


def generator_of(seed: int, index: int) -> torch.Generator:
    """The source of every random number of one object, its cameras included."""
    return torch.Generator().manual_seed(seed * OBJECTS_A_SEED + index)


def to_bytes(color: Tensor, mask: Tensor) -> np.ndarray:
    """Colors (V, 3, H, W) and masks (V, 1, H, W) in [0, 1] as `Photographs.pixels`."""
    pixels = (torch.cat([color, mask], 1) * 255).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------- one sequence

def _make_and_write(root: Path, noun: str, draw: Callable, seed: int, views: int,
                    index: int) -> tuple[dict, list[dict]]:
    """Draw object number `index` and write its pictures; returns the annotations of the sequence and of its frames."""
    # Portrait and landscape take turns.
    height, width = (LONG_SIDE, SHORT_SIDE) if index % 2 == 0 else (SHORT_SIDE, LONG_SIDE)
    drawn = draw(generator_of(seed, index), views, height, width)
    masses = (drawn.pixels[..., 3] / 255).sum((1, 2)).tolist()

    # Every fourth sequence has its intrinsics in the other format.
    folder = f"{noun}s/{noun}_{seed}_{index:05d}"
    per_side = index % 4 == 3
    frames = []
    for i in range(views):
        frames.append(_frame(folder, i + 1, drawn.cameras[i], (height, width), masses[i], per_side))
    _write_pictures(root, frames, drawn)

    # What CO3D says besides stays empty.
    annotation = {
        "sequence_name": frames[0]["sequence_name"],
        "category": f"{noun}s",
        "video": None,
        "point_cloud": None,
        "viewpoint_quality_score": None,
        "attributes": drawn.attributes,
    }
    return annotation, frames


def _frame(folder: str, number: int, camera: Cameras, size: tuple[int, int], mass: float, per_side: bool) -> dict:
    """The annotation of one frame: height and width, the sum of its mask, its camera.

    Intrinsics are in units of half of each side (`per_side`), or of half the shorter one.
    """
    # The camera has units of half the shorter side.
    height, width = size
    unit = np.ones(2)
    if per_side:
        unit = np.array([width, height]) / min(height, width)
    focal = camera.focal.double().numpy() / unit
    principal = camera.principal.double().numpy() / unit
    viewpoint = {
        "R": camera.R.tolist(),
        "T": camera.T.tolist(),
        "focal_length": focal.tolist(),
        "principal_point": principal.tolist(),
        "intrinsics_format": "ndc_norm_image_bounds" if per_side else "ndc_isotropic",
    }

    # Paths are relative to the root.
    image = {"path": f"{folder}/images/frame{number:06d}.jpg", "size": [height, width]}
    mask = {"path": f"{folder}/masks/frame{number:06d}.png", "mass": mass}
    meta = {"frame_type": "test_known", "frame_splits": ["fewview_dev"], "eval_batch_maps": []}
    return {
        "sequence_name": Path(folder).name,
        "frame_number": number,
        "frame_timestamp": number / 10,
        "image": image,
        "depth": None,
        "mask": mask,
        "viewpoint": viewpoint,
        "meta": meta,
    }


def _write_pictures(root: Path, frames: list[dict], drawn: Photographs):
    """A JPEG of the colors and a PNG of the mask of every frame."""
    for kind in ("image", "mask"):
        folder = (root / frames[0][kind]["path"]).parent
        folder.mkdir(parents=True, exist_ok=True)

    for frame, picture, quality in zip(frames, drawn.pixels, drawn.qualities):
        color = Image.fromarray(np.ascontiguousarray(picture[..., :3]))
        mask = Image.fromarray(np.ascontiguousarray(picture[..., 3]))
        color.save(root / frame["image"]["path"], quality=quality, subsampling=0)
        mask.save(root / frame["mask"]["path"], compress_level=6)


# ---------------------------------------------------------------------------------------------- the tree

def write_tree(root: Path, noun: str, draw: Callable, device, instances: int, seed: int, views: int):
    """Draw `instances` objects and write `<root>/<noun>s`.

    `draw(device, generator, views, height, width)` gives the `Photographs` of the next object of a generator.
    """
    # Processes take turns on a GPU: one would leave it idle while Python launches kernels or pictures are encoded.
    make = partial(_make_and_write, root, noun, partial(draw, device), seed, views)
    workers = min(os.cpu_count() or 1, MOST_WORKERS[torch.device(device).type], math.ceil(instances / OBJECTS_A_WORKER))
    frames = []
    sequences = []
    for annotation, of_sequence in Progress(map_processes(make, range(instances), workers), f"synthetic {noun}s",
                                            total=instances):
        sequences.append(annotation)
        frames += of_sequence

    # The annotations come last: before them, the tree does not exist for a reader.
    folder = root / f"{noun}s"
    listed = [[frame["sequence_name"], frame["frame_number"], frame["image"]["path"]] for frame in frames]
    set_lists = folder / "set_lists"
    _write_json({"train": listed, "val": [], "test": listed}, set_lists / "set_lists_fewview_dev.json")
    _write_json({"train": listed, "val": [], "test": []}, set_lists / "set_lists_fewview_train.json")
    _write_json(sequences, folder / "sequence_annotations.jgz")
    _write_json(frames, folder / "frame_annotations.jgz")


def _write_json(data, path: Path):
    """JSON on one line, as CO3D has it; gzipped, without the time, if the name ends in `.jgz`."""
    raw = json.dumps(data).encode()
    if path.suffix == ".jgz":
        raw = gzip.compress(raw, 6, mtime=0)
    with write_atomically(path) as temporary:
        temporary.write_bytes(raw)


# ---------------------------------------------------------------------------------------------- the commands

def parser(description: str, noun: str, seeds: str) -> argparse.ArgumentParser:
    """The command line of a generator; `seeds` says which are taken."""
    p = cli.Parser(description)
    p.add_argument("--root", type=Path, required=True, metavar="DIR",
                   help=f"folder for the tree; the {noun}s go to DIR/{noun}s")
    p.add_argument("--instances", type=cli.count, required=True, metavar="N", help=f"number of {noun}s")
    p.add_argument("--seed", type=_seed, required=True, metavar="N", help=seeds)
    p.add_argument("--views", type=cli.count, default=16, metavar="N", help=f"photographs per {noun} (default: 16)")
    cli.add_device(p)
    return p


def command(noun: str, draw: Callable, args: argparse.Namespace):
    """Draw the objects that the arguments ask for and write them. Raises `ValueError` where it cannot be."""
    if args.instances > OBJECTS_A_SEED:
        raise ValueError(f"--instances {args.instances}: a seed has at most {OBJECTS_A_SEED} {noun}s")
    try:
        write_tree(args.root, noun, draw, args.device, args.instances, args.seed, args.views)
    except OSError as e:
        raise ValueError(f"--root {args.root} cannot be written: {e}") from None


def _seed(text: str) -> int:
    """A seed from the command line."""
    if not text.isdecimal() or int(text) > LAST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {LAST_SEED}")
    return int(text)
