"""Which views are given and which are measured (Sec. 4), and whether masks and cameras of those that are given fit.

A source of views is a sequence of a CO3D tree or a folder of one's own photographs. Both know their views by name and
decode nothing before they have to: so inputs and targets are chosen first, and whether masks and cameras of the inputs
fit (`photographs/examine.py`) is asked before anything long begins.

Views are told by their positions in the source, which are those in the scene that it loads.
"""
from __future__ import annotations

from cameras import evenly_spaced
from datasets.protocol import CO3DSequence, choose_views
from photographs import examine
from photographs.capture import Photographs, load_pictures

ENOUGH = 8    # own photographs as inputs, from which on the field alone is the default
HELD_OUT = 8  # own photographs that are held out to measure, at most; and one of so many

Source = CO3DSequence | Photographs


def possible_inputs(source: Source) -> list[int]:
    """Positions of the views that may be inputs: those that the files name, or all."""
    return source.inputs or list(range(len(source.names)))


def default_inputs(source: Photographs, targets: int | None = None) -> list[int]:
    """Positions of the inputs by default: those that the files name, or all but `targets` evenly spaced ones.

    `targets` is by default one of every eight, at most eight. Raises `ValueError` where no input is left.
    """
    possible = possible_inputs(source)
    if source.targets:
        return possible

    # Rather not the first and the last, beside which there may be nothing.
    count = len(possible)
    if targets is None:
        targets = min(count // HELD_OUT, HELD_OUT)
    if targets >= count:
        raise ValueError(f"--targets {targets}: {source.sequence} has {count} photographs, so none is left as an input")
    held_out = {possible[int((i + 0.5) * count / targets)] for i in range(targets)}
    return [view for view in possible if view not in held_out]


def random_views(source: Source, count: int, seed: int) -> list[int]:
    """Positions of the first `count` of a random permutation of the views that may be inputs, all of them for 0."""
    possible = possible_inputs(source)
    if count > len(possible):
        raise ValueError(f"--views {count}: {source.sequence} has {len(possible)} frames")
    return [possible[i] for i in choose_views(len(possible), count or len(possible), seed)]


def find_views(source: Source, frames: tuple[str, ...], flag: str = "--input-frames") -> list[int]:
    """Positions of the views with the names that a flag gives. Raises `ValueError` for a name that the source lacks, or
    twice the same.
    """
    position = {name: i for i, name in enumerate(source.names)}
    for frame in frames:
        if frame not in position:
            some = ", ".join(source.names[:8])
            raise ValueError(f"{flag} {frame}: {source.sequence} has no such frame; it has {some}, ...")
        if frames.count(frame) > 1:
            raise ValueError(f"{flag}: frame {frame} stands there twice")
    return [position[frame] for frame in frames]


def choose_targets(source: Source, inputs: list[int], count: int, on_inputs: bool) -> list[int]:
    """Positions of `count` views to measure, evenly spaced, or of all for 0: of those that are no inputs, if any."""
    # What was given is not predicted.
    everything = list(range(len(source.names)))
    candidates = [i for i in source.targets or everything if i not in inputs]
    if not candidates:
        print(f"{source.sequence}: all views are inputs, so the inputs themselves are measured")
        candidates = inputs
    if on_inputs:
        candidates = everything
    return [candidates[i] for i in evenly_spaced(len(candidates), count or len(candidates))]


# ---------------------------------------------------------------------------------------------- do they fit?

def examine_views(source: Source, views: list[int]) -> examine.Findings:
    """Do masks and cameras of some views fit?"""
    some = source.at(views)
    if isinstance(some, Photographs):
        # In the user's own world: wrong cameras may have no normalized one.
        return examine.examine(load_pictures(some, examine.SIZE), some.convention, whole=True)
    return examine.examine(some.load(examine.SIZE))


def check_inputs(source: Source, inputs: list[int], force: bool) -> None:
    """Do masks and cameras of the input views fit? One line where they do. A clear mistake raises `ValueError`, unless
    `force` goes on.
    """
    # An even choice of them is enough. One alone cannot be checked.
    if len(inputs) < 2:
        return
    chosen = [inputs[i] for i in evenly_spaced(len(inputs), examine.MOST)]
    found = examine_views(source, chosen)

    # What stops the command, what is only worth knowing, and what is well.
    if found.mistake and not force:
        verdict = "; ".join(line.strip() for line in found.lines[-2:])
        raise ValueError(f"{source.sequence}: {verdict}; correct the cameras (docs/check.md), or go on with --force")
    if not found.fits:
        print("\n".join(found.lines))
        return
    some = f"{len(chosen)} of " if len(chosen) < len(inputs) else ""
    limit = "" if found.can_tell else ", as far as these can tell"
    print(f"masks and cameras of {some}{len(inputs)} input views fit{limit}")
