"""Do these photographs, masks and cameras fit together? And if they do not, which mistake is it likely to be?

    python check.py DIR                              own photographs (docs/photographs.md says how DIR looks)
    python check.py DIR --category C --sequence S    a sequence of a CO3D tree

`photographs/examine.py` judges, `photographs/figure.py` draws.
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import sparsefusion
from cameras import Scene, evenly_spaced
from common import cli, files
from common.progress import duration
from datasets import co3d
from evaluation.instance import Instance
from evaluation.sources import ENOUGH, HELD_OUT, OwnPhotographs
from photographs.capture import load_pictures
from photographs.examine import CO3D, MOST, SIZE, examine
from photographs.figure import draw
from photographs.reading import CONVENTIONS, Convention, Photographs, read_capture
from presets import PRESETS

DECODED_BYTES = 80    # of a pixel of a photograph while it is decoded, resized and cut
WORKING_BYTES = 0.8e9  # of torch, networks and a field


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder of photographs, or with --category the root of a CO3D tree")
    parser.add_argument("--category", help="of a CO3D tree")
    parser.add_argument("--sequence", help="of the category (default: its first)")
    parser.add_argument("--frames", type=cli.words, metavar="A,B,...", help="these only: file names or frame numbers")
    parser.add_argument("--views", type=cli.views, default=0, help="so many, evenly spaced (default: 0, all)")
    parser.add_argument("--out", type=Path, default=Path("check.png"), help="the picture (default: check.png)")
    cli.run(_command, parser.parse_args(argv))


def _command(args: argparse.Namespace) -> None:
    """Read, examine, print, draw."""
    # What is there.
    material = _co3d(args) if args.category else _capture(args)
    print(material.source)

    # Does it fit?
    found = examine(material.scene, material.convention, material.whole)
    for line in found.lines:
        print(line)

    # For the eye.
    with files.write_atomically(args.out) as temporary:
        draw(found.scene).save(temporary)
    print(f"picture: {args.out}")
    if found.mistake:
        sys.exit(1)
    if not args.category:
        print(_forecast(read_capture(args.folder)))


class Material(NamedTuple):
    """What is to be examined."""
    scene: Scene
    convention: Convention
    whole: bool
    source: str  # one line: what was read


def _capture(args: argparse.Namespace) -> Material:
    """Own photographs, in the world of their files."""
    photographs = read_capture(args.folder)
    names = [shot.name for shot in photographs.shots]
    chosen = [names.index(name) for name in _chosen(names, args)]

    # Those photographs only.
    shots = [photographs.shots[i] for i in chosen]
    few = replace(photographs, shots=shots, inputs=None, targets=None)
    return Material(load_pictures(few, SIZE), CONVENTIONS[photographs.axes], True, photographs.source)


def _forecast(photographs: Photographs) -> str:
    """One line: what `distill.py` does with them by default, and about how long and with how much memory."""
    source = OwnPhotographs(photographs)
    inputs = source.default_inputs(None)
    alone = len(inputs) >= ENOUGH
    config = PRESETS["plain" if alone else "nano"]
    weights = None if alone else sparsefusion.SHIPPED
    names = tuple(source.names[i] for i in inputs)
    instance = Instance(source, config, weights, 0, names, HELD_OUT, 0, Path(), None, "cpu")
    seconds = instance.expected_seconds()

    # Torch and what it works with, every photograph in both of its squares, and the largest one while it is decoded.
    kept = len(source.names) * 2 * 5 * 4 * config.image_size**2
    decoded = max(shot.lens.width * shot.lens.height for shot in photographs.shots) * DECODED_BYTES
    memory = (WORKING_BYTES + 2 * kept + decoded) / 1e9
    way = "without a prior" if alone else "with the shipped prior"
    return (f"distill.py --capture {photographs.folder}: {len(inputs)} inputs {way}, about {duration(seconds)} on two "
            f"CPU cores, {memory:.1f} GB")


def _co3d(args: argparse.Namespace) -> Material:
    """A sequence of a CO3D tree."""
    folder = args.folder
    category = args.category
    sequence = args.sequence or co3d.sequences(folder, category)[0]

    # Its frames, or those asked for.
    names = [str(number) for number in co3d.frame_numbers(folder, category, sequence)]
    frames = [int(name) for name in _chosen(names, args)]
    scene = co3d.load_sequence(folder, category, sequence, SIZE, frames)
    return Material(scene, CO3D, False, f"{folder}/{category}: sequence {sequence}, {len(names)} frames")


def _chosen(names: list[str], args: argparse.Namespace) -> list[str]:
    """Which of the photographs to check, at most as many as are compared."""
    # Those asked for.
    chosen = list(args.frames or names)
    for name in chosen:
        if name not in names:
            raise ValueError(f"--frames {name}: no such photograph; there is {', '.join(names[:5])}, ...")

    # An even choice of them.
    positions = evenly_spaced(len(chosen), min(args.views or MOST, MOST))
    return [chosen[i] for i in positions]


if __name__ == "__main__":
    main()
