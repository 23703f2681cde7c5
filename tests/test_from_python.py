"""A scene from start to end, from Python."""
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import metrics
import reconstruction
from cameras import Cameras, look_at, relative_to
from export.pictures import Views
from presets import PRESETS
from reconstruction import Checkpoint, reconstruct
from tests.support import parity
from tests.support.helpers import same
from tests.support.small import FIELD, SHORT, ball, tiny_model, two_viewpoints

ROOT = Path(__file__).resolve().parent.parent
FIT = replace(SHORT, iterations=300, occupancy_every=16, lr_grid=3e-2, lr_mlp=1e-2, field=FIELD)


def test_what_is_reconstructed_is_seen_in_the_world():
    """A ball whose world is turned and whose first input is any view: unseen cameras of that world see it where it
    is.
    """
    scene = ball(12, 32)
    axes = look_at(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), torch.tensor([0.3, 1.0, 0.0]))[0]
    turned = Cameras(axes, torch.zeros(3), scene.cameras.focal[0], scene.cameras.principal[0])
    scene = replace(scene, cameras=relative_to(scene.cameras, turned.unsqueeze(0), move_origin=False))
    result = reconstruct(scene, [4, 0, 2, 6, 8, 10], config=FIT)
    views = result.render(scene.cameras[[1, 5]], 32)
    assert metrics.psnr(views.images, scene.images[[1, 5]]).mean() > 24
    assert metrics.iou(views.silhouettes, scene.masks[[1, 5]]).mean() > 0.95
    assert result.seconds > 0

    # The mesh is in the same world: its projections fill the masks, its colors are the pictures'.
    mesh = result.mesh()
    xy, depth = scene.cameras[1].project(mesh.vertices)
    nearest = torch.nn.functional.grid_sample(scene.masks[[1]], -xy[None, None], align_corners=False)
    assert (nearest[0, 0, 0] > 0.5).float().mean() > 0.9 and (depth > 0).all()
    radius = mesh.vertices.norm(dim=-1)
    assert 0.7 < radius.median() < 1.0


def test_the_object_frame_is_the_scenes_first():
    scene = ball(6, 32)
    result = reconstruct(scene, [3, 1], config=SHORT)
    assert torch.equal(result.frame.R, scene.cameras.R[0])
    inside = result.turned(scene.cameras)
    parity.assert_close(inside.R[0], torch.eye(3), atol=1e-6)
    parity.assert_close(result.unit * inside.centers().norm(dim=-1), scene.cameras.centers().norm(dim=-1), rtol=1e-6)


def test_a_checkpoint_is_for_one_set_of_settings(tmp_path, capsys):
    scene, file = ball(4, 32), tmp_path / "field.pt"
    first = reconstruct(scene, [0, 2], config=SHORT, checkpoint=Checkpoint(file))
    again = reconstruct(scene, [0, 2], config=SHORT, checkpoint=Checkpoint(file))
    assert "resumed at iteration 6" in capsys.readouterr().out and same(first.field, again.field)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="seed differ"):
        reconstruct(scene, [0, 2], config=SHORT, seed=1, checkpoint=Checkpoint(file))
    assert file.read_bytes() == before
    # What changes nothing in the field.
    shown = replace(SHORT, mesh_resolution=8, turntable_frames=3, metrics_on_inputs=True)
    reconstruct(scene, [0, 2], config=shown, checkpoint=Checkpoint(file))
    assert "resumed at iteration 6" in capsys.readouterr().out


def test_a_checkpoint_is_for_the_same_pictures_and_the_same_loss(tmp_path, capsys):
    scene, file = ball(4, 32), tmp_path / "field.pt"
    reconstruct(scene, [0, 2], config=SHORT, checkpoint=Checkpoint(file))
    darker = replace(scene, images=scene.images * 0.5)
    longer = replace(scene, cameras=replace(scene.cameras, focal=scene.cameras.focal * 1.1))
    for other in (darker, longer):
        with pytest.raises(ValueError, match="given differ"):
            reconstruct(other, [0, 2], config=SHORT, checkpoint=Checkpoint(file))
    for loss in (torch.nn.PairwiseDistance(), torch.nn.L1Loss(), metrics.psnr):
        with pytest.raises(ValueError, match="perceptual_loss differ"):
            reconstruct(scene, [0, 2], config=SHORT, checkpoint=Checkpoint(file), perceptual_loss=loss)
    with pytest.raises(ValueError, match="a module or a named function"):
        reconstruct(scene, [0, 2], config=SHORT, checkpoint=Checkpoint(file), perceptual_loss=lambda a, b: a - b)
    losses = (torch.nn.PairwiseDistance(), torch.nn.L1Loss(), metrics.psnr)
    assert len({reconstruction._identity(loss) for loss in losses}) == 3
    other = scene.images * torch.tensor([1, 0.1, 1, 0.1])[:, None, None, None]  # as far as it is given the same
    reconstruct(replace(scene, images=other), [0, 2], config=SHORT, checkpoint=Checkpoint(file))
    assert "resumed at iteration 6" in capsys.readouterr().out


def test_a_checkpoint_is_for_one_model(tmp_path, capsys):
    """Also of models that no file knows; and a finished field asks no EFT any more."""
    scene, file = ball(4, 32), tmp_path / "field.pt"
    reconstruct(scene, [0, 2], tiny_model(), SHORT, checkpoint=Checkpoint(file))
    with pytest.raises(ValueError, match="weights differ"):
        reconstruct(scene, [0, 2], tiny_model(seed=1), SHORT, checkpoint=Checkpoint(file))
    again = tiny_model()
    again.condition = None
    reconstruct(scene, [0, 2], again, SHORT, checkpoint=Checkpoint(file))
    assert "resumed at iteration 6" in capsys.readouterr().out


def test_presets_by_the_models_name(monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", replace(SHORT, iterations=1, bootstrap=0))
    monkeypatch.setitem(PRESETS, "plain", replace(SHORT, iterations=2, bootstrap=0))
    scene = ball(3, 32)
    assert reconstruct(scene, [0], tiny_model()).config.iterations == 1
    assert reconstruct(scene, [0]).config.iterations == 2


def test_an_orbit_has_the_object_in_the_middle(monkeypatch):
    """However far beside it the crops' optical axes pass, and whatever the object frame."""
    eyes = torch.tensor([[0.0, 1.0, -9.0], [9.0, 1.0, 0.0], [0.0, 1.0, 9.0]])
    R, T = look_at(eyes, torch.zeros(3, 3), torch.tensor([[0.0, 1.0, 0.0]] * 3))
    cameras = Cameras(R, T, torch.full((3, 2), 2.0), torch.full((3, 2), 0.3))
    scene = replace(ball(3, 32), cameras=cameras, masks=torch.ones(3, 1, 32, 32))
    result = reconstruct(scene, [1], config=replace(SHORT, iterations=1, bootstrap=0))
    result.occupancy.box.copy_(torch.tensor([[0.5, 1.0, 0.0], [1.5, 2.0, 1.0]]))
    seen = []
    monkeypatch.setattr(reconstruction.Reconstruction, "render", lambda self, path, size, *rest, **how: (
        seen.append(path), Views(torch.zeros(len(path), 3, size, size), torch.ones(len(path), 1, size, size)))[1])
    orbit = result.orbit()
    middle = result.unit * torch.tensor([1.0, 1.5, 0.5]) @ cameras.R[0].T
    path = orbit.cameras(5, orbit.rows())
    xy, depth = path.project(middle.double().expand(15, 1, 3))
    assert len(seen) == 1 and xy.abs().max() < 1e-5 and (depth > 0).all()
    assert orbit.local(path.centers()).norm(dim=-1).sub(1).abs().max() < 1e-9  # one distance, the unit


def test_the_lines_of_the_readme(monkeypatch, tmp_path):
    """"From Python" in the README, line by line, with fewer iterations and viewpoints."""
    section = (ROOT / "README.md").read_text().split("### From Python")[1]
    lines = re.search(r"```python\n(.*?)```", section, re.S).group(1)
    assert 5 <= len(lines.splitlines()) <= 12
    short = replace(PRESETS["nano"], iterations=4, bootstrap=2, mesh_resolution=48)
    monkeypatch.setitem(PRESETS, "nano", short)
    monkeypatch.setattr(reconstruction, "query_viewpoints", two_viewpoints)
    (tmp_path / "sample").symlink_to(ROOT / "sample")
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "README.md", "exec"), {})
    written = [p for p in tmp_path.rglob("*") if p.is_file() and "sample" not in p.parts]
    assert {p.suffix for p in written} == {".png", ".ply"}


def test_a_resumed_run_has_all_losses(tmp_path):
    """Those of the shorter run that it goes on from, and its own; -1 where a loss was not used."""
    scene, file = ball(4, 32), tmp_path / "field.pt"
    seen = []
    for iterations in (6, 9):
        checkpoint = Checkpoint(file, extend=True)
        reconstruct(scene, [0, 2], tiny_model(), replace(SHORT, iterations=iterations), checkpoint=checkpoint)
        seen.append(torch.load(file, weights_only=True)["losses"])
    for name, used in (("input_loss", range(9)), ("bootstrap_loss", range(3)), ("distillation_loss", range(3, 9))):
        first, second = (losses[name] for losses in seen)
        assert torch.equal(first, second[:6]) and len(second) == 9
        assert (second > 0).nonzero().squeeze(-1).tolist() == list(used) and (second[second <= 0] == -1).all()
