"""How good is a picture? PSNR, SSIM, mask IoU and perceptual distances (Sec. 4).

Every perceptual distance here has one form, that of LPIPS (Zhang et al., CVPR 2018, Eq. 1): run two images through a network, scale
the feature vector at each position of some layers to unit length, and average the (weighted) squared differences. Three networks fill it:

    VGG16 with LPIPS' learned channel weights   this, and only this, is called LPIPS (`VGG16LPIPS`; needs the two public files)
    `AttributeNet`, trained on the toys         the perceptual distance of the evaluation; no loss uses it
    the VAE's encoder                           the perceptual term of distillation where the VGG files are not given

Letters: `B` images, `C` channels, `H W` rows and columns of an image, `h w` of a layer, `A` attributes.
"""
from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1]: (B,), infinite for equal images.

    With a mask (B, 1, H, W) in [0, 1] the error is averaged over the mask only.
    """
    error = (a - b).square()
    mask = torch.ones_like(error[:, :1]) if mask is None else mask
    return -10 * ((error * mask).sum((1, 2, 3)) / (error.shape[1] * mask.sum((1, 2, 3)))).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of images (B, C, H, W) in [0, 1]: (B,), 1 for equal images.

    Gaussian windows of 11 x 11 pixels, standard deviation 1.5, that lie inside the image; mean over positions, then over channels.
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM: images of {a.shape[-2]} x {a.shape[-1]} pixels, at least 11 x 11 are needed")
    window = (-torch.arange(-5, 6, device=a.device, dtype=a.dtype).square() / (2 * 1.5 ** 2)).exp()
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        """The Gaussian mean in each window, (B C, 1, H - 10, W - 10)."""
        x = x.flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(x, window[None, None, :, None]), window[None, None, None, :])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a * mean_a, blur(b * b) - mean_b * mean_b
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2  # Wang et al.'s K1, K2, times the data range 1
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return similarity.unflatten(0, a.shape[:2]).mean((1, 2, 3, 4))


def iou(opacity: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union of silhouettes (B, 1, H, W) in [0, 1], each thresholded at 0.5: (B,), 1 where both are empty."""
    a, b = (opacity > 0.5).flatten(1), (mask > 0.5).flatten(1)
    intersection, union = (a & b).sum(1), (a | b).sum(1)
    return torch.where(union > 0, intersection / union, 1.0)


# --- perceptual distances ---

def feature_distance(features_a: Sequence[Tensor], features_b: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """LPIPS' form (Eq. 1) on two lists of feature maps (B, C, h, w), each layer with its own C, h, w: (B,), 0 for equal features.

    Channels are scaled to unit length, squared differences summed over channels (with `weights`, one (C,) a layer), averaged over
    positions, and summed over layers.
    """
    total = 0.0
    for i, (a, b) in enumerate(zip(features_a, features_b, strict=True)):
        squares = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square()  # (B, C, h, w)
        if weights is not None:
            squares = squares * weights[i][:, None, None]
        total = total + squares.sum(1).mean((1, 2))
    return total


def perceptual_distance(layers: Callable[[Tensor], Sequence[Tensor]], a: Tensor, b: Tensor,
                        weights: Sequence[Tensor] | None = None) -> Tensor:
    """`feature_distance` of what `layers` makes of two batches of images (B, 3, H, W): (B,). Differentiable in both."""
    return feature_distance(layers(a), layers(b), weights)


class AttributeNet(nn.Module):
    """A small network that reads the attributes of a toy from one masked image; its layers measure, no loss uses them.

    LPIPS asks a network that learned to name what is in photographs; this one learned to tell toys apart. Batch norm, because
    a normalisation of each image for itself would hide its brightness. Measure in evaluation mode.
    """

    def __init__(self, attributes: int, widths: tuple[int, ...] = (16, 32, 64, 96, 128)):
        super().__init__()
        sizes = (3, *widths)
        self.stages = nn.ModuleList(nn.Sequential(
            nn.Conv2d(sizes[i], sizes[i + 1], 3, 2, 1), nn.BatchNorm2d(sizes[i + 1]), nn.ReLU(),
            nn.Conv2d(sizes[i + 1], sizes[i + 1], 3, 1, 1), nn.BatchNorm2d(sizes[i + 1]), nn.ReLU()) for i in range(len(widths)))
        self.head = nn.Linear(widths[-1], attributes)

    def layers(self, images: Tensor) -> list[Tensor]:
        """The output of every stage for images (B, 3, H, W) in [0, 1]: (B, C, H/2, W/2), (B, C, H/4, W/4), ..."""
        x, outputs = images, []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward(self, images: Tensor) -> Tensor:
        """Attributes (B, A) of images (B, 3, H, W) in [0, 1]."""
        return self.head(self.layers(images)[-1].mean((2, 3)))


class VGG16LPIPS(nn.Module):
    """LPIPS v0.1 with VGG16, as a metric and as a loss: the last ReLU of each of VGG16's five blocks, weighted channel by channel.

    The files are the public ones: VGG16 of torchvision (`vgg16-397923af.pth`) and the linear layers of the LPIPS package (`vgg.pth`).
    """
    BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # convolutions (Simonyan and Zisserman, 2015)
    UNUSED = (r"classifier\.\d+\.(weight|bias)",)  # the three fully connected layers that name the image

    def __init__(self, vgg_file: str | Path, lpips_file: str | Path):
        super().__init__()
        modules, channels, self.taps = [], 3, []
        for block in self.BLOCKS:
            for width in block:
                modules += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
                channels = width
            self.taps.append(len(modules) - 1)
            modules.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*modules[:-1])  # torchvision's numbering: features.0 is the first convolution
        # LPIPS' own standardisation, of images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

        shapes = {f"features.{name}": x.shape for name, x in self.features.state_dict().items()}
        state = read_weights(vgg_file, shapes, self.UNUSED)
        self.features.load_state_dict({name.removeprefix("features."): x for name, x in state.items()})
        shapes = {f"lin{i}.model.1.weight": torch.Size((1, block[-1], 1, 1)) for i, block in enumerate(self.BLOCKS)}
        for i, weight in enumerate(read_weights(lpips_file, shapes).values()):
            if weight.min() < 0:
                raise ValueError(f"{lpips_file}: key 'lin{i}.model.1.weight' has negative weights, LPIPS' are non-negative")
            self.register_buffer(f"weight{i}", weight.flatten())
        self.requires_grad_(False).eval()

    def layers(self, images: Tensor) -> list[Tensor]:
        """VGG16's features of images (B, 3, H, W) in [0, 1], H and W at least 16: five maps at resolutions 1, 1/2, ..., 1/16."""
        x, outputs = (2 * images - 1 - self.shift) / self.scale, []
        for i, module in enumerate(self.features):
            x = module(x)
            if i in self.taps:
                outputs.append(x)
        return outputs

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS between images (B, 3, H, W) in [0, 1]: (B,)."""
        return perceptual_distance(self.layers, a, b, [getattr(self, f"weight{i}") for i in range(len(self.BLOCKS))])


def read_weights(path: str | Path, shapes: dict[str, torch.Size], unused: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a state-dict file, in the order of `shapes` (name -> shape), which they must match exactly.

    Names that fully match an expression in `unused` may be there as well. Nothing but tensors is unpickled.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a PyTorch state dict that loads with weights_only=True ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, a state dict (name -> tensor) is needed")
    for name in state:
        if name not in shapes and not any(re.fullmatch(pattern, str(name)) for pattern in unused):
            raise ValueError(f"{path}: surplus key '{name}', only {next(iter(shapes))} and its like belong here")
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"{path}: key '{name}' is missing, expected with shape {tuple(shape)}")
        found = tuple(state[name].shape) if isinstance(state[name], Tensor) else type(state[name]).__name__
        if found != tuple(shape):
            raise ValueError(f"{path}: key '{name}' has shape {found}, expected {tuple(shape)}")
    return {name: state[name].float() for name in shapes}
