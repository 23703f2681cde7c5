"""The page of a result: its data lead back to what they were made of, and nothing in them is more than data."""
import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cameras import Similarity
from export import page
from export.mesh import Mesh
from export.orbit import orbit_around
from export.pictures import Views
from tests.support.small import ball

RESULT = {"sequence": "</script><b>&", "target_frames": ["2"], "seconds": 1.0}


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype).reshape(-1, 3)


def picture(address):
    kind, data = address.split(",")
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture(scope="module")
def shown():
    """A page's data of a ball in a world of its own, the scene, the orbit and the mesh."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    scene = replace(ball(5, 32), world=Similarity(turn * turn.det(), 7.0, torch.tensor([50.0, -20, 9]).double()))
    middle = scene.world.points(torch.zeros(3).double())
    orbit = orbit_around(scene.user_cameras(), middle)
    vertices = torch.tensor([[0.8, 0, 0], [0, 0.8, 0], [0, 0, 0.8]])
    normals = vertices / 0.8 @ scene.world.R.T.float()
    mesh = Mesh(scene.world.points(vertices), torch.tensor([[0, 1, 2]]), normals, torch.eye(3))

    # Opacity, color and depth say which picture it is.
    number = torch.arange(6.0)[:, None, None, None].expand(6, 1, 16, 16) / 5
    opacity = 0.6 + 0.4 * number
    turntable = Views(opacity * number.expand(-1, 3, -1, -1), opacity, opacity * (2 + number))
    losses = {"input_loss": torch.arange(1000.0), "bootstrap_loss": torch.full((1000,), -1.0)}
    losses["bootstrap_loss"][4:8] = 0.5
    pictures = {"ngp": Views(1 - scene.images[[2]], None)}
    data = page.page_data(scene, [4, 1], [2], pictures, orbit, turntable, mesh, losses)
    return data, scene, orbit, mesh


def test_the_mesh(shown):
    """Vertices lie where they were, up to 16 bits, and normals point where they did."""
    data, scene, orbit, mesh = shown
    vertices = array(data["mesh"]["vertices"], "<i2") / 32767 * data["mesh"]["reach"]
    back = torch.from_numpy(vertices) * orbit.distance @ orbit.axes + orbit.middle
    assert (back - mesh.vertices).abs().max() < 1e-4 * orbit.distance
    normals = torch.from_numpy(array(data["mesh"]["normals"], "i1") / 127) @ orbit.axes
    assert (normals - mesh.normals).abs().max() < 0.02
    assert (array(data["mesh"]["colors"], "u1") == 255 * np.eye(3)).all()
    assert array(data["mesh"]["faces"], "<i4").tolist() == [[0, 1, 2]]


def test_the_cameras_stand_round_the_object(shown):
    """A photograph's corners are seen from its camera in the corners of its picture."""
    data, scene, orbit, _ = shown
    assert [x["name"] for x in data["inputs"]] == [scene.names[4], scene.names[1]]
    for view, x in zip((4, 1), data["inputs"]):
        places = torch.tensor(x["places"]).double() * orbit.distance @ orbit.axes + orbit.middle
        camera = scene.user_cameras()[view]
        assert (places[0] - camera.centers()).norm() < 1e-5 * orbit.distance
        xy, depth = camera.project(places[1:])
        assert (xy - torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])).abs().max() < 1e-4
        assert (depth > 0).all() and depth.max() < orbit.distance
        truth = scene.images[view].permute(1, 2, 0).numpy() * 255
        assert np.abs(picture(x["image"]) - truth).mean() < 6


def test_the_first_row_is_the_lowest_and_pictures_follow_the_azimuth(shown):
    data, _, orbit, _ = shown
    assert data["orbit"]["rows"] == sorted(data["orbit"]["rows"]) and data["turntable"]["frames"] == 2
    color, depth = picture(data["turntable"]["color"]), picture(data["turntable"]["depth"])
    assert color.shape == depth.shape == (48, 32, 4)
    for i in range(6):
        row, column = divmod(i, 2)
        center = (16 * row + 8, 16 * column + 8)
        assert abs(int(color[center][0]) - 255 * i / 5) < 8         # not multiplied by the opacity
        assert abs(int(color[center][3]) - 255 * (0.6 + 0.08 * i)) < 8
        assert abs(int(depth[center][0]) - 255 * (1 - 0.9 * i / 5)) < 8  # the nearest is white

    # The camera of azimuth 90 degrees is where the page's own formula puts it.
    eye = orbit.local(orbit.cameras(4, orbit.elevation[None]).centers())[1]
    e = orbit.elevation
    assert (eye - torch.stack([torch.zeros_like(e), e.sin(), e.cos()])).abs().max() < 1e-9


def test_losses_are_means_where_they_were_used(shown):
    losses = shown[0]["losses"]
    assert losses.keys() == {"input_loss", "bootstrap_loss"}
    assert len(losses["input_loss"]) == page.CURVE_POINTS and all(x == y for x, y in losses["input_loss"])
    assert losses["bootstrap_loss"] == [[4.0, 0.5], [5.0, 0.5], [6.0, 0.5], [7.0, 0.5]]


def test_nothing_in_the_data_ends_their_element(shown, tmp_path):
    """The data are read back from the page as they were; the sequence's name is no part of the page."""
    page.write_page(tmp_path / "index.html", shown[0], RESULT)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    start = '<script type="application/json" id="data">'
    assert text.count("</script>") == 2 and "<b>&" not in text and page.PLACE not in text
    data = json.loads(text.split(start)[1].split("</script>")[0])
    assert data == shown[0] | {"result": RESULT}


def test_the_page_names_nothing_to_fetch():
    template = page.TEMPLATE.read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:;" in template
    assert not [word for word in ("http:", "https:", "src=", "import", "url(", "fetch", "//cdn") if word in template]


def test_a_field_that_shows_nothing(shown):
    """An empty mesh and pictures without anything opaque make a page, too."""
    _, scene, orbit, _ = shown
    nothing = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0, 3))
    black = Views(torch.zeros(3, 3, 8, 8), torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 8, 8))
    data = page.page_data(scene, [0], [1], {"ngp": Views(scene.images[[1]], None)}, orbit, black, nothing, {})
    assert data["mesh"]["vertices"] == "" and json.dumps(data, allow_nan=False)
