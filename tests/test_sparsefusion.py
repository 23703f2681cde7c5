"""The model as one object: checkpoints out and in, losses, training, the command line."""
import functools
import itertools
import os
import pickle
import shutil
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import eft
import parity
import sparsefusion as sf
import vldm
from co3d import load_packed
from test_released import SMALL, Evil, one_line, same

SAMPLE = Path(__file__).resolve().parent.parent / "sample" / "co3d"

# What is trained here.
TINY = sf.Preset("nano", 32, replace(eft.NANO, stem=8, stages=(8, 12, 16), blocks=1, width=16, layers=1, feedforward=16, depths=4),
                 vldm.VAEConfig(widths=(8, 8, 16), groups=4, blocks=1),
                 vldm.UNetConfig(cond_channels=16, widths=(16, 16, 16), attention=(False, True), kernels=(3,), groups=4, heads=2,
                                 head_dim=8, time_dim=32, token_dim=16),
                 replace(vldm.NANO[2], noisings=2))


# --- checkpoints ---

def tiny(seed=0, preset=TINY):
    torch.manual_seed(seed)
    return sf.SparseFusion(preset)


@pytest.mark.parametrize("preset", [*sf.PRESETS.values(), TINY, SMALL], ids=lambda p: p.name)
def test_presets_survive_a_file(preset, tmp_path):
    sf.save_atomically(asdict(preset), tmp_path / "p")
    assert sf.Preset.from_dict(torch.load(tmp_path / "p", weights_only=True)) == preset
    assert preset.latent_size == preset.image_size // 2 ** (len(preset.vae.widths) - 1)


def test_all_state_is_saved():
    """`blank` models get every number from the file: no buffer is left out of the state dict."""
    for preset in sf.PRESETS.values():
        with torch.device("meta"):
            model = sf.SparseFusion(preset)
        assert {k for k, _ in [*model.named_buffers(), *model.named_parameters()]} == model.state_dict().keys()


@pytest.mark.parametrize("half", [True, False])
def test_save_and_load(half, tmp_path):
    model = tiny()
    sf.save(model, tmp_path / "deep" / "model.pt", half)
    loaded = sf.load(tmp_path / "deep" / "model.pt")
    assert loaded.preset == TINY and not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert same(loaded, model.half().float() if half else model)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model.pt"]


def test_the_shipped_weights_load():
    model = sf.load(sf.SHIPPED)
    assert model.preset == replace(sf.PRESETS["nano"], vae=replace(sf.PRESETS["nano"].vae, scale=model.preset.vae.scale))


def test_broken_checkpoints(tmp_path):
    path, model = tmp_path / "model.pt", tiny()
    sf.save(model, path)
    good = torch.load(path, weights_only=True)
    broken = [path.read_bytes()[:-100], b"", b"text", pickle.dumps(Evil(os.system, f"touch {tmp_path / 'marker'}"))]
    weights = good["weights"]
    for data in ({"model_state_dict": {}}, [], {"weights": 3}, good | {"weights": dict(list(weights.items())[1:])},
                 good | {"weights": weights | {"extra": torch.zeros(1)}}, good | {"preset": {}}, {"weights": weights},
                 good | {"preset": good["preset"] | {"eft": {"stem": "a"}}}, good | {"preset": asdict(SMALL)},
                 good | {"preset": good["preset"] | {"vae": {"widths": ()}}}):
        torch.save(data, tmp_path / "x")
        broken.append((tmp_path / "x").read_bytes())
    torch.save(good, tmp_path / "x", _use_new_zipfile_serialization=False)
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError) as e:
            sf.load(path)
        assert len(str(e.value).splitlines()) == 1 and str(path) in str(e.value)
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        sf.load(tmp_path / "none")
    assert not (tmp_path / "marker").exists()


# --- the model ---

def test_shapes_and_ranges():
    model, g = sf.ready(tiny(), "cpu"), torch.Generator().manual_seed(0)
    scene = load_packed([SAMPLE], "toys", ["toy_1000_00000"], 4, TINY.image_size, workers=1)[0]
    near, far = sf.depth_limits(TINY, scene.cameras)
    features, images = model.condition(scene.images[:2], scene.cameras[:2], scene.cameras[2:], near, far)
    assert features.shape == (2, 16, 8, 8) and images.shape == (2, 3, 8, 8) and 0 <= images.min() and images.max() <= 1
    sampled = model.sample(features, g, steps=3)
    assert sampled.shape == (2, 3, 32, 32) and 0 <= sampled.min() and sampled.max() <= 1
    for level in (0.0, 0.3, 1.0):
        again = model.denoise(scene.images[2:], features, level, g.manual_seed(1))
        assert again.shape == (2, 3, 32, 32) and torch.equal(again, model.denoise(scene.images[2:], features, level, g.manual_seed(1)))
    one = model.condition(scene.images[:2], scene.cameras[:2], scene.cameras[3:], near, far)
    parity.assert_close(one.features[0], features[1], std=1e-4)


def test_perceptual_distance_is_one():
    model, x = sf.ready(tiny(), "cpu"), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = (x + 0.1).clamp(0, 1).requires_grad_(True)
    d = model.perceptual(x, y)
    assert d.shape == (2,) and (d > 0).all() and torch.equal(model.perceptual(x, x), torch.zeros(2))
    d.sum().backward()
    assert y.grad.abs().sum() > 0


# --- the losses, released numbers ---

def test_loss_parity():
    f = parity.load("losses")
    error = f["in_render"] - f["in_rgb"]
    parity.assert_close(sf.pseudo_huber(error), f["out_huber_map"], rtol=1e-5, atol=2e-7)  # a unit in the last place of 1 + x^2
    parity.assert_close(sf.pseudo_huber(error).mean()[None], f["out_huber_mean"], rtol=1e-5)
    parity.assert_close(sf.pseudo_huber(error, 1.0), f["out_huber_scaling1"], rtol=1e-5, atol=2e-7)
    colour, silhouette = sf.pseudo_huber(error).mean(), sf.pseudo_huber(f["in_sil"] - f["in_mask"]).mean()
    parity.assert_close(colour[None], f["out_color_err"], rtol=1e-5)
    parity.assert_close(silhouette[None], f["out_sil_err"], rtol=1e-5)
    parity.assert_close((colour + silhouette)[None], f["out_photometric"], rtol=1e-5)


def test_training_colour_loss_parity():
    """The released training loss: colours of the photograph at the rays' positions, the mask of its valid part at their resolution."""
    f = parity.load("losses")
    side = f["in_grid_xy"].shape[1]
    mask = vldm.latent_mask(f["in_valid_region"], side)
    parity.assert_close(mask, f["out_train_mask"])
    colours = sf.colours_at(f["in_mc_image"], f["in_grid_xy"].flatten(0, 2), aligned=True).transpose(1, 2).unflatten(-1, (side, side))
    loss = (sf.pseudo_huber(f["in_render"] - colours) * mask).mean()
    parity.assert_close(loss[None], f["out_train_color_loss"], rtol=1e-5)


def test_sampled_colour_parity():
    f = parity.load("losses")
    colours = sf.colours_at(f["in_mc_image"], f["in_grid_xy"].flatten(0, 2), aligned=True)
    expected = f["out_sampled_colors"].flatten(1, 2)
    parity.assert_close(colours, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(sf.colours_at(f["in_mc_image"], f["in_grid_xy"].flatten(0, 2)), expected, atol=1e-3)


def test_colours_at_pixel_centres():
    """Pixel (row, column) of an image of side S is at NDC 1 - (2 i + 1) / S, left and up."""
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    at = 1 - (2 * torch.arange(4) + 1) / 4
    xy = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).reshape(-1, 2)  # row by row
    parity.assert_close(sf.colours_at(image, xy), image.flatten(2).transpose(1, 2), atol=1e-6)


def test_pseudo_huber_is_quadratic_then_linear():
    assert sf.pseudo_huber(torch.tensor(1e-3).double()) == pytest.approx(1e-6 / 0.2, rel=1e-3)
    assert sf.pseudo_huber(torch.tensor(100.0)) == pytest.approx(100 - 0.1, rel=1e-4)


# --- training ---

@pytest.fixture
def training(tmp_path, monkeypatch):
    """A function that runs `train` on the shipped sample with a tiny preset and returns the weights file."""
    monkeypatch.setitem(sf.PRESETS, "nano", TINY)
    monkeypatch.setattr(sf, "load_packed", functools.partial(load_packed, workers=1))

    def train(what, out, *flags):
        sf.main(["train", what, "--root", str(SAMPLE), "--frames", "5", "--batch", "2", "--steps", "3", "--device", "cpu",
                 "--out", str(tmp_path / out), *map(str, flags)])
        return tmp_path / out
    return train


def test_training_and_resuming(training, tmp_path, capsys):
    vae, again = training("vae", "vae.pt"), training("vae", "vae2.pt", "--minutes", 1e-9)
    assert "stopped" in capsys.readouterr().out and not same(sf.load(vae), sf.load(again))
    training("vae", "vae2.pt")
    assert "resuming vae2.pt at step 1" in capsys.readouterr().out
    assert same(sf.load(vae), sf.load(again)) and sf.load(vae).preset == sf.load(again).preset
    assert sf.load(vae).preset.vae.scale != TINY.vae.scale

    prior, other = training("prior", "prior.pt", "--vae", vae), training("prior", "prior2.pt", "--vae", vae, "--minutes", 1e-9)
    half_way = sf.load(other)
    training("prior", "prior2.pt", "--vae", vae)
    assert same(sf.load(prior), sf.load(other)) and not same(half_way, sf.load(other))
    assert same(sf.load(prior).vae, sf.load(vae).half().float().vae)  # frozen
    assert not same(sf.load(prior).eft, tiny().eft)

    one, two = training("perceptual", "p.pt"), training("perceptual", "p2.pt", "--minutes", 1e-9)
    training("perceptual", "p2.pt")
    one, two = (sf.read_checkpoint(p)["weights"] for p in (one, two))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_killed_training_goes_on_from_what_it_saved_by_itself(training, tmp_path, monkeypatch, capsys):
    whole, clock, steps = training("vae", "whole.pt"), itertools.count(0, 200), itertools.count(1)

    def ema(*args, real=sf.ema):
        if next(steps) == 3:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sf, "time", types.SimpleNamespace(time=lambda: next(clock)))  # 200 s between looks
        m.setattr(sf, "ema", ema)
        training("vae", "killed.pt")
    assert "resuming" not in capsys.readouterr().out
    killed = training("vae", "killed.pt")
    assert "resuming killed.pt at step 1" in capsys.readouterr().out
    assert same(sf.load(whole), sf.load(killed))


def test_another_seed_trains_another_model(training):
    assert not same(sf.load(training("vae", "a.pt")), sf.load(training("vae", "b.pt", "--seed", 1)))


def test_state_of_another_training(training, tmp_path, capsys):
    vae = training("vae", "vae.pt")
    shutil.copy(tmp_path / "vae.pt.state", tmp_path / "p.pt.state")
    flags = ["--root", SAMPLE, "--frames", 5, "--steps", 3, "--out"]
    one_line(capsys, ["train", "perceptual", *flags, tmp_path / "p.pt"], tmp_path / "p.pt.state", "another training")
    (tmp_path / "p.pt.state").write_bytes(b"junk")
    one_line(capsys, ["train", "perceptual", *flags, tmp_path / "p.pt"], tmp_path / "p.pt.state")
    one_line(capsys, ["train", "prior", *flags, tmp_path / "q.pt", "--vae", tmp_path / "vae.pt.state"], "vae.pt.state")
    assert vae.exists() and not (tmp_path / "q.pt").exists()


def test_the_average_follows_the_weights():
    layer = nn.BatchNorm1d(2)
    average = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        layer.weight.add_(1.0), layer.num_batches_tracked.add_(5)
    sf.ema(average, layer, 0.75)
    assert torch.allclose(average["weight"], torch.full((2,), 1.25)) and average["num_batches_tracked"] == 5


# --- the command line ---

@pytest.mark.parametrize("flags,words", [
    (["--steps", "0"], "--steps"), (["--steps", "x"], "--steps"), (["--batch", "-1"], "--batch"), (["--frames", "1.5"], "--frames"),
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"), (["--ema", "1"], "--ema"), (["--ema", "x"], "--ema"),
    (["--minutes", "-3"], "--minutes"), (["--seed", "x"], "--seed"), (["--preset", "huge"], "--preset"), (["--device", "tpu"], "--device"),
    (["--root"], "--root"),
    (["--unknown"], "--unknown"), (["--frames", "999"], "toys"), (["--category", "cars"], "cars"), (["--root", "nowhere"], "nowhere")])
def test_bad_values(flags, words, tmp_path, capsys):
    one_line(capsys, ["train", "vae", "--root", SAMPLE, "--out", tmp_path / "x", *flags], words)


@pytest.mark.parametrize("flags", [[], ["--fewest", "5"], ["--frames", "4"]])
def test_prior_needs(flags, tmp_path, capsys):
    vae = ["--vae", "x"] * bool(flags)
    one_line(capsys, ["train", "prior", "--root", SAMPLE, "--out", tmp_path / "x", *vae, *flags], "--vae", "--fewest")


def test_commands_are_needed(capsys):
    for argv in ([], ["fly"], ["train"], ["train", "cat"], ["convert"], ["convert", "--eft", "a"]):
        one_line(capsys, argv, "error:")


def test_attributes_are_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sf, "load_packed", functools.partial(load_packed, workers=1))
    shutil.copytree(SAMPLE, tmp_path / "co3d")
    (tmp_path / "co3d" / "toys" / "sequence_annotations.jgz").unlink()
    flags = ["--root", tmp_path / "co3d", "--out", tmp_path / "x", "--frames", 5]
    one_line(capsys, ["train", "perceptual", *flags], "sequence_annotations.jgz")
