"""How good is a picture? PSNR, SSIM, mask IoU and perceptual distances (Sec. 4).

Every perceptual distance here has one form, that of LPIPS (Zhang et al., CVPR 2018, Eq. 1): run two images through a
network, scale the feature vector at each position of some layers to unit length, and average the (weighted) squared
differences. Three networks fill it:

    VGG16, LPIPS' channel weights         this, and only this, is called LPIPS (`VGG16LPIPS`; needs two public files)
    one trained on the toys               that of the evaluation (`evaluation/attributes.py`); no loss uses it
    the VAE's encoder                     the perceptual term of distillation where the VGG files are not given

SSIM and LPIPS are the released code's [released: common_utils.py:36-63], without the packages that it takes them from.

Shapes: `B` images, `C` channels, `H W` rows and columns of an image, `h w` of a layer.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# ---------------------------------------------------------------------------------------------- pixels and masks

def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1]: (B,), infinite for equal images."""
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of images (B, C, H, W) in [0, 1]: (B,), 1 for equal images.

    As scikit-image computes it by default [released: common_utils.py:52]: uniform windows of 7 x 7 pixels that lie
    inside the image, the covariance of a sample, and the mean over positions and channels. (The Gaussian windows of
    11 x 11 pixels of the SSIM paper read .01 to .03 lower.) Raises `ValueError` for images smaller than a window.
    """
    height, width = a.shape[-2:]
    if min(height, width) < 7:
        raise ValueError(f"SSIM: images of {height} x {width} pixels, at least 7 x 7 are needed")

    # Means, variances and the covariance in every window: (B, C, H - 6, W - 6).
    mean_a = _window_means(a)
    mean_b = _window_means(b)
    sample = 49 / 48  # n / (n - 1): without bias
    var_a = sample * (_window_means(a * a) - mean_a * mean_a)
    var_b = sample * (_window_means(b * b) - mean_b * mean_b)
    covariance = sample * (_window_means(a * b) - mean_a * mean_b)

    # Luminance times contrast and structure, kept finite by Wang et al.'s K1 and K2 (squared, times the data range 1).
    c1 = 0.01 ** 2
    c2 = 0.03 ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    denominator = (mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)
    similarity = numerator / denominator
    return similarity.mean((1, 2, 3))


def _window_means(x: Tensor) -> Tensor:
    """Means of images (B, C, H, W) in all windows of 7 x 7 pixels: (B, C, H - 6, W - 6)."""
    return F.avg_pool2d(x, 7, stride=1)


def iou(opacity: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union of silhouettes (B, 1, H, W) in [0, 1], thresholded at 0.5: (B,), 1 if both are empty."""
    a = (opacity > 0.5).flatten(1)
    b = (mask > 0.5).flatten(1)
    intersection = (a & b).sum(1)
    union = (a | b).sum(1)
    return torch.where(union > 0, intersection / union, 1.0)


# ---------------------------------------------------------------------------------------------- perceptual distances

def perceptual_distance(layers: Callable[[Tensor], Sequence[Tensor]], a: Tensor, b: Tensor,
                        weights: Sequence[Tensor] | None = None) -> Tensor:
    """LPIPS' form (Eq. 1) on what `layers` makes of two batches of images (B, 3, H, W): (B,). Differentiable in both.

    The layers give feature maps (B, C, h, w), each with its own C, h, w. 0 for equal features. With `weights`, one
    (C,) a layer, some channels count more than others.
    """
    total = 0.0
    for i, (x, y) in enumerate(zip(layers(a), layers(b), strict=True)):
        # Scale the features at every position to unit length, and square their difference.
        unit_x = x * _inverse_length(x)
        unit_y = y * _inverse_length(y)
        squares = (unit_x - unit_y).square()  # (B, C, h, w)
        if weights is not None:
            squares = squares * weights[i][:, None, None]

        # Sum over channels, average over positions, and add up the layers.
        total = total + squares.sum(1).mean((1, 2))
    return total


def _inverse_length(x: Tensor) -> Tensor:
    """1 / |x| of vectors along the channels, float32 (B, C, h, w) -> (B, 1, h, w). Of a zero vector it is large and has
    no gradient.
    """
    return x.square().sum(1, keepdim=True).clamp(min=1e-20).rsqrt()


class VGG16LPIPS(nn.Module):
    """LPIPS v0.1 with VGG16, as a metric and as a loss.

    It compares the last ReLU of each of VGG16's five blocks, weighted channel by channel. Its weights are fixed and
    come from two public files, through `released.load_lpips`.
    """
    # Convolutions of every block (Simonyan and Zisserman, 2015, configuration D).
    BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self):
        super().__init__()

        # VGG16 up to its last ReLU, numbered as in torchvision; `taps` are the numbers of the blocks' last ReLUs.
        channels = 3
        self.features = nn.Sequential()
        self.taps = []
        for block in self.BLOCKS:
            if self.taps:
                self.features.append(nn.MaxPool2d(2))
            for width in block:
                self.features.append(nn.Conv2d(channels, width, 3, padding=1))
                self.features.append(nn.ReLU())
                channels = width
            self.taps.append(len(self.features) - 1)

        # How much each channel of a tapped layer counts, in the shape that the LPIPS file has it.
        self.channel_weights = nn.ParameterList()
        for block in self.BLOCKS:
            self.channel_weights.append(torch.ones(1, block[-1], 1, 1))

        # LPIPS' own standardization, of images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False).eval()

    def layers(self, images: Tensor) -> list[Tensor]:
        """VGG16's features of images (B, 3, H, W) in [0, 1], H and W at least 16: five maps, (B, 64, H, W) to
        (B, 512, H/16, W/16)."""
        x = (2 * images - 1 - self.shift) / self.scale
        outputs = []
        for i, module in enumerate(self.features):
            x = module(x)
            if i in self.taps:
                outputs.append(x)
        return outputs

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS between images (B, 3, H, W) in [0, 1]: (B,)."""
        weights = [weight.flatten() for weight in self.channel_weights]
        return perceptual_distance(self.layers, a, b, weights)
