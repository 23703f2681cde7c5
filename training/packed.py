"""Sequences of CO3D trees, and own photographs, as training reads them: packed once into files that are mapped into
memory.

    <cache>/sparsefusion/packed/<category>-<digest of the tree>/<frames>x<size>/<sequence>.pt

A pack has a sequence's frames in bytes at the size of a preset. It is made anew when the files change that it was made
from. Of any number of packs only what a step takes is read, and the processes of a machine share what the system keeps
of them in memory.

Shapes: `N` sequences, `V` views of one, which differ between sequences, `S` side of the square output in pixels.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cameras import Cameras, evenly_spaced
from common import files
from common.processes import map_processes
from common.progress import Progress
from datasets import co3d
from datasets.protocol import TRAINING, available
from photographs.reading import read_capture

FORMAT = 1     # layout of a pack; another number renews it
PHOTOGRAPHS = "photographs"  # what stands for the category of own ones
PARTS = ("R", "T", "focal", "principal")  # of cameras
TOLD = 3       # skipped frames that are told with their reasons
SHARE = 8      # sequences, fewer of which are packed sooner than another process begins
HELD_OUT = 8   # sequences that are never trained on, at most; and one of so many


@dataclass(frozen=True)
class PackedScenes:
    """N sequences, mapped. Colors are within 1/510 of `Scene`'s."""
    pixels: list[Tensor]     # N of (V, 5, S, S) uint8: masked colors and soft mask, times 255; valid, 0 or 1
    cameras: list[Cameras]   # N of (V,)
    counts: Tensor           # (N,) V of every sequence
    sequences: list[tuple[Path, str, str]]  # N of root, category, name
    fingerprint: str         # of all pixels and cameras
    drawn: Tensor            # (M,) indices of the sequences that batches take: those to train on

    def __len__(self) -> int:
        return len(self.sequences)

    def held_out(self) -> PackedScenes | None:
        """The same, of which batches take what is held out instead; None where nothing is."""
        rest = sorted(set(range(len(self))) - set(self.drawn.tolist()))
        return replace(self, drawn=torch.tensor(rest)) if rest else None


class _Job(NamedTuple):
    """A sequence to pack."""
    file: Path         # the pack
    root: Path         # of its tree; of own photographs their folder
    category: str      # `PHOTOGRAPHS` of own ones
    name: str
    frames: list[int]  # numbers of the frames; positions of own photographs
    size: int          # S
    stamp: str         # of what the pack is made from


def load_packed(roots: list[Path], categories: list[str], views: int, size: int, least: int = 1,
                captures: Sequence[Path] = (), workers: int | None = None) -> PackedScenes:
    """At most `views` evenly spaced frames of each sequence of the categories in the folders `roots`, of the split for
    training where a folder has it, and of the own photographs in each of the folders `captures`.

    What is not packed yet is packed by `workers` processes (None: as many as pay, one per core at most). Frames that
    cannot be read are skipped, and sequences of which fewer than `least` remain; a line counts them. Raises
    `ValueError` where none is left, `FileNotFoundError` for a category that no folder has.
    """
    jobs = []
    for folder in captures:
        jobs += _jobs(Path(folder), PHOTOGRAPHS, views, size)
    for category in categories if roots else ():
        homes = [root for root in roots if category in co3d.categories(root)]
        for root in homes or roots:  # where none has it, reading the first says so
            jobs += _jobs(Path(root), category, views, size)

    # What is missing or older than its sources.
    packs = [_open(job) for job in jobs]
    missing = [i for i, pack in enumerate(packs) if pack is None]
    workers = workers or min(os.cpu_count() or 1, math.ceil(len(missing) / SHARE))
    made = map_processes(_pack, [jobs[i] for i in missing], workers)
    for i, _ in zip(missing, Progress(made, "packing sequences", total=len(missing)), strict=True):
        packs[i] = _open(jobs[i])

    # What cannot be used, by name.
    skipped = [reason for pack in packs for reason in pack["skipped"]]
    if skipped:
        print(f"frames skipped: {len(skipped)} ({'; '.join(skipped[:TOLD])}{'; ...' if skipped[TOLD:] else ''})")
    kept = [i for i, pack in enumerate(packs) if len(pack["pixels"]) >= least]
    if not kept:
        raise ValueError(f"{', '.join(map(str, [*roots, *captures]))}: no sequence of {', '.join(categories)} has "
                         f"{least} frames that can be read{': ' + skipped[0] if skipped else ''}")
    if len(kept) < len(jobs):
        print(f"sequences skipped, with fewer than {least} frames: {len(jobs) - len(kept)}")

    pixels = [packs[i]["pixels"] for i in kept]
    cameras = [Cameras(*(packs[i]["cameras"][part] for part in PARTS)) for i in kept]
    counts = torch.tensor([len(x) for x in pixels])
    digest = hashlib.sha256(" ".join(packs[i]["digest"] for i in kept).encode()).hexdigest()[:16]
    sequences = [jobs[i][1:4] for i in kept]
    return PackedScenes(pixels, cameras, counts, sequences, digest, _trained_on(sequences))


def _trained_on(sequences: list[tuple[Path, str, str]]) -> Tensor:
    """Indices of the sequences that are not held out: one of every eight is, at most eight, by a digest of their names.

    So whatever is trained on the same data, the VAE and the prior, holds out the same ones; and when data of 64
    sequences or more grow, none is held out that was trained on before.
    """
    order = sorted(range(len(sequences)), key=lambda i: hashlib.sha256(repr(sequences[i][1:]).encode()).digest())
    return torch.tensor(sorted(order[min(len(order) // HELD_OUT, HELD_OUT):]))


def _jobs(root: Path, category: str, views: int, size: int) -> list[_Job]:
    """The sequences of a category in a tree, or own photographs, and which of their frames are packed where."""
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    folder = files.cache_folder() / "packed" / f"{files.safe_name(category)}-{digest}" / f"{views}x{size}"

    # Of own photographs those that are named as targets are not trained on.
    if category == PHOTOGRAPHS:
        photographs = read_capture(root)
        found = {photographs.sequence: photographs.inputs or list(range(len(photographs.names)))}
    else:
        split = available(root, category, TRAINING)
        names = co3d.sequences(root, category, split)
        found = {name: co3d.frame_numbers(root, category, name, split) for name in names}

    jobs = []
    for name, numbers in found.items():
        frames = [numbers[i] for i in evenly_spaced(len(numbers), views)]
        sources = photographs.settings() if category == PHOTOGRAPHS else co3d.stamp(root, category, name, frames)
        stamp = json.dumps([FORMAT, frames, sources])
        jobs.append(_Job(folder / f"{files.safe_name(name)}.pt", root, category, name, frames, size, stamp))
    return jobs


def _open(job: _Job) -> dict | None:
    """The pack of a sequence, mapped; None where there is none of these frames as they are now."""
    try:
        pack = files.read_tensors(job.file, "cameras")
    except (FileNotFoundError, ValueError):
        return None
    return pack if pack.get("stamp") == job.stamp else None


def _pack(job: _Job) -> None:
    """Write the pack of a sequence: of every frame that can be read colors, mask, valid region and camera."""
    # Own photographs decide on their world together: all can be read, or none.
    own = job.category == PHOTOGRAPHS
    scenes = []
    skipped = []
    for frames in [job.frames] if own else [[frame] for frame in job.frames]:
        try:
            scenes.append(read_capture(job.root).at(frames).load(job.size) if own else
                          co3d.load_sequence(job.root, job.category, job.name, job.size, frames))
        except (OSError, ValueError) as e:
            skipped.append(str(e))

    # Bytes of the frames one after the other; of none, none.
    layers = [torch.cat([scene.images * 255, scene.masks * 255, scene.valid], 1).round().byte() for scene in scenes]
    pixels = torch.cat(layers or [torch.zeros(0, 5, job.size, job.size, dtype=torch.uint8)])
    cameras = {part: torch.cat([getattr(scene.cameras, part) for scene in scenes] or [torch.zeros(0)])
               for part in PARTS}
    files.save_tensors({"pixels": pixels, "cameras": cameras, "digest": files.digest(pixels, *cameras.values()),
                        "skipped": skipped, "stamp": job.stamp}, job.file)
