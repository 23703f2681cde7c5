"""Losses: released numbers, ends, blurred pictures."""
import math
from functools import partial

import pytest
import torch

import distillation
from distillation import DistillConfig
from tests.support import parity


def test_losses_parity():
    f = parity.load("losses")
    loss, close = distillation.photometric_loss, partial(parity.assert_close, rtol=1e-5)
    close(loss(f["in_render"], f["in_sil"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_photometric"])
    # the color term and the silhouette term alone: the other one compared with itself
    close(loss(f["in_render"], f["in_mask"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_color_err"])
    close(loss(f["in_rgb"], f["in_sil"], f["in_rgb"], f["in_mask"]).reshape(1), f["out_sil_err"])
    weighted = loss(f["in_render"], f["in_sil"], f["in_rgb"], f["in_mask"], 0.25).reshape(1)
    weight = 0.25 + 0.75 * f["in_mask"]
    color = distillation.pseudo_huber(f["in_render"] - f["in_rgb"])
    silhouette = distillation.pseudo_huber(f["in_sil"] - f["in_mask"])
    close(weighted, ((weight * color).mean() + (weight * silhouette).mean()).reshape(1))
    black = torch.zeros_like(f["in_mask"])
    alone = loss(f["in_render"], f["in_sil"], f["in_rgb"], black, 0.25)  # nothing but background
    close(alone.reshape(1), 0.25 * loss(f["in_render"], f["in_sil"], f["in_rgb"], black).reshape(1))
    close(distillation.opacity_loss(f["in_sil"]).reshape(1), f["out_opacity"])
    mask = distillation.brightness_mask(f["in_eft_rgb"])
    close(mask, f["out_bootstrap_mask"])
    close(loss(f["in_render"], f["in_sil"], f["in_eft_rgb"], mask).reshape(1), f["out_bootstrap_loss"])
    assert DistillConfig().weight_opacity == pytest.approx(f["in_lambda_opacity"].item())


def test_fusion_parity():
    f = parity.load("losses")
    weights = [distillation.fusion_weight(t) for t in f["in_t"].tolist()]
    parity.assert_close(weights, f["out_fusion_weight"], rtol=1e-5)
    error = (f["in_render"] - f["in_pred_img"]).abs().mean().item()
    parity.assert_close([w * error for w in weights], f["out_fusion_loss"], rtol=1e-5)


def test_fusion_weight_at_the_ends():
    """Nothing is learned from a clean image's denoising, everything from pure noise's."""
    assert distillation.fusion_weight(0.0) < 2e-4 and distillation.fusion_weight(1.0) > 1 - 1e-6
    assert distillation.fusion_weight(0.5) == pytest.approx(1 - math.cos(0.508 / 1.008 * math.pi / 2) ** 2, rel=1e-5)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_blur_makes_no_dark_rims(side):
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, :, 4:9, 4:] = 1     # reaches the picture's border
    masks[0, :, 9, 4:] = 0.3     # a soft rim
    masks[1, :, 8, 8] = 0.5      # a single pixel
    color = torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    seen = distillation.blurred(masks, torch.ones_like(masks), side)
    parity.assert_close(distillation.blurred(masks * color, torch.ones_like(masks), side), seen * color,
                        atol=1e-6)
    if side > 1:  # a straight edge is half seen where it is, and the border of the picture darkens nothing
        edge = side // 2
        assert seen[0, 0, 4, 4 + edge:].allclose(torch.tensor((edge + 1) / side))
        assert seen[0, 0, 4 + edge, 4 + edge:].allclose(torch.tensor(1.0))


def test_blur_leaves_out_what_no_picture_shows():
    g = torch.Generator().manual_seed(0)
    images, valid = torch.rand(1, 3, 8, 8, generator=g), torch.ones(1, 1, 8, 8)
    valid[..., 5:, :] = 0
    given = images.clone()
    given[..., 5:, :] = 7.0
    parity.assert_close(distillation.blurred(given, valid, 3)[..., :5, :],
                        distillation.blurred(images[..., :5, :], valid[..., :5, :], 3), atol=1e-6)
    assert not distillation.blurred(given, valid, 3)[..., 6:, :].any()  # and there is no division by 0


def test_a_blur_of_one_pixel_is_the_picture():
    images = torch.rand(2, 3, 8, 8)
    assert distillation.blurred(images, torch.zeros(2, 1, 8, 8), 1) is images
