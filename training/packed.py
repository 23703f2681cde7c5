"""Sequences of a CO3D tree as training keeps them in memory: bytes at the size of a preset.

Shapes: `N` sequences, `V` views of one, `S` side of the square output in pixels.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cameras import Cameras, evenly_spaced
from common.processes import map_processes
from common.progress import Progress
from datasets import co3d


@dataclass(frozen=True)
class PackedScenes:
    """N sequences with V views each, in bytes: what training keeps in memory. Colors are within 1/510 of `Scene`'s."""
    rgba: Tensor             # (N, V, 4, S, S) uint8: masked colors and soft mask, times 255
    valid: Tensor            # (N, V, 1, S, S) uint8, 0 or 1
    cameras: Cameras         # (N, V)
    names: list[str]         # N sequences

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device) -> PackedScenes:
        """The same scenes on another device."""
        cameras = self.cameras.to(device)
        return replace(self, rgba=self.rgba.to(device), valid=self.valid.to(device), cameras=cameras)


def load_packed(roots: list, category: str, views: int, size: int, workers: int | None = None,
                split: str | None = None) -> PackedScenes:
    """`views` evenly spaced frames of each sequence of a category in each of the folders `roots`.

    Of a `split` only, where a folder has it. Decoded by `workers` processes (None: one per core). Sequences with fewer
    frames are left out.
    """
    # Of each sequence what `co3d.load_sequence` takes, with its frames last.
    jobs = []
    for root in roots:
        before = len(jobs)
        known = split if split in co3d.splits(root, category) else None
        for name in co3d.sequences(root, category, known):
            numbers = co3d.frame_numbers(root, category, name, known)
            if len(numbers) >= views:
                frames = [numbers[i] for i in evenly_spaced(len(numbers), views)]
                jobs.append((root, category, name, size, frames))
        if len(jobs) == before:
            raise ValueError(f"{root}/{category}: no sequence has {views} frames")

    # NumPy copies each sequence to its place: torch's threads would take the cores from the workers.
    rgba = np.empty((len(jobs), views, 4, size, size), np.uint8)
    valid = np.empty((len(jobs), views, 1, size, size), np.uint8)
    cameras = []
    decoded = map_processes(_decode_sequence, jobs, workers or os.cpu_count() or 1)
    for n, part in enumerate(Progress(decoded, f"reading {category}", total=len(jobs))):
        rgba[n], valid[n], views_of_one = part
        cameras.append(views_of_one.map(torch.from_numpy))

    names = [name for _, _, name, _, _ in jobs]
    return PackedScenes(torch.from_numpy(rgba), torch.from_numpy(valid), Cameras.stack(cameras), names)


def _decode_sequence(job: tuple) -> tuple[np.ndarray, np.ndarray, Cameras]:
    """Colors and mask (V, 4, S, S) uint8, validity (V, 1, S, S) uint8 and cameras (V,) of the sequence of a job.

    In NumPy arrays, which travel between processes as bytes, where tensors hold files open.
    """
    scene = co3d.load_sequence(*job)
    rgba = torch.cat([scene.images, scene.masks], 1).mul(255).round().byte()
    return rgba.numpy(), scene.valid.byte().numpy(), scene.cameras.map(Tensor.numpy)
