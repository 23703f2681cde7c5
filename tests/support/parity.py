"""The referee: numbers recorded with the released code, and the rule that regenerates the weights they were made with.

`load("eft")` gives the arrays of `eft.npz`. They are looked for in $PARITY, then in `../shared/parity` beside the
repository, then in `tests/data`, which holds the small ones; a fixture that is in none of the three skips the test with
a reason.
"""
import json
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

SALT = os.environ.get("PARITY_SALT", "")  # the fixtures' weights are drawn from names + salt
_TESTS = Path(__file__).resolve().parents[1]
_PLACES = [_TESTS.parent.parent / "shared" / "parity", _TESTS / "data"]
if os.environ.get("PARITY"):
    _PLACES.insert(0, Path(os.environ["PARITY"]))


def path(name: str) -> Path:
    """The file `name` of the fixtures; skips the running test where it is absent."""
    for place in _PLACES:
        if (place / name).exists():
            return place / name
    pytest.skip(f"parity fixture {name} is not in {', '.join(str(p) for p in _PLACES)}")


def load(name: str) -> dict[str, torch.Tensor]:
    """Every array of `<name>.npz` as a tensor; strings stay numpy."""
    with np.load(path(name + ".npz")) as f:
        arrays = {k: f[k] for k in f.files}
    for k, array in arrays.items():
        if array.dtype.kind in "fiub":
            arrays[k] = torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
    return arrays


def manifest(name: str) -> dict:
    """`manifest_<name>.json`: `entries` is a list of [name, shape, dtype] in state-dict order."""
    return json.loads(path(f"manifest_{name}.json").read_text())


def weight(name: str, shape, salt: str = SALT) -> torch.Tensor:
    """The pseudo-random value of one released state-dict entry: it follows from the entry's name and shape."""
    leaf, shape = name.split(".")[-1], tuple(shape)
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    z = np.random.default_rng(zlib.crc32((name + salt).encode())).standard_normal(shape, dtype=np.float32)
    if leaf == "running_mean":
        z = np.float32(0.02) * z
    elif leaf == "running_var":
        z = np.float32(1) + np.float32(0.1) * np.abs(z)
    elif leaf.endswith("bias"):
        z = np.float32(0.02) * z
    elif leaf == "g" or (leaf == "weight" and len(shape) == 1):
        z = np.float32(1) + np.float32(0.02) * z
    elif len(shape) >= 2:
        z = z * np.float32(1 / np.sqrt(np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(z))


def weights(name: str) -> dict[str, torch.Tensor]:
    """The whole rule-made state dict of `manifest_<name>.json`, under the released names."""
    return {n: weight(n, shape) for n, shape, _ in manifest(name)["entries"]}


def rename(state: dict, part) -> dict:
    """Released names -> ours, by a `released.Part`: every rule in turn on every name; names on the unused list go."""
    renamed = {}
    for name, value in state.items():
        if any(re.match(pattern, name) for pattern in part.unused):
            continue
        for pattern, replacement in part.rules:
            name = re.sub(pattern, replacement, name)
        assert name not in renamed, name
        renamed[name] = value
    return renamed


def unet_settings(name: str) -> dict:
    """The fields of the `UNetConfig` of a manifest; what it does not say is the same for every released UNet."""
    description = manifest(name)
    c, rest = description["unet_constructor"], description.get("unet_effective_settings", {})
    blocks = c["num_resnet_blocks"]
    assert set(blocks if isinstance(blocks, list) else [blocks]) == {2}
    return {
        "channels": c["channels"], "cond_channels": c["cond_images_channels"],
        "widths": (c["dim"], *(c["dim"] * k for k in c["dim_mults"])), "attention": tuple(c["layer_attns"]),
        "kernels": tuple(rest.get("init_cross_embed_kernel_sizes", (3, 7, 15))),
        "groups": rest.get("resnet_groups", 8),
        "heads": rest.get("attn_heads", 8), "head_dim": rest.get("attn_dim_head", 64),
        "frequencies": rest.get("learned_sinu_pos_emb_dim", 16) // 2, "time_dim": 4 * c["dim"], "token_dim": c["dim"],
        "tokens": rest.get("num_time_tokens", 2)}


def assert_names(model: torch.nn.Module, name: str, part) -> None:
    """A `released.Part` makes the model's names and shapes of the manifest's, whose count of parameters is right."""
    described = manifest(name)
    shapes = {key: tuple(shape) for key, shape, _ in described["entries"]}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == rename(shapes, part)
    assert sum(math.prod(shape) for shape in shapes.values()) == described["parameter_count"]


def assert_close(actual, expected, std: float = 0.0, rtol: float = 0.0, atol: float = 0.0):
    """|actual - expected| <= std * (standard deviation of expected) + atol + rtol * |expected|, everywhere.

    The shapes must be equal.
    """
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    allowed = atol + rtol * expected.abs() + (std * expected.std(correction=0) if std else 0)
    excess = ((actual - expected).abs() - allowed).max() if expected.numel() else torch.tensor(0.0)
    assert excess <= 0, f"off by {(actual - expected).abs().max():.3g}, allowed {torch.as_tensor(allowed).max():.3g}"
