"""Which sequences, frames and views count: the paper's protocol on CO3Dv2 (Sec. 4).

Evaluation takes sequences of the set list `fewview_dev`, split `test`, with more than 10 frames there; of each, 32
evenly spaced frames and no others. The first V of a random permutation of them are the inputs, all others are the
targets; the permutation is seeded with the sequence's place in the list. Training reads `fewview_train`, split `train`.

A list of such sequences can be written to a file and read again: then what a sequence gives does not depend on which
others a tree holds.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cameras import Scene, evenly_spaced
from common import files
from datasets import co3d

EVALUATION = "fewview_dev/test"   # [released: load_dataset.py:13-15; co3d_dataloader.py:796-798]
TRAINING = "fewview_train/train"  # [released: train.py:254; co3d_dataloader.py:230]
FRAMES = 32                       # of a sequence [released: load_dataset.py:13-15; co3d_dataloader.py:362-363]
TOO_FEW = 10                      # frames: such sequences do not count [released: co3d_dataloader.py:326-333]


@dataclass(frozen=True)
class CO3DSequence:
    """One sequence of a list, with everything that is chosen before anything is computed. Views are told by their
    positions among its frames.
    """
    root: Path
    category: str
    sequence: str
    index: int               # its place in the category's list: it seeds the sequence's random numbers
    frames: tuple[int, ...]  # numbers of the frames that are used, in order of time
    inputs = targets = None  # the frames that may be inputs and targets: any

    @property
    def names(self) -> list[str]:
        """What the views are called: the frames' numbers."""
        return [str(number) for number in self.frames]

    def row(self) -> dict:
        """What a list says of it, as plain data."""
        return {"category": self.category, "sequence": self.sequence, "index": self.index, "frames": self.frames}

    def settings(self) -> dict:
        """What it is, as plain data, pictures by their dates: equal ones say that nothing has changed."""
        return {"entry": self.row(), "pictures": co3d.stamp(self.root, self.category, self.sequence, self.frames)}

    def load(self, size: int, cut: bool = True) -> Scene:
        """All views, `size` pixels a side: always cut to the object, for the format knows no others."""
        return co3d.load_sequence(self.root, self.category, self.sequence, size, self.frames)

    def at(self, positions: list[int]) -> CO3DSequence:
        """The same with some of its frames."""
        return replace(self, frames=tuple(self.frames[i] for i in positions))


def paper_list(root: str | Path, category: str) -> list[CO3DSequence]:
    """The sequences of a category that the paper's protocol evaluates, in order of their names.

    A tree without the set list counts with all its frames, which one line says. Raises `ValueError` where none is left.
    """
    entries = _entries(root, category, available(root, category, EVALUATION), TOO_FEW, FRAMES)
    if not entries:
        raise ValueError(f"{root}/{category}: no sequence has more than {TOO_FEW} frames; --protocol all takes any")
    return entries


def whole_list(root: str | Path, category: str) -> list[CO3DSequence]:
    """Every sequence of a category with every usable frame. Raises `ValueError` where there is none."""
    entries = _entries(root, category, None, 0, None)
    if not entries:
        raise ValueError(f"{root}/{category}: no sequence has a usable frame")
    return entries


def _entries(root: str | Path, category: str, split: str | None, too_few: int,
             most: int | None) -> list[CO3DSequence]:
    """The sequences with more than `too_few` frames in a split, with at most `most` of these, evenly spaced."""
    # Places in the list are counted among the sequences that count.
    entries = []
    for name in co3d.sequences(root, category, split):
        numbers = co3d.frame_numbers(root, category, name, split)
        if len(numbers) > too_few:
            frames = [numbers[i] for i in evenly_spaced(len(numbers), most or len(numbers))]
            entry = CO3DSequence(Path(root), category, name, len(entries), tuple(frames))
            entries.append(entry)
    return entries


PROTOCOLS = {"paper": paper_list, "all": whole_list}


def available(root: str | Path, category: str, split: str) -> str | None:
    """The split if a tree has it, else None (all frames), and one line says so."""
    known = co3d.splits(root, category)
    if split in known:
        return split

    # Trees of one's own rarely have set lists.
    print(f"{root}/{category}: no set list with {split}; all frames of all sequences count")
    return None


def choose_views(count: int, views: int, seed: int) -> list[int]:
    """Positions of `views` input views among `count` frames, in random order [released: demo.py:63, 78-81]."""
    # On the CPU, whatever computes later: the choice must be the same everywhere.
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:views].tolist()


# ---------------------------------------------------------------------------------------------- files

def save_list(entries: list[CO3DSequence], path: str | Path) -> None:
    """Write a list as JSON."""
    files.save_json([entry.row() for entry in entries], path)


def read_list(path: str | Path, root: str | Path) -> list[CO3DSequence]:
    """The list in a file of `save_list`, of sequences below `root`. Raises `ValueError` with one line for anything
    else.
    """
    # Entries may be written by hand; a pipe would be waited for.
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = [_entry(row, Path(root)) for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a list of category, sequence, index and frames ({type(e).__name__})") from None
    if not entries:
        raise ValueError(f"{path}: an empty list")
    return entries


def _entry(row: dict, root: Path) -> CO3DSequence:
    """One row of a list. Raises `TypeError` or `ValueError` for anything that is none."""
    index = row["index"]
    frames = row["frames"]
    names = (row["category"], row["sequence"])
    if not all(name.isprintable() and len(name) <= files.LONGEST_PART for name in names):
        raise ValueError("category and sequence are names")
    if type(index) is not int or not 0 <= index < 2**31:
        raise ValueError("index is a place in a list")
    if not frames or not all(type(number) is int for number in frames):
        raise ValueError("a sequence has frames, which have numbers")
    return CO3DSequence(root, *names, index, tuple(frames))
