"""Diffusion distillation: the algorithm (Sec. 3.2 and supplement). `Distillation.step` is the algorithm box.

In each of N iterations a field is rendered twice, and updated after each:

    1. one input view     -> color and silhouette loss against its picture and mask
    2. one query view x   -> in the first iterations (bootstrap): the same loss against the EFT image;
                             in all later ones: x_hat = denoise(x noised to a random level t), and the loss
                             (1 - alpha^2(t)) |x - x_hat| + 0.1 perceptual(x, x_hat), with x_hat a constant

Why that is distillation: a noise predictor's error, weighted over all noise levels, bounds -log p(x), and it is the
distance between a rendering and its denoised version. The paper compares pixels and takes several denoising steps,
where SDS (Poole et al. 2022) compares latents after one: it finds the targets less noisy (Sec. 3.2).

Differences from the released code: docs/differences.md.

Letters: `V` input views, `Q` query viewpoints, `B` batch, `s` side of a rendering, `S` side of the image.
"""
from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ngp
import vldm
import volume
from cameras import Cameras
from lattice import Lattice, random_lattice, upsample
from metrics import pseudo_huber
from ngp import Field, FieldConfig, Occupancy
from runtime import Progress
from scenes import Scene
from sparsefusion import Condition, SparseFusion

SAVE_SECONDS = 60  # between two checkpoints of a running distillation


# ---------------------------------------------------------------------------------------------- the numbers

@dataclass(frozen=True)
class DistillConfig:
    """The numbers of one distillation. The defaults are the released ones; `RELEASED` adds what the released code does
    otherwise.
    """
    iterations: int = 3000               # updates of each kind [released: demo.py:101]
    bootstrap: int = 1001                # first iterations, fit to the EFT images [released: distillation.py:156, 294]
    viewpoints: int = 50                 # query viewpoints on the circle path [released: distillation.py:73]
    jitter: float = 0.17                 # radians; random swing of each of them [released: distillation.py:73]
    image_size: int = 256                # S of the pictures where there is no prior to say
    render_size: int = 128               # s of a rendering, upsampled to S [released: distillation.py:85]
    lr_grid: float = 5e-3                # Adam's rate for the encoding's table [released: network_grid.py:223-228]
    lr_mlp: float = 5e-4                 # Adam's rate for the network, from the same lines
    # The rates fall exponentially to this fraction by the end; 1: constant [released: distillation.py:166, 247, 352].
    final_lr_fraction: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's decay rates [released: distillation.py:165]
    eps: float = 1e-8                    # Adam's smallest denominator [released: distillation.py:165]
    lr_exposure: float = 0.0             # Adam's rate for the gains of the input views; 0: all were exposed alike
    weight_exposure: float = 0.3         # of the gains' spread; at 0 the colors of two sides become gains
    footprint: int = 1                   # pixels a side, odd, of the squares over which input views' colors are means
    weight_background: float = 1.0       # of pixels outside an input's mask; below 1 where masks are rough
    weight_opacity: float = 1e-3         # of the opacity term [released: distillation.py:150-151]
    weight_perceptual: float = 0.1       # of the perceptual term of distillation [released: distillation.py:312-314]
    min_noise_level: float = 0.0         # noise levels are drawn from U(this, 1)
    occupancy_every: int = 16            # iterations between two looks at where space is empty
    mesh_resolution: int = 160           # cells along the longest side of the meshed box
    turntable_frames: int = 36           # pictures of the turntable
    eft_train_mode: bool = False         # dropout and batch statistics on [released: load_model.py:33-45, 179]
    metrics_on_inputs: bool = False      # measure input views, too [released: distillation.py:395-443]
    sampler: vldm.SamplerConfig = vldm.PAPER_SAMPLER
    field: FieldConfig = ngp.PAPER

    def __post_init__(self):
        if min(self.iterations, self.viewpoints, self.image_size, self.render_size, self.occupancy_every) < 1:
            raise ValueError("iterations, viewpoints, image_size, render_size and occupancy_every are at least 1")
        if self.mesh_resolution < 1 or self.turntable_frames < 1:
            raise ValueError("mesh_resolution and turntable_frames are at least 1")
        if not 0 <= self.bootstrap <= self.iterations:
            raise ValueError(f"bootstrap {self.bootstrap} is not between 0 and the {self.iterations} iterations")
        if self.footprint < 1 or self.footprint % 2 == 0:
            raise ValueError(f"footprint {self.footprint} is not an odd number of pixels")
        if not 0 <= self.min_noise_level <= 1:
            raise ValueError(f"min_noise_level {self.min_noise_level} is not in [0, 1]")
        if not 0 < self.final_lr_fraction:
            raise ValueError(f"final_lr_fraction {self.final_lr_fraction} is not above 0")

    def with_iterations(self, iterations: int) -> DistillConfig:
        """The same for another number of iterations: the bootstrap keeps its length, but takes at most two thirds of
        them.
        """
        return replace(self, iterations=iterations, bootstrap=min(self.bootstrap, iterations * 2 // 3))


# The learning rates, their decay and the numbers of Adam (Instant NGP's, Sec. 4) in `nano` and `plain` are not the
# released ones: they are what measured best on the tuning toys.
PRESETS = {
    "paper": DistillConfig(),
    "nano": DistillConfig(
        iterations=500, bootstrap=120, viewpoints=24, image_size=128, render_size=64,
        lr_grid=5e-2, lr_mlp=1e-2, final_lr_fraction=0.1, betas=(0.9, 0.99), eps=1e-15, min_noise_level=0.2,
        sampler=vldm.NANO_SAMPLER, field=ngp.NANO,
    ),
    # Photographs without a prior: exposure varies, masks are rough, and resizing without a filter aliases. (The gains
    # of the exposures are NeRF in the Wild's appearance codes, Martin-Brualla et al. 2021, reduced to three numbers a
    # view.)
    "plain": DistillConfig(
        iterations=1000, bootstrap=666, image_size=256, render_size=64,
        lr_grid=3e-2, lr_mlp=1e-2, final_lr_fraction=0.05, betas=(0.9, 0.99), eps=1e-15,
        lr_exposure=1e-2, footprint=5, weight_background=0.3,
        field=replace(ngp.NANO, levels=6, finest_resolution=96, log2_hashmap_size=17),
    ),
}

# What `--released` stands for: the released code's behavior, where ours differs in some preset and a field can say so.
# Sizes, learning rates and the number of PLMS steps stay the preset's.
RELEASED = (
    "field.hashed=false",
    "field.carve=false",
    "sampler.ancestral=true",
    "sampler.unnoised_start=true",
    "sampler.t_start=1",  # or no noise level is high enough for `unnoised_start`
    "sampler.sample_steps=500",
    "min_noise_level=0",
    "betas=0.9,0.999",
    "eps=1e-8",
    "final_lr_fraction=1",
    "lr_exposure=0",
    "footprint=1",
    "weight_background=1",
    "eft_train_mode=true",
    "metrics_on_inputs=true",
)


# ---------------------------------------------------------------------------------------------- losses

def photometric_loss(color: Tensor, silhouette: Tensor, target: Tensor, mask: Tensor,
                     weight_background: float = 1.0) -> Tensor:
    """Pseudo-Huber color loss plus pseudo-Huber silhouette loss, means over (B, 3, s, s) and (B, 1, s, s): a scalar.

    Pixels outside the mask weigh `weight_background`, those inside 1. [released: distillation.py:218-227]
    """
    weight = weight_background + (1 - weight_background) * mask
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


def footprint_colors(images: Tensor, masks: Tensor, footprint: int) -> Tensor:
    """Colors (B, 3, H, W), means over squares of `footprint` pixels a side, of the object in premultiplied images.

    images (B, 3, H, W), masks (B, 1, H, W) in [0, 1]. Only the object counts, or background and what is outside of the
    picture would darken its rim. Premultiplied again by the masks, which stay sharp.
    """
    # A single pixel is its own mean.
    if footprint == 1:
        return images

    # The mask's mean is 0 only where the pixel's own mask is, too.
    pool = partial(F.avg_pool2d, kernel_size=footprint, stride=1, padding=footprint // 2)
    share = pool(masks)
    color = pool(images) / torch.where(share > 0, share, 1)
    return color * masks


# ---------------------------------------------------------------------------------------------- the algorithm

NEVER = 2**62  # an iteration that no run reaches


class Prior(NamedTuple):
    """What distillation asks of the diffusion model."""
    model: SparseFusion
    viewpoints: Cameras        # (Q,) in the object frame
    condition: Condition    # what the EFT says about them, computed once
    perceptual_loss: Callable[[Tensor, Tensor], Tensor]  # images (B, 3, S, S) twice -> (B,)


class Exposures(nn.Module):
    """A gain for every input view and color channel, of which only the differences count."""

    def __init__(self, views: int):
        super().__init__()
        self.log_gains = nn.Parameter(torch.zeros(views, 3))

    def forward(self, color: Tensor, view: int) -> Tensor:
        """A rendering (1, 3, s, s) as the camera of an input view exposed it."""
        gain = (self.log_gains[view] - self.log_gains.mean(0)).exp()
        return color * gain[:, None, None]

    def spread(self) -> Tensor:
        """Mean square of the logarithmic gains: a scalar."""
        return self.log_gains.square().mean()


class Distillation:
    """The field of one instance with everything that its optimization needs. `step` is the algorithm; `run` repeats
    it.
    """

    def __init__(self, inputs: Scene, config: DistillConfig, seed: int, prior: Prior | None = None):
        """inputs: the V input views, in the object frame. Without a `prior` the field fits them alone."""
        self.inputs = inputs
        self.config = config
        self.seed = seed
        self.prior = prior
        self.completed = 0      # iterations
        self.seconds = 0.0      # that they took
        self.input_error = torch.zeros(())  # mean squared error of the last input view's colors, for the progress bar

        # The field, and where the masks allow it to be.
        device = inputs.images.device
        self.generator = torch.Generator(device)
        self.field = Field(config.field, torch.Generator().manual_seed(seed)).to(device)
        self.occupancy = Occupancy(config.field).to(device)
        self.occupancy.carve(inputs.masks, inputs.cameras, inputs.valid)
        self.exposures = Exposures(len(inputs)).to(device)

        # What the input views teach.
        self.colors = footprint_colors(inputs.images, inputs.masks, config.footprint)

        # One optimizer, a learning rate for each of its three groups.
        self.optimizer = torch.optim.Adam([
            {"params": self.field.encoding.parameters(), "lr": config.lr_grid},
            {"params": self.field.mlp.parameters(), "lr": config.lr_mlp},
            {"params": self.exposures.parameters(), "lr": config.lr_exposure},
        ], betas=config.betas, eps=config.eps)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]

        # The first iteration whose loss was not finite, of each of the two.
        self.broken = {term: torch.full((), NEVER, device=device) for term in ("input", "query")}

    def step(self, iteration: int) -> Tensor:
        """One iteration (Sec. 3.2 and supplement): an update from an input view, then one from a query view. Returns
        the last loss.

        Raises `FloatingPointError` where a loss was not finite, in this iteration or in one of the last few.
        """
        # Everything random in an iteration follows from the seed and its number, so a resumed run goes on as it would
        # have.
        self.generator.manual_seed(self.seed * 1_000_003 + iteration)
        rng = random.Random(f"{self.seed} {iteration}")

        # 1. What is known.
        loss = self.update("input", iteration, self.input_loss(rng))

        # 2. What is likely.
        if self.prior is not None:
            loss = self.update("query", iteration, self.query_loss(iteration, rng))

        # To look at a loss is to wait for the GPU, so it happens where that is done anyway.
        looks_at_space = iteration % self.config.occupancy_every == self.config.occupancy_every - 1
        if looks_at_space or iteration % 10 == 0 or iteration == self.config.iterations - 1:
            self.check_losses()

        # Where nothing is, nothing needs to be looked at.
        if looks_at_space:
            self.occupancy.update(self.field, self.generator)
        return loss

    def update(self, term: str, iteration: int, loss: Tensor) -> Tensor:
        """One step of the optimizer down a loss, the input or the query view's, which is returned."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

        # Remember when it broke, without reading it.
        now = torch.where(loss.detach().isfinite(), NEVER, iteration)
        self.broken[term] = torch.minimum(self.broken[term], now)
        return loss.detach()

    def check_losses(self) -> None:
        """Raises `FloatingPointError` if a loss was infinite or not a number so far: the field is lost then."""
        first = {term: int(iteration) for term, iteration in self.broken.items()}
        term = min(first, key=first.get)  # of two in one iteration the input view's, which comes first
        if first[term] < NEVER:
            raise FloatingPointError(f"the loss of the {term} view is not a finite number in iteration {first[term]}; "
                                     "the field cannot recover from that")

    def input_loss(self, rng: random.Random) -> Tensor:
        """A random input view against its photograph: color, silhouette, opacity, exposures."""
        view = rng.randrange(len(self.inputs))
        color, silhouette, lattice = self.render(self.inputs.cameras[view], self.inputs.images.shape[-1], rng)
        target = lattice.pick(self.colors[view:view + 1])
        mask = lattice.pick(self.inputs.masks[view:view + 1])

        exposed = self.exposures(color, view)
        self.input_error = (exposed.detach() - target).square().mean()
        loss = photometric_loss(exposed, silhouette, target, mask, self.config.weight_background)
        loss = loss + self.config.weight_opacity * opacity_loss(silhouette)
        return loss + self.config.weight_exposure * self.exposures.spread()

    def query_loss(self, iteration: int, rng: random.Random) -> Tensor:
        """A random query viewpoint: against the EFT image while that lasts, then against its own denoised version."""
        query = rng.randrange(len(self.prior.viewpoints))
        size = self.prior.model.preset.image_size
        color, silhouette, lattice = self.render(self.prior.viewpoints[query], size, rng)
        if iteration < self.config.bootstrap:
            loss = self.bootstrap_loss(color, silhouette, lattice, query)
        else:
            loss = self.distillation_loss(color, lattice, query, rng)
        return loss + self.config.weight_opacity * opacity_loss(silhouette)

    def bootstrap_loss(self, color: Tensor, silhouette: Tensor, lattice: Lattice, query: int) -> Tensor:
        """The rendering (1, 3, s, s) and its silhouette (1, 1, s, s) against the EFT image of the query viewpoint."""
        eft_image = self.prior.condition.images[query:query + 1]
        target = lattice.pick(upsample(eft_image, lattice.full))
        return photometric_loss(color, silhouette, target, brightness_mask(target))

    def distillation_loss(self, color: Tensor, lattice: Lattice, query: int, rng: random.Random) -> Tensor:
        """The rendering (1, 3, s, s) against what the diffusion model makes of it; no gradient flows through the
        model.
        """
        # Lift the rendering to the image's size and a random noise level, and denoise it.
        x = upsample(color, lattice.full, lattice)
        noise_level = self.config.min_noise_level + (1 - self.config.min_noise_level) * rng.random()
        features = self.prior.condition.features[query:query + 1]
        x_hat = self.prior.model.denoise(x.detach(), features, noise_level, self.generator, self.config.sampler)

        # Move it towards the denoised version, in pixels and in features.
        pixels = (x - x_hat).abs().mean()
        perceptual = self.prior.perceptual_loss(x, x_hat).mean()
        return fusion_weight(noise_level) * pixels + self.config.weight_perceptual * perceptual

    def render(self, camera: Cameras, full: int, rng: random.Random) -> tuple[Tensor, Tensor, Lattice]:
        """Color (1, 3, s, s) and silhouette (1, 1, s, s) on a random lattice of a view's full x full pixels, and the
        lattice.
        """
        side = self.config.render_size
        lattice = random_lattice(side, full, rng)
        rays_o, rays_d = camera.rays(lattice.centers(camera.T.device))
        rendering = volume.render(self.field, rays_o, rays_d, self.generator, self.occupancy)
        color = rendering.color.t().reshape(1, 3, side, side)
        silhouette = rendering.opacity.reshape(1, 1, side, side)
        return color, silhouette, lattice

    def run(self, title: str | None = None, save: Callable[[], None] | None = None) -> None:
        """All iterations that are left. `title` shows progress; `save` is called about once a minute."""
        total = self.config.iterations
        progress = Progress(range(self.completed, total), title, self.completed, total)
        saved = time.monotonic()
        for iteration in progress:
            began = time.monotonic()
            self.set_learning_rates(iteration)
            loss = self.step(iteration)
            self.completed = iteration + 1
            self.seconds += time.monotonic() - began

            # Now and then: how it goes, and something to go on from.
            if iteration % 10 == 0:
                psnr = -10 * math.log10(float(self.input_error) + 1e-10)
                progress.note = f"loss {float(loss):.4f}, input view {psnr:.1f} dB"
            if save is not None and time.monotonic() - saved > SAVE_SECONDS:
                self.check_losses()
                save()
                saved = time.monotonic()

    def set_learning_rates(self, iteration: int) -> None:
        """Exponential decay from the peak rates to `final_lr_fraction` of them after the last iteration; 1: none."""
        fraction = self.config.final_lr_fraction ** (iteration / self.config.iterations)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates):
            group["lr"] = peak * fraction

    def state_dict(self) -> dict:
        """What a rerun needs to go on."""
        parts = {name: getattr(self, name).state_dict() for name in ("field", "occupancy", "exposures", "optimizer")}
        return parts | {"completed": self.completed, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state."""
        for name in ("field", "occupancy", "exposures", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.completed = state["completed"]
        self.seconds = state["seconds"]
