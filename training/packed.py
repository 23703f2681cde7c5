"""Sequences of a CO3D tree as training keeps them in memory: bytes at the size of a preset.

Shapes: `N` sequences, `V` views of one, `S` side of the square output in pixels.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cameras import Cameras, Scene, evenly_spaced
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
    frames: list[list[str]]  # N lists of V frame numbers

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, n: int) -> Scene:
        """Sequence number `n` as a scene."""
        rgba = self.rgba[n].float() / 255
        images = rgba[:, :3]
        masks = rgba[:, 3:]
        valid = self.valid[n].float()
        return Scene(images, masks, valid, self.cameras[n], self.frames[n], self.names[n])

    def to(self, device) -> PackedScenes:
        """The same scenes on another device."""
        cameras = self.cameras.to(device)
        return replace(self, rgba=self.rgba.to(device), valid=self.valid.to(device), cameras=cameras)


def load_packed(roots: list, category: str, names: list[str] | None, views: int, size: int,
                workers: int | None = None, split: str | None = None) -> PackedScenes:
    """`views` evenly spaced frames of each of the sequences `names` (None: all) of each of the folders `roots`.

    Of a `split` only, where a folder has it. Decoded by `workers` processes (None: one a core). Sequences with fewer
    frames are left out.
    """
    # Which frames of which sequences.
    jobs = []
    for root in roots:
        known = co3d.splits(root, category)
        found = _jobs(root, category, names, views, size, split if split in known else None)
        if not found:
            raise ValueError(f"{root}/{category}: no sequence has {views} frames")
        jobs += found

    # NumPy copies each sequence to its place: torch's threads would take the cores from the workers.
    rgba = np.empty((len(jobs), views, 4, size, size), np.uint8)
    valid = np.empty((len(jobs), views, 1, size, size), np.uint8)
    cameras = []
    decoded = map_processes(_decode_sequence, jobs, workers or os.cpu_count() or 1)
    for n, part in enumerate(Progress(decoded, f"reading {category}", total=len(jobs))):
        rgba[n], valid[n], views_of_one = part
        cameras.append(views_of_one.map(torch.from_numpy))

    names = [name for _, _, name, _, _ in jobs]
    frames = [[str(number) for number in numbers] for _, _, _, _, numbers in jobs]
    return PackedScenes(torch.from_numpy(rgba), torch.from_numpy(valid), Cameras.stack(cameras), names, frames)


def _jobs(root: str | Path, category: str, names: list[str] | None, views: int, size: int,
          split: str | None) -> list[tuple]:
    """Of the sequences under one root that have `views` frames, what `co3d.load_sequence` takes: root, category, name,
    size, and which of their frames.
    """
    jobs = []
    for name in co3d.sequences(root, category, split) if names is None else names:
        numbers = co3d.frame_numbers(root, category, name, split)
        if len(numbers) >= views:
            frames = [numbers[i] for i in evenly_spaced(len(numbers), views)]
            jobs.append((root, category, name, size, frames))
    return jobs


def _decode_sequence(job: tuple) -> tuple[np.ndarray, np.ndarray, Cameras]:
    """Colors and mask (V, 4, S, S) uint8, validity (V, 1, S, S) uint8 and cameras (V,) of the sequence of a job.

    In NumPy arrays, which travel between processes as bytes, where tensors hold files open.
    """
    scene = co3d.load_sequence(*job)
    rgba = torch.cat([scene.images, scene.masks], 1).mul(255).round().byte()
    return rgba.numpy(), scene.valid.byte().numpy(), scene.cameras.map(Tensor.numpy)
