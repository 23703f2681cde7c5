"""The normalized world: the object sits where the presets expect it in any world, and everything comes back."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cameras import Scene
from metrics import psnr
from photographs.normalization import HALF_SIDE, Similarity, normalization
from reconstruction import reconstruct
from tests.support import captures
from tests.support.captures import (assert_same_cameras, balls, captured, field_psnr, turn, write_colmap,
                                    write_transforms)
from tests.support.small import FIELD, SHORT


WORLDS = {
    "turned": (turn(0.4, -1.1, 2.0), 1.0, [0, 0, 0]),
    "y up, z up": (turn(math.pi / 2, 0, 0), 1.0, [0, 0, 0]),
    "nerfstudio": (turn(0.1, 0.2, 0.3), 0.21, [0.1, -0.05, 0.2]),
    "a map's": (turn(-0.3, 0.8, 0.1), 37.0, [4.2e5, 5.3e6, 120.0]),
}


@pytest.mark.parametrize("world", WORLDS)
def test_another_world_is_the_same_scene(tmp_path, world):
    """The same normalized cameras; points lead back to that world."""
    R, scale, shift = WORLDS[world]
    shift = torch.tensor(shift, dtype=torch.float64)
    shoot = balls()
    moved = shoot.in_world(R, scale, shift)
    for name, photographs in (("a", shoot), ("b", moved)):
        (tmp_path / name).mkdir()
        write_colmap(tmp_path / name, photographs)
    a, b = captured(tmp_path / "a", 48), captured(tmp_path / "b", 48)
    for part in ("R", "T", "focal", "principal"):
        torch.testing.assert_close(getattr(a.scene.cameras, part), getattr(b.scene.cameras, part), rtol=0, atol=2e-5)
    assert torch.equal(a.scene.images, b.scene.images)
    assert field_psnr(a.scene.cameras, b.scene.cameras, scale=2.0) > 50
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = scale * a.scene.world.points(x) @ R.T + shift
    torch.testing.assert_close(b.scene.world.points(x), expected, rtol=1e-9, atol=2e-5 * scale)
    assert_same_cameras(b, moved)


def test_a_similarity_leads_there_and_back():
    world = Similarity(turn(0.3, -0.7, 1.9), 2.5, torch.tensor([3.0, -8.0, 1.0], dtype=torch.float64))
    cameras = captures.balls(5).square_cameras()
    there = world.cameras(cameras)
    torch.testing.assert_close(there.centers(), world.points(cameras.centers()))
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(there.project(world.points(x))[0], cameras.project(x)[0])
    back = world.normalized(there)
    for part in ("R", "T", "focal", "principal"):
        torch.testing.assert_close(getattr(back, part), getattr(cameras, part))
    other = Similarity(turn(1.0, 0.2, 0.1), 0.3, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(world.then(other).points(x), other.points(world.points(x)))
    assert world.points(x.float()).dtype == torch.float32


def box_of_balls(world):
    """The balls' box in the normalized world: least and greatest corner, (3,) each."""
    corners = []
    for middle, radius, _ in captures.BALLS:
        middle = (torch.tensor(middle, dtype=torch.float64) - world.shift) @ world.R / world.scale
        corners += [middle - radius / world.scale, middle + radius / world.scale]
    corners = torch.stack(corners)
    return corners.amin(0), corners.amax(0)


def farthest_side(world):
    """How far from the origin the balls reach along an axis, CO3D units."""
    return torch.cat(box_of_balls(world)).abs().max()


def test_the_object_sits_where_the_presets_expect_it(tmp_path):
    """The balls' box is in the middle of the cube and `HALF_SIDE` large, with two photographs as with twelve."""
    for count in (2, 3, 12):
        (tmp_path / str(count)).mkdir()
        capture = captured(write_transforms(tmp_path / str(count), balls(count, 96, 72, (120.0, 120.0))), 96)
        low, high = box_of_balls(capture.scene.world)
        assert farthest_side(capture.scene.world) < HALF_SIDE + 0.2
        assert (high - low).max() / 2 > (2.1 if count == 12 else 1.2)
        assert torch.allclose(capture.scene.cameras.R[0], torch.eye(3), atol=1e-6)


def spoiled(shoot, spoil):
    """The normalized world of photographs whose images, masks and valid pixels (V, 5, S, S) were spoiled."""
    layers = torch.from_numpy(np.stack(shoot.rgba)).permute(0, 3, 1, 2).float() / 255
    layers = torch.cat([layers, torch.ones_like(layers[:, :1])], 1)
    spoil(layers)
    scene = Scene(layers[:, :3], layers[:, 3:4], layers[:, 4:], shoot.square_cameras(), [""] * len(shoot), "spoiled")
    return normalization(scene, torch.zeros(0, 3))


def test_where_a_photograph_ends_the_object_may_go_on():
    """Half of the photographs show half of the object; the box has room for all of it."""
    def cut(layers):
        layers[[0, 1, 11], :, :, :52] = 0
        layers[[5, 6, 7], :, :, -52:] = 0

    assert farthest_side(spoiled(balls(12, 96, 96, (120.0, 120.0)), cut)) < HALF_SIDE + 0.1


def test_a_few_bad_masks_change_little():
    """Of twelve masks two are nearly empty."""
    def nearly_empty(layers):
        layers[3:5, 3, :, :] = 0
        layers[3:5, 3, 46:49, 46:49] = 1

    shoot = balls(12, 96, 96, (120.0, 120.0))
    whole = spoiled(shoot, lambda layers: None)
    world = spoiled(shoot, nearly_empty)
    assert (world.shift - whole.shift).norm() < 0.06 and abs(world.scale / whole.scale - 1) < 0.06


def test_what_is_thin_is_not_missed():
    """A pole a pixel wide, seen from around: the looks at its hull have cells that are wider."""
    shoot = balls(9, 200, 200, (300.0, 300.0))
    cameras = shoot.square_cameras()
    pole = torch.stack([torch.zeros(2000), torch.linspace(-1, 1, 2000), torch.zeros(2000)], -1).double()
    masks = torch.zeros(9, 1, 200, 200)
    for mask, camera in zip(masks, cameras):
        column, row = ((1 - camera.project(pole)[0]) * 100).long().T
        mask[0, row, column] = 1
    scene = Scene(masks.expand(-1, 3, -1, -1), masks, torch.ones_like(masks), cameras, [""] * 9, "pole")
    world = normalization(scene, torch.zeros(0, 3))
    assert world.shift.norm() < 0.1
    assert 0.85 < world.scale * HALF_SIDE < 1.05  # the first camera looks down on it: it is 0.91 long in its axes


def test_points_tell_how_far_away_the_object_is(tmp_path):
    """Two photographs from nearly one direction: the masks allow a long hull, points on the object do not."""
    shoot = balls(24).at([0, 1])
    middle, radius = torch.tensor(captures.BALLS[0][0]), captures.BALLS[0][1]
    surface = torch.nn.functional.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    points = torch.cat([middle + radius * surface, 5 + torch.rand(300, 3)])  # most of them are behind the object
    worlds = []
    for name, cloud in (("a", points), ("b", points[:5])):
        (tmp_path / name).mkdir()
        worlds.append(captured(write_colmap(tmp_path / name, shoot, points=cloud), 48).scene.world)
    assert (worlds[0].shift - middle).norm() < 0.6 and not torch.equal(worlds[0].shift, worlds[1].shift)


def test_a_field_fits_a_capture_and_its_mesh_comes_back(tmp_path):
    """A short fit in two worlds gives the same pictures, and meshes that lie where the balls are in each."""
    shoot = balls(12, 64, 64, (80.0, 80.0))
    R, scale, shift = turn(0.4, -1.1, 2.0), 3.0, torch.tensor([5.0, -7.0, 11.0], dtype=torch.float64)
    config = replace(SHORT, iterations=60, bootstrap=0, image_size=64, render_size=32, occupancy_every=16,
                     field=replace(FIELD, levels=4, features_per_level=2))
    views, meshes = [], []
    for name, photographs in (("a", shoot), ("b", shoot.in_world(R, scale, shift))):
        (tmp_path / name).mkdir()
        capture = captured(write_transforms(tmp_path / name, photographs), 64)
        result = reconstruct(capture.scene, list(range(1, 12)), None, config)
        views.append(result.render(capture.scene.user_cameras()[:1], 64))
        meshes.append(result.mesh().vertices.double())
    assert psnr(views[0].images, views[1].images).min() > 40
    assert psnr(views[0].images, capture.scene.images[:1]).min() > 16  # the view that no fit has seen

    # In the user's own coordinates.
    for vertices, to_balls in ((meshes[0], lambda x: x), (meshes[1], lambda x: (x - shift) @ R / scale)):
        distances = []
        for middle, radius, _ in captures.BALLS:
            distances.append((to_balls(vertices) - torch.tensor(middle, dtype=torch.float64)).norm(dim=-1) - radius)
        distance = torch.stack(distances).amin(0)
        assert distance.abs().median() < 0.1 and len(vertices) > 100
