"""A scene from arrays: the same whatever the axes and the world, and one line for whatever is wrong."""
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from metrics import psnr
from photographs.arrays import scene_from_arrays
from reconstruction import reconstruct
from tests.support.captures import balls, captured, turn, write_transforms
from tests.support.small import SHORT

SHOOT = balls(6, 96, 80, (120.0, 125.0))
SMALL = replace(SHORT, iterations=40, bootstrap=0, image_size=48)
FLIPS = {"opencv": [-1.0, -1, 1], "opengl": [-1.0, 1, -1]}


def arrays(shoot=SHOOT, axes="opencv"):
    """The arguments for a shoot."""
    rgba = np.stack(shoot.rgba)
    R, T = shoot.R, shoot.T
    if axes != "pytorch3d":
        flip = torch.tensor(FLIPS[axes], dtype=torch.float64)
        R, T = (R * flip).transpose(1, 2), T * flip
    K = np.array([[shoot.focal[0], 0, shoot.principal[0]], [0, shoot.focal[1], shoot.principal[1]], [0, 0, 1]])
    return {"images": rgba[..., :3], "masks": rgba[..., 3], "R": R.numpy(), "T": T.numpy(), "K": K, "axes": axes}


def test_arrays_are_the_scene_of_the_same_files(tmp_path):
    scene = scene_from_arrays(**arrays(), size=48)
    read = captured(write_transforms(tmp_path, SHOOT), 48, cut=True).scene
    for part in ("images", "masks", "valid"):
        torch.testing.assert_close(getattr(scene, part), getattr(read, part), rtol=0, atol=1e-6)
        torch.testing.assert_close(getattr(scene.whole, part), getattr(read.whole, part), rtol=0, atol=1e-6)
    torch.testing.assert_close(scene.cameras.T, read.cameras.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("axes, scale, shift", [
    ("opengl", 0.01, (0.0, 0.0, 0.0)), ("pytorch3d", 100.0, (3e4, -5e4, 10.0)), ("opencv", 1.0, (7.0, 0.0, -2.0))])
def test_results_are_in_the_arrays_world(axes, scale, shift):
    """Pictures and mesh of a world that is turned, scaled and shifted are those of the first one, moved along."""
    R, shift = turn(0.4, -2.0, 0.9), torch.tensor(shift, dtype=torch.float64)
    seen = []
    for shoot, way in ((SHOOT, "opencv"), (SHOOT.in_world(R, scale, shift), axes)):
        scene = scene_from_arrays(**arrays(shoot, way), size=48)
        found = reconstruct(scene, [0, 2, 4], config=SMALL)
        cameras = shoot.square_cameras()[[1, 3]]
        seen.append((found.render(cameras, 32).images, found.mesh().vertices.double()))
    assert psnr(*(images for images, _ in seen)).min() > 50 and seen[0][0].max() > 0.3
    (_, first), (_, second) = seen
    moved = scale * first @ R.T + shift
    assert len(first) == len(second) > 100
    assert (moved.mean(0) - second.mean(0)).norm() < 0.01 * scale


def spoil(name, value, at=None):
    """Arguments of which one is something else, or one number in it."""
    given = arrays()
    if at is not None:
        changed = np.array(given[name], dtype=np.float64)
        changed[at] = value
        value = changed
    return given | {name: value}


@pytest.mark.parametrize("given, message", [
    (spoil("images", SHOOT.rgba), "images[0]: its shape is (80, 96, 4) instead of (H, W, 3)"),
    (spoil("images", np.ones((6, 80, 96, 3)) * 255), "images[0]: floats from 255 to 255, not in [0, 1]"),
    (spoil("images", np.ones((6, 80, 96, 3), int)), "images[0]: int64 numbers; uint8, or floats in [0, 1]"),
    (spoil("images", np.ones((1, 80, 96, 3))), "images: 1 of them; a scene needs two or more"),
    (spoil("masks", np.ones((6, 96, 80))), "masks[0]: its shape is (96, 80) instead of (80, 96), that of its image"),
    (spoil("masks", np.ones((5, 80, 96))), "masks: 5 of them for 6 images"),
    (spoil("masks", np.zeros((6, 80, 96))), "masks[0]: the mask is empty"),
    (spoil("R", np.ones((6, 4, 4))), "R: its shape is (6, 4, 4) instead of (6, 3, 3)"),
    (spoil("R", 2.0, (3, 1, 1)), "R[3]: no rotation"),
    (spoil("R", -arrays()["R"]), "R[0]: a reflection"),
    (spoil("T", "here"), "T: no array of numbers"),
    (spoil("T", np.inf, (2, 0)), "T: a number in it is not finite"),
    (spoil("T", np.tile([0.0, 0.0, 5.0], (6, 1)) * 0), "all cameras are at one place"),
    (spoil("K", np.eye(4)), "K: its shape is (4, 4) instead of (6, 3, 3)"),
    (spoil("K", -1.0, (0, 0)), "K: not [[fx, 0, cx]"),
    (spoil("axes", "blender"), "axes 'blender' are none of opencv, opengl, pytorch3d"),
    (spoil("T", arrays()["T"] * [1, 1, -1]), "the cameras do not look at one place"),
    (spoil("masks", [np.pad(np.ones((9, 9)), ((0, 71), (87, 0)) if i % 2 else ((71, 0), (0, 87))) for i in range(6)]),
     "no part of space"),
])
def test_what_is_wrong_is_said_in_one_line(given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        scene_from_arrays(**given, size=32)
    assert "\n" not in str(e.value)
