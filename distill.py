"""From a few pictures to one neural field, and how good it is: the main command (Sec. 4).

    python distill.py                            # two views of a shipped synthetic toy, on a CPU in minutes
    python distill.py --sequence toy_1000_00003 --views 6
    python distill.py --root co3d --category apple --weights apple.pt
    python distill.py --capture photographs      # your own (docs/photographs.md)

The algorithm is in `distillation.py`, one scene from start to end in `reconstruction.py`, what is measured and written
in `evaluation/instance.py`. Here the flags choose what is done.
"""
from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import sparsefusion
from common import cli
from datasets.protocol import PROTOCOLS, CO3DSequence
from evaluation import results
from evaluation.instance import (ANYTHING, Instance, add_instance_flags, choose_weights, config_from_flags,
                                 instance_from_flags, note_new_categories, run_instance, trained_categories)
from evaluation.tables import table
from evaluation.views import ENOUGH, Source, check_inputs, default_inputs, find_views, random_views
from photographs.capture import Photographs
from photographs.reading import find_poses, read_capture

LISTED = 12  # input views that are named one by one


def find_source(args: argparse.Namespace) -> Source:
    """The folder of --capture, or the sequence of a CO3D tree."""
    if args.capture is None:
        return find_sequence(args)

    # One or the other.
    others = [flag for flag in ("--root", "--category", "--sequence", "--protocol") if flag in args.given]
    if others:
        raise ValueError(f"--capture: own photographs are no CO3D tree and have no {', '.join(others)}")
    photographs = read_capture(args.capture)
    print(f"{args.capture}: {photographs.source}")
    return photographs


def find_sequence(args: argparse.Namespace) -> CO3DSequence:
    """The sequence of --sequence, or the first, in the list of a category, where its place seeds it."""
    entries = PROTOCOLS[args.protocol](args.root, args.category)
    for entry in entries:
        if args.sequence in (None, entry.sequence):
            return entry
    names = ", ".join(entry.sequence for entry in entries[:5])
    raise ValueError(f"--sequence {args.sequence}: not in the list of --protocol {args.protocol}, which begins {names}"
                     "; --protocol all lists every sequence")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__, meant=capture_meant)
    given, how, measured = add_instance_flags(p, targets=8)

    # One source, and what is to be done with it.
    given.add_argument("--category", default="toys", metavar="C", help="category in the root folder (default: toys)")
    given.add_argument("--sequence", metavar="S", help="default: the first of the category's list")
    given.add_argument("--capture", type=Path, metavar="DIR", help="a folder of own photographs with masks and poses, "
                       "instead of --root, --category, --sequence")
    given.add_argument("--input-frames", type=cli.words, default=(), metavar="I,J,...", help="frame numbers, or file "
                       "names of own photographs, of the input views, instead of --views")
    given.add_argument("--force", action="store_true", help="go on where masks and cameras do not fit")
    how.add_argument("--no-prior", action="store_true", help="fit the field to the input views alone")
    measured.add_argument("--out", type=Path, metavar="DIR",
                          help="default: output/<sequence>; if taken, a folder beside it")
    return p


def capture_meant(word: str) -> str:
    """What to do instead of giving a word that belongs to no flag."""
    try:
        folder = find_poses(Path(word))
    except OSError:  # no name of a file
        folder = None
    if folder is None:
        return "own photographs, with cameras and masks (docs/photographs.md): python distill.py --capture DIR"
    return f"own photographs: python distill.py --capture {shlex.quote(str(folder))}"


def choose_photographs(source: Photographs, args: argparse.Namespace) -> tuple[str, ...]:
    """Names of the input photographs: those asked for, so many random ones, or all that are not held out."""
    # What the flags say goes first.
    if args.input_frames:
        chosen = find_views(source, args.input_frames)
    elif "--views" in args.given:
        chosen = random_views(source, args.views, args.seed)
    else:
        chosen = default_inputs(source, args.targets if "--targets" in args.given else None)
    return tuple(source.names[i] for i in chosen)


def without_prior(args: argparse.Namespace, photographs: int) -> bool:
    """Whether so many own photographs do without a prior. One line says which and why."""
    # Somebody's choice, or by their number.
    if args.no_prior:
        return True
    if photographs >= ENOUGH and "--weights" not in args.given:
        print(f"{photographs} input photographs are enough for a field alone, without a prior (--weights F takes one)")
        return True

    # What a prior has learned, it sees in everything.
    known = trained_categories(args.weights)
    limit = f", which knows {', '.join(known)} and sees them in everything" if known else ""
    if ANYTHING in known:
        limit = ", which knows drawn things of any kind"
    print(f"{photographs} input photographs, with the prior {args.weights.name}{limit} (--no-prior fits them alone)")
    return False


def instance_of_command(args: argparse.Namespace) -> Instance:
    """What all flags say."""
    # Of own photographs their number decides about a prior.
    source = find_source(args)
    choose_weights(args, [source])
    input_frames = args.input_frames
    no_prior = args.no_prior
    if isinstance(source, Photographs):
        input_frames = choose_photographs(source, args)
        no_prior = without_prior(args, len(input_frames))
    elif not no_prior:
        note_new_categories(args.weights, [source.category])
    if no_prior:
        args.weights = None
    instance = instance_from_flags(args, source, config_from_flags(args), input_frames)

    # What takes much longer than on a GPU.
    if instance.weights and args.device == "cpu" and sparsefusion.read_preset(args.weights).name == "paper":
        print("note: the paper's size takes minutes an iteration on a CPU; it is meant for --device cuda")
    return instance


def command(args: argparse.Namespace) -> None:
    """The main command."""
    # What is asked for, and where it goes.
    instance = instance_of_command(args)
    name = instance.source.sequence
    settings = instance.settings()
    out = args.out or results.choose_folder(Path("output"), name, settings, args.overwrite)

    # What came of it, now or earlier.
    result = results.finished(out, settings)
    if result is None:
        check_inputs(instance.source, instance.inputs(), args.force)
        result = run_instance(instance, out, args.overwrite, extend=not args.overwrite)
    else:
        print(f"{out} has the results of these settings already; delete it to make them anew")

    # In a table.
    inputs = result["input_frames"]
    shown = ", ".join(inputs) if len(inputs) <= LISTED else f"{inputs[0]}, {inputs[1]}, ... ({len(inputs)} views)"
    print(f"\n{name}: inputs {shown}; means over {len(result['target_frames'])} target views; "
          f"perceptual: {result['perceptual_name']}")
    print(table(result["methods"]))
    print(f"{result['seconds']:.0f} s; results in {out}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
