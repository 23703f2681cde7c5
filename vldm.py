"""The view-conditioned latent diffusion model (Sec. 3.1): noising, the training loss, the predicted noise, and what
becomes of it: ancestral sampling from pure noise, multi-step denoising by PLMS, DDIM or DPM-Solver++ (Sec. 3.2).

The diffusion runs in continuous time (Kingma et al. 2021): the network of `unet.py` is told the signal-to-noise ratio,
not a step number. The defaults of `DiffusionConfig` and `SamplerConfig` are the paper's numbers.

    t, s          times in [0, 1], 0 is the clean latent; s is an earlier one, s < t
    log_snr       log(alpha^2 / sigma^2), falls as t grows
    alpha, sigma  z_t = alpha x0 + sigma eps, where alpha^2 = sigmoid(log_snr) and alpha^2 + sigma^2 = 1
    x0, eps       the clean latent and the noise, or what the network says about them

What differs from the released code: docs/differences.md, and the fields of `SamplerConfig`.

Shapes: `B` batch, `h w` rows and columns of the latent, `C` channels and `s` side of the features.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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


# ---------------------------------------------------------------------------------------------- steps from t to s

def clean_estimate(z: Tensor, log_snr: Tensor, eps: Tensor, clip: float) -> Tensor:
    """The clean latent that `eps` implies, clipped to [-clip, clip]; like z."""
    return x0_from_eps(z, log_snr, eps).clamp(-clip, clip)


def ddim_step(z: Tensor, x0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """Deterministic step (Song et al. 2021): the clean estimate, and the noise that it implies in z at s's level."""
    alpha_t, sigma_t = alpha_sigma(as_factor(log_snr_t, z))
    alpha_s, sigma_s = alpha_sigma(as_factor(log_snr_s, z))
    return alpha_s * x0 + sigma_s * (z - alpha_t * x0) / sigma_t


def ancestral_step(z: Tensor, x0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor, draw: Tensor) -> Tensor:
    """Random step: a sample of the posterior, from a standard normal draw."""
    mean, variance = posterior(x0, z, log_snr_t, log_snr_s)
    return mean + variance.clamp(min=1e-20).sqrt() * draw


def last_step(z: Tensor, x0: Tensor, log_snr_t: Tensor, log_snr_s: Tensor, clip: float) -> Tensor:
    """The step to time 0, where nothing is drawn any more: the posterior's mean, clipped."""
    mean, _ = posterior(x0, z, log_snr_t, log_snr_s)
    return mean.clamp(-clip, clip)


# ---------------------------------------------------------------------------------------------- sampling from noise

def ancestral_sampling(predict_noise: NoisePredictor, randn: Callable[[], Tensor], sampler: SamplerConfig) -> Tensor:
    """Sampling from pure noise (Ho et al. 2020, Alg. 2, in continuous time): a clean latent like `randn()`."""
    # Evenly spaced times down to 0, and noise at the first of them. One copy to a GPU for all steps, as each waits.
    steps = sampler.sample_steps
    log_snrs = cosine_log_snr(torch.linspace(sampler.t_start, 0, steps + 1))
    z = randn()
    log_snr_batch = log_snrs.to(z.device)[:, None].expand(-1, len(z))

    for k in range(steps):
        # What the network takes for the clean latent.
        eps = predict_noise(z, log_snr_batch[k])
        x0 = clean_estimate(z, log_snrs[k], eps, sampler.clip)

        # A step through the posterior.
        if k < steps - 1:
            z = ancestral_step(z, x0, log_snrs[k], log_snrs[k + 1], randn())
        else:
            z = last_step(z, x0, log_snrs[k], log_snrs[k + 1], sampler.clip)
    return z


# ---------------------------------------------------------------------------------------------- the way to time 0

class Step(NamedTuple):
    """A step of multi-step denoising. All images of the batch, or the m that took it."""
    latent: Tensor  # where all are now (B, 4, h, w)
    x0: Tensor      # the clean estimate that led there (m, 4, h, w)
    eps: Tensor     # what the network had predicted before (m, 4, h, w)


class Path(NamedTuple):
    """The log-SNRs on the way from the noise level of every image to time 0."""
    log_snrs: Tensor  # (n + 1, B) before the first step, after it, ..., after the last; then as it was
    steps: list[int]  # number of steps of every image; falls

    def active(self, k: int) -> int:
        """m: how many images take step k, counted from 0."""
        return sum(steps > k for steps in self.steps)

    def on(self, device: torch.device) -> Path:
        """The same with the log-SNRs on a device: one copy for all steps, as each waits for a GPU."""
        return Path(self.log_snrs.to(device), self.steps)


def start_time(noise_level: float, sampler: SamplerConfig) -> float:
    """Where multi-step denoising starts: at the noise level, or at `t_start` if that is lower.

    From 0.99 on PLMS starts at 1 [released: plms.py:80-85]. The other solvers start at 0.99, since at 1 log-SNR has no
    end.
    """
    level = min(noise_level, sampler.t_start)
    if level < 0.99:
        return level
    return 1.0 if sampler.solver == "plms" else 0.99


def step_count(noise_level: float, sampler: SamplerConfig) -> int:
    """How many steps lead from a noise level to 0: `plms_steps` from 1/2 on, below so many that they are no longer than
    the shortest of these [released: plms.py:87-93].

    PLMS rounds down, and takes no step from a level below 1 / (2 plms_steps); the other solvers round up.
    """
    wanted = 2 * sampler.plms_steps * start_time(noise_level, sampler)
    whole = int(wanted) if sampler.solver == "plms" else math.ceil(wanted)
    return 1 if sampler.plms_steps == 1 else min(whole, sampler.plms_steps)


def step_times(noise_level: float, sampler: SamplerConfig) -> Tensor:
    """Times of multi-step denoising by PLMS, (steps + 1,), evenly spaced from the noise level to 0."""
    return torch.linspace(start_time(noise_level, sampler), 0, step_count(noise_level, sampler) + 1)


def step_log_snrs(noise_level: float, sampler: SamplerConfig) -> Tensor:
    """Log-SNRs on the way from a noise level to 0, (steps + 1,).

    Those of PLMS are at even times; those of the other solvers are even themselves (Lu et al. 2022).
    """
    if sampler.solver == "plms":
        return cosine_log_snr(step_times(noise_level, sampler))
    first, last = cosine_log_snr(torch.tensor([start_time(noise_level, sampler), 0.0])).tolist()
    return torch.linspace(first, last, step_count(noise_level, sampler) + 1)


def path_from(noise_levels: Sequence[float], sampler: SamplerConfig) -> Path:
    """The way of a batch with these noise levels, which must not rise. Raises `ValueError` if they do."""
    steps = [step_count(level, sampler) for level in noise_levels]
    if steps != sorted(steps, reverse=True):
        raise ValueError(f"noise levels {list(noise_levels)}: images with more steps must come first")

    # Images with fewer steps stay at time 0 when they are done.
    log_snrs = cosine_log_snr(torch.zeros(max(steps) + 1, len(steps)))
    for image, level in enumerate(noise_levels):
        log_snrs[:steps[image] + 1, image] = step_log_snrs(level, sampler)
    return Path(log_snrs, steps)


def start_latent(x0: Tensor, noise_levels: Sequence[float], randn: Callable[[], Tensor],
                 sampler: SamplerConfig) -> Tensor:
    """Where multi-step denoising starts: `x0` (B, 4, h, w) noised to the levels."""
    # The released code leaves a latent as it is where its level is the highest.
    starts = [start_time(level, sampler) for level in noise_levels]
    kept = [start == 1 and sampler.unnoised_start for start in starts]
    if all(kept):
        return x0
    noised = q_sample(x0, cosine_log_snr(torch.tensor(starts)).to(x0.device), randn())
    if not any(kept):
        return noised
    return torch.where(as_factor(torch.tensor(kept, device=x0.device), x0), x0, noised)


def move(z: Tensor, x0: Tensor, path: Path, k: int, randn: Callable[[], Tensor], sampler: SamplerConfig) -> Tensor:
    """Step k of all latents z (B, 4, h, w), with clean estimates x0 (m, 4, h, w): who is done stays where it is."""
    m = len(x0)
    goes_on = path.active(k + 1)
    log_snr_t = path.log_snrs[k, :m]
    log_snr_s = path.log_snrs[k + 1, :m]

    # Most go on: deterministic, or random where the sampler says so.
    on = slice(goes_on)
    if sampler.ancestral and goes_on:
        moved = ancestral_step(z[on], x0[on], log_snr_t[on], log_snr_s[on], randn()[on])
    else:
        moved = ddim_step(z[on], x0[on], log_snr_t[on], log_snr_s[on])

    # For some it is the last step, which is a mean where steps are random, and in PLMS.
    end = slice(goes_on, m)
    if sampler.ancestral or sampler.solver == "plms":
        ended = last_step(z[end], x0[end], log_snr_t[end], log_snr_s[end], sampler.clip)
    else:
        ended = ddim_step(z[end], x0[end], log_snr_t[end], log_snr_s[end])
    return torch.cat([moved, ended, z[m:]])


# ---------------------------------------------------------------------------------------------- multi-step denoising

def denoise(predict_noise: NoisePredictor, x0: Tensor, noise_levels: Sequence[float], randn: Callable[[], Tensor],
            sampler: SamplerConfig) -> Tensor:
    """Noise latents (B, 4, h, w) to levels in [0, 1] and denoise them in several steps (Sec. 3.2): the same shape.

    The levels, one an image, must not rise. With `plms_steps` = 1 it is one-step denoising, at every level: the network
    is called once, and what it takes for the clean latent is the result. `predict_noise` is asked about the first m
    images, m falling. `randn()` is a standard normal draw like all latents.
    """
    z = start_latent(x0, noise_levels, randn, sampler)
    for step in denoising_steps(predict_noise, z, noise_levels, randn, sampler):
        z = step.latent
    return z


def denoising_steps(predict_noise: NoisePredictor, z: Tensor, noise_levels: Sequence[float],
                    randn: Callable[[], Tensor], sampler: SamplerConfig) -> Iterator[Step]:
    """The steps of `denoise` from the start latents z (B, 4, h, w), by the sampler's solver."""
    path = path_from(noise_levels, sampler).on(z.device)
    if sampler.plms_steps == 1:
        solver = one_step
    else:
        solver = {"plms": plms, "ddim": ddim, "dpmpp": dpmpp}[sampler.solver]
    yield from solver(predict_noise, z, path, randn, sampler)


def one_step(predict_noise: NoisePredictor, z: Tensor, path: Path, randn: Callable[[], Tensor],
             sampler: SamplerConfig) -> Iterator[Step]:
    """A single step needs no path: it ends at the clean estimate."""
    eps = predict_noise(z, path.log_snrs[0])
    x0 = clean_estimate(z, path.log_snrs[0], eps, sampler.clip)
    yield Step(x0, x0, eps)


def ddim(predict_noise: NoisePredictor, z: Tensor, path: Path, randn: Callable[[], Tensor],
         sampler: SamplerConfig) -> Iterator[Step]:
    """First order (Song et al. 2021): the clean estimate holds for a whole step."""
    for k in range(max(path.steps)):
        m = path.active(k)
        eps = predict_noise(z[:m], path.log_snrs[k, :m])
        x0 = clean_estimate(z[:m], path.log_snrs[k, :m], eps, sampler.clip)
        z = move(z, x0, path, k, randn, sampler)
        yield Step(z, x0, eps)


# ---------------------------------------------------------------------------------------------- DPM-Solver++ 2M

def dpmpp(predict_noise: NoisePredictor, z: Tensor, path: Path, randn: Callable[[], Tensor],
          sampler: SamplerConfig) -> Iterator[Step]:
    """Second order in log-SNR time (Lu et al. 2022, Alg. 2): the clean estimate goes on as it changed last."""
    x0_before = None
    for k in range(max(path.steps)):
        # The clean estimate at t.
        m = path.active(k)
        eps = predict_noise(z[:m], path.log_snrs[k, :m])
        x0 = clean_estimate(z[:m], path.log_snrs[k, :m], eps, sampler.clip)

        # What it will be half a step further; the first step knows no change yet.
        x0_ahead = x0
        if k > 0:
            x0_ahead = half_step_ahead(x0, x0_before[:m], path.log_snrs[k - 1:k + 2, :m])

        # From t to s with it.
        z = move(z, x0_ahead, path, k, randn, sampler)
        x0_before = x0
        yield Step(z, x0_ahead, eps)


def half_step_ahead(x0: Tensor, x0_before: Tensor, log_snrs: Tensor) -> Tensor:
    """The clean estimate in the middle of the step from t to s, linear in log-SNR: like x0 and the one before it.

    log_snrs (3, m) before, at t and at s.
    """
    before, log_snr_t, log_snr_s = log_snrs
    share = (log_snr_s - log_snr_t) / 2 / (log_snr_t - before)
    return x0 + as_factor(share, x0) * (x0 - x0_before)


# ---------------------------------------------------------------------------------------------- PLMS

# Adams-Bashforth: how much the latest prediction counts, and those before it, where there are 2, 3 or 4.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(predict_noise: NoisePredictor, z: Tensor, path: Path, randn: Callable[[], Tensor],
         sampler: SamplerConfig) -> Iterator[Step]:
    """Up to fourth order (Liu et al. 2022): the noise is extrapolated from the latest predictions."""
    history = []  # of predictions, newest first
    for k in range(max(path.steps)):
        # Predict the noise at t.
        m = path.active(k)
        log_snr_t = path.log_snrs[k, :m]
        eps = predict_noise(z[:m], log_snr_t)
        history = [eps, *(older[:m] for older in history[:3])]

        # The first step tries where it would lead (improved Euler); later ones look back (Adams-Bashforth).
        if k == 0:
            eps_mixed = improved_euler(predict_noise, z, eps, path, randn, sampler)
        else:
            eps_mixed = adams_bashforth(history)

        # From t to s with the mixed noise.
        x0 = clean_estimate(z[:m], log_snr_t, eps_mixed, sampler.clip)
        z = move(z, x0, path, k, randn, sampler)
        yield Step(z, x0, eps)


def improved_euler(predict_noise: NoisePredictor, z: Tensor, eps: Tensor, path: Path, randn: Callable[[], Tensor],
                   sampler: SamplerConfig) -> Tensor:
    """The first step's noise (m, 4, h, w): what the mean of the clean estimates at t and s implies in z.

    The mean of the two noises [released: plms.py:137-143] is coarser near t = 1, where a small difference in noise is a
    large one in the clean latent (sigma / alpha is 30 at t = 0.98).
    """
    # Where the prediction at t would lead, and what the network says there.
    m = len(eps)
    log_snr_t = path.log_snrs[0, :m]
    log_snr_s = path.log_snrs[1, :m]
    x0 = clean_estimate(z[:m], log_snr_t, eps, sampler.clip)
    z_ahead = move(z, x0, path, 0, randn, sampler)[:m]
    eps_ahead = predict_noise(z_ahead, log_snr_s)
    if sampler.ancestral:
        return (eps + eps_ahead) / 2

    # The mean of both clean estimates.
    x0_ahead = clean_estimate(z_ahead, log_snr_s, eps_ahead, sampler.clip)
    return eps_from_x0(z[:m], log_snr_t, (x0 + x0_ahead) / 2)


def adams_bashforth(history: list[Tensor]) -> Tensor:
    """The noise of a later step: the last two to four predictions, latest first, extrapolated."""
    coefficients = ADAMS_BASHFORTH[len(history)]
    return sum(coefficient * eps for coefficient, eps in zip(coefficients, history))
