"""Photographs of a toy rocket as a folder of one's own: no toy that the prior has seen, to try `--capture` with.

    python sample/rocket.py rocket
    python sample/rocket.py small --views 12 --size 128

Writes `images/`, whose alpha channels are the masks, and `transforms.json`. Then `python check.py rocket` and `python
distill.py --capture rocket`. The rocket is made and drawn as the toys are (`toy_shapes.py`,
`toy_render.py`).

Shapes: `V` views.
"""
from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, the modules lie one folder up
from cameras import Cameras  # noqa: E402
from common import cli  # noqa: E402
from common.files import save_json  # noqa: E402
from sample.toy_design import Dice, random_place  # noqa: E402
from sample.toy_render import render  # noqa: E402
from sample.toy_shapes import Figure, Toy, upright_axes  # noqa: E402
from sample.toys import turntable  # noqa: E402
from sample.tree import generator_of  # noqa: E402

SEED = 3999  # of place, light and cameras; `toys.py` says which seeds are taken
WHITE = np.array([0.93, 0.92, 0.88])
RED = np.array([0.85, 0.16, 0.13])
NAVY = np.array([0.12, 0.19, 0.42])
SKY = np.array([0.45, 0.75, 0.92])
GOLD = np.array([0.96, 0.72, 0.18])


def make_rocket(generator: torch.Generator) -> Toy:
    """A white rocket with a red nose, three fins, a porthole and a golden nozzle, in a place by the generator."""
    # From below to above.
    figure = Figure()
    figure.add("nozzle", (0, -2.3, 0), (0.45, 0.3, 0.45), GOLD, hard=True)
    figure.add("body", (0, 0, 0), (0.95, 2.3, 0.95), WHITE, hard=True)
    figure.add("nose", (0, 1.75, 0), (0.62, 0.95, 0.62), RED, hard=True)
    for i in range(3):
        out = np.array([math.sin(2 * math.pi * i / 3), 0, math.cos(2 * math.pi * i / 3)])
        axes = upright_axes((0, 1, 0), out)
        figure.add(f"fin {i}", 1.0 * out + [0, -1.6, 0], (0.09, 0.35, 0.3), RED, (0.03, 0.45, 0.25), axes, hard=True)

    # A porthole in front, a star behind, a belt all round.
    figure.paint("disc", "body", (0, 0.75, 0), 0.5, NAVY)
    figure.paint("disc", "body", (0, 0.75, 0), 0.36, SKY)
    figure.paint("star", "body", (0, 0.6, 0), 0.5, GOLD, front=(0, 0, -1))
    figure.paint("square", "body", (0, -0.55, 0), (2.0, 0.16, 2.0), NAVY, through=True)
    place = random_place(*figure.bounds(), Dice(generator))
    return figure.finish(place, [], "cpu")


def camera_to_world(cameras: Cameras) -> np.ndarray:
    """Matrices (V, 4, 4) of `transforms.json`: OpenGL's axes, x to the right, y up, z backwards."""
    # Row vectors, x to the left, z forwards: the other way round.
    view = torch.eye(4).repeat(len(cameras), 1, 1)
    view[:, :3, :3] = cameras.R.transpose(1, 2)
    view[:, :3, 3] = cameras.T
    return torch.linalg.inv(torch.diag(torch.tensor([-1.0, 1, -1, 1])) @ view).numpy()


def write_rocket(folder: Path, views: int, size: int) -> None:
    """The capture: V photographs of size x size pixels with their cameras."""
    generator = generator_of(SEED, 0)
    rocket = make_rocket(generator)
    cameras = turntable(generator, views)
    color, mask = render(rocket, cameras, size, size)

    # Colors over black become colors with alpha.
    rgba = torch.cat([color / mask.clamp(min=1e-6), mask], 1).clamp(0, 1)
    pixels = (rgba * 255).round().byte().permute(0, 2, 3, 1).numpy()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    frames = []
    for i, matrix in enumerate(camera_to_world(cameras)):
        name = f"images/{i:02}.png"
        Image.fromarray(pixels[i]).save(folder / name)

        # NDC is left and up from the middle, in halves of a side; pixels are right and down from a corner.
        half = size / 2
        fx, fy = (cameras.focal[i] * half).tolist()
        cx, cy = ((1 - cameras.principal[i]) * half).tolist()
        lens = {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": size, "h": size}
        frames.append({"file_path": name, "transform_matrix": matrix.tolist()} | lens)
    save_json({"frames": frames}, folder / "transforms.json")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__)
    p.add_argument("folder", type=Path, metavar="DIR", help="folder to write")
    p.add_argument("--views", type=cli.whole_number(2, 99), default=24, metavar="N", help="photographs (default: 24)")
    p.add_argument("--size", type=cli.whole_number(1, 4096), default=256, metavar="N",
                   help="pixels a side, a multiple of 4 (default: 256)")
    return p


def command(args: argparse.Namespace) -> None:
    """Draw and write."""
    if args.size % 4:
        raise ValueError(f"--size {args.size}: not a multiple of 4")
    write_rocket(args.folder, args.views, args.size)
    print(f"{args.views} photographs in {args.folder}; next: python check.py {args.folder}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
