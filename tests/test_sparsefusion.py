"""The model as one object: weights out and in, shapes and ranges, the same numbers again."""
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import files
import parity
import sparsefusion
from co3d import load_packed
from helpers import Evil, one_line, same
from presets import SMALL
from small import SHORT, TINY, tiny_model

SAMPLE = Path(__file__).resolve().parent.parent / "sample" / "co3d"


# --- files ---

@pytest.mark.parametrize("preset", [*sparsefusion.PRESETS.values(), TINY, SMALL], ids=lambda p: p.name)
def test_presets_survive_a_file(preset, tmp_path):
    files.save_tensors({"preset": asdict(preset), "weights": {}}, tmp_path / "p")
    assert sparsefusion.read_preset(tmp_path / "p") == preset
    assert preset.latent_size == preset.image_size // 2 ** (len(preset.vae.widths) - 1)


def test_all_state_is_saved():
    """`blank` models get every number from the file: no buffer is left out of the state dict."""
    for preset in sparsefusion.PRESETS.values():
        with torch.device("meta"):
            model = sparsefusion.SparseFusion(preset)
        assert {k for k, _ in [*model.named_buffers(), *model.named_parameters()]} == model.state_dict().keys()


@pytest.mark.parametrize("half", [True, False])
def test_save_and_load(half, tmp_path):
    model = tiny_model()
    sparsefusion.save(model, tmp_path / "deep" / "model.pt", half)
    loaded = sparsefusion.load(tmp_path / "deep" / "model.pt")
    assert loaded.preset == TINY and not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert loaded.fingerprint == files.fingerprint(tmp_path / "deep" / "model.pt") != model.fingerprint
    assert same(loaded, model.half().float() if half else model)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model.pt"]


def test_the_shipped_weights_load():
    """They were written before 0.2, with the sampler's numbers in the diffusion and another spelling of a layer."""
    raw = torch.load(sparsefusion.SHIPPED, weights_only=True)
    assert "steps" in raw["preset"]["diffusion"] and "eft.colour.weight" in raw["weights"]
    model, nano = sparsefusion.load(sparsefusion.SHIPPED), sparsefusion.PRESETS["nano"]
    assert model.preset == replace(nano, vae=replace(nano.vae, scale=model.preset.vae.scale))
    assert torch.equal(model.eft.color.weight, raw["weights"]["eft.colour.weight"].float())


def test_broken_checkpoints(tmp_path):
    path, model = tmp_path / "model.pt", tiny_model()
    sparsefusion.save(model, path)
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
            sparsefusion.load(path)
        assert len(str(e.value).splitlines()) == 1 and str(path) in str(e.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        sparsefusion.load(tmp_path / "none")
    assert not (tmp_path / "marker").exists()


# --- the model ---

def test_shapes_and_ranges():
    model, g = tiny_model(), torch.Generator().manual_seed(0)
    scene = load_packed([SAMPLE], "toys", ["toy_1000_00000"], 4, TINY.image_size, workers=1)[0]
    depth_range = model.depth_range(scene.cameras)
    features, images = model.condition(scene.images[:2], scene.cameras[:2], scene.cameras[2:], depth_range)
    assert features.shape == (2, 16, 8, 8) and images.shape == (2, 3, 8, 8) and 0 <= images.min() and images.max() <= 1
    sampled = model.sample_view(features, g, replace(SHORT.sampler, sample_steps=3))
    assert sampled.shape == (2, 3, 32, 32) and 0 <= sampled.min() and sampled.max() <= 1
    for noise_level in (0.0, 0.3, 1.0):
        shown = model.denoise(scene.images[2:], features, noise_level, g.manual_seed(1), SHORT.sampler)
        again = model.denoise(scene.images[2:], features, noise_level, g.manual_seed(1), SHORT.sampler)
        assert shown.shape == (2, 3, 32, 32) and torch.equal(shown, again)
    one = model.condition(scene.images[:2], scene.cameras[:2], scene.cameras[3:], depth_range)
    parity.assert_close(one.features[0], features[1], std=1e-4)


def test_guidance_reaches_the_sampler():
    model, g = tiny_model(), torch.Generator()
    x, features = torch.rand(1, 3, 32, 32, generator=g.manual_seed(2)), torch.rand(1, 16, 8, 8, generator=g)
    plain = model.denoise(x, features, 0.5, g.manual_seed(1), SHORT.sampler)
    guided = model.denoise(x, features, 0.5, g.manual_seed(1), replace(SHORT.sampler, guidance=3.0))
    assert not torch.equal(plain, guided)


def test_training_mode_of_the_eft():
    """Batch statistics are those of the inputs then; afterwards the model is what it was told to be."""
    model = tiny_model()
    scene = load_packed([SAMPLE], "toys", ["toy_1000_00000"], 4, TINY.image_size, workers=1)[0]
    given = (scene.images[:2], scene.cameras[:2], scene.cameras[2:3], model.depth_range(scene.cameras))
    clean = model.condition(*given).features
    assert not torch.equal(model.condition(*given, train_mode=True).features, clean) and model.eft.training
    model.condition(*given)
    assert not model.eft.training


def test_feature_distance():
    model, x = tiny_model(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = (x + 0.1).clamp(0, 1).requires_grad_(True)
    d = model.feature_distance(x, y)
    assert d.shape == (2,) and (d > 0).all() and torch.equal(model.feature_distance(x, x), torch.zeros(2))
    d.sum().backward()
    assert y.grad.abs().sum() > 0


def test_commands_are_needed(capsys):
    for argv in ([], ["fly"], ["convert"], ["convert", "--eft", "a"]):
        one_line(capsys, sparsefusion.main, argv, "error:")
