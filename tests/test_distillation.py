"""Diffusion distillation: losses, the algorithm box, its constant target, resuming, and fields that fit their input
views.
"""
import itertools
import math
import random
import types
from dataclasses import replace
from functools import partial

import pytest
import torch

import cli
import distillation
import metrics
import parity
import vldm
import volume
from cameras import Cameras, circle_path
from distillation import Distillation, DistillConfig, Prior
from lattice import Lattice
from small import FIELD, SHORT, TINY, ball, ring, tiny_model
from sparsefusion import Condition


# --- the numbers ---

@pytest.mark.parametrize("change, words", [
    ({"iterations": 0}, "at least 1"), ({"bootstrap": 7}, "bootstrap 7"), ({"footprint": 2}, "footprint 2"),
    ({"min_noise_level": 1.5}, "min_noise_level"), ({"final_lr_fraction": 0.0}, "final_lr_fraction"),
    ({"render_size": 0}, "render_size"), ({"turntable_frames": 0}, "turntable_frames")])
def test_numbers_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SHORT, **change)


def test_fewer_iterations_shorten_the_bootstrap_only_where_they_must():
    paper = distillation.PRESETS["paper"]
    assert paper.with_iterations(2000).bootstrap == 1001 and paper.with_iterations(900).bootstrap == 600
    assert paper.with_iterations(1).bootstrap == 0


def test_the_paper_preset_has_the_released_numbers():
    paper = distillation.PRESETS["paper"]
    assert paper == DistillConfig() and (paper.iterations, paper.bootstrap) == (3000, 1001)
    assert (paper.betas, paper.eps, paper.final_lr_fraction) == ((0.9, 0.999), 1e-8, 1)
    assert (paper.sampler.plms_steps, paper.sampler.sample_steps) == (50, 500)
    for name, fraction in (("nano", 0.1), ("plain", 0.05)):
        tuned = distillation.PRESETS[name]
        assert (tuned.betas, tuned.eps, tuned.final_lr_fraction) == ((0.9, 0.99), 1e-15, fraction)


@pytest.mark.parametrize("preset", distillation.PRESETS.values(), ids=distillation.PRESETS)
def test_the_released_settings_fit_every_preset(preset):
    """Whatever the preset, the same behavior comes out; only sizes, rates and the length of things are its own."""
    config = cli.apply_settings(preset, distillation.RELEASED)
    paper = cli.apply_settings(distillation.PRESETS["paper"], distillation.RELEASED)
    same = ("betas", "eps", "final_lr_fraction", "min_noise_level", "eft_train_mode", "metrics_on_inputs", "footprint",
            "lr_exposure", "weight_background", "weight_opacity", "weight_perceptual")
    assert all(getattr(config, name) == getattr(paper, name) for name in same)
    assert not config.field.hashed and not config.field.carve and config.eft_train_mode and config.metrics_on_inputs
    assert config.sampler.ancestral and config.sampler.unnoised_start and config.sampler.sample_steps == 500
    assert vldm.start_time(0.99, config.sampler) == 1
    assert (config.iterations, config.lr_grid) == (preset.iterations, preset.lr_grid)


# --- losses, released numbers ---

def test_losses_parity():
    f = parity.load("losses")
    loss, close = distillation.photometric_loss, partial(parity.assert_close, rtol=1e-5)
    close(loss(f["in_render"], f["in_sil"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_photometric"])
    # the color term and the silhouette term alone: the other one compared with itself
    close(loss(f["in_render"], f["in_mask"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_color_err"])
    close(loss(f["in_rgb"], f["in_sil"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_sil_err"])
    weighted = loss(f["in_render"], f["in_sil"], f["in_rgb"], f["in_mask"], 0.25).reshape(1)
    weight = 0.25 + 0.75 * f["in_mask"]
    color = metrics.pseudo_huber(f["in_render"] - f["in_rgb"])
    silhouette = metrics.pseudo_huber(f["in_sil"] - f["in_mask"])
    close(weighted, ((weight * color).mean() + (weight * silhouette).mean()).reshape(1))
    black = torch.zeros_like(f["in_mask"])
    alone = loss(f["in_render"], f["in_sil"], f["in_rgb"], black, 0.25)  # nothing but background
    close(alone.reshape(1), 0.25 * loss(f["in_render"], f["in_sil"], f["in_rgb"], black).reshape(1))
    close(distillation.opacity_loss(f["in_sil"]).reshape(1), f["out_opacity"])
    mask = distillation.brightness_mask(f["in_eft_rgb"])
    close(mask, f["out_bootstrap_mask"])
    close(loss(f["in_render"], f["in_sil"], f["in_eft_rgb"], mask).reshape(1), f["out_bootstrap_loss"])
    assert DistillConfig().weight_opacity == pytest.approx(f["in_lambda_opacity"].item())


def test_fusion_parity():
    f = parity.load("losses")
    weights = [distillation.fusion_weight(t) for t in f["in_t"].tolist()]
    parity.assert_close(weights, f["out_fusion_weight"], rtol=1e-5)
    error = (f["in_render"] - f["in_pred_img"]).abs().mean().item()
    parity.assert_close([w * error for w in weights], f["out_fusion_loss"], rtol=1e-5)


def test_fusion_weight_at_the_ends():
    """Nothing is learned from a clean image's denoising, everything from pure noise's."""
    assert distillation.fusion_weight(0.0) < 2e-4 and distillation.fusion_weight(1.0) > 1 - 1e-6
    assert distillation.fusion_weight(0.5) == pytest.approx(1 - math.cos(0.508 / 1.008 * math.pi / 2) ** 2, rel=1e-5)


# --- the algorithm box ---

class Dummy:
    """Stands in for the model: notes the calls of `denoise`, which darkens."""
    preset = types.SimpleNamespace(image_size=32)

    def __init__(self):
        self.noise_levels, self.images = [], []

    def denoise(self, image, features, noise_level, generator, sampler):
        self.noise_levels.append(noise_level)
        self.images.append(image)
        self.sampler = sampler
        return 0.5 * image


def squared(a, b):
    return (a - b).square().mean((1, 2, 3))


def prior(model, perceptual_loss=squared):
    """A prior with a gray EFT image."""
    viewpoints = Cameras.cat([circle_path(ring(5), 3), ring(2)])
    n = len(viewpoints)
    features = torch.arange(n).float().reshape(n, 1, 1, 1).expand(n, 1, 8, 8)
    return Prior(model, viewpoints, Condition(features, torch.full((n, 3, 8, 8), 0.4)), perceptual_loss)


def tiny_prior():
    """A prior of the real classes."""
    model, viewpoints, given = tiny_model(), Cameras.cat([circle_path(ring(5), 3), ring(2)]), ball(2, 32)
    condition = model.condition(given.images, given.cameras, viewpoints, (1.0, 5.0))
    return Prior(model, viewpoints, condition, model.feature_distance)


def test_the_algorithm_alternates_and_bootstraps_first():
    model, calls = Dummy(), []
    work = Distillation(ball(2, 32), SHORT, 7, prior(model))
    input_loss, query_loss = work.input_loss, work.query_loss

    def noted_input(rng):
        calls.append(("input", work.completed, len(model.noise_levels)))
        return input_loss(rng)

    def noted_query(iteration, rng):
        calls.append(("query", iteration, len(model.noise_levels)))
        return query_loss(iteration, rng)

    work.input_loss, work.query_loss = noted_input, noted_query
    work.run()
    assert [c[:2] for c in calls] == [(name, i) for i in range(6) for name in ("input", "query")]
    assert [c[2] for c in calls if c[0] == "query"] == [0, 0, 0, 0, 1, 2]  # denoised from iteration 3 on
    assert len(model.noise_levels) == 3
    assert all(0.2 <= level < 1 for level in model.noise_levels) and len(set(model.noise_levels)) == 3
    assert model.sampler == SHORT.sampler
    assert all(not x.requires_grad and x.shape == (1, 3, 32, 32) for x in model.images)
    steps = [int(s["step"]) for s in work.optimizer.state_dict()["state"].values()]
    # Two updates an iteration, only one of which sees an input's exposure.
    assert steps[-1] == 6 and set(steps[:-1]) == {12}
    assert work.completed == 6


def test_a_step_depends_on_the_seed_and_its_number_only():
    works = [Distillation(ball(2, 32), SHORT, 7, prior(Dummy())) for _ in range(2)]
    works[1].generator.manual_seed(99)
    torch.manual_seed(99)
    random.seed(99)
    losses = [work.step(4) for work in works]
    assert losses[0] == losses[1]
    assert torch.equal(works[0].field.encoding.table, works[1].field.encoding.table)


def test_without_a_prior_only_the_input_views_are_seen():
    work = Distillation(ball(2, 32), SHORT, 7)
    work.query_loss = None
    work.run()
    assert {int(s["step"]) for s in work.optimizer.state_dict()["state"].values()} == {6}


def test_learning_rates_fall_to_the_last_iteration():
    work, seen = Distillation(ball(2, 32), SHORT, 7), []
    step = work.step
    work.step = lambda iteration: (seen.append([g["lr"] for g in work.optimizer.param_groups]), step(iteration))[1]
    work.run()
    peaks = (SHORT.lr_grid, SHORT.lr_mlp, 0)
    expected = [[rate * SHORT.final_lr_fraction ** (i / 6) for rate in peaks] for i in range(6)]
    parity.assert_close(seen, expected, rtol=1e-6)


def test_learning_rates_can_be_constant():
    work = Distillation(ball(2, 32), replace(SHORT, final_lr_fraction=1.0), 7)
    for iteration in (0, 3, 5):
        work.set_learning_rates(iteration)
        assert [group["lr"] for group in work.optimizer.param_groups] == work.peak_rates


@pytest.mark.parametrize("term, broken", [("input", 2), ("query", 2), ("input", 3), ("query", 4), ("query", 0)])
def test_a_loss_that_is_no_number_is_named(term, broken, monkeypatch):
    """With its first iteration, although it is looked at only now and then; nothing broken is saved."""
    work, clock, saved = Distillation(ball(2, 32), SHORT, 7, prior(Dummy())), itertools.count(0, 61), []
    loss = getattr(work, f"{term}_loss")

    def failing(*args):
        return loss(*args) * (math.nan if work.completed == broken else 1)

    monkeypatch.setattr(work, f"{term}_loss", failing)
    monkeypatch.setattr(distillation, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))

    def save():
        assert all(p.isfinite().all() for p in work.field.parameters())
        saved.append(work.completed)

    with pytest.raises(FloatingPointError, match=f"the loss of the {term} view .* in iteration {broken};") as e:
        work.run(save=save)
    assert len(str(e.value).splitlines()) == 1 and saved == list(range(1, broken + 1))


def test_losses_are_not_read_in_every_iteration(monkeypatch):
    """Reading one waits for the GPU: once in ten, where space is looked at, and in the last."""
    work, seen = Distillation(ball(2, 32), replace(SHORT, iterations=24, occupancy_every=16, bootstrap=3), 7), []
    monkeypatch.setattr(work, "check_losses", lambda: seen.append(work.completed))
    work.run()
    assert seen == [0, 10, 15, 20, 23]


def test_a_prior_that_overflows_is_found_out():
    model = Dummy()
    model.denoise = lambda image, *rest: image * math.inf
    with pytest.raises(FloatingPointError, match="query view"):
        Distillation(ball(2, 32), SHORT, 7, prior(model)).run()


def at_query(model, seen):
    """A distillation whose rendering is the leaf `seen` (1, 4, 32, 32), a ray a pixel."""
    work = Distillation(ball(2, 32), replace(SHORT, render_size=32), 7, prior(model))
    work.render = lambda camera, full, rng: (seen[:, :3], seen[:, 3:], Lattice(32, 1, 0, 0))
    return work


def test_gradient_of_the_distillation_loss_by_hand():
    """x_hat = x / 2 is a constant: were it differentiated, the color's gradient would be half of this."""
    seen = (0.2 + 0.6 * torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    model = Dummy()
    loss = at_query(model, seen).query_loss(SHORT.bootstrap, random.Random(3))
    loss.backward()
    x, silhouette, n = seen.detach()[:, :3], seen.detach()[:, 3:], 3 * 32 * 32
    weight = distillation.fusion_weight(model.noise_levels[0])
    expected = weight * torch.ones_like(x) / n + SHORT.weight_perceptual * 2 * (x - x / 2) / n  # sign(x - x / 2) = 1
    parity.assert_close(seen.grad[:, :3], expected, rtol=1e-4, atol=1e-9)
    expected = SHORT.weight_opacity * silhouette / (silhouette**2 + 0.01).sqrt() / (32 * 32)
    parity.assert_close(seen.grad[:, 3:], expected, rtol=1e-4, atol=1e-9)
    value = weight * (x / 2).mean() + SHORT.weight_perceptual * (x / 2).square().mean()
    value = value + SHORT.weight_opacity * (silhouette**2 + 0.01).sqrt().mean()
    parity.assert_close(loss, value, rtol=1e-5)


def test_bootstrap_target():
    """A rendering that is the EFT image, with its mask, leaves the opacity term only; the last bootstrap iteration is
    one.
    """
    seen = torch.full((1, 4, 32, 32), 0.4)
    seen[:, 3] = 1
    model, last = Dummy(), SHORT.bootstrap - 1
    loss = at_query(model, seen).query_loss(last, random.Random(3))
    parity.assert_close(loss, SHORT.weight_opacity * math.sqrt(1.01), rtol=1e-4)
    assert not model.noise_levels
    seen = seen * torch.tensor([1, 1, 1, 0.0]).reshape(1, 4, 1, 1)  # empty where the mask is 1
    loss = at_query(model, seen).query_loss(last, random.Random(3))
    parity.assert_close(loss, (math.sqrt(101) - 1) * 0.1 + SHORT.weight_opacity * 0.1, rtol=1e-4)


def test_no_gradient_through_the_denoiser():
    guide = tiny_prior()
    model = guide.model.requires_grad_(True)
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    features = torch.rand(1, 16, TINY.map_size, TINY.map_size, requires_grad=True)
    x_hat = model.denoise(image, features, 0.5, torch.Generator().manual_seed(0), SHORT.sampler)
    assert not x_hat.requires_grad and 0 <= x_hat.min() and x_hat.max() <= 1 and x_hat.std() > 0
    work = Distillation(ball(2, 32), SHORT, 7, guide)
    work.run()  # the field's update must not need the prior's gradients either: it is the only thing that moves
    moved = {p for g in work.optimizer.param_groups for p in g["params"]}
    assert moved == {work.exposures.log_gains, *work.field.parameters()}
    assert not work.exposures.log_gains.any()  # its learning rate is 0 here


# --- resuming ---

@pytest.mark.parametrize("k", [2, 4])
def test_resumed_equals_uninterrupted(k, tmp_path, monkeypatch):
    """From a checkpoint in bootstrap, and from one in distillation: the same bits as without a stop."""
    guide, clock = tiny_prior(), itertools.count(0, 61)  # a checkpoint is due at every iteration
    config = replace(SHORT, lr_exposure=1e-2)
    whole = Distillation(ball(2, 32), config, 7, guide)
    monkeypatch.setattr(distillation, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))

    def save():
        if whole.completed == k:
            torch.save(whole.state_dict(), tmp_path / "state.pt")

    whole.run(save=save)
    resumed = Distillation(ball(2, 32), config, 7, guide)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.completed == k
    different = any(not torch.equal(a, b) for a, b in zip(resumed.field.parameters(), whole.field.parameters()))
    resumed.run()
    for part in ("field", "occupancy", "exposures"):
        a, b = getattr(whole, part).state_dict(), getattr(resumed, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert whole.exposures.log_gains.std() > 0
    assert different and resumed.completed == whole.completed == SHORT.iterations


def test_the_seed_decides():
    works = [Distillation(ball(2, 32), SHORT, seed) for seed in (1, 1, 2)]
    for work in works:
        work.run()
    tables = [work.field.encoding.table for work in works]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


# --- a field without a prior ---

FIT = replace(SHORT, iterations=300, occupancy_every=16, lr_grid=3e-2, lr_mlp=1e-2, field=FIELD)


@torch.no_grad()
def seen_by(work, cameras, size=32):
    """Pictures and silhouettes of a field."""
    views = [volume.render_image(work.field, cameras[i], size, size, None, work.occupancy) for i in range(len(cameras))]
    return torch.stack([v.color for v in views]), torch.stack([v.opacity for v in views])


def test_a_field_fits_its_input_views():
    """Six views of a ball, in two seconds: the same views at more than 30 dB, unseen ones at more than 24 dB,
    silhouettes to match.
    """
    scene = ball(12, 32)
    inputs, rest = scene[[0, 2, 4, 6, 8, 10]], scene[[1, 5]]
    work = Distillation(inputs, FIT, 0)
    work.run()
    for views, least in ((inputs, 30), (rest, 24)):
        images, silhouettes = seen_by(work, views.cameras)
        assert metrics.psnr(images, views.images).mean() > least
        assert metrics.iou(silhouettes, views.masks).mean() > 0.95


def test_the_exposure_of_every_input_view_is_found():
    """Photographs of one ball, colored by height, at three exposures: their ratios come out."""
    scene, gains = ball(6, 32), torch.tensor([[0.7, 0.8, 0.9], [1, 1, 1], [0.85, 0.85, 0.85]] * 2)
    scene = replace(scene, images=scene.images[:, 1:2] * gains[..., None, None])
    for rate in (0, 1e-2):
        work = Distillation(scene, replace(FIT, lr_exposure=rate), 0)
        work.run()
        log_gains = work.exposures.log_gains
        found = (log_gains - log_gains.mean(0)).detach().exp()
        expected = gains / gains.log().mean(0).exp() if rate else torch.ones(6, 3)
        parity.assert_close(found, expected, atol=0.12 if rate else 0)


def test_sides_of_different_color_do_not_pass_for_exposures():
    """A ball colored by its normal, photographed at one exposure: the gains stay near one, and unseen views do not
    suffer much.
    """
    scene, quality = ball(24, 32), {}
    for rate in (0, 1e-2):
        work = Distillation(scene[list(range(0, 24, 2))], replace(FIT, lr_exposure=rate), 0)
        work.run()
        unseen = scene[[3, 15]]
        quality[rate] = metrics.psnr(seen_by(work, unseen.cameras)[0], unseen.images).mean()
    assert work.exposures.log_gains.abs().max() < 0.1 and quality[1e-2] > quality[0] - 1


def test_footprint():
    """Colors of the input views are means over squares of the object; their masks stay sharp."""
    scene = ball(2, 32)
    work, plain = (Distillation(scene, replace(SHORT, footprint=n), 0) for n in (5, 1))
    assert scene.masks[1, 0, 11:16, 13:18].all()
    parity.assert_close(work.colors[1, :, 13, 15], scene.images[1, :, 11:16, 13:18].mean((1, 2)), rtol=1e-5)
    row = int(scene.masks[0, 0, :, 16].nonzero()[0])  # at the rim: those of the square that are object
    square = (slice(row - 2, row + 3), slice(14, 19))
    inside = scene.masks[0, 0][square]
    assert 0 < inside.mean() < 1
    parity.assert_close(work.colors[0, :, row, 16], scene.images[0][:, *square].sum((1, 2)) / inside.sum(), rtol=1e-5)
    assert torch.equal(plain.colors, scene.images) and torch.equal(work.inputs.masks, scene.masks)


@pytest.mark.parametrize("footprint", [1, 3, 5])
def test_a_footprint_makes_no_dark_rims(footprint):
    """A white object stays as white as its soft mask says, at its rim and where the picture cuts it."""
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, :9, 4:] = 1      # cut above and on the right
    masks[0, :, 9, 4:] = 0.3     # a soft rim
    masks[1, :, 8, 8] = 0.5      # a single pixel
    images = masks.expand(2, 3, 16, 16)
    parity.assert_close(distillation.footprint_colors(images, masks, footprint), images, atol=1e-6)
    tinted = images * torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    parity.assert_close(distillation.footprint_colors(tinted, masks, footprint), tinted, atol=1e-6)


def test_a_footprint_of_one_pixel_is_the_picture():
    g = torch.Generator().manual_seed(0)
    images, masks = torch.rand(2, 3, 8, 8, generator=g), torch.rand(2, 1, 8, 8, generator=g)
    assert distillation.footprint_colors(images, masks * (masks > 0.5), 1) is images
    black = distillation.footprint_colors(images * 0, masks * 0, 5)  # no object, no color, and no division by 0
    assert not black.any()
