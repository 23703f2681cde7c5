"""The synthetic things: the same bytes again, distances of balls and rings, cameras within their ranges, faults of a
camera, a tree that the project reads and finds to fit."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import check
from cameras import Cameras, look_at
from datasets import co3d
from sample import things, tracing, tree
from sample.thing_design import DARK, make_thing, palette, rectangle
from sample.thing_render import _shade, render
from sample.thing_shapes import Part, assemble
from sample.toy_design import Dice
from sample.tracing import Rays, march
from sample.tree import generator_of
from tests.support.helpers import one_line

FLAT = np.zeros((4, 8))  # no ripples
UPRIGHT = np.eye(3)
CENTER = np.array([0.3, -0.2, 0.5])


def ball_and_points(squash=1.0):
    """A ball of radius 0.8 about CENTER as a shape, and points around it with their distances to it."""
    angle = np.linspace(0, math.pi, 96)
    outline = 0.8 * np.stack([np.sin(angle), np.cos(angle)], 1)
    ball = assemble([Part(outline, CENTER, UPRIGHT, 2.0, squash)], [], 0.0, FLAT, 0.0, "cpu")
    points = 1.5 * torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    return ball, points, (points - torch.tensor(CENTER).float()).norm(dim=1) - 0.8


def test_distances_to_a_ball():
    ball, points, exact = ball_and_points()
    found = ball.distance(points)
    near = exact < 0.1  # within its picture; farther away, no more than the distance
    torch.testing.assert_close(found[near], exact[near], atol=0.01, rtol=0)
    assert (found[~near] <= exact[~near] + 0.01).all() and (found[~near] > 0.5 * exact[~near]).all()
    inside = (points.abs() < ball.half).all(1)
    coarse = ball.room().distance(points[inside])
    assert (coarse - found[inside]).abs().max() < 0.06
    middle, radius, whole = ball.room().extent()
    assert middle == pytest.approx(CENTER, abs=0.03) and radius == pytest.approx(0.8, abs=0.12) and whole


def test_a_squashed_ball_is_never_farther_than_said():
    ball, points, _ = ball_and_points(0.6)
    x, y, z = ((points - torch.tensor(CENTER).float()) / 0.8 / torch.tensor([1, 1, 0.6])).T
    found = ball.distance(points)
    edge = (torch.sqrt(x ** 2 + y ** 2 + z ** 2) - 1).abs() > 0.02
    assert ((found < 0) == (x ** 2 + y ** 2 + z ** 2 < 1))[edge].all()
    taps = F.normalize(torch.randn(3000, 3, generator=torch.Generator().manual_seed(1)), dim=1) * 0.05
    assert ((ball.distance(points + taps) - found).abs() <= 0.0525).all(), "no step can jump over the surface"


def test_distances_to_a_ring_and_a_box():
    points = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    x, y, z = points.T
    angle = np.linspace(0, 2 * math.pi, 96)
    outline = np.stack([1 + 0.25 * np.cos(angle), 0.25 * np.sin(angle)], 1)
    ring = assemble([Part(outline, np.zeros(3), UPRIGHT, 2.0, 1.0)], [], 0.0, FLAT, 0.0, "cpu")
    exact = torch.hypot(torch.hypot(x, z) - 1, y) - 0.25
    near = exact < 0.05
    torch.testing.assert_close(ring.distance(points)[near], exact[near], atol=0.015, rtol=0)

    # With p = 40 nearly a box; a second part is cut out of it.
    box = Part(rectangle(0.9, 0.5, 0.02), np.zeros(3), UPRIGHT, 40.0, 1.0)
    notch = Part(rectangle(0.3, 0.9, 0.02), np.array([0.9, 0, 0]), UPRIGHT, 2.0, 1.0)
    shape = assemble([box], [notch], 0.0, FLAT, 0.0, "cpu")
    in_box = torch.maximum(torch.maximum(x.abs(), z.abs()) - 0.9, y.abs() - 0.5)
    in_notch = torch.maximum(torch.hypot(x - 0.9, z) - 0.3, y.abs() - 0.9)
    exact = torch.maximum(in_box, -in_notch)
    sure = exact.abs() > 0.04
    assert ((shape.distance(points) < 0) == (exact < 0))[sure].all() and (exact < 0)[sure].sum() > 100


def test_masks_and_depths_of_a_ball():
    """Sphere tracing arrives where the ball is, and its outline is a known disc."""
    ball, _, _ = ball_and_points()
    y, x = torch.meshgrid(torch.linspace(0.9, -0.9, 32), torch.linspace(0.9, -0.9, 32), indexing="ij")
    directions = F.normalize(torch.stack([-0.25 * x, 0.25 * y, -torch.ones(32, 32)], -1).view(-1, 3), dim=1)
    origins = (torch.tensor(CENTER).float() + torch.tensor([0, 0, 6.0])).expand_as(directions)
    length, hit = march(ball.distance, Rays(origins, directions), torch.full((1024,), 3.0), torch.full((1024,), 9.0),
                        0.0, 60)
    along = -directions[:, 2] * 6
    square = 0.8 ** 2 - (36 - along ** 2)
    sure = square.abs() > 0.03
    assert torch.equal(hit[sure], (square > 0)[sure]) and hit.sum() > 200
    clear = hit & (square > 0.05)
    torch.testing.assert_close(length[clear], (along - square.clamp_min(0).sqrt())[clear], atol=0.02, rtol=0)


def test_a_rendered_thing_is_where_its_distances_are():
    thing = make_thing(generator_of(4000, 0))
    R, T = look_at(thing.middle + torch.tensor([[0.0, 2, 15]]), thing.middle[None], torch.tensor([[0.0, 1, 0]]))
    cameras = Cameras(R, T, torch.full((1, 2), 4.0), torch.zeros(1, 2))
    color, mask = render(thing, cameras, 32, 32)
    y, x = torch.meshgrid((16 - torch.arange(0.5, 32)) / 16, (16 - torch.arange(0.5, 32)) / 16, indexing="ij")
    origins, directions = cameras.rays(torch.stack([x, y], -1).view(1, -1, 2))
    points = origins[0] + torch.linspace(10, 20, 400)[:, None, None] * directions[0]
    nearest = thing.shape.distance(tracing.to_own(thing, points.view(-1, 3))).view(400, -1).amin(0)
    sure = (mask.flatten() == 1) | (mask.flatten() == 0) & (nearest.abs() > 0.05)
    assert ((nearest < 0.02) == (mask.flatten() > 0.5))[sure].all() and 50 < mask.sum() < 700
    assert color[0, :, mask[0, 0] == 1].mean() > 0.003 and (color[0, :, mask[0, 0] == 0] == 0).all()


@pytest.fixture(scope="module")
def some():
    return [make_thing(generator_of(4001, i)) for i in range(12)]


def test_things_fit_the_field_and_their_balls(some):
    sphere = F.normalize(torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    for thing in some:
        assert 3 <= thing.radius + 1e-4 and thing.radius + thing.middle.norm() < 4
        assert thing.shape.distance(tracing.to_own(thing, thing.middle + thing.radius * 1.02 * sphere)).min() > 0
        inner = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
        inside = thing.shape.distance(tracing.to_own(thing, thing.middle + thing.radius * inner)) < 0
        assert inside.float().mean() > 0.003, "not nearly nothing"
    assert len({thing.shape.solid for thing in some}) > 2 and len({len(thing.lights) for thing in some}) == 3


def test_dark_paint_is_dark_and_the_rest_is_not():
    dice = Dice(torch.Generator().manual_seed(0))
    dark, light = (np.array([palette(dice, is_dark).mean() for _ in range(100)]) for is_dark in (True, False))
    assert dark.max() < 0.12 < np.median(light) and light.std() > 0.1 and DARK == 0.2


def test_highlights_move_with_the_camera_and_paint_does_not(some):
    sphere = F.normalize(torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    changes = []
    for thing in some[:8]:
        first, second = (_shade(thing, 0.5 * sphere[0], directions) for directions in (sphere[1], sphere[1].flip(0)))
        changes.append((first - second).abs().mean().item())
        assert first.min() >= 0 and (first - _shade(thing, 0.5 * sphere[0], sphere[1])).abs().max() == 0
    assert max(changes) > 4 * min(changes)


def test_cameras_are_within_their_ranges(some):
    elevations, distances, arcs = [], [], []
    for seed in range(40):
        thing = some[seed % 12]
        cameras = things.hand_held(thing, torch.Generator().manual_seed(seed), 12)
        away = cameras.centers() - thing.middle
        distance = away.norm(dim=1)
        elevations += torch.rad2deg((away[:, 1] / distance).asin()).tolist()
        distances.append((distance / thing.radius).tolist())

        # The ball is in every picture, whole.
        sphere = F.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
        xy, depth = cameras.project((thing.middle + thing.radius * sphere).expand(12, -1, -1))
        assert xy.abs().max() < 1 and depth.min() > 0 and (xy[..., 0].amax(1) - xy[..., 0].amin(1)).min() > 1

        # Roll: how far the picture's vertical is from the plane of the world's and the way that it looks.
        level = cameras.R[:, 1, 0]  # the world's vertical along the view's x axis
        roll = torch.rad2deg(torch.atan2(level, cameras.R[:, 1, 1])).abs()
        assert roll.max() <= 10.01 and roll.max() > 3
        torch.testing.assert_close(cameras.R.mT @ cameras.R, torch.eye(3).expand(12, 3, 3), atol=1e-5, rtol=0)
        azimuth = torch.atan2(away[:, 2], away[:, 0])
        arcs.append(torch.rad2deg(torch.atan2(azimuth.diff().sin(), azimuth.diff().cos()).sum().abs()).item())
    distances = np.array(distances)
    assert min(elevations) >= -15.01 and max(elevations) <= 65.01 and np.std(elevations) > 12
    assert 2.499 <= distances.min() < 3.2 and 10 < distances.max() <= 12.001 and distances.std(1).min() > 0.05
    assert min(arcs) < 120 and max(arcs) > 250


def test_masks_are_those_that_are_rendered():
    drawn = things.draw("cpu", generator_of(4000, 3), 10, 32, 32).pixels[..., 3] / 255.0
    generator = generator_of(4000, 3)
    thing = make_thing(generator)
    _, mask = render(thing, things.hand_held(thing, generator, 10), 32, 32)
    assert np.abs(mask[:, 0].numpy() - drawn).max() < 0.003


@pytest.fixture(scope="module")
def drawn_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("things")
    things.main(["--root", str(root), "--instances", "2", "--seed", "4000", "--views", "8", "--device", "cpu"])
    return root


def test_the_tree_is_read_and_fits(drawn_tree, tmp_path, capsys):
    scene = co3d.load_sequence(drawn_tree, "things", "thing_4000_00000", size=64)
    assert len(scene) == 8 and 0.02 < scene.masks.mean() < 0.6
    check.main([str(drawn_tree), "--category", "things", "--out", str(tmp_path / "check.png")])
    assert "masks and cameras fit" in capsys.readouterr().out


def test_same_seed_same_bytes_whatever_the_number(drawn_tree, tmp_path):
    command = ["--root", str(tmp_path), "--instances", "1", "--seed", "4000", "--views", "8", "--device", "cpu"]
    things.main(command)
    made = {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*.*g")}
    assert len(made) == 16 and all((drawn_tree / name).read_bytes() == data for name, data in made.items())
    first, second = (tree.generator_of(4000, i) for i in (0, 1))
    assert make_thing(first).radius != make_thing(second).radius


def test_bad_flags_end_in_one_line(tmp_path, capsys):
    one_line(capsys, things.main, ["--root", tmp_path, "--instances", "1", "--seed", "40001"], "--seed", "40000")
