"""Weights that others wrote: read without running anything they name, and matched key by key (Sec. 4's released models).

Two formats. A PyTorch checkpoint is a pickle beside raw numbers, and a pickle is a program: it may import and call anything. Here it
gets tensors and plain data; a class or function of a framework becomes an inert stand-in, whether that framework is installed or not;
and a file that names what no checkpoint needs (`os.system`, `eval`, `getattr`, ...) is refused. A `.safetensors` file is a JSON header
and raw numbers, and may only lie about sizes.

Matching: a network's released names become ours by a table of rules, (pattern, replacement) substituted in order in every name. What is
missing, left over or of another shape ends in one line that lists it under its released name; nothing is dropped silently.
"""
from __future__ import annotations

import json
import math
import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterable
from os.path import commonprefix
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

Rules = list[tuple[str, str]]

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
        return first if isinstance(first, Tensor) else torch._utils._rebuild_tensor(first, *rest[:3])


class TensorUnpickler(pickle.Unpickler):
    """An unpickler of tensors and plain data."""
    REAL = {"collections.OrderedDict": OrderedDict,  # and storages, which `torch.load` takes care of
            **{f"torch._utils._rebuild_{what}": Rebuild() for what in ("tensor", "tensor_v2", "parameter")}}
    # A framework that is not here cannot be called, so nobody gains by naming it. These packages are here: of them, only data.
    PRESENT = sys.stdlib_module_names | {"torch", "numpy", "PIL"}
    DATA = "|".join((
        r"builtins\.(set|frozenset|list|dict|tuple|object|int|float|bool|str|bytes|bytearray|complex|slice|range)",
        r"(collections|typing|datetime)\.\w+", r"(pathlib|argparse|uuid|decimal|fractions)\.[A-Z]\w+", r"copyreg\._reconstructor",
        r"_codecs\.encode", r"numpy\.(dtype|ndarray|bool_?|(float|u?int|complex)\d+)", r"numpy\._?core\.multiarray\.(scalar|_reconstruct)",
        r"torch\.(Size|device|bool|half|double|long|(b?float|u?int)\d+)", r"torch\.(nn|optim)\.([a-z]\w*\.)*[A-Z]\w*"))

    def find_class(self, module: str, name: str):
        """What the pickle gets for a name: the real thing for those of `REAL`, and an inert class of that name for all others."""
        full = f"{IMPORT_MAPPING.get(module, module)}.{name}"  # Python 2's names of modules -> Python 3's
        if full in self.REAL:
            return self.REAL[full]
        if full.split(".")[0] in self.PRESENT and not re.fullmatch(self.DATA, full):
            raise ValueError(f"it names {full}, which no weights need and which could run code")
        return type(name, (Inert,), {})


def read_pickled(path: Path) -> dict:
    """A PyTorch checkpoint, of today's zip format or the one before, as a dict on the CPU; foreign objects in it are inert.

    Tensors of a zip are mapped: only those that are used are read from the disk.
    """
    with open(path, "rb") as f:
        start = f.read(4)
    reader = SimpleNamespace(__name__="pickle", Unpickler=TensorUnpickler, load=lambda f, **options: TensorUnpickler(f, **options).load())
    try:
        if zipped := start == b"PK\3\4":
            if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
                raise ValueError("it is a TorchScript program")
        elif start[:1] != b"\x80":
            raise ValueError("it begins like no such file")
        data = torch.load(str(path), map_location="cpu", pickle_module=reader, weights_only=False, mmap=zipped)
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__} instead of a dict")
        return {**data}
    except Exception as e:  # broken bytes raise nearly anything
        raise ValueError(f"{path}: not a PyTorch checkpoint of weights: {_line(e)}") from None


def _line(e: Exception) -> str:
    """What went wrong, in less than a line."""
    text = str(e).strip().split("\n")[0][:200]
    return text if type(e) is ValueError else f"{type(e).__name__} {text}"


# ---------------------------------------------------------------------------------------------- safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file: eight bytes with the length of the header, the header in JSON, the numbers without gaps."""
    path = Path(path)
    size, tensors, end = path.stat().st_size, {}, 0
    try:
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)  # mapped, not read
        begin = 8 + int.from_bytes(data[:8].tolist(), "little")
        if begin > size:
            raise ValueError(f"its header would end at byte {begin}")
        header = json.loads(bytes(data[8:begin].numpy()))
        header.pop("__metadata__", None)
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if start != end or min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize or begin + stop > size:
                raise ValueError(f"key {key!r}, {entry['dtype']} {tuple(shape)}, would be in bytes {start} to {stop} of {size - begin}")
            tensors[key], end = data[begin + start:begin + stop].clone().view(dtype).reshape(shape), stop
        if begin + end != size:
            raise ValueError(f"the last tensor ends at byte {begin + end}")
    except Exception as e:
        raise ValueError(f"{path}: not a complete safetensors file of {size} bytes: {_line(e)}") from None
    return tensors


def read(path: Path, entry: str) -> tuple[dict, list[str]]:
    """The state dict in a file of either format, and the names of what stands beside it. In a pickled file it is under `entry`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    with open(path, "rb") as f:
        if f.read(9)[8:] == b"{":
            return read_safetensors(path), []
    data = read_pickled(path)
    if not isinstance(data.get(entry), dict):
        raise ValueError(f"{path}: expected a state dict under {entry!r}, found {', '.join(map(repr, data)) or 'nothing'}")
    return {str(key): value for key, value in dict.items(data[entry])}, [str(key) for key in data if key != entry]


# ---------------------------------------------------------------------------------------------- names


def our_name(key: str, rules: Rules) -> str:
    """Our name of a released key."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def released_name(name: str, rules: Rules, present: Iterable[str]) -> str:
    """The released key of our name, for a message, in the style of the keys that are `present`.

    Every rule is undone at every place; of the keys that the rules take back to our name, the one most like its neighbours is meant.
    """
    names = {name}
    for pattern, replacement in reversed(rules):
        ours = "^" + re.escape(replacement).replace(r"\\1", re.search(r"\(.*\)|$", pattern)[0])  # a rule has one group or none
        theirs = re.sub(r"\(.*\)", r"\\1", pattern).strip("^$").replace(r"\.", ".")
        names |= {n[:i] + re.sub(ours, theirs, n[i:]) for n in names for i in range(len(n))}
    return max(sorted(n for n in names if our_name(n, rules) == name),
               key=lambda n: max((len(commonprefix([n, key])) for key in present), default=0))


def describe(value) -> str:
    """A weight's shape, and its type unless floating point."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)}" + ("" if value.is_floating_point() else f" {value.dtype}")


def count_parameters(state: dict[str, Tensor]) -> int:
    """How many numbers of a state dict are parameters, not statistics of batch norms."""
    return sum(x.numel() for key, x in state.items() if not key.endswith(("running_mean", "running_var", "num_batches_tracked")))


def fill(module: nn.Module, state: dict, rules: Rules, unused: list[str], path: Path, matrices: bool = False) -> dict[str, Tensor]:
    """Copy the released `state` of the file `path` into a module; returns what of it is known to be `unused` (patterns).

    With `matrices`, a matrix may stand for a 1x1 convolution. Raises `ValueError` with the first few keys that do not fit.
    """
    known = {key: x for key, x in state.items() if isinstance(x, Tensor) and any(re.search(pattern, key) for pattern in unused)}
    wanted, found, problems = module.state_dict(), {}, []
    for key in (key for key in state if key not in known):
        name, value = our_name(key, rules), state[key]
        if name not in wanted or name in found:
            problems.append((key, "no such key", describe(value)))
            continue
        found[name] = value
        as_matrix = matrices and wanted[name].shape[2:] == (1, 1) and describe(value) == describe(wanted[name][..., 0, 0])
        if not as_matrix and describe(value) != describe(wanted[name]):
            problems.append((key, describe(wanted[name]), describe(value)))
    missing = [name for name in wanted if name not in found]
    problems += [(released_name(name, rules, state), describe(wanted[name]), "no such key") for name in missing[:3]]
    if problems:
        more = len(problems) + len(missing[3:]) - 3
        text = "; ".join(f"key {key!r}: expected {expected}, found {found}" for key, expected, found in problems[:3])
        raise ValueError(f"{path}: {text}" + (f"; and {more} more" if more > 0 else ""))
    module.load_state_dict({name: value.reshape(wanted[name].shape) for name, value in found.items()})
    return known


# ---------------------------------------------------------------------------------------------- the tables of names

# Released key -> ours (the EFT's are in `eft.py`): every pattern is substituted, in this order, in every key;
# the result must be exactly our state dict.
RELEASED_VLDM_KEYS = [
    (r"^unets\.0\.", "unet."), (r"\.init_conv\.convs\.", ".init_convs."), (r"\.to_time_hiddens\.0\.weights", ".time_frequencies"),
    (r"\.to_time_hiddens\.1\.", ".time_hidden."), (r"\.to_time_cond\.0\.", ".time_embed."), (r"\.to_time_tokens\.0\.", ".time_tokens."),
    (r"\.norm_cond\.", ".token_norm."), (r"\.downs\.(\d)\.1\.", r".down.\1.blocks.0."), (r"\.downs\.(\d)\.2\.0\.", r".down.\1.blocks.1."),
    (r"\.downs\.(\d)\.2\.1\.", r".down.\1.blocks.2."), (r"\.downs\.(\d)\.3\.", r".down.\1.attention."),
    (r"\.downs\.(\d)\.4\.", r".down.\1.resize."), (r"\.ups\.(\d)\.0\.", r".up.\1.blocks.0."), (r"\.ups\.(\d)\.1\.0\.", r".up.\1.blocks.1."),
    (r"\.ups\.(\d)\.1\.1\.", r".up.\1.blocks.2."), (r"\.ups\.(\d)\.2\.", r".up.\1.attention."),
    (r"\.ups\.(\d)\.3\.net\.", r".up.\1.resize."), (r"\.mid_block([12])\.", r".mid\1."), (r"\.mid_attn\.fn\.fn\.", ".mid_attention."),
    (r"\.final_res_block\.", ".final_block."), (r"\.resize\.fns\.0\.", ".resize.conv3."), (r"\.resize\.fns\.1\.", ".resize.conv1."),
    (r"\.layers\.0\.0\.fn\.", ".attention."), (r"\.layers\.0\.1\.", ".feed_forward."), (r"\.cross_attn\.fn\.", ".cross_attention."),
    (r"\.to_q\.", ".q."), (r"\.to_kv\.", ".kv."), (r"\.to_context\.", ".context."), (r"\.to_out\.0\.", ".out."),
    (r"\.to_out\.1\.", ".norm_out."), (r"\.time_mlp\.1\.", ".time."), (r"\.block([12])\.groupnorm\.", r".norm\1."),
    (r"\.block([12])\.project\.", r".conv\1."), (r"\.gca\.to_k\.", ".gate.key."), (r"\.gca\.net\.", ".gate.net."),
    (r"\.res_conv\.", ".shortcut."),
]
RELEASED_VLDM_UNUSED = [r"^unets\.0\.null_conditional_(embed|hidden)$"]  # text conditioning that the model was built without

RELEASED_VAE_KEYS = [
    (r"^first_stage_model\.", ""),
    (r"^encoder\.down\.(\d)\.block\.", r"encoder.levels.\1."), (r"^encoder\.down\.(\d)\.downsample\.", r"encoder.levels.\1.2."),
    *((rf"^decoder\.up\.{i}\.block\.", f"decoder.levels.{3 - i}.") for i in range(4)),
    *((rf"^decoder\.up\.{i}\.upsample\.", f"decoder.levels.{3 - i}.3.1.") for i in range(4)),
    (r"\.1\.conv\.(weight|bias)$", r".1.\1"),
    (r"\.mid\.block_1\.", ".mid.0."), (r"\.mid\.attn_1\.", ".mid.1."), (r"\.mid\.block_2\.", ".mid.2."),
    (r"\.nin_shortcut\.", ".shortcut."), (r"\.proj_out\.", ".out."),
]
DIFFUSERS_VAE_KEYS = [  # the same network in the Diffusers library; its attention has old and new names
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.levels.\1.2."), (r"\.down_blocks\.(\d)\.resnets\.", r".levels.\1."),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.conv\.", r"decoder.levels.\1.3.1."), (r"\.up_blocks\.(\d)\.resnets\.", r".levels.\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.0."), (r"\.mid_block\.attentions\.0\.", ".mid.1."), (r"\.mid_block\.resnets\.1\.", ".mid.2."),
    *((rf"\.{theirs}\.", f".{ours}.") for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "out"))),
    *((rf"\.to_{part}\.", f".{part}.") for part in "qkv"), (r"\.to_out\.0\.", ".out."), (r"\.group_norm\.", ".norm."),
    (r"\.conv_norm_out\.", ".norm_out."), (r"\.conv_shortcut\.", ".shortcut."),
]
