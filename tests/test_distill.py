"""Diffusion distillation: losses, lattices, the loop, resuming, and the command from flags to files."""
import json
import math
import random
import shutil
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import distill
import eft
import metrics
import ngp
import parity
import sparsefusion as sf
import vldm
from cameras import Cameras, circle_path, look_at, pixel_grid
from co3d import Scene

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "co3d_real"
METHODS = ["nearest", "ngp", "eft", "vldm", "sparsefusion"]

# A prior of the same classes that runs in milliseconds, and a distillation to go with it.
TINY = sf.Preset("nano", 32, replace(eft.NANO, stem=8, stages=(8, 12, 16), blocks=1, width=16, layers=1, feedforward=16, depths=4),
                 vldm.VAEConfig(widths=(8, 8, 16), groups=4, blocks=1),
                 vldm.UNetConfig(cond_channels=16, widths=(16, 16, 16), attention=(False, True), kernels=(3,), groups=4, heads=2,
                                 head_dim=8, time_dim=32, token_dim=16), vldm.NANO[2])
FIELD = replace(ngp.NANO, levels=3, log2_table=12, finest_resolution=32, width=16, samples=32, occupancy_cells=32)
SHORT = replace(distill.NANO, iterations=6, bootstrap=3, viewpoints=2, image_size=32, render_size=16, steps=2, occupancy_every=2,
                field=replace(FIELD, bound=4.0))


# --- losses, released numbers ---

def test_losses_parity():
    f = parity.load("losses")
    close = partial(parity.assert_close, rtol=1e-5)
    close(distill.photometric_loss(f["in_render"], f["in_sil"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_photometric"])
    # the colour term and the silhouette term alone: the other one compared with itself
    close(distill.photometric_loss(f["in_render"], f["in_mask"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_color_err"])
    close(distill.photometric_loss(f["in_rgb"], f["in_sil"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_sil_err"])
    weighted = distill.photometric_loss(f["in_render"], f["in_sil"], f["in_rgb"], f["in_mask"], 0.25).reshape(1)
    weight = 0.25 + 0.75 * f["in_mask"]
    colour, silhouette = (sf.pseudo_huber(a - b) for a, b in ((f["in_render"], f["in_rgb"]), (f["in_sil"], f["in_mask"])))
    close(weighted, ((weight * colour).mean() + (weight * silhouette).mean()).reshape(1))
    black = torch.zeros_like(f["in_mask"])
    alone = distill.photometric_loss(f["in_render"], f["in_sil"], f["in_rgb"], black, 0.25)  # nothing but background
    close(alone.reshape(1), 0.25 * distill.photometric_loss(f["in_render"], f["in_sil"], f["in_rgb"], black).reshape(1))
    close(distill.opacity_loss(f["in_sil"]).reshape(1), f["out_opacity"])
    mask = distill.eft_mask(f["in_eft_rgb"])
    close(mask, f["out_bootstrap_mask"])
    close(distill.photometric_loss(f["in_render"], f["in_sil"], f["in_eft_rgb"], mask).reshape(1), f["out_bootstrap_loss"])
    assert distill.DistillConfig().opacity == pytest.approx(f["in_lambda_opacity"].item())


def test_fusion_parity():
    f = parity.load("losses")
    weights = [distill.fusion_weight(t) for t in f["in_t"].tolist()]
    parity.assert_close(weights, f["out_fusion_weight"], rtol=1e-5)
    error = (f["in_render"] - f["in_pred_img"]).abs().mean().item()
    parity.assert_close([w * error for w in weights], f["out_fusion_loss"], rtol=1e-5)


def test_fusion_weight_at_the_ends():
    """Nothing is learned from a clean image's denoising, everything from pure noise's."""
    assert distill.fusion_weight(0.0) < 2e-4 and distill.fusion_weight(1.0) > 1 - 1e-6
    assert distill.fusion_weight(0.5) == pytest.approx(1 - math.cos(0.508 / 1.008 * math.pi / 2) ** 2, rel=1e-5)


# --- lattices and upsampling ---

class Always:
    """A random generator that always draws what it is told."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def randrange(self, n):
        return self.draws.pop(0)


@pytest.mark.parametrize("size, full", [(4, 12), (8, 8), (5, 10)])
def test_lattices_cover_every_pixel_once(size, full):
    step, seen, grid = full // size, torch.zeros(full * full), pixel_grid(full, full)
    for row in range(step):
        for column in range(step):
            xy, first = distill.lattice(size, full, Always(row, column), None)
            assert first == (row, column) and xy.shape == (size * size, 2)
            pixel = ((1 - xy) * full / 2 - 0.5).round().long()  # (column, row): +x is left, +y is up
            assert pixel[0].tolist() == [column, row]
            index = pixel[:, 1] * full + pixel[:, 0]
            parity.assert_close(xy, grid[index], atol=1e-6)
            seen[index] += 1
    assert (seen == 1).all()


def test_lattice_draws_are_uniform():
    rng = random.Random(0)
    firsts = [distill.lattice(4, 12, rng, None)[1] for _ in range(900)]
    counts = [firsts.count((r, c)) for r in range(3) for c in range(3)]
    assert sum(counts) == 900 and min(counts) > 60 and max(counts) < 140


def affine(rows, columns):
    """Three affine functions of pixel positions: (1, 3, rows, columns)."""
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([0.3 + 0.01 * y, 0.9 - 0.02 * x, 0.2 + 0.01 * x - 0.015 * y])[None]


@pytest.mark.parametrize("size, full", [(4, 12), (8, 8), (8, 32), (3, 7)])
def test_upsample_is_exact_on_affine_images(size, full):
    everywhere = torch.arange(full).float()
    sparse = torch.arange(size) * (full - 1) / (size - 1)
    parity.assert_close(distill.upsample(affine(sparse, sparse), full), affine(everywhere, everywhere), atol=2e-6)


@pytest.mark.parametrize("size, full, first", [(4, 12, (0, 2)), (4, 12, (2, 1)), (8, 8, (0, 0)), (16, 32, (1, 0))])
def test_upsample_of_a_lattice(size, full, first):
    """Exact between the outer samples; outside, the outermost value goes on."""
    step = full // size
    rows, columns = (f + step * torch.arange(size).float() for f in first)
    y, x = (torch.arange(full).float().clamp(f, f + step * (size - 1)) for f in first)
    parity.assert_close(distill.upsample(affine(rows, columns), full, first, step), affine(y, x), atol=2e-6)


def test_upsample_agrees_with_the_rays():
    """An image of its own rays' NDC, upsampled, is the NDC of the full image's pixels."""
    full, as_image = 24, lambda xy, n: xy.t().reshape(1, 2, n, n)
    parity.assert_close(distill.upsample(as_image(pixel_grid(8, 8, full), 8), full), as_image(pixel_grid(full, full), full), atol=1e-6)
    xy, first = distill.lattice(8, full, Always(2, 1), None)
    inner = (slice(None), slice(None), slice(2, 24 - 0), slice(1, 24 - 1))
    parity.assert_close(distill.upsample(as_image(xy, 8), full, first, 3)[inner], as_image(pixel_grid(full, full), full)[inner], atol=1e-6)


# --- the loop ---

def ring(n, distance=3.0, height=0.8):
    """n cameras round the origin."""
    angle = torch.arange(n) * (2 * math.pi / n) + 0.3
    eye = torch.stack([distance * angle.cos(), torch.full_like(angle, height), distance * angle.sin()], -1)
    R, T = look_at(eye, torch.zeros(3), torch.tensor([0.0, 1, 0]))
    return Cameras(R, T, torch.full((n, 2), 2.2), torch.zeros(n, 2))


def ball(n, size, radius=0.8):
    """n views of a ball coloured by its normal, rendered analytically."""
    cameras = ring(n)
    rays_o, rays_d = cameras.rays(pixel_grid(size, size).expand(n, -1, 2))
    d = torch.nn.functional.normalize(rays_d, dim=-1)
    b = (rays_o * d).sum(-1)
    inside = b**2 - (rays_o**2).sum(-1) + radius**2
    normal = (rays_o + (-b - inside.clamp(min=0).sqrt())[..., None] * d) / radius
    mask = (inside > 0).float()[:, None]  # (n, 1, R)
    images = (0.5 + 0.5 * normal.transpose(1, 2)) * mask
    shape = (n, -1, size, size)
    return Scene(images.reshape(shape), mask.reshape(shape), torch.ones(n, 1, size, size), cameras, [str(i) for i in range(n)], "ball")


class Dummy:
    """Stands in for the prior: a grey EFT image; notes the calls of `denoise`, which darkens."""
    preset = types.SimpleNamespace(image_size=32)

    def __init__(self):
        self.levels, self.images, self.conditions = [], [], 0

    def condition(self, images, cameras, queries, near, far, progress=None):
        self.conditions += 1
        n = len(queries)
        return sf.Condition(torch.arange(n).float().reshape(n, 1, 1, 1).expand(n, 1, 8, 8), torch.full((n, 3, 8, 8), 0.4))

    def denoise(self, image, features, level, generator, steps=None, **sampler):
        self.levels.append(level)
        self.images.append(image)
        self.sampler = {"steps": steps, **sampler}
        return 0.5 * image


def distillation(model, config=SHORT, perceptual=lambda a, b: (a - b).square().mean((1, 2, 3)), **sampler):
    cameras = ring(2)
    viewpoints = Cameras.cat([circle_path(ring(5), 3), cameras])
    return distill.Distillation(ball(2, 32), config, 7, model, viewpoints, (1.0, 5.0), perceptual, **sampler)


def test_the_loop_alternates_and_bootstraps_first():
    model, calls = Dummy(), []
    work = distillation(model, ancestral=True)

    def noted(name):
        step = getattr(work, name)

        def run():
            calls.append((name, work.iteration, len(model.levels)))
            return step()
        setattr(work, name, run)

    noted("input_step")
    noted("query_step")
    work.run()
    assert [c[:2] for c in calls] == [(name, i) for i in range(6) for name in ("input_step", "query_step")]
    assert [c[2] for c in calls if c[0] == "query_step"] == [0, 0, 0, 0, 1, 2] and len(model.levels) == 3  # from iteration 3 on
    assert all(0 <= level < 1 for level in model.levels) and len(set(model.levels)) == 3
    assert model.conditions == 1 and model.sampler == {"steps": SHORT.steps, "ancestral": True}
    assert all(not x.requires_grad and x.shape == (1, 3, 32, 32) for x in model.images)
    steps = [int(s["step"]) for s in work.optimizer.state_dict()["state"].values()]
    assert steps[-1] == 6 and set(steps[:-1]) == {12}  # two updates an iteration, only one of which sees an input's exposure
    assert work.iteration == 6


def test_without_a_prior_only_the_input_views_are_seen():
    work = distill.Distillation(ball(2, 32), SHORT, 7)
    work.query_step = None
    work.run()
    assert {int(s["step"]) for s in work.optimizer.state_dict()["state"].values()} == {6}


def test_learning_rates_fall_to_the_last_iteration():
    work, seen = distill.Distillation(ball(2, 32), SHORT, 7), []
    step = work.input_step
    work.input_step = lambda: (seen.append([g["lr"] for g in work.optimizer.param_groups]), step())[1]
    work.run()
    expected = [[rate * SHORT.decay ** (i / 6) for rate in (SHORT.lr_grid, SHORT.lr_mlp, 0)] for i in range(6)]
    parity.assert_close(seen, expected, rtol=1e-6)


def at_query(model, config, seen, iteration, **kwargs):
    """A distillation about to take a query step, whose rendering is the leaf `seen` (1, 4, 32, 32), a ray a pixel."""
    work = distillation(model, replace(config, render_size=32), **kwargs)
    work.condition = model.condition(None, None, work.viewpoints, 1, 5)
    work.random, work.iteration = random.Random(3), iteration
    work.render = lambda camera, full: (seen, pixel_grid(32, 32), (0, 0))
    return work


def test_gradient_of_the_distillation_loss_by_hand():
    """x_hat = x / 2 is a constant: were it differentiated, the colour's gradient would be half of this."""
    seen = (0.2 + 0.6 * torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
    model = Dummy()
    work = at_query(model, SHORT, seen, SHORT.bootstrap)
    loss = work.query_step()
    loss.backward()
    x, silhouette, n = seen.detach()[:, :3], seen.detach()[:, 3:], 3 * 32 * 32
    weight = distill.fusion_weight(model.levels[0])
    expected = weight * torch.ones_like(x) / n + SHORT.perceptual * 2 * (x - x / 2) / n  # sign(x - x / 2) = 1
    parity.assert_close(seen.grad[:, :3], expected, rtol=1e-4, atol=1e-9)
    expected = SHORT.opacity * silhouette / (silhouette**2 + 0.01).sqrt() / (32 * 32)
    parity.assert_close(seen.grad[:, 3:], expected, rtol=1e-4, atol=1e-9)
    value = weight * (x / 2).mean() + SHORT.perceptual * (x / 2).square().mean() + SHORT.opacity * (silhouette**2 + 0.01).sqrt().mean()
    parity.assert_close(loss, value, rtol=1e-5)


def test_bootstrap_target():
    """A rendering that is the EFT image, with its mask, leaves the opacity term only; the last bootstrap iteration is one."""
    seen = torch.full((1, 4, 32, 32), 0.4)
    seen[:, 3] = 1
    model = Dummy()
    work = at_query(model, SHORT, seen, SHORT.bootstrap - 1)
    parity.assert_close(work.query_step(), SHORT.opacity * math.sqrt(1.01), rtol=1e-4)
    assert not model.levels
    work.render = lambda camera, full: (seen * torch.tensor([1, 1, 1, 0.0]).reshape(1, 4, 1, 1), pixel_grid(32, 32), (0, 0))
    parity.assert_close(work.query_step(), (math.sqrt(101) - 1) * 0.1 + SHORT.opacity * 0.1, rtol=1e-4)  # empty where the mask is 1


def tiny_model():
    torch.manual_seed(0)
    model = sf.SparseFusion(TINY)
    for p in model.vldm.unet.parameters():  # the last layer starts at zero: no denoiser to speak of
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return sf.ready(model, "cpu")


def test_no_gradient_through_the_denoiser():
    model = tiny_model().requires_grad_(True)
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    features = torch.rand(1, 16, *[TINY.latent_size * TINY.unet.cond_unshuffle] * 2, requires_grad=True)
    x_hat = model.denoise(image, features, 0.5, torch.Generator().manual_seed(0), steps=2)
    assert not x_hat.requires_grad and 0 <= x_hat.min() and x_hat.max() <= 1 and x_hat.std() > 0
    work = distillation(model, SHORT, model.perceptual)
    work.run()  # the field's update must not need the prior's gradients either: it is the only thing that moves
    assert set(p for g in work.optimizer.param_groups for p in g["params"]) == {work.exposure, *work.field.parameters()}
    assert not work.exposure.any()  # its learning rate is 0 here


# --- resuming ---

@pytest.mark.parametrize("k", [2, 4])
def test_resumed_equals_uninterrupted(k, tmp_path, monkeypatch):
    """From a checkpoint in bootstrap, and from one in distillation: the same bits as without a stop."""
    model, clock = tiny_model(), iter(range(0, 10**6, 61))
    config = replace(SHORT, lr_exposure=1e-2)
    whole = distillation(model, config, model.perceptual)
    monkeypatch.setattr(distill, "time", types.SimpleNamespace(time=lambda: next(clock)))  # a checkpoint is due at every iteration

    def checkpoint():
        if whole.iteration == k:
            sf.save_atomically(whole.state_dict(), tmp_path / "state.pt")

    whole.run(checkpoint=checkpoint)
    resumed = distillation(model, config, model.perceptual)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.iteration == k
    different = any(not torch.equal(a, b) for a, b in zip(resumed.field.parameters(), whole.field.parameters()))
    resumed.run()
    for part in ("field", "occupancy"):
        a, b = getattr(whole, part).state_dict(), getattr(resumed, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(whole.exposure, resumed.exposure) and whole.exposure.std() > 0
    assert different and resumed.iteration == whole.iteration == SHORT.iterations


def test_the_seed_decides():
    fields = [distill.Distillation(ball(2, 32), SHORT, seed) for seed in (1, 1, 2)]
    for work in fields:
        work.run()
    tables = [work.field.encoding.table for work in fields]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


# --- a field without a prior ---

def test_a_field_fits_its_input_views():
    """Six views of a ball, in two seconds: the same views at more than 30 dB, unseen ones at more than 24 dB, silhouettes to match."""
    scene = ball(12, 32)
    inputs, rest = scene[[0, 2, 4, 6, 8, 10]], scene[[1, 5]]
    config = replace(SHORT, iterations=300, occupancy_every=16, lr_grid=3e-2, lr_mlp=1e-2, field=FIELD)
    work = distill.Distillation(inputs, config, 0)
    work.run()
    for views, least in ((inputs, 30), (rest, 24)):
        images, silhouettes = work.views(views.cameras, 32)
        assert metrics.psnr(images, views.images).mean() > least
        assert metrics.iou(silhouettes, views.masks).mean() > 0.95


def test_the_exposure_of_every_input_view_is_found():
    """Photographs of one ball, coloured by height, at three exposures: their ratios come out."""
    scene, gains = ball(6, 32), torch.tensor([[0.7, 0.8, 0.9], [1, 1, 1], [0.85, 0.85, 0.85]] * 2)
    scene = replace(scene, images=scene.images[:, 1:2] * gains[..., None, None])
    for rate in (0, 1e-2):
        config = replace(SHORT, iterations=300, occupancy_every=16, lr_grid=3e-2, lr_mlp=1e-2, lr_exposure=rate, field=FIELD)
        work = distill.Distillation(scene, config, 0)
        work.run()
        found = (work.exposure - work.exposure.mean(0)).detach().exp()
        parity.assert_close(found, gains / gains.log().mean(0).exp() if rate else torch.ones(6, 3), atol=0.12 if rate else 0)


def test_sides_of_different_colour_do_not_pass_for_exposures():
    """A ball coloured by its normal, photographed at one exposure: the gains stay near one, and unseen views do not suffer much."""
    scene, quality = ball(24, 32), {}
    for rate in (0, 1e-2):
        config = replace(SHORT, iterations=300, occupancy_every=16, lr_grid=3e-2, lr_mlp=1e-2, lr_exposure=rate, field=FIELD)
        work = distill.Distillation(scene[list(range(0, 24, 2))], config, 0)
        work.run()
        quality[rate] = metrics.psnr(work.views(scene[[3, 15]].cameras, 32)[0], scene[[3, 15]].images).mean()
    assert work.exposure.abs().max() < 0.1 and quality[1e-2] > quality[0] - 1


def test_footprint():
    """Colours of the input views are means over squares, black outside the picture; their masks stay sharp."""
    scene = ball(2, 32)
    work, same = (distill.Distillation(scene, replace(SHORT, footprint=n), 0) for n in (5, 1))
    parity.assert_close(work.colours[1, :, 10, 20], scene.images[1, :, 8:13, 18:23].mean((1, 2)), rtol=1e-5)
    parity.assert_close(work.colours[0, :, 0, 16], scene.images[0, :, :3, 14:19].sum((1, 2)) / 25, rtol=1e-5)
    assert torch.equal(same.colours, scene.images) and torch.equal(work.inputs.masks, scene.masks)


# --- the command ---

@pytest.fixture
def fast(monkeypatch):
    """Small numbers for the same command."""
    for name in ("nano", "plain"):
        monkeypatch.setitem(distill.PRESETS, name, SHORT)
    monkeypatch.setattr(distill, "turntable", partial(distill.turntable, frames=2))


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    sf.save(tiny_model(), path)
    return path


def command(out, *flags):
    """`python distill.py ... --out out`: what `metrics.json` holds."""
    distill.main([str(x) for x in (*flags, "--device", "cpu", "--out", out)])
    return json.loads((out / "metrics.json").read_text())


def check_outputs(out, result, methods, size, frames):
    """All that is promised is there and can be opened."""
    assert {"sequence", "input_frames", "target_frames", "seed", "seconds", "methods", "command", "versions"} <= set(result)
    assert set(result["methods"]) == set(methods)
    for row in result["methods"].values():
        assert set(row) == {"psnr", "ssim", "perceptual", "iou"}
        assert row["psnr"] > 3 and -1 <= row["ssim"] <= 1 and row["perceptual"] >= 0 and 0 <= row["iou"] <= 1
    with Image.open(out / "comparison.png") as sheet:
        sheet.load()
        assert sheet.width == size * max(len(result["input_frames"]), 1 + len(methods))
    with Image.open(out / "turntable.gif") as gif:
        assert gif.n_frames == frames and gif.size == (size, size)
    lines = (out / "mesh.ply").read_bytes().split(b"end_header\n")[0].decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert {f"property uchar {name}" for name in ("red", "green", "blue")} <= set(lines)
    state = torch.load(out / "field.pt", weights_only=True)
    assert {"field", "settings", "iteration"} <= set(state)
    assert not list(out.glob("*.tmp"))


def test_the_turntable_has_the_object_in_the_middle(tmp_path):
    """However far beside it the crops' optical axes pass."""
    seen, box = [], torch.tensor([[0.5, 1.0, 0.0], [1.5, 2.0, 1.0]])
    R, T = look_at(torch.tensor([[0.0, 1.0, -9.0], [9.0, 1.0, 0.0], [0.0, 1.0, 9.0]]), torch.zeros(3, 3), torch.tensor([[0.0, 1.0, 0.0]] * 3))
    scene = types.SimpleNamespace(cameras=Cameras(R, T, torch.full((3, 2), 2.0), torch.full((3, 2), 0.3)), images=torch.zeros(3, 3, 8, 8))
    work = types.SimpleNamespace(occupancy=types.SimpleNamespace(box=box),
                                 views=lambda cameras, size: (seen.append(cameras) or torch.zeros(len(cameras), 3, size, size), None))
    distill.turntable(work, scene, tmp_path / "t.gif", frames=5)
    xy, depth = seen[0].project(box.mean(0).expand(5, 1, 3))
    assert xy.abs().max() < 1e-5 and (depth > 0).all()


def test_the_shipped_sample(tmp_path, monkeypatch, capsys):
    """The main command, few iterations, fewer viewpoints and pictures of the turntable: nothing else is changed."""
    monkeypatch.setitem(distill.PRESETS, "nano", replace(distill.NANO, viewpoints=2))
    monkeypatch.setattr(distill, "circle_path", lambda cameras, n, *args: circle_path(cameras[::8], n, *args))
    monkeypatch.setattr(distill, "turntable", partial(distill.turntable, frames=3))
    out = tmp_path / "results"
    result = command(out, "--iterations", 4, "--targets", 1)
    check_outputs(out, result, METHODS, 128, 3)
    assert result["sequence"] == "toy_1000_00000" and result["seed"] == 0 and result["seconds"] > 0
    assert len(result["input_frames"]) == 2 and len(result["target_frames"]) == 1
    assert not set(result["input_frames"]) & set(result["target_frames"])
    row = result["methods"]
    # The prior has seen many other toys: after four iterations it knows better than the field, and than the nearest picture.
    assert row["eft"]["psnr"] > row["nearest"]["psnr"] + 2 and row["vldm"]["perceptual"] < row["nearest"]["perceptual"]
    printed = capsys.readouterr().out
    assert "not LPIPS" in printed and str(out) in printed and all(label in printed for label in distill.LABELS.values())


@pytest.mark.parametrize("flags, inputs, targets", [
    (["--views", 1], 1, 2), (["--views", 6], 6, 2), (["--views", 0], 24, 2), (["--input-frames", "5,3,24"], ["5", "3", "24"], 2),
    (["--metrics-on-inputs", "--targets", 24], 2, 24), (["--ancestral", "--unnoised-start", "--grid", "tiled", "--eft-train-mode"], 2, 2)])
def test_any_number_of_views(flags, inputs, targets, fast, tiny_weights, tmp_path):
    result = command(tmp_path, "--weights", tiny_weights, "--targets", 2, *flags)
    check_outputs(tmp_path, result, METHODS, 32, 2)
    assert result["input_frames"] == inputs if isinstance(inputs, list) else len(result["input_frames"]) == inputs
    assert len(result["target_frames"]) == targets
    shared = set(result["input_frames"]) & set(result["target_frames"])
    assert bool(shared) == (inputs == 24 or targets == 24)


def test_metrics_of_input_views_are_json(fast, tiny_weights, tmp_path):
    """Where a target is an input view, the nearest picture is the target itself: no error at all, but a number that JSON has."""
    command(tmp_path, "--weights", tiny_weights, "--targets", 2, "--views", 0)
    text = (tmp_path / "metrics.json").read_text()
    methods = json.loads(text, parse_constant=lambda name: pytest.fail(f"metrics.json: {name} is not JSON"))["methods"]
    assert methods["nearest"]["psnr"] >= 60 and methods["nearest"]["ssim"] == 1


def test_no_prior_on_the_sample(fast, tmp_path):
    result = command(tmp_path, "--no-prior", "--views", 3, "--weights", tmp_path / "not_needed.pt")
    check_outputs(tmp_path, result, ["nearest", "ngp"], 32, 2)


def test_no_prior_on_real_photographs(monkeypatch, tmp_path):
    if not REAL.is_dir():
        pytest.skip(f"the real sequence is not in {REAL}")
    monkeypatch.setattr(distill, "turntable", partial(distill.turntable, frames=2))
    monkeypatch.setitem(distill.PRESETS, "plain", replace(distill.PLAIN, iterations=20, field=replace(
        distill.PLAIN.field, levels=4, finest_resolution=64, log2_table=14, samples=48)))
    result = command(tmp_path, "--root", REAL, "--category", "apple", "--views", 12, "--no-prior")
    check_outputs(tmp_path, result, ["nearest", "ngp"], 256, 2)
    assert len(result["input_frames"]) == 12 and len(result["target_frames"]) == 2
    assert result["methods"]["ngp"]["psnr"] > 12


def test_evaluate(fast, tiny_weights, tmp_path, capsys, monkeypatch):
    """Means and wins over two sequences; results of the same flags and weights are taken again, no others."""
    runs, run = [], distill.Job.run
    monkeypatch.setattr(distill.Job, "run", lambda self: (runs.append((self.sequence, self.args.seed)), run(self))[1])

    def evaluate(*flags):
        argv = ["evaluate", "--root", ROOT / "sample" / "co3d", "--instances", 2, "--targets", 1, "--weights", tiny_weights, "--device", "cpu",
                "--out", tmp_path, *flags]
        runs.clear()
        sf.main(list(map(str, argv)))
        return json.loads((tmp_path / "evaluation.json").read_text())

    names, fresh = ["toy_1000_00000", "toy_1000_00001"], evaluate()
    assert runs == [(names[0], 0), (names[1], 1)] and fresh["instances"] == 2
    assert f"perceptual distance {fresh['perceptual_ratio']:.2f}" in capsys.readouterr().out
    each = [json.loads((tmp_path / name / "metrics.json").read_text())["methods"] for name in names]
    for method in METHODS:
        for k, value in fresh["mean"][method].items():
            assert value == pytest.approx(sum(e[method][k] for e in each) / 2)
    assert fresh["sparsefusion_beats_eft"]["psnr"] == sum(e["sparsefusion"]["psnr"] > e["eft"]["psnr"] for e in each)
    assert fresh["sparsefusion_beats_eft"]["perceptual"] == sum(e["sparsefusion"]["perceptual"] < e["eft"]["perceptual"] for e in each)
    assert evaluate() == fresh and not runs
    evaluate("--seed", 1)
    assert runs == [(names[0], 1), (names[1], 2)]
    tiny_weights.touch()
    evaluate("--seed", 1)
    assert len(runs) == 2


def test_a_rerun_goes_on(fast, tiny_weights, tmp_path, capsys):
    """The same command again finds its field; with other settings it starts afresh."""
    flags = ["--weights", tiny_weights, "--targets", 1]
    first = command(tmp_path, *flags)
    assert "going on" not in capsys.readouterr().out
    again = command(tmp_path, *flags)
    assert "going on at iteration 6" in capsys.readouterr().out and again["methods"] == first["methods"]
    command(tmp_path, *flags, "--seed", 1)
    assert "going on" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--ancestral", "--unnoised-start", "--eft-train-mode"])
def test_another_sampler_does_not_go_on(flag, fast, tiny_weights, tmp_path, capsys):
    for flags in ([], [flag]):
        command(tmp_path, "--weights", tiny_weights, "--targets", 1, *flags)
        assert "going on" not in capsys.readouterr().out


# --- bad input ---

def refused(capsys, tmp_path, flags, *words):
    """The command ends with exit code 2 and one line that has all the words; it has written nothing."""
    out = tmp_path / "refused"
    with pytest.raises(SystemExit) as e:
        distill.main([str(x) for x in (*flags, "--out", out)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(lines) == 1, lines
    assert all(str(w) in lines[0] for w in words), (lines[0], words)
    assert not out.exists()


@pytest.mark.parametrize("flags, words", [
    (["--root", "nowhere"], ["nowhere"]),
    (["--category", "cats"], ["cats"]),
    (["--sequence", "toy_0"], ["toy_0", "toy_1000_00000"]),
    (["--views", "25"], ["--views 25", "24 frames"]),
    (["--views", "-1"], ["--views -1"]),
    (["--views", "two"], ["--views", "two"]),
    (["--input-frames", "3,99"], ["--input-frames", "99"]),
    (["--input-frames", ""], ["--input-frames"]),
    (["--iterations", "0"], ["--iterations", "0"]),
    (["--iterations", "-5"], ["--iterations"]),
    (["--targets", "0"], ["--targets"]),
    (["--seed", "x"], ["--seed", "x"]),
    (["--device", "tpu"], ["--device", "tpu", "cpu"]),
    (["--preset", "huge"], ["--preset", "huge", "paper"]),
    (["--grid", "flat"], ["--grid", "flat"]),
    (["--frames", "3"], ["--frames"]),
    (["--perceptual", "nowhere.pt"], ["nowhere.pt", "no such"]),
    (["--lpips", "vgg.pth", "linear.pth"], ["vgg.pth"]),
])
def test_bad_flags(flags, words, tiny_weights, tmp_path, capsys):
    refused(capsys, tmp_path, ["--weights", tiny_weights, *flags], *words)


def test_cuda_where_there_is_none(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused(capsys, tmp_path, ["--device", "cuda"], "--device", "cpu")


def test_bad_weights(tmp_path, capsys):
    refused(capsys, tmp_path, ["--weights", tmp_path / "none.pt"], tmp_path / "none.pt", "no such")
    foreign, text, directory = tmp_path / "foreign.pt", tmp_path / "text.pt", tmp_path
    torch.save({"model_state_dict": {"a": torch.zeros(2)}}, foreign)
    text.write_text("not weights")
    refused(capsys, tmp_path, ["--weights", foreign], foreign, "not a checkpoint of this program")
    refused(capsys, tmp_path, ["--weights", text], text, "not a checkpoint")
    refused(capsys, tmp_path, ["--weights", directory], directory)
    refused(capsys, tmp_path, ["--perceptual", text, "--no-prior"], text)


def test_weights_of_another_kind(tmp_path, capsys):
    """The prior where the perceptual network should be, and the other way round."""
    refused(capsys, tmp_path, ["--perceptual", sf.SHIPPED, "--no-prior"], sf.SHIPPED)
    refused(capsys, tmp_path, ["--weights", sf.SHIPPED_PERCEPTUAL], sf.SHIPPED_PERCEPTUAL)


def test_bad_field_of_an_earlier_run(fast, tmp_path, capsys):
    """A `field.pt` that cannot be read is named, and left as it is."""
    for content in (b"", b"not a field"):
        (tmp_path / "field.pt").write_bytes(content)
        with pytest.raises(SystemExit) as e:
            command(tmp_path, "--no-prior")
        lines = capsys.readouterr().err.strip().splitlines()
        assert e.value.code == 2 and len(lines) == 1 and str(tmp_path / "field.pt") in lines[0]
        assert (tmp_path / "field.pt").read_bytes() == content


def test_broken_image(tmp_path, tiny_weights, capsys):
    shutil.copytree(ROOT / "sample" / "co3d" / "toys", tmp_path / "toys", ignore=lambda folder, names: [
        n for n in names if n.startswith("toy_") and n != "toy_1000_00000"])
    image = tmp_path / "toys" / "toy_1000_00000" / "images" / "frame000003.jpg"
    flags = ["--root", tmp_path, "--weights", tiny_weights, "--sequence", "toy_1000_00000"]
    image.write_bytes(image.read_bytes()[:300])
    refused(capsys, tmp_path, flags, image)
    image.unlink()
    refused(capsys, tmp_path, flags, image)
