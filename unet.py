"""The network that predicts the noise in a latent, or v, given the EFT's features of the query view (Sec. 3.1).

It is the UNet of Imagen (Saharia et al. 2022) without text: where Imagen's is conditioned on a sentence, this one sees
a feature map, beside the noisy latent. It goes down and up in stages, a resolution each: three residual blocks, a
transformer block in some, a change of resolution. Every residual block is conditioned on the time, and so is the
attention of blocks and stages, by two tokens. The defaults of `UNetConfig` are the released architecture.

What differs from the released code: no number. What Imagen needs for text is left out.

    z         noisy latent (B, 4, h, w)
    cond      feature map of the query view (B, cond_channels, s, s), s = h * cond_unshuffle
    log_snr   logarithm of the signal-to-noise ratio (B,), which stands for the time
    t         embedding of log_snr (B, time_dim), which modulates the residual blocks
    tokens    the time again, as tokens (B, T, token_dim) that attention sees

Shapes: `B` batch, `C` channels, `H W` rows and columns of a map, `N` tokens (H * W), `T` time tokens, `F` frequencies.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.settings import check_numbers
from gpu.layernorm import layer_norm


@dataclass(frozen=True)
class UNetConfig:
    """The network's numbers; the defaults are the released model's [released: load_model.py:57-69]."""
    channels: int = 4                                          # number of channels of the latent
    cond_channels: int = 256                                   # number of channels of the EFT's feature map
    cond_unshuffle: int = 1                                    # cells of the feature map per latent cell and axis
    widths: tuple[int, ...] = (256, 256, 512, 1024, 1024)      # channels at the start, then after each stage
    attention: tuple[bool, ...] = (False, False, False, True)  # whether a stage has a transformer block
    kernels: tuple[int, ...] = (3, 7, 15)                      # sizes of the first convolutions, side by side
    groups: int = 8                                            # number of groups in every GroupNorm
    heads: int = 8                                             # number of attention heads
    head_dim: int = 64                                         # channels per attention head
    frequencies: int = 8                                       # learned frequencies in the embedding of log-SNR
    time_dim: int = 1024                                       # channels of the embedding of log-SNR
    token_dim: int = 256                                       # channels of a time token
    tokens: int = 2                                            # number of time tokens

    def __post_init__(self):
        check_numbers(self)
        if len(self.widths) != len(self.attention) + 1:
            raise ValueError(f"widths {self.widths}: must be one longer than attention {self.attention}")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"widths {self.widths}: each must be a multiple of {self.groups} groups")
        if not self.kernels or any(kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"kernels {self.kernels}: must be odd numbers, at least one")


# ---------------------------------------------------------------------------------------------- layers

class LayerNormNoBias(nn.Module):
    """Layer normalization over the channels, which are `axis`, with a learned gain and no bias."""

    def __init__(self, channels: int, axis: int = -1):
        super().__init__()
        self.axis = axis
        shape = (channels,) if axis == -1 else (1, channels, 1, 1)
        self.g = nn.Parameter(torch.ones(shape))

    # As a layer of torch has them.
    bias = None
    eps = 1e-5

    @property
    def weight(self) -> Tensor:
        """The gain (C,)."""
        return self.g.flatten()

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(self, x.movedim(self.axis, -1)).movedim(-1, self.axis)


class Attention(nn.Module):
    """Attention with a learned null key and value, for tokens (B, N, C). Two uses of one class:

    self-attention (`cross=False`): all heads share one key and value head, and the context tokens, if any, are more
    keys and values; cross-attention (`cross=True`): keys and values, a pair for every head, come from the context
    tokens alone [released: imagen_pytorch.py:480-566, 731-805].
    """

    def __init__(self, channels: int, config: UNetConfig, context_dim: int | None = None, cross: bool = False):
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.head_dim
        self.cross = cross
        inner = config.heads * config.head_dim

        self.norm = LayerNormNoBias(channels)
        self.norm_out = LayerNormNoBias(channels)
        self.null_kv = nn.Parameter(torch.randn(2, config.head_dim))
        self.q = nn.Linear(channels, inner, bias=False)

        # Keys and values: a pair for every head in cross-attention, else one pair for all.
        self.context = None
        if cross:
            self.kv = nn.Linear(context_dim, 2 * inner, bias=False)
        else:
            self.kv = nn.Linear(channels, 2 * config.head_dim, bias=False)
            if context_dim:
                to_kv = nn.Linear(context_dim, 2 * config.head_dim)
                self.context = nn.Sequential(nn.LayerNorm(context_dim), to_kv)

        self.out = nn.Linear(inner, channels, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, heads * head_dim) -> (B, heads, N, head_dim); one head where there are channels for one."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Tokens x (B, N, C), context (B, T, context_dim) -> (B, N, C)."""
        x = self.norm(x)

        # Queries from the image; keys and values from the image, or from the context in cross-attention.
        query = self.split_heads(self.q(x))                                   # (B, heads, N, head_dim)
        key, value = self.kv(context if self.cross else x).chunk(2, dim=-1)
        key = self.split_heads(key)                                           # (B, heads or 1, N or T, head_dim)
        value = self.split_heads(value)

        # In self-attention the context tokens come first, as additional keys and values.
        if self.context is not None:
            context_key, context_value = self.context(context).chunk(2, dim=-1)
            key = torch.cat([self.split_heads(context_key), key], dim=2)
            value = torch.cat([self.split_heads(context_value), value], dim=2)

        # Before all others the learned null key and value: something to look at where nothing else matters.
        nulls = self.null_kv.to(key.dtype)[:, None, None, None]               # (2, 1, 1, 1, head_dim)
        null_key, null_value = nulls.expand(2, len(x), key.shape[1], 1, self.head_dim)
        key = torch.cat([null_key, key], dim=2)
        value = torch.cat([null_value, value], dim=2)

        # In self-attention all query heads share a single key and value head.
        key = key.expand(-1, self.heads, -1, -1)
        value = value.expand(-1, self.heads, -1, -1)
        h = F.scaled_dot_product_attention(query, key, value)                 # (B, heads, N, head_dim)
        h = h.transpose(1, 2).flatten(2)
        return self.norm_out(self.out(h))


def to_tokens(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as tokens (B, N, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens (B, N, C) as a map of the shape of another, (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(like.shape)


class TransformerBlock(nn.Module):
    """Self-attention with the time tokens as additional keys, and a convolutional feed-forward, both residual.

    x (B, C, H, W), tokens (B, T, token_dim) -> (B, C, H, W).
    """

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.attention = Attention(channels, config, config.token_dim)

        # The feed-forward has a hidden layer of twice the channels [released: imagen_pytorch.py:953-961].
        norm = LayerNormNoBias(channels, axis=1)
        widen = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        norm_hidden = LayerNormNoBias(2 * channels, axis=1)
        narrow = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.feed_forward = nn.Sequential(norm, widen, nn.GELU(), norm_hidden, narrow)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = x + to_map(self.attention(to_tokens(x), tokens), x)
        return x + self.feed_forward(x)


class GlobalContext(nn.Module):
    """A gate from the whole map (Cao et al. 2019): (B, C, H, W) -> a factor in [0, 1] per channel, (B, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.key = nn.Conv2d(channels, 1, 1)
        narrow = nn.Conv2d(channels, channels // 2, 1)
        widen = nn.Conv2d(channels // 2, channels, 1)
        self.net = nn.Sequential(narrow, nn.SiLU(), widen, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        # A mean over all positions, which a softmax weighs.
        weights = self.key(x).flatten(2).softmax(dim=-1)                      # (B, 1, N)
        pooled = torch.einsum("bcn,bin->bc", x.flatten(2), weights)
        return self.net(pooled[..., None, None]).flatten(1)


class ResBlock(nn.Module):
    """Residual block modulated by the time, optionally with cross-attention to the time tokens and with a gate.

    x (B, c_in, H, W), t (B, time_dim), tokens (B, T, token_dim) -> (B, c_out, H, W).
    """

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, gate: bool = False, cross: bool = False):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(config.time_dim, 2 * c_out)

        # What only some blocks have.
        self.cross_attention = Attention(c_out, config, config.token_dim, cross=True) if cross else None
        self.gate = GlobalContext(c_out) if gate else None
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        # First half, and attention to the time tokens.
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.attend(h, tokens)

        # Second half: the time becomes a scale and a shift per channel. Then the gate.
        scale, shift = self.time(t)[..., None, None].chunk(2, dim=1)          # (B, c_out, 1, 1) each
        h = self.norm2(h) * (scale + 1) + shift
        h = self.conv2(F.silu(h))
        if self.gate is not None:
            h = h * self.gate(h)[..., None, None]
        return self.shortcut(x) + h

    def attend(self, h: Tensor, tokens: Tensor) -> Tensor:
        """Cross-attention to the time tokens, residual, or nothing: h (B, c_out, H, W), tokens (B, T, token_dim)."""
        if self.cross_attention is None:
            return h
        return h + to_map(self.cross_attention(to_tokens(h), tokens), h)


class ParallelConv(nn.Module):
    """A 3x3 and a 1x1 convolution, summed: (B, c_in, H, W) -> (B, c_out, H, W).

    The coarsest stage has it in place of a downsampling [released: imagen_pytorch.py:608-610].
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv3 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv1 = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(x) + self.conv1(x)


class UNetStage(nn.Module):
    """One resolution, down or up: three residual blocks, a transformer block or none, a change of resolution.

    Going up, every block takes the current map concatenated with a skip of `c_skip` channels.
    """

    def __init__(self, channels: int, config: UNetConfig, attention: bool, resize: nn.Module, c_skip: int = 0):
        super().__init__()
        first = ResBlock(channels + c_skip, channels, config)
        second = ResBlock(channels + c_skip, channels, config, gate=True)
        third = ResBlock(channels + c_skip, channels, config, gate=True)
        self.blocks = nn.ModuleList([first, second, third])
        self.attention = TransformerBlock(channels, config) if attention else None
        self.resize = resize

    def attend(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The transformer block, or nothing: x (B, C, H, W), tokens (B, T, token_dim) -> (B, C, H, W)."""
        return x if self.attention is None else self.attention(x, tokens)


def split_channels(channels: int, parts: int) -> list[int]:
    """A half, a quarter, ... of the channels; the last part gets the rest."""
    shares = [channels // 2**i for i in range(1, parts)]
    rest = channels - sum(shares)
    return [*shares, rest]


def down_stage(config: UNetConfig, i: int) -> UNetStage:
    """Stage i on the way down, 0 the finest: `widths[i]` channels, `widths[i + 1]` after the change of resolution."""
    c_in = config.widths[i]
    c_out = config.widths[i + 1]

    # Half the resolution, which the coarsest stage keeps.
    if i == len(config.attention) - 1:
        resize = ParallelConv(c_in, c_out)
    else:
        resize = nn.Conv2d(c_in, c_out, 4, stride=2, padding=1)
    return UNetStage(c_in, config, config.attention[i], resize)


def up_stage(config: UNetConfig, i: int) -> UNetStage:
    """Stage i on the way up: `widths[i + 1]` channels, `widths[i]` after the change of resolution."""
    c_in = config.widths[i + 1]
    c_out = config.widths[i]

    # Twice the resolution, channels becoming pixels (Shi et al. 2016). The finest stage keeps its resolution, but draws
    # the layer, so that a seed gives the weights that it always gave.
    widen = nn.Conv2d(c_in, 4 * c_out, 1)
    resize = nn.Sequential(widen, nn.SiLU(), nn.PixelShuffle(2))
    if i == 0:
        resize = nn.Identity()
    return UNetStage(c_in, config, config.attention[i], resize, c_skip=c_out)


# ---------------------------------------------------------------------------------------------- the network

class UNet(nn.Module):
    """Noisy latents and the EFT's features of the query view -> the noise (Sec. 3.1; Saharia et al. 2022)."""

    # What embeds log-SNR stays in float32 on a GPU, since its angles reach hundreds of radians.
    EXACT = ("time_", "token_")

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths = config.widths  # finest first
        stages = range(len(config.attention))

        # First convolutions of several sizes, side by side: the smallest kernel gives half of the channels.
        self.init_convs = nn.ModuleList()
        c_in = config.channels + config.cond_channels * config.cond_unshuffle**2
        shares = split_channels(widths[0], len(config.kernels))
        for kernel, share in zip(config.kernels, shares):
            self.init_convs.append(nn.Conv2d(c_in, share, kernel, padding=kernel // 2))

        # The embedding of log-SNR, and the time tokens.
        self.time_frequencies = nn.Parameter(torch.randn(config.frequencies))
        self.time_hidden = nn.Linear(1 + 2 * config.frequencies, config.time_dim)
        self.time_embed = nn.Linear(config.time_dim, config.time_dim)
        self.time_tokens = nn.Linear(config.time_dim, config.tokens * config.token_dim)
        self.token_norm = nn.LayerNorm(config.token_dim)

        # Down, the middle, up.
        self.down = nn.ModuleList([down_stage(config, i) for i in stages])
        self.up = nn.ModuleList()
        self.mid1 = ResBlock(widths[-1], widths[-1], config, cross=True)
        self.mid2 = ResBlock(widths[-1], widths[-1], config, cross=True)
        self.mid_attention = Attention(widths[-1], config)
        self.up.extend([up_stage(config, i) for i in reversed(stages)])

        # To the noise; starts at zero.
        self.final_block = ResBlock(widths[1], widths[0], config, gate=True)
        self.final_conv = nn.Conv2d(widths[0], config.channels, 3, padding=1)
        nn.init.zeros_(self.final_conv.weight)
        nn.init.zeros_(self.final_conv.bias)

    def embed_time(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """log-SNR (B,) -> what modulates the blocks (B, time_dim), and the time tokens (B, T, token_dim)."""
        # The number itself, and sines and cosines of it.
        x = log_snr.unsqueeze(-1)                                             # (B, 1)
        angle = x * self.time_frequencies * 2 * math.pi                       # (B, F)
        waves = torch.cat([x, angle.sin(), angle.cos()], dim=-1)

        # Two heads on one hidden layer.
        hidden = F.silu(self.time_hidden(waves))
        t = self.time_embed(hidden)
        tokens = self.time_tokens(hidden).unflatten(-1, (self.config.tokens, -1))
        return F.silu(t), self.token_norm(tokens)

    def forward(self, z: Tensor, log_snr: Tensor, cond: Tensor) -> Tensor:
        """Noisy latents (B, 4, h, w), log-SNR (B,), features (B, cond_channels, s, s) -> noise (B, 4, h, w)."""
        # The features before the latent [released: imagen_pytorch.py:1156-1160, 1504].
        cond = F.pixel_unshuffle(cond, self.config.cond_unshuffle)
        x = torch.cat([cond, z], dim=1)
        x = torch.cat([conv(x) for conv in self.init_convs], dim=1)
        return self.trunk(x, log_snr)

    def embed_features(self, cond: Tensor) -> Tensor:
        """What the first convolutions make of features (B, cond_channels, s, s): (B, widths[0], h, w)."""
        cond = F.pixel_unshuffle(cond, self.config.cond_unshuffle).to(self.dtype)
        maps = []
        for conv in self.init_convs:
            weight = conv.weight[:, :cond.shape[1]]
            maps.append(F.conv2d(cond, weight, conv.bias, padding=conv.padding))
        return torch.cat(maps, dim=1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, but those that embed log-SNR: in half precision these stay in float32."""
        return self.final_conv.weight.dtype

    def predict(self, z: Tensor, log_snr: Tensor, embedded: Tensor) -> Tensor:
        """As `forward`, with what `embed_features` made of the features, once for all steps of a sampler."""
        z = z.to(self.dtype)
        maps = []
        for conv in self.init_convs:
            weight = conv.weight[:, -z.shape[1]:]
            maps.append(F.conv2d(z, weight, padding=conv.padding))
        return self.trunk(torch.cat(maps, dim=1) + embedded.to(self.dtype), log_snr)

    def trunk(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """All after the first convolutions: their result (B, widths[0], h, w), log-SNR (B,) -> noise (B, 4, h, w)."""
        t, tokens = self.embed_time(log_snr)
        t = t.to(self.dtype)
        tokens = tokens.to(self.dtype)

        # Down: every stage leaves three skips.
        skips = []
        for stage in self.down:
            x = stage.blocks[0](x, t, tokens)
            x = stage.blocks[1](x, t, tokens)
            skips.append(x)
            x = stage.blocks[2](x, t, tokens)
            skips.append(x)
            x = stage.attend(x, tokens)
            skips.append(x)
            x = stage.resize(x)

        # The middle.
        x = self.mid1(x, t, tokens)
        x = x + to_map(self.mid_attention(to_tokens(x)), x)
        x = self.mid2(x, t, tokens)

        # Up: every block takes the latest skip that is left.
        for stage in self.up:
            for block in stage.blocks:
                skip = skips.pop() * 2**-0.5  # [released: imagen_pytorch.py:1283]
                x = block(torch.cat([x, skip], dim=1), t, tokens)
            x = stage.attend(x, tokens)
            x = stage.resize(x)
        return self.final_conv(self.final_block(x, t, tokens))
