"""The view-conditioned latent diffusion model (Sec. 3.1): noising, the training loss, and two samplers.

The diffusion runs in continuous time (Kingma et al. 2021): the network of `unet.py` is told the signal-to-noise ratio,
not a step number. `ancestral_sampling` makes a view from pure noise. `plms` is multi-step denoising (Liu et al. 2022)
from any noise level, which distillation calls (Sec. 3.2). `PAPER` and `PAPER_SAMPLER` hold the paper's numbers, `NANO`
and `NANO_SAMPLER` those for the sample categories.

    t, s          times in [0, 1], 0 is the clean latent; s is the next one on the way down, s < t
    noise_level   the time at which multi-step denoising starts
    log_snr       log(alpha^2 / sigma^2), falls as t grows
    alpha, sigma  z_t = alpha x0 + sigma eps, where alpha^2 = sigmoid(log_snr) and alpha^2 + sigma^2 = 1
    x0, eps       the clean latent and the noise, or what the network says about them

What differs from the released code, whose ways are fields of `SamplerConfig`: multi-step denoising is deterministic, as
published (theirs: `ancestral`); it starts from the noised latent at every level (theirs: `unnoised_start`); its first
step averages two clean estimates, not two noises (theirs: with `ancestral`).

Letters: `B` batch, `h w` rows and columns of the latent, `C` channels and `s` side of the features, `n` steps.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import GraphedUNet, UNet, UNetConfig

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
    """The numbers of both samplers."""
    plms_steps: int = 50          # steps of multi-step denoising from a noise level of 1/2 or more; 1: one-step
    sample_steps: int = 500       # steps of ancestral sampling  [released: load_model.py:82]
    clip: float = 10.0            # largest absolute value of a clean estimate  [released: load_model.py:87-90]
    t_start: float = 1.0          # time at which sampling from noise starts; higher noise levels are lowered to it
    guidance: float = 1.0         # scale of classifier-free guidance; 1 is none
    ancestral: bool = False       # fresh noise after every multi-step estimate  [released: plms.py:154, 207-212]
    unnoised_start: bool = False  # no noise on the start latent from level 0.99 on  [released: plms.py:80-85]

    def __post_init__(self):
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


# ---------------------------------------------------------------------------------------------- steps from t to s

def clean_estimate(z: Tensor, log_snr: Tensor, eps: Tensor, clip: float) -> Tensor:
    """The clean latent that `eps` implies, clipped to [-clip, clip]; like z."""
    return x0_from_eps(z, log_snr, eps).clamp(-clip, clip)


def ddim_step(z: Tensor, x0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """Deterministic step (Song et al. 2021): the clean estimate, and the noise that it implies in z at s's level."""
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    return alpha_s * x0 + sigma_s * (z - alpha_t * x0) / sigma_t


def ancestral_step(z: Tensor, x0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor, randn: Callable[[], Tensor]) -> Tensor:
    """Random step: a draw from the posterior."""
    mean, variance = posterior(x0, z, log_snr_t, log_snr_s)
    return mean + variance.clamp(min=1e-20).sqrt() * randn()


def last_step(z: Tensor, x0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor, clip: float) -> Tensor:
    """The step to time 0, where nothing is drawn any more: the posterior's mean, clipped."""
    mean, _ = posterior(x0, z, log_snr_t, log_snr_s)
    return mean.clamp(-clip, clip)


def one_per_image(log_snrs: Tensor, z: Tensor) -> Tensor:
    """log-SNRs (n,) for a network that wants one an image of z (B, ...): (n, B), on z's device.

    Made once for all steps, because every copy to a GPU waits for it.
    """
    return log_snrs.to(z.device)[:, None].expand(-1, len(z))


# ---------------------------------------------------------------------------------------------- sampling from noise

def ancestral_sampling(predict_noise: NoisePredictor, randn: Callable[[], Tensor], sampler: SamplerConfig) -> Tensor:
    """Sampling from pure noise (Ho et al. 2020, Alg. 2, in continuous time): a clean latent like `randn()`."""
    # Evenly spaced times down to 0, and noise at the first of them.
    steps = sampler.sample_steps
    log_snrs = cosine_log_snr(torch.linspace(sampler.t_start, 0, steps + 1))
    z = randn()
    log_snr_batch = one_per_image(log_snrs, z)

    for k in range(steps):
        # What the network takes for the clean latent.
        eps = predict_noise(z, log_snr_batch[k])
        x0 = clean_estimate(z, log_snrs[k], eps, sampler.clip)

        # A step through the posterior.
        if k < steps - 1:
            z = ancestral_step(z, x0, log_snrs[k], log_snrs[k + 1], randn)
        else:
            z = last_step(z, x0, log_snrs[k], log_snrs[k + 1], sampler.clip)
    return z


# ---------------------------------------------------------------------------------------------- multi-step denoising

# Adams-Bashforth: how much the latest prediction counts, and those before it, where there are 2, 3 or 4.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PLMSStep(NamedTuple):
    """A step of multi-step denoising."""
    latent: Tensor  # where it led: z_s (B, 4, h, w)
    x0: Tensor      # the clean estimate that led there (B, 4, h, w)
    eps: Tensor     # what the network had predicted at z_t (B, 4, h, w)


def plms(predict_noise: NoisePredictor, x0: Tensor | None, noise_level: float, randn: Callable[[], Tensor],
         sampler: SamplerConfig) -> Tensor:
    """Noise a latent to a level and denoise it in several steps (Sec. 3.2; Liu et al. 2022): latents (B, 4, h, w).

    `noise_level` is in [0, 1]; below 1 / (2 plms_steps) no step is taken, and the noised latent is the result. With
    `plms_steps` = 1 it is one-step denoising, at every level: the network is called once, and what it takes for the
    clean latent is the result. Without `x0` the start is a draw. `randn()` is a standard normal draw like the latent.
    """
    z = start_latent(x0, noise_level, randn, sampler)
    for step in plms_steps(predict_noise, z, noise_level, randn, sampler):
        z = step.latent
    return z


def plms_steps(predict_noise: NoisePredictor, z: Tensor, noise_level: float, randn: Callable[[], Tensor],
               sampler: SamplerConfig) -> Iterator[PLMSStep]:
    """The steps of `plms`, from the start latent z (B, 4, h, w)."""
    # The times on the way to 0, and the latest predictions of noise, newest first.
    log_snrs = cosine_log_snr(plms_times(noise_level, sampler))
    log_snr_batch = one_per_image(log_snrs, z)
    steps = len(log_snrs) - 1
    history = []

    # A single step needs no path: it ends at the clean estimate.
    if sampler.plms_steps == 1:
        eps = predict_noise(z, log_snr_batch[0])
        x0 = clean_estimate(z, log_snrs[0], eps, sampler.clip)
        yield PLMSStep(x0, x0, eps)
        return

    for k in range(steps):
        log_snr_t = log_snrs[k]
        log_snr_s = log_snrs[k + 1]
        last = k == steps - 1

        # Predict the noise at t.
        eps = predict_noise(z, log_snr_batch[k])
        history = [eps, *history][:4]

        # The first step tries where it would lead (improved Euler); later ones look back (Adams-Bashforth).
        if k == 0:
            x0 = clean_estimate(z, log_snr_t, eps, sampler.clip)
            z_ahead = plms_step(z, x0, log_snr_t, log_snr_s, last, randn, sampler)
            eps_ahead = predict_noise(z_ahead, log_snr_batch[1])
            x0_ahead = clean_estimate(z_ahead, log_snr_s, eps_ahead, sampler.clip)
            if sampler.ancestral:
                eps_mixed = (eps + eps_ahead) / 2
            else:
                eps_mixed = improved_euler(z, log_snr_t, x0, x0_ahead)
        else:
            eps_mixed = adams_bashforth(history)

        # From t to s with the mixed noise.
        x0 = clean_estimate(z, log_snr_t, eps_mixed, sampler.clip)
        z = plms_step(z, x0, log_snr_t, log_snr_s, last, randn, sampler)
        yield PLMSStep(z, x0, eps)


def improved_euler(z: Tensor, log_snr_t: Tensor, x0: Tensor, x0_ahead: Tensor) -> Tensor:
    """The first step's noise: what the mean of the clean estimates at t and s implies in z; like z.

    The mean of the two noises [released: plms.py:137-143] is coarser near t = 1, where a small difference in noise is a
    large one in the clean latent (sigma / alpha is 30 at t = 0.98).
    """
    return eps_from_x0(z, log_snr_t, (x0 + x0_ahead) / 2)


def adams_bashforth(history: list[Tensor]) -> Tensor:
    """The noise of a later step: the last two to four predictions, latest first, extrapolated."""
    coefficients = ADAMS_BASHFORTH[len(history)]
    return sum(coefficient * eps for coefficient, eps in zip(coefficients, history))


def plms_step(z: Tensor, x0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor, last: bool, randn: Callable[[], Tensor],
              sampler: SamplerConfig) -> Tensor:
    """From t to s with a clean estimate: deterministic, or random where the sampler says so; the last is a mean."""
    if last:
        return last_step(z, x0, log_snr_t, log_snr_s, sampler.clip)
    if sampler.ancestral:
        return ancestral_step(z, x0, log_snr_t, log_snr_s, randn)
    return ddim_step(z, x0, log_snr_t, log_snr_s)


def start_time(noise_level: float, sampler: SamplerConfig) -> float:
    """Where multi-step denoising starts: at the noise level, or at `t_start` if that is lower; from 0.99 on at 1."""
    level = min(noise_level, sampler.t_start)
    return 1.0 if level >= 0.99 else level


def plms_times(noise_level: float, sampler: SamplerConfig) -> Tensor:
    """Times of multi-step denoising, (n + 1,), evenly spaced from the noise level to 0.

    Below a level of 1/2 the steps are 1 / (2 plms_steps) long; from there on there are `plms_steps` longer ones
    [released: plms.py:87-93]. One-step denoising has one at every level.
    """
    start = start_time(noise_level, sampler)
    steps = min(int(start * sampler.plms_steps * 2), sampler.plms_steps)
    if sampler.plms_steps == 1:
        steps = 1
    return torch.linspace(start, 0, steps + 1)


def start_latent(x0: Tensor | None, noise_level: float, randn: Callable[[], Tensor], sampler: SamplerConfig) -> Tensor:
    """Where multi-step denoising starts: `x0` (B, 4, h, w) noised to the level, or a draw where there is no `x0`."""
    if x0 is None:
        return randn()
    start = start_time(noise_level, sampler)
    if start == 1 and sampler.unnoised_start:
        return x0
    log_snr = cosine_log_snr(torch.tensor(start))
    return q_sample(x0, log_snr, randn())


# ---------------------------------------------------------------------------------------------- the model

class VLDM(nn.Module):
    """UNet and diffusion together: p(query latent | EFT features), Sec. 3.1."""

    def __init__(self, unet: UNetConfig = UNetConfig(), diffusion: DiffusionConfig = DiffusionConfig()):
        super().__init__()
        self.unet = UNet(unet)
        self.config = diffusion
        self.graphed: GraphedUNet | None = None

    def accelerate(self) -> VLDM:
        """On CUDA: from now on, what needs no gradients runs on this moment's weights as a `GraphedUNet`."""
        self.graphed = None
        if self.unet.final_conv.weight.is_cuda:
            self.graphed = GraphedUNet(self.unet)
        return self

    def noise_predictor(self, cond: Tensor, guidance: float = 1.0) -> NoisePredictor:
        """The function (z, log_snr) -> eps for features (B, C, s, s), for the samplers."""
        return partial(self.predict_noise, cond=cond, guidance=guidance)

    def predict_noise(self, z: Tensor, log_snr: Tensor, cond: Tensor, guidance: float = 1.0) -> Tensor:
        """Noisy latents (B, 4, h, w), log-SNR (B,), features (B, C, s, s) -> noise (B, 4, h, w)."""
        # The copy in half precision, if there is one, where nobody wants gradients.
        network = self.unet
        if self.graphed is not None and not torch.is_grad_enabled():
            network = self.graphed
        prediction = network(z, log_snr, cond)

        # Classifier-free guidance (Ho and Salimans 2022): away from what is predicted without features.
        if guidance != 1:
            unconditional = network(z, log_snr, torch.zeros_like(cond))
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


# ---------------------------------------------------------------------------------------------- presets

PAPER = DiffusionConfig()
PAPER_SAMPLER = SamplerConfig()
NANO = DiffusionConfig(prediction="v", snr_gamma=0.0, noisings=12)
NANO_SAMPLER = SamplerConfig(plms_steps=5, sample_steps=50, clip=5.0, t_start=0.98)
