"""Are these the same settings? What a run is known by is plain data beside its results; what differs decides whether
another run may resume them.

A setting's path is its names with dots between them, `config.field.levels`.
"""
from __future__ import annotations

import json
import math
from typing import get_args, get_origin, get_type_hints

# How long a run is, and what follows from it, in one that resumes a shorter one.
LENGTH = ("config.iterations", "config.fit.steps", "config.bootstrap")
MOST_THINGS = 2**14  # channels, layers or pixels of a network
MOST = 3  # differences that are told with their values
RENAMED = {"config.sampler.plms_steps": "config.sampler.denoise_steps"}  # in files from before


def differences(found, wanted, ignore: tuple[str, ...] = (), extend: bool = False) -> str:
    """What differs between the settings of an earlier run and ours, in words: "seed differ: seed is 0 there, 1 here";
    "" for nothing.

    `ignore`: paths that do not count. With `extend`, the number of iterations or steps may be larger here, and with it
    what follows from it.
    """
    # As JSON has them, which knows no tuples.
    found = _flat(json.loads(json.dumps(found, default=str)))
    found = {RENAMED.get(path, path): value for path, value in found.items()}
    wanted = _flat(json.loads(json.dumps(wanted, default=str)))
    longer = any(isinstance(found.get(path), int) and found[path] < wanted.get(path, 0) for path in LENGTH[:2])
    if extend and longer:
        ignore += LENGTH
    paths = [path for path in wanted | found if path not in ignore and found.get(path) != wanted.get(path)]
    if not paths:
        return ""

    # The names of the parts, then some of the values.
    parts = dict.fromkeys(path.partition(".")[0] for path in paths)
    values = []
    for path in paths[:MOST]:
        there = json.dumps(found.get(path))[:24]
        here = json.dumps(wanted.get(path))[:24]
        values.append(f"{path} is {there} there, {here} here")
    more = ", ..." if len(paths) > MOST else ""
    return f"{', '.join(parts)} differ: {', '.join(values)}{more}"


def _flat(settings, path: str = "") -> dict:
    """Nested settings as one dictionary, path -> value; what is no dictionary is a value."""
    if not isinstance(settings, dict):
        return {path: settings}
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{path}.{name}" if path else name)
    return flat


def check_ranges(config, ranges: dict[str, tuple[float, float]]) -> None:
    """Raises `ValueError` for the first number of a config, by name, that is less or more than its range."""
    for name, (least, most) in ranges.items():
        if not least <= getattr(config, name) <= most:
            raise ValueError(f"{name} {getattr(config, name)} is not from {least} to {most}")


def check_numbers(config) -> None:
    """Raises `ValueError` for a field of a network's config that is not of its type, not finite, or a number of things
    below 1 or above `MOST_THINGS`. Nested configs check themselves.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        several = get_origin(kind) is tuple
        kinds = get_args(kind) if several else (kind,)
        values = value if isinstance(value, tuple) else (value,)

        # As many values as a tuple's type says, or any number of them.
        fits = isinstance(value, tuple) == several and (kinds[-1] is Ellipsis or len(values) == len(kinds))
        for x in values:
            fits &= isinstance(x, kinds[0]) or kinds[0] is float and type(x) is int
            fits &= type(x) is not int or 1 <= x <= MOST_THINGS or kinds[0] is float
            fits &= not isinstance(x, float) or math.isfinite(x)
        if not fits:
            kind = getattr(kind, "__name__", kind)
            raise ValueError(f"{name} {value!r:.40}: not {kind}, finite, whole ones from 1 to {MOST_THINGS}")
