"""Released files: every key in its place, and one line for whatever is not such a file."""
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import distill
import presets
import train
import vae
from cameras import Cameras
from checkpoints import reading, released
from checkpoints.convert import from_released, main
from metrics import VGG16LPIPS
from sparsefusion import ROOT, SparseFusion, blank, load, ready
from vldm import cosine_log_snr
from tests.support import parity
from tests.support.helpers import Evil, one_line, same
from tests.support.released_files import (diffusers_state, foreign_module, lpips_states, optimizer_state,
                                          released_state, write_safetensors, write_sd)
from tests.support.thin import SMALL

SAMPLE = ROOT / "sample" / "co3d"
MODEL = ("eft", "vldm", "vae")  # the parts of the model, each with a file of its own
FORMATS = [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}]  # of torch.save


@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    """Paths of the three released files of the thin model, and their state dicts."""
    folder = tmp_path_factory.mktemp("released")
    with torch.device("meta"):
        model = SparseFusion(SMALL)
    states = {part: released_state(part, getattr(model, part)) for part in MODEL}
    for part in ("eft", "vldm"):
        torch.save({"model_state_dict": states[part], **optimizer_state()}, folder / f"{part}.pt")
    write_sd(folder / "vae.pt", states["vae"])
    return {part: folder / f"{part}.pt" for part in states}, states


@pytest.fixture
def small(small_files, monkeypatch):
    """`small_files`, while the preset `paper` is the thin one."""
    monkeypatch.setitem(presets.MODELS, "paper", SMALL)
    return small_files


@pytest.fixture(scope="module")
def thin():
    """A thin model without weights."""
    return blank(SMALL)


def flags_of(files, out):
    """Arguments of the command."""
    return [*(str(x) for part in files for x in (f"--{part}", files[part])), "--out", str(out)]


@pytest.fixture
def refused(small, tmp_path, capsys):
    """A function: with this file for a part, `convert` ends in one line that has the file and the words."""
    def check(part, file, *words):
        one_line(capsys, main, flags_of(small[0] | {part: file}, tmp_path / "out.pt"), file, *words)
        assert not (tmp_path / "out.pt").exists()
    return check


def released_model(files):
    return from_released(files["eft"], files["vldm"], files["vae"])


def test_every_key_goes_where_the_table_says(small, capsys):
    files, states = small
    model = released_model(files)
    out = capsys.readouterr().out
    for part in MODEL:
        source = released.PARTS[part]
        ours, used = getattr(model, part).state_dict(), 0
        for key, value in states[part].items():
            if not any(re.search(p, key) for p in source.unused):
                assert torch.equal(ours[released.our_name(key, source.rules)], value), key
                used += 1
        assert used == len(ours)
        parameters = sum(x.numel() for k, x in states[part].items() if "running" not in k and "tracked" not in k)
        assert f"{part.upper()} with {parameters:,} parameters" in out
    assert "left alone: optimizer_state_dict, scheduler_state_dict, epoch" in out and "4 keys of other networks" in out
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_what_files_hold_is_listed(small, capsys, tmp_path):
    """Every key with its shape and use; the same numbers of the same weights in another format, others of others."""
    files, states = small
    write_safetensors(tmp_path / "vae.safetensors", diffusers_state(states["vae"], True, True))
    numbers = {}
    for part, file in [*files.items(), ("other", tmp_path / "vae.safetensors")]:
        main([f"--{'vae' if part == 'other' else part}", str(file)])
        *listed, summary, numbers[part] = capsys.readouterr().out.replace(str(file), "FILE").splitlines()
        state = states["vae" if part == "other" else part]
        assert len(listed) == len(state) and summary.startswith("FILE: ")
        assert re.fullmatch(r"FILE: weights \w{16}; a forward pass: mean \S+, deviation \S+", numbers[part])
        if part != "other":
            for line, (key, x) in zip(listed, state.items()):
                assert line.startswith(f"{key}  {released.describe(x)}  ")
            used = sum(f"  -> {part}." in line for line in listed)
            assert used == sum(not line.endswith("  not used") for line in listed) > len(listed) / 2
    assert numbers["other"] == numbers["vae"] and len(set(numbers.values())) == 3 and "nan" not in str(numbers)

    # A file that does not fit is listed, too, before the line that says so.
    less = {key: x for key, x in states["eft"].items() if key != "color_layer.0.bias"}
    torch.save({"model_state_dict": less}, tmp_path / "eft.pt")
    with pytest.raises(SystemExit):
        main(["--eft", str(tmp_path / "eft.pt")])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == len(less) and len(printed.err.splitlines()) == 1
    one_line(capsys, main, ["--out", tmp_path / "out.pt"], "--eft, --vldm, --vae and --out are needed")
    argv = ["--vae", files["vae"], "--eft", files["eft"], "--out", tmp_path / "out.pt"]
    one_line(capsys, main, argv, "--eft, --vldm, --vae and --out are needed")


def test_a_prior_is_trained_on_a_released_autoencoder(small, tmp_path, capsys, monkeypatch):
    """Of the paper's architecture and on its frozen autoencoder, from weights that are the same every time."""
    files, _ = small
    full = released_model(files)
    # (On a CPU torch 2.13 crashes in the gradient of a 1x1 convolution of 8 channels with a stride, channels last.)
    wider = replace(SMALL, image_size=64, eft=replace(SMALL.eft, stem=16, stages=(16, 16, 24)))
    monkeypatch.setitem(presets.MODELS, "paper", wider)
    out = tmp_path / "vae.pt"
    main(["--vae", str(files["vae"]), "--out", str(out)])
    blank = load(out, stage="vae")
    assert same(blank.vae, full.vae) and not same(blank.eft, full.eft)
    main(["--vae", str(files["vae"]), "--out", str(tmp_path / "again.pt")])
    assert same(blank, load(tmp_path / "again.pt", stage="vae"))
    one_line(capsys, distill.main, ["--weights", out, "--out", tmp_path / "x"], "only its autoencoder is trained")

    argv = ["prior", "--preset", "paper", "--vae", out, "--root", SAMPLE, "--frames", 3, "--max-views", 1, "--steps", 1,
            "--set", "batch=1", "noisings=2", "warmup=1", "--device", "cpu", "--out", tmp_path / "prior.pt"]
    train.main([str(x) for x in argv])
    prior = load(tmp_path / "prior.pt")
    assert same(prior.vae, full.vae.half().float()) and not same(prior.eft, blank.eft) and prior.preset.name == "paper"
    assert torch.isfinite(prior.vldm.unet.final_conv.weight).all() and prior.vldm.unet.final_conv.weight.any()


def test_foreign_classes(small, tmp_path):
    files, states = small
    expected = released_model(files)
    marker = write_sd(tmp_path / "sd.ckpt", states["vae"])
    assert same(released_model(files | {"vae": tmp_path / "sd.ckpt"}), expected)
    assert not marker.exists()


@pytest.mark.parametrize("options", [FORMATS[0], FORMATS[2]], ids=str)
def test_formats(small, options, tmp_path):
    files, states = small
    parameters = {k: nn.Parameter(x) if x.is_floating_point() else x for k, x in states["eft"].items()}
    torch.save({"model_state_dict": parameters, **optimizer_state()}, tmp_path / "eft.pt", **options)
    assert same(released_model(files | {"eft": tmp_path / "eft.pt"}), released_model(files))


@pytest.mark.parametrize("options, words", [(FORMATS[1], "Unsupported operand"), (FORMATS[2], "Unsupported global")])
def test_foreign_classes_in_other_formats_are_refused(small, refused, options, words, tmp_path):
    marker = write_sd(tmp_path / "sd.ckpt", small[1]["vae"], **options)
    refused("vae", tmp_path / "sd.ckpt", "not a PyTorch checkpoint", words)
    assert not marker.exists()


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_diffusers_names(small, new, matrices, dtype, tmp_path):
    files, states = small
    write_safetensors(tmp_path / "vae.safetensors", diffusers_state(states["vae"], new, matrices, dtype))
    with torch.device("meta"):
        module = vae.VAE(SMALL.vae)
    module.to_empty(device="cpu")
    released.load_part(module, "vae", tmp_path / "vae.safetensors")
    expected = vae.VAE(SMALL.vae)
    released.load_part(expected, "vae", files["vae"])
    pairs = zip(module.state_dict().values(), expected.state_dict().values(), strict=True)
    assert all(torch.equal(a, b.to(dtype).float()) for a, b in pairs)


@pytest.mark.parametrize("layout", ["bare", "bare in a checkpoint", "with what it was trained with", "safetensors",
                                    "among other networks in safetensors", "vae.", "bin", "diffusers with a prefix"])
def test_vae_files_as_they_circulate(small, layout, tmp_path, capsys):
    """Stable Diffusion's names with and without what stands before them, Diffusers' as .safetensors and .bin."""
    files, states = small
    path, state = tmp_path / "vae", states["vae"]
    bare = {key.removeprefix("first_stage_model."): x for key, x in state.items()}
    if layout == "bare":
        torch.save(bare, path)
    elif layout == "bare in a checkpoint":
        torch.save({"state_dict": bare, "epoch": 3}, path)
    elif layout == "with what it was trained with":
        torch.save({"state_dict": bare | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}}, path)
    elif layout == "safetensors":
        write_safetensors(path, bare)
    elif layout == "among other networks in safetensors":
        write_safetensors(path, state | {"model.diffusion_model.out.2.bias": torch.zeros(4)})
    elif layout == "vae.":
        write_safetensors(path, {f"vae.{key}": x for key, x in bare.items()} | {"unet.x": torch.zeros(4)})
    elif layout == "bin":
        torch.save(diffusers_state(state, True, True), path)
    else:
        torch.save({f"vae.{key}": x for key, x in diffusers_state(state, False, False).items()}, path)
    found, expected = vae.VAE(SMALL.vae), vae.VAE(SMALL.vae)
    released.load_part(found, "vae", path)
    assert ("keys of other networks" in capsys.readouterr().out) == (layout in (
        "with what it was trained with", "among other networks in safetensors", "vae."))
    released.load_part(expected, "vae", files["vae"])
    assert same(found, expected)


def test_converted_file_is_the_same_model(small, tmp_path):
    files, _ = small
    direct = released_model(files)
    main(flags_of(files, tmp_path / "out.pt"))
    assert same(load(tmp_path / "out.pt"), direct)
    assert torch.load(tmp_path / "out.pt", weights_only=True)["preset"]["name"] == "paper"
    main(flags_of(files, tmp_path / "out.pt") + ["--half"])
    assert same(load(tmp_path / "out.pt"), direct.half().float())


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
    ("vae", "first_stage_model.decoder.up.1.upsample.conv.weight"),
    ("vae", "first_stage_model.encoder.mid.attn_1.q.weight"),
    ("diffusers", "decoder.mid_block.attentions.0.to_out.0.weight"),
    ("diffusers", "encoder.down_blocks.0.downsamplers.0.conv.weight")])
def test_one_key_wrong_is_refused_in_one_line(small, thin, part, key, change, tmp_path):
    if part == "diffusers" and change in ("whole", "foreign"):
        return
    _, states = small
    state = diffusers_state(states["vae"], True, False) if part == "diffusers" else dict(states[part])
    shape = tuple(state[key].shape)
    CHANGES[change](state, key)
    if part == "diffusers":
        write_safetensors(tmp_path / "changed", state)
    else:
        torch.save({released.PARTS[part].entry: state}, tmp_path / "changed")
    missing = f"our {released.our_name(key, released.PARTS[part].rules)!r}: expected {shape}, found no key for it"
    expected = {
        "removed": [missing],
        "renamed": [f"key {key + '_'!r}: expected no such key, found {shape}"],
        "reshaped": [f"key {key!r}: expected {shape}, found ({np.prod(shape)},)"],
        "surplus": ["key 'surplus.weight': expected no such key, found (2, 3)"],
        "whole": [f"key {key!r}: expected {shape}, found {shape} torch.int64"],
        "foreign": [f"key {key!r}: expected {shape}, found a list"],
    }[change]
    if change == "surplus" and part == "vae":  # the file has other networks' keys: only the first stage's count
        state["first_stage_model.surplus.weight"] = state.pop("surplus.weight")
        torch.save({"state_dict": state}, tmp_path / "changed")
        expected = ["key 'first_stage_model.surplus.weight': expected no such key, found (2, 3)"]
    network = "vae" if part == "diffusers" else part
    with pytest.raises(ValueError) as e:
        released.load_part(getattr(thin, network), network, tmp_path / "changed")
    assert all(words in str(e.value) for words in expected) and "\n" not in str(e.value)


def test_two_names_for_one_weight(small, refused, tmp_path):
    _, states = small
    state = diffusers_state(states["vae"], True, False) | diffusers_state(states["vae"], False, True)
    write_safetensors(tmp_path / "both", state)
    refused("vae", tmp_path / "both", "expected no such key")


def test_files_that_are_not_weights(small, refused, tmp_path):
    files, states = small
    bad = tmp_path / "bad"
    cut = files["vae"].read_bytes()[:-200000]
    for content in (b"", b"PK\3\4", b"not a checkpoint", b"\x80\x02", cut, b"\x80\x02]q\x00."):
        bad.write_bytes(content)
        refused("vae", bad, "not a PyTorch checkpoint")
    torch.save({"state_dict": states["vae"]}, bad, _use_new_zipfile_serialization=False)
    bad.write_bytes(bad.read_bytes()[:-1000])
    refused("vae", bad, "not a PyTorch checkpoint")
    torch.save({"weights": {}}, bad)
    refused("eft", bad, "'model_state_dict'", "'weights'")
    refused("eft", tmp_path / "none", "no such weights file")
    refused("eft", tmp_path, "no such weights file")


def test_what_a_file_says_is_printable(small, refused, tmp_path, capsys):
    """Names in a file cannot steer the terminal."""
    files, states = small
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x80\x02cos\nx\x1b[2Jy\n.")
    refused("vae", bad, r"x\x1b[2Jy")
    torch.save({"model_state_dict": states["eft"] | {"a\x1b[2J": torch.zeros(1)}}, bad)
    refused("eft", bad, r"a\x1b[2J")
    torch.save({"model_state_dict": states["eft"], "b\x1b[2J\n": 1}, bad)
    released_model(files | {"eft": bad})
    assert r"left alone: b\x1b[2J\n" in capsys.readouterr().out


def test_safetensors_that_lie(tmp_path, capsys):
    path, x = tmp_path / "x.safetensors", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}
    write_safetensors(path, x)
    good = path.read_bytes()
    assert all(torch.equal(x[k], v) for k, v in reading.read_safetensors(path).items())
    n = 8 + int.from_bytes(good[:8], "little")

    def header(change):
        h = json.loads(good[8:n])
        change(h)
        text = json.dumps(h).encode()
        return len(text).to_bytes(8, "little") + text + good[n:]

    lies = [good[:-1], good + b"\0", good[:n - 3], good[:9],
            b"\xff" * 8 + good[8:], (2**40).to_bytes(8, "little") + good[8:],
            header(lambda h: h["a"].update(shape=[2, 4])), header(lambda h: h["a"].update(shape=[-2, -3])),
            header(lambda h: h["a"].update(dtype="F99")), header(lambda h: h["a"].update(data_offsets=[0, 2**70])),
            header(lambda h: h["b"].update(data_offsets=[16, 24])),
            header(lambda h: h["b"].update(data_offsets=[28, 36])),
            header(lambda h: h["a"].update(data_offsets=[24, 0])),
            header(lambda h: h.update(a=3)), header(lambda h: h["a"].pop("shape")),
            header(lambda h: h.pop("b")), b"\x08" + bytes(7) + b"{{{{{{{{", header(lambda h: h["a"].update(shape="23"))]
    for lie in lies:
        path.write_bytes(lie)
        with pytest.raises(ValueError, match="not a complete safetensors file") as e:
            reading.read_safetensors(path)
        assert len(str(e.value).splitlines()) == 1 and str(path) in str(e.value)


# --- pickles that would run code ---

def evils(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    shell = f"touch {marker}"
    inner = pickle.dumps(Evil(os.system, shell))
    return {
        "system": Evil(os.system, shell), "partial": Evil(functools.partial, os.system, shell),
        "eval": Evil(eval, touch), "exec": Evil(exec, touch), "open": Evil(open, str(marker), "w"),
        "Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "__import__": Evil(__import__, "os"),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "copyfile": Evil(shutil.copyfile, __file__, str(marker)),
        "loads": Evil(pickle.loads, inner), "load": Evil(torch.load, str(marker)),
        "storage": Evil(torch.storage._load_from_bytes, inner),
        "map": Evil(list, Evil(map, eval, [touch])),
        "setattr": Evil(setattr, torch.Tensor, "shape", 1),
        "fromfile": Evil(np.fromfile, str(marker)),
    }


@pytest.mark.parametrize("name", evils(""))
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_code_in_a_pickle_is_refused_and_not_run(small, name, options, tmp_path):
    _, states = small
    marker, bad = tmp_path / "marker", tmp_path / "bad.pt"
    evil = evils(marker)[name]

    def refuse():
        words = "not a PyTorch checkpoint" if options else "could run code"
        with pytest.raises(ValueError, match=words) as e:
            reading.read(bad, "model_state_dict")
        assert len(str(e.value).splitlines()) == 1

    torch.save({"model_state_dict": states["eft"] | {"t1.pre.0.bias": evil}}, bad, **options)
    refuse()
    torch.save({"model_state_dict": states["eft"], "optimizer_state_dict": [{"state": evil}]}, bad, **options)
    refuse()
    bad.write_bytes(pickle.dumps(evil))
    options = {"none": True}
    refuse()
    assert not marker.exists()


def test_the_evil_ones_would_have_worked(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"x": evils(marker)["system"]}, tmp_path / "bad.pt")
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert marker.exists()


def test_code_behind_a_stand_in_is_refused(small, refused, tmp_path, monkeypatch):
    _, states = small
    marker, foreign = tmp_path / "marker", foreign_module(tmp_path / "marker")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, foreign.__name__, foreign)
        evil = Evil(foreign.touch, Evil(os.system, f"touch {marker}"))
        torch.save({"state_dict": states["vae"], "x": evil}, tmp_path / "bad.pt")
        # The framework is there this time, and still is not called.
        refused("vae", tmp_path / "bad.pt", "system")
    assert not marker.exists()


def write_pickle(path, content):
    """A zip file whose pickle has this content."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, record in records.items():
            file.writestr(name, content if name.endswith("data.pkl") else record)


@pytest.mark.parametrize("module,name", [
    ("posix", "system"), ("__builtin__", "eval"), ("__builtin__", "execfile"), ("commands", "getoutput"),
    ("os.path", "os.system"), ("collections", "OrderedDict.fromkeys"), ("torch.hub", "load"),
    ("numpy.testing._private.utils", "runstring")])
def test_names_that_are_refused(module, name, tmp_path):
    content = b"\x80\x02c%s\n%s\n." % (module.encode(), name.encode())
    write_pickle(tmp_path / "x", content)
    with pytest.raises(ValueError, match="could run code"):
        reading.read_pickled(tmp_path / "x")
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="Unsupported|not a PyTorch checkpoint"):
        reading.read_pickled(tmp_path / "x")


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
    """BUILD, which sets attributes, on the function that makes tensors, and on a stand-in's class."""
    path = tmp_path / "x"
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cforeign\nX\n", b"ccollections\nCounter\n"):
        write_pickle(path, b"\x80\x02" + name + b"}X\x0c\x00\x00\x00dump_patchesK\x01sb.")
        with pytest.raises(ValueError, match="Can only build"):
            reading.read_pickled(path)
    assert not hasattr(reading.Inert, "dump_patches")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "x"))
    with pytest.raises(ValueError, match="torchscript"):
        reading.read_pickled(tmp_path / "x")


# --- LPIPS ---

@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Torchvision's VGG16 and the LPIPS package's weights."""
    folder = tmp_path_factory.mktemp("lpips")
    files = [folder / "vgg16-397923af.pth", folder / "vgg.pth"]
    vgg, lin = lpips_states()
    torch.save(vgg, files[0], _use_new_zipfile_serialization=False)  # the public file is of the old kind
    torch.save(lin, files[1])
    return files


def test_lpips_has_every_key_of_its_files(lpips_files):
    vgg, lin = lpips_states()
    lpips = released.load_lpips(*lpips_files)
    ours = lpips.state_dict()
    for key, value in vgg.items():
        assert key.startswith("classifier.") or torch.equal(ours.pop(key), value)
    for i in range(5):
        assert torch.equal(ours.pop(f"channel_weights.{i}"), lin[f"lin{i}.model.1.weight"])
    assert ours.keys() == {"shift", "scale"} and all(torch.equal(ours[k], VGG16LPIPS().state_dict()[k]) for k in ours)
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training


@pytest.mark.parametrize("case", [
    "absent", "garbage", "pickle", "list", "missing", "surplus", "renamed", "shape", "not a tensor"])
@pytest.mark.parametrize("which", [0, 1])
def test_bad_lpips_files_are_refused_in_one_line(tmp_path, lpips_files, case, which):
    state = lpips_states()[which]
    key, ours, shape = [("features.7.bias", "features.7.bias", "(128,)"),
                        ("lin2.model.1.weight", "channel_weights.2", "(1, 256, 1, 1)")][which]
    missing = f"our {ours!r}: expected {shape}, found no key for it"
    bad, words = tmp_path / "bad.pth", []
    if case == "missing":
        del state[key]
        words = [missing]
    elif case == "surplus":
        state["extra.weight"] = torch.zeros(1)
        words = ["key 'extra.weight': expected no such key, found (1,)"]
    elif case == "renamed":
        state["x." + key] = state.pop(key)
        words = [f"key {'x.' + key!r}: expected no such key"]
    elif case == "shape":
        state[key] = torch.zeros(3)
        words = [f"key {key!r}: expected {shape}, found (3,)"]
    elif case == "not a tensor":
        state[key] = 1.5
        words = [f"key {key!r}: expected {shape}, found a float"]
    elif case == "list":
        state = [1, 2]
        words = ["list"]
    elif case == "pickle":
        state = {"x": Evil(open, str(tmp_path / "ran"), "w")}
        words = ["could run code"]
    if case == "garbage":
        bad.write_bytes(b"not weights at all")
    elif case != "absent":
        torch.save(state, bad)
    files = [*lpips_files]
    files[which] = bad
    with pytest.raises(FileNotFoundError if case == "absent" else ValueError) as e:
        released.load_lpips(*files)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in ["bad.pth", *words]), str(e.value)
    assert not (tmp_path / "ran").exists()


def test_negative_channel_weights_are_refused(tmp_path, lpips_files):
    state = lpips_states()[1]
    state["lin3.model.1.weight"][0, 5] = -0.1
    torch.save(state, tmp_path / "lin.pth")
    with pytest.raises(ValueError, match="lin.pth: .*'lin3.model.1.weight' has negative weights"):
        released.load_lpips(lpips_files[0], tmp_path / "lin.pth")


# --- full size ---

def test_full_size():
    """The whole released model by its names: parameter counts and recorded numbers."""
    f, u = parity.load("eft"), parity.load("unet_full")
    model = blank(presets.PAPER)
    for part in ("eft", "vldm"):
        state = parity.weights(part)
        assert released.count_parameters(state) == parity.manifest(part)["parameter_count"]
        released.fill(getattr(model, part), state, released.PARTS[part], part)
    ready(model, "cpu")

    # The EFT's picture.
    views, cameras = f["in_views1"], Cameras(*(f["in_cam_" + k] for k in "RTfc"))
    images, (near, far), query = f["in_images"][views], f["mid_depth_range"], [int(f["in_query"])]
    size = f["out_set1_rgb"].shape[1]
    parity.assert_close(torch.tensor(model.eft_world(cameras)[1:]), torch.tensor([1.0, near, far]), rtol=1e-6)
    condition = model.condition(images, cameras[views], cameras[query], cameras, where=torch.ones(1, size, size) > 0)
    parity.assert_close(condition.images[0].permute(1, 2, 0)[None], f["out_set1_rgb"], std=1e-4)

    # The UNet at three times, without conditioning, guided.
    x, cond, log_snrs = u["in_x"], u["in_cond"], cosine_log_snr(u["in_t"])
    parity.assert_close(log_snrs, u["mid_log_snr"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        times = torch.cat([log_snrs, log_snrs[1:2]])
        *out, null = model.vldm.unet(x.expand(4, -1, -1, -1), times, torch.cat([cond, cond, cond, 0 * cond])).split(1)
    parity.assert_close(torch.stack(out), u["out_eps"], std=1e-4)
    parity.assert_close(null, u["out_eps_null"], std=1e-4)
    parity.assert_close(null + u["in_cond_scale"] * (out[1] - null), u["out_eps_cfg"], std=1e-4)
