"""The sample category: synthetic toys, written to disk as a CO3Dv2 tree. Nothing in it is a photograph of anything.

    python sample/toys.py --root toys --instances 4 --seed 4000
    python sample/toys.py --root many --instances 3000 --seed 1 --views 16

Each toy is an animal or robot of about 20 signed-distance primitives with random proportions and colors, painted with
stripes or spots, a face and a badge in front. Its back carries a backpack, a tail, a shell, a wind-up key or only an
emblem.

The tree mimics what CO3D has (Sec. 4 of the paper): rectangular off-center pictures before a backdrop, soft masks,
turntable cameras with jitter, both intrinsics formats, and CO3D's scale (the toy fits the field's cube [-4, 4]^3, the
cameras are about 10 units away).

A toy depends on (seed, index) only, not on how many are made; the same seed on the same device gives the same bytes.
Seeds: 1-99 train the nano models, 1000 is the shipped `sample/co3d`, 2000 the reported evaluation, 3000 tuning.

The files beside this one: `toy_shapes.py`, what a toy is; `toy_design.py`, what the dice decide; `toy_parts.py`, how a
toy is built; `toy_render.py`, how it is drawn.

Shapes: `V` views, `H W` rows and columns.
"""
from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, the modules lie one folder up
from cameras import Cameras, look_at  # noqa: E402
from common import cli  # noqa: E402
from common.files import write_atomically  # noqa: E402
from common.machine import rand  # noqa: E402
from common.processes import map_processes  # noqa: E402
from common.progress import Progress  # noqa: E402
from sample.toy_design import Design, Dice, random_place  # noqa: E402
from sample.toy_parts import add_back, add_body, add_clothes, add_head  # noqa: E402
from sample.toy_render import render  # noqa: E402
from sample.toy_shapes import Figure, Toy  # noqa: E402

CATEGORY = "toys"
LONG_SIDE, SHORT_SIDE = 192, 144  # pixels; the crop of a toy (its mask's box grown by 30 %) is then about 128
JPEG_QUALITY = 94
MOST_WORKERS = 16                 # processes
TOYS_A_WORKER = 16                # for fewer it is not worth to start another process
TOYS_A_SEED = 100_000             # seeds are so far apart, so no two of them share a toy
LAST_SEED = 40_000                # torch's generator takes numbers of 32 bits


# ---------------------------------------------------------------------------------------------- toys

def toy_generator(seed: int, index: int) -> torch.Generator:
    """The source of every random number of one toy, its cameras included."""
    return torch.Generator().manual_seed(seed * TOYS_A_SEED + index)


def make_toy(generator: torch.Generator, device="cpu") -> Toy:
    """A random toy; its numbers are the next ones of the generator, which lives on the CPU."""
    dice = Dice(generator)
    design = Design(dice)
    figure = Figure()
    hands = add_body(figure, design, dice)
    add_head(figure, design, dice)
    add_clothes(figure, design, dice, hands)
    add_back(figure, design, dice)

    # Where it stands depends on how large it became.
    low, high = figure.bounds()
    place = random_place(low, high, dice)
    return figure.finish(place, design.attributes(), device)


def make_toys(count: int, seed: int, device="cpu") -> list[Toy]:
    """The first `count` toys of a seed."""
    return [make_toy(toy_generator(seed, index), device) for index in range(count)]


# ---------------------------------------------------------------------------------------------- cameras

def turntable(generator: torch.Generator, views: int) -> Cameras:
    """Cameras (V) on a ring around the world's y axis, with jitter in everything; 8-35 degrees above the ground."""
    # Where they stand: angles in radians, the radius in CO3D units.
    first = _uniform(generator, 0, views)
    azimuth = (first + torch.arange(views) + _jitter(generator, 0.3, views)) * (2 * math.pi / views)
    degrees = _uniform(generator, 13, 30) + _jitter(generator, 5, views)
    elevation = torch.deg2rad(degrees)
    radius = _uniform(generator, 9.6, 10.6) + _jitter(generator, 0.4, views)
    x = elevation.cos() * azimuth.cos()
    z = elevation.cos() * azimuth.sin()
    center = torch.stack([x, elevation.sin(), z], -1) * radius[:, None]

    # They look nearly at the origin and are held nearly upright.
    aim = _jitter(generator, 0.3, views, 3)
    left = _jitter(generator, 0.04, views, 1)
    forward = _jitter(generator, 0.04, views, 1)
    up = torch.cat([left, torch.ones(views, 1), forward], -1)
    R, T = look_at(center, aim, up)

    # Intrinsics, NDC: the same lens for all views, nearly.
    focal = _uniform(generator, 2.8, 3.05) * (1 + _jitter(generator, 0.01, views, 1))
    focal = focal.expand(-1, 2).contiguous()
    principal = _jitter(generator, 0.04, views, 2)
    principal = principal + _jitter(generator, 0.06, 2)
    return Cameras(R, T, focal, principal)


def _uniform(generator: torch.Generator, low: float, high: float) -> Tensor:
    """One number between `low` and `high`."""
    return low + (high - low) * rand(generator=generator, device="cpu")


def _jitter(generator: torch.Generator, amount: float, *shape: int) -> Tensor:
    """Numbers of a shape between -amount and amount."""
    return (2 * rand(*shape, generator=generator, device="cpu") - 1) * amount


# ---------------------------------------------------------------------------------------------- photographs

def photograph(toy: Toy, cameras: Cameras, height: int, width: int) -> np.ndarray:
    """Pictures before the toy's backdrop, and masks in the fourth channel: (V, H, W, 4) uint8."""
    color, mask = render(toy, cameras, height, width)

    # The backdrop fades from its upper color to its lower one.
    top, bottom = toy.backdrop[:, :, None, None]                         # (3, 1, 1) each
    down = torch.linspace(0, 1, height, device=mask.device)[:, None]
    backdrop = torch.lerp(top, bottom, down)                             # (3, H, 1)

    color = color + (1 - mask) * backdrop
    pixels = (torch.cat([color, mask], 1) * 255).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def _write_pictures(root: Path, frames: list[dict], pixels: np.ndarray):
    """A JPEG of the colors and a PNG of the mask of every frame, from `pixels` (V, H, W, 4) uint8."""
    for kind in ("image", "mask"):
        folder = (root / frames[0][kind]["path"]).parent
        folder.mkdir(parents=True, exist_ok=True)

    for frame, picture in zip(frames, pixels):
        color = Image.fromarray(np.ascontiguousarray(picture[..., :3]))
        mask = Image.fromarray(np.ascontiguousarray(picture[..., 3]))
        color.save(root / frame["image"]["path"], quality=JPEG_QUALITY, subsampling=0)
        mask.save(root / frame["mask"]["path"], compress_level=6)


# ---------------------------------------------------------------------------------------------- the CO3Dv2 tree

class Sequence(NamedTuple):
    """One toy as the tree holds it."""
    annotation: dict    # of the sequence
    frames: list[dict]  # annotations of its V frames
    pixels: np.ndarray  # (V, H, W, 4) uint8: colors and mask


def make_sequence(seed: int, index: int, views: int, device) -> Sequence:
    """Toy number `index` of a seed and its photographs."""
    generator = toy_generator(seed, index)
    toy = make_toy(generator, device)
    cameras = turntable(generator, views)

    # Portrait and landscape take turns.
    height, width = (LONG_SIDE, SHORT_SIDE) if index % 2 == 0 else (SHORT_SIDE, LONG_SIDE)
    pixels = photograph(toy, cameras, height, width)
    masses = (pixels[..., 3] / 255).sum((1, 2)).tolist()

    # Every fourth sequence has its intrinsics in the other format.
    name = f"toy_{seed}_{index:05d}"
    per_side = index % 4 == 3
    frames = []
    for i in range(views):
        frames.append(_frame(name, i + 1, cameras[i], (height, width), masses[i], per_side))

    # What CO3D says besides stays empty.
    annotation = {
        "sequence_name": name,
        "category": CATEGORY,
        "video": None,
        "point_cloud": None,
        "viewpoint_quality_score": None,
        "attributes": toy.attributes,
    }
    return Sequence(annotation, frames, pixels)


def _frame(name: str, number: int, camera: Cameras, size: tuple[int, int], mass: float, per_side: bool) -> dict:
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
    folder = f"{CATEGORY}/{name}"
    image = {"path": f"{folder}/images/frame{number:06d}.jpg", "size": [height, width]}
    mask = {"path": f"{folder}/masks/frame{number:06d}.png", "mass": mass}
    meta = {"frame_type": "test_known", "frame_splits": ["fewview_dev"], "eval_batch_maps": []}
    return {
        "sequence_name": name,
        "frame_number": number,
        "frame_timestamp": number / 10,
        "image": image,
        "depth": None,
        "mask": mask,
        "viewpoint": viewpoint,
        "meta": meta,
    }


def _make_and_write(root: Path, seed: int, views: int, device, index: int) -> tuple[dict, list[dict]]:
    """Make toy number `index` and write its pictures; returns the annotations of the sequence and of its frames."""
    sequence = make_sequence(seed, index, views, device)
    _write_pictures(root, sequence.frames, sequence.pixels)
    return sequence.annotation, sequence.frames


def write_tree(root: Path, instances: int, seed: int, views: int, device):
    """Make `instances` toys and write `<root>/toys`."""
    # Processes take turns on a GPU: one would leave it idle while Python launches kernels or pictures are encoded.
    make = partial(_make_and_write, root, seed, views, device)
    workers = min(os.cpu_count() or 1, MOST_WORKERS, math.ceil(instances / TOYS_A_WORKER))
    frames = []
    sequences = []
    for annotation, of_sequence in Progress(map_processes(make, range(instances), workers), "synthetic toys",
                                            total=instances):
        sequences.append(annotation)
        frames += of_sequence

    # The annotations come last: before them, the tree does not exist for a reader.
    folder = root / CATEGORY
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


# ---------------------------------------------------------------------------------------------- the command

def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__)
    p.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder for the tree; the toys go to "
                   "DIR/toys")
    p.add_argument("--instances", type=cli.count, required=True, metavar="N", help="number of toys")
    p.add_argument("--seed", type=_seed, required=True, metavar="N",
                   help="1-99 training, 1000 shipped, 2000 reported, 3000 tuning")
    p.add_argument("--views", type=cli.count, default=16, metavar="N", help="photographs per toy (default: 16)")
    cli.add_device(p)
    return p


def command(args: argparse.Namespace):
    """Make the toys and write them."""
    if args.instances > TOYS_A_SEED:
        raise ValueError(f"--instances {args.instances}: a seed has at most {TOYS_A_SEED} toys")
    try:
        write_tree(args.root, args.instances, args.seed, args.views, args.device)
    except OSError as e:
        raise ValueError(f"--root {args.root} cannot be written: {e}") from None


def main(argv: list[str] | None = None):
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


def _seed(text: str) -> int:
    """A seed from the command line."""
    if not text.isdecimal() or int(text) > LAST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {LAST_SEED}")
    return int(text)


if __name__ == "__main__":
    main()
