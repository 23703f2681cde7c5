"""Rough input views: how far masks and exposures are from the truth, and that only inputs are rough."""
import math

import pytest
import torch

from tests.support import parity
from training.ranks import Draws
from training.roughness import draw_roughness, roughen

SIDE = 64


def discs(views):
    """Views (20, V, 5, S, S) of a gray disc; their right border shows nothing."""
    distance = torch.hypot(*torch.meshgrid(torch.arange(SIDE) - 31.5, torch.arange(SIDE) - 31.5, indexing="ij"))
    mask = (distance < 18).float()
    valid = torch.ones_like(mask)
    valid[:, -10:] = 0
    images = torch.stack([0.5 * mask] * 3 + [mask, valid])
    return images.expand(20, views, -1, -1, -1), distance


@pytest.fixture(scope="module")
def rough():
    return draw_roughness(Draws(0, 0, 20, range(20)), 10, SIDE)


def test_nothing_rough_changes_nothing(rough):
    images, _ = discs(10)
    same = roughen(images, rough, 0.0)
    assert same.shape == images.shape
    inside = discs(10)[1] < 16
    parity.assert_close(same[..., inside], images[..., inside], atol=1e-6)  # but where the edge is sharp or soft
    assert (same[..., discs(10)[1] > 21] == images[..., discs(10)[1] > 21]).all()


def test_masks_stay_near_the_edge_but_for_bites_and_bumps(rough):
    images, distance = discs(10)
    found = roughen(images, rough._replace(extent=torch.ones(20, 1)), 1.0)[:, :, 3].flatten(0, 1)
    bumps = (found[:, distance > 23].amax(1) > 0).sum()
    assert 15 <= bumps <= 45, "fifteen of a hundred"
    found = found[rough.bite[..., 0].flatten() < 0.85]
    mask = images[0, 0, 3]
    overlap = torch.minimum(found, mask).sum((1, 2)) / torch.maximum(found, mask).sum((1, 2))
    assert 0.5 < overlap.min() < 0.85 and overlap.median() > 0.8 and overlap.max() > 0.93
    assert found[:, distance > 23].max() == 0
    assert 15 <= (found[:, distance < 13].amin(1) == 0).sum() <= 45, "fifteen of a hundred"
    area = found.sum((1, 2)) / mask.sum()
    assert area.min() < 0.85 and area.max() > 1.1, "smaller, larger"


def test_exposures_and_white_balances_differ_between_views(rough):
    images, distance = discs(10)
    colors = roughen(images, rough._replace(extent=torch.ones(20, 1)), 1.0)[:, :, :3]
    unbitten = rough.bite[..., 0] >= 0.15
    gains = 2.2 * (colors[..., distance < 10].mean(-1)[unbitten] / 0.5).log()
    assert gains.mean(1).std().item() == pytest.approx(math.sqrt(0.15**2 + 0.06**2 / 3), rel=0.15)
    assert gains.std(1).mean() > 0.04 and gains.mean().abs() < 0.04
    half = 2.2 * (roughen(images, rough._replace(extent=torch.ones(20, 1)), 0.5)[:, :, :3] / 0.5).log()
    parity.assert_close(half[..., distance < 10].mean(-1)[unbitten], gains / 2, atol=1e-3)


def test_a_mask_that_is_too_large_shows_what_is_behind(rough):
    """And none shows what was not photographed."""
    images, distance = discs(10)
    wide = rough._replace(extent=torch.ones(20, 1), edge=torch.ones(20, 10, 2), gains=0 * rough.gains,
                          behind=torch.tensor([0.4, 1, 0, 0.5]).expand(20, 10, 4), bite=0.9 * torch.ones(20, 10, 3))
    found = roughen(images, wide, 1.0)  # with a bump, too
    fringe = (found[:, :, 3] > 0.99) & (images[:, :, 3] == 0)
    assert fringe.flatten(2).any(2).all()
    colors = found[:, :, :3].movedim(2, -1)[fringe]
    parity.assert_close(colors, torch.tensor([0.5, 0.3, 0.4]).expand(len(colors), -1), atol=0.02)
    assert torch.equal(found[:, :, 4], images[:, :, 4]) and not (found[:, :, 3] * (1 - images[:, :, 4])).any()
