"""A finished field, opened again: the same pictures and mesh; what `render.py` writes; bad input."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import render
from cameras import Cameras, look_at, pixel_grid
from common import files
from photographs.reading import read_capture, read_path
from reconstruction import Checkpoint, Reconstruction, reconstruct
from tests.support import parity
from tests.support.captures import balls, cameras_of, turn, write_transforms
from tests.support.helpers import one_line
from tests.support.small import FIELD, SHORT

CONFIG = replace(SHORT, iterations=40, bootstrap=0, lr_grid=3e-2, occupancy_every=8, picture_side=2,
                 field=replace(FIELD, bound=4.0, view_degree=2))


@pytest.fixture(scope="module")
def capture(tmp_path_factory):
    """A folder with photographs in a world of its own, and a finished field beside them: the folder, what it is."""
    folder = tmp_path_factory.mktemp("capture")
    shoot = balls(6, 96, 64, (120.0, 120.0)).in_world(turn(0.4, -2.0, 0.9), 13.0, torch.tensor([50.0, -20, 7]).double())
    write_transforms(folder, shoot)
    scene = read_capture(folder).load(64)
    return folder, reconstruct(scene, [0, 2, 4, 5], config=CONFIG, checkpoint=Checkpoint(folder / "field.pt"))


def pictures(folder, kind):
    """The pictures (T, 3, S, S) in [0, 1] of a kind."""
    found = []
    for file in sorted(folder.glob(f"{kind}_*.png")):
        with Image.open(file) as picture:
            pixels = torch.tensor(np.array(picture))
            found.append(pixels.permute(2, 0, 1) / 255)
    return torch.stack(found)


def test_a_finished_field_opens(capture):
    folder, made = capture
    opened = Reconstruction.load(folder)
    cameras = made.cameras[:2]
    for a, b in zip(made.render(cameras, 24), opened.render(cameras, 24)):
        assert torch.equal(a, b)
    views = made.render(cameras, 24)
    depth = (views.depths.sum((1, 2, 3)) / views.silhouettes.sum((1, 2, 3))).double()
    distance = (cameras.centers() - made.world.shift).norm(dim=-1)
    parity.assert_close(depth, distance, rtol=0.1)  # as far away as the object's middle
    for a, b in zip(made.mesh(), opened.mesh()):
        assert torch.equal(a, b)
    assert opened.config == made.config and opened.unit == made.unit and opened.seconds == made.seconds
    parity.assert_close(opened.cameras.T, made.cameras.T)


def test_the_mesh_is_in_the_world_of_the_cameras(capture):
    """Its normals, too: they face the cameras whose rays meet them, and a small step along them leaves the balls."""
    folder, made = capture
    mesh = made.mesh()
    parity.assert_close(mesh.normals.norm(dim=-1), torch.ones(len(mesh.normals)), atol=1e-5)
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    face = torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1)
    agree = (face[:, None] * mesh.normals[mesh.faces]).sum(-1)
    assert agree.median() > 0.9 and agree.mean() > 0.8

    # Photographs are upright where their vertical axes are: at right angles to the cameras' horizontal ones.
    assert mesh.up.norm() == pytest.approx(1, abs=1e-5)
    assert (made.cameras.R[:, :, 1].float() @ mesh.up).mean() > 0.5


def test_all_round_in_every_kind(capture, tmp_path, capsys):
    folder, made = capture
    flags = [str(folder), "--frames", "3", "--size", "20", "--elevation", "35", "--background", "#ff8000"]
    render.main([*flags, "--show", *render.KINDS, "--format", "png", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {f"{kind}_000{i}.png" for kind in render.KINDS for i in range(3)}
    shown = {kind: pictures(tmp_path, kind) for kind in render.KINDS}

    # What is seen from there.
    orbit = made.orbit(math.radians(35))
    path = orbit.cameras(3, orbit.elevation[None])
    views = made.render(path, 20)
    background = torch.tensor([1, 128 / 255, 0])[:, None, None]
    expected = views.images + (1 - views.silhouettes) * background
    assert (shown["color"] - expected).abs().max() < 1 / 255
    assert (shown["opacity"] - views.silhouettes).abs().max() < 1 / 255

    # White is the nearest, in the unit of the cameras, and black the farthest; there is no blue in the background.
    near, far = (float(printed.split(before)[1].split()[0]) for before in ("depth: ", "white, "))
    seen = views.silhouettes[:, 0] > 0.5
    depth = (views.depths / views.silhouettes)[:, 0][seen]
    blue = (shown["depth"][:, 2] / views.silhouettes[:, 0])[seen]
    assert seen.sum() > 50 and (far - blue * (far - near) - depth).abs().max() < 1.1 / 255 / 0.5 * (far - near)
    middle = path.centers().sub(orbit.middle).norm(dim=-1).mean()
    assert near < middle < far and far - near < 1.2 * middle

    # The circle is as high as asked.
    height = (path.centers() - orbit.middle) @ orbit.axes[1] / orbit.distance
    parity.assert_close(height.asin().rad2deg(), torch.full((3,), 35.0).double(), atol=1e-6)


def test_a_moving_picture_is_not_replaced(capture, capsys):
    folder, _ = capture
    flags = [str(folder), "--frames", "2", "--size", "16"]
    render.main(flags)
    with Image.open(folder / "render" / "color.gif") as gif:
        assert gif.n_frames == 2 and gif.size == (16, 16)
    one_line(capsys, render.main, flags, "is there already")
    (folder / "render" / "color_0007.gif").touch()  # of a longer run
    render.main([*flags, "--overwrite"])
    assert [p.name for p in (folder / "render").iterdir()] == ["color.gif"]


def test_a_path_of_cameras_is_read_like_a_capture(capture, tmp_path):
    """The photographs' own, of files that could as well be absent; angles do without a size of the picture."""
    folder, made = capture
    path = read_path(folder / "transforms.json")
    for name, x in vars(cameras_of(read_capture(folder))).items():
        parity.assert_close(getattr(path, name), x, atol=1e-12)
    render.main([str(folder), "--path", str(folder / "transforms.json"), "--size", "32", "--format", "png",
                 "--out", str(tmp_path)])
    assert (pictures(tmp_path, "color") - made.render(path, 32).images).abs().max() < 1 / 255
    frame = {"file_path": "x", "transform_matrix": torch.eye(4).tolist()}
    (tmp_path / "path.json").write_text(json.dumps({"camera_angle_x": math.pi / 2, "frames": [frame]}))
    camera = read_path(tmp_path / "path.json")
    parity.assert_close(camera.focal, torch.ones(1, 2).double(), atol=1e-12)
    parity.assert_close(camera.principal, torch.zeros(1, 2).double())


def test_normals_of_a_ball():
    """They are the ball's own, in the axes of the camera: to the right, upwards, towards it."""
    R, T = look_at(torch.tensor([3.0, 2, 1]), torch.zeros(3), torch.tensor([0.0, 1, 0]))
    camera = Cameras(R, T, torch.tensor([2.5, 2.0]), torch.tensor([0.1, -0.05]))
    rays_o, rays_d = camera.rays(pixel_grid(128, 128))
    d2, od, oo = ((a * b).sum(-1) for a, b in ((rays_d, rays_d), (rays_o, rays_d), (rays_o, rays_o)))
    inside = od**2 - d2 * (oo - 1)
    depth = (-od - inside.clamp(min=0).sqrt()) / d2
    found = render.normals(depth.reshape(128, 128), camera).reshape(3, -1)
    expected = (rays_o + depth[:, None] * rays_d) @ R * torch.tensor([-1.0, 1, -1])
    hit = inside > 0.3
    assert hit.sum() > 3000 and (found.T[hit] - expected[hit]).norm(dim=-1).max() < 0.02


@pytest.mark.parametrize("flags, words", [
    (["--elevation", "81"], "--elevation: 81 is not from -80 to 80 degrees"),
    (["--elevation", "nan"], "--elevation: nan"),
    (["--background", "grue"], "--background"),
    (["--show", "colour"], "--show"),
    (["--frames", "0"], "--frames"),
    (["--size", "-3"], "--size"),
    (["--format", "mp4"], "--format"),
    (["--path", "no.json"], "no.json"),
    (["--path", "field.pt"], "field.pt: not a JSON file"),
    (["--path", "empty.json"], "empty.json: frames: no list of frames"),
    (["--path", "lens.json"], "lens.json: frame 0: w: None is no number"),
])
def test_bad_flags_are_one_line(capture, flags, words, capsys, monkeypatch):
    folder, _ = capture
    monkeypatch.chdir(folder)
    (folder / "empty.json").write_text("{}")
    frame = {"file_path": "x", "transform_matrix": torch.eye(4).tolist(), "fl_x": 3}
    (folder / "lens.json").write_text(json.dumps({"frames": [frame]}))
    one_line(capsys, render.main, [".", *flags], words)


def test_what_is_no_field_is_one_line(capture, tmp_path, capsys):
    folder, _ = capture
    one_line(capsys, render.main, [str(tmp_path)], f"{tmp_path}/field.pt: no such file")
    state = files.read_tensors(folder / "field.pt", "field")
    other = state["field"] | {"mlp.0.weight": torch.zeros(2, 2)}
    wrong = [{name: x for name, x in state.items() if name != "cameras"}, state | {"field": other},
             state | {"settings": {}}, state | {"cameras": {name: [] for name in state["cameras"]}},
             state | {"cameras": state["cameras"] | {"T": state["cameras"]["T"] * math.inf}},
             state | {"cameras": state["cameras"] | {"focal": state["cameras"]["focal"] * 0}},
             state | {"unit": "x"}, state | {"unit": 0}, state | {"world": [1]},
             state | {"world": state["world"] | {"scale": math.inf}}]
    for bad in wrong:
        files.save_tensors(bad, tmp_path / "field.pt")
        one_line(capsys, render.main, [str(tmp_path)], f"{tmp_path}/field.pt: no field that can be opened")
