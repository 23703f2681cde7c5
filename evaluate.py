"""Evaluation: every sequence of a category, each against the baselines on views that were not given, and the means
(Sec. 4).

    python evaluate.py --root DIR --category C --views 2 --weights F --out DIR

Each sequence has a folder of its own below --out. What is there already from the same settings and files is taken up,
not made again.
"""
from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import cli
import distill
import files
import report
from co3d import sequences
from runtime import Progress, map_processes

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "perceptual": False, "iou": True}


@dataclass(frozen=True)
class Job:
    """One sequence of an evaluation, and where its results go."""
    instance: distill.Instance
    out: Path


def evaluate_one(job: Job) -> dict:
    """What `metrics.json` of one sequence holds: read where it was made from the same settings, else made."""
    # Equal settings, files by their content, give equal results: they need not be made again.
    earlier = job.out / "metrics.json"
    if earlier.exists():
        result = json.loads(earlier.read_text())
        if result.get("settings") == json.loads(json.dumps(job.instance.settings())):
            return result
    return distill.run_instance(job.instance, job.out)


def summarize(results: list[dict]) -> dict:
    """Means of every method and metric, how often the method beats the EFT, and by how much in perceptual distance."""
    # Means over sequences.
    rows = [result["methods"] for result in results]
    mean = {}
    for method in rows[0]:
        mean[method] = {}
        for metric in HIGHER_IS_BETTER:
            mean[method][metric] = fmean(row[method][metric] for row in rows)

    # On how many of them the method is better than the EFT.
    wins = {}
    for metric, higher in HIGHER_IS_BETTER.items():
        pairs = [(row["sparsefusion"][metric], row["eft"][metric]) for row in rows]
        wins[metric] = sum(ours > theirs if higher else ours < theirs for ours, theirs in pairs)
    # What all of them share.
    first = results[0]
    shared = {name: x for name, x in first["settings"].items() if name not in ("sequence", "seed")}
    ratio = mean["sparsefusion"]["perceptual"] / mean["eft"]["perceptual"]
    return {
        "instances": len(results),
        "mean": mean,
        "sparsefusion_beats_eft": wins,
        "perceptual_ratio": ratio,
        "perceptual_name": first["perceptual_name"],
        "settings": shared,
        "seconds": [result["seconds"] for result in results],
    }


def command(args: argparse.Namespace) -> None:
    """Evaluate a category."""
    # Each sequence has its own seed: its place in the list, as released [released: demo.py:63, 78-81].
    names = sequences(args.root, args.category)[:args.instances]
    jobs = []
    for k, name in enumerate(names):
        instance = distill.instance_from_flags(args, name, args.seed + k)
        jobs.append(Job(instance, args.out / name))
    results = list(Progress(map_processes(evaluate_one, jobs, args.workers), "instances", total=len(jobs)))

    # What came of it.
    summary = summarize(results)
    files.save_json(summary, args.out / "evaluation.json")
    print(f"{len(results)} instances, {args.views} input views each")
    print(report.table(summary["mean"]))
    wins = ", ".join(f"{metric} {n} of {len(results)}" for metric, n in summary["sparsefusion_beats_eft"].items())
    print(f"SparseFusion better than EFT: {wins}; perceptual distance {summary['perceptual_ratio']:.2f} times EFT's")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__.splitlines()[0], epilog="The same command again goes on where it stopped.")
    distill.add_instance_flags(p)
    p.add_argument("--out", type=Path, default=Path("output/evaluation"), metavar="DIR",
                   help="results, a folder a sequence")
    p.add_argument("--instances", type=cli.count, metavar="N", help="only the first N sequences")
    p.add_argument("--workers", type=cli.count, default=1, metavar="N", help="sequences at a time, a process each")
    return p


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
