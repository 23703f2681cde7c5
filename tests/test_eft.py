"""The EFT against the released code's numbers, and what must hold for any weights."""
import re

import pytest
import torch

import parity
from cameras import Cameras, pixel_grid
from eft import EFT, PAPER, RELEASED_KEYS, RELEASED_UNUSED


def released_state(state):
    """Released names -> ours by the table; every key is consumed by exactly one rule or is on the unused list."""
    out = {}
    for name, value in state.items():
        rules = [(p, r) for p, r in RELEASED_KEYS if re.match(p, name)]
        unused = [p for p in RELEASED_UNUSED if re.match(p, name)]
        assert len(rules) + len(unused) == 1, f"{name}: {rules}, {unused}"
        if rules:
            new = re.sub(*rules[0], name)
            assert new not in out, new
            out[new] = value
    return out


@pytest.fixture(scope="module")
def paper():
    model = EFT(PAPER)
    model.load_state_dict(released_state(parity.weights("eft")))
    return model.eval()


def cameras_of(f, prefix):
    return Cameras(f[prefix + "R"], f[prefix + "T"], f[prefix + "f"], f[prefix + "c"])


@pytest.mark.parametrize("views", ["set0", "set1"])
def test_parity(paper, views):
    f = parity.load("eft")
    cameras, index = cameras_of(f, "in_cam_"), f["in_views" + views[-1]]
    near, far = f["mid_depth_range"]
    images = f["in_images"][index]
    size = f[f"out_{views}_rgb"].shape[1]
    with torch.no_grad():
        trunk, maps = paper.trunk(images), paper.encode(images)
        features, rgb = paper.image(maps, images, cameras[index], cameras[int(f["in_query"])], size, near, far)
    assert tuple(trunk.shape) == tuple(f[f"mid_{views}_latent_shape"])
    parity.assert_close(trunk[:, ::16, ::5, ::5], f[f"mid_{views}_latent_sample"], std=1e-4)
    parity.assert_close(rgb.permute(1, 2, 0)[None], f[f"out_{views}_rgb"], std=1e-4)
    parity.assert_close(features.permute(1, 2, 0)[None], f[f"out_{views}_features"], std=1e-4)
