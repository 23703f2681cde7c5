"""The view-conditioned latent diffusion model (Sec. 3.1): a VAE, a UNet that predicts noise, the diffusion, its samplers.

In the order of the file: the KL autoencoder of Stable Diffusion v1 (Rombach et al. 2022); the Imagen-style UNet (Saharia et al.
2022) that sees the noisy latent next to the EFT's feature map; the continuous-time diffusion (Kingma et al. 2021); ancestral
sampling and the multi-step PLMS denoising (Liu et al. 2022) that distillation calls. `PAPER` is the released architecture,
`NANO` the same classes for the sample category.

    t           time in [0, 1]; 0 is the clean latent
    log_snr     log(alpha^2 / sigma^2), decreasing in t; what the network is told instead of t
    alpha,sigma z_t = alpha x0 + sigma eps, alpha^2 = sigmoid(log_snr) (DDPM's alpha-bar, DDIM's alpha)
    s           the next time on the way down, s < t

What differs from the released code: PLMS is deterministic as published (`ancestral=True` is the released one, which draws fresh
noise after every multistep estimate), and it starts from the noised latent at every level (`unnoised_start=True`: as released,
levels of 0.99 and more start from the clean one).

Letters: `B` batch, `C` channels, `H W` rows and columns, `N` positions H * W (and context tokens), `F` frequencies.
"""
from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---------------------------------------------------------------------------------------------- the autoencoder


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder's numbers; defaults are Stable Diffusion v1's."""
    widths: tuple[int, ...] = (128, 256, 512, 512)  # channels per level; f = 2^(levels - 1) = 8
    blocks: int = 2                                 # residual blocks a level (the decoder has one more)
    groups: int = 32                                # of every GroupNorm
    channels: int = 4                               # of the latent
    scale: float = 0.18215                          # multiplies the latent: brings it to about unit variance


class VAEBlock(nn.Module):
    """Two normalised 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class VAEAttention(nn.Module):
    """Self-attention with one head over all positions, residual: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, N, C)
        h = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Stride-2 convolution with the padding on the right and bottom only, as in Stable Diffusion."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> mean and log variance of the latent, (B, 2 * channels, H/f, W/f)."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, c.widths[0], 3, padding=1)
        self.levels, width = nn.ModuleList(), c.widths[0]
        for i, w in enumerate(c.widths):
            blocks = [VAEBlock(width if j == 0 else w, w, c.groups) for j in range(c.blocks)]
            self.levels.append(nn.Sequential(*blocks, Downsample(w) if i + 1 < len(c.widths) else nn.Identity()))
            width = w
        self.mid = nn.Sequential(VAEBlock(width, width, c.groups), VAEAttention(width, c.groups), VAEBlock(width, width, c.groups))
        self.norm_out, self.conv_out = nn.GroupNorm(c.groups, width, eps=1e-6), nn.Conv2d(width, 2 * c.channels, 3, padding=1)

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of every level before its downsampling: (B, widths[i], H / 2^i, W / 2^i)."""
        h, taps = self.conv_in(x), []
        for level in self.levels:
            h = level[:-1](h)
            taps.append(h)
            h = level[-1](h)
        return taps

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.mid(self.features(x)[-1]))))


class Decoder(nn.Module):
    """Latents (B, channels, h, w) -> images (B, 3, f h, f w), about [-1, 1]."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        width = c.widths[-1]
        self.conv_in = nn.Conv2d(c.channels, width, 3, padding=1)
        self.mid = nn.Sequential(VAEBlock(width, width, c.groups), VAEAttention(width, c.groups), VAEBlock(width, width, c.groups))
        self.levels = nn.ModuleList()  # coarsest first
        for i, w in reversed(list(enumerate(c.widths))):
            blocks = [VAEBlock(width if j == 0 else w, w, c.groups) for j in range(c.blocks + 1)]
            up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(w, w, 3, padding=1)) if i > 0 else nn.Identity()  # nearest
            self.levels.append(nn.Sequential(*blocks, up))
            width = w
        self.norm_out, self.conv_out = nn.GroupNorm(c.groups, width, eps=1e-6), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """The KL autoencoder (Rombach et al. 2022, the first stage); frozen while the rest is trained (Sec. 3.1)."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = nn.Conv2d(config.channels, config.channels, 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> posterior mean and log variance (clamped to [-30, 20]), unscaled, (B, 4, h, w) each."""
        mean, log_var = self.quant_conv(self.encoder((2 * images - 1).clamp(-1, 1))).chunk(2, dim=1)
        return mean, log_var.clamp(-30, 20)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> latents (B, 4, H/8, W/8): the posterior's mode times the scale."""
        return self.moments(images)[0] * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w) in about [0, 1] (not clamped, so that it can be trained)."""
        return (self.decoder(self.post_quant_conv(latents / self.config.scale)) + 1) / 2


# ---------------------------------------------------------------------------------------------- the UNet


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser's numbers; defaults are the released model's."""
    channels: int = 4                                      # of the latent
    cond_channels: int = 256                               # of the EFT feature map
    cond_unshuffle: int = 1                                # feature map cells a latent cell, per axis; folded into channels
    widths: tuple[int, ...] = (256, 256, 512, 1024, 1024)  # after the first convolution, then after each level
    attention: tuple[bool, ...] = (False, False, False, True)  # transformer block in each level
    kernels: tuple[int, ...] = (3, 7, 15)                  # of the parallel first convolutions
    groups: int = 8                                        # of every GroupNorm
    heads: int = 8                                         # of attention, which share one key/value head
    head_dim: int = 64
    frequencies: int = 8                                   # of the learned sinusoidal embedding of log-SNR
    time_dim: int = 1024                                   # of its hidden layer
    token_dim: int = 256                                   # of the time tokens that attention sees
    tokens: int = 2                                        # number of time tokens


class Gain(nn.Module):
    """Layer normalisation over `axis` with a gain and no bias."""

    def __init__(self, c: int, axis: int = -1):
        super().__init__()
        self.g, self.axis = nn.Parameter(torch.ones((c,) if axis == -1 else (1, c, 1, 1))), axis

    def forward(self, x: Tensor) -> Tensor:
        g = self.g.flatten()
        return F.layer_norm(x.movedim(self.axis, -1), g.shape, g).movedim(-1, self.axis)


class Attention(nn.Module):
    """Attention with a learned null key/value; (B, N, C) queries. Two uses of one class:

    self-attention (`cross=False`): all heads share one key/value head; the context tokens, if any, are extra keys and values;
    cross-attention (`cross=True`): keys and values, a pair for every head, come from the context tokens alone.
    """

    def __init__(self, c: int, heads: int, head_dim: int, context_dim: int | None = None, cross: bool = False):
        super().__init__()
        self.heads, self.head_dim, self.cross = heads, head_dim, cross
        self.norm, self.norm_out = Gain(c), Gain(c)
        self.null_kv = nn.Parameter(torch.randn(2, head_dim))
        self.q = nn.Linear(c, heads * head_dim, bias=False)
        self.kv = nn.Linear(context_dim if cross else c, 2 * head_dim * (heads if cross else 1), bias=False)
        self.context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, 2 * head_dim)) if context_dim and not cross else None
        self.out = nn.Linear(heads * head_dim, c, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads or 1, N, head_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        pairs = [self.kv(context if self.cross else x)]
        if self.context is not None:
            pairs.insert(0, self.context(context))
        q, k, v = self._heads(self.q(x)), *(torch.cat([self._heads(p) for p in part], 2) for part in zip(*(p.chunk(2, -1) for p in pairs)))
        null_k, null_v = self.null_kv.to(k.dtype).reshape(2, 1, 1, 1, -1).expand(-1, len(x), k.shape[1], 1, -1)
        k, v = torch.cat([null_k, k], 2), torch.cat([null_v, v], 2)
        h = F.scaled_dot_product_attention(q, k.expand(-1, self.heads, -1, -1), v.expand(-1, self.heads, -1, -1))
        return self.norm_out(self.out(h.transpose(1, 2).flatten(2)))


def _tokens(f: Callable, x: Tensor, *args) -> Tensor:
    """Apply `f` on (B, N, C) tokens to a map (B, C, H, W)."""
    return f(x.flatten(2).transpose(1, 2), *args).transpose(1, 2).reshape(x.shape)


class TransformerBlock(nn.Module):
    """Self-attention (with the time tokens as extra keys) and a convolutional feed-forward, both residual: (B, C, H, W)."""

    def __init__(self, c: int, u: UNetConfig):
        super().__init__()
        self.attention = Attention(c, u.heads, u.head_dim, u.token_dim)
        self.feed_forward = nn.Sequential(Gain(c, 1), nn.Conv2d(c, 2 * c, 1, bias=False), nn.GELU(), Gain(2 * c, 1),
                                          nn.Conv2d(2 * c, c, 1, bias=False))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + _tokens(self.attention, x, context)
        return x + self.feed_forward(x)


class GlobalContext(nn.Module):
    """Attention-pooled gate (Cao et al. 2019, GCNet): (B, C, H, W) -> a factor per channel in [0, 1], (B, C, 1, 1)."""

    def __init__(self, c: int):
        super().__init__()
        self.key = nn.Conv2d(c, 1, 1)
        self.net = nn.Sequential(nn.Conv2d(c, c // 2, 1), nn.SiLU(), nn.Conv2d(c // 2, c, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        weights = self.key(x).flatten(2).softmax(-1)             # (B, 1, N)
        pooled = torch.einsum("bcn,bin->bc", x.flatten(2), weights)
        return self.net(pooled[..., None, None])


class ResBlock(nn.Module):
    """Residual block modulated by time, optionally with cross-attention to the time tokens and a global-context gate."""

    def __init__(self, c_in: int, c_out: int, u: UNetConfig, gate: bool = False, cross: bool = False):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(u.groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(u.groups, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(u.time_dim, 2 * c_out)
        self.cross_attention = Attention(c_out, u.heads, u.head_dim, u.token_dim, cross=True) if cross else None
        self.gate = GlobalContext(c_out) if gate else None
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(t))[..., None, None].chunk(2, dim=1)  # (B, c_out, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        if self.cross_attention is not None:
            h = h + _tokens(self.cross_attention, h, context)
        h = self.conv2(F.silu((scale + 1) * self.norm2(h) + shift))
        if self.gate is not None:
            h = h * self.gate(h)
        return h + self.shortcut(x)


class Parallel(nn.Module):
    """The last level's stand-in for downsampling: a 3x3 and a 1x1 convolution, summed."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv3, self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(x) + self.conv1(x)


class Level(nn.Module):
    """One resolution of the UNet, down or up: three residual blocks, a transformer block (or none), a change of resolution.

    Going up, every block takes the current map concatenated with a skip of `c_skip` channels.
    """

    def __init__(self, c: int, u: UNetConfig, attention: bool, resize: nn.Module, c_skip: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c + c_skip, c, u, gate=i > 0) for i in range(3))
        self.attention = TransformerBlock(c, u) if attention else None
        self.resize = resize

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        return x if self.attention is None else self.attention(x, context)


class UNet(nn.Module):
    """The denoiser: a noisy latent and the EFT's features of the query view -> the noise in it (Sec. 3.1; Saharia et al. 2022)."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = u = config
        c_in, w = u.channels + u.cond_channels * u.cond_unshuffle**2, u.widths
        halves = [w[0] >> i for i in range(1, len(u.kernels))]  # 1/2, 1/4, ... of the channels; the last kernel gets the rest
        self.init_convs = nn.ModuleList(nn.Conv2d(c_in, c, k, padding=k // 2) for k, c in zip(u.kernels, [*halves, w[0] - sum(halves)]))
        self.time_frequencies = nn.Parameter(torch.randn(u.frequencies))
        self.time_hidden, self.time_embed = nn.Linear(1 + 2 * u.frequencies, u.time_dim), nn.Linear(u.time_dim, u.time_dim)
        self.time_tokens, self.token_norm = nn.Linear(u.time_dim, u.tokens * u.token_dim), nn.LayerNorm(u.token_dim)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        last = len(u.attention) - 1
        for i, attention in enumerate(u.attention):
            resize = nn.Conv2d(w[i], w[i + 1], 4, stride=2, padding=1) if i < last else Parallel(w[i], w[i + 1])
            self.down.append(Level(w[i], u, attention, resize))
        self.mid1, self.mid2 = (ResBlock(w[-1], w[-1], u, cross=True) for _ in range(2))
        self.mid_attention = Attention(w[-1], u.heads, u.head_dim)
        for i, attention in reversed(list(enumerate(u.attention))):
            shuffle = nn.Sequential(nn.Conv2d(w[i + 1], 4 * w[i], 1), nn.SiLU(), nn.PixelShuffle(2))
            self.up.append(Level(w[i + 1], u, attention, shuffle if i > 0 else nn.Identity(), c_skip=w[i]))
        self.final_block, self.final_conv = ResBlock(w[1], w[0], u, gate=True), nn.Conv2d(w[0], u.channels, 3, padding=1)
        nn.init.zeros_(self.final_conv.weight), nn.init.zeros_(self.final_conv.bias)

    def embed_time(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """log-SNR (B,) -> what modulates the blocks (B, time_dim) and the time tokens (B, tokens, token_dim)."""
        x = log_snr.unsqueeze(-1)
        angle = x * self.time_frequencies * 2 * math.pi                                           # (B, F)
        hidden = F.silu(self.time_hidden(torch.cat([x, angle.sin(), angle.cos()], -1)))
        return self.time_embed(hidden), self.token_norm(self.time_tokens(hidden).unflatten(-1, (self.config.tokens, -1)))

    def forward(self, z: Tensor, log_snr: Tensor, cond: Tensor) -> Tensor:
        """Noisy latents (B, 4, h, w), log-SNR (B,), features (B, C, h, w) -> predicted noise (B, 4, h, w)."""
        dtype = self.final_conv.weight.dtype  # half precision in `GraphedUNet`
        x = torch.cat([F.pixel_unshuffle(cond, self.config.cond_unshuffle), z], 1).to(dtype)  # conditioning first, as released
        x = torch.cat([conv(x) for conv in self.init_convs], 1)
        t, tokens = (e.to(dtype) for e in self.embed_time(log_snr))
        skips = []
        for level in self.down:
            x = level.blocks[0](x, t, tokens)
            for block in level.blocks[1:]:
                x = block(x, t, tokens)
                skips.append(x)
            x = level.attend(x, tokens)
            skips.append(x)
            x = level.resize(x)
        x = self.mid1(x, t, tokens)
        x = x + _tokens(self.mid_attention, x)
        x = self.mid2(x, t, tokens)
        for level in self.up:
            for block in level.blocks:
                x = block(torch.cat([x, skips.pop() * 2**-0.5], 1), t, tokens)
            x = level.resize(level.attend(x, tokens))
        return self.final_conv(self.final_block(x, t, tokens))


class GraphedUNet:
    """A frozen copy of a UNet for inference on CUDA: half precision, channels last, one CUDA graph for every shape of input.

    At batch 1 the forward pass is about a thousand kernels of microseconds, and launching them one by one takes longer than they do.
    float16 rather than bfloat16: eps is off by 0.0016 instead of 0.013 of its spread, and activations (about 15) are nowhere near its
    largest number, 65504. What embeds log-SNR stays in float32, since its angles reach hundreds of radians. Later changes of the
    UNet's weights are not seen.
    """

    def __init__(self, unet: UNet):
        self.unet, self.graphs = copy.deepcopy(unet).eval().requires_grad_(False), {}
        for name, part in self.unet.named_children():
            if not name.startswith(("time_", "token_")):
                part.to(torch.float16, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """As `UNet.forward`, without gradients; the result is float32."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture([x.clone() for x in inputs])
        graph, buffers, result = self.graphs[shapes]
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x)
        graph.replay()
        return result.clone()  # every replay writes to the same place

    def capture(self, buffers: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """The graph of one forward pass, the buffers it reads and the tensor it writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            for _ in range(3):  # cuDNN tries its algorithms before the capture
                self.unet(*buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            result = self.unet(*buffers).float()
        return graph, buffers, result


# ---------------------------------------------------------------------------------------------- the diffusion


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion's numbers; defaults are the released ones (Sec. 3.1 and the supplement)."""
    prediction: str = "eps"      # what the network predicts: "eps", or "v" = alpha eps - sigma x0 (Salimans and Ho 2022)
    snr_gamma: float = 0.5       # the loss is weighted by (1 + SNR)^-gamma
    clip: float = 10.0           # the predicted clean latent is clipped to [-clip, clip]
    drop: float = 0.1            # probability of dropping the conditioning in training
    noisings: int = 12           # of each query latent in one training step
    steps: int = 50              # of multi-step denoising from t = 1/2 or above
    t_start: float = 1.0         # where sampling from pure noise starts


def log_snr(t: Tensor) -> Tensor:
    """Cosine schedule (Nichol and Dhariwal 2021) in continuous time: t in [0, 1] -> log(alpha^2 / sigma^2), the same shape."""
    return -torch.log((torch.cos((t + 0.008) / 1.008 * math.pi * 0.5) ** -2 - 1).clamp(min=1e-5))


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise levels, alpha^2 + sigma^2 = 1; the shape of the argument."""
    return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()


def _like(x: Tensor, z: Tensor) -> Tensor:
    """(B,) or () as a factor of (B, ...)."""
    return x.reshape(-1, *[1] * (z.ndim - 1)) if x.ndim else x


def q_sample(x0: Tensor, log_snr: Tensor, eps: Tensor) -> Tensor:
    """The forward process: z_t = alpha x0 + sigma eps. x0, eps (B, ...); log_snr (B,) or ()."""
    alpha, sigma = alpha_sigma(_like(log_snr, x0))
    return alpha * x0 + sigma * eps


def x0_from_eps(z: Tensor, log_snr: Tensor, eps: Tensor) -> Tensor:
    """The clean latent that `eps` implies: (z_t - sigma eps) / alpha."""
    alpha, sigma = alpha_sigma(_like(log_snr, z))
    return (z - sigma * eps) / alpha.clamp(min=1e-8)


def posterior(x0: Tensor, z: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor]:
    """q(z_s | z_t, x0) for s < t (Kingma et al. 2021, Eq. 25-32): mean like z, variance (B, 1, ...) or ()."""
    log_snr_t, log_snr_s = _like(log_snr_t, z), _like(log_snr_s, z)
    (alpha_t, _), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    c = -torch.expm1(log_snr_t - log_snr_s)
    return alpha_s * (z * (1 - c) / alpha_t + c * x0), sigma_s**2 * c


def diffusion_loss(prediction: Tensor, target: Tensor, log_snr: Tensor, gamma: float, mask: Tensor | None = None) -> Tensor:
    """Weighted squared error (Sec. 3.1, Eq. 5): mean over (B, ...) of (1 + SNR)^-gamma (prediction - target)^2; a scalar.

    `mask` (B, 1, h, w) blanks both where the photograph has no valid pixels.
    """
    error = (prediction - target) ** 2 if mask is None else (prediction * mask - target * mask) ** 2
    return (error.flatten(1).mean(1) * (1 + log_snr.exp()) ** -gamma).mean()


def latent_mask(valid: Tensor, size: int) -> Tensor:
    """Valid-image mask (B, 1, H, W) at latent resolution (B, 1, size, size): bilinear, then > 0.6 (as released)."""
    return (F.interpolate(valid, size=(size, size), mode="bilinear", align_corners=False) > 0.6).to(valid.dtype)


# ---------------------------------------------------------------------------------------------- the samplers

Denoiser = Callable[[Tensor, Tensor], Tensor]  # noisy latent (B, ...), log-SNR (B,) -> predicted noise (B, ...)


def plms_times(level: float, steps: int = 50) -> Tensor:
    """Times of multi-step denoising from `level` to 0, (n + 1,) with n = min(int(2 * steps * level), steps); from 1 at 0.99 and up."""
    n = min(int(level * steps * 2), steps)
    return torch.linspace(1.0 if level >= 0.99 else level, 0, n + 1)


def plms(denoise: Denoiser, x0: Tensor | None, level: float, randn: Callable[[], Tensor], steps: int = 50, clip: float = 10.0,
         ancestral: bool = False, unnoised_start: bool = False):
    """Multi-step denoising (Sec. 3.2; Liu et al. 2022): yields (z_s, clean estimate, predicted noise) after every step.

    The latent `x0` (B, 4, h, w) is noised to `level` in [0, 1] (below 0.01 nothing is left to do and nothing is yielded; without
    `x0`, `randn` gives the start). The first step is an improved Euler step, later ones extrapolate the noise predictions by
    Adams-Bashforth of order 2, 3, 4; then z moves along the deterministic path (Song et al. 2021, DDIM), or, `ancestral`, through
    the posterior with fresh noise. The last step is the posterior's mean, clipped. `randn()` is a standard normal draw like the latent.
    """
    times = plms_times(level, steps)
    snr = log_snr(times)
    z, past = start_latent(x0, level, randn, unnoised_start), []
    told = snr.to(z.device)[:, None].expand(-1, len(z))  # once: every copy to a GPU waits for it

    def step(eps: Tensor, k: int) -> tuple[Tensor, Tensor]:
        estimate = x0_from_eps(z, snr[k], eps).clamp(-clip, clip)
        if ancestral or k + 2 == len(snr):
            mean, var = posterior(estimate, z, snr[k], snr[k + 1])
            return mean.clamp(-clip, clip) if k + 2 == len(snr) else mean + var.clamp(min=1e-20).sqrt() * randn(), estimate
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(snr[k]), alpha_sigma(snr[k + 1])
        return alpha_s * estimate + sigma_s * (z - alpha_t * estimate) / sigma_t, estimate

    def start(z: Tensor, ahead: Tensor, eps: Tensor, eps_ahead: Tensor) -> Tensor:
        """The first step's noise: as released the mean of two predictions; else that of the mean of the two clean estimates, since near
        t = 1 a small difference in noise is a large one in what it implies (sigma / alpha is 30 at t = 0.98)."""
        if ancestral:
            return (eps + eps_ahead) / 2
        estimate = sum(x0_from_eps(*x).clamp(-clip, clip) for x in ((z, snr[0], eps), (ahead, snr[1], eps_ahead))) / 2
        alpha, sigma = alpha_sigma(snr[0])
        return (z - alpha * estimate) / sigma

    for k in range(len(snr) - 1):
        eps = denoise(z, told[k])
        past = [eps, *past][:4]
        if k == 0:
            ahead = step(eps, k)[0]
            mixed = start(z, ahead, eps, denoise(ahead, told[k + 1]))
        else:
            mixed = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(past)], past))
        z, estimate = step(mixed, k)
        yield z, estimate, eps


ADAMS_BASHFORTH = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def start_latent(x0: Tensor | None, level: float, randn: Callable[[], Tensor], unnoised_start: bool = False) -> Tensor:
    """Where multi-step denoising starts: `x0` noised to `level`, or a draw where there is no `x0`."""
    if x0 is None:
        return randn()
    if level >= 0.99 and unnoised_start:
        return x0
    return q_sample(x0, log_snr(torch.tensor(1.0 if level >= 0.99 else level)), randn())


def ancestral(denoise: Denoiser, randn: Callable[[], Tensor], steps: int = 500, clip: float = 10.0, t_start: float = 1.0) -> Tensor:
    """Ancestral sampling from noise (Ho et al. 2020, Alg. 2, in continuous time): a clean latent like `randn()`."""
    z = randn()
    snr = log_snr(torch.linspace(t_start, 0, steps + 1))
    told = snr.to(z.device)[:, None].expand(-1, len(z))
    for k in range(steps):
        eps = denoise(z, told[k])
        mean, var = posterior(x0_from_eps(z, snr[k], eps).clamp(-clip, clip), z, snr[k], snr[k + 1])
        z = mean.clamp(-clip, clip) if k + 1 == steps else mean + var.clamp(min=1e-20).sqrt() * randn()
    return z


class VLDM(nn.Module):
    """UNet and diffusion together: p(query latent | EFT features), Sec. 3.1."""

    def __init__(self, unet: UNetConfig = UNetConfig(), diffusion: DiffusionConfig = DiffusionConfig()):
        super().__init__()
        self.unet, self.config, self.graphed = UNet(unet), diffusion, None

    def accelerate(self) -> VLDM:
        """On CUDA: from now on `denoiser` runs the weights of this moment as a `GraphedUNet` wherever no gradients are asked for."""
        self.graphed = GraphedUNet(self.unet) if self.unet.final_conv.weight.is_cuda else None
        return self

    def denoiser(self, cond: Tensor, guidance: float = 1.0) -> Denoiser:
        """The function (z, log_snr) -> eps for features (B, C, h, w); classifier-free guidance where `guidance` is not 1."""
        def denoise(z: Tensor, log_snr: Tensor) -> Tensor:
            unet = self.unet if self.graphed is None or torch.is_grad_enabled() else self.graphed
            out = unet(z, log_snr, cond)
            if guidance != 1:
                null = unet(z, log_snr, torch.zeros_like(cond))
                out = null + guidance * (out - null)
            if self.config.prediction == "v":
                alpha, sigma = alpha_sigma(_like(log_snr, z))
                out = alpha * out + sigma * z
            return out
        return denoise

    def loss(self, x0: Tensor, cond: Tensor, t: Tensor, eps: Tensor, mask: Tensor | None = None) -> Tensor:
        """Training loss at times t (B,) for latents x0 and noise eps (B, 4, h, w), features (B, C, h, w): a scalar (Eq. 5)."""
        snr = log_snr(t)
        z = q_sample(x0, snr, eps)
        alpha, sigma = alpha_sigma(_like(snr, z))
        target = eps if self.config.prediction == "eps" else alpha * eps - sigma * x0
        return diffusion_loss(self.unet(z, snr, cond).float(), target, snr, self.config.snr_gamma, mask)


# ---------------------------------------------------------------------------------------------- presets

PAPER = (VAEConfig(), UNetConfig(), DiffusionConfig())
NANO = (
    VAEConfig(widths=(24, 48, 96, 96), groups=8, blocks=1),
    UNetConfig(cond_channels=96, cond_unshuffle=2, widths=(96, 96, 128, 128), attention=(False, True, True), kernels=(3,),
               heads=4, head_dim=32, time_dim=192, token_dim=96),
    DiffusionConfig(prediction="v", snr_gamma=0.0, clip=5.0, noisings=12, steps=10, t_start=0.98),
)
