"""Files that survive an interruption, and weights that are read without running anything in them.

Everything this program writes goes to a temporary name first and is then renamed: a killed run leaves the old file or
the new one, never half of one. Checkpoints of this program are dictionaries of tensors and plain data; they load with
`weights_only=True`. (Checkpoints that strangers wrote, with classes of theirs inside: `checkpoints/reading.py`.)
"""
from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

MACHINE = re.sub(r"\W", "_", platform.node())[:32]
TEMPORARY = re.compile(rf"\..*\.{MACHINE}-(\d{{1,9}})\.part(\..*)?", re.DOTALL)  # names of `write_atomically`
REPEATED = 2**32  # bytes of a tensor that repeat others of its file, at most


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` when the block ends, and is removed if the block
    fails.

    Folders on the way are made. The ending is kept, because writers of pictures go by it. Raises `OSError` with `path`
    for what the system refuses within, such as writing to a full disk, and where `path` is no regular file: a device
    would be replaced.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "no regular file, so it is not replaced", str(path))

    # Machine and process are in the name, so that two runs do not write into one another's file.
    temporary = path.with_name(f".{path.stem}.{MACHINE}-{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_writable(path: str | Path) -> None:
    """Raises `OSError` where a file cannot be written, before the work whose outcome it will be."""
    with suppress(EOFError), write_atomically(path) as temporary:
        temporary.touch()
        raise EOFError  # so it is removed again


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in a folder whose processes, on this machine, were killed."""
    for file in folder.iterdir():
        found = TEMPORARY.fullmatch(file.name)
        if not found or os.name == "nt":  # where to ask for a process is to stop it
            continue
        with suppress(OSError):
            try:
                os.kill(int(found[1]), 0)
            except ProcessLookupError:
                file.unlink()


def save_tensors(data: dict, path: str | Path) -> None:
    """Write a dictionary of tensors and plain data, for `read_tensors`.

    The file is opened here, because torch's own writer raises no `OSError` where a folder cannot be written, and hides
    one that comes up later.
    """
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(data, file)
        except RuntimeError as e:
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def save_json(data, path: str | Path) -> None:
    """Write plain data as indented JSON. Raises `ValueError` for a number that JSON does not have (infinity, NaN)."""
    save_bytes((json.dumps(data, indent=1, allow_nan=False) + "\n").encode(), path)


def save_bytes(content: bytes, path: str | Path) -> None:
    """Write a file that is in memory."""
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises `ValueError` with one line for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not a JSON object; delete it or choose another folder")
    return data


def load(path: str | Path, mapped: bool) -> object:
    """The tensors and plain data of a file that torch wrote, on the CPU, `mapped` into memory or read; nothing in it is
    run. Raises nearly anything where its bytes are broken.
    """
    with warnings.catch_warnings(action="ignore"):  # of sparse tensors, which nothing here takes
        data = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)

    # A few bytes can stand for any amount of memory, since a tensor may repeat its numbers. Nothing here is complex.
    # (A container may hold others many times, or itself.)
    waiting = [("it", data)]
    looked_into = set()
    for name, x in waiting:
        if isinstance(x, (dict, list, tuple)):
            if id(x) not in looked_into:
                looked_into.add(id(x))
                waiting += x.items() if isinstance(x, dict) else ((name, item) for item in x)
        elif isinstance(x, Tensor) and x.is_complex():
            raise TypeError(f"{name!s:.80} is made of {x.dtype}")
        elif isinstance(x, Tensor) and x.layout is torch.strided and x.nbytes > x.untyped_storage().nbytes() + REPEATED:
            raise TypeError(f"{name!s:.80} has {x.nbytes / 1e9:.0f} GB that the file does not hold")
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
        data = load(path, mapped)
    except Exception as e:  # broken bytes raise nearly anything
        reason = " ".join(str(e).split())[:120] if isinstance(e, TypeError) else type(e).__name__
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({reason})") from None

    # A checkpoint, but of this program?
    if not isinstance(data, dict) or not isinstance(data.get(entry), dict):
        raise ValueError(f"{path}: not a checkpoint of this program with {entry!r} in it "
                         "(released files go through `python -m checkpoints.convert` first)")
    return data


def cache_folder() -> Path:
    """The user's folder for what can be made again: `$XDG_CACHE_HOME/sparsefusion`, by default below `~/.cache`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home.absolute() / "sparsefusion"


def fingerprint(path: str | Path) -> str:
    """Sixteen hexadecimal digits that tell this file's content from any other's (SHA-256)."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    status = os.stat(path)
    return _fingerprint(str(path), status.st_mtime_ns, status.st_size)


@lru_cache
def _fingerprint(path: str, date: int, size: int) -> str:
    """Gigabytes are read once, as long as date and size stay."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def digest(*tensors: torch.Tensor) -> str:
    """Sixteen hexadecimal digits that tell these numbers from any others (SHA-256)."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- names

DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)\d)\s*(\.|$)", re.IGNORECASE)  # of Windows, whatever its ending
LONGEST_NAME = 70  # characters


def safe_name(name: str) -> str:
    """A name that came with data as a name of one file or folder on any system, whatever it was.

    Most are so already. Any other, such as "", ".." or "a/b", is spelled otherwise, with a digest that keeps different
    names different.
    """
    spelled = re.sub(r"[^\w.+@=, ()\[\]-]", "_", name)
    spelled = spelled.strip(". ")[:LONGEST_NAME]
    if spelled == name and name and not DEVICE.match(name):
        return name

    # Windows looks at what stands before the first dot.
    digits = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    spelled = spelled.replace(".", "_")
    return f"{spelled}_{digits}"


LONGEST_PART = 255   # bytes of a file's or a folder's name, as nearly all file systems have it
LONGEST_PATH = 2048  # characters of a path in a file


def below(root: Path, name: object, where: str | Path) -> Path:
    """A path that a file gives, which has to stay below `root`. Raises `ValueError` with `where` it stands."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: {name!r:.40} is no name of a file")
    parts = name.replace("\\", "/").split("/")  # (by pathlib this takes a fifth of the opening of 50,000 frames)
    if len(name) > LONGEST_PATH or any(len(part.encode(errors="surrogatepass")) > LONGEST_PART for part in parts):
        raise ValueError(f"{where}: {name!r:.40}... is too long for a name of a file")
    if not parts[0] or ".." in parts or ":" in parts[0]:
        raise ValueError(f"{where}: {name!r} leads out of the folder {root}")
    return root / "/".join(parts)


def check_weights(weights: dict[str, Tensor], module: nn.Module) -> None:
    """Raises `ValueError` that names the first of the weights of a module which is not made of finite numbers of its
    kind: floating point or whole.
    """
    kinds = {name: x.is_floating_point() for name, x in module.state_dict().items()}
    for name, x in weights.items():
        if x.is_floating_point() != kinds.get(name, x.is_floating_point()):
            raise ValueError(f"{name} is made of {x.dtype}")
        if not x.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
