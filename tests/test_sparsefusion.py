"""The model as one object: weights out and in, shapes and ranges, the same numbers again."""
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import presets
import sparsefusion
import vldm
from cameras import Similarity, depth_range
from checkpoints import convert
from common import files
from datasets.co3d import load_sequence
from eft import hull_maps
from tests.support import parity
from tests.support.helpers import Evil, one_line, same
from tests.support.small import RELATIVE, SHORT, TINY, ball, tiny_model
from tests.support.thin import SMALL

SAMPLE = Path(__file__).resolve().parent.parent / "sample" / "co3d"
FRAMES = [1, 8, 16, 24]  # of a toy, from all around


# --- files ---

@pytest.mark.parametrize("preset", [*presets.MODELS.values(), TINY, RELATIVE, SMALL], ids=lambda p: p.name)
def test_presets_survive_a_file(preset, tmp_path):
    files.save_tensors({"preset": asdict(preset), "weights": {}}, tmp_path / "p")
    assert sparsefusion.read_preset(tmp_path / "p") == preset
    assert preset.latent_size == preset.image_size // (preset.vae.patch * 2 ** (len(preset.vae.widths) - 1))


def test_all_state_is_saved():
    """`blank` models get every number from the file: no buffer is left out of the state dict."""
    for preset in presets.MODELS.values():
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
    """They are the preset `nano`, in at most 16 MB, and say what they were trained on."""
    model, nano = sparsefusion.load(sparsefusion.SHIPPED), presets.MODELS["nano"]
    assert model.preset == replace(nano, vae=replace(nano.vae, scale=model.preset.vae.scale))
    assert sparsefusion.SHIPPED.stat().st_size < 16e6
    trainings = sparsefusion.read_trained_on(sparsefusion.SHIPPED)
    assert [(x["what"], x["category"]) for x in trainings] == [("vae", "toys"), ("vae", "things"), ("prior", "toys")]


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
    scene = load_sequence(SAMPLE, "toys", "toy_1000_00000", TINY.image_size, FRAMES)
    views = scene.cameras
    features, images = model.condition(scene.images[:2], scene.cameras[:2], scene.cameras[2:], views)
    assert features.shape == (2, 16, 8, 8) and images.shape == (2, 3, 8, 8) and 0 <= images.min() and images.max() <= 1
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    sampled = model.sample_view(features, generators, replace(SHORT.sampler, sample_steps=3))
    assert sampled.shape == (2, 3, 32, 32) and 0 <= sampled.min() and sampled.max() <= 1
    for noise_level in (0.0, 0.3, 1.0):
        shown = model.denoise(scene.images[2:], features, [noise_level] * 2, g.manual_seed(1), SHORT.sampler)
        again = model.denoise(scene.images[2:], features, [noise_level] * 2, g.manual_seed(1), SHORT.sampler)
        assert shown.shape == (2, 3, 32, 32) and torch.equal(shown, again)
    one = model.condition(scene.images[:2], scene.cameras[:2], scene.cameras[3:], views)
    parity.assert_close(one.features[0], features[1], std=1e-4)


@pytest.mark.parametrize("solver", ["plms", "dpmpp"])
def test_images_denoised_together_are_as_denoised_alone(solver):
    """In any order, each with its level."""
    model, g = tiny_model(), torch.Generator().manual_seed(0)
    x, features = torch.rand(4, 3, 32, 32, generator=g), torch.rand(4, 16, 8, 8, generator=g)
    sampler, levels = replace(SHORT.sampler, solver=solver, denoise_steps=4), [0.1, 0.9, 0.02, 0.4]
    together = model.denoise(x, features, levels, g.manual_seed(1), sampler)

    # One generator draws for one image after the other.
    noise = torch.randn(4, *model.vae.encode(x).shape[1:], generator=g.manual_seed(1))
    for i in range(4):
        one = slice(i, i + 1)
        latent = model.vae.encode(x[one])
        denoiser = model.vldm.denoiser(features[one], sampler)
        alone = model.decode(vldm.denoise(denoiser, latent, [levels[i]], lambda: noise[one], sampler))
        parity.assert_close(together[one], alone, atol=1e-4)


def test_guidance_reaches_the_sampler():
    model, g = tiny_model(), torch.Generator()
    x, features = torch.rand(1, 3, 32, 32, generator=g.manual_seed(2)), torch.rand(1, 16, 8, 8, generator=g)
    plain = model.denoise(x, features, [0.5], g.manual_seed(1), SHORT.sampler)
    guided = model.denoise(x, features, [0.5], g.manual_seed(1), replace(SHORT.sampler, guidance=3.0))
    assert not torch.equal(plain, guided)


def shaky_model():
    """A model whose EFT drops out, and arguments of `condition` for two query views."""
    torch.manual_seed(0)
    model = sparsefusion.SparseFusion(replace(TINY, eft=replace(TINY.eft, dropout=0.3)))
    model = sparsefusion.ready(model, "cpu")
    scene = load_sequence(SAMPLE, "toys", "toy_1000_00000", TINY.image_size, FRAMES)
    given = (scene.images[:2], scene.cameras[:2])
    return model, given, scene.cameras[2:], scene.cameras


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_eft_sees_the_same_scene_in_any_unit(scale):
    """With weights that know a distance. The released ones take the units as they are."""
    model, given, queries, views = shaky_model()

    def features(factor):
        images, inputs = given
        return model.condition(images, inputs.scaled(factor), queries.scaled(factor), views.scaled(factor)).features

    as_is = features(1.0)
    assert (as_is - features(scale)).abs().max() > 0.1 * as_is.std()
    model.trained_distance = 9.8
    torch.testing.assert_close(features(1.0), features(scale), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (7.0, 0.0), (0.01, 0.0), (1.0, 20.0), (3.0, -5.0)])
def test_the_relative_eft_sees_the_same_scene_in_any_world(scale, shift):
    """Turned, scaled and moved, in float64; nor does the order of the inputs matter."""
    model = tiny_model(preset=RELATIVE).double()
    scene = load_sequence(SAMPLE, "toys", "toy_1000_00000", TINY.image_size, FRAMES)
    axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    world = Similarity(axes * axes.det(), scale, shift * torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64))

    def condition(inputs, cameras):
        return model.condition(images[inputs], cameras[inputs], cameras[3:], cameras)

    images, own = scene.images.double(), scene.cameras.to(torch.float64)
    as_is = condition([0, 1, 2], own)
    assert as_is.images.shape == (1, 3, TINY.map_size, TINY.map_size)
    for other in (condition([0, 1, 2], world.cameras(own)), condition([2, 0, 1], own)):
        for a, b in zip(other, as_is):
            parity.assert_close(a, b, atol=1e-5)
    assert (condition([0, 1], own).features - as_is.features).abs().max() > 1e-3


def test_units_of_the_eft():
    """Cameras are brought to the distance that the weights know; the points reach as far as in training."""
    model = tiny_model()
    cameras = ball(4, 32).cameras
    near, far = depth_range(cameras)
    assert model.eft_world(cameras)[1:] == (1.0, near, far)
    model.trained_distance = 20.0
    _, scale, *depths = model.eft_world(cameras)
    assert scale == pytest.approx(20 / cameras.centers().norm(dim=-1).mean().item()) and depths == [15.0, 25.0]


def test_weights_name_the_distance_that_they_know(tmp_path):
    """A file of ours without the entry has the toys'; a converted one has none."""
    model = tiny_model()
    path = tmp_path / "model.pt"
    for distance in (None, 12.5):
        model.trained_distance = distance
        sparsefusion.save(model, path)
        assert sparsefusion.load(path).trained_distance == distance
    assert sparsefusion.load(sparsefusion.SHIPPED).trained_distance == 9.8

    # What is no distance, and what older files are.
    data = files.read_tensors(path)
    for wrong in (0.0, -1.0, float("nan"), "far", 3):
        files.save_tensors(data | {"trained_distance": wrong}, path)
        with pytest.raises(ValueError, match="trained_distance .* is no distance"):
            sparsefusion.load(path)
    del data["trained_distance"]
    for name, trained_on, distance in (("nano", [], 9.8), ("paper", [], None),
                                       ("paper", [{"what": "prior", "category": "toys"}], 9.8)):
        files.save_tensors(data | {"preset": data["preset"] | {"name": name}, "trained_on": trained_on}, path)
        assert sparsefusion.trained_distance(path) == distance


def test_training_mode_of_the_eft_leaves_no_trace():
    """Batch statistics are those of the inputs then; afterwards the model is what it was, and so is all else."""
    model, given, queries, views = shaky_model()
    clean = model.condition(*given, queries, views)
    state, numbers = {k: x.clone() for k, x in model.state_dict().items()}, torch.get_rng_state()
    modules = {name: dict(vars(part)) for name, part in model.named_modules()}
    shaken = model.condition(*given, queries, views, dropout_seed=0)
    assert not torch.allclose(shaken.features, clean.features)
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    assert all(vars(part).keys() == modules[name].keys() for name, part in model.named_modules())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(model.condition(*given, queries, views).features, clean.features)
    with pytest.raises(RuntimeError):  # even where it fails
        model.condition(given[0][:, :2], given[1], queries, views, dropout_seed=0)
    assert not any(part.training for part in model.modules())
    assert torch.equal(model.condition(*given, queries, views).features, clean.features)


def test_training_mode_without_dropout_is_batch_statistics():
    model = tiny_model()
    scene = load_sequence(SAMPLE, "toys", "toy_1000_00000", TINY.image_size, FRAMES)
    given = (scene.images[:2], scene.cameras[:2], scene.cameras[2:3], scene.cameras)
    shaken = model.condition(*given, dropout_seed=0).features
    other = replace(TINY, eft=replace(TINY.eft, dropout=0.0))
    model.eft.train()
    assert other == TINY
    view = model.eft.image(model.eft.encode(given[0]), given[0], given[1], given[2][0], TINY.map_size,
                           *depth_range(scene.cameras))
    parity.assert_close(shaken[0], view.features, rtol=1e-4, atol=1e-5)


def test_dropout_follows_from_the_seed_and_the_view():
    model, given, queries, views = shaky_model()

    def features(queries, seed=0):
        return model.condition(*given, queries, views, dropout_seed=seed).features

    both = features(queries)
    torch.manual_seed(99)
    assert torch.equal(features(queries), both)
    assert torch.equal(features(queries[:1])[0], both[0])  # however many others there are
    twice = features(queries[[0, 0]], seed=1)
    assert not torch.equal(twice[0], twice[1]) and not torch.equal(twice[0], both[0])
    assert not torch.equal(features(queries, seed=5), both)


def test_fewer_rays_at_once_where_there_are_more_input_views(monkeypatch):
    """Memory grows with rays times views; the numbers stay the same."""
    model, given, queries, views = shaky_model()
    whole = model.condition(*given, queries, views)
    chunks, image = [], model.eft.image
    monkeypatch.setattr(model.eft, "image", lambda *args: chunks.append((len(args[3]), args[7])) or image(*args))
    monkeypatch.setattr(sparsefusion, "EFT_BYTES", {"cpu": 40 * model.eft.ray_bytes(1)})
    parts = model.condition(*given, queries, views)
    model.condition(given[0][[0] * 50], given[1][[0] * 50], queries, views)
    assert chunks == [(1, 20), (1, 20), (1, 1), (1, 1)]
    parity.assert_close(parts.features, whole.features, std=1e-4)


def test_viewpoints_in_batches_are_viewpoints_one_by_one(monkeypatch):
    """As many as the budget holds, the last batch smaller; in training mode one at a time, for its random numbers."""
    model, given, queries, views = shaky_model()
    queries = queries[[0, 1, 0, 1, 1]]
    batches, image = [], model.eft.image
    monkeypatch.setattr(model.eft, "image", lambda *args: batches.append(len(args[3])) or image(*args))
    monkeypatch.setattr(sparsefusion, "EFT_BYTES", {"cpu": 130 * model.eft.ray_bytes(2)})  # of 8 x 8 rays a view
    together = model.condition(*given, queries, views)
    shaken = model.condition(*given, queries, views, dropout_seed=0)
    assert batches == [2, 2, 1, 1, 1, 1, 1, 1]
    for i in range(len(queries)):
        alone = model.condition(*given, queries[i:i + 1], views)
        parity.assert_close(together.features[i], alone.features[0], std=1e-5)
        parity.assert_close(together.images[i], alone.images[0], atol=1e-5)
    assert not torch.equal(shaken.features[0], shaken.features[2])


def test_some_rays_of_every_viewpoint():
    """They get what they would get among all; the others get zeros."""
    model, given, queries, views = shaky_model()
    where = torch.rand(2, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.4
    whole = model.condition(*given, queries, views, where=torch.ones_like(where))
    some = model.condition(*given, queries, views, where=where)
    for part, all_of_it in zip(some, whole):
        parity.assert_close(part, all_of_it * where[:, None], atol=1e-5)
        assert part.movedim(1, -1)[~where].eq(0).all() and part.movedim(1, -1)[where].abs().sum(-1).gt(0).all()


def test_rays_of_the_relative_form_that_miss_the_hull():
    """Its features and colors there are zero. Masks that rule nothing out change nothing."""
    scene = ball(8, 32)
    model, inputs, queries = tiny_model(preset=RELATIVE), [0, 2], scene.cameras[[1, 5]]
    given = scene.images[inputs], scene.cameras[inputs], queries, scene.cameras
    possible = hull_maps(scene.masks[inputs], scene.valid[inputs])
    whole, some = model.condition(*given), model.condition(*given, possible)
    everywhere = model.condition(*given, torch.ones_like(possible))
    sees = some.features.abs().sum(1, keepdim=True) > 0
    assert 10 < sees.sum() < 100 and sees[F.max_pool2d(scene.masks[[1, 5]], 4) > 0.9].all()
    for part, all_of_it, anywhere in zip(some, whole, everywhere):
        assert not part[~sees.expand_as(part)].any() and (part - all_of_it)[sees.expand_as(part)].abs().mean() > 1e-3
        parity.assert_close(anywhere, all_of_it, atol=1e-5)

    # Nothing is possible: all is empty. Some rays of a view of another size are as among all.
    assert not model.condition(*given, torch.zeros_like(possible)).features.any()
    where = torch.rand(2, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.6
    few = model.condition(*given, possible, where)
    all_of_it = model.condition(*given, possible, torch.ones_like(where))
    for part, whole in zip(few, all_of_it):
        parity.assert_close(part, whole * where[:, None], atol=1e-5)

    # The released form asks about all rays.
    model = tiny_model()
    assert torch.equal(model.condition(*given, possible).features, model.condition(*given).features)


def test_feature_distance():
    model, x = tiny_model(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = (x + 0.1).clamp(0, 1).requires_grad_(True)
    d = model.feature_distance(x, y)
    assert d.shape == (2,) and (d > 0).all() and torch.equal(model.feature_distance(x, x), torch.zeros(2))
    d.sum().backward()
    assert y.grad.abs().sum() > 0


def test_commands_are_needed(capsys):
    for argv in ([], ["fly"], ["convert"], ["convert", "--eft", "a"]):
        one_line(capsys, convert.main, argv, "error:")
