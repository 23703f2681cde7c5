"""Diffusion distillation: losses, the algorithm box, its constant target, resuming, and fields that fit their input
views.
"""
import functools
import itertools
import math
import random
import types
from dataclasses import replace

import pytest
import torch

import distillation
import metrics
import volume
from cameras import Cameras, circle_path, pixel_grid
from distillation import Distillation, Prior, opacity_loss, photometric_loss
from presets import PRESETS
from sparsefusion import Condition
from tests.support import parity
from tests.support.small import FIELD, SHORT, TINY, ball, ring, tiny_model


# --- the algorithm box ---

class Dummy:
    """Stands in for the model: notes the calls of `denoise`, which darkens."""
    preset = types.SimpleNamespace(image_size=32)

    def __init__(self):
        self.noise_levels, self.images = [], []

    def denoise(self, image, features, noise_levels, generator, sampler):
        assert len(image) == len(features) == len(noise_levels)
        self.noise_levels.extend(noise_levels)
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
    condition = model.condition(given.images, given.cameras, viewpoints, viewpoints)
    return Prior(model, viewpoints, condition, model.feature_distance)


def test_the_algorithm_alternates_and_bootstraps_first():
    model, calls = Dummy(), []
    work = Distillation(ball(2, 32), replace(SHORT, denoise_batch=1), 7, prior(model))

    def noted(name):
        loss = getattr(work, name)

        def wrapper(batch):
            calls.append((name, work.completed, len(model.noise_levels)))
            return loss(batch)
        return wrapper

    for name in ("input_loss", "bootstrap_loss", "distillation_loss"):
        setattr(work, name, noted(name))
    work.run()
    second = ["bootstrap_loss"] * 3 + ["distillation_loss"] * 3
    assert [c[:2] for c in calls] == [(name, i) for i in range(6) for name in ("input_loss", second[i])]
    assert [c[2] for c in calls[1::2]] == [0, 0, 0, 1, 2, 3]  # denoised from iteration 3 on
    assert len(model.noise_levels) == 3
    assert all(0.2 <= level < 1 for level in model.noise_levels) and len(set(model.noise_levels)) == 3
    assert model.sampler == SHORT.sampler
    assert all(not x.requires_grad and x.shape == (1, 3, 32, 32) for x in model.images)
    steps = [int(s["step"]) for s in work.adam.state_dict()["state"].values()]
    # Two updates an iteration, only one of which sees an input's exposure.
    assert steps[-1] == 6 and set(steps[:-1]) == {12}
    assert work.completed == 6


@pytest.mark.parametrize("batch, calls", [(2, [2, 2, 1]), (4, [4, 1]), (8, [5])])
def test_query_views_are_denoised_in_batches(batch, calls):
    """Each target serves one iteration, and is what one by one would choose: the same views, levels and lattices."""
    config, sizes, seen = replace(SHORT, iterations=8), [], {}
    for size in (1, batch):
        model = Dummy()
        work = Distillation(ball(2, 32), replace(config, denoise_batch=size), 7, prior(model))
        sample, drawn = work.sample_query, []
        work.sample_query = lambda *arguments: drawn.append(sample(*arguments)) or drawn[-1]
        work.run()
        sizes.append([len(images) for images in model.images])
        seen[size] = drawn
        assert len(model.noise_levels) == 5 and all(view.x_hat.shape == (1, 3, 32, 32) for view in drawn)
        rendered = torch.cat(model.images)
        for i, view in enumerate(drawn):
            parity.assert_close(view.x_hat, rendered[i:i + 1] / 2, atol=1e-6)
            assert not any(torch.equal(view.x_hat, other.x_hat) for other in drawn[:i])
    assert sizes == [[1] * 5, calls]
    for one, many in zip(*seen.values()):
        assert torch.equal(one.rays.o, many.rays.o) and torch.equal(one.weight, many.weight)
        assert torch.equal(one.grid, many.grid)


def test_a_step_depends_on_the_seed_and_its_number_only():
    works = [Distillation(ball(2, 32), SHORT, 7, prior(Dummy())) for _ in range(2)]
    works[1].generator.manual_seed(99)
    torch.manual_seed(99)
    random.seed(99)
    for work in works:
        work.step(4)
    assert works[0].loss == works[1].loss
    assert torch.equal(works[0].field.encoding.table, works[1].field.encoding.table)


def test_without_a_prior_only_the_input_views_are_seen():
    work = Distillation(ball(2, 32), SHORT, 7)
    work.bootstrap_loss = work.distillation_loss = None
    work.run()
    assert {int(s["step"]) for s in work.adam.state_dict()["state"].values()} == {6}


def rates(work):
    """The present learning rates."""
    return [group["lr"] for group in work.adam.param_groups]


def test_learning_rates_fall_to_the_last_iteration():
    work, seen = Distillation(ball(2, 32), SHORT, 7), []
    step = work.step
    work.step = lambda iteration: (seen.append(rates(work)), step(iteration))[1]
    work.run()
    peaks = (SHORT.lr_grid, SHORT.lr_mlp, SHORT.lr_exposure)
    expected = [[rate * SHORT.final_lr_fraction ** (i / 6) for rate in peaks] for i in range(6)]
    parity.assert_close(seen, expected, rtol=1e-6)


def test_learning_rates_can_be_constant():
    work = Distillation(ball(2, 32), replace(SHORT, final_lr_fraction=1.0), 7)
    for iteration in (0, 3, 5):
        work.step = lambda iteration: None
        work.completed, work.loss = iteration, torch.zeros(())
        work.run()
        assert rates(work) == work.adam.peak_rates


@pytest.mark.parametrize("term, broken", [("input", 2), ("query", 2), ("input", 3), ("query", 4), ("query", 0)])
def test_a_loss_that_is_no_number_is_named(term, broken, monkeypatch):
    """With its first iteration, although it is looked at only now and then; nothing broken is saved."""
    work, clock, saved = Distillation(ball(2, 32), SHORT, 7, prior(Dummy())), itertools.count(0, 61), []
    names = ["input_loss"] if term == "input" else ["bootstrap_loss", "distillation_loss"]

    def failing(loss):
        @functools.wraps(loss)
        def fails(batch):
            return loss(batch) * (math.nan if work.completed == broken else 1)
        return fails

    for name in names:
        monkeypatch.setattr(work, name, failing(getattr(work, name)))
    monkeypatch.setattr(distillation, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))

    def save():
        assert all(p.isfinite().all() for p in work.field.parameters())
        saved.append(work.completed)

    words = "|".join(names).replace("_", " ")
    with pytest.raises(FloatingPointError, match=f"the ({words}) is .* in iteration {broken};") as e:
        work.run(save=save)
    assert len(str(e.value).splitlines()) == 1 and saved == list(range(1, broken + 1))


def test_losses_are_not_read_in_every_iteration(monkeypatch):
    """Reading one waits for the GPU: before occupied cells change, after every sixteenth iteration and the last."""
    for every, looks in ((10, [9, 16, 19, 24]), (16, [15, 16, 24]), (1000, [16, 24])):
        config = replace(SHORT, iterations=24, occupancy_every=every, bootstrap=3)
        work, seen = Distillation(ball(2, 32), config, 7), []
        monkeypatch.setattr(work, "check_losses", lambda: seen.append(work.completed))
        work.run()
        assert seen == looks


def test_a_prior_that_overflows_is_found_out():
    model = Dummy()
    model.denoise = lambda image, *rest: image * math.inf
    with pytest.raises(FloatingPointError, match="distillation loss"):
        Distillation(ball(2, 32), SHORT, 7, prior(model)).run()


def at_query(model, seen):
    """A distillation whose rendering is the leaf `seen` (1, 4, 32, 32), a ray a pixel."""
    work = Distillation(ball(2, 32), replace(SHORT, render_size=32), 7, prior(model))
    rows = distillation.as_rows(seen)
    work.render = lambda rays: volume.Rendering(rows[:, :3], rows[:, 3], None)
    return work


def test_gradient_of_the_distillation_loss_by_hand():
    """x_hat = x / 2 is a constant: were it differentiated, the color's gradient would be half of this."""
    seen = (0.2 + 0.6 * torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    model = Dummy()
    work = at_query(model, seen)
    first = SHORT.bootstrap
    loss = work.distillation_loss(work.sample_query(first, work.denoise_ahead(first)[first]))
    loss.backward()
    x, silhouette, n = seen.detach()[:, :3], seen.detach()[:, 3:], 3 * 32 * 32
    prior, weight = SHORT.prior_weight(len(work.input_views)), distillation.fusion_weight(model.noise_levels[0])
    expected = weight * torch.ones_like(x) / n + SHORT.weight_perceptual * 2 * (x - x / 2) / n  # sign(x - x / 2) = 1
    expected = prior * expected
    parity.assert_close(seen.grad[:, :3], expected, rtol=1e-4, atol=1e-9)
    expected = SHORT.weight_opacity * silhouette / (silhouette**2 + 0.01).sqrt() / (32 * 32)
    parity.assert_close(seen.grad[:, 3:], expected, rtol=1e-4, atol=1e-9)
    value = prior * (weight * (x / 2).mean() + SHORT.weight_perceptual * (x / 2).square().mean())
    value = value + SHORT.weight_opacity * (silhouette**2 + 0.01).sqrt().mean()
    parity.assert_close(loss, value, rtol=1e-5)


def test_bootstrap_target():
    """A rendering that is the EFT image, with its mask, leaves the opacity term only."""
    seen = torch.full((1, 4, 32, 32), 0.4)
    seen[:, 3] = 1
    model, last = Dummy(), SHORT.bootstrap - 1
    work = at_query(model, seen)
    loss = work.bootstrap_loss(work.sample_eft_target(last))
    parity.assert_close(loss, SHORT.weight_opacity * math.sqrt(1.01), rtol=1e-4)
    assert not model.noise_levels
    seen = seen * torch.tensor([1, 1, 1, 0.0]).reshape(1, 4, 1, 1)  # empty where the mask is 1
    work = at_query(model, seen)
    loss = work.bootstrap_loss(work.sample_eft_target(last))
    weight = SHORT.prior_weight(len(work.input_views))
    parity.assert_close(loss, weight * (math.sqrt(101) - 1) * 0.1 + SHORT.weight_opacity * 0.1, rtol=1e-4)


def test_the_eft_image_is_aligned_to_the_rays():
    """An image of its own rays' NDC, at full size, is the NDC of the picture's pixels."""
    guide = prior(Dummy())
    coarse = pixel_grid(8, 8, 32).t().reshape(2, 8, 8)
    images = torch.cat([coarse, coarse[:1]]).expand(len(guide.viewpoints), -1, -1, -1)
    work = Distillation(ball(2, 32), SHORT, 7, guide._replace(condition=guide.condition._replace(images=images)))
    expected = pixel_grid(32, 32).t().reshape(2, 32, 32)
    parity.assert_close(work.eft_images[0, :2], expected, atol=1e-6)


def test_weight_of_the_prior():
    """All of it where the views are no more than it is worth."""
    config = replace(SHORT, prior_views=1.5)
    assert [config.prior_weight(views) for views in (1, 2, 6, 24)] == [1, 0.75, 0.25, 0.0625]
    assert replace(SHORT, prior_views=0.0).prior_weight(24) == 1 == PRESETS["paper"].prior_weight(24)


def test_no_gradient_through_the_denoiser():
    guide = tiny_prior()
    model = guide.model.requires_grad_(True)
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    features = torch.rand(1, 16, TINY.map_size, TINY.map_size, requires_grad=True)
    x_hat = model.denoise(image, features, [0.5], torch.Generator().manual_seed(0), SHORT.sampler)
    assert not x_hat.requires_grad and 0 <= x_hat.min() and x_hat.max() <= 1 and x_hat.std() > 0
    work = Distillation(ball(2, 32), replace(SHORT, lr_exposure=0.0), 7, guide)
    work.run()  # the field's update must not need the prior's gradients either: it is the only thing that moves
    moved = {p for g in work.adam.param_groups for p in g["params"]}
    assert moved == {work.exposures.log_gains, *work.field.parameters()}
    assert not work.exposures.log_gains.any()  # its learning rate is 0 here


# --- resuming ---

@pytest.mark.parametrize("k, batch", [(2, 1), (4, 1), (4, 2), (5, 8)])
def test_resumed_equals_uninterrupted(k, batch, tmp_path, monkeypatch):
    """From a checkpoint in bootstrap, and from one in distillation, between two batches or within one: the same bits as
    without a stop.
    """
    guide, clock = tiny_prior(), itertools.count(0, 61)  # a checkpoint is due at every iteration
    config = replace(SHORT, lr_exposure=1e-2, denoise_batch=batch)
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


def test_a_longer_run_denoises_what_the_shorter_one_did_not():
    """The last batch of a run ends with it: prolonged, its next iteration finds no target, and makes one."""
    model = Dummy()
    config = replace(SHORT, denoise_batch=8)
    short = Distillation(ball(2, 32), config, 7, prior(model))
    short.run()
    assert list(short.targets) == [3, 4, 5]
    longer = Distillation(ball(2, 32), replace(config, iterations=16), 7, prior(model))
    assert not short.state_dict()["targets"]  # all of them are used
    longer.load_state_dict(short.state_dict())
    longer.run()
    assert [len(images) for images in model.images] == [3, 5, 5] and list(longer.targets) == [11, 12, 13, 14, 15]


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


def test_everything_that_a_field_has_learns():
    """The table, the network and what the viewing direction adds, whose last layer begins at zero."""
    config = replace(FIT, field=replace(FIT.field, view_degree=2))
    work = Distillation(ball(4, 32), config, 0)
    before = {name: x.detach().clone() for name, x in work.field.named_parameters()}
    for iteration in range(3):
        work.step(iteration)
    assert any("view" in name for name in before)
    for name, x in work.field.named_parameters():
        assert not torch.equal(x, before[name]), name


def test_a_gloss_needs_the_viewing_direction():
    """A ball as bright as the camera is far to the right: one color for all directions is a compromise."""
    scene = ball(12, 32)
    x = scene.cameras.centers()[:, 0]
    gain = 0.3 + 0.7 * (x - x.min()) / (x.max() - x.min())
    scene = replace(scene, images=0.8 * scene.masks.expand(-1, 3, -1, -1) * gain[:, None, None, None])
    quality = {}
    for degree in (0, 2):
        work = Distillation(scene, replace(FIT, field=replace(FIT.field, view_degree=degree)), 0)
        work.run()
        quality[degree] = metrics.psnr(seen_by(work, scene.cameras)[0], scene.images).mean()
    assert quality[2] > quality[0] + 6


def test_the_exposure_of_every_input_view_is_found():
    """Photographs of one ball, colored by height, at three exposures: their ratios come out."""
    scene, gains = ball(6, 32), torch.tensor([[0.7, 0.8, 0.9], [1, 1, 1], [0.85, 0.85, 0.85]] * 2)
    scene = replace(scene, images=scene.images[:, 1:2] * gains[..., None, None])
    for rate, iterations in ((0, 5), (1e-2, FIT.iterations)):
        work = Distillation(scene, replace(FIT, lr_exposure=rate, iterations=iterations), 0)
        work.run()
        log_gains = work.exposures.log_gains
        found = (log_gains - log_gains.mean(0)).detach().exp()
        expected = gains / gains.log().mean(0).exp() if rate else torch.ones(6, 3)
        parity.assert_close(found, expected, atol=0.12 if rate else 0)


def test_a_guess_of_exposures():
    """One photograph that is 3.5 times darker is known at once; sides that differ by less are not taken for it."""
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(5, 1, 16, 16, generator=generator) > 0.3).float()
    images = torch.rand(5, 3, 16, 16, generator=generator) * masks
    brightness = torch.tensor([1.0, 1.4, 0.7, 1.0, 1 / 3.5])
    guess = distillation.guess_exposures(images * brightness[:, None, None, None], masks)
    assert not guess[:4].any() and abs(guess[4] + math.log(3.5)) < 0.1
    assert not distillation.guess_exposures(images[3:] * torch.tensor([1, 0.1])[:, None, None, None], masks[3:]).any()

    # Where gains are learned, a prior is shown what the others show.
    scene = ball(4, 32)
    dark = replace(scene, images=scene.images * torch.tensor([1, 1, 0.25, 1])[:, None, None, None])
    shown = replace(SHORT, lr_exposure=1e-2).exposed_alike(dark)
    assert (shown - scene.images).abs().mean() < 0.05 * scene.images.mean()
    assert torch.equal(replace(SHORT, lr_exposure=0.0).exposed_alike(dark), dark.images)


def test_sides_of_different_color_do_not_pass_for_exposures():
    """A ball colored by its normal, photographed at one exposure: the weight of the gains' spread keeps them near one,
    and unseen views gain.
    """
    scene, quality, spread = ball(24, 32), {}, {}
    for weight in (0, FIT.weight_exposure):
        config = replace(FIT, lr_exposure=1e-2, weight_exposure=weight)
        work = Distillation(scene[list(range(0, 24, 2))], config, 0)
        work.run()
        unseen = scene[[3, 15]]
        quality[weight] = metrics.psnr(seen_by(work, unseen.cameras)[0], unseen.images).mean()
        spread[weight] = work.exposures.spread()
    assert spread[FIT.weight_exposure] < spread[0] / 4 and quality[FIT.weight_exposure] > quality[0] + 1


def test_blur():
    """Input views and their masks are blurred alike, by means over squares; what the masks carve stays sharp."""
    scene = ball(2, 32)
    work, plain = (Distillation(scene, replace(SHORT, blur=n), 0) for n in (5, 1))
    row = int(scene.masks[0, 0, :, 16].nonzero()[0])  # at the rim
    square = (slice(row - 2, row + 3), slice(14, 19))
    assert 0 < scene.masks[0, 0][square].mean() < 1
    parity.assert_close(work.colors[0, :, row, 16], scene.images[0][:, *square].mean((1, 2)), rtol=1e-5)
    parity.assert_close(work.masks[0, 0, row, 16], scene.masks[0, 0][square].mean(), rtol=1e-5)
    assert torch.equal(plain.colors, scene.images) and torch.equal(plain.masks, scene.masks)
    assert torch.equal(work.input_views.masks, scene.masks)
    assert torch.equal(work.occupancy.possible, plain.occupancy.possible)
    padded = replace(scene, valid=scene.valid.clone())
    padded.valid[..., 15:, :] = 0  # what nothing shows counts nowhere
    seen = Distillation(padded, replace(SHORT, blur=5), 0)
    parity.assert_close(seen.masks[0, 0, 14, 16], scene.masks[0, 0, 12:15, 14:19].mean(), rtol=1e-5)
    parity.assert_close(seen.colors[0, :, 14, 16], scene.images[0, :, 12:15, 14:19].mean((1, 2)), rtol=1e-5)
    for pixels in (0, 64):  # both ways of drawing look at them
        work = Distillation(scene, replace(SHORT, blur=5, input_pixels=pixels), 0)
        batch = work.sample_input(0)
        assert ((batch.mask > 0.01) & (batch.mask < 0.99)).any()


def test_scattered_pixels_are_those_of_the_photographs():
    """A ray passes through the middle of its pixel, from its view's camera; what a photograph does not show is left
    out.
    """
    scene = ball(3, 32)
    valid = scene.valid.clone()
    valid[:, :, :, 20:] = 0
    work = Distillation(replace(scene, valid=valid), replace(SHORT, input_pixels=200), 7)
    batch = work.sample_input(0)
    assert batch.rays.o.shape == (200, 3) and batch.color.shape == (200, 3)
    assert set(batch.view.tolist()) == {0, 1, 2}
    xy, _ = scene.cameras[batch.view].project((batch.rays.o + 3 * batch.rays.d)[:, None])
    position = (1 - xy[:, 0]) * 16
    column, row = position.floor().long().unbind(-1)
    assert (column < 20).all() and (position - position.floor() - 0.5).abs().amax() < 1e-3
    for images, expected in ((scene.images, batch.color), (scene.masks, batch.mask)):
        parity.assert_close(images[batch.view, :, row, column], expected, atol=1e-6)
    assert work.input_loss(batch).isfinite() and not torch.equal(work.sample_input(1).color, batch.color)


def test_a_pixel_is_the_mean_of_the_rays_through_its_square():
    """They pass through the middles of four equal parts of it; the loss is that of their mean."""
    scene = ball(3, 32)
    work = Distillation(scene, replace(SHORT, input_pixels=50, pixel_side=2), 7)
    batch = work.sample_input(0)
    assert batch.rays.o.shape == (200, 3) and batch.color.shape == (50, 3)

    cameras = scene.cameras[batch.view.repeat_interleave(4)]
    xy, _ = cameras.project((batch.rays.o + 3 * batch.rays.d)[:, None])
    position = ((1 - xy[:, 0]) * 16).unflatten(0, (50, 4))
    corner = position.floor()
    assert torch.equal(corner, corner[:, :1].expand_as(corner))
    parts = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    parity.assert_close(position - corner, parts.expand(50, 4, 2), atol=1e-3)
    column, row = corner[:, 0].long().unbind(-1)
    parity.assert_close(scene.images[batch.view, :, row, column], batch.color, atol=1e-6)

    seen = work.render(batch.rays)
    color = torch.stack([seen.color[4 * i:4 * i + 4].mean(0) for i in range(50)])
    opacity = torch.stack([seen.opacity[4 * i:4 * i + 4].mean() for i in range(50)])[:, None]
    config = work.config
    expected = photometric_loss(work.exposures(color, batch.view), opacity, batch.color, batch.mask,
                                config.weight_background, batch.valid)
    expected = expected + config.weight_opacity * opacity_loss(opacity)
    expected = expected + config.weight_exposure * work.exposures.spread()
    parity.assert_close(work.input_loss(batch), expected, rtol=1e-5)


def test_scattered_pixels_are_those_that_see_the_hull():
    """All of the object's pixels, and none whose ray meets only cells that the masks have ruled out."""
    scene = ball(3, 32)
    work = Distillation(scene, replace(SHORT, input_pixels=200, field=replace(SHORT.field, occupancy_cells=64)), 7)
    chosen = torch.zeros(scene.masks.numel(), dtype=torch.bool)
    chosen[work.valid_pixels] = True
    chosen = chosen.view_as(scene.masks)
    assert chosen[scene.masks > 0.5].all() and chosen.sum() < 2 * (scene.masks > 0.5).sum() < chosen.numel()
    for view in range(3):
        rest = (~chosen[view, 0]).flatten().nonzero().squeeze(-1)
        o, d = scene.cameras[view].rays(pixel_grid(32, 32)[rest])
        assert volume.render(work.field, o, d, None, work.occupancy).opacity.abs().max() == 0


def test_what_no_photograph_shows_teaches_nothing():
    """In the padding of a photograph a field may be what it likes."""
    scene = ball(2, 32)
    valid = scene.valid.clone()
    valid[:, :, 8:] = 0
    work = Distillation(replace(scene, valid=valid), replace(SHORT, weight_opacity=0.0), 7)
    batch = work.sample_input(0)
    assert batch.valid.any() and not batch.valid.all()
    seen = torch.rand(len(batch.color), 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    work.render = lambda rays: volume.Rendering(seen[:, :3], seen[:, 3], None)
    work.input_loss(batch).backward()
    taught = seen.grad.abs().sum(1) > 0
    assert torch.equal(taught, batch.valid[:, 0] > 0)
