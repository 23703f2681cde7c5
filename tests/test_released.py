"""Released files: every key in its place, and one line for whatever is not such a file."""
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import eft
import parity
import released
import sparsefusion as sf
import vldm
from cameras import Cameras

# The released structure (every released key exists), thinner.
SMALL = sf.Preset("paper", 256, replace(eft.PAPER, stem=8, stages=(8, 16, 24), width=32, feedforward=32),
                  vldm.VAEConfig(widths=(32, 64, 96, 96)),
                  vldm.UNetConfig(cond_channels=32, widths=(16, 16, 32, 64, 64), heads=2, head_dim=8, time_dim=32, token_dim=16),
                  vldm.DiffusionConfig())

FORMATS = [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}]  # of torch.save


# --- released files, made by the rule ---

def released_state(part, module):
    """The manifest's names with the shapes that `module` has for them; entries that nothing uses are small."""
    _, rules, unused = sf.RELEASED[part]
    prefix, wanted = "first_stage_model." * (part == "vae"), module.state_dict()
    state = {}
    for name, shape, _ in parity.manifest(part)["entries"]:
        if any(re.search(p, prefix + name) for p in unused):
            state[prefix + name] = parity.weight(name, shape[:1] if shape else [])
        else:
            state[prefix + name] = parity.weight(name, wanted[released.our_name(prefix + name, rules)].shape)
    return state


def optimizer_state():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward(), optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])  # its state holds a collections.Counter
    return {"optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": scheduler.state_dict(), "epoch": 3}


def foreign_module(marker):
    """A training framework that is there when the file is saved and gone when it is loaded."""
    module = types.ModuleType("foreign_framework")

    class ModelCheckpoint:
        def __init__(self):
            self.best_model_score, self.dirpath = torch.tensor(0.25), Path("logs")

    class Timer(dict):
        pass

    def touch(path):
        Path(path).touch()
        return {}

    class Reduced:
        def __reduce__(self):
            return touch, (str(marker),)

    for x in (ModelCheckpoint, Timer, touch, Reduced):
        x.__module__, x.__qualname__ = module.__name__, x.__name__
        setattr(module, x.__name__, x)
    return module


def write_sd(path, state, **options):
    """A Stable Diffusion checkpoint: VAE, other networks, training state, and instances of classes that nobody has here."""
    marker = path.with_suffix(".marker")
    foreign = foreign_module(marker)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, foreign.__name__, foreign)
        state = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2), "betas": torch.zeros(3), **state,
                 "cond_stage_model.transformer.weight": torch.zeros(2).half(), "model_ema.decay": torch.tensor(0.5)}
        torch.save({"epoch": 6, "pytorch-lightning_version": "1.4.2", "state_dict": state, "optimizer_states": [optimizer_state()],
                    "callbacks": {foreign.ModelCheckpoint: {"best": np.float64(0.1), "array": np.arange(3), "which": {1, 2}}},
                    "objects": [foreign.ModelCheckpoint(), foreign.Timer(a=1), foreign.Reduced(), foreign.touch]}, path, **options)
    assert not marker.exists()
    return marker


def write_safetensors(path, tensors, metadata=None):
    """Eight bytes with the header's length, the header, the numbers."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, data = {"__metadata__": {"format": "pt"}} if metadata is None else metadata, b""
    for key, x in tensors.items():
        raw = x.contiguous().view(torch.uint8).numpy().tobytes() if x.ndim else x[None].view(torch.uint8).numpy().tobytes()
        header[key] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def diffusers_name(key, new):
    """A first-stage key of Stable Diffusion -> the Diffusers library's name, before and after it renamed its attention."""
    key = key.removeprefix("first_stage_model.")
    if m := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d)\.(.*)", key):
        side, way, i, rest = m.groups()
        i = int(i) if side == "encoder" else 3 - int(i)
        rest = rest.replace("block.", "resnets.").replace("downsample.", "downsamplers.0.").replace("upsample.", "upsamplers.0.")
        key = f"{side}.{way}_blocks.{i}.{rest}"
    key = key.replace("nin_shortcut", "conv_shortcut").replace("mid.block_1", "mid_block.resnets.0").replace(
        "mid.block_2", "mid_block.resnets.1").replace("coder.norm_out", "coder.conv_norm_out")
    if m := re.fullmatch(r"(.*)\.mid\.attn_1\.(\w+)\.(.*)", key):
        names = dict(zip(("norm", "q", "k", "v", "proj_out"), ("group_norm", "to_q", "to_k", "to_v", "to_out.0") if new else
                         ("group_norm", "query", "key", "value", "proj_attn")))
        key = f"{m[1]}.mid_block.attentions.0.{names[m[2]]}.{m[3]}"
    return key


def diffusers_state(state, new, matrices, dtype=torch.float32):
    """First-stage state dict of Stable Diffusion -> that of Diffusers, attention weights as matrices or as 1x1 convolutions."""
    state = {k: x[..., 0, 0] if matrices and ".attn_1." in k and x.ndim == 4 else x for k, x in state.items()}
    return {diffusers_name(k, new): x.to(dtype) for k, x in state.items()}


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """Paths of the three released files of the thin model, and their state dicts."""
    folder = tmp_path_factory.mktemp("released")
    with torch.device("meta"):
        model = sf.SparseFusion(SMALL)
    states = {part: released_state(part, getattr(model, part)) for part in sf.RELEASED}
    for part in ("eft", "vldm"):
        torch.save({"model_state_dict": states[part], **optimizer_state()}, folder / f"{part}.pt")
    write_sd(folder / "vae.pt", states["vae"])
    return {part: folder / f"{part}.pt" for part in states}, states


@pytest.fixture
def small(small_files, monkeypatch):
    """`small_files`, while the preset `paper` is the thin one."""
    monkeypatch.setitem(sf.PRESETS, "paper", SMALL)
    return small_files


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_line(capsys, argv, *words):
    """The command ends with exit code 2 and one line that has all the words."""
    with pytest.raises(SystemExit) as e:
        sf.main([str(x) for x in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(lines) == 1, lines
    assert all(str(w) in lines[0] for w in words), (lines[0], words)


def convert(files, out):
    return ["convert", *(str(x) for part in files for x in (f"--{part}", files[part])), "--out", str(out)]


def test_every_key_goes_where_the_table_says(small, capsys):
    files, states = small
    model = sf.SparseFusion.from_released(**files)
    out = capsys.readouterr().out
    for part, (_, rules, unused) in sf.RELEASED.items():
        ours, used = getattr(model, part).state_dict(), 0
        for key, value in states[part].items():
            if not any(re.search(p, key) for p in unused):
                assert torch.equal(ours[released.our_name(key, rules)], value), key
                used += 1
        assert used == len(ours)
        parameters = sum(x.numel() for k, x in states[part].items() if "running" not in k and "tracked" not in k)
        assert f"{part.upper()} with {parameters:,} parameters" in out
    assert "left alone: optimizer_state_dict, scheduler_state_dict, epoch" in out and "4 keys of other networks" in out
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_foreign_classes_and_formats(small, options, tmp_path):
    files, states = small
    expected = sf.SparseFusion.from_released(**files)
    marker = write_sd(tmp_path / "sd.ckpt", states["vae"], **options)
    torch.save({"model_state_dict": {k: nn.Parameter(x) if x.is_floating_point() else x for k, x in states["eft"].items()}},
               tmp_path / "eft2.pt", **options)
    model = sf.SparseFusion.from_released(tmp_path / "eft2.pt", files["vldm"], tmp_path / "sd.ckpt")
    assert same(model, expected)
    assert not marker.exists()


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_diffusers_names(small, new, matrices, dtype, tmp_path):
    files, states = small
    write_safetensors(tmp_path / "vae.safetensors", diffusers_state(states["vae"], new, matrices, dtype))
    with torch.device("meta"):
        vae = vldm.VAE(SMALL.vae)
    vae.to_empty(device="cpu")
    sf.load_released(vae, "vae", tmp_path / "vae.safetensors")
    expected = vldm.VAE(SMALL.vae)
    sf.load_released(expected, "vae", files["vae"])
    assert all(torch.equal(a, b.to(dtype).float()) for a, b in zip(vae.state_dict().values(), expected.state_dict().values()))


def test_converted_file_is_the_same_model(small, tmp_path):
    files, _ = small
    direct = sf.SparseFusion.from_released(**files)
    sf.main(convert(files, tmp_path / "out.pt"))
    assert same(sf.load(tmp_path / "out.pt"), direct)
    assert torch.load(tmp_path / "out.pt", weights_only=True)["preset"]["name"] == "paper"
    sf.main(convert(files, tmp_path / "out.pt") + ["--half"])
    assert same(sf.load(tmp_path / "out.pt"), direct.half().float())


# --- files that do not fit ---

CHANGES = {
    "removed": lambda state, key: state.pop(key),
    "renamed": lambda state, key: state.update({key + "_": state.pop(key)}),
    "reshaped": lambda state, key: state.update({key: state[key].flatten()}),
    "surplus": lambda state, key: state.update({"surplus.weight": torch.zeros(2, 3)}),
    "whole": lambda state, key: state.update({key: state[key].long()}),
    "foreign": lambda state, key: state.update({key: [1.0]}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part,key", [
    ("eft", "encoder_model.conv1.weight"), ("eft", "t3.encoder.layers.2.self_attn.in_proj_weight"),
    ("vldm", "unets.0.downs.3.3.layers.0.1.1.weight"), ("vldm", "unets.0.mid_attn.fn.fn.to_q.weight"),
    ("vae", "first_stage_model.decoder.up.1.upsample.conv.weight"), ("vae", "first_stage_model.encoder.mid.attn_1.q.weight"),
    ("diffusers", "decoder.mid_block.attentions.0.to_out.0.weight"), ("diffusers", "encoder.down_blocks.0.downsamplers.0.conv.weight")])
def test_one_key_wrong_is_refused_in_one_line(small, part, key, change, tmp_path, capsys):
    if part == "diffusers" and change in ("whole", "foreign"):
        return
    files, states = small
    flags = files | {("vae" if part == "diffusers" else part): tmp_path / "changed"}
    state = diffusers_state(states["vae"], True, False) if part == "diffusers" else dict(states[part])
    shape = tuple(state[key].shape)
    CHANGES[change](state, key)
    if part == "diffusers":
        write_safetensors(tmp_path / "changed", state)
    else:
        torch.save({sf.RELEASED[part][0]: state}, tmp_path / "changed")
    expected = {
        "removed": [f"key {key!r}: expected {shape}, found no such key"],
        "renamed": [f"key {key!r}: expected {shape}, found no such key", f"key {key + '_'!r}: expected no such key, found {shape}"],
        "reshaped": [f"key {key!r}: expected {shape}, found ({np.prod(shape)},)"],
        "surplus": ["key 'surplus.weight': expected no such key, found (2, 3)"],
        "whole": [f"key {key!r}: expected {shape}, found {shape} torch.int64"],
        "foreign": [f"key {key!r}: expected {shape}, found a list"],
    }[change]
    if change == "surplus" and part == "vae":  # the file has other networks' keys: only the first stage's count
        state["first_stage_model.surplus.weight"] = state.pop("surplus.weight")
        torch.save({"state_dict": state}, tmp_path / "changed")
        expected = ["key 'first_stage_model.surplus.weight': expected no such key, found (2, 3)"]
    one_line(capsys, convert(flags, tmp_path / "out.pt"), tmp_path / "changed", *expected)
    assert not (tmp_path / "out.pt").exists()


def test_missing_keys_are_named_as_released():
    """Every key of the three manifests, if missing, is called by its released name."""
    for part, (_, rules, unused) in sf.RELEASED.items():
        keys = ["first_stage_model." * (part == "vae") + name for name, _, _ in parity.manifest(part)["entries"]]
        for key in keys[::7]:
            if not any(re.search(p, key) for p in unused):
                assert released.released_name(released.our_name(key, rules), rules, [k for k in keys if k != key]) == key


def test_two_names_for_one_weight(small, tmp_path, capsys):
    files, states = small
    state = diffusers_state(states["vae"], True, False) | diffusers_state(states["vae"], False, True)
    write_safetensors(tmp_path / "both", state)
    one_line(capsys, convert(files | {"vae": tmp_path / "both"}, tmp_path / "out.pt"), "expected no such key", "and ")


def test_files_that_are_not_weights(small, tmp_path, capsys):
    files, states = small
    bad = tmp_path / "bad"
    for content in (b"", b"PK\3\4", b"not a checkpoint", b"\x80\x02", files["vae"].read_bytes()[:-200000], b"\x80\x02]q\x00."):
        bad.write_bytes(content)
        one_line(capsys, convert(files | {"vae": bad}, tmp_path / "out.pt"), bad, "not a PyTorch checkpoint")
    torch.save({"state_dict": states["vae"]}, bad, _use_new_zipfile_serialization=False)
    bad.write_bytes(bad.read_bytes()[:-1000])
    one_line(capsys, convert(files | {"vae": bad}, tmp_path / "out.pt"), bad, "not a PyTorch checkpoint")
    torch.save({"weights": {}}, bad)
    one_line(capsys, convert(files | {"eft": bad}, tmp_path / "out.pt"), bad, "'model_state_dict'", "'weights'")
    one_line(capsys, convert(files | {"eft": tmp_path / "none"}, tmp_path / "out.pt"), tmp_path / "none", "no such")
    one_line(capsys, convert(files | {"eft": tmp_path}, tmp_path / "out.pt"), tmp_path, "no such weights file")


def test_safetensors_that_lie(tmp_path, capsys):
    path, x = tmp_path / "x.safetensors", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}
    write_safetensors(path, x)
    good = path.read_bytes()
    assert all(torch.equal(x[k], v) for k, v in released.read_safetensors(path).items())
    n = 8 + int.from_bytes(good[:8], "little")

    def header(change):
        h = json.loads(good[8:n])
        change(h)
        text = json.dumps(h).encode()
        return len(text).to_bytes(8, "little") + text + good[n:]

    lies = [good[:-1], good + b"\0", good[:n - 3], good[:9], b"\xff" * 8 + good[8:], (2**40).to_bytes(8, "little") + good[8:],
            header(lambda h: h["a"].update(shape=[2, 4])), header(lambda h: h["a"].update(shape=[-2, -3])),
            header(lambda h: h["a"].update(dtype="F99")), header(lambda h: h["a"].update(data_offsets=[0, 2**70])),
            header(lambda h: h["b"].update(data_offsets=[16, 24])), header(lambda h: h["b"].update(data_offsets=[28, 36])),
            header(lambda h: h["a"].update(data_offsets=[24, 0])), header(lambda h: h.update(a=3)), header(lambda h: h["a"].pop("shape")),
            header(lambda h: h.pop("b")), b"\x08" + bytes(7) + b"{{{{{{{{", header(lambda h: h["a"].update(shape="23"))]
    for lie in lies:
        path.write_bytes(lie)
        with pytest.raises(ValueError, match="not a complete safetensors file") as e:
            released.read_safetensors(path)
        assert len(str(e.value).splitlines()) == 1 and str(path) in str(e.value)


# --- pickles that would run code ---

class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evils(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    inner = pickle.dumps(Evil(os.system, f"touch {marker}"))
    return {
        "system": Evil(os.system, f"touch {marker}"), "eval": Evil(eval, touch), "exec": Evil(exec, touch),
        "open": Evil(open, str(marker), "w"), "Popen": Evil(subprocess.Popen, ["touch", str(marker)]), "__import__": Evil(__import__, "os"),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "copyfile": Evil(shutil.copyfile, __file__, str(marker)), "partial": Evil(functools.partial, os.system, f"touch {marker}"),
        "loads": Evil(pickle.loads, inner), "load": Evil(torch.load, str(marker)), "storage": Evil(torch.storage._load_from_bytes, inner),
        "map": Evil(list, Evil(map, eval, [touch])), "setattr": Evil(setattr, torch.Tensor, "shape", 1),
        "fromfile": Evil(np.fromfile, str(marker)),
    }


@pytest.mark.parametrize("name", evils(""))
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_code_in_a_pickle_is_refused_and_not_run(small, name, options, tmp_path, capsys):
    files, states = small
    marker, bad = tmp_path / "marker", tmp_path / "bad.pt"
    evil = evils(marker)[name]
    torch.save({"model_state_dict": states["eft"] | {"t1.pre.0.bias": evil}}, bad, **options)
    one_line(capsys, convert(files | {"eft": bad}, tmp_path / "out.pt"), bad, "could run code")
    torch.save({"model_state_dict": states["eft"], "optimizer_state_dict": [{"state": evil}]}, bad, **options)
    one_line(capsys, convert(files | {"eft": bad}, tmp_path / "out.pt"), bad, "could run code")
    bad.write_bytes(pickle.dumps(evil))
    one_line(capsys, convert(files | {"eft": bad}, tmp_path / "out.pt"), bad, "could run code")
    assert not marker.exists()


def test_the_evil_ones_would_have_worked(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"x": evils(marker)["system"]}, tmp_path / "bad.pt")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert marker.exists()


def test_code_behind_a_stand_in_is_refused(small, tmp_path, monkeypatch, capsys):
    files, states = small
    marker, foreign = tmp_path / "marker", foreign_module(tmp_path / "marker")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, foreign.__name__, foreign)
        torch.save({"state_dict": states["vae"], "x": Evil(foreign.touch, Evil(os.system, f"touch {marker}"))}, tmp_path / "bad.pt")
        # The framework is there this time, and still is not called.
        one_line(capsys, convert(files | {"vae": tmp_path / "bad.pt"}, tmp_path / "out.pt"), "system")
    assert not marker.exists()


@pytest.mark.parametrize("module,name", [
    ("posix", "system"), ("__builtin__", "eval"), ("__builtin__", "execfile"), ("commands", "getoutput"), ("os.path", "os.system"),
    ("collections", "OrderedDict.fromkeys"), ("torch.hub", "load"), ("numpy.testing._private.utils", "runstring")])
def test_names_that_are_refused(module, name, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\x80\x02c%s\n%s\n." % (module.encode(), name.encode()))
    with pytest.raises(ValueError, match="could run code"):
        released.read_pickled(path)


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
    """BUILD, which sets attributes, on the function that makes tensors, and on a stand-in's class."""
    path = tmp_path / "x"
    path.write_bytes(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00dump_patchesK\x01sb.")
    with pytest.raises(ValueError, match="AttributeError"):
        released.read_pickled(path)
    for name in (b"cforeign\nX\n", b"ccollections\nCounter\n"):
        path.write_bytes(b"\x80\x02" + name + b"}X\x0c\x00\x00\x00dump_patchesK\x01sb.")
        with pytest.raises(ValueError):
            released.read_pickled(path)
    assert not hasattr(released.Inert, "dump_patches")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "x"))
    with pytest.raises(ValueError, match="TorchScript"):
        released.read_pickled(tmp_path / "x")


# --- full size ---

def test_full_size(tmp_path, capsys):
    """The whole released model from its three files: parameter counts, recorded numbers, and the same bits after conversion."""
    f, u = parity.load("eft"), parity.load("unet_full")
    files = {part: tmp_path / f"{part}.pt" for part in sf.RELEASED}
    for part in ("eft", "vldm"):
        torch.save({"model_state_dict": parity.weights(part), **optimizer_state()}, files[part])
    write_sd(files["vae"], {"first_stage_model." + k: x for k, x in parity.weights("vae").items()})

    def outputs(model):
        views, cameras = f["in_views1"], Cameras(*(f["in_cam_" + k] for k in "RTfc"))
        images, (near, far), query = f["in_images"][views], f["mid_depth_range"], [int(f["in_query"])]
        condition = model.condition(images, cameras[views], cameras[query], float(near), float(far), f["out_set1_rgb"].shape[1])
        return *condition, model.vldm.denoiser(u["in_cond"])(u["in_x"], u["mid_log_snr"][:1]), model.vae.encode(images[:1, :, :64, :64])

    model = sf.SparseFusion.from_released(**files)
    printed = capsys.readouterr().out
    for part in sf.RELEASED:
        assert f"{part.upper()} with {parity.manifest(part)['parameter_count']:,} parameters" in printed
    direct = outputs(model)
    parity.assert_close(direct[1][0].permute(1, 2, 0)[None], f["out_set1_rgb"], std=1e-4)
    parity.assert_close(direct[2], u["out_eps"][0], std=1e-4)
    del model
    sf.main(convert(files, tmp_path / "out.pt"))
    for path in files.values():
        path.unlink()
    converted = outputs(sf.load(tmp_path / "out.pt"))
    (tmp_path / "out.pt").unlink()
    assert all(torch.equal(a, b) for a, b in zip(direct, converted, strict=True))
