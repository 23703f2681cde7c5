"""Diffusion distillation: one neural field from a few pictures, sought at the mode of the view-conditioned diffusion (Sec. 3.2).

    python distill.py                                  the shipped synthetic sample, two input views
    python distill.py --root DIR --category C --sequence S --weights F

The loop, for each of N iterations (supplement, Alg. 1):

    1. render one input view     -> colour and silhouette loss against its picture and mask
    2. render one query view x   -> bootstrap: loss against the EFT image; then: x_hat = denoise(x noised to level t), t ~ U(0, 1),
                                    loss (1 - alpha^2(t)) |x - x_hat| + 0.1 perceptual(x, x_hat), with x_hat a constant

Why that is distillation (Eq. 7-9): an epsilon-predictor's error bounds -log p(x), so a rendering that equals its own denoised version
is likely. Pixel space and multi-step targets give calmer gradients than the one-step, latent SDS form.

Differences from the released code: see "Differences from the released code" in the README.

Letters: `V` input views, `Q` query viewpoints, `R` rays, `s` side of a rendering, `S` side of the image.
"""
from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import metrics
import ngp
import sparsefusion as sf
import vldm
from cameras import Cameras, circle_path, pixel_grid, relative_to
from co3d import Scene, evenly_spaced, load_sequence, sequences
from ngp import Field, FieldConfig, Occupancy

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class DistillConfig:
    """The numbers of one distillation; defaults are the released ones (supplement)."""
    iterations: int = 3000
    bootstrap: int = 1000           # first iterations, which fit the EFT images
    viewpoints: int = 50            # on the circle path, besides the sequence's own cameras
    jitter: float = 0.17            # radians: random swing of each of them
    image_size: int = 256           # S of the pictures where there is no prior to say
    render_size: int = 128          # s of a rendering, upsampled to S
    lr_grid: float = 5e-3           # Adam, table of the encoding
    lr_mlp: float = 5e-4            # Adam, network
    decay: float = 0.2              # learning rates fall to this fraction by the last iteration (released: after 3000)
    opacity: float = 1e-3           # weight of the opacity term
    perceptual: float = 0.1         # weight of the perceptual term of distillation
    t_max: float = 1.0              # noise levels ~ U(0, t_max)
    steps: int = 50                 # of multi-step denoising from t = 1/2 or above
    occupancy_every: int = 16       # iterations between looks at where space is empty
    field: FieldConfig = ngp.PAPER

    @property
    def digest(self) -> dict:
        """For checkpoints: plain numbers."""
        return asdict(self)


PAPER = DistillConfig()
NANO = DistillConfig(iterations=500, bootstrap=120, viewpoints=24, image_size=128, render_size=64, lr_grid=1e-2, lr_mlp=2e-3, steps=5,
                     field=replace(ngp.NANO, bound=4.0, finest_resolution=160))
PLAIN = DistillConfig(iterations=1500, image_size=256, render_size=64, lr_grid=1e-2, lr_mlp=2e-3, field=replace(
    ngp.NANO, bound=4.0, levels=6, finest_resolution=384, log2_table=17))
PRESETS = {"paper": PAPER, "nano": NANO, "plain": PLAIN}


# ---------------------------------------------------------------------------------------------- losses (supplement)


def photometric_loss(colour: Tensor, silhouette: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Pseudo-Huber colour loss plus pseudo-Huber silhouette loss, means over (B, 3, s, s) and (B, 1, s, s): a scalar."""
    return sf.pseudo_huber(colour - target).mean() + sf.pseudo_huber(silhouette - mask).mean()


def opacity_loss(silhouette: Tensor) -> Tensor:
    """mean sqrt(silhouette^2 + 0.01): prefers empty space. A scalar."""
    return (silhouette**2 + 0.01).sqrt().mean()


def eft_mask(image: Tensor) -> Tensor:
    """The silhouette of an EFT image (B, 3, s, s): where its mean colour is over 0.1, (B, 1, s, s) of 0 and 1."""
    return (image.mean(1, keepdim=True) > 0.1).to(image.dtype)


def fusion_weight(level: float) -> float:
    """1 - alpha^2 at noise level t in [0, 1]: the weight of the distillation loss (Eq. 9)."""
    return torch.sigmoid(-vldm.log_snr(torch.tensor(float(level)))).item()


# ---------------------------------------------------------------------------------------------- rendering


def render_view(field: Field, camera: Cameras, size: int, full: int, generator: torch.Generator | None = None,
                occupancy: Occupancy | None = None, chunk: int = 2**15) -> tuple[Tensor, Tensor]:
    """Colour (1, 3, size, size) and silhouette (1, 1, size, size), in [0, 1], of a whole view; see `cameras.pixel_grid` for `full`."""
    rays_o, rays_d = camera.rays(pixel_grid(size, size, full, device=camera.T.device))
    parts = [ngp.render(field, o, d, generator, occupancy) for o, d in zip(rays_o.split(chunk), rays_d.split(chunk))]
    seen = torch.cat([torch.cat([p.colour, p.opacity[:, None]], 1) for p in parts])  # (R, 4)
    seen = seen.t().reshape(1, 4, size, size)
    return seen[:, :3], seen[:, 3:]


def lattice(size: int, full: int, generator: torch.Generator, device) -> Tensor:
    """Every (full / size)-th pixel centre of a `full` x `full` image, from a random first one: NDC (size * size, 2), row-major."""
    step = full // size
    first = torch.randint(step, (2,), generator=generator, device=generator.device).tolist()
    grid = pixel_grid(full, full, device=device).reshape(full, full, 2)
    return grid[first[0]::step, first[1]::step][:size, :size].reshape(-1, 2)


# ---------------------------------------------------------------------------------------------- the loop


class Distillation:
    """The field of one instance with all that its optimisation needs; `run` is the algorithm."""

    def __init__(self, inputs: Scene, config: DistillConfig, seed: int, model: sf.SparseFusion | None = None,
                 viewpoints: Cameras | None = None, limits: tuple[float, float] | None = None, perceptual=None, **sampler):
        """inputs: the V input views in the object frame. With a `model`, also the Q `viewpoints` to imagine, in the same frame, the
        depth limits of its rays and the perceptual distance of the loss; without, a plain field fit. `sampler` goes to PLMS."""
        self.inputs, self.config, self.seed, self.model, self.viewpoints = inputs, config, seed, model, viewpoints
        self.limits, self.perceptual, self.sampler = limits, perceptual, sampler
        device = inputs.images.device
        self.field = Field(config.field, torch.Generator().manual_seed(seed)).to(device)
        self.occupancy = Occupancy(config.field).to(device)
        self.occupancy.carve(inputs.masks, inputs.cameras, inputs.valid)
        self.optimizer = torch.optim.Adam([{"params": self.field.encoding.parameters(), "lr": config.lr_grid},
                                           {"params": self.field.mlp.parameters(), "lr": config.lr_mlp}], betas=(0.9, 0.99), eps=1e-15)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.iteration, self.seconds, self.generator = 0, 0.0, torch.Generator(device)
        self.condition = None

    def input_step(self) -> Tensor:
        """Loss of one random input view, on a random lattice of its pixels (step 1)."""
        scene, i = self.inputs, self.random.randrange(len(self.inputs))
        s, S = self.config.render_size, scene.images.shape[-1]
        xy = lattice(s, S, self.generator, scene.images.device)
        seen = ngp.render(self.field, *scene.cameras[i].rays(xy), self.generator, self.occupancy)
        target, mask = sf.colours_at(scene.images[i:i + 1], xy)[0], sf.colours_at(scene.masks[i:i + 1], xy)[0]
        loss = photometric_loss(seen.colour, seen.opacity[:, None], target, mask)
        psnr = -10 * math.log10((seen.colour.detach() - target).square().mean().item() + 1e-10)
        self.psnr = psnr if self.psnr is None else 0.95 * self.psnr + 0.05 * psnr
        return loss + self.config.opacity * opacity_loss(seen.opacity)

    def query_step(self) -> Tensor:
        """Loss of one random query viewpoint (step 2): towards the EFT image, later towards the denoised rendering."""
        c, q = self.config, self.random.randrange(len(self.viewpoints))
        S = self.model.preset.image_size
        colour, silhouette = render_view(self.field, self.viewpoints[q], c.render_size, S, self.generator, self.occupancy)
        features, guess = self.condition.features[q:q + 1], self.condition.images[q:q + 1]
        if self.iteration < c.bootstrap:
            guess = F.interpolate(guess, size=c.render_size, mode="bilinear", align_corners=False)
            loss = photometric_loss(colour, silhouette, guess, eft_mask(guess))
        else:
            x = F.interpolate(colour, size=S, mode="bilinear", align_corners=False)
            level = c.t_max * self.random.random()
            x_hat = self.model.denoise(x.detach(), features, level, self.generator, steps=c.steps, **self.sampler)
            loss = fusion_weight(level) * (x - x_hat).abs().mean() + c.perceptual * self.perceptual(x, x_hat).mean()
        return loss + c.opacity * opacity_loss(silhouette)

    def run(self, progress: str | None = None, checkpoint=None) -> None:
        """All iterations that are left. `checkpoint()` is called about once a minute."""
        c, self.psnr, saved = self.config, None, time.time()
        if self.model is not None and self.condition is None:
            self.condition = self.model.condition(self.inputs.images, self.inputs.cameras, self.viewpoints, *self.limits,
                                                  progress=progress and "EFT viewpoints")
        bar = tqdm(range(self.iteration, c.iterations), initial=self.iteration, total=c.iterations, desc=progress,
                   disable=None if progress else True, mininterval=0.5)
        for self.iteration in bar:
            began = time.time()
            self.generator.manual_seed(self.seed * 1_000_003 + self.iteration)  # an iteration's numbers depend on nothing before it
            self.random = random.Random(f"{self.seed} {self.iteration}")
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * c.decay ** (self.iteration / c.iterations)
            for step in [self.input_step] + [self.query_step] * (self.model is not None):
                loss = step()
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
            if self.iteration % c.occupancy_every == c.occupancy_every - 1:
                self.occupancy.update(self.field, self.generator)
            self.seconds += time.time() - began
            if self.iteration % 10 == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}, input PSNR {self.psnr:.1f} dB")
            if checkpoint and time.time() - saved > 60:
                self.iteration, saved = self.iteration + 1, time.time()
                checkpoint()
        self.iteration = c.iterations

    def state_dict(self) -> dict:
        """What a rerun needs to go on."""
        return {"field": self.field.state_dict(), "occupancy": self.occupancy.state_dict(), "optimizer": self.optimizer.state_dict(),
                "iteration": self.iteration, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state."""
        for name in ("field", "occupancy", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.iteration, self.seconds = state["iteration"], state["seconds"]

    @torch.no_grad()
    def views(self, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, size, size) and silhouettes (B, 1, size, size) of the field."""
        parts = [render_view(self.field, cameras[i], size, size, None, self.occupancy) for i in range(len(cameras))]
        return tuple(torch.cat(x) for x in zip(*parts))
