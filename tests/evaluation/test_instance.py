"""The main command from flags to files, reruns, bad input."""
import json
import shutil
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import distill
import presets
import reconstruction
import sparsefusion
from datasets import protocol
from evaluation.instance import (SAMPLE, SHIPPED_FEATURE_NET, baselines, choose_weights, config_from_flags,
                                 instance_from_flags, note_new_categories)
from export.page import TURNTABLE
from export.pictures import LABELS, WIDEST
from photographs import capture
from presets import PRESETS
from reconstruction import Checkpoint, reconstruct
from tests.support.helpers import one_line
from tests.support.small import SHORT, tiny_model, two_viewpoints

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "co3d_real"
METHODS = ["nearest", "ngp", "eft", "vldm", "sparsefusion"]


# --- flags ---

def test_a_sampler_is_its_models(tiny_weights):
    """Whatever preset the other numbers come from."""
    argv = ["--weights", str(tiny_weights), "--preset", "plain"]
    config = config_from_flags(distill.parser().parse_args(argv))
    assert config.sampler == PRESETS["nano"].sampler and config.blur == PRESETS["plain"].blur
    assert 0 < config.bootstrap < config.iterations
    config = config_from_flags(distill.parser().parse_args([*argv, "--set", "clip=7"]))
    assert config.sampler.clip == 7


@pytest.mark.parametrize("flags, iterations", [
    ((), 6720), (("--iterations", "900"), 900), (("--set", "iterations=1200"), 1200)])
def test_many_photographs_get_more_iterations_unless_their_number_is_asked_for(flags, iterations, capsys):
    """What a run is known by has the numbers that it is made with."""
    args = distill.parser().parse_args(["--preset", "plain", *flags])
    args.weights = None
    names = [f"{i}.png" for i in range(108)]
    source = types.SimpleNamespace(index=0, names=names, inputs=list(range(100)), settings=dict)

    def made_with(views):
        args.views = views
        return instance_from_flags(args, source, config_from_flags(args)).settings()["config"]["iterations"]

    # Who gets more is told.
    assert made_with(12) == (iterations if flags else 1000) and capsys.readouterr().out == ""
    assert made_with(0) == iterations
    assert capsys.readouterr().out == (
        "" if flags else "6720 iterations instead of 1000, for there are many input views (--iterations N decides)\n")


# --- the command ---

@pytest.fixture
def fast(monkeypatch):
    """Small numbers for the same command, which does not check cameras (`test_capture_run.py` does)."""
    monkeypatch.setattr(distill, "check_inputs", lambda *args: None)
    for name in ("nano", "plain"):
        monkeypatch.setitem(PRESETS, name, SHORT)


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    sparsefusion.save(tiny_model(), path)
    return path


def command(out, *flags):
    """`python distill.py ... --out out`: what `metrics.json` holds."""
    distill.main([str(x) for x in (*flags, "--device", "cpu", "--out", out)])
    return json.loads((out / "metrics.json").read_text())


def check_outputs(out, result, methods, size, frames):
    """All that is promised is there and can be opened."""
    promised = {"sequence", "input_frames", "target_frames", "seconds", "methods", "command", "settings", "versions"}
    assert promised <= set(result)
    assert set(result["methods"]) == set(methods)
    for row in result["methods"].values():
        assert {"psnr", "ssim", "perceptual"} <= set(row)
        assert row["psnr"] > 3 and -1 <= row["ssim"] <= 1 and row["perceptual"] >= 0 and 0 <= row.get("iou", 0) <= 1
    assert all(("iou" in row) == (method not in ("eft", "vldm")) for method, row in result["methods"].items())
    for method, row in result["per_view"].items():
        for metric, values in row.items():
            assert len(values) == len(result["target_frames"])
            assert sum(values) / len(values) == pytest.approx(result["methods"][method][metric], abs=1e-4)
    with Image.open(out / "comparison.png") as sheet:
        sheet.load()
        assert sheet.width == size * max(min(len(result["input_frames"]), WIDEST), 1 + len(methods))
    turning = ["index.html", "turntable.gif"] if frames else []
    if frames:
        with Image.open(out / "turntable.gif") as gif:
            assert gif.n_frames == frames and gif.size == (TURNTABLE, TURNTABLE)
    lines = (out / "mesh.ply").read_bytes().split(b"end_header\n")[0].decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert {f"property uchar {name}" for name in ("red", "green", "blue")} <= set(lines)
    state = torch.load(out / "field.pt", weights_only=True)
    assert {"field", "settings", "completed"} <= set(state)
    names = ["comparison.png", "field.pt", "mesh.glb", "mesh.ply", "metrics.json", "previews.png", "settings.json",
             "views"]
    assert sorted(p.name for p in out.iterdir()) == sorted(names + turning)
    shown = {f"{frame}_{method}.png" for frame in result["target_frames"] for method in ["truth", *methods]}
    assert {p.name for p in (out / "views").iterdir()} == shown


def test_the_shipped_sample(tmp_path, capsys, monkeypatch):
    """The main command, few iterations, two viewpoints and fewer pictures of the turntable: nothing else is changed."""
    monkeypatch.setattr(reconstruction, "query_viewpoints", two_viewpoints)
    out = tmp_path / "results"
    result = command(out, "--iterations", 4, "--targets", 1, "--set", "turntable_frames=3", "mesh_resolution=48")
    check_outputs(out, result, METHODS, 128, 3)
    settings = result["settings"]
    assert settings["seed"] == settings["entry"]["index"] == 0 and result["seconds"] > 0
    assert result["sequence"] == "toy_1000_00000" and result["input_frames"] == ["21", "6"]
    assert len(result["input_frames"]) == 2 and len(result["target_frames"]) == 1
    assert not set(result["input_frames"]) & set(result["target_frames"])
    row = result["methods"]
    # The prior has seen many other toys: after four iterations it knows better than the field, and than the nearest
    # picture.
    assert row["eft"]["psnr"] > row["nearest"]["psnr"] + 2 and row["vldm"]["perceptual"] < row["nearest"]["perceptual"]
    printed = capsys.readouterr().out
    assert "not LPIPS" in printed and str(out) in printed and all(label in printed for label in LABELS.values())


def test_the_eft_is_asked_where_its_view_sees_the_hull(fast, tiny_weights, tmp_path, monkeypatch):
    """Every target view has its own rays, and nothing is shown elsewhere."""
    asked, eft_images = [], baselines.eft_images

    def listen(*args):
        asked.append((*args, eft_images(*args)))
        return asked[-1][-1]

    monkeypatch.setattr(baselines, "eft_images", listen)
    command(tmp_path, "--weights", tiny_weights, "--targets", 3, "--views", 5, "--set", "occupancy_cells=64")
    (scene, inputs, targets, model, config, seed, hull, _, views), = asked
    ours = reconstruct(scene, inputs, model, config, seed, checkpoint=Checkpoint(tmp_path / "field.pt"))
    one_by_one = [ours.hull(scene.cameras[[i]], 32) for i in targets]
    assert torch.equal(hull, torch.cat(one_by_one)) and not torch.equal(hull[0], hull[1])
    assert torch.equal(views.images.sum(1) > 0, hull)


@pytest.mark.parametrize("flags, inputs, targets", [
    (["--views", 1], 1, 2), (["--views", 6], 6, 2), (["--views", 0], 24, 2),
    (["--input-frames", "5,3,24"], ["5", "3", "24"], 2),
    (["--set", "metrics_on_inputs=true", "--targets", 24], 2, 24)])
def test_any_number_of_views(flags, inputs, targets, fast, tiny_weights, tmp_path):
    result = command(tmp_path, "--weights", tiny_weights, "--targets", 2, *flags)
    check_outputs(tmp_path, result, METHODS, 32, 0)
    assert result["input_frames"] == inputs if isinstance(inputs, list) else len(result["input_frames"]) == inputs
    assert len(result["target_frames"]) == targets
    shared = set(result["input_frames"]) & set(result["target_frames"])
    assert bool(shared) == (inputs == 24 or targets == 24)


def test_released_is_a_printed_list_of_settings(fast, tiny_weights, tmp_path, capsys):
    flags = ["--weights", tiny_weights, "--targets", 1]
    settings = ["sampler.ancestral=false", "denoise_steps=2", "sample_steps=3"]
    result = command(tmp_path, *flags, "--released", "--set", *settings)
    printed = capsys.readouterr().out
    assert all(setting in printed for setting in presets.RELEASED)
    config = result["settings"]["config"]
    assert config["field"]["hashed"] is False and config["eft_train_mode"] and config["metrics_on_inputs"]
    assert config["sampler"]["unnoised_start"] and not config["sampler"]["ancestral"]  # the last word is --set's


def test_the_whole_config_is_recorded(fast, tiny_weights, tmp_path):
    flags = ["--weights", tiny_weights, "--targets", 1]
    result = command(tmp_path, *flags, "--set", "levels=2", "weight_opacity=0.5", "denoise_steps=3")
    config = result["settings"]["config"]
    assert config["field"]["levels"] == 2 and config["weight_opacity"] == 0.5
    assert config["sampler"]["denoise_steps"] == 3
    assert config["lr_grid"] == SHORT.lr_grid and config["betas"] == [0.9, 0.99]
    state = torch.load(tmp_path / "field.pt", weights_only=True)
    assert state["settings"]["config"]["field"]["levels"] == 2


def test_metrics_of_input_views_are_json(fast, tiny_weights, tmp_path):
    """Where a target is an input view, the nearest picture is the target itself: no error at all, but a number that
    JSON has.
    """
    command(tmp_path, "--weights", tiny_weights, "--targets", 2, "--views", 0)
    text = (tmp_path / "metrics.json").read_text()
    methods = json.loads(text, parse_constant=lambda name: pytest.fail(f"metrics.json: {name} is not JSON"))["methods"]
    assert methods["nearest"]["psnr"] >= 60 and methods["nearest"]["ssim"] == 1


def test_no_prior_on_the_sample(fast, tmp_path):
    result = command(tmp_path, "--no-prior", "--views", 3, "--weights", tmp_path / "not_needed.pt")
    check_outputs(tmp_path, result, ["nearest", "ngp"], 32, 0)


def test_no_prior_on_real_photographs(monkeypatch, tmp_path):
    if not REAL.is_dir():
        pytest.skip(f"the real sequence is not in {REAL}")
    field = replace(PRESETS["plain"].field, levels=4, finest_resolution=64, log2_hashmap_size=14, samples_per_ray=32)
    short = replace(PRESETS["plain"], iterations=12, picture_side=1, image_size=128, bootstrap=0, turntable_frames=0,
                    mesh_resolution=48, field=field)
    monkeypatch.setitem(PRESETS, "plain", short)
    result = command(tmp_path, "--root", REAL, "--category", "apple", "--views", 12, "--no-prior")
    check_outputs(tmp_path, result, ["nearest", "ngp"], 128, 0)
    assert len(result["input_frames"]) == 12 and len(result["target_frames"]) == 2
    assert result["methods"]["ngp"]["psnr"] > 12


def test_a_rerun_goes_on(fast, tiny_weights, tmp_path, capsys):
    """The same command again finds its field; with other settings it refuses to replace it, unless it is told to."""
    flags = ["--weights", tiny_weights, "--targets", 1]
    first = command(tmp_path, *flags)
    assert "resumed" not in capsys.readouterr().out
    assert command(tmp_path, *flags) == first  # at once
    assert "has the results of these settings already" in capsys.readouterr().out
    (tmp_path / "metrics.json").unlink()
    again = command(tmp_path, *flags)
    assert "resumed at iteration 6" in capsys.readouterr().out and again["methods"] == first["methods"]
    before = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(SystemExit):
        command(tmp_path, *flags, "--seed", 1)
    assert "seed differ" in capsys.readouterr().err and (tmp_path / "metrics.json").read_bytes() == before
    other = command(tmp_path, *flags, "--seed", 1, "--overwrite")
    assert "resumed" not in capsys.readouterr().out and other["settings"]["seed"] == 1


def test_another_sampler_does_not_go_on(fast, tiny_weights, tmp_path, capsys):
    flags = ["--weights", tiny_weights, "--targets", 1]
    command(tmp_path, *flags)
    for setting in ("sampler.ancestral", "unnoised_start", "eft_train_mode"):
        capsys.readouterr()
        argv = [*flags, "--device", "cpu", "--out", tmp_path, "--set", f"{setting}=true"]
        one_line(capsys, distill.main, argv, f"{setting} is false there, true here")
    command(tmp_path, *flags, "--overwrite", "--set", f"{setting}=true")
    assert "resumed" not in capsys.readouterr().out


def test_without_out_nothing_is_replaced(fast, tmp_path, monkeypatch, capsys):
    """Other settings go to a new folder; more iterations go on in theirs, and say so."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        capsys.readouterr()
        distill.main(["--no-prior", "--targets", "1", "--device", "cpu", *flags])
        return capsys.readouterr().out

    folder = Path("output") / "toy_1000_00000"
    second = folder.with_name("toy_1000_00000_2")
    run()
    before = (folder / "metrics.json").read_bytes()
    assert f"go to {second}" in run("--seed", "1") and (folder / "metrics.json").read_bytes() == before
    assert f"go to {second}" in run("--seed", "1") and f"{second} has the results" in run("--seed", "1")
    printed = run("--iterations", "8")
    assert "resumed at iteration 6" in printed and f"results in {folder}\n" in printed
    assert json.loads((folder / "metrics.json").read_text())["resumed_from"] == [6]
    assert {path.name for path in Path("output").iterdir()} == {folder.name, second.name}


# --- which prior ---

def test_toys_have_a_prior_of_their_own(tmp_path):
    """Of a list with anything else in it, all have the same."""
    toys, apples = (protocol.CO3DSequence(tmp_path, category, "a", 0, (1, 2)) for category in ("toys", "apple"))
    own = capture.Photographs(tmp_path, [], None, torch.zeros(0, 3))
    for sources, expected in (([toys, toys], sparsefusion.SHIPPED), ([toys, apples], sparsefusion.THINGS),
                              ([own], sparsefusion.THINGS)):
        args = distill.parser().parse_args([])
        choose_weights(args, sources)
        assert args.weights == expected
    given = distill.parser().parse_args(["--weights", "mine.pt"])
    choose_weights(given, [toys])
    assert given.weights == Path("mine.pt")


# --- what one line says ---

def test_data_that_a_prior_has_never_seen_are_named(tmp_path, capsys):
    sparsefusion.save(tiny_model(), tmp_path / "hydrant.pt", trained_on=[
        {"what": "vae", "category": "apple"}, {"what": "prior", "category": "hydrant"}])
    note_new_categories(tmp_path / "hydrant.pt", ["apple", "hydrant", "apple"])
    line, = capsys.readouterr().out.splitlines()
    assert "hydrant.pt was trained on hydrant; apple: new to it" in line
    note_new_categories(tmp_path / "hydrant.pt", ["hydrant"])
    note_new_categories(sparsefusion.SHIPPED, ["toys"])
    assert capsys.readouterr().out == ""
    note_new_categories(sparsefusion.SHIPPED, ["apple"])
    assert "nano.pt was trained on toys; apple: new to it" in capsys.readouterr().out


def test_to_the_prior_of_things_nothing_is_new(capsys):
    note_new_categories(sparsefusion.THINGS, ["apple", "toys"])
    assert capsys.readouterr().out == ""


# --- bad input ---

def refused(capsys, tmp_path, flags, *words):
    """The command ends with exit code 2 and one line that has all the words; it has written nothing."""
    out = tmp_path / "refused"
    capsys.readouterr()
    one_line(capsys, distill.main, [*flags, "--out", out], *words)
    assert not out.exists()


@pytest.mark.parametrize("flags, words", [
    (["--root", "nowhere"], ["nowhere"]),
    (["--category", "cats"], ["cats"]),
    (["--sequence", "toy_0"], ["toy_0", "toy_1000_00000", "--protocol all"]),
    (["--protocol", "some"], ["--protocol", "some"]),
    (["--input-frames", "3, 5,3"], ["--input-frames", "3", "twice"]),
    (["--views", "25"], ["--views 25", "24 frames"]),
    (["--views", "-1"], ["--views", "-1"]),
    (["--views", "two"], ["--views", "two"]),
    (["--input-frames", "3,99"], ["--input-frames", "99"]),
    (["--input-frames", ""], ["--input-frames"]),
    (["--iterations", "0"], ["--iterations", "0"]),
    (["--iterations", "-5"], ["--iterations"]),
    (["--targets", "-1"], ["--targets"]),
    (["--seed", "x"], ["--seed", "x"]),
    (["--seed", "99999999999999999999"], ["--seed", "2147483647"]),
    (["--device", "tpu"], ["--device", "tpu", "cpu"]),
    (["--preset", "huge"], ["--preset", "huge", "paper"]),
    (["--frames", "3"], ["--frames"]),
    (["--feature-net", "nowhere.pt"], ["nowhere.pt", "no such"]),
    (["--lpips", "vgg.pth", "linear.pth"], ["vgg.pth"]),
    (["--set", "levels"], ["--set levels", "NAME=VALUE"]),
    (["--set", "level=8"], ["--set level", "field.levels"]),
    (["--set", "levels=x"], ["field.levels=x", "whole number"]),
    (["--set", "hashed=maybe"], ["field.hashed", "true or false"]),
    (["--set", "bootstrap=501"], ["bootstrap 501", "300 iterations"]),
    (["--set", "render_size=60"], ["60", "32"]),
    (["--set", "image_size=x"], ["image_size"]),
    (["--set", "harmonics=3"], ["harmonics", "architecture"]),
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
    refused(capsys, tmp_path, ["--feature-net", text, "--no-prior"], text)


def test_weights_of_another_kind(tmp_path, capsys):
    """The prior where the perceptual network should be, and the other way round."""
    refused(capsys, tmp_path, ["--feature-net", sparsefusion.SHIPPED, "--no-prior"], sparsefusion.SHIPPED)
    refused(capsys, tmp_path, ["--weights", SHIPPED_FEATURE_NET], SHIPPED_FEATURE_NET)


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


def test_only_lattices_must_divide_a_picture(tmp_path):
    """A prior's renderings lie on lattices; random pixels of the inputs do not."""
    command = ["--root", str(SAMPLE), "--no-prior", "--iterations", "2", "--targets", "1", "--out",
               str(tmp_path / "a"), "--set", "mesh_resolution=8", "turntable_frames=0", "image_size=40",
               "render_size=32"]
    distill.main([*command, "input_pixels=50"])
    assert (tmp_path / "a" / "metrics.json").exists()
    with pytest.raises(SystemExit):
        distill.main([*command, "input_pixels=0", "--overwrite"])
