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

from cameras import Scene, evenly_spaced
from common import cli, files
from datasets import co3d
from photographs.capture import load_pictures
from photographs.examine import CO3D, MOST, SIZE, examine
from photographs.figure import draw
from photographs.reading import CONVENTIONS, Convention, read_capture


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
