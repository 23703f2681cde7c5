"""Tables of metrics: means with standard errors, and paired differences.
"""
from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import NamedTuple

from export.pictures import LABELS

METRICS = {"psnr": "PSNR", "ssim": "SSIM", "perceptual": "perceptual", "iou": "IoU"}
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "perceptual": False, "iou": True}
DIGITS = {"psnr": 2, "ssim": 3, "perceptual": 3, "iou": 3}


Rows = dict[str, dict[str, float]]  # method -> metric -> number


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


class Mean(NamedTuple):
    """A mean over sequences and its standard error (0 for a single one)."""
    mean: float
    error: float


def mean_and_error(values: list[float]) -> Mean:
    """The mean of some numbers, and the standard error of that mean."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(fmean(values), error)


def means(rows: list[Rows]) -> dict[str, dict[str, Mean]]:
    """Method -> metric -> mean over sequences with its standard error."""
    result = {}
    for method, metrics in rows[0].items():
        result[method] = {}
        for metric in metrics:
            values = [row[method][metric] for row in rows]
            result[method][metric] = mean_and_error(values)
    return result


class Paired(NamedTuple):
    """How a method differs from another on the same sequences."""
    difference: Mean  # ours minus theirs
    wins: int         # sequences on which ours is better


def paired(rows: list[Rows], ours: str, theirs: str) -> dict[str, Paired]:
    """Metric -> the difference of two methods, sequence by sequence: its noise is much smaller than that of the
    means.
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
        result[metric] = Paired(mean_and_error(differences), wins)
    return result


def markdown(rows: list[Rows], perceptual_name: str) -> str:
    """Two tables of some sequences: means with standard errors, and the method minus each of the others."""
    # Means: a method a line.
    count = len(rows)
    lines = [f"Means over {count} sequences, with standard errors. Perceptual: {perceptual_name}.", ""]
    lines += [_line(["", *METRICS.values()]), _line(["---"] * 5)]
    for method, row in means(rows).items():
        cells = [_mean_cell(row, metric) for metric in METRICS]
        lines.append(_line([LABELS[method], *cells]))
    if "sparsefusion" not in rows[0]:
        return "\n".join(lines) + "\n"

    # Differences: another method a line.
    lines += ["", "SparseFusion minus each of the others, sequence by sequence, and on how many it is better.", ""]
    lines += [_line(["", *METRICS.values()]), _line(["---"] * 5)]
    for method in rows[0]:
        if method != "sparsefusion":
            row = paired(rows, "sparsefusion", method)
            cells = [_paired_cell(row, metric, count) for metric in METRICS]
            lines.append(_line([LABELS[method], *cells]))
    return "\n".join(lines) + "\n"


def _mean_cell(row: dict[str, Mean], metric: str) -> str:
    if metric not in row:
        return "-"
    digits = DIGITS[metric]
    return f"{row[metric].mean:.{digits}f} ± {row[metric].error:.{digits}f}"


def _paired_cell(row: dict[str, Paired], metric: str, count: int) -> str:
    if metric not in row:
        return "-"
    difference = row[metric].difference
    digits = DIGITS[metric]
    return f"{difference.mean:+.{digits}f} ± {difference.error:.{digits}f} ({row[metric].wins} of {count})"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
