"""Files that survive an interruption, and weights that are read without running anything in them.

Everything this program writes goes to a temporary name first and is then renamed: a killed run leaves the old file or
the new one, never half of one. Checkpoints of this program are dictionaries of tensors and plain data; they load with
`weights_only=True`. (Checkpoints that strangers wrote, with classes of theirs inside, are `released.py`'s.)
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` when the block ends, and is removed if the block
    fails.

    Folders on the way are made. The ending is kept, because writers of pictures go by it.
    """
    path = Path(path)
    # The process is in the name, so that two runs do not write into one another's file.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(data: dict, path: str | Path) -> None:
    """Write a dictionary of tensors and plain data, for `read_tensors`.

    The file is opened here, because torch's own writer raises no `OSError` where a folder cannot be written.
    """
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        torch.save(data, file)


def save_json(data, path: str | Path) -> None:
    """Write plain data as indented JSON. Raises `ValueError` for a number that JSON does not have (infinity, NaN)."""
    text = json.dumps(data, indent=1, allow_nan=False)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n")


def read_tensors(path: str | Path, entry: str = "weights") -> dict:
    """The dictionary in a file of `save_tensors`, on the CPU; it must have a dictionary under `entry`. Nothing in it
    is run.

    Tensors are mapped: only what is used is read from the disk. Raises `FileNotFoundError` or `ValueError` with one
    line.
    """
    # Only what torch can read without running anything, mapped into memory.
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # broken bytes raise nearly anything
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({type(e).__name__})") from None

    # A checkpoint, but of this program?
    if not isinstance(data, dict) or not isinstance(data.get(entry), dict):
        raise ValueError(f"{path}: not a checkpoint of this program with {entry!r} in it "
                         "(released files go through `sparsefusion.py convert` first)")
    return data


def fingerprint(path: str | Path) -> str:
    """Sixteen hexadecimal digits that tell this file's content from any other's (SHA-256)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def digest(*tensors: torch.Tensor) -> str:
    """Sixteen hexadecimal digits that tell these numbers from any others (SHA-256)."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
