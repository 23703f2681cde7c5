"""What is reconstructed comes from a sequence of a CO3D tree (Sec. 4), or from a folder of one's own photographs.

Both sources know their views by name and decode nothing before they have to: so inputs and targets are chosen first,
and whether masks and cameras of the inputs fit (`photographs/examine.py`) is asked before anything long begins.

Views are told by their positions in the source, which are those in the scene that it loads.
"""
from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cameras import Scene, evenly_spaced
from datasets import co3d
from datasets.protocol import PROTOCOLS, Entry, choose_views
from photographs import capture, examine
from photographs.reading import Photographs

ENOUGH = 8    # own photographs as inputs, from which on the field alone is the default
HELD_OUT = 8  # own photographs that are held out to measure, at most; and one of so many


class CO3DSequence:
    """A sequence of a CO3D tree."""

    def __init__(self, root: Path, entry: Entry):
        self.root = root
        self.entry = entry
        self.name = entry.sequence                             # what its results are called
        self.names = [str(number) for number in entry.frames]  # what its views are called
        self.index = entry.index                               # its place in a list, which seeds it
        self.possible_inputs = list(range(len(self.names)))
        self.possible_targets = self.possible_inputs

    def settings(self) -> dict:
        """What it is, as plain data: pictures by their dates."""
        pictures = co3d.stamp(self.root, self.entry.category, self.entry.sequence, self.entry.frames)
        return {"entry": asdict(self.entry), "pictures": pictures}

    def examine(self, views: list[int]) -> examine.Findings:
        """Do masks and cameras of some views fit?"""
        frames = [self.entry.frames[i] for i in views]
        return examine.examine(self._read(examine.SIZE, frames))

    def load(self, size: int, cut: bool = True) -> Scene:
        """All its views, `size` pixels a side: always cut to the object, for the format knows no others."""
        return self._read(size, self.entry.frames)

    def _read(self, size: int, frames: list[int] | tuple[int, ...]) -> Scene:
        return co3d.load_sequence(self.root, self.entry.category, self.entry.sequence, size, frames)


def find_sequence(root: Path, protocol: str, category: str, name: str | None) -> CO3DSequence:
    """The sequence of this name, or the first, in a protocol's list of a category."""
    # In the list a sequence has its place, which seeds it.
    entries = PROTOCOLS[protocol](root, category)
    if name is None:
        return CO3DSequence(root, entries[0])
    for entry in entries:
        if entry.sequence == name:
            return CO3DSequence(root, entry)
    names = ", ".join(entry.sequence for entry in entries[:5])
    raise ValueError(f"--sequence {name}: not in the list of --protocol {protocol}, which begins {names}; --protocol "
                     "all lists every sequence")


class OwnPhotographs:
    """A folder of photographs (docs/photographs.md)."""

    def __init__(self, photographs: Photographs):
        self.photographs = photographs
        self.name = photographs.folder.resolve().name           # what its results are called
        self.names = [shot.name for shot in photographs.shots]  # what its views are called: their files
        self.index = 0                                          # it stands in no list

        # Those that the files name as inputs and targets, or all.
        everything = list(range(len(self.names)))
        self.possible_inputs = photographs.inputs or everything
        self.possible_targets = photographs.targets or everything

    def settings(self) -> dict:
        """What it is, as plain data: pictures by their dates."""
        return {"capture": self.name, "pictures": capture.stamp(self.photographs)}

    def examine(self, views: list[int]) -> examine.Findings:
        """Do masks and cameras of some views fit?"""
        # In the user's own world: wrong cameras may have no normalized one.
        scene = capture.load_pictures(self.photographs.at(views), examine.SIZE)
        return examine.examine(scene, self.photographs.convention, whole=True)

    def load(self, size: int, cut: bool = True) -> Scene:
        """All its views, cut to the object or not, in squares of `size` pixels, in the normalized world."""
        return capture.load_capture(self.photographs, size, cut).scene

    def default_inputs(self, targets: int | None) -> list[int]:
        """Positions of the inputs by default: those that the files name, or all but `targets` evenly spaced
        ones.

        `targets` is by default one of every eight, at most eight. Raises `ValueError` where no input is left.
        """
        if self.photographs.targets:
            return self.possible_inputs

        # Rather not the first and the last, beside which there may be nothing.
        possible = self.possible_inputs
        count = len(possible)
        if targets is None:
            targets = min(count // HELD_OUT, HELD_OUT)
        if targets >= count:
            raise ValueError(f"--targets {targets}: {self.name} has {count} photographs, so none is left as an input")
        held_out = {possible[int((i + 0.5) * count / targets)] for i in range(targets)}
        return [view for view in possible if view not in held_out]


Source = CO3DSequence | OwnPhotographs


# ---------------------------------------------------------------------------------------------- which views

def random_views(source: Source, count: int, seed: int) -> list[int]:
    """Positions of the first `count` of a random permutation of the views that may be inputs, all of them for 0."""
    possible = source.possible_inputs
    if count > len(possible):
        raise ValueError(f"--views {count}: {source.name} has {len(possible)} frames")
    return [possible[i] for i in choose_views(len(possible), count or len(possible), seed)]


def find_views(source: Source, frames: tuple[str, ...], flag: str = "--input-frames") -> list[int]:
    """Positions of the views with the names that a flag gives. Raises `ValueError` for a name that the source lacks, or
    twice the same.
    """
    position = {name: i for i, name in enumerate(source.names)}
    for frame in frames:
        if frame not in position:
            some = ", ".join(source.names[:8])
            raise ValueError(f"{flag} {frame}: {source.name} has no such frame; it has {some}, ...")
        if frames.count(frame) > 1:
            raise ValueError(f"{flag}: frame {frame} stands there twice")
    return [position[frame] for frame in frames]


def choose_targets(source: Source, inputs: list[int], count: int, on_inputs: bool) -> list[int]:
    """Positions of `count` views to measure, evenly spaced, or of all for 0: of those that are no inputs, if any."""
    # What was given is not predicted.
    candidates = [i for i in source.possible_targets if i not in inputs]
    if not candidates:
        print(f"{source.name}: all views are inputs, so the inputs themselves are measured")
        candidates = inputs
    if on_inputs:
        candidates = list(range(len(source.names)))
    return [candidates[i] for i in evenly_spaced(len(candidates), count or len(candidates))]


def check_inputs(source: Source, inputs: list[int], force: bool) -> None:
    """Do masks and cameras of the input views fit? One line where they do. A clear mistake raises `ValueError`, unless
    `force` goes on.
    """
    # An even choice of them is enough. One alone cannot be checked.
    if len(inputs) < 2:
        return
    chosen = [inputs[i] for i in evenly_spaced(len(inputs), examine.MOST)]
    found = source.examine(chosen)

    # What stops the command, what is only worth knowing, and what is well.
    if found.mistake and not force:
        verdict = "; ".join(line.strip() for line in found.lines[-2:])
        raise ValueError(f"{source.name}: {verdict}; correct the cameras (docs/check.md), or go on with --force")
    if not found.fits:
        print("\n".join(found.lines))
        return
    some = f"{len(chosen)} of " if len(chosen) < len(inputs) else ""
    limit = "" if found.can_tell else ", as far as these can tell"
    print(f"masks and cameras of {some}{len(inputs)} input views fit{limit}")
