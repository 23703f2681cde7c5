"""Evaluation: the sequences of some categories, each against the baselines on views that were not given (Sec. 4).

    python evaluate.py                                    # the six shipped toys, two views of each
    python evaluate.py --root co3d --category apple hydrant --views 3 --weights prior.pt --out output/fruit
    torchrun --nproc-per-node 4 evaluate.py --instances 0 # a share of the sequences for every process

Each sequence has a folder of its own below --out; a finished one of the same settings is kept, so an evaluation
that was interrupted resumes. The list of sequences is written to `list.json`; `--list` reads one. A sequence that
cannot be read is named, counted and left out.
"""
from __future__ import annotations

import argparse
import errno
import os
from functools import partial
from pathlib import Path

import torch

from common import cli, files
from common.processes import map_processes
from common.progress import Progress
from datasets import co3d
from datasets.protocol import PROTOCOLS, CO3DSequence, read_list, save_list
from evaluation import results
from evaluation.instance import (Instance, add_instance_flags, choose_weights, config_from_flags,
                                 instance_from_flags, note_new_categories, run_instance)
from evaluation.tables import markdown, means, paired


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # full or not writable, for every other sequence, too
Job = tuple[Instance, Path]  # one sequence of an evaluation, and the folder of its results


def finished(job: Job, overwrite: bool) -> dict | None:
    """What `metrics.json` of a sequence holds, if everything is there and was made from the same settings and files.

    Raises `ValueError` for results of other settings, unless they may be replaced.
    """
    instance, out = job
    if not (out / "metrics.json").exists():
        return None
    settings = instance.settings()
    if not overwrite:
        results.require_free(out, settings)
    return results.finished(out, settings)


def evaluate_one(job: Job, strict: bool, overwrite: bool) -> str | None:
    """Make the results of one sequence, unless they are there. Returns what was wrong with it, in one line, if
    anything; raises it if `strict`, and where a disk takes no more. `overwrite`: results of other settings may be
    replaced.
    """
    instance, out = job
    try:
        if finished(job, overwrite) is None:
            run_instance(instance, out, overwrite)
    except (OSError, ValueError, FloatingPointError) as e:
        if strict or getattr(e, "errno", None) in DISK:
            raise
        return f"{instance.source.sequence}: {e}"
    return None


# ---------------------------------------------------------------------------------------------- all of them

def choose_entries(args: argparse.Namespace) -> list[CO3DSequence]:
    """The sequences to evaluate: those of a list file, or the first few of every category."""
    # A list that was written before says it all.
    if args.list:
        return read_list(args.list, args.root)

    # Otherwise the protocol does, category by category.
    categories = co3d.categories(args.root) if args.category == ["all"] else args.category
    entries = []
    for category in categories:
        entries += PROTOCOLS[args.protocol](args.root, category)[:args.instances or None]
    return entries


def choose_jobs(args: argparse.Namespace) -> list[Job]:
    """What to do for each of them."""
    # The same numbers for all of them.
    entries = choose_entries(args)
    choose_weights(args, entries)
    config = config_from_flags(args)
    jobs = []
    for entry in entries:
        instance = instance_from_flags(args, entry, config)
        folder = args.out / files.safe_name(entry.category) / files.safe_name(entry.sequence)
        if (folder.parent.name, folder.name) != (entry.category, entry.sequence):
            print(f"{entry.category!r}, {entry.sequence!r}: no names for folders; their results go to {folder}")
        jobs.append((instance, folder))
    return jobs


def my_share(jobs: list[Job]) -> list[Job]:
    """Every n-th job where `torchrun` started n processes, else all of them."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return jobs[rank::world]


def summarize(made: list[dict], jobs: int) -> dict:
    """Means with standard errors, and paired differences to every other method, of the results `made` by so many
    `jobs`.
    """
    # What all of them share.
    shared = {}
    for name, value in made[0]["settings"].items():
        if all(result["settings"].get(name) == value for result in made):
            shared[name] = value

    # The method against each of the others, on the same sequences, and the numbers of each.
    rows = [result["methods"] for result in made]
    return {
        "instances": len(made),
        "missing": jobs - len(made),
        "mean": means(rows),
        "sparsefusion_minus": {method: paired(rows, "sparsefusion", method) for method in rows[0]},
        "perceptual_name": made[0]["perceptual_name"],
        "settings": shared,
        "sequences": {result["sequence"]: result["methods"] for result in made},
        "seconds": [result["seconds"] for result in made],
    }


def command(args: argparse.Namespace) -> None:
    """Evaluate what was asked for."""
    jobs = choose_jobs(args)
    entries = [instance.source for instance, _ in jobs]
    note_new_categories(args.weights, [entry.category for entry in entries])
    save_list(entries, args.out / "list.json")

    # Results of other settings stop everything before anything is computed; those of the same are kept.
    mine = my_share(jobs)
    there = sum(finished(job, args.overwrite) is not None for job in mine)
    if there:
        print(f"{args.out}: {there} of {len(mine)} sequences are there already")
    problems = []
    evaluate_job = partial(evaluate_one, strict=args.strict, overwrite=args.overwrite)
    for problem in Progress(map_processes(evaluate_job, mine, args.workers), "sequences", total=len(mine)):
        if problem is not None:
            print(f"left out: {problem}")
            problems.append(problem)

    # Everything that is there by now; of several processes the last one sees it all.
    made = [finished(job, args.overwrite) for job in jobs]
    made = [result for result in made if result is not None]
    if not made:
        first = f"; the first: {problems[0]}" if problems else ""
        raise ValueError(f"{args.out}: none of {len(jobs)} sequences is evaluated{first}")
    rows = [result["methods"] for result in made]
    text = markdown(rows, made[0]["perceptual_name"])
    files.save_bytes(text.encode(), args.out / "evaluation.md")
    files.save_json(summarize(made, len(jobs)) | {"left_out": problems}, args.out / "evaluation.json")
    print(f"{len(made)} of {len(jobs)} sequences, {args.views} input views each; {len(problems)} left out\n\n{text}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__)
    given, _, measured = add_instance_flags(p, targets=0)

    # Which sequences, and where results go.
    given.add_argument("--category", nargs="+", default=["toys"], metavar="C",
                       help="categories, or all (default: toys)")
    given.add_argument("--instances", type=cli.views, default=10, metavar="N",
                       help="the first N sequences of every category; 0 for all (default: 10)")
    given.add_argument("--list", type=Path, metavar="F",
                       help="the sequences of a list.json, instead of --category, --instances, --protocol")
    given.add_argument("--strict", action="store_true",
                       help="stop at a sequence that cannot be read, instead of leaving it out")
    measured.add_argument("--out", type=Path, default=Path("output/evaluation"), metavar="DIR",
                          help="results, a folder per sequence (default: output/evaluation); the same command resumes")
    measured.add_argument("--workers", type=cli.whole_number(1, 256), default=1, metavar="N",
                          help="sequences at a time, a process each")
    return p


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
