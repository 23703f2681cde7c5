"""The sample category: synthetic toys, written to disk as a CO3Dv2 tree. Nothing in it is a photograph of anything.

    python sample/toys.py --root toys --instances 4 --seed 4000
    python sample/toys.py --root many --instances 3000 --seed 1 --views 16

Each toy is an animal or robot of about 20 signed-distance primitives with random proportions and colors, painted with
stripes or spots, a face and a badge in front. Its back carries a backpack, a tail, a shell, a wind-up key or only an
emblem.

The tree (`tree.py`) mimics what CO3D has (Sec. 4 of the paper): rectangular off-center pictures before a backdrop, soft
masks, turntable cameras with jitter, and CO3D's scale (the toy fits the field's cube [-4, 4]^3, the cameras are about
10 units away).

Seeds: 1-99 train the nano models, 1000 is the shipped `sample/co3d`, 2000 and 5000 are the reported evaluations, 3000
is tuning.

The files beside this one: `toy_shapes.py`, what a toy is; `toy_design.py`, what the dice decide; `toy_parts.py`, how a
toy is built; `toy_render.py` and `tracing.py`, how it is drawn.

Shapes: `V` views, `H W` rows and columns.
"""
from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, the modules lie one folder up
from cameras import Cameras, look_at  # noqa: E402
from common import cli  # noqa: E402
from common.machine import rand  # noqa: E402
from sample import tree  # noqa: E402
from sample.toy_design import Design, Dice, random_place  # noqa: E402
from sample.toy_parts import add_back, add_body, add_clothes, add_head  # noqa: E402
from sample.toy_render import render  # noqa: E402
from sample.toy_shapes import Figure, Toy  # noqa: E402
from sample.tree import Photographs, generator_of  # noqa: E402

JPEG_QUALITY = 94


# ---------------------------------------------------------------------------------------------- toys

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
    return [make_toy(generator_of(seed, index), device) for index in range(count)]


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

def draw(device, generator: torch.Generator, views: int, height: int, width: int) -> Photographs:
    """The next toy of a generator before its backdrop: `views` pictures of `height` x `width` pixels."""
    toy = make_toy(generator, device)
    cameras = turntable(generator, views)
    color, mask = render(toy, cameras, height, width)

    # The backdrop fades from its upper color to its lower one.
    top, bottom = toy.backdrop[:, :, None, None]                         # (3, 1, 1) each
    down = torch.linspace(0, 1, height, device=mask.device)[:, None]
    backdrop = torch.lerp(top, bottom, down)                             # (3, H, 1)

    color = color + (1 - mask) * backdrop
    return Photographs(cameras, tree.to_bytes(color, mask), [JPEG_QUALITY] * views, toy.attributes)


# ---------------------------------------------------------------------------------------------- the command

def parser() -> argparse.ArgumentParser:
    """The command line."""
    return tree.parser(__doc__, "toy", "1-99 training, 1000 shipped, 2000 reported, 3000 tuning")


def command(args: argparse.Namespace):
    """Make the toys and write them."""
    tree.command("toy", draw, args)


def main(argv: list[str] | None = None):
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
