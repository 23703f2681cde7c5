"""Two evaluations of the same sequences, by other weights, settings or code: the second minus the first. A command:

    python evaluate.py --root toys --instances 0 --weights old.pt --out old
    python evaluate.py --root toys --instances 0 --weights new.pt --out new
    python -m experiments.compare old new

prints for every method both means, their difference sequence by sequence with its standard error, and on how many of
the sequences the second one is better.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from common import cli, files
from evaluation.tables import METRICS, Rows, means, paired
from export.pictures import LABELS


def read_rows(folder: Path) -> dict[str, Rows]:
    """Sequence -> method -> metric -> number, of a folder that `evaluate.py` wrote."""
    found = {str(file.parent.relative_to(folder)): files.read_json(file) for file in folder.rglob("metrics.json")}
    return {name: result["methods"] for name, result in found.items()}


def command(args: argparse.Namespace) -> None:
    """Print a line for every method and metric."""
    first, second = read_rows(args.first), read_rows(args.second)
    names = sorted(first.keys() & second.keys())
    if not names:
        raise ValueError(f"{args.first}, {args.second}: no sequence is in both")
    print(f"{len(names)} sequences")
    before, after = (means([rows[name] for name in names]) for rows in (first, second))
    for method in [method for method in before if method in after]:
        differences = paired([{"first": first[name][method], "second": second[name][method]} for name in names],
                             "second", "first")
        for metric, number in differences.items():
            print(f"{LABELS[method]:<14}{METRICS[metric]:<12}{before[method][metric]['mean']:8.3f} -> "
                  f"{after[method][metric]['mean']:.3f}  {number['mean']:+.3f} ± {number['error']:.3f}, better on "
                  f"{number['wins']}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    p = cli.Parser(__doc__)
    p.add_argument("first", type=Path, metavar="DIR", help="what `evaluate.py --out` names")
    p.add_argument("second", type=Path, metavar="DIR", help="another one")
    cli.run(command, p.parse_args(argv))


if __name__ == "__main__":
    main()
