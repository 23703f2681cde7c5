"""The folder of one run: what it holds, whether another run may write there, and which folder is free.

    settings.json   what decides the results, as plain data, written before anything else
    field.pt        the field and its optimization (`reconstruction.py`); `field_alone.pt` of a run that is not finished
    metrics.json    the numbers, written last

Settings say under "config" what the numbers of the distillation are, and under other names what they were applied to.
"""
from __future__ import annotations

from pathlib import Path

from common import files
from common.settings import differences
from export.pictures import LABELS
from reconstruction import OUTPUT_SETTINGS

# What is shown, and what else a run leaves.
PICTURES = ("comparison.png", "mesh.ply", "mesh.glb")
TURNING = ("turntable.gif", "index.html")  # with `turntable_frames`
LEFT_BESIDE = ("settings.json", "metrics.json", "field.pt", "field_alone.pt", "previews.png")

# Settings that change no field, only what is shown of it and measured.
MEASURED = ("targets", "feature_net", *OUTPUT_SETTINGS)


def conflict(folder: Path, settings: dict, extend: bool) -> str:
    """What differs between these settings and those of the results in a folder, in words; "" where nothing would be
    lost.

    What only shows and measures may differ; with `extend`, the number of iterations, if there are more to come.
    """
    # Numbers without settings are those of some other run.
    if (folder / "settings.json").exists():
        found = files.read_json(folder / "settings.json")
    elif (folder / "metrics.json").exists():
        found = {}
    else:
        return ""
    return differences(found, settings, MEASURED, extend)


def require_free(folder: Path, settings: dict, extend: bool = False) -> None:
    """Raises `ValueError` with one line where a folder has results of other settings. See `conflict`."""
    other = conflict(folder, settings, extend)
    if other:
        raise ValueError(f"{folder}: results of other settings ({other}); choose another --out, or --overwrite")


def claim(folder: Path, settings: dict, extend: bool = False) -> None:
    """From here on a folder is that of a run of these settings; what a run of others wrote there goes, and nothing
    else.
    """
    if conflict(folder, settings, extend):
        for name in LEFT_BESIDE + PICTURES + TURNING:
            (folder / name).unlink(missing_ok=True)
    files.save_json(settings, folder / "settings.json")


def finished(folder: Path, settings: dict) -> dict | None:
    """What `metrics.json` of a folder holds, if it was made from these settings, has all that tables read, and
    everything else is there, too.
    """
    turning = TURNING if settings["config"]["turntable_frames"] else ()
    if not all((folder / name).exists() for name in ("metrics.json", "field.pt", *PICTURES, *turning)):
        return None
    result = files.read_json(folder / "metrics.json")
    return None if differences(result.get("settings"), settings) or not _is_whole(result) else result


def _is_whole(result: dict) -> bool:
    """Whether what tables read of a `metrics.json` has its kinds."""
    methods = result.get("methods")
    if not isinstance(methods, dict) or not methods.keys() <= LABELS.keys() or not methods:
        return False
    numbers = [result.get("seconds")]
    for row in methods.values():
        if not isinstance(row, dict) or not row:
            return False
        numbers += row.values()

    # Names, and finite numbers.
    names = [result.get("sequence"), result.get("perceptual_name")]
    for entry in ("input_frames", "target_frames"):
        names += result[entry] if isinstance(result.get(entry), list) else [None]
    return (all(isinstance(name, str) for name in names)
            and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in numbers))


def choose_folder(parent: Path, name: str, settings: dict, overwrite: bool) -> Path:
    """`<parent>/<name>`, or the first of `<parent>/<name>_2`, ... without a field of other settings.

    One line says so where it is not the first, or where the name is none for a folder.
    """
    # A name in the data does not say where files go.
    first = parent / files.safe_name(name)
    if first.name != name:
        print(f"{name!r} is no name for a folder; its results go to {first}")
    # Nothing is replaced.
    folder = first
    number = 1
    while not overwrite and conflict(folder, settings, extend=True):
        number += 1
        folder = first.with_name(f"{first.name}_{number}")
    if folder != first:
        other = conflict(first, settings, extend=True)
        print(f"{first} has results of other settings ({other}); these go to {folder}")
    return folder
