"""The synthetic toys: the same bytes again, annotations that agree with the pictures, exact distances, soft masks,
useful attributes."""
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cameras import Cameras, look_at
from evaluation import views
from photographs.reading import read_capture
from sample import rocket, toys, tracing
from sample.toy_design import ATTRIBUTES
from sample.toy_render import distance, distances, render
from sample.toy_shapes import Figure, Place, Toy, upright_axes
from sample.tracing import to_own
from sample.tree import generator_of
from tests.support.helpers import one_line

SHIPPED = Path(__file__).resolve().parents[1] / "sample" / "co3d"


def annotations(root: Path, kind: str) -> list[dict]:
    return json.loads(gzip.decompress((root / "toys" / f"{kind}_annotations.jgz").read_bytes()))


def files(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toys")
    toys.main(["--root", str(root), "--instances", "4", "--seed", "4000", "--views", "3", "--device", "cpu"])
    return root


def plain_toy(axes, center, radii, box, pair=False) -> Toy:
    """A gray primitive in the world's frame, lit from +z, and a second one far away (each toy has something hard)."""
    gray = np.full(3, 0.5)
    figure = Figure()
    figure.add("soft", center, radii, gray, box, axes, pair)
    figure.add("hard", (0, 0, 900), 1, gray, hard=True)
    place = Place(np.eye(3), np.zeros(3), 1.0, np.array([0, 0, 1]), np.zeros((2, 3)))
    return figure.finish(place, [], "cpu")


def test_same_seed_same_bytes_whatever_the_number(tree, tmp_path, monkeypatch, forked):
    """Of toys, and of processes."""
    command = ["--seed", "4000", "--views", "3", "--device", "cpu"]
    for name, toys_a_process in (("fewer", 2), ("again", 1)):
        monkeypatch.setattr("sample.tree.OBJECTS_A_WORKER", toys_a_process)
        toys.main(["--root", str(tmp_path / name), "--instances", "2", *command])
    fewer = files(tmp_path / "fewer")
    assert files(tmp_path / "again") == fewer
    pictures = [name for name in fewer if "toy_4000_" in name]
    assert len(pictures) == 2 * 3 * 2 and all(fewer[name] == (tree / name).read_bytes() for name in pictures)
    assert annotations(tmp_path / "fewer", "frame") == annotations(tree, "frame")[:6]
    assert annotations(tmp_path / "fewer", "sequence") == annotations(tree, "sequence")[:2]


def test_another_seed_or_index_another_toy():
    seen = [tuple(toy.attributes) for seed in (4000, 4001) for toy in toys.make_toys(5, seed)]
    assert len(set(seen)) == 10


def test_tree_has_the_layout_of_co3d(tree):
    frames = annotations(tree, "frame")
    lists = json.loads((tree / "toys/set_lists/set_lists_fewview_dev.json").read_text())
    assert lists["train"] == [[f["sequence_name"], f["frame_number"], f["image"]["path"]] for f in frames]
    assert {f["viewpoint"]["intrinsics_format"] for f in frames} == {"ndc_isotropic", "ndc_norm_image_bounds"}
    assert len({tuple(f["image"]["size"]) for f in frames}) == 2, "portrait and landscape"
    for f in frames:
        with Image.open(tree / f["image"]["path"]) as image, Image.open(tree / f["mask"]["path"]) as mask:
            assert image.size == mask.size == tuple(f["image"]["size"][::-1])
            assert (image.format, mask.format, image.mode, mask.mode) == ("JPEG", "PNG", "RGB", "L")
            assert np.asarray(mask).sum() / 255 == pytest.approx(f["mask"]["mass"])


def test_masks_are_soft_off_center_and_inside_the_picture(tree):
    middles = []
    for f in annotations(tree, "frame"):
        mask = np.asarray(Image.open(tree / f["mask"]["path"])) / 255
        edge = (mask > 0) & (mask < 1)
        assert (mask == 0).any() and (mask == 1).any() and 0.02 < edge.sum() / (mask > 0).sum() < 0.3
        y, x = np.nonzero(mask > 0.4)
        middles.append([x.mean() - mask.shape[1] / 2, y.mean() - mask.shape[0] / 2])
        assert 0.04 < mask.mean() < 0.35
    assert np.abs(middles).max() > 3


def annotated_rays(annotation: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Origin (3,) and directions (R, 3), of depth 1, of every third pixel, from the numbers in the annotation alone."""
    (height, width), view = annotation["image"]["size"], annotation["viewpoint"]
    half = np.array([width, height]) / 2
    unit = half if view["intrinsics_format"] == "ndc_norm_image_bounds" else np.array([half.min()] * 2)
    focal = np.array(view["focal_length"]) * unit
    middle = half - np.array(view["principal_point"]) * unit

    y, x = np.meshgrid(np.arange(1, height, 3), np.arange(1, width, 3), indexing="ij")
    local = np.stack([(middle[0] - x - 0.5) / focal[0], (middle[1] - y - 0.5) / focal[1], np.ones(x.shape)], -1)
    R, T = np.array(view["R"]), np.array(view["T"])
    origin = torch.tensor(-R @ T, dtype=torch.float32)
    return origin, torch.tensor(local.reshape(-1, 3) @ R.T, dtype=torch.float32)


def test_annotated_cameras_agree_with_the_masks(tree):
    """Rays made from the annotation's numbers alone hit the toy's distance function exactly where the mask says so."""
    made = toys.make_toys(4, 4000)
    wrong = total = 0
    for f in annotations(tree, "frame"):
        toy = made[int(f["sequence_name"][-5:])]
        origin, direction = annotated_rays(f)
        depths = torch.linspace(6, 15, 200)
        points = origin + depths[:, None, None] * direction  # (200, R, 3)
        nearest = distance(toy, to_own(toy, points.reshape(-1, 3))).reshape(200, -1).amin(0)

        mask = torch.tensor(np.asarray(Image.open(tree / f["mask"]["path"])))
        value = mask[1::3, 1::3].flatten()
        sure = (value == 0) & (nearest.abs() > 0.03) | (value == 255)
        wrong += ((nearest < 0) != (value > 128))[sure].sum().item()
        total += sure.sum().item()
        shift = ((nearest < 0) != (value.roll(5) > 128))[sure].sum().item()
        assert shift > 20, "the test could not fail"
    assert wrong <= 0.001 * total, f"{wrong} of {total}"


def test_turntable():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        cameras = toys.turntable(generator, 12)
        center = cameras.centers()
        radius = center.norm(dim=-1)
        elevation = torch.rad2deg((center[:, 1] / radius).asin())
        assert radius.min() > 9.2 - 1e-4 and radius.max() < 11 + 1e-4
        assert elevation.min() > 7.9 and elevation.max() < 35.1
        azimuth = torch.atan2(center[:, 2], center[:, 0]).sort().values
        assert (azimuth.diff() > 0.1).all()
        torch.testing.assert_close(cameras.R.mT @ cameras.R, torch.eye(3).expand(12, 3, 3), atol=1e-5, rtol=0)
        assert (torch.det(cameras.R) > 0).all()
        xy, depth = cameras.project(torch.zeros(12, 1, 3))
        assert xy.abs().max() < 0.35 and (depth > 8).all()


def test_toys_fit_the_field_and_stand_apart_from_black():
    sphere = torch.nn.functional.normalize(torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    for toy in toys.make_toys(40, 4002):
        assert distance(toy, to_own(toy, sphere * 3.7)).min() > 0
        inner = distance(toy, to_own(toy, sphere * 2.2))
        assert inner.min() < 0.6, "a toy fills a good part of the cube"
        assert toy.colors.mean(-1).min() > 0.15


def assert_distances(toy: Toy, points: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(distances(toy, points)[0], expected, atol=1e-3, rtol=1e-3)


def test_distances_are_exact_for_balls_boxes_and_capsules():
    points = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) * 2
    center = torch.tensor([0.3, -0.2, 0.5])
    ball = plain_toy(np.eye(3), center.numpy(), [0.7] * 3, np.zeros(3))
    assert_distances(ball, points, (points - center).norm(dim=-1) - 0.7)

    box = torch.tensor([0.6, 0.3, 0.9])
    rounded = plain_toy(np.eye(3), center.numpy(), [0.2] * 3, box.numpy())
    outside = ((points - center).abs() - box).clamp_min(0).norm(dim=-1)
    assert_distances(rounded, points[outside > 0.01], (outside - 0.2)[outside > 0.01])
    assert (distances(rounded, points)[0][outside == 0] < 0).all()

    up = np.array([1.0, 2.0, -0.5]) / math.sqrt(5.25)
    capsule = plain_toy(upright_axes(up), center.numpy(), [0.3] * 3, np.array([0, 0.8, 0]))
    up = torch.tensor(up, dtype=torch.float32)
    along = ((points - center) @ up).clamp(-0.8, 0.8)
    axis = center + along[:, None] * up
    assert_distances(capsule, points, (points - axis).norm(dim=-1) - 0.3)


def test_a_pair_is_mirrored():
    toy = plain_toy(upright_axes((0.3, 1, 0.2)), (0.8, 0.1, 0), [0.2, 0.5, 0.3], np.array([0.1, 0, 0]), pair=True)
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(distances(toy, points), distances(toy, points * torch.tensor([-1.0, 1, 1])))
    single = plain_toy(upright_axes((0.3, 1, 0.2)), (0.8, 0.1, 0), [0.2, 0.5, 0.3], np.array([0.1, 0, 0]))
    right = points[:, 0] > 0
    torch.testing.assert_close(distances(toy, points)[0, right], distances(single, points)[0, right])


def test_rendering_of_a_ball():
    """The outline of a ball is a known disc, its shade follows Lambert's law."""
    toy = plain_toy(np.eye(3), (0, 0, 0), [1.5] * 3, np.zeros(3))
    R, T = look_at(torch.tensor([[0.0, 0, 10]]), torch.zeros(1, 3), torch.tensor([[0.0, 1, 0]]))
    rgb, mask = render(toy, Cameras(R, T, torch.full((1, 2), 3.0), torch.tensor([[0.1, -0.05]])), 96, 128)
    radius = 3 * 1.5 / math.sqrt(100 - 1.5 ** 2)  # NDC; 48 pixels are 1
    assert mask.sum().item() == pytest.approx(math.pi * (radius * 48) ** 2, rel=0.01)
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(128) + 0.5, indexing="ij")
    assert (mask[0, 0] * x).sum() / mask.sum() == pytest.approx(64 - 0.1 * 48, abs=0.1)  # +x is left, +y is up
    assert (mask[0, 0] * y).sum() / mask.sum() == pytest.approx(48 + 0.05 * 48, abs=0.1)
    assert rgb[0, :, 50, 59].mean() == pytest.approx(0.5 * (0.66 + 0.36), abs=0.01), "facing the light"
    assert rgb[0, :, 50 - 14, 59].mean() > rgb[0, :, 50 + 14, 59].mean(), "lit by the sky"
    assert ((rgb > 0) & (mask == 0)).sum() == 0


@pytest.mark.parametrize("index", [0, 8])
def test_more_steps_change_little(index, monkeypatch):
    """No cracks and no missing blocks where rays graze a surface."""
    generator = generator_of(1000, index)
    toy, cameras = toys.make_toy(generator, "cpu"), toys.turntable(generator, 24)[:3]
    _, mask = render(toy, cameras, 144, 192)
    for name, value in (("COARSE_STEPS", 80), ("FINE_STEPS", 240), ("STRIDE", 0.001)):
        monkeypatch.setattr(tracing, name, value)
    _, exact = render(toy, cameras, 144, 192)
    assert (mask - exact).abs().mean() < 5e-4 and ((mask - exact).abs() > 0.3).sum() <= 5


def test_coarse_cones_out_of_steps_lose_nothing(monkeypatch):
    generator = generator_of(1000, 0)
    toy, cameras = toys.make_toy(generator, "cpu"), toys.turntable(generator, 2)
    _, mask = render(toy, cameras, 48, 64)
    monkeypatch.setattr(tracing, "COARSE_STEPS", 4)
    _, hasty = render(toy, cameras, 48, 64)
    assert (mask - hasty).abs().mean() < 1e-3


def test_attributes_are_in_range_and_informative():
    table = torch.tensor([toy.attributes for toy in toys.make_toys(300, 4003)])
    assert table.shape[1] == len(ATTRIBUTES) and table.min() >= 0 and table.max() <= 1
    assert table.std(0).min() > 0.1, "each one varies"
    body = [table[:, ATTRIBUTES.index(f"body {c}")] for c in "rgb"]
    back = [table[:, ATTRIBUTES.index(f"back {c}")] for c in "rgb"]
    correlation = torch.corrcoef(torch.stack(body + back))[:3, 3:]
    assert correlation.abs().max() < 0.25, "the front does not tell the color of the back"


def test_attributes_show_in_the_pictures():
    """The color that the attributes name is the color that dominates the pictures."""
    named, seen = [], []
    for i in range(12):
        generator = generator_of(4004, i)
        toy, cameras = toys.make_toy(generator, "cpu"), toys.turntable(generator, 2)
        rgb, mask = render(toy, cameras, 48, 64)
        named.append(toy.attributes[:3])
        seen.append((rgb.sum((0, 2, 3)) / mask.sum()).tolist())
    for c in range(3):
        assert np.corrcoef(np.array(named)[:, c], np.array(seen)[:, c])[0, 1] > 0.6


def test_shipped_toys_are_those_of_seed_1000():
    sequences, frames = annotations(SHIPPED, "sequence"), annotations(SHIPPED, "frame")
    assert [s["sequence_name"] for s in sequences] == [f"toy_1000_{i:05d}" for i in range(6)] and len(frames) == 6 * 24
    assert sum(len(b) for b in files(SHIPPED).values()) < 3e6
    generator = generator_of(1000, 0)
    toy, cameras = toys.make_toy(generator, "cpu"), toys.turntable(generator, 24)
    assert sequences[0]["attributes"] == pytest.approx(toy.attributes)
    assert np.array([f["viewpoint"]["R"] for f in frames[:24]]) == pytest.approx(cameras.R.numpy(), abs=1e-5)
    rgb, mask = render(toy, cameras[:1], *frames[0]["image"]["size"])
    picture = torch.tensor(np.asarray(Image.open(SHIPPED / frames[0]["image"]["path"])) / 255.0).permute(2, 0, 1)
    shown = torch.tensor(np.asarray(Image.open(SHIPPED / frames[0]["mask"]["path"])) / 255.0)
    assert (shown - mask[0, 0]).abs().mean() < 1e-3  # 8 bits; another processor may round a ray at the edge otherwise
    inside = shown == 1
    assert (picture - rgb[0])[:, inside].abs().mean() < 0.01


@pytest.mark.parametrize("flag, value", [
    ("--instances", "0"), ("--instances", "100001"), ("--seed", "-1"), ("--seed", "40001"), ("--views", "0"),
    ("--views", "x"), ("--device", "cuda:99")])
def test_bad_flags_end_in_one_line(flag, value, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = {"--root": str(tmp_path), "--instances": "1", "--seed": "1", flag: value}
    with pytest.raises(SystemExit) as e:
        toys.main([x for pair in flags.items() for x in pair])
    assert e.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


def test_a_root_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        toys.main(["--root", str(tmp_path / "file"), "--instances", "1", "--seed", "1", "--views", "1",
                   "--device", "cpu"])
    assert e.value.code == 2 and "--root" in capsys.readouterr().err.splitlines()[-1]


# --- the rocket ---

def test_the_rocket_is_a_capture(tmp_path, capsys):
    """Its photographs, masks and cameras fit; the same bytes again."""
    rocket.main([str(tmp_path / "a"), "--views", "6", "--size", "64"])
    rocket.main([str(tmp_path / "b"), "--views", "6", "--size", "64"])
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) == 7
    photographs = read_capture(tmp_path / "a")
    found = views.examine_views(photographs, list(range(6)))
    assert not found.mistake and found.lines[-1] == "masks and cameras fit"
    one_line(capsys, rocket.main, [tmp_path / "c", "--size", "30"], "--size 30", "multiple of 4")
