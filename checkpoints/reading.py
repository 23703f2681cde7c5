"""Weights that others wrote, read without running anything they name.

A PyTorch checkpoint is a pickle beside raw numbers, and a pickle is a program: it may import and call anything. Here it
gets tensors and plain data; a class or function of a framework becomes an inert stand-in, whether that framework is
installed or not; and a file that names what no checkpoint needs (`os.system`, `eval`, `getattr`, ...) is refused. A
`.safetensors` file is a JSON header and raw numbers, and may only lie about sizes.
"""
from __future__ import annotations

import json
import math
import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor


# ---------------------------------------------------------------------------------------------- PyTorch checkpoints

class Inert:
    """Stands for a foreign class or function in a pickle: takes any arguments, state or items, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(*args):
        pass

    append = extend = add = __setitem__ = __setstate__


class Rebuild:
    """torch's `_rebuild_tensor_v2`, and for a tensor `_rebuild_parameter`, without their hooks.

    No function, because a pickle could set its attributes.
    """
    __slots__ = ()

    def __call__(self, first, *rest) -> Tensor:
        if isinstance(first, Tensor):
            return first
        return torch._utils._rebuild_tensor(first, *rest[:3])


class TensorUnpickler(pickle.Unpickler):
    """An unpickler of tensors and plain data."""

    # What a pickle really gets (beside storages, which `torch.load` takes care of).
    REAL = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor": Rebuild(),
        "torch._utils._rebuild_tensor_v2": Rebuild(),
        "torch._utils._rebuild_parameter": Rebuild(),
    }

    # A framework that is not here cannot be called: nobody gains by naming it. These packages are here: only data.
    PRESENT = sys.stdlib_module_names | {"torch", "numpy", "PIL"}
    DATA = (
        r"builtins\.(object|int|float|bool|complex|str|bytes|bytearray|tuple|list|dict|set|frozenset|slice|range)",
        r"(collections|typing|datetime)\.\w+",
        r"(pathlib|argparse|uuid|decimal|fractions)\.[A-Z]\w+",
        r"copyreg\._reconstructor|_codecs\.encode",
        r"numpy\.(dtype|ndarray|bool_?|(float|u?int|complex)\d+)",
        r"numpy\._?core\.multiarray\.(scalar|_reconstruct)",
        r"torch\.(Size|device|bool|half|double|long|(b?float|u?int)\d+)",
        r"torch\.(nn|optim)\.([a-z]\w*\.)*[A-Z]\w*",
    )

    def find_class(self, module: str, name: str):
        """What the pickle gets for a name: the real thing if it is in `REAL`, else an inert class of that name."""
        module = IMPORT_MAPPING.get(module, module)  # Python 2's names of modules -> Python 3's
        full = f"{module}.{name}"
        if full in self.REAL:
            return self.REAL[full]

        # What could be called here must be known to be data; and even then it is only pretended.
        present = full.split(".")[0] in self.PRESENT
        if present and not any(re.fullmatch(pattern, full) for pattern in self.DATA):
            raise ValueError(f"it names {full}, which no weights need and which could run code")
        return type(name, (Inert,), {})


class TensorPickle:
    """What `torch.load` takes for the module `pickle`."""
    Unpickler = TensorUnpickler

    @staticmethod
    def load(file, **options):
        """What the file holds, foreign objects inert."""
        return TensorUnpickler(file, **options).load()


def read_pickled(path: Path) -> dict:
    """A PyTorch checkpoint, of today's zip format or the one before, as a dict on the CPU; foreign objects are inert.

    Tensors of a zip are mapped: only those that are used are read from the disk.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    zipped = start == b"PK\3\4"
    try:
        # A TorchScript program is a zip as well, and torch would load it as one.
        if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise ValueError("it is a TorchScript program")
        if not zipped and start[:1] != b"\x80":
            raise ValueError("it begins like no such file")

        data = torch.load(str(path), map_location="cpu", pickle_module=TensorPickle, weights_only=False, mmap=zipped)
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__} instead of a dict")
        return dict(data)
    except Exception as e:  # broken bytes raise nearly anything
        raise ValueError(f"{path}: not a PyTorch checkpoint of weights: {_reason(e)}") from None


def _reason(e: Exception) -> str:
    """What went wrong, in less than a line, printable."""
    text = ascii(str(e).strip().split("\n")[0][:200])[1:-1]
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
        if begin > size:
            raise ValueError(f"its header would end at byte {begin}")
        header = json.loads(bytes(data[8:begin].numpy()))
        header.pop("__metadata__", None)

        # Each tensor begins where the one before ended, and has as many bytes as its shape needs.
        end = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype = DTYPES[entry["dtype"]]
            shape = entry["shape"]
            start, stop = entry["data_offsets"]
            right_size = min(shape, default=0) >= 0 and stop - start == math.prod(shape) * dtype.itemsize
            if start != end or begin + stop > size or not right_size:
                found = f"{entry['dtype']} {tuple(shape)}"
                raise ValueError(f"key {key!r}, {found}, would be in bytes {start} to {stop} of {size - begin}")
            tensors[key] = data[begin + start:begin + stop].clone().view(dtype).reshape(shape)
            end = stop
        if begin + end != size:
            raise ValueError(f"the last tensor ends at byte {begin + end}")
    except Exception as e:  # a header may be any JSON
        raise ValueError(f"{path}: not a complete safetensors file of {size} bytes: {_reason(e)}") from None
    return tensors


def read(path: str | Path, entry: str | None) -> tuple[dict, list[str]]:
    """The state dict in a file of either format, and the names of what stands beside it.

    In a pickled file it is under `entry`; without one, it is the file. Raises `FileNotFoundError` or `ValueError`.
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
    state = data if entry is None else data.get(entry)
    if not isinstance(state, dict):
        found = ", ".join(map(repr, list(data)[:8])) or "nothing"
        raise ValueError(f"{path}: expected a state dict under {entry!r}, found {found}")
    beside = [] if entry is None else [ascii(key).strip("'") for key in data if key != entry]
    return {str(key): value for key, value in dict.items(state)}, beside
