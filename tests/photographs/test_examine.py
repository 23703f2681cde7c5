"""The check of own photographs: what silhouettes say of cameras, what is named and what not, the picture, the command.
"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import check
from cameras import Cameras, Scene, look_at, pixel_grid
from tests.support import camera_mistakes
from photographs import examine, figure, mistakes, silhouettes
from photographs.shots import CONVENTIONS
from tests.support import small
from tests.support.helpers import one_line

OPENGL = CONVENTIONS["opengl"]
# x, y, z, radius
BALLS = torch.tensor([[0.0, 0, 0, 0.5], [0.7, 0.1, 0, 0.25], [0, 0.6, 0.4, 0.2], [-0.2, -0.3, 0.7, 0.3]])


def views(n, distance=3.0, seed=0):
    """n cameras in random directions over the horizon that look nearly at the origin."""
    g = torch.Generator().manual_seed(seed)
    eye = torch.randn(n, 3, generator=g)
    eye[:, 1] = eye[:, 1].abs()
    eye = torch.nn.functional.normalize(eye, dim=1) * distance
    R, T = look_at(eye, 0.1 * torch.randn(n, 3, generator=g), torch.tensor([0.0, 1, 0]))
    return Cameras(R, T, torch.full((n, 2), 2.0), torch.zeros(n, 2))


def silhouette_scene(cameras, balls=BALLS, size=96):
    """What cameras see of some balls, white; rays are asked where they pass."""
    rays_o, rays_d = cameras.rays(pixel_grid(size, size).expand(len(cameras), -1, 2))
    along = torch.nn.functional.normalize(rays_d, dim=-1)
    inside = torch.zeros(rays_o.shape[:2], dtype=torch.bool)
    for ball in balls:
        offset = ball[:3] - rays_o
        ahead = (offset * along).sum(-1)
        inside |= (offset.square().sum(-1) - ahead**2 < ball[3]**2) & (ahead > 0)
    masks = inside.float().reshape(len(cameras), 1, size, size)
    names = [f"p{i}.png" for i in range(len(cameras))]
    return Scene(masks.expand(-1, 3, -1, -1), masks, torch.ones_like(masks), cameras, names, "balls")


@pytest.fixture(scope="module")
def scene():
    return silhouette_scene(views(6))


# ---------------------------------------------------------------------------------------------- silhouettes

def test_distances_to_an_outline_by_hand():
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[4, 4] = True
    distance = silhouettes._distance_to(mask)
    assert distance[4, 4] == 0 and distance[4, 6] == 2 and distance[1, 4] == 3
    assert distance[3, 3] == pytest.approx(2**0.5) and distance[0, 0] == silhouettes.REACH


def test_rays_through_a_ball_meet_what_the_others_allow():
    """Through the middle of a ball far inside, along its outline at 0, beside it outside: in cells of the grid."""
    ball = silhouette_scene(views(5, seed=1), torch.tensor([[0.0, 0, 0, 0.8]]), 128)
    found = silhouettes.silhouettes(ball)
    cameras = silhouettes.centered(ball.cameras)
    middle, _ = ball.cameras[0].project(torch.zeros(1, 3))
    edge = 2.0 * 0.8 / (3**2 - 0.8**2) ** 0.5  # NDC from the middle
    cell = found.side[0] / silhouettes.GRID
    points = torch.stack([middle[0], middle[0] + torch.tensor([edge - 3 * cell, 0]),
                          middle[0] + torch.tensor([edge + 6 * cell, 0])])
    clearance = silhouettes.clearance(found, cameras, 0, points)
    assert clearance[0] > 3 and clearance[1] > 1 and clearance[2] < 0


def test_what_lies_outside_the_picture_is_not_refused(scene):
    """Pictures cut through the object: its cameras still fit. Were the outside refused, they would not."""
    cut = replace(scene, masks=scene.masks[..., :48], valid=scene.valid[..., :48])
    valid = torch.nn.functional.pad(cut.valid, (0, 48))
    cut = replace(scene, masks=torch.nn.functional.pad(cut.masks, (0, 48)), valid=valid)
    fit = silhouettes.misfit(silhouettes.silhouettes(cut), scene.cameras)
    assert fit.total() < 0.02
    refused = replace(cut, valid=torch.ones_like(valid))
    assert silhouettes.misfit(silhouettes.silhouettes(refused), scene.cameras).total() > 0.1


def test_the_world_does_not_matter(scene):
    """Another origin, scale and orientation: the same misfit."""
    found = silhouettes.silhouettes(scene)
    wrong = replace(scene.cameras, focal=scene.cameras.focal * 1.6).to(torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    R = turn @ wrong.R
    moved = replace(wrong, R=R, T=500 * wrong.T + torch.tensor([1e5, 2e5, 3e5]).double() @ R)
    expected = silhouettes.misfit(found, wrong)
    assert expected.total() > 0.05
    assert silhouettes.misfit(found, moved).total() == pytest.approx(expected.total(), abs=0.02)


def test_a_misfit_is_given_up_where_it_is_clearly_worse(scene):
    """None exactly where its total is above the limit."""
    found = silhouettes.silhouettes(scene)
    wrong = replace(scene.cameras, focal=scene.cameras.focal * 1.6)
    total = silhouettes.misfit(found, wrong).total()
    assert silhouettes.misfit(found, wrong, 1.01 * total).total() == total > 0.05
    assert silhouettes.misfit(found, wrong, 0.99 * total) is None


def test_inverted_masks_do_not_fit(scene):
    """Whatever of the square is a picture; an object that fills few of the pictures is no mistake."""
    assert "inverted" not in " ".join(examine.examine(scene).lines)
    for rows in (96, 70):
        valid = torch.zeros_like(scene.masks)
        valid[:, :, :rows, :80] = 1
        found = examine.examine(replace(scene, masks=(1 - scene.masks) * valid, valid=valid))
        assert not found.fits and found.mistake is None
        assert "6 of 6 masks are white along the border: probably inverted" in found.lines[-1]


def test_cameras_at_one_place_are_named(scene):
    cameras = replace(scene.cameras, R=scene.cameras.R[:1].expand(6, 3, 3), T=scene.cameras.T[:1].expand(6, 3))
    with pytest.raises(ValueError, match="balls: all cameras are at one place"):
        examine.examine(replace(scene, cameras=cameras))


def test_an_empty_mask_is_named(scene):
    empty = replace(scene, masks=scene.masks * torch.tensor([1.0, 0, 1, 1, 1, 1])[:, None, None, None])
    with pytest.raises(ValueError, match="p1.png: its mask is empty"):
        examine.examine(empty)


# ---------------------------------------------------------------------------------------------- what is named

def test_every_mistake_made_is_undone_by_its_name(scene):
    """The alternative of that name has the true cameras again, in both kinds of files."""
    for convention in (OPENGL, examine.CO3D):
        for mistake in camera_mistakes.mistakes(scene, convention, True):
            if mistake.words.startswith(examine.FOCAL):
                continue
            corner = torch.ones(len(scene), 2)
            found = mistakes.alternatives(mistake.cameras, convention, corner)
            undone = found[mistake.words]
            for part in ("R", "T", "focal", "principal"):
                torch.testing.assert_close(getattr(undone, part), getattr(scene.cameras, part).double(),
                                           rtol=1e-3, atol=2e-3)


def test_right_cameras_are_not_accused(scene):
    found = examine.examine(scene, OPENGL, True)
    assert found.fits and found.mistake is None and found.can_tell
    assert found.focal[0] <= 1 <= found.focal[1]
    assert found.lines[-1] == "masks and cameras fit"


@pytest.mark.parametrize("words", ["R transposed", "OpenCV's axes for OpenGL's", "the camera's axes with x negated",
                                   "the focal length times 2", "the intrinsics those of a picture 4 times as large"])
def test_mistakes_are_named(scene, words):
    made = {mistake.words: mistake for mistake in camera_mistakes.mistakes(scene, OPENGL, True)}
    found = examine.examine(replace(scene, cameras=made[words].cameras), OPENGL, True)
    assert camera_mistakes.outcome(found, words) == "named", (found.mistake, found.alike)
    assert not found.fits and "with that undone" in found.lines[-1]


def test_two_photographs_name_nothing(scene):
    made = {mistake.words: mistake for mistake in camera_mistakes.mistakes(scene[:2], OPENGL, True)}
    wrong = replace(scene[:2], cameras=made["OpenCV's axes for OpenGL's"].cameras)
    found = examine.examine(wrong, OPENGL, True)
    assert found.mistake is None and not found.can_tell and not found.fits
    assert "two photographs" in found.lines[-1]


def test_a_ball_cannot_tell():
    """A ball in the middle looks alike from everywhere, upside down as well."""
    found = examine.examine(small.ball(6, 64), OPENGL, True)
    assert found.fits and found.mistake is None and not found.can_tell
    assert "the camera's axes with x negated" in found.alike and "alike from all sides" in found.lines[-1]


def test_rough_masks_accuse_nobody(scene):
    """Pieces are missing from every mask, and others are too many."""
    masks = scene.masks.clone()
    g = torch.Generator().manual_seed(0)
    for mask in masks:
        y, x = torch.randint(30, 60, (2,), generator=g).tolist()
        mask[:, y:y + 9, x:x + 9] = 0
        mask[:, x:x + 16, y:y + 16] = 1
    found = examine.examine(replace(scene, masks=masks), OPENGL, True)
    assert found.mistake is None and not found.fits
    assert "of the mask of frame" in " ".join(found.lines)


# ---------------------------------------------------------------------------------------------- picture and command

def test_where_cameras_stand(scene):
    place = figure.stand(scene)
    assert place.middle.norm() < 0.3
    torch.testing.assert_close(place.distance, torch.full((6,), 3.0).double(), atol=0.3, rtol=0)
    assert (place.depth > 0).all() and (place.elevation > -10).all()
    assert place.axes[2] @ torch.tensor([0.0, 1, 0]).double() > 0.99
    assert 1.2 < place.size.median() < 2.5


def test_the_picture_shows_both_outlines_and_no_red_where_all_is_right(scene):
    right = np.array(figure.draw(scene)).reshape(-1, 3)
    for color in (figure.MASK, figure.ALLOWED):
        assert (right == color).all(1).sum() > 500
    wrong = replace(scene.cameras, R=scene.cameras.R * torch.tensor([-1.0, 1, 1]),
                    T=scene.cameras.T * torch.tensor([-1.0, 1, 1]))
    red = np.array(figure.draw(replace(scene, cameras=wrong))).reshape(-1, 3)
    blended = (0.4 * 255 + 0.6 * np.array(figure.FORBIDDEN)).astype(np.uint8)
    assert (red == blended).all(1).sum() > 1000 > 100 > (right == blended).all(1).sum()


def write_capture(folder, scene, poses):
    """A folder with a transforms.json and pictures whose alpha is the mask."""
    size = scene.masks.shape[-1]
    frames = []
    for name, mask, pose in zip(scene.names, scene.masks, poses):
        gray = (mask[0] * 255).byte().numpy()
        Image.fromarray(np.stack([gray] * 4, -1), "RGBA").save(folder / name)
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
    half = size / 2
    data = {"fl_x": 2 * half, "fl_y": 2 * half, "cx": half, "cy": half, "w": size, "h": size, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(data))


def test_the_command_on_a_capture(scene, tmp_path, capsys):
    poses = camera_mistakes.written(scene.cameras, OPENGL)
    write_capture(tmp_path, scene, poses)
    picture = tmp_path / "out" / "look.png"
    check.main([str(tmp_path), "--out", str(picture)])
    printed = capsys.readouterr().out
    assert "masks and cameras fit\n" in printed and "6 photographs" in printed
    assert f"distill.py --capture {tmp_path}: 6 inputs with the shipped prior, about " in printed
    assert printed.rstrip().endswith(" GB")
    assert Image.open(picture).size == (figure.SHOWN * figure.TILE, 3 * (figure.TILE + figure.TEXT))

    # The same with a mistake: a line that names it, and another exit code.
    poses[:, :3, :3] = poses[:, :3, :3].transpose(0, 2, 1).copy()
    write_capture(tmp_path, scene, poses)
    with pytest.raises(SystemExit) as e:
        check.main([str(tmp_path), "--out", str(picture)])
    assert e.value.code == 1
    assert "likely a mistake: R transposed" in capsys.readouterr().out


def test_the_command_on_the_shipped_toys(tmp_path, capsys):
    root = Path(__file__).resolve().parents[2] / "sample" / "co3d"
    check.main([str(root), "--category", "toys", "--views", "3", "--out", str(tmp_path / "toy.png")])
    assert "3 photographs compared" in capsys.readouterr().out


def test_bad_input_ends_in_one_line(scene, tmp_path, capsys, monkeypatch):
    write_capture(tmp_path, scene, camera_mistakes.written(scene.cameras, OPENGL))
    one_line(capsys, check.main, [tmp_path / "none"], tmp_path / "none")
    one_line(capsys, check.main, [tmp_path, "--frames", "p9.png,p1.png"], "--frames p9.png", "p0.png")
    one_line(capsys, check.main, [tmp_path, "--frames", "p1.png"], "two or more")

    # Before anything is computed.
    monkeypatch.setattr(check, "examine_views", None)
    one_line(capsys, check.main, [tmp_path, "--out", "look"], "--out look: its ending is none of .png, .jpg")
    one_line(capsys, check.main, [tmp_path, "--out", tmp_path / "p0.png" / "x.png"], "p0.png")
