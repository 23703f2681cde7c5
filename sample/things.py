"""Synthetic *things*, written to disk as a CO3Dv2 tree, to train a prior for any object. None of it is a photograph.

    python sample/things.py --root things --instances 10000 --seed 1
    python sample/things.py --root unseen --instances 24 --seed 2000

A thing is fruit, a vessel, furniture, or one to a dozen parts of any kind on one another: solids of revolution,
rounded boxes, super-ellipsoids, capsules, rings, rods and plates, perhaps rippled or with a part cut out. Procedural
shapes with random materials train reconstruction nearly as well as scanned objects [LRM-Zero, arXiv 2406.09371].

The photographs are like hand-held ones, with highlights that move with the camera; slight blur, noise, JPEG. Masks are
exact and exposures alike, for the truth must be fair: training roughens what it is shown (`training/roughness.py`).
The names in a tree, `things` and `thing_...`, say that it is drawn.

Seeds: 1-99 training, 1000 shipped, 2000 reported, 3000 tuning.

The files beside this one: `thing_design.py`, what the dice decide; `thing_shapes.py`, what a thing is;
`thing_render.py` and `tracing.py`, how it is drawn; `tree.py`, how it is written.

Shapes: `V` views, `H W` rows and columns.
"""
from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, the modules lie one folder up
from cameras import Cameras, look_at, pixel_grid  # noqa: E402
from common import cli  # noqa: E402
from sample import tree  # noqa: E402
from sample.thing_design import GAMMA, make_thing  # noqa: E402
from sample.thing_render import Thing, render  # noqa: E402
from sample.toy_design import Dice  # noqa: E402
from sample.tree import Photographs  # noqa: E402

ELEVATIONS = (-15.0, 65.0)  # degrees
DISTANCES = (2.5, 12.0)     # radii of the ball around a thing
ROLL = 10.0                 # degrees, most
KERNEL = 9                  # pixels: the widest blur


# ---------------------------------------------------------------------------------------------- cameras

def hand_held(thing: Thing, generator: torch.Generator, views: int) -> Cameras:
    """Cameras (V) that go round a thing, all of it in their pictures: ELEVATIONS, DISTANCES, ROLL."""
    dice = Dice(generator)
    radius = thing.radius
    middle = thing.middle.cpu()

    # Where they stand: on an arc of 60 degrees to a full circle.
    arc = math.radians(dice.uniform(60, 360))
    azimuth = dice.uniform(0, 2 * math.pi) + arc * (torch.arange(views) + _jitter(dice, 0.4, views)) / views
    degrees = 20 + 18 * torch.randn(1, generator=generator) + 7 * torch.randn(views, generator=generator)
    elevation = torch.deg2rad(degrees.clamp(*ELEVATIONS))
    typical = math.exp(dice.uniform(*map(math.log, DISTANCES)))
    distance = (typical * (1 + _jitter(dice, 0.15, views))).clamp(*DISTANCES) * radius
    level = elevation.cos()
    way = torch.stack([level * azimuth.cos(), elevation.sin(), level * azimuth.sin()], -1)

    # They look at its middle and are held nearly upright.
    up = torch.tensor([0.0, 1, 0]).expand(views, -1)
    R, T = look_at(middle + distance[:, None] * way, middle.expand(views, -1), up)
    roll = torch.deg2rad(_jitter(dice, ROLL, views))
    turn = torch.zeros(views, 3, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = roll.cos()
    turn[:, 0, 1] = roll.sin()
    turn[:, 1, 0] = -roll.sin()
    turn[:, 2, 2] = 1
    R = R @ turn
    T = (T[:, None] @ turn)[:, 0]

    # The ball takes this part of the shorter side, and is anywhere within it.
    framing = (dice.uniform(0.65, 0.95) * (1 + _jitter(dice, 0.1, views))).clamp_max(0.97)
    focal = framing * (distance ** 2 - radius ** 2).sqrt() / radius
    principal = _jitter(dice, 1.0, views, 2) * 0.9 * (1 - framing)[:, None]
    return Cameras(R, T, focal[:, None].expand(-1, 2).contiguous(), principal)


def _jitter(dice: Dice, amount: float, *shape: int) -> Tensor:
    """Numbers of a shape between -amount and amount."""
    return (2 * torch.rand(shape, generator=dice.generator) - 1) * amount


# ---------------------------------------------------------------------------------------------- photographs

def draw(device, generator: torch.Generator, views: int, height: int, width: int) -> Photographs:
    """The next thing of a generator in its surroundings: `views` photographs of `height` x `width` pixels."""
    thing = make_thing(generator, device)
    cameras = hand_held(thing, generator, views)
    color, mask = render(thing, cameras, height, width)
    color = color + (1 - mask) * _surroundings(cameras, generator, height, width).to(device)

    # What a camera does: blur, gamma, noise.
    blur = 0.4 * torch.rand(views, generator=generator)
    grain = 0.005 * torch.rand(views, 1, 1, 1, generator=generator)
    color = _blurred(color, blur).clamp(0, 1) ** (1 / GAMMA)
    noise = torch.randn(views, 3, height, width, generator=generator)
    color = (color + (grain * noise).to(device)).clamp(0, 1)
    qualities = torch.randint(90, 96, (views,), generator=generator).tolist()
    return Photographs(cameras, tree.to_bytes(color, mask), qualities, None)


def _surroundings(cameras: Cameras, generator: torch.Generator, height: int, width: int) -> Tensor:
    """What is far away behind a thing, linear: (V, 3, H, W). Blurred shapes that move with the camera."""
    # A coarse grid of directions; the picture is enlarged.
    grid = pixel_grid(24, 24).expand(len(cameras), -1, -1)
    directions = F.normalize(cameras.rays(grid)[1], dim=-1)
    waves = torch.randn(3, 12, generator=generator) * 4
    phases = 7 * torch.rand(12, generator=generator)
    mix = torch.randn(12, 3, generator=generator) * 0.05 + torch.randn(12, 1, generator=generator) * 0.2
    level = torch.rand(3, generator=generator) * 0.1 + torch.rand(1, generator=generator) * 0.5 + 0.03
    color = level * torch.exp(torch.cos(directions @ waves + phases) @ mix)
    color = color.view(len(cameras), 24, 24, 3).permute(0, 3, 1, 2)
    return F.interpolate(color, (height, width), mode="bicubic").clamp(0, 1)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Images (V, C, H, W), each blurred by a Gaussian of its own width, (V,) pixels."""
    views, channels, height, width = images.shape
    offset = torch.arange(KERNEL) - KERNEL // 2
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0).to(images.device)
    x = images.reshape(1, -1, height, width)
    x = F.pad(x, [KERNEL // 2] * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, None, None], groups=len(kernel))
    x = F.conv2d(x, kernel[:, None, :, None], groups=len(kernel))
    return x.view(views, channels, height, width)


# ---------------------------------------------------------------------------------------------- the command

def parser() -> argparse.ArgumentParser:
    """The command line."""
    return tree.parser(__doc__, "thing", "1-99 training, 1000 shipped, 2000 reported, 3000 tuning")


def command(args: argparse.Namespace):
    """Make the things and write them."""
    tree.command("thing", draw, args)


def main(argv: list[str] | None = None):
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
