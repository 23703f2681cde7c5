"""The autoencoder in whose latent space the diffusion works (Sec. 3.1): images to an eighth of their size, and back.

It is the KL autoencoder of Stable Diffusion v1 (Rombach et al. 2022, their first stage), which SparseFusion takes as it
is and keeps frozen. The encoder is a row of stages: residual blocks, then half the resolution. The decoder is the same
in reverse. The only attention is in the middle, at the coarsest resolution. The defaults of `VAEConfig`
are that network; a `patch` of 2 takes four pixels as one, which saves the most expensive stage.

What differs from the released code: no number. As there, an image's latent is its posterior's mode, not a draw from it
[released: autoencoder.py:302-333].

Shapes: `B` batch, `C` channels, `H W` rows and columns of an image or a map, `h w` those of the latent (an
eighth), `N` positions H * W.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from common.settings import check_numbers, check_ranges

FIRST_LOG_VAR = -4.0  # of a posterior, before training


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder's numbers; the defaults are Stable Diffusion v1's [released: ldm/configs/sd-vae.yaml:5-20]."""
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels of every stage; all but the last halve the resolution
    blocks: int = 2                                 # residual blocks in an encoder stage; a decoder stage has one more
    groups: int = 32                                # number of groups in every GroupNorm
    channels: int = 4                               # number of channels of the latent
    patch: int = 1                                  # side of the squares of pixels that are taken as one
    scale: float = 0.18215                          # of latents, for about unit variance; `train.py` measures its own

    def __post_init__(self):
        check_numbers(self)
        if not self.widths or any(width % self.groups for width in self.widths):
            raise ValueError(f"widths {self.widths}: every stage's channels must be a multiple of {self.groups} groups")
        check_ranges(self, {"blocks": (1, 64), "patch": (1, 64), "scale": (1e-9, 1e9)})

    @property
    def factor(self) -> int:
        """Side of the square of pixels that becomes one pixel of the latent."""
        return self.patch << (len(self.widths) - 1)


# ---------------------------------------------------------------------------------------------- layers

class VAEBlock(nn.Module):
    """Two normalized 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)  # [released: diffusionmodules/model.py:38-39]
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class VAEAttention(nn.Module):
    """Self-attention with one head over all positions, residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Project to queries, keys and values: (B, 1, N, C) each, 1 being the head.
        h = self.norm(x)
        query = self._tokens(self.q(h))
        key = self._tokens(self.k(h))
        value = self._tokens(self.v(h))

        # Attend, and put the positions back into a map.
        h = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        h = h.transpose(1, 2).reshape(x.shape)
        return x + self.out(h)

    @staticmethod
    def _tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2).unsqueeze(1)


class Downsample(nn.Module):
    """Half the resolution, by a convolution of stride 2: (B, C, H, W) -> (B, C, H/2, W/2).

    It pads on the right and the bottom only [released: diffusionmodules/model.py:74-76].
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def residual_blocks(c_in: int, c_out: int, count: int, groups: int) -> list[nn.Module]:
    """`count` residual blocks in a row, of which the first changes the number of channels."""
    first = VAEBlock(c_in, c_out, groups)
    others = [VAEBlock(c_out, c_out, groups) for _ in range(count - 1)]
    return [first, *others]


def middle(channels: int, groups: int) -> nn.Sequential:
    """The part at the coarsest resolution: a residual block, attention, a residual block."""
    before = VAEBlock(channels, channels, groups)
    attention = VAEAttention(channels, groups)
    after = VAEBlock(channels, channels, groups)
    return nn.Sequential(before, attention, after)


def upsample(channels: int) -> nn.Sequential:
    """Twice the resolution, by the nearest neighbor and a convolution: (B, C, H, W) -> (B, C, 2 H, 2 W)."""
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))


# ---------------------------------------------------------------------------------------------- the two halves

class Encoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> mean and log variance of the latent, (B, 2 * channels, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.widths[0]
        last = len(config.widths) - 1
        self.unshuffle = nn.PixelUnshuffle(config.patch)
        self.conv_in = nn.Conv2d(3 * config.patch**2, width, 3, padding=1)

        # From fine to coarse: residual blocks, then half the resolution.
        self.levels = nn.ModuleList()
        for stage, stage_width in enumerate(config.widths):
            blocks = residual_blocks(width, stage_width, config.blocks, config.groups)
            resize = Downsample(stage_width) if stage < last else nn.Identity()
            self.levels.append(nn.Sequential(*blocks, resize))
            width = stage_width

        # At the coarsest resolution: the middle, then mean and log variance.
        self.mid = middle(width, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 2 * config.channels, 3, padding=1)

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of every stage before its downsampling: (B, widths[i], H / s, W / s) with s = patch * 2^i."""
        features = []
        h = self.conv_in(self.unshuffle(x))
        for stage in self.levels:
            # The last module of a stage changes the resolution.
            h = stage[:-1](h)
            features.append(h)
            h = stage[-1](h)
        return features

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(self.unshuffle(x))
        for stage in self.levels:
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents (B, channels, h, w) -> images (B, 3, H, W), about [-1, 1]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        width = config.widths[-1]

        # At the coarsest resolution: from the latent to the middle.
        self.conv_in = nn.Conv2d(config.channels, width, 3, padding=1)
        self.mid = middle(width, config.groups)

        # From coarse to fine: residual blocks, then twice the resolution (the finest stage keeps it).
        self.levels = nn.ModuleList()
        for stage in reversed(range(len(config.widths))):
            stage_width = config.widths[stage]
            blocks = residual_blocks(width, stage_width, config.blocks + 1, config.groups)
            resize = upsample(stage_width) if stage > 0 else nn.Identity()
            self.levels.append(nn.Sequential(*blocks, resize))
            width = stage_width

        # At full resolution: to colors.
        self.norm_out = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3 * config.patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(config.patch)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in self.levels:
            h = stage(h)
        return self.shuffle(self.conv_out(F.silu(self.norm_out(h))))


# ---------------------------------------------------------------------------------------------- the autoencoder

class VAE(nn.Module):
    """The KL autoencoder (Rombach et al. 2022), frozen while EFT and UNet are trained (Sec. 3.1)."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

        # On either side of the latent a 1x1 convolution.
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)

        # Posteriors begin narrow: of channels that are noise at first most would never carry anything.
        nn.init.constant_(self.quant_conv.bias[config.channels:], FIRST_LOG_VAR)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> mean and log variance of the posterior, before scaling: (B, channels, h, w)
        each.

        What is outside [0, 1] is clipped [released: common_utils.py:9-19]; the log variance is clamped to [-30, 20].
        """
        symmetric = (2 * images - 1).clamp(-1, 1).to(self.quant_conv.weight.dtype)
        mean, log_var = self.quant_conv(self.encoder(symmetric)).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> latents (B, channels, h, w): the posterior's mode times the scale."""
        mean, _ = self.moments(images)
        return mean * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, channels, h, w) -> images (B, 3, H, W), float32, about [0, 1]; not clamped, so that gradients
        pass everywhere.
        """
        z = (latents / self.config.scale).to(self.quant_conv.weight.dtype)
        return (self.decoder(self.post_quant_conv(z)).float() + 1) / 2

    def features(self, images: Tensor) -> list[Tensor]:
        """The encoder's features of images (B, 3, H, W) in [0, 1], finest first: (B, widths[i], H / s, W / s) with
        s = patch * 2^i.

        Differentiable in the images.
        """
        return self.encoder.features(2 * images - 1)
