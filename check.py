"""Do these photographs, masks and cameras fit together? And if they do not, which mistake is it likely to be?

    python check.py photographs                      # your own (docs/photographs.md says how the folder looks)
    python check.py sample/co3d --category toys --sequence toy_1000_00001

`photographs/examine.py` judges, `photographs/figure.py` draws.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import sparsefusion
from cameras import evenly_spaced
from common import cli, files
from common.progress import duration
from datasets import co3d
from datasets.protocol import CO3DSequence
from evaluation.instance import Instance
from evaluation.views import ENOUGH, HELD_OUT, Source, default_inputs, examine_views, find_views
from photographs.capture import Photographs
from photographs.examine import MOST
from photographs.figure import draw
from photographs.reading import read_capture
from presets import PRESETS

DECODED_BYTES = 80    # of a pixel of a photograph while it is decoded, resized and cut
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif")  # of a picture
WORKING_BYTES = 0.8e9  # of torch, networks and a field


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__)
    p.add_argument("folder", type=Path, help="a folder of photographs, or with --category the root of a CO3D tree")
    p.add_argument("--out", type=Path, default=Path("check.png"), metavar="F", help="the picture (default: check.png)")

    # Which of the photographs there.
    which = p.add_argument_group("which photographs")
    which.add_argument("--category", metavar="C", help="of a CO3D tree")
    which.add_argument("--sequence", metavar="S", help="of the category (default: its first)")
    which.add_argument("--frames", type=cli.words, metavar="A,B,...", help="these only: file names or frame numbers")
    which.add_argument("--views", type=cli.views, default=0, metavar="N",
                       help="so many, evenly spaced (default: 0, all)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(_command, parser().parse_args(argv))


def _command(args: argparse.Namespace) -> None:
    """Read, examine, print, draw."""
    if args.out.suffix.lower() not in ENDINGS:
        raise ValueError(f"--out {args.out}: its ending is none of {', '.join(ENDINGS)}")

    # An even choice of what is there, or of the names given.
    source = _find_source(args)
    files.require_writable(args.out)
    views = find_views(source, args.frames, "--frames") if args.frames else list(range(len(source.names)))
    chosen = evenly_spaced(len(views), min(args.views or MOST, MOST))

    # Does it fit?
    found = examine_views(source, [views[i] for i in chosen])
    print("\n".join(found.lines))

    # For the eye.
    with files.write_atomically(args.out) as temporary:
        draw(found.scene).save(temporary)
    print(f"picture: {args.out}")
    if found.mistake:
        sys.exit(1)
    if isinstance(source, Photographs):
        print(_forecast(source))


def _find_source(args: argparse.Namespace) -> Source:
    """Own photographs, or a sequence of a CO3D tree with all its frames; one line says what was read."""
    folder = args.folder
    if not args.category:
        photographs = read_capture(folder)
        print(photographs.source)
        return photographs

    sequence = args.sequence or co3d.sequences(folder, args.category)[0]
    frames = co3d.frame_numbers(folder, args.category, sequence)
    print(f"{folder}/{args.category}: sequence {sequence}, {len(frames)} frames")
    return CO3DSequence(folder, args.category, sequence, 0, tuple(frames))


def _forecast(photographs: Photographs) -> str:
    """One line: what `distill.py` does with them by default, and about how long and with how much memory."""
    inputs = default_inputs(photographs)
    alone = len(inputs) >= ENOUGH
    config = PRESETS["plain" if alone else "nano"].fitted(len(inputs))
    weights = None if alone else sparsefusion.THINGS
    instance = Instance(photographs, config, weights, 0, (), HELD_OUT, 0, Path(), None, "cpu")
    seconds = instance.expected_seconds()

    # Torch and what it works with, every photograph in both of its squares, and the largest one while it is decoded.
    kept = len(photographs.shots) * 2 * 5 * 4 * config.image_size**2
    decoded = max(shot.width * shot.height for shot in photographs.shots) * DECODED_BYTES
    memory = (WORKING_BYTES + 2 * kept + decoded) / 1e9
    way = "without a prior" if alone else "with the shipped prior"
    return (f"distill.py --capture {photographs.folder}: {len(inputs)} inputs {way}, about {duration(seconds)} on two "
            f"CPU cores, {memory:.1f} GB")


if __name__ == "__main__":
    main()
