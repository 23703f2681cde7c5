"""Weights that others wrote, read without running anything they name.

A PyTorch checkpoint is a pickle beside raw numbers, and a pickle is a program: it may import and call anything. Here
torch's reader for weights alone gets tensors and plain data; a class or function of a framework becomes an inert
stand-in, whether that framework is installed or not; and a file that names what no checkpoint needs (`os.system`,
`eval`, `getattr`, ...) is refused. A `.safetensors` file is a JSON header and raw numbers, and may only lie about
sizes.
"""
from __future__ import annotations

import json
import re
import sys
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from common import files


# ---------------------------------------------------------------------------------------------- PyTorch checkpoints

class Inert:
    """Stands for a foreign class or function in a pickle: takes any arguments, and gives a dictionary that takes any
    items or attributes.
    """

    def __new__(cls, *args):
        return OrderedDict()


class InertNumbers:
    """The same for NumPy's, which take a state that is no dictionary."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# A framework that is not here cannot be called: naming it has no effect. Of these packages, which are here, a
# checkpoint may name data; it gets a stand-in for them, too.
PRESENT = sys.stdlib_module_names | {"torch", "numpy", "PIL"}
DATA = re.compile(
    r"builtins\.(object|int|float|bool|str|bytes|tuple|list|dict|frozenset|slice|range)"
    r"|(collections|typing|datetime)\.\w+"
    r"|(pathlib|argparse|uuid|decimal|fractions)\.[A-Z]\w+"
    r"|numpy\.(dtype|ndarray|bool_?|(float|u?int|complex)\d+)"
    r"|copyreg\._reconstructor|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
    r"|torch\.(nn|optim)\.([a-z]\w*\.)*[A-Z]\w*"
)


def read_pickled(path: Path) -> dict:
    """A PyTorch checkpoint as a dict on the CPU, foreign objects inert; one of the format before zip files only where
    it names nothing but tensors and plain data.

    Tensors of a zip are mapped: only those that are used are read from the disk. Raises `ValueError` with one line.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"
    try:
        # What could be called here must be known to be data; and even then it is only pretended.
        names = get_unsafe_globals_in_checkpoint(str(path)) if zipped else []
        for name in names:
            package, _, rest = name.partition(".")
            package = IMPORT_MAPPING.get(package, package)  # Python 2's name -> Python 3's
            if package.split(".")[0] in PRESENT and not DATA.fullmatch(f"{package}.{rest}"):
                raise ValueError(f"it names {name}, which no weights need and which could run code")

        stand_ins = [(InertNumbers if name.startswith("numpy.") else Inert, name) for name in names]
        with safe_globals(stand_ins):
            data = files.load(path, zipped)
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__} instead of a dict")
        return dict(data)
    except Exception as e:  # broken bytes raise nearly anything
        raise ValueError(f"{path}: not a PyTorch checkpoint of weights: {_reason(e)}") from None


def _reason(e: Exception) -> str:
    """What went wrong, in less than a line, printable."""
    # torch puts it behind what it advises, which is to trust the file, and before a link.
    lines = [line for line in str(e).strip().split("\n") if line and not line.startswith("Check the documentation")]
    text = lines[-1].split("error: ")[-1].split(" Please use")[0] if lines else ""
    text = ascii(text[:200])[1:-1]
    return text if type(e) is ValueError else f"{type(e).__name__} {text}"


# ---------------------------------------------------------------------------------------------- safetensors

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64,   "I32": torch.int32,   "I16": torch.int16,   "I8": torch.int8,       "U8": torch.uint8,
}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file: the header's length, the header in JSON, the numbers without gaps."""
    size = path.stat().st_size
    tensors = {}
    try:
        # The header says the type, the shape and the place of every tensor.
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)  # mapped, not read
        begin = 8 + int.from_bytes(data[:8].tolist(), "little")
        header = json.loads(bytes(data[8:begin].numpy()))
        header.pop("__metadata__", None)

        # Each tensor begins where the one before ended, and has as many bytes as its shape needs.
        end = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            if start != end:
                raise ValueError(f"key {key!r} begins at byte {start} instead of {end}")
            numbers = data[begin + start:begin + stop].clone().view(DTYPES[entry["dtype"]])
            tensors[key] = numbers.reshape(entry["shape"])
            end = stop
        if begin + end != size:
            raise ValueError(f"the last tensor ends at byte {begin + end}")
    except Exception as e:  # a header may be any JSON
        raise ValueError(f"{path}: not a complete safetensors file of {size} bytes: {_reason(e)}") from None
    return tensors


def read(path: str | Path, entry: str | None) -> tuple[dict, list[str]]:
    """The state dict in a file of either format, and the names of what stands beside it.

    In a pickled file it is under `entry`, or it is the file. Raises `FileNotFoundError` or `ValueError`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")

    # The ninth byte of a safetensors file is where the JSON begins.
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return read_safetensors(path), []

    # A checkpoint has training state beside the weights.
    data = read_pickled(path)
    bare = entry is None or data and all(isinstance(value, Tensor) for value in data.values())
    state = data if bare else data.get(entry)
    if not isinstance(state, dict):
        found = ", ".join(map(repr, list(data)[:8])) or "nothing"
        raise ValueError(f"{path}: expected a state dict under {entry!r}, found {found}")
    beside = [] if bare else [ascii(key).strip("'") for key in data if key != entry]
    return {str(key): value for key, value in dict.items(state)}, beside
