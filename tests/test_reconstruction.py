"""Runs that stop and go on: interrupted at any moment, extended, with a strip of previews; states that are none."""
import copy
import json
import math
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image

import distill
import distillation
import reconstruction
import sparsefusion
from common import files, processes
from distillation import Distillation
from export import mesh
from export.pictures import PREVIEWS, add_preview, to_image
from presets import PRESETS
from reconstruction import Checkpoint, reconstruct
from tests.support.fields import Analytic
from tests.support.small import SHORT, ball, tiny_model


@pytest.fixture
def heard():
    """Signals are heard in this test, whatever the tests' parent process ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tensors(file):
    """What decides a field and how it goes on, in a checkpoint."""
    state = torch.load(file, weights_only=True)
    return {name: state[name] for name in ("field", "occupancy", "exposures", "optimizer", "completed")}


def equal(a, b):
    """Whether nested dictionaries and lists hold the same numbers, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def interrupt(monkeypatch, owner, name, call, number=signal.SIGINT):
    """A signal in the middle of the call of a function with that number, counted from 0."""
    function, calls = getattr(owner, name), []

    def interrupted(*args, **options):
        result = function(*args, **options)
        calls.append(name)
        if len(calls) == call + 1:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(owner, name, interrupted)


# --- interrupted ---

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The checkpoint of a run that nothing interrupted."""
    file = tmp_path_factory.mktemp("straight") / "field.pt"
    reconstruct(ball(3, 32), [0, 1], tiny_model(), SHORT, checkpoint=Checkpoint(file))
    return tensors(file)


@pytest.mark.parametrize("owner, name, call, completed", [
    (sparsefusion.eft.EFT, "image", 0, None),     # of query viewpoints
    (Distillation, "input_loss", 0, 1),           # within the first iteration
    (Distillation, "bootstrap_loss", 0, 1),
    (Distillation, "input_loss", 2, 3),           # the last one of the bootstrap
    (sparsefusion.SparseFusion, "denoise", 0, 4),
    (Distillation, "distillation_loss", 1, 5),
    (Distillation, "step", 4, 5),                 # between two iterations
    (Distillation, "distillation_loss", 2, 6),    # the last iteration
    (Distillation, "state_dict", 0, 6),           # in the middle of saving
    (Distillation, "load_state_dict", 0, 6),      # a finished one, read again
])
def test_an_interrupted_run_goes_on_without_a_trace(owner, name, call, completed, straight, tmp_path, monkeypatch,
                                                    heard):
    def run():
        reconstruct(ball(3, 32), [0, 1], tiny_model(), SHORT, checkpoint=Checkpoint(tmp_path / "field.pt"))

    if name == "load_state_dict":
        run()
    with monkeypatch.context() as m, pytest.raises(processes.Interrupted), processes.stoppable():
        interrupt(m, owner, name, call)
        run()
    if completed is None:
        assert not (tmp_path / "field.pt").exists()
    else:
        assert tensors(tmp_path / "field.pt")["completed"] == completed
    run()
    assert equal(tensors(tmp_path / "field.pt"), straight)


def test_many_interruptions_leave_no_trace(straight, tmp_path, monkeypatch, heard):
    for completed in range(1, 7):
        with monkeypatch.context() as m, pytest.raises(processes.Interrupted), processes.stoppable():
            interrupt(m, Distillation, "input_loss", 0)
            reconstruct(ball(3, 32), [0, 1], tiny_model(), SHORT, checkpoint=Checkpoint(tmp_path / "field.pt"))
        assert tensors(tmp_path / "field.pt")["completed"] == completed
    assert equal(tensors(tmp_path / "field.pt"), straight)


def test_a_broken_field_is_not_saved(tmp_path, monkeypatch, heard):
    with monkeypatch.context() as m, pytest.raises(FloatingPointError), processes.stoppable():
        m.setattr(distillation, "opacity_loss", lambda silhouette: silhouette.mean() * float("nan"))
        interrupt(m, Distillation, "step", 1)
        reconstruct(ball(3, 32), [0, 1], config=replace(SHORT, occupancy_every=100),
                            checkpoint=Checkpoint(tmp_path / "field.pt"))
    assert not (tmp_path / "field.pt").exists()


def test_the_command_ends_in_one_line_and_goes_on(tmp_path, monkeypatch, capsys, heard):
    """The main command, stopped three times on its way: exit code 130 or 143, and the same numbers as without."""
    monkeypatch.setitem(PRESETS, "nano", SHORT)
    monkeypatch.setattr(mesh, "largest_component", mesh.largest_component)
    monkeypatch.setattr(reconstruction, "largest_component", lambda surface: mesh.largest_component(surface))
    sparsefusion.save(tiny_model(), tmp_path / "tiny.pt")

    def command(out):
        argv = ["--weights", tmp_path / "tiny.pt", "--targets", 1, "--device", "cpu", "--out", out]
        distill.main([str(x) for x in argv])

    stops = [(Distillation, "step", 3, signal.SIGINT, "field.pt has 4 of 6 iterations"),          # the method
             (Distillation, "step", 4, signal.SIGTERM, "field_alone.pt has 3 of 6 iterations"),  # the field alone
             (mesh, "largest_component", 0, signal.SIGINT, "")]
    for owner, name, call, number, saved in stops:
        with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
            interrupt(m, owner, name, call, number)
            command(tmp_path / "stopped")
        assert e.value.code == 128 + number
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "the same command resumes" in lines[0] and saved in lines[0]
        assert not (tmp_path / "stopped" / "metrics.json").exists()

    # Once more, and beside it without a stop.
    for folder in ("stopped", "straight"):
        command(tmp_path / folder)
    assert equal(tensors(tmp_path / "stopped" / "field.pt"), tensors(tmp_path / "straight" / "field.pt"))
    results = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("stopped", "straight")]
    assert results[0]["per_view"] == results[1]["per_view"]
    names = {folder: sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("stopped", "straight")}
    assert names["stopped"] == names["straight"]


# --- longer ---

def test_more_iterations_go_on(tmp_path, capsys):
    """From the field and the optimizer of the shorter run; from there on as the longer one would."""
    file, longer = tmp_path / "field.pt", replace(SHORT, iterations=9, bootstrap=4)
    short = reconstruct(ball(3, 32), [0, 1], tiny_model(), SHORT, checkpoint=Checkpoint(file))
    with pytest.raises(ValueError, match="config differ: config.iterations is 6 there, 9 here"):
        reconstruct(ball(3, 32), [0, 1], tiny_model(), longer, checkpoint=Checkpoint(file))
    capsys.readouterr()
    result = reconstruct(ball(3, 32), [0, 1], tiny_model(), longer, checkpoint=Checkpoint(file, extend=True))
    assert not result.field.training  # so a GPU rounds nothing of what it shows
    printed = capsys.readouterr().out
    assert "resumed at iteration 6" in printed and "of a run of 6" in printed
    assert result.resumed_from == [6] and short.resumed_from == []
    state = torch.load(file, weights_only=True)
    assert state["completed"] == 9 and state["resumed_from"] == [6]
    again = reconstruct(ball(3, 32), [0, 1], tiny_model(), longer, checkpoint=Checkpoint(file))
    assert again.resumed_from == [6]

    # Fewer iterations, or another seed, are no longer run of the same.
    for config, seed in ((SHORT, 0), (replace(longer, iterations=12), 1)):
        with pytest.raises(ValueError, match="differ"):
            reconstruct(ball(3, 32), [0, 1], tiny_model(), config, seed, checkpoint=Checkpoint(file, extend=True))


def test_an_interrupted_extension_leaves_no_trace(tmp_path, monkeypatch, heard):
    short = replace(SHORT, denoise_batch=4)
    longer = replace(short, iterations=10)

    def run(file, config=longer):
        reconstruct(ball(3, 32), [0, 1], tiny_model(), config, checkpoint=Checkpoint(tmp_path / file, extend=True))

    for file in ("stopped.pt", "straight.pt"):
        run(file, short)
    for _ in range(2):
        with monkeypatch.context() as m, pytest.raises(processes.Interrupted), processes.stoppable():
            interrupt(m, Distillation, "input_loss", 1)
            run("stopped.pt")
    for file in ("stopped.pt", "straight.pt"):
        run(file)
    assert equal(tensors(tmp_path / "stopped.pt"), tensors(tmp_path / "straight.pt"))


# --- previews, and states that are none ---

def test_a_strip_of_previews(tmp_path, monkeypatch):
    """One picture more whenever the state is saved, of a view that was not given; only the last ones are kept."""
    strip, side = tmp_path / "previews.png", reconstruction.PREVIEW
    monkeypatch.setattr(distillation, "SAVE_SECONDS", -1)  # in every iteration, and at the end
    reconstruct(ball(3, 32), [0, 1], config=SHORT, checkpoint=Checkpoint(tmp_path / "field.pt", previews=strip))
    with Image.open(strip) as picture:
        assert picture.size == ((SHORT.iterations + 1) * side, side)
    newest = torch.rand(3, side, side)
    for count in range(PREVIEWS):
        add_preview(strip, newest if count == PREVIEWS - 1 else torch.zeros(3, side, side))
    with Image.open(strip) as picture:
        assert picture.size == (PREVIEWS * side, side)
        last = picture.crop((picture.width - side, 0, picture.width, side))
    assert last.tobytes() == to_image(newest).tobytes()

    # A broken one begins anew.
    strip.write_bytes(b"no picture")
    add_preview(strip, newest)
    with Image.open(strip) as picture:
        assert picture.size == (side, side)


@pytest.mark.parametrize("missing", ["occupancy", "optimizer", "completed", "exposures"])
def test_a_state_without_a_part(missing, tmp_path):
    file = tmp_path / "field.pt"
    reconstruct(ball(3, 32), [0, 1], config=SHORT, checkpoint=Checkpoint(file))
    state = torch.load(file, weights_only=True)
    del state[missing]
    files.save_tensors(state, file)
    with pytest.raises(ValueError, match="field.pt: not a whole state of a field"):
        reconstruct(ball(3, 32), [0, 1], config=SHORT, checkpoint=Checkpoint(file))


@pytest.mark.parametrize("path, value", [
    (("completed",), -1), (("completed",), 7), (("completed",), 2**70), (("completed",), "6"), (("completed",), True),
    (("seconds",), None), (("seconds",), "long"), (("resumed_from",), 3), (("field", "encoding.table"), torch.zeros(3)),
    (("field", "encoding.table"), math.nan), (("exposures", "log_gains"), math.inf),
    (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)), (("optimizer", "state", 0, "exp_avg"), math.nan),
    (("optimizer", "state", 0, "exp_avg_sq"), None), (("targets",), None), (("targets",), {4: torch.zeros(1, 3, 8, 8)}),
])
def test_a_state_that_was_edited(path, value, tmp_path, half_done):
    """Refused in one line; a number stands for a tensor with it."""
    state = copy.deepcopy(half_done)
    part = state
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = part[path[-1]] + value if isinstance(value, float) else value
    files.save_tensors(state, tmp_path / "field.pt")
    with pytest.raises(ValueError, match="field.pt: not a whole state of a field"):
        reconstruct(ball(3, 32), [0, 1], tiny_model(), SHORT, checkpoint=Checkpoint(tmp_path / "field.pt"))


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """The state of a run that was interrupted after four iterations."""
    file = tmp_path_factory.mktemp("half") / "field.pt"
    with pytest.MonkeyPatch.context() as m, pytest.raises(processes.Interrupted), processes.stoppable():
        interrupt(m, Distillation, "distillation_loss", 0, signal.SIGTERM)
        reconstruct(ball(3, 32), [0, 1], tiny_model(), SHORT, checkpoint=Checkpoint(file))
    return torch.load(file, weights_only=True)


def test_a_visual_hull_is_seen_wherever_the_object_is():
    """From cameras of the world, in their own axes: every pixel of every mask, and not much else. The object is not
    where all axes meet.
    """
    scene = ball(5, 32)
    shift = torch.tensor([0.4, -0.3, 0.4]) @ scene.cameras.R
    scene = replace(scene, cameras=replace(scene.cameras, T=scene.cameras.T - shift))
    config = replace(SHORT, iterations=1, bootstrap=0, field=replace(SHORT.field, occupancy_cells=64))
    ours = reconstruct(scene, [1, 2, 4], config=config)
    assert not torch.allclose(ours.frame.R, torch.eye(3), atol=0.1)
    hull = ours.hull(scene.cameras, 32)
    seen = scene.masks[:, 0] > 0.5
    assert hull.shape == (5, 32, 32) and not (seen & ~hull).any() and hull.sum() < 2 * seen.sum()


@pytest.mark.parametrize("scale", [2.0**-7, 2.0**7])
@pytest.mark.parametrize("with_model", [False, True])
def test_a_scene_in_any_unit_is_the_same_scene(scale, with_model):
    """By a power of two nothing is rounded: its pictures are the same, and its mesh is as large as the scene is. With
    released weights units count.
    """
    model = None
    if with_model:
        model = tiny_model()
        model.trained_distance = 9.8
    scene = ball(3, 32)
    small = scene.with_cameras(lambda cameras: cameras.scaled(scale))
    first = reconstruct(scene, [0, 1], model, SHORT)
    second = reconstruct(small, [0, 1], model, SHORT)
    shown = first.render(scene.cameras, 32).images, second.render(small.cameras, 32).images
    assert torch.equal(*shown) and shown[0].max() > 0.1
    assert torch.equal(second.mesh().vertices, scale * first.mesh().vertices)

    # Released weights were trained in CO3D's own unit.
    if with_model:
        model.trained_distance = None
        assert reconstruct(scene, [0, 1], model, SHORT).unit == 1


def test_an_orbit_shows_the_whole_box():
    """It reaches as far as it may in the picture that shows the most of it."""
    scene = ball(3, 32)
    result = reconstruct(scene, [0, 1], config=SHORT)
    opaque = Analytic(lambda x: x.new_full(x.shape[:-1], 50.0), torch.ones_like)
    result = result._replace(field=opaque)
    for factor in (1.0, 3.0):
        cameras = replace(scene.cameras, focal=factor * scene.cameras.focal)
        orbit = result._replace(cameras=cameras).orbit()
        seen = result.render(orbit.cameras(8, orbit.rows()), 64).images.mean(1) > 0.5
        rows, columns = seen.any(0).any(1).nonzero(), seen.any(0).any(0).nonzero()
        reach = max(63 - min(rows[0], columns[0]), rows[-1], columns[-1]).item()
        assert seen.any((1, 2)).all() and 0.85 < (reach - 31.5) / 32 < 0.95
