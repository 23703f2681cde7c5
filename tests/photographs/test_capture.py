"""Own photographs: every layout gives the same cameras and pictures; the chair and the apple, too."""
import gzip
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cameras import Cameras, pixel_grid
from datasets.co3d import load_sequence
from datasets.crop import crop_and_resize
from evaluation.baselines import put_back
from metrics import psnr
from photographs.capture import load_pictures
from photographs.reading import read_capture
from tests.support import captures
from tests.support.captures import (assert_same_cameras, balls, captured, field_psnr, turn, worst_picture, write_co3d,
                                    write_colmap, write_transforms)

SHARED = Path(__file__).resolve().parents[3] / "shared"
CHAIR = SHARED / "nerf_synthetic_chair"
APPLE = SHARED / "co3d_real"
needs_chair = pytest.mark.skipif(not CHAIR.is_dir(), reason="the chair is not in ../shared/nerf_synthetic_chair")
needs_apple = pytest.mark.skipif(not APPLE.is_dir(), reason="the real sequence is not in ../shared/co3d_real")


# ---------------------------------------------------------------------------------------------- all layouts

LAYOUTS = {
    "transforms": lambda folder, shoot: write_transforms(folder, shoot),
    "each": lambda folder, shoot: write_transforms(folder, shoot, "masks/{1}.png", each=True),
    "text": lambda folder, shoot: write_colmap(folder, shoot, "PINHOLE", binary=False),
    "binary": lambda folder, shoot: write_colmap(folder, shoot, "PINHOLE", masks="masks/{0}.png"),
    "opencv": lambda folder, shoot: write_colmap(folder, shoot, "OPENCV", place="."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_cameras_and_pictures(tmp_path, layout):
    """Non-square pixels, an off-center principal point, photographs that are no squares."""
    shoot = balls(focal=(60.0, 66.0), principal=(22.0, 19.5))
    capture = captured(LAYOUTS[layout](tmp_path, shoot), None)
    assert capture.scene.names == [f"{i:03d}.png" for i in range(8)] and capture.scene.sequence == tmp_path.name
    assert capture.scene.images.shape == (8, 3, 48, 48) and capture.scene.cameras.R.dtype == torch.float32
    assert (capture.inputs, capture.targets) == (None, None) and "8 photographs" in capture.source
    assert_same_cameras(capture, shoot)
    assert worst_picture(capture) > 45
    assert capture.scene.valid.sum() == 8 * 48 * 36 and not capture.scene.valid[:, :, [0, 5, -6]].any()
    assert field_psnr(capture.scene.world.cameras(capture.scene.cameras), shoot.square_cameras()) > 50


LENSES = {
    "SIMPLE_RADIAL": (0.3, 0, 0, 0),
    "RADIAL": (-0.3, 0.1, 0, 0),
    "OPENCV": (-0.2, 0.05, 0.02, -0.03),
    "transforms": (0.2, 0, 0.02, 0),
}


@pytest.mark.parametrize("model", LENSES)
def test_distortion_is_undone(tmp_path, model):
    """The balls are far from the principal point. With the coefficients left out pictures and cameras disagree."""
    def load(name, distortion):
        photographs = replace(shoot, distortion=distortion)
        (tmp_path / name).mkdir()
        if model == "transforms":
            return captured(write_transforms(tmp_path / name, photographs), None)
        return captured(write_colmap(tmp_path / name, photographs, model), None)

    shoot = balls(4, 128, 96, (96.0, 96.0), (92.0, 66.0), LENSES[model], aside=(1.2, 0.8))
    capture = load("with", shoot.distortion)
    assert_same_cameras(capture, shoot)
    assert "lens distortion undone" in capture.source
    assert worst_picture(capture) > 31
    assert worst_picture(load("without", (0.0, 0.0, 0.0, 0.0))) < 28


def test_far_out_a_lens_does_not_show_the_picture_again(tmp_path):
    """A strong barrel: the polynomial turns back beyond some angle; nothing is known there."""
    shoot = balls(2, 96, 72, (40.0, 40.0), None, (-0.5, 0, 0, 0))
    scene = captured(write_transforms(tmp_path, shoot), None).scene
    rays = pixel_grid(96, 96) / scene.cameras.focal[0]
    beyond = (rays.norm(dim=-1) ** 2 > 1 / 1.5).reshape(96, 96)
    assert beyond.any() and not scene.valid[0, 0][beyond].any() and scene.valid[0, 0][~beyond][1000] == 1


def test_sizes(tmp_path):
    """Larger and smaller squares, and pictures that were resized after their cameras were found."""
    shoot = balls(4, 96, 72, (120.0, 120.0))
    write_transforms(tmp_path, shoot)
    for size in (32, 96, 160):
        capture = captured(tmp_path, size)
        assert capture.scene.images.shape == (4, 3, size, size)
        assert_same_cameras(capture, shoot)
        assert worst_picture(capture) > 21

    for file in (tmp_path / "images").iterdir():
        Image.open(file).resize((48, 36), Image.Resampling.BOX).save(file)
    capture = captured(tmp_path, 48)
    assert "intrinsics scaled to resized pictures" in capture.source
    assert_same_cameras(capture, shoot)
    assert worst_picture(capture) > 21


def test_small_squares_are_means_of_large_photographs(tmp_path):
    """A checkerboard becomes gray, not another pattern."""
    shoot = balls(2, 96, 96, (120.0, 120.0))
    board = 255 * (np.indices((96, 96)).sum(0) % 2)[..., None].astype(np.uint8)
    rgba = tuple(np.concatenate([np.broadcast_to(board, (96, 96, 3)), x[..., 3:]], -1) for x in shoot.rgba)
    scene = captured(write_transforms(tmp_path, replace(shoot, rgba=rgba)), 32).scene
    inside = scene.images[scene.masks.expand(-1, 3, -1, -1) == 1]
    assert len(inside) > 100 and (inside - 0.5).abs().max() < 0.02


def test_photographs_of_several_sizes_upright_and_across(tmp_path):
    across, upright = balls(3, 48, 36), balls(3, 30, 40, (50.0, 50.0), seed=1)
    paths = captures.write_pictures(tmp_path, upright, names=["a", "b", "c"])
    frames = []
    for shoot, names in ((across, None), (upright, paths)):
        write_transforms(tmp_path, shoot, each=True, paths=names)
        frames += json.loads((tmp_path / "transforms.json").read_text())["frames"]
    (tmp_path / "transforms.json").write_text(json.dumps({"frames": frames}))
    capture = captured(tmp_path, None)
    assert "2 sizes" in capture.source
    cameras = Cameras.cat([across.square_cameras(), upright.square_cameras()])
    found = capture.scene.world.cameras(capture.scene.cameras)
    torch.testing.assert_close(found.focal, cameras.focal, rtol=0, atol=1e-6)
    assert worst_picture(capture) > 21


def test_angles_instead_of_lengths_and_names_without_endings(tmp_path):
    """NeRF-synthetic: `camera_angle_x`, files for inputs and targets with the same names."""
    shoot = balls(6)
    files = {}
    for part, index in (("train", [0, 1, 2, 3]), ("test", [4, 5])):
        captures.write_pictures(tmp_path / part, shoot.at(index))
        (tmp_path / part / "images").rename(tmp_path / part / "r")
        content = {"camera_angle_x": 2 * math.atan(24 / 60), "frames": []}
        for i, matrix in enumerate(shoot.at(index).matrices("opengl")):
            content["frames"].append({"file_path": f"./{part}/r/{i:03d}", "transform_matrix": matrix.tolist()})
        (tmp_path / f"transforms_{part}.json").write_text(json.dumps(content))
        files[part] = content
    capture = captured(tmp_path, None)
    assert (capture.inputs, capture.targets) == ([0, 1, 2, 3], [4, 5])
    assert capture.scene.names[0] == "train_r_000.png" and capture.scene.names[-1] == "test_r_001.png"
    assert capture.source == "NeRF-synthetic, 4 + 2 photographs, 48 x 36 pixels, masks from alpha channels"
    assert_same_cameras(capture, shoot)

    # The angle of the height, too.
    files["train"]["camera_angle_y"] = 2 * math.atan(18 / 80)
    (tmp_path / "transforms_train.json").write_text(json.dumps(files["train"]))
    (tmp_path / "transforms_test.json").unlink()
    capture = captured(tmp_path, None)
    assert capture.targets is None and capture.inputs == [0, 1, 2, 3]
    assert capture.scene.cameras.focal[0].tolist() == pytest.approx([60 / 24, 80 / 24])


@pytest.mark.parametrize("pattern", ["masks/{1}.png", "masks/{0}.png", "masks/{0}", "masks/{1}_mask.png",
                                     "mask/{1}.png", "masks/images/{1}.png", "images/{1}_mask.png"])
def test_habits_of_naming_masks(tmp_path, pattern):
    shoot = balls(3)
    capture = captured(write_transforms(tmp_path, shoot, pattern), None)
    assert "masks from files" in capture.source
    assert worst_picture(capture) > 45


def test_kinds_of_masks(tmp_path):
    """Zeros and ones, one bit, 16 bits, a cut-out, and one that the frame names."""
    shoot = balls(5)
    write_transforms(tmp_path, shoot, "masks/{1}.png")
    mask = [rgba[..., 3] for rgba in shoot.rgba]
    Image.fromarray(mask[0] // 255).save(tmp_path / "masks/000.png")
    Image.fromarray(mask[1]).convert("1").save(tmp_path / "masks/001.png")
    Image.fromarray(mask[2].astype(np.uint16) * 257).save(tmp_path / "masks/002.png")
    Image.fromarray(shoot.rgba[3] // 4 * np.uint8([1, 1, 1, 0]) + shoot.rgba[3] * np.uint8([0, 0, 0, 1])).save(
        tmp_path / "masks/003.png")
    content = json.loads((tmp_path / "transforms.json").read_text())
    content["frames"][4]["mask_path"] = "other/m.png"
    (tmp_path / "other").mkdir()
    (tmp_path / "masks/004.png").rename(tmp_path / "other/m.png")
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    assert worst_picture(captured(tmp_path, None)) > 45


def test_a_stamp_tells_whether_anything_has_changed(tmp_path):
    shoot = balls(3)
    write_transforms(tmp_path, shoot, "masks/{1}.png")
    def stamp():
        return read_capture(tmp_path).settings()["pictures"]

    stamps = [stamp()]
    assert stamp() == stamps[0] and len(stamps[0]) == 16
    os.utime(tmp_path / "masks/001.png", (1, 1))
    stamps.append(stamp())
    content = json.loads((tmp_path / "transforms.json").read_text())
    for change in ({"fl_x": 61.0}, {"k1": 0.01}):
        (tmp_path / "transforms.json").write_text(json.dumps(content | change))
        stamps.append(stamp())
    assert len(set(stamps)) == 4


# ---------------------------------------------------------------------------------------------- the chair, the apple

def chair():
    """Twelve of the chair's photographs, read here from the original files."""
    content = json.loads((CHAIR / "transforms_train.json").read_text())
    frames = content["frames"][::9]
    matrices = torch.tensor([frame["transform_matrix"] for frame in frames], dtype=torch.float64)
    view = captures.FROM_OPENGL @ torch.linalg.inv(matrices)
    rgba = tuple(np.array(Image.open(CHAIR / f"{frame['file_path']}.png")) for frame in frames)
    focal = 100 / math.tan(content["camera_angle_x"] / 2)
    return captures.Shoot(view[:, :3, :3].transpose(1, 2), view[:, :3, 3], 200, 200, (focal, focal), (100.0, 100.0),
                          rgba=rgba)


def distorted(shoot, k1):
    """The photographs as a lens with radial distortion would have taken them."""
    grid = torch.linspace(-1, 1, 401, dtype=torch.float64)[1::2] * shoot.width / 2 / shoot.focal[0]
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    seen = torch.stack([x, y], -1)
    true = seen
    for _ in range(50):
        true = seen / (1 + k1 * true.square().sum(-1, keepdim=True))
    grid = (true * shoot.focal[0] / (shoot.width / 2)).float().expand(len(shoot), -1, -1, -1)
    rgba = torch.from_numpy(np.stack(shoot.rgba)).permute(0, 3, 1, 2).float()
    rgba = torch.nn.functional.grid_sample(rgba, grid, align_corners=False).round().byte()
    return replace(shoot, distortion=(k1, 0.0, 0.0, 0.0), rgba=tuple(rgba.permute(0, 2, 3, 1).numpy()))


@needs_chair
def test_the_chair_directly_by_colmap_and_by_co3d(tmp_path, monkeypatch):
    """The same cameras to 1e-5 after the stored transform, and one field seen alike through them to 50 dB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shoot = chair()
    direct = captured(CHAIR, None)
    assert direct.inputs == list(range(100)) and direct.targets == list(range(100, 120))
    assert "100 + 20 photographs, 200 x 200" in direct.source
    index = list(range(0, 100, 9))
    mine = direct._replace(scene=direct.scene[index])
    assert_same_cameras(mine, shoot)
    rgba = torch.from_numpy(np.stack(shoot.rgba)).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(mine.scene.images, rgba[:, :3] * rgba[:, 3:])
    torch.testing.assert_close(mine.scene.masks, rgba[:, 3:])

    wanted = shoot.square_cameras()
    assert field_psnr(mine.scene.world.cameras(mine.scene.cameras), wanted) > 50
    for name, model, binary in (("text", "PINHOLE", False), ("binary", "SIMPLE_PINHOLE", True),
                                ("radial", "SIMPLE_RADIAL", True)):
        (tmp_path / name).mkdir()
        photographs = distorted(shoot, 0.15) if model == "SIMPLE_RADIAL" else shoot
        capture = captured(write_colmap(tmp_path / name, photographs, model, binary), None)
        assert_same_cameras(capture, shoot)
        assert field_psnr(capture.scene.world.cameras(capture.scene.cameras), wanted) > 50
        least = 30 if model == "SIMPLE_RADIAL" else 99
        assert psnr(capture.scene.images, mine.scene.images).clamp(max=100).min() > least

    # CO3D's reader cuts photographs to the object; cut alike, they are the same.
    write_co3d(tmp_path, shoot)
    scene = load_sequence(tmp_path, "thing", "one", 128)
    photographs = read_capture(CHAIR)
    user = mine.scene.world.cameras(mine.scene.cameras)
    cut = []
    for i, rgba in enumerate(shoot.rgba):
        shot = photographs.shots[index[i]]
        camera = Cameras(user.R[i], user.T[i], shot.focal, shot.principal)
        cut.append(crop_and_resize(rgba[..., :3], rgba[..., 3], camera, 128).camera)
    cut = Cameras.stack(cut)
    for part in ("R", "T", "focal", "principal"):
        torch.testing.assert_close(getattr(cut, part), getattr(scene.cameras, part), rtol=0, atol=1e-5)
    assert field_psnr(cut, scene.cameras) > 50


@needs_apple
def test_the_apple_through_transforms(tmp_path):
    """Real photographs with the axes, the scale and the origin of CO3D, and the same in another world."""
    records = json.loads(gzip.decompress((APPLE / "apple/frame_annotations.jgz").read_bytes()))[:6]
    R = torch.tensor([record["viewpoint"]["R"] for record in records], dtype=torch.float64)
    T = torch.tensor([record["viewpoint"]["T"] for record in records], dtype=torch.float64)
    height, width = records[0]["image"]["size"]
    shoot = captures.Shoot(R, T, width, height, (1.0, 1.0), (width / 2, height / 2))
    (tmp_path / "masks").mkdir()
    for record in records:
        image, mask = APPLE / record["image"]["path"], APPLE / record["mask"]["path"]
        (tmp_path / image.name).symlink_to(image)
        (tmp_path / "masks" / mask.name).symlink_to(mask)

    # Every frame has a focal length of its own.
    def load(shoot, name):
        frames = []
        for record, matrix in zip(records, shoot.matrices("opengl")):
            focal = record["viewpoint"]["focal_length"][0] * width / 2
            frames.append({"file_path": Path(record["image"]["path"]).name, "fl_x": focal,
                           "transform_matrix": matrix.tolist()})
        (tmp_path / "transforms.json").write_text(json.dumps({"w": width, "h": height, "frames": frames}))
        return captured(tmp_path, 128)

    capture = load(shoot, "a")
    focal = torch.tensor([record["viewpoint"]["focal_length"] for record in records], dtype=torch.float64)
    found = capture.scene.world.cameras(capture.scene.cameras)
    scale = torch.tensor([72 / 71.96, 1.0])  # the shorter side of 71.96 pixels is rounded to 72
    torch.testing.assert_close(found.focal, focal * width / height * scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.R, R, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.T, T, rtol=0, atol=1e-5)
    wanted = Cameras(R, T, found.focal, found.principal)
    assert field_psnr(found, wanted, scale=6) > 50

    # Rays through the middles of the masks meet where the world's origin is now.
    xy, depth = capture.scene.cameras.project(torch.zeros(6, 1, 3))
    mask = capture.scene.masks[:, 0]
    axis = 1 - (torch.arange(128) + 0.5) / 64
    middle = torch.stack([(mask.sum(1) @ axis), (mask.sum(2) @ axis)], -1) / mask.sum((1, 2))[:, None]
    assert (xy[:, 0] - middle).abs().max() < 0.08 and depth.min() > 10

    turned = load(shoot.in_world(turn(math.pi / 2, 0.3, 0), 0.1, torch.tensor([1.0, 2.0, 3.0]).double()), "b")
    assert field_psnr(turned.scene.cameras, capture.scene.cameras, scale=6) > 50


def test_photographs_are_cut_to_the_object_and_known_whole(tmp_path):
    """A part of a photograph shows what the whole one shows there; one whose border cuts the object stays whole."""
    shoot = balls(5, 120, 90, (100.0, 100.0))
    cut = np.array(shoot.rgba[1])
    middle = int(np.flatnonzero(cut[..., 3].any(0)).mean())
    cut[:, :middle] = 0
    shoot = replace(shoot, rgba=(shoot.rgba[0], np.roll(cut, -middle, 1), *shoot.rgba[2:]))
    photographs = read_capture(write_transforms(tmp_path, shoot))
    scene, whole = load_pictures(photographs, 64, cut=True), load_pictures(photographs, 64)
    assert whole.whole is None
    for part in ("images", "masks", "valid"):
        assert torch.equal(getattr(scene.whole, part), getattr(whole, part))
        assert torch.equal(getattr(scene, part)[1], getattr(whole, part)[1])

    # As large as the square allows, with as much around it as CO3D has.
    boxes = [mask[0].nonzero().aminmax(dim=0) for mask in scene.masks > 0.4]
    sides = torch.stack([(box.max - box.min + 1).max() for box in boxes]) / 64
    assert (sides[[0, 2, 3, 4]] - 1 / 1.3).abs().max() < 0.05

    # Put back, it is the whole picture, but for what resizing blurs; a pixel beside it is not.
    right = put_back(scene.images.double(), scene.cameras, scene.whole.cameras).float()
    shifted = replace(scene.cameras, principal=scene.cameras.principal + 2 / 32)
    wrong = put_back(scene.images.double(), shifted, scene.whole.cameras).float()
    right, wrong = psnr(right, whole.images), psnr(wrong, whole.images)
    assert right.min() > 27 and (right - wrong).min() > 3, (right, wrong)
