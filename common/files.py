"""Files that survive an interruption, and weights that are read without running anything in them.

Everything this program writes goes to a temporary name first and is then renamed: a killed run leaves the old file or
the new one, never half of one. Checkpoints of this program are dictionaries of tensors and plain data; they load with
`weights_only=True`. (Checkpoints that strangers wrote, with classes of theirs inside: `checkpoints/reading.py`.)
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import torch

PIECE = 2**26  # bytes of a file that have a digest of their own
READ = 2**20   # of them, that are read at once


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
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises `ValueError` with one line for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not a JSON file; delete it or choose another folder") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not a JSON object; delete it or choose another folder")
    return data


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
    mapped = os.name != "nt"  # what is mapped cannot be replaced on Windows
    try:
        data = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as e:  # broken bytes raise nearly anything
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({type(e).__name__})") from None

    # A checkpoint, but of this program?
    if not isinstance(data, dict) or not isinstance(data.get(entry), dict):
        raise ValueError(f"{path}: not a checkpoint of this program with {entry!r} in it "
                         "(released files go through `python -m checkpoints.convert` first)")
    return data


def fingerprint(path: str | Path) -> str:
    """Sixteen hexadecimal digits that tell this file's content from any other's: SHA-256, of a file above 64 MiB that
    of its pieces' digests.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    status = os.stat(path)
    return _fingerprint(str(path), status.st_mtime_ns, status.st_size)


@lru_cache
def _fingerprint(path: str, date: int, size: int) -> str:
    """Gigabytes are read once, as long as date and size stay, and by several threads."""
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(partial(_digest_of_piece, path), range(0, max(size, 1), PIECE)))
    if len(digests) == 1:
        return digests[0].hex()[:16]
    return hashlib.sha256(b"pieces" + b"".join(digests)).hexdigest()[:16]


def _digest_of_piece(path: str, first: int) -> bytes:
    """SHA-256 of a file's bytes from the first one on."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(first)
        for _ in range(PIECE // READ):
            total.update(file.read(READ))
    return total.digest()


def digest(*tensors: torch.Tensor) -> str:
    """Sixteen hexadecimal digits that tell these numbers from any others (SHA-256)."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- names and settings

DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}  # of Windows
LONGEST_NAME = 70  # characters


def safe_name(name: str) -> str:
    """A name that came with data as a name of one file or folder on any system, whatever it was.

    Most are so already. Any other, such as "", ".." or "a/b", is spelled otherwise, with a digest that keeps different
    names different.
    """
    spelled = re.sub(r"[^\w.+@=, ()\[\]-]", "_", name)
    spelled = spelled.strip(". ")[:LONGEST_NAME]
    device = spelled.partition(".")[0].strip().lower() in DEVICES
    if spelled == name and name and not device:
        return name

    # Windows looks at what stands before the first dot.
    digits = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    spelled = spelled.replace(".", "_")
    return f"{spelled}_{digits}"


def differences(found, wanted, most: int = 3) -> str:
    """What differs between two settings, plain data, in words: "seed differ: 0 there, 1 here"; "" for nothing."""
    # By name, as JSON has them, which knows no tuples.
    found = _flat(json.loads(json.dumps(found, default=str)))
    wanted = _flat(json.loads(json.dumps(wanted, default=str)))
    paths = list(dict.fromkeys([*wanted, *found]))
    paths = [path for path in paths if found.get(path) != wanted.get(path)]
    if not paths:
        return ""

    # The names of the parts first.
    parts = dict.fromkeys(path.partition(".")[0] for path in paths)
    names = ", ".join(parts)

    # Then some of the values.
    values = []
    for path in paths[:most]:
        there = _short(found.get(path))
        here = _short(wanted.get(path))
        values.append(f"{path} is {there} there, {here} here")
    if len(paths) > most:
        values.append("...")
    return f"{names} differ: {', '.join(values)}"


def _flat(data, path: str = "") -> dict:
    """Nested dictionaries as one: dotted path -> value."""
    # Whatever is no dictionary is a value.
    if not isinstance(data, dict):
        return {path: data}
    flat = {}
    for name, value in data.items():
        flat.update(_flat(value, f"{path}.{name}" if path else name))
    return flat


def _short(value) -> str:
    """A value for one line."""
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
