"""The folder of one run: what it holds, whether another run may write there, and which folder is free.

    settings.json   what decides the results, as plain data, written before anything else
    field.pt        the field and its optimization (`reconstruction.py`); `field_alone.pt` of a run that is not finished
    metrics.json    the numbers, written last

Settings say under "config" what the numbers of the distillation are, and under other names what they were applied to.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path

from common import files
from common.machine import peak_gb, versions
from common.progress import seconds_by_step
from export.pictures import LABELS
from reconstruction import OUTPUT_FIELDS, Reconstruction, goes_further

# What is shown, and what else a run leaves.
PICTURES = ("comparison.png", "turntable.gif", "mesh.ply")
LEFT_BESIDE = ("settings.json", "metrics.json", "field.pt", "field_alone.pt", "previews.png")


def conflict(folder: Path, settings: dict, extend: bool) -> str:
    """What differs between these settings and those of the field in a folder, in words; "" where nothing would be
    lost.

    What only shows and measures may differ; with `extend`, the number of iterations, if there are more to come.
    """
    # Results from before there was this file have the same in another.
    found = {}
    if (folder / "settings.json").exists():
        found = files.read_json(folder / "settings.json")
    elif (folder / "metrics.json").exists():
        found = files.read_json(folder / "metrics.json").get("settings", {})
    if not found or not isinstance(found, dict):
        return ""

    found = _of_the_field(found)
    wanted = _of_the_field(settings)
    if extend and goes_further(found, wanted):
        return ""
    return files.differences(found, wanted)


def _of_the_field(settings: dict) -> dict:
    """Settings without those that change no field."""
    kept = {name: x for name, x in settings.items() if name not in ("targets", "feature_net")}
    if isinstance(kept.get("config"), dict):
        kept["config"] = {name: x for name, x in kept["config"].items() if name not in OUTPUT_FIELDS}
    return kept


def claim(folder: Path, settings: dict, clear: bool) -> None:
    """From here on a folder is that of a run of these settings; with `clear`, what an earlier run wrote there goes, and
    nothing else.
    """
    if clear:
        for name in (*LEFT_BESIDE, *PICTURES):
            (folder / name).unlink(missing_ok=True)
    files.save_json(settings, folder / "settings.json")


def account(ours: Reconstruction, device: str, began: float) -> dict:
    """How a result came about, and what it took since the moment `began` of the monotonic clock."""
    return {
        "command": " ".join(sys.argv),
        "gone_on_from": ours.gone_on_from,
        "versions": versions(device),
        "seconds": round(time.monotonic() - began + ours.earlier_seconds, 1),
        "seconds_by_step": seconds_by_step(),
        "distillation_seconds": round(ours.seconds, 1),
        "peak_gb": peak_gb(device),
    }


def finished(folder: Path, settings: dict) -> dict | None:
    """What `metrics.json` of a folder holds, if it was made from these settings and everything else is there, too."""
    if not all((folder / name).exists() for name in ("metrics.json", "field.pt", *PICTURES)):
        return None
    result = files.read_json(folder / "metrics.json")
    methods = result.get("methods")
    whole = isinstance(methods, dict) and methods.keys() <= LABELS.keys()
    return result if whole and not files.differences(result.get("settings"), settings) else None


def choose_folder(parent: Path, name: str, settings: dict, overwrite: bool) -> Path:
    """`<parent>/<name>`, or the first of `<parent>/<name>_2`, ... without a field of other settings.

    One line says so where it is not the first, or where the name is none for a folder.
    """
    # A name in somebody's data does not say where files go.
    first = parent / files.safe_name(name)
    if first.name != name:
        print(f"{name!r} is no name for a folder; its results go to {first}")
    other = conflict(first, settings, extend=True)
    if overwrite or not other:
        return first

    # Nothing is replaced.
    number = 2
    while conflict(first.with_name(f"{first.name}_{number}"), settings, extend=True):
        number += 1
    folder = first.with_name(f"{first.name}_{number}")
    print(f"{first} has results of other settings ({other}); these go to {folder}")
    return folder
