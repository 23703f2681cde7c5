"""Training: losses against released numbers, the three trainings, resuming, the command."""
import functools
import itertools
import json
import re
import shutil
import signal
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import distill
import distillation
import presets
import sparsefusion
import train
import vldm
from cameras import pixel_grid
from checkpoints import convert
from common import files
from datasets import co3d
from reconstruction import reconstruct
from tests.support import parity
from tests.support.helpers import one_line, same
from tests.support.small import RELATIVE, SHORT, TINY, tiny_model
from training import fit
from training.packed import load_packed
from training.ranks import Draws

load = functools.partial(sparsefusion.load, stage="vae")  # a model of either stage
SAMPLE = Path(__file__).resolve().parents[2] / "sample" / "co3d"


# --- losses, released numbers ---

def test_color_loss_parity():
    """The released training loss: colors of the photograph at the rays' positions, the mask of its valid part at
    their resolution.
    """
    f = parity.load("losses")
    side = f["in_grid_xy"].shape[1]
    mask = vldm.latent_mask(f["in_valid_region"], side)
    parity.assert_close(mask, f["out_train_mask"])
    colors = train.colors_at(f["in_mc_image"], f["in_grid_xy"].flatten(0, 2), aligned=True)
    colors = colors.transpose(1, 2).unflatten(-1, (side, side))
    loss = (distillation.pseudo_huber(f["in_render"] - colors) * mask).mean()
    parity.assert_close(loss[None], f["out_train_color_loss"], rtol=1e-5)


def test_sampled_color_parity():
    f = parity.load("losses")
    colors = train.colors_at(f["in_mc_image"], f["in_grid_xy"].flatten(0, 2), aligned=True)
    expected = f["out_sampled_colors"].flatten(1, 2)
    parity.assert_close(colors, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(train.colors_at(f["in_mc_image"], f["in_grid_xy"].flatten(0, 2)), expected, atol=1e-3)


def test_colors_at_pixel_centers():
    """Pixel (row, column) of an image of side S is at NDC 1 - (2 i + 1) / S, left and up."""
    image = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    at = 1 - (2 * torch.arange(4) + 1) / 4
    xy = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).reshape(-1, 2)  # row by row
    parity.assert_close(train.colors_at(image, xy), image.flatten(2).transpose(1, 2), atol=1e-6)


# --- data ---

def test_a_query_view_is_none_of_its_inputs():
    data = load_packed([SAMPLE], ["toys"], 5, 32, workers=1)
    for step in range(20):
        batch = train.draw_views(data, Draws(0, step, 3, range(3)), (1, 3))
        assert 1 <= batch.images.shape[1] <= 3 and len(batch.target) == 3
        for b in range(3):
            assert all(not torch.equal(batch.target[b], x) for x in batch.images[b])
            assert all(not torch.equal(batch.query.R[b], R) for R in batch.cameras.R[b])


def test_every_number_of_input_views_is_seen():
    """The fewer, the oftener; as many as there are frames for."""
    data = load_packed([SAMPLE], ["toys"], 5, 32, workers=1)
    for views, most in (((1, 3), 3), ((1, 8), 4), ((2, 2), 2)):
        seen = [train.draw_views(data, Draws(0, step, 1, range(1)), views).images.shape[1] for step in range(100)]
        assert set(seen) == set(range(views[0], most + 1)) and sorted(seen)[50] <= 2


def test_sequences_of_few_frames_wait_for_steps_with_few_inputs():
    """They are used with the frames that they have, and no frame that they do not have is drawn."""
    data = load_packed([SAMPLE], ["toys"], 5, 32, workers=1)
    pixels = [data.pixels[0][:2], *data.pixels[1:]]
    data = replace(data, pixels=pixels, counts=torch.tensor([len(x) for x in pixels]))
    with_inputs = {1: set(), 2: set(), 3: set()}
    for step in range(60):
        batch = train.draw_views(data, Draws(0, step, 3, range(3)), (1, 3))
        with_inputs[batch.images.shape[1]] |= set(batch.scene.tolist())
    assert 0 in with_inputs[1] and with_inputs[2] == with_inputs[3] == set(range(1, len(data)))


# --- trainings ---

@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this module's own, whose packs serve every training; no long look at what they have learned."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        m.setattr(train, "SAMPLE_STEPS", 1)
        yield


def run(folder, what, out, *flags):
    """`train.py` on the shipped sample: the weights file."""
    argv = [what, "--root", SAMPLE, "--frames", 5, "--steps", 3, "--device", "cpu", "--out", folder / out, *flags]
    train.main([str(x) for x in (*argv, "--set", "batch=2")])
    return folder / out


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A function that runs `train.py` with a tiny preset and returns the weights file."""
    monkeypatch.setitem(presets.MODELS, "nano", TINY)
    return functools.partial(run, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights file of an autoencoder's finished training, beside its state. Nobody writes there."""
    with pytest.MonkeyPatch.context() as m:
        m.setitem(presets.MODELS, "nano", TINY)
        return run(tmp_path_factory.mktemp("whole"), "vae", "vae.pt")


def test_training_and_resuming(whole, training, capsys):
    vae, again = whole, training("vae", "vae2.pt", "--minutes", 1e-9)
    said = capsys.readouterr().out
    assert "stopped" in said and re.search(r"VAE: [0-9.]+ dB, .* [0-4] of 4 channels used", said)
    assert not same(load(vae), load(again))
    training("vae", "vae2.pt")
    assert "resuming vae2.pt at step 1" in capsys.readouterr().out
    assert same(load(vae), load(again))
    assert load(vae).preset == load(again).preset
    assert load(vae).preset.vae.scale != TINY.vae.scale

    prior = training("prior", "prior.pt", "--vae", vae)
    other = training("prior", "prior2.pt", "--vae", vae, "--minutes", 1e-9)
    half_way = load(other)
    training("prior", "prior2.pt", "--vae", vae)
    assert same(load(prior), load(other)) and not same(half_way, load(other))
    assert same(load(prior).vae, load(vae).half().float().vae)  # frozen
    assert not same(load(prior).eft, tiny_model().eft)

    one, two = training("perceptual", "p.pt"), training("perceptual", "p2.pt", "--minutes", 1e-9)
    training("perceptual", "p2.pt")
    one, two = (files.read_tensors(p)["weights"] for p in (one, two))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_killed_training_goes_on_from_what_it_saved_by_itself(whole, training, monkeypatch, capsys):
    clock, steps = itertools.count(0, 200), itertools.count(1)

    def update_average(*args, real=fit.update_average):
        if next(steps) == 3:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(fit, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))  # 200 s between looks
        m.setattr(fit, "update_average", update_average)
        training("vae", "killed.pt")
    assert "resuming" not in capsys.readouterr().out
    killed = training("vae", "killed.pt")
    assert "resuming killed.pt at step 1" in capsys.readouterr().out
    assert same(load(whole), load(killed))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_saves_and_goes_on_without_a_trace(number, whole, training, monkeypatch, capsys):
    """In the middle of a step: it is finished, and saved with all before it."""
    steps = itertools.count(1)
    before = signal.signal(number, signal.default_int_handler)  # whatever the tests' parent process ignores

    def update_average(*args, real=fit.update_average):
        if next(steps) == 2:
            signal.raise_signal(number)
        real(*args)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(fit, "update_average", update_average)
        training("vae", "stopped.pt")
    signal.signal(number, before)
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 128 + number and len(lines) == 1
    assert "stopped.pt.state has 2 of 3 steps" in lines[0] and "the same command resumes" in lines[0]
    assert same(load(whole), load(training("vae", "stopped.pt")))
    assert "resuming stopped.pt at step 2" in capsys.readouterr().out


def test_a_state_without_a_part(whole, training, tmp_path, capsys):
    state = files.read_tensors(whole.with_name("vae.pt.state"), "module")
    argv = ["vae", "--root", SAMPLE, "--frames", 5, "--steps", 3, "--set", "batch=2", "--out", tmp_path / "vae.pt"]
    optimizer = state["optimizer"]
    adam = optimizer["adam"]
    moments = {i: x | {"exp_avg": x["exp_avg"].int()} for i, x in adam["state"].items()}
    for broken in ({name: x for name, x in state.items() if name != "average"}, state | {"history": "a\nb"},
                   state | {"optimizer": optimizer | {"adam": adam | {"state": moments}}},
                   state | {"optimizer": optimizer | {"momenta": []}}, state | {"record": ["ab", {}]},
                   state | {"record": [[{"step": 0, "losses": {"loss": 1.0}}], {}]},
                   state | {"record": [[], {"loss": 1}]}):
        files.save_tensors(broken, tmp_path / "vae.pt.state")
        one_line(capsys, train.main, argv, "vae.pt.state: not a whole state")


def test_an_eft_without_units_is_trained_and_used(training, monkeypatch):
    """The same sequences in another unit give the same losses."""
    monkeypatch.setitem(presets.MODELS, "nano", RELATIVE)
    monkeypatch.setattr(train, "RAY_STEP", 4)
    vae = training("vae", "vae.pt")
    model = load(training("prior", "prior.pt", "--vae", vae))
    assert model.preset.eft.relative and model.preset.vae.channels == 8
    data = load_packed([SAMPLE], ["toys"], 5, 32, workers=1)
    config = train.TrainConfig(batch=2, model=model.preset)

    def losses(data):
        work = train.PriorTraining(data, config, model, "cpu")
        return work, work.batch(Draws(0, 0, 2, range(2)))

    work, batch = losses(data)
    before = work.module(batch)
    _, scaled = losses(replace(data, cameras=[cameras.scaled(7.0) for cameras in data.cameras]))
    parity.assert_close(torch.stack(list(work.module(scaled).values())), torch.stack(list(before.values())), rtol=1e-4)

    # Rays that miss the visual hull need not be asked about.
    rays = work.module.rays
    assert set(rays) == {1, 2, 3, 4} and rays[1] >= rays[2] >= rays[4] and rays[4] % 4 == 0 and rays[2] < 64
    index, xy, near, far, sees = work.module.choose_rays(batch, work.module.inputs(batch))
    assert sees.sum() > 20 and (sees.diff() <= 0).all() and (near < far).all()
    assert torch.equal(xy, pixel_grid(8, 8, 32)[index])
    work.module.rays = {}
    whole = work.module(batch)
    parity.assert_close(before["diffusion"], whole["diffusion"], rtol=1e-5)
    assert before["color"] > whole["color"]

    scene = co3d.load_sequence(SAMPLE, "toys", "toy_1000_00000", 32)
    result = reconstruct(scene, [0, 3], model.eval().requires_grad_(False), SHORT)
    assert result.render(scene.cameras[:1], 32).images.isfinite().all()


def test_inputs_become_rough_and_nothing_else(training, monkeypatch):
    monkeypatch.setitem(presets.MODELS, "nano", RELATIVE)
    model = tiny_model(preset=RELATIVE)
    data = load_packed([SAMPLE], ["toys"], 5, 32, workers=1)
    found = {}
    for rough in (0.0, 1.0):
        work = train.PriorTraining(data, train.TrainConfig(batch=2, model=RELATIVE, rough=rough), model, "cpu")
        batch = work.batch(Draws(0, 0, 2, range(2)), (3, 3))
        found[rough] = batch, work.module.inputs(batch), work.module.eval()(batch)
    (clean, exact, losses), (same, changed, others) = found.values()
    assert torch.equal(clean.views.images, same.views.images) and torch.equal(clean.views.target, same.views.target)
    assert torch.equal(exact, clean.views.images / train.LEVELS) and (changed - exact).abs().mean() > 1e-3
    assert all(losses[name] != others[name] for name in losses)


# --- what a weights file says about its trainings ---

def test_weights_know_what_they_were_trained_on(whole, training, tmp_path):
    prior = training("prior", "prior.pt", "--vae", whole)
    again = training("prior", "again.pt", "--vae", prior, "--set", "lr=1e-3")
    trainings = sparsefusion.read_trained_on(again)
    assert [x["what"] for x in trainings] == ["vae", "prior", "prior"]
    for x in trainings:
        assert x["category"] == "toys" and x["sequences"] == 6 and x["frames"] == 5 and x["steps"] == 3
    assert sparsefusion.read_trained_on(prior) == trainings[:2]
    assert str(tmp_path.parent) not in json.dumps(trainings)  # nothing about the machine


def test_weights_that_say_nothing(tmp_path):
    sparsefusion.save(tiny_model(), tmp_path / "silent.pt")
    assert sparsefusion.read_trained_on(tmp_path / "silent.pt") == []
    for strange in ("toys", {"category": "toys"}, [1, {"category": 2}, None]):
        files.save_tensors({"weights": {}, "trained_on": strange}, tmp_path / "strange.pt")
        assert sparsefusion.read_trained_on(tmp_path / "strange.pt") == []


def test_converted_weights_know_their_category(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "from_released", lambda *files: tiny_model())
    argv = ["--eft", "a", "--vldm", "b", "--vae", "c", "--out", str(tmp_path / "out.pt")]
    convert.main(argv)
    assert sparsefusion.read_trained_on(tmp_path / "out.pt") == []
    convert.main([*argv, "--category", "hydrant"])
    assert sparsefusion.read_trained_on(tmp_path / "out.pt") == [{"what": "prior", "category": "hydrant"}]


def test_a_weights_file_that_is_lost_is_written_again(whole, training, tmp_path):
    """To the bit, untrained networks included, from the state of the finished training."""
    shutil.copy(whole.with_name("vae.pt.state"), tmp_path)
    assert same(load(training("vae", "vae.pt")), load(whole))


def test_another_seed_trains_another_model(whole, training):
    assert not same(load(whole), load(training("vae", "b.pt", "--seed", 1)))


def test_state_of_another_training(whole, training, tmp_path, capsys):
    shutil.copy(whole.with_name("vae.pt.state"), tmp_path / "p.pt.state")
    flags = ["--root", SAMPLE, "--frames", 5, "--steps", 3, "--out"]
    perceptual = ["perceptual", *flags, tmp_path / "p.pt"]
    one_line(capsys, train.main, perceptual, tmp_path / "p.pt.state", "another training", "what")
    (tmp_path / "p.pt.state").write_bytes(b"junk")
    one_line(capsys, train.main, perceptual, tmp_path / "p.pt.state")
    prior = ["prior", *flags, tmp_path / "q.pt", "--vae", whole.with_name("vae.pt.state")]
    one_line(capsys, train.main, prior, "vae.pt.state")
    assert not (tmp_path / "q.pt").exists()


def test_other_numbers_are_another_training(whole, training, capsys, monkeypatch):
    monkeypatch.setitem(presets.MODELS, "other", replace(TINY, name="other"))
    argv = ["vae", "--root", SAMPLE, "--frames", 5, "--steps", 3, "--set", "batch=2", "--out", whole]
    for flags, differs in [
            (["--seed", 1], "seed"), (["--steps", 2], "config.fit.steps is 3 there, 2 here"),
            (["--set", "lr=1e-2"], "config.fit.lr"), (["--set", "batch=1"], "config.batch"), (["--frames", 4], "data"),
            (["--set", "image_size=16"], "config.model.image_size"), (["--preset", "other"], "config.model.name")]:
        one_line(capsys, train.main, [*argv, *flags], "another training", differs)


def test_another_vae_is_another_training(whole, training, tmp_path, capsys):
    other = training("vae", "other.pt", "--seed", 1)
    training("prior", "prior.pt", "--vae", whole)
    argv = ["prior", "--root", SAMPLE, "--frames", 5, "--steps", 3, "--set", "batch=2", "--out", tmp_path / "prior.pt"]
    one_line(capsys, train.main, [*argv, "--vae", other], "another training", "vae")


def test_a_longer_training_resumes_a_shorter_one(training, tmp_path, capsys):
    """From there on the learning rate is the longer one's, and one line says so."""
    training("vae", "vae.pt")
    training("vae", "vae.pt", "--steps", 5)
    out = capsys.readouterr().out
    now = fit.learning_rate(3, fit.FitConfig(steps=5))
    assert "resuming vae.pt at step 3; it was to be 3 steps: from here the learning rate is that of 5" in out
    assert f"now {now:.2g} instead of {fit.learning_rate(3, fit.FitConfig(steps=3)):.2g}" in out
    assert files.read_tensors(tmp_path / "vae.pt.state", "module")["completed"] == 5
    assert [x["steps"] for x in sparsefusion.read_trained_on(tmp_path / "vae.pt")] == [5]


def test_a_fork_starts_from_the_weights_of_another_training(training, tmp_path, capsys):
    before = load(training("vae", "vae.pt"))
    capsys.readouterr()
    training("vae", "vae.pt", "--fork", "--set", "lr=1e-12", "--minutes", 1e-9)
    out = capsys.readouterr().out
    assert "starting vae.pt from the weights of another training (config differ: config.fit.lr" in out
    after = load(training("vae", "vae.pt", "--fork", "--set", "lr=1e-12"))
    assert "resuming vae.pt at step 1" in capsys.readouterr().out  # its own state by now
    for a, b in zip(before.vae.parameters(), after.vae.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    assert len(sparsefusion.read_trained_on(tmp_path / "vae.pt")) == 2
    argv = ["perceptual", "--root", SAMPLE, "--frames", 5, "--fork", "--out", tmp_path / "vae.pt"]
    one_line(capsys, train.main, argv, "vae.pt.state", "not a whole state of a `train.py perceptual`")


def test_numbers_of_a_prior(training, tmp_path, capsys):
    """The diffusion's may be set, the architecture's may not: the --vae file fixes it, the pictures' size included."""
    vae = training("vae", "vae.pt", "--set", "image_size=64")
    prior = training("prior", "prior.pt", "--vae", vae, "--set", "noisings=1", "drop=0.5")
    preset = load(prior).preset
    assert preset.image_size == 64 and preset.diffusion.noisings == 1 and preset.diffusion.drop == 0.5
    argv = ["prior", "--root", SAMPLE, "--frames", 5, "--out", tmp_path / "x.pt", "--vae", vae]
    one_line(capsys, train.main, [*argv, "--set", "model.unet.heads=4"], "architecture")
    one_line(capsys, train.main, [*argv, "--set", "image_size=32"], "architecture")


# --- the loop ---

def test_the_average_follows_the_weights():
    layer = nn.BatchNorm1d(2)
    average = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        layer.weight.add_(1.0), layer.num_batches_tracked.add_(5)
    fit.update_average(average, layer.state_dict(), 0.75)
    assert torch.allclose(average["weight"], torch.full((2,), 1.25)) and average["num_batches_tracked"] == 5


def test_the_learning_rate_warms_up_and_falls():
    config = fit.FitConfig(steps=1000, lr=2.0, warmup=100, final_lr_fraction=0.01)
    assert fit.learning_rate(0, config) == pytest.approx(0.02)
    assert fit.learning_rate(500, config) == pytest.approx(2 * (0.01 + 0.99 / 2))
    assert fit.learning_rate(1000, config) == pytest.approx(0.02)


# --- the command line ---

@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], "--steps"), (["--steps", "x"], "--steps"), (["--frames", "1.5"], "--frames"),
    (["--set", "batch=-1"], "batch"), (["--set", "lr=0"], "lr"), (["--set", "lr=nan"], "lr"),
    (["--set", "ema=1"], "ema"), (["--set", "ema=x"], "ema"),
    (["--set", "min_views=9"], "min_views"), (["--set", "betas=0.9,x"], "betas"),
    (["--minutes", "-3"], "--minutes"), (["--seed", "x"], "--seed"), (["--seed", "2147483648"], "--seed"),
    (["--preset", "huge"], "--preset"),
    (["--device", "tpu"], "--device"),
    (["--root"], "--root"), (["--set", "widths=8"], "model.vae.widths"),
    (["--unknown"], "--unknown"), (["--category", "cars"], "cars"),
    (["--root", "nowhere"], "nowhere"), (["--out", "."], "no regular file"),
    (["--set", "vae.widths=16384,16384,16384,16384"], "parameters, more than 2,147,483,648")])
def test_bad_values(flags, words, tmp_path, capsys, monkeypatch):
    """Told before the work, and before memory is reserved."""
    monkeypatch.setattr(train, "VAETraining", None)
    one_line(capsys, train.main, ["vae", "--root", SAMPLE, "--out", tmp_path / "x", *flags], words)


def test_an_autoencoder_is_no_prior(whole, tmp_path, capsys):
    argv = ["--weights", whole, "--out", tmp_path / "x"]
    one_line(capsys, distill.main, argv, whole, "only its autoencoder is trained")


def test_prior_needs(whole, tmp_path, capsys):
    argv = ["prior", "--root", SAMPLE, "--out", tmp_path / "x"]
    one_line(capsys, train.main, argv, "--vae")
    one_line(capsys, train.main, [*argv, "--vae", whole, "--min-views", 9], "min_views 9", "max_views 8")
    one_line(capsys, train.main, [*argv, "--vae", whole, "--frames", 4, "--min-views", 4], "--min-views 4", "4 frames")


def test_commands_are_needed(capsys):
    for argv in ([], ["fly"], ["vae"]):
        one_line(capsys, train.main, argv, "error:")


def test_attributes_are_needed(tmp_path, capsys):
    shutil.copytree(SAMPLE, tmp_path / "co3d")
    (tmp_path / "co3d" / "toys" / "sequence_annotations.jgz").unlink()
    argv = ["perceptual", "--root", tmp_path / "co3d", "--out", tmp_path / "x", "--frames", 5]
    one_line(capsys, train.main, argv, "sequence_annotations.jgz")


# --- numbers that go wrong ---

def test_a_training_that_breaks_stops_and_writes_nothing(training, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        training("perceptual", "p.pt", "--steps", 60, "--set", "lr=1e6", "warmup=1", "clip_norm=1e30")
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert e.value.code == 2 and "broke in step" in line and str(tmp_path / "p.pt") in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, words", [
    (lambda x: x * float("nan"), "not finite"),
    (lambda x: x.to(torch.int8), "torch.int8"),
    (lambda x: x.to(torch.complex64), "final_conv.weight is made of"),
    (lambda x: x[..., :1], "size mismatch|shape"),
])
def test_weights_that_are_none_are_named(change, words, tmp_path):
    sparsefusion.save(tiny_model(), tmp_path / "w.pt")
    data = files.read_tensors(tmp_path / "w.pt")
    data["weights"]["vldm.unet.final_conv.weight"] = change(data["weights"]["vldm.unet.final_conv.weight"])
    files.save_tensors(data, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"w.pt: .*({words})"):
        sparsefusion.load(tmp_path / "w.pt")


@pytest.mark.parametrize("part, numbers", [("eft", {"stem": 10**6}), ("unet", {"widths": (10**6,) * 3}),
                                           ("unet", {"tokens": 10**9}), ("vae", {"widths": (10**6, 10**6)})])
def test_absurd_sizes_reserve_no_memory(part, numbers, tmp_path):
    sparsefusion.save(tiny_model(), tmp_path / "w.pt")
    data = files.read_tensors(tmp_path / "w.pt")
    data["preset"][part] |= numbers
    files.save_tensors(data, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="w.pt: "):
        sparsefusion.load(tmp_path / "w.pt")
