"""The view-conditioned latent diffusion model (Sec. 3.1): noising, the training loss, the noise that is predicted.

The diffusion runs in continuous time (Kingma et al. 2021): the network of `unet.py` is told the signal-to-noise ratio,
not a step number. `samplers.py` has what becomes of its predictions. `PAPER` and `PAPER_SAMPLER` hold the paper's
numbers, `NANO` and `NANO_SAMPLER` those for the sample categories.

    t, s          times in [0, 1], 0 is the clean latent; s is an earlier one, s < t
    log_snr       log(alpha^2 / sigma^2), falls as t grows
    alpha, sigma  z_t = alpha x0 + sigma eps, where alpha^2 = sigmoid(log_snr) and alpha^2 + sigma^2 = 1
    x0, eps       the clean latent and the noise, or what the network says about them

What differs from the released code: docs/differences.md, and the fields of `SamplerConfig`.

Letters: `B` batch, `h w` rows and columns of the latent, `C` channels and `s` side of the features.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu.graphs import Graphed, half_copy
from unet import UNet, UNetConfig

NoisePredictor = Callable[[Tensor, Tensor], Tensor]  # noisy latent (B, ...), log-SNR (B,) -> predicted noise (B, ...)


@dataclass(frozen=True)
class DiffusionConfig:
    """The numbers of training (Sec. 3.1 and the supplement)."""
    prediction: str = "eps"   # what the network predicts: "eps", or "v" = alpha eps - sigma x0 (Salimans and Ho 2022)
    snr_gamma: float = 0.5    # exponent of the loss weight (1 + SNR)^-gamma  [released: vldm.py:610-630]
    drop: float = 0.1         # probability that a latent is trained without features  [released: train.py:524]
    noisings: int = 12        # noisings of each query latent in a training step  [released: train.py:381-393]
    t_max: float = 0.999      # largest time of training  [released: imagen_pytorch.py:217]

    def __post_init__(self):
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction {self.prediction!r}: must be 'eps' or 'v'")
        if not (0 <= self.drop <= 1 and 0 < self.t_max <= 1):
            raise ValueError(f"drop {self.drop} and t_max {self.t_max}: must be within [0, 1], t_max above 0")
        if self.noisings < 1:
            raise ValueError(f"noisings {self.noisings}: must be at least 1")


@dataclass(frozen=True)
class SamplerConfig:
    """The numbers of sampling from noise and of multi-step denoising."""
    solver: str = "plms"          # of multi-step denoising: "plms" (Sec. 3.2), "ddim" or "dpmpp"
    plms_steps: int = 50          # steps of any solver from a noise level of 1/2 or more; 1: one-step denoising
    sample_steps: int = 500       # steps of ancestral sampling  [released: load_model.py:82]
    clip: float = 10.0            # largest absolute value of a clean estimate  [released: load_model.py:87-90]
    t_start: float = 1.0          # time at which sampling from noise starts; higher noise levels are lowered to it
    guidance: float = 1.0         # scale of classifier-free guidance; 1 is none
    ancestral: bool = False       # fresh noise after every multi-step estimate  [released: plms.py:154, 207-212]
    unnoised_start: bool = False  # no noise on the start latent from level 0.99 on  [released: plms.py:80-85]

    def __post_init__(self):
        if self.solver not in ("plms", "ddim", "dpmpp"):
            raise ValueError(f"solver {self.solver!r}: must be 'plms', 'ddim' or 'dpmpp'")
        if self.plms_steps < 1 or self.sample_steps < 1:
            raise ValueError(f"plms_steps {self.plms_steps} and sample_steps {self.sample_steps}: must be at least 1")
        if not self.clip > 0:
            raise ValueError(f"clip {self.clip}: must be above 0")
        if not 0 < self.t_start <= 1:
            raise ValueError(f"t_start {self.t_start}: must be above 0 and at most 1")


# ---------------------------------------------------------------------------------------------- the diffusion

def cosine_log_snr(t: Tensor) -> Tensor:
    """Cosine schedule (Nichol and Dhariwal 2021) in continuous time: t in [0, 1] -> log-SNR, the same shape.

    [released: imagen_pytorch.py:195-199]
    """
    # alpha = cos(angle), hence sigma^2 / alpha^2 = cos(angle)^-2 - 1.
    angle = (t + 0.008) / 1.008 * math.pi * 0.5
    noise_to_signal = torch.cos(angle) ** -2 - 1
    return -torch.log(noise_to_signal.clamp(min=1e-5))


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """What signal and noise are multiplied by, alpha^2 + sigma^2 = 1; the shape of the argument."""
    alpha = log_snr.sigmoid().sqrt()
    sigma = (-log_snr).sigmoid().sqrt()
    return alpha, sigma


def as_factor(x: Tensor, z: Tensor) -> Tensor:
    """Numbers (B,) in the shape (B, 1, ...) that multiplies z (B, ...); a single number () stays as it is."""
    # A number without axes may stay on the CPU, whatever device z is on.
    if x.ndim == 0:
        return x
    ones = [1] * (z.ndim - 1)
    return x.reshape(-1, *ones)


def q_sample(x0: Tensor, log_snr: Tensor, eps: Tensor) -> Tensor:
    """The forward process: z_t = alpha x0 + sigma eps. x0, eps (B, ...); log_snr (B,) or ()."""
    alpha, sigma = alpha_sigma(as_factor(log_snr, x0))
    return alpha * x0 + sigma * eps


def x0_from_eps(z: Tensor, log_snr: Tensor, eps: Tensor) -> Tensor:
    """The clean latent that `eps` implies: (z_t - sigma eps) / alpha. z, eps (B, ...); log_snr (B,) or ()."""
    alpha, sigma = alpha_sigma(as_factor(log_snr, z))
    return (z - sigma * eps) / alpha.clamp(min=1e-8)


def eps_from_x0(z: Tensor, log_snr: Tensor, x0: Tensor) -> Tensor:
    """The noise that `x0` implies: (z_t - alpha x0) / sigma. z, x0 (B, ...); log_snr (B,) or ()."""
    alpha, sigma = alpha_sigma(as_factor(log_snr, z))
    return (z - alpha * x0) / sigma


def posterior(x0: Tensor, z: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor]:
    """q(z_s | z_t, x0) for s < t (Kingma et al. 2021, Eq. 25-32): mean like z, variance (B, 1, ...) or ()."""
    log_snr_t = as_factor(log_snr_t, z)
    log_snr_s = as_factor(log_snr_s, z)
    alpha_t, _ = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)

    # c = 1 - SNR_t / SNR_s, from 0 where s = t to 1 where z_t says nothing about z_s.
    c = -torch.expm1(log_snr_t - log_snr_s)
    mean = alpha_s * (z * (1 - c) / alpha_t + c * x0)
    return mean, sigma_s**2 * c


# ---------------------------------------------------------------------------------------------- the loss

def diffusion_loss(prediction: Tensor, target: Tensor, log_snr: Tensor, gamma: float,
                   mask: Tensor | None = None) -> Tensor:
    """Weighted squared error (Sec. 3.1): mean over (B, ...) of (1 + SNR)^-gamma (prediction - target)^2; a scalar.

    `mask` (B, 1, h, w) blanks both where the photograph has no valid pixels.
    """
    if mask is not None:
        prediction = prediction * mask
        target = target * mask
    error = ((prediction - target) ** 2).flatten(1).mean(dim=1)  # (B,)
    weight = (1 + log_snr.exp()) ** -gamma
    return (error * weight).mean()


def latent_mask(valid: Tensor, size: int) -> Tensor:
    """Mask of valid pixels (B, 1, H, W) at the latent's resolution, (B, 1, size, size) of zeros and ones.

    Bilinear, then above 0.6 [released: train.py:396-399].
    """
    smooth = F.interpolate(valid, size=(size, size), mode="bilinear", align_corners=False)
    return (smooth > 0.6).to(valid.dtype)


# ---------------------------------------------------------------------------------------------- the model

class VLDM(nn.Module):
    """UNet and diffusion together: p(query latent | EFT features), Sec. 3.1."""

    def __init__(self, unet: UNetConfig = UNetConfig(), diffusion: DiffusionConfig = DiffusionConfig()):
        super().__init__()
        self.unet = UNet(unet)
        self.config = diffusion
        self.fast: FastUNet | None = None

    def accelerate(self) -> VLDM:
        """On CUDA: from now on, what needs no gradients runs on this moment's weights in half precision."""
        self.fast = None
        if self.unet.final_conv.weight.is_cuda:
            half = half_copy(self.unet, UNet.EXACT)
            embed_features = Graphed("the UNet's first layer", half.embed_features, self.unet.embed_features)
            predict = Graphed("the UNet", half.predict, self.unet.predict)
            self.fast = FastUNet(embed_features, predict)
        return self

    def noise_predictor(self, cond: Tensor, guidance: float = 1.0) -> NoisePredictor:
        """The function (z, log_snr) -> eps for features (B, C, s, s), for the samplers; z may be the first m of B."""
        # In half precision, if there is such a copy, where nobody wants gradients.
        network = self.unet
        if self.fast is not None and not torch.is_grad_enabled():
            network = self.fast

        # What the network makes of the features is the same at every step.
        embedded = network.embed_features(cond)
        without = None if guidance == 1 else network.embed_features(torch.zeros_like(cond))
        return partial(self.predict_noise, network=network, embedded=embedded, without=without, guidance=guidance)

    def predict_noise(self, z: Tensor, log_snr: Tensor, network: UNet | FastUNet, embedded: Tensor,
                      without: Tensor | None, guidance: float) -> Tensor:
        """Noisy latents (m, 4, h, w), log-SNR (m,) -> noise (m, 4, h, w), by a network.

        `embedded` is what it made of the features (B, C, s, s) of which the first m count, `without` of no features.
        """
        m = len(z)
        prediction = network.predict(z, log_snr, embedded[:m])

        # Classifier-free guidance (Ho and Salimans 2022): away from what is predicted without features.
        if without is not None:
            unconditional = network.predict(z, log_snr, without[:m])
            prediction = unconditional + guidance * (prediction - unconditional)

        # From v = alpha eps - sigma x0 and z = alpha x0 + sigma eps follows eps = alpha v + sigma z.
        if self.config.prediction == "v":
            alpha, sigma = alpha_sigma(as_factor(log_snr, z))
            prediction = alpha * prediction + sigma * z
        return prediction

    def loss(self, x0: Tensor, cond: Tensor, t: Tensor, eps: Tensor, mask: Tensor | None = None) -> Tensor:
        """Training loss (Sec. 3.1) of latents x0 and noise eps (B, 4, h, w) at times t (B,): a scalar.

        Features cond (B, C, s, s); `mask` (B, 1, h, w) as in `diffusion_loss`.
        """
        # Noise the latents.
        log_snr = cosine_log_snr(t)
        z = q_sample(x0, log_snr, eps)

        # The network's answer, and what it should have been.
        target = eps
        if self.config.prediction == "v":
            alpha, sigma = alpha_sigma(as_factor(log_snr, z))
            target = alpha * eps - sigma * x0
        prediction = self.unet(z, log_snr, cond).float()
        return diffusion_loss(prediction, target, log_snr, self.config.snr_gamma, mask)


class FastUNet(NamedTuple):
    """What a UNet runs on CUDA, under the same names."""
    embed_features: Graphed
    predict: Graphed


# ---------------------------------------------------------------------------------------------- presets

PAPER = DiffusionConfig()
PAPER_SAMPLER = SamplerConfig()
NANO = DiffusionConfig(prediction="v", snr_gamma=0.0, noisings=12)
# Two calls of DPM-Solver++ do for this prior what PLMS does in six (docs/results.md).
NANO_SAMPLER = SamplerConfig(solver="dpmpp", plms_steps=2, sample_steps=50, clip=5.0, t_start=0.98)
