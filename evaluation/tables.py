"""Tables of metrics: means with standard errors, and paired differences.
"""
from __future__ import annotations

import math
from statistics import fmean, stdev

from export.pictures import LABELS

METRICS = {"psnr": "PSNR", "ssim": "SSIM", "perceptual": "perceptual", "iou": "IoU"}
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "perceptual": False, "iou": True}
DIGITS = {"psnr": 2, "ssim": 3, "perceptual": 3, "iou": 3}

Rows = dict[str, dict[str, float]]  # method -> metric -> number
Number = dict[str, float]           # over sequences: its "mean", that mean's standard "error", perhaps "wins"


def table(methods: Rows) -> str:
    """Metrics as text, a method a line; a dash where a method has no such number."""
    lines = [f"{'':<16}{'PSNR':>8}{'SSIM':>8}{'perceptual':>12}{'IoU':>8}"]
    for method, row in methods.items():
        line = f"{LABELS[method]:<16}"
        for metric in METRICS:
            cell = f"{row[metric]:.{DIGITS[metric]}f}" if metric in row else "-"
            line += cell.rjust(12 if metric == "perceptual" else 8)
        lines.append(line)
    return "\n".join(lines)


def mean_and_error(values: list[float]) -> Number:
    """The mean of some numbers, and the standard error of that mean (0 for a single one)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": fmean(values), "error": error}


def means(rows: list[Rows]) -> dict[str, dict[str, Number]]:
    """Method -> metric -> mean over sequences with its standard error."""
    result = {}
    for method, metrics in rows[0].items():
        result[method] = {metric: mean_and_error([row[method][metric] for row in rows]) for metric in metrics}
    return result


def paired(rows: list[Rows], ours: str, theirs: str) -> dict[str, Number]:
    """Metric -> the difference of two methods, ours minus theirs, sequence by sequence: its noise is much smaller than
    that of the means. "wins": on how many sequences ours is better.
    """
    # Only what both of them have.
    result = {}
    for metric in METRICS:
        if metric not in rows[0][ours] or metric not in rows[0][theirs]:
            continue

        # Better may be more or less.
        differences = [row[ours][metric] - row[theirs][metric] for row in rows]
        sign = 1 if HIGHER_IS_BETTER[metric] else -1
        wins = sum(sign * difference > 0 for difference in differences)
        result[metric] = mean_and_error(differences) | {"wins": wins}
    return result


def markdown(rows: list[Rows], perceptual_name: str) -> str:
    """Two tables of some sequences: means with standard errors, and the method minus each of the others."""
    lines = [f"Means over {len(rows)} sequences, with standard errors. Perceptual: {perceptual_name}.", ""]
    lines += _table(means(rows), "{mean:.{digits}f} ± {error:.{digits}f}")

    # Differences, if the method is there.
    if "sparsefusion" in rows[0]:
        lines += ["", "SparseFusion minus each of the others, sequence by sequence, and on how many it is better.", ""]
        pairs = {method: paired(rows, "sparsefusion", method) for method in rows[0] if method != "sparsefusion"}
        lines += _table(pairs, "{mean:+.{digits}f} ± {error:.{digits}f} ({wins} of " + f"{len(rows)})")
    return "\n".join(lines) + "\n"


def _table(numbers: dict[str, dict[str, Number]], cell: str) -> list[str]:
    """The lines of a table, one per method: its numbers in the format `cell`; a dash where it has no such number."""
    lines = ["|  | " + " | ".join(METRICS.values()) + " |", "| --- | --- | --- | --- | --- |"]
    for method, row in numbers.items():
        line = f"| {LABELS[method]} |"
        for metric in METRICS:
            text = cell.format(digits=DIGITS[metric], **row[metric]) if metric in row else "-"
            line += f" {text} |"
        lines.append(line)
    return lines
