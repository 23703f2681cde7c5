"""Cameras of a turntable: a thing that turns before one camera is a camera that goes round the thing."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

from photographs import turntable
from photographs.reading import read_capture
from tests.support.captures import cameras_of


def photographs(folder, count, width=60, height=40):
    """A ball's silhouette in all of them."""
    folder.mkdir(parents=True)
    row, column = np.mgrid[:height, :width]
    alpha = 255 * ((row - height / 2) ** 2 + (column - width / 2) ** 2 < 100)
    for i in range(count):
        Image.fromarray(np.dstack([alpha] * 4).astype(np.uint8)).save(folder / f"{i:02d}.png")


@pytest.mark.parametrize("degrees", [360, -360, 180])
def test_a_camera_round_the_table(tmp_path, degrees):
    """Points of a table that turns clockwise, seen from above, are where the first camera saw them turned."""
    photographs(tmp_path / "images", 8)
    argv = [str(tmp_path), "--focal", "72", "--elevation", "30", "--degrees", str(degrees)]
    turntable.command(turntable.parser().parse_args(argv))
    cameras = cameras_of(read_capture(tmp_path))
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).double() - 0.5
    for i in range(8):
        # From above, with x to the right, z points down: clockwise turns right to down, x to z.
        a = math.radians(degrees) * i / 8
        turn = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]]).double()
        seen = cameras[i].to_view(points)
        torch.testing.assert_close(seen, cameras[0].to_view(points @ turn), rtol=0, atol=1e-6)

    # The first camera: four units away, 30 degrees up, looking at the axis; 72 mm are two pictures' widths.
    torch.testing.assert_close(cameras.centers()[0], torch.tensor([0, 2, 2 * 3**0.5]).double(), rtol=0, atol=1e-6)
    assert cameras[0].to_view(torch.zeros(1, 3).double())[0, :2].abs().max() < 1e-6
    assert (cameras.focal - 4).abs().max() < 1e-9
    up = cameras[0].to_view(torch.tensor([[0, 1.0, 0]]).double())[0]
    assert up[1] > 0.8  # +Y of the view is up


@pytest.mark.parametrize("argv, message", [
    (["--focal", "0", "--elevation", "20"], "--focal 0: must be above 0 mm"),
    (["--focal", "nan", "--elevation", "20"], "--focal nan"),
    (["--focal", "50", "--elevation", "90"], "--elevation 90: must be between"),
    (["--focal", "50", "--elevation", "nan"], "--elevation nan"),
    (["--focal", "50", "--elevation", "20", "--degrees", "0"], "--degrees 0"),
    (["--focal", "50", "--elevation", "20", "--degrees", "720"], "--degrees 720")])
def test_numbers_that_make_no_sense(tmp_path, argv, message):
    photographs(tmp_path / "images", 3)
    with pytest.raises(ValueError, match=message):
        turntable.command(turntable.parser().parse_args([str(tmp_path), *argv]))
    assert not (tmp_path / "transforms.json").exists()


def test_what_is_there_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="0 photographs"):
        turntable.write_transforms(tmp_path, 50, 20)
    photographs(tmp_path / "images", 1)
    with pytest.raises(ValueError, match="1 photographs"):
        turntable.write_transforms(tmp_path, 50, 20)
    (tmp_path / "images/00.png").rename(tmp_path / "images/00.PNG")
    with pytest.raises(ValueError, match="1 photographs"):
        turntable.write_transforms(tmp_path, 50, 20)
    (tmp_path / "transforms.json").write_text("mine")
    with pytest.raises(FileExistsError, match="already"):
        turntable.write_transforms(tmp_path, 50, 20)
    assert (tmp_path / "transforms.json").read_text() == "mine"
