"""Sequences of CO3D trees as training reads them: packed once into files that are mapped into memory.

    <cache>/sparsefusion/packed/<category>-<digest of the tree>/<frames>x<size>/<sequence>.pt

A pack has a sequence's frames in bytes at the size of a preset. It is made anew when the files change that it was made
from. Of any number of packs only what a step takes is read, and the processes of a machine share what the system keeps
of them in memory.

Shapes: `N` sequences, `V` views of one, which differ between sequences, `S` side of the square output in pixels.
"""
from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
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

FORMAT = 1     # layout of a pack; another number renews it
PARTS = ("R", "T", "focal", "principal")  # of cameras
TOLD = 3       # skipped frames that are told with their reasons


@dataclass(frozen=True)
class PackedScenes:
    """N sequences, mapped. Colors are within 1/510 of `Scene`'s."""
    pixels: list[Tensor]     # N of (V, 5, S, S) uint8: masked colors and soft mask, times 255; valid, 0 or 1
    cameras: list[Cameras]   # N of (V,)
    counts: Tensor           # (N,) V of every sequence
    sequences: list[tuple[Path, str, str]]  # N of root, category, name
    fingerprint: str         # of all pixels and cameras

    def __len__(self) -> int:
        return len(self.sequences)


class _Job(NamedTuple):
    """A sequence to pack."""
    file: Path         # the pack
    root: Path
    category: str
    name: str
    frames: list[int]  # numbers of the frames
    size: int          # S
    stamp: str         # of what the pack is made from


def load_packed(roots: list[Path], categories: list[str], views: int, size: int, least: int = 1,
                workers: int | None = None) -> PackedScenes:
    """At most `views` evenly spaced frames of each sequence of the categories in the folders `roots`, of the split for
    training where a folder has it.

    What is not packed yet is packed by `workers` processes (None: one per core). Frames that cannot be read are
    skipped, and sequences of which fewer than `least` remain; a line counts them. Raises `ValueError` where none is
    left, `FileNotFoundError` for a category that no folder has.
    """
    jobs = []
    for category in categories:
        homes = [root for root in roots if category in co3d.categories(root)]
        for root in homes or roots:  # where none has it, reading the first says so
            jobs += _jobs(Path(root), category, views, size)

    # What is missing or older than its sources.
    packs = [_open(job) for job in jobs]
    missing = [i for i, pack in enumerate(packs) if pack is None]
    made = map_processes(_pack, [jobs[i] for i in missing], workers or os.cpu_count() or 1)
    for i, _ in zip(missing, Progress(made, f"packing {', '.join(categories)}", total=len(missing)), strict=True):
        packs[i] = _open(jobs[i])

    # What cannot be used, by name.
    skipped = [reason for pack in packs for reason in pack["skipped"]]
    if skipped:
        print(f"frames skipped: {len(skipped)} ({'; '.join(skipped[:TOLD])}{'; ...' if skipped[TOLD:] else ''})")
    kept = [i for i, pack in enumerate(packs) if len(pack["pixels"]) >= least]
    if not kept:
        raise ValueError(f"{', '.join(map(str, roots))}: no sequence of {', '.join(categories)} has {least} frames "
                         f"that can be read{': ' + skipped[0] if skipped else ''}")
    if len(kept) < len(jobs):
        print(f"sequences skipped, with fewer than {least} frames: {len(jobs) - len(kept)}")

    pixels = [packs[i]["pixels"] for i in kept]
    cameras = [Cameras(*(packs[i]["cameras"][part] for part in PARTS)) for i in kept]
    counts = torch.tensor([len(x) for x in pixels])
    digest = hashlib.sha256(" ".join(packs[i]["digest"] for i in kept).encode()).hexdigest()[:16]
    return PackedScenes(pixels, cameras, counts, [jobs[i][1:4] for i in kept], digest)


def _jobs(root: Path, category: str, views: int, size: int) -> list[_Job]:
    """The sequences of a category in a tree, and which of their frames are packed where."""
    split = available(root, category, TRAINING)
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    folder = files.cache_folder() / "packed" / f"{files.safe_name(category)}-{digest}" / f"{views}x{size}"

    jobs = []
    for name in co3d.sequences(root, category, split):
        numbers = co3d.frame_numbers(root, category, name, split)
        frames = [numbers[i] for i in evenly_spaced(len(numbers), views)]
        stamp = json.dumps([FORMAT, frames, co3d.stamp(root, category, name, frames)])
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
    scenes = []
    skipped = []
    for frame in job.frames:
        try:
            scenes.append(co3d.load_sequence(job.root, job.category, job.name, job.size, [frame]))
        except (OSError, ValueError) as e:
            skipped.append(str(e))

    # Bytes of the frames one after the other; of none, none.
    pixels = torch.zeros(len(scenes), 5, job.size, job.size, dtype=torch.uint8)
    for frame, scene in zip(pixels, scenes):
        frame[:3] = scene.images[0].mul(255).round()
        frame[3:4] = scene.masks[0].mul(255).round()
        frame[4:] = scene.valid[0]
    cameras = {part: torch.cat([getattr(scene.cameras, part) for scene in scenes] or [torch.zeros(0)])
               for part in PARTS}
    files.save_tensors({"pixels": pixels, "cameras": cameras, "digest": files.digest(pixels, *cameras.values()),
                        "skipped": skipped, "stamp": job.stamp}, job.file)
