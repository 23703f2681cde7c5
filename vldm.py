"""The view-conditioned latent diffusion model (Sec. 3.1): noising, the training loss, the predicted noise, and what
becomes of it: ancestral sampling from pure noise, multi-step denoising by PLMS, DDIM or DPM-Solver++ (Sec. 3.2).

The diffusion runs in continuous time (Kingma et al. 2021): the network of `unet.py` is conditioned on the
signal-to-noise ratio, not on a step number. The defaults of `DiffusionConfig` and `SamplerConfig` are the paper's
numbers.

    t, s          times in [0, 1], 0 is the clean latent; s < t is the next one on the way down
    log_snr       log(alpha^2 / sigma^2), falls as t grows
    alpha, sigma  z_t = alpha x0 + sigma eps, where alpha^2 = sigmoid(log_snr) and alpha^2 + sigma^2 = 1
    x0, eps       the clean latent and the noise, or what the network says about them

What differs from the released code: docs/differences.md, and the fields of `SamplerConfig`.

Shapes: `B` batch, `h w` rows and columns of the latent, `C` channels and `s` side of the features.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.settings import check_numbers, check_ranges
from unet import UNet, UNetConfig


@dataclass(frozen=True)
class DiffusionConfig:
    """The numbers of training (Sec. 3.1 and the supplement)."""
    prediction: str = "eps"   # what the network predicts: "eps", or "v" = alpha eps - sigma x0 (Salimans and Ho 2022)
    snr_gamma: float = 0.5    # exponent of the loss weight (1 + SNR)^-gamma  [released: vldm.py:610-630]
    drop: float = 0.1         # probability that a latent is trained without features  [released: train.py:524]
    noisings: int = 12        # noisings of each query latent in a training step  [released: train.py:381-393]
    t_max: float = 0.999      # largest time of training  [released: imagen_pytorch.py:217]

    def __post_init__(self):
        check_numbers(self)
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction {self.prediction!r}: must be 'eps' or 'v'")
        check_ranges(self, {"drop": (0, 1), "t_max": (1e-6, 1)})


@dataclass(frozen=True)
class SamplerConfig:
    """The numbers of sampling from noise and of multi-step denoising."""
    solver: str = "plms"          # of multi-step denoising: "plms" (Sec. 3.2), "ddim" or "dpmpp"
    denoise_steps: int = 50       # steps of any solver from a noise level of 1/2 or more; 1: one-step denoising
    sample_steps: int = 500       # steps of ancestral sampling  [released: load_model.py:82]
    clip: float = 10.0            # largest absolute value of a clean estimate  [released: load_model.py:87-90]
    t_start: float = 1.0          # time at which sampling from noise starts; higher noise levels are lowered to it
    guidance: float = 1.0         # scale of classifier-free guidance; 1 is none
    ancestral: bool = False       # fresh noise after every multi-step estimate  [released: plms.py:154, 207-212]
    unnoised_start: bool = False  # no noise on the start latent from level 0.99 on  [released: plms.py:80-85]

    def __post_init__(self):
        if self.solver not in ("plms", "ddim", "dpmpp"):
            raise ValueError(f"solver {self.solver!r}: must be 'plms', 'ddim' or 'dpmpp'")
        check_ranges(self, {"denoise_steps": (1, 10_000), "sample_steps": (1, 10_000), "clip": (1e-6, math.inf),
                            "t_start": (1e-6, 1)})


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

    def denoiser(self, cond: Tensor, sampler: SamplerConfig) -> Denoiser:
        """The network for views with features cond (B, C, s, s), as the samplers use it."""
        return Denoiser(self.unet, self.config.prediction, cond, sampler.guidance, sampler.clip)

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


# ---------------------------------------------------------------------------------------------- the network as denoiser

class Denoiser:
    """The network as `denoiser(z, log_snr) -> x0` (Karras et al. 2022): the clean latents of B views, conditioned on
    their features. Samplers need not know whether the network predicts noise or v.
    """

    def __init__(self, network: UNet, prediction: str, cond: Tensor, guidance: float, clip: float):
        """cond (B, C, s, s): features of the views; guidance and clip as in `SamplerConfig`."""
        self.network = network
        self.prediction = prediction
        self.guidance = guidance
        self.clip = clip

        # What the network makes of the features is the same at every step.
        self.embedded = network.embed_features(cond)
        self.without = None if guidance == 1 else network.embed_features(torch.zeros_like(cond))

    def __call__(self, z: Tensor, log_snr: Tensor, views: Tensor | None = None) -> Tensor:
        """Noisy latents (m, 4, h, w) at log-SNR (m,) -> clean latents (m, 4, h, w) in [-clip, clip].

        `views` (m,): whose they are of the B views; by default all of them in order.
        """
        x0, _ = self.estimate(z, log_snr, views)
        return x0

    def estimate(self, z: Tensor, log_snr: Tensor, views: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The clean latents, clipped, and, for PLMS, the noises that the network predicts, not clipped: (m, 4, h, w)
        each.
        """
        output = self.predict(z, log_snr, views)
        if self.prediction == "eps":
            return x0_from_eps(z, log_snr, output).clamp(-self.clip, self.clip), output

        # From v = alpha eps - sigma x0 and z = alpha x0 + sigma eps.
        alpha, sigma = alpha_sigma(as_factor(log_snr, z))
        x0 = alpha * z - sigma * output
        eps = alpha * output + sigma * z
        return x0.clamp(-self.clip, self.clip), eps

    def predict(self, z: Tensor, log_snr: Tensor, views: Tensor | None) -> Tensor:
        """The network's output (m, 4, h, w), with guidance."""
        embedded = self.embedded if views is None else self.embedded[views]
        output = self.network.predict(z, log_snr, embedded)
        if self.without is None:
            return output

        # Classifier-free guidance (Ho and Salimans 2022): away from what is predicted without features.
        unconditional = self.network.predict(z, log_snr, self.without[:len(z)])  # the same for every view
        return unconditional + self.guidance * (output - unconditional)


# ---------------------------------------------------------------------------------------------- sampling from noise

def ancestral_sampling(denoiser: Denoiser, randn: Callable[[], Tensor], sampler: SamplerConfig) -> Tensor:
    """Sampling from pure noise (Ho et al. 2020, Alg. 2, in continuous time): a clean latent like `randn()`."""
    # Evenly spaced times down to 0. One copy to a GPU for all steps, as each waits.
    log_snrs = cosine_log_snr(torch.linspace(sampler.t_start, 0, sampler.sample_steps + 1))
    z = randn()
    log_snr_batch = log_snrs.to(z.device)[:, None].expand(-1, len(z))

    # Every step draws from the posterior of the next latent but the last, which takes its mean.
    last = sampler.sample_steps - 1
    for k in range(last + 1):
        x0 = denoiser(z, log_snr_batch[k])
        z, variance = posterior(x0, z, log_snrs[k], log_snrs[k + 1])
        if k < last:
            z = z + variance.clamp(min=1e-20).sqrt() * randn()
    return z.clamp(-sampler.clip, sampler.clip)


# ---------------------------------------------------------------------------------------------- multi-step denoising

def denoise(denoiser: Denoiser, latents: Tensor, noise_levels: Sequence[float], randn: Callable[[], Tensor],
            sampler: SamplerConfig) -> Tensor:
    """Noise latents (B, 4, h, w) to levels in [0, 1], one per image, and denoise them in several steps (Sec. 3.2): the
    same shape.

    With `denoise_steps` = 1 it is one-step denoising, at every level: the network is called once, and what it takes for
    the clean latent is the result. `randn()` is a standard normal draw like all latents.
    """
    # To each image's noise level, from where its way to time 0 leads over log-SNRs of its own.
    log_snrs, steps = schedule(noise_levels, sampler)
    log_snrs = log_snrs.to(latents.device)
    z = noised(latents, log_snrs[0], noise_levels, randn, sampler)
    if sampler.denoise_steps == 1:
        return denoiser(z, log_snrs[0])

    # Images with more steps come first, so that those that are still on their way are always the first ones.
    views = torch.tensor(sorted(range(len(z)), key=lambda image: -steps[image]), device=z.device)

    def draw() -> Tensor:
        """Noise in that order."""
        return randn()[views]

    z = solve(denoiser, z[views], log_snrs[:, views], sorted(steps, reverse=True), views, draw, sampler)
    return z[views.argsort()]


def solve(denoiser: Denoiser, z: Tensor, log_snrs: Tensor, steps: list[int], views: Tensor, draw: Callable[[], Tensor],
          sampler: SamplerConfig) -> Tensor:
    """Latents z (B, 4, h, w) at the end of their ways, whose log-SNRs are (n + 1, B), after `steps` each, which fall.

    views (B,): whose latents they are. `draw()` is a standard normal draw like z, for steps that are random.
    """
    count = torch.tensor(steps, device=z.device)
    history = []  # of what the solver remembers (m, 4, h, w), newest first
    for k in range(steps[0]):
        # The first m images go from t to s, some of them for the last time.
        m = sum(n > k for n in steps)
        z_t = z[:m]
        log_snr_t = log_snrs[k, :m]
        log_snr_s = log_snrs[k + 1, :m]
        noise = draw if k + 1 < steps[0] else None  # the last step of all is not random
        move = partial(step, z_t, log_snr_t, log_snr_s, count[:m] == k + 1, noise, sampler)

        # The clean latent by the network, and by what it said before.
        x0, eps = denoiser.estimate(z_t, log_snr_t, views[:m])
        history = [before[:m] for before in history]
        if sampler.solver == "dpmpp":
            history = [x0, *history[:1]]
            x0 = dpmpp_estimate(history, log_snrs[max(k - 1, 0):k + 2, :m]).clamp(-sampler.clip, sampler.clip)
        elif sampler.solver == "plms":
            history = [eps, *history[:3]]
            if k == 0:
                ahead = denoiser.estimate(move(x0), log_snr_s, views[:m])
                x0 = improved_euler(z_t, log_snr_t, (x0, eps), ahead, sampler)
            else:
                x0 = plms_estimate(z_t, log_snr_t, history, sampler.clip)
        z = torch.cat([move(x0), z[m:]])
    return z


def schedule(noise_levels: Sequence[float], sampler: SamplerConfig) -> tuple[Tensor, list[int]]:
    """Log-SNRs on the way from each image's noise level to time 0, (n + 1, B), and its number of steps, at most n.

    The levels are lowered to `t_start`. From 0.99 on PLMS starts at 1 [released: plms.py:80-85]; the other solvers
    start at 0.99, since at 1 log-SNR has no end. There are `denoise_steps` steps from level 1/2 on, below so many that
    they are no longer than the shortest of these [released: plms.py:87-93]; PLMS rounds down, and takes none below
    1 / (2 denoise_steps), the others round up. PLMS takes even steps in time, the others in log-SNR (Lu et al. 2022).
    """
    ways = []
    for level in noise_levels:
        # Where it starts, and how many steps lead to 0.
        start = start_time(level, sampler)
        wanted = 2 * sampler.denoise_steps * start
        whole = int(wanted) if sampler.solver == "plms" else math.ceil(wanted)
        n = 1 if sampler.denoise_steps == 1 else min(whole, sampler.denoise_steps)

        # Evenly.
        if sampler.solver == "plms":
            ways.append(cosine_log_snr(torch.linspace(start, 0, n + 1)))
        else:
            first, last = cosine_log_snr(torch.tensor([start, 0.0])).tolist()
            ways.append(torch.linspace(first, last, n + 1))

    # Side by side; an image with fewer steps stays at time 0 when it is done.
    steps = [len(way) - 1 for way in ways]
    log_snrs = cosine_log_snr(torch.zeros(max(steps) + 1, len(steps)))
    for image, way in enumerate(ways):
        log_snrs[:len(way), image] = way
    return log_snrs, steps


def start_time(noise_level: float, sampler: SamplerConfig) -> float:
    """Where multi-step denoising starts from a noise level, see `schedule`."""
    level = min(noise_level, sampler.t_start)
    if level < 0.99:
        return level
    return 1.0 if sampler.solver == "plms" else 0.99


def noised(x0: Tensor, log_snr: Tensor, noise_levels: Sequence[float], randn: Callable[[], Tensor],
           sampler: SamplerConfig) -> Tensor:
    """Latents x0 (B, 4, h, w) noised to log-SNR (B,). With `unnoised_start` those at the highest level stay as they
    are, as in the released code.
    """
    kept = [start_time(level, sampler) == 1 and sampler.unnoised_start for level in noise_levels]
    if all(kept):
        return x0
    z = q_sample(x0, log_snr, randn())
    return torch.where(as_factor(torch.tensor(kept, device=x0.device), x0), x0, z) if any(kept) else z


def step(z: Tensor, log_snr_t: Tensor, log_snr_s: Tensor, last: Tensor, draw: Callable[[], Tensor] | None,
         sampler: SamplerConfig, x0: Tensor) -> Tensor:
    """From z at t to s, where the clean latents are x0, all (m, 4, h, w), and log-SNRs (m,).

    `last` (m,): for which it is the last step. `draw()`: standard normal noise for a random step, of m images or more;
    None where it is the last step of all.
    """
    # DDIM (Song et al. 2021): the clean latent, and the noise that it implies in z, at s's level.
    mean, variance = posterior(x0, z, log_snr_t, log_snr_s)
    if not sampler.ancestral:
        alpha_t, sigma_t = alpha_sigma(as_factor(log_snr_t, z))
        alpha_s, sigma_s = alpha_sigma(as_factor(log_snr_s, z))
        moved = alpha_s * x0 + sigma_s * (z - alpha_t * x0) / sigma_t
    else:
        moved = mean if draw is None else mean + variance.clamp(min=1e-20).sqrt() * draw()[:len(z)]

    # The last step is the posterior's mean where steps are random, and in PLMS.
    if sampler.ancestral or sampler.solver == "plms":
        moved = torch.where(as_factor(last, z), mean.clamp(-sampler.clip, sampler.clip), moved)
    return moved


def dpmpp_estimate(history: list[Tensor], log_snrs: Tensor) -> Tensor:
    """The clean latent of a step by DPM-Solver++ 2M (Lu et al. 2022, Alg. 2): half a step ahead, as it changed last.

    history: the clean latents (m, 4, h, w) at t and, from the second step on, at the time before, whose log-SNRs come
    with those of t and s: log_snrs (3, m).
    """
    if len(history) == 1:
        return history[0]
    x0, x0_before = history
    before, log_snr_t, log_snr_s = log_snrs
    share = (log_snr_s - log_snr_t) / 2 / (log_snr_t - before)
    return x0 + as_factor(share, x0) * (x0 - x0_before)


# Adams-Bashforth: how much the latest prediction counts, and those before it, where there are 2, 3 or 4.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms_estimate(z: Tensor, log_snr: Tensor, history: list[Tensor], clip: float) -> Tensor:
    """The clean latent of a step by PLMS (Liu et al. 2022): the noise is extrapolated from the latest predictions.

    z (m, 4, h, w) at log_snr (m,); `history`: two to four predicted noises like z, latest first.
    """
    coefficients = ADAMS_BASHFORTH[len(history)]
    eps = sum(coefficient * eps for coefficient, eps in zip(coefficients, history))
    return x0_from_eps(z, log_snr, eps).clamp(-clip, clip)


def improved_euler(z: Tensor, log_snr: Tensor, here: tuple[Tensor, Tensor], ahead: tuple[Tensor, Tensor],
                   sampler: SamplerConfig) -> Tensor:
    """The clean latent of the first step by PLMS: the mean of what the network says here and where that leads.

    z (m, 4, h, w) at log_snr (m,); `here`, `ahead`: clean latent and noise by the network. The mean of the two noises
    [released: plms.py:137-143] is coarser near t = 1, where a small difference in noise is a large one in the clean
    latent (sigma / alpha is 30 at t = 0.98); it remains where steps are random.
    """
    if sampler.ancestral:
        eps = (here[1] + ahead[1]) / 2
        return x0_from_eps(z, log_snr, eps).clamp(-sampler.clip, sampler.clip)
    return (here[0] + ahead[0]) / 2
