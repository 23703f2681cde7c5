"""What distillation minimizes, in pieces (Sec. 3.2 and supplement): pure functions of pictures.

`distillation.py` says which of them an update adds up.

Letters: `B` batch, `s` side of a rendering, `H W` rows and columns.
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import vldm
from metrics import pseudo_huber


def photometric_loss(color: Tensor, silhouette: Tensor, target: Tensor, mask: Tensor, weight_background: float = 1.0,
                     valid: Tensor | float = 1.0) -> Tensor:
    """Pseudo-Huber color loss plus pseudo-Huber silhouette loss, means over (B, 3, s, s) and (B, 1, s, s): a scalar.

    Pixels outside the mask weigh `weight_background`, those inside 1; those that no photograph shows, where `valid` is
    0, nothing. [released: distillation.py:218-227]
    """
    weight = valid * (weight_background + (1 - weight_background) * mask)
    color_loss = (weight * pseudo_huber(color - target)).mean()
    silhouette_loss = (weight * pseudo_huber(silhouette - mask)).mean()
    return color_loss + silhouette_loss


def opacity_loss(silhouette: Tensor) -> Tensor:
    """mean sqrt(silhouette^2 + 0.01): prefers empty space. A scalar. [released: distillation.py:231-241]"""
    return (silhouette**2 + 0.01).sqrt().mean()


def brightness_mask(images: Tensor) -> Tensor:
    """The silhouette of pictures (B, 3, s, s) on black: where the mean color is over 0.1, (B, 1, s, s) of 0 and 1.

    [released: distillation.py:268-271]
    """
    return (images.mean(1, keepdim=True) > 0.1).to(images.dtype)


def fusion_weight(noise_level: float) -> float:
    """1 - alpha^2 at noise level t in [0, 1]: the weight of the pixels' distance. [released:
    distillation.py:307-310]
    """
    log_snr = vldm.cosine_log_snr(torch.tensor(float(noise_level)))
    return torch.sigmoid(-log_snr).item()


def blurred(images: Tensor, valid: Tensor, side: int) -> Tensor:
    """Means of (B, C, H, W) over squares of `side` pixels a side, an odd number, around each pixel.

    valid (B, 1, H, W) is 0 where pictures show nothing: that, and what is outside of them, does not count.
    Premultiplied colors and their masks are filtered alike, so that the object keeps its color up to the rim.
    """
    # A single pixel is its own mean.
    if side == 1:
        return images

    # Where nothing valid is near, the mean is 0.
    pool = partial(F.avg_pool2d, kernel_size=side, stride=1, padding=side // 2)
    share = pool(valid)
    return pool(images * valid) / torch.where(share > 0, share, 1)
