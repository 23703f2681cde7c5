"""Diffusion distillation: the algorithm (Sec. 3.2 and supplement). `Distillation.step` is the algorithm box.

In each of N iterations a field is rendered twice, and updated after each:

    1. one input view     -> color and silhouette loss against its picture and mask
    2. one query view x   -> in the first iterations (bootstrap): the same loss against the EFT image;
                             in all later ones: x_hat = denoise(x noised to a random level t), and the loss
                             (1 - alpha^2(t)) |x - x_hat| + 0.1 perceptual(x, x_hat), with x_hat a constant

To both comes a small loss that prefers empty space. With V input views the losses of query views weigh
`prior_views` / V, at most 1: in the paper always 1, in the preset `nano` 3 / V.

The denoised versions of several iterations' query views are made in one batch, when the first of these iterations
comes, for a view of a batch costs a fraction of a view alone: x_hat belongs to a rendering of the same view that is up
to a batch's iterations old.

Why that is distillation: a noise predictor's error, weighted over all noise levels, bounds -log p(x), and it is the
distance between a rendering and its denoised version. The paper compares pixels and takes several denoising steps,
where SDS (Poole et al. 2022) compares latents after one: it finds the targets less noisy (Sec. 3.2).

A rendering has every n-th pixel of the image, from a random first one (`Lattice`): over time every pixel's ray is cast.
The released code renders the same 128 x 128 rays in every iteration [released: distillation.py:85], and upsamples as if
pixels of the small picture were squares [released: distillation.py:287-288]. Other differences: docs/differences.md.

Shapes: `V` input views, `Q` query viewpoints, `B` batch, `s` side of a rendering, `S` side of the image.
"""
from __future__ import annotations

import math
import random
import time
from collections import defaultdict
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
from cameras import HALF_SIDE, Cameras, Scene, pixel_grid
from common import files
from common.machine import stream_seed
from common.progress import Progress
from common.settings import check_ranges
from gpu.update import GraphedAdam, Graphs
from ngp import Field, FieldConfig
from sparsefusion import Condition, SparseFusion
from volume import Occupancy, SampleBuffer

MOST_FURTHER = 20_000  # iterations that many input views may add
MOST_CELLS = 2048  # per side of the finest grid of many input views
LONG = 4000  # iterations from which on many input views are learned with a larger network, batch and number of samples
REFERENCE_SIZE = 256  # pixels a side from which on larger pictures bear a finer field
SAVE_SECONDS = 60  # between two checkpoints of a running distillation
UNLIKE = 2  # a photograph so many times as bright or as dark as the median one was exposed differently
MOST_SAMPLES = 2**26  # of the rays of an update: gigabytes
LOOK_EVERY = 16  # iterations, at most, between two looks at the losses
NEVER = 2**62    # an iteration that no run reaches


# ---------------------------------------------------------------------------------------------- the algorithm

class Prior(NamedTuple):
    """The model, what it was given, and how its pictures are compared."""
    model: SparseFusion
    viewpoints: Cameras        # (Q,) in the object frame
    condition: Condition       # what the EFT says about them, computed once
    perceptual_loss: Callable[[Tensor, Tensor], Tensor]  # images (B, 3, S, S) twice -> (B,)

    def eft_images(self) -> Tensor:
        """The EFT's images of the viewpoints, as large as the model's, (Q, 3, S, S)."""
        size = self.model.preset.image_size
        return F.interpolate(self.condition.images, size, mode="bilinear", align_corners=True)


class Exposures(nn.Module):
    """A gain for every input view and color channel, relative to the mean of all views."""

    def __init__(self, guess: Tensor):
        """guess (V,): where the logarithmic gains begin."""
        super().__init__()
        self.register_buffer("guess", guess[:, None].expand(-1, 3).clone(), persistent=False)
        self.log_gains = nn.Parameter(self.guess.clone())

    def forward(self, color: Tensor, view: Tensor) -> Tensor:
        """Rendered colors (R, 3) as the cameras of the input views (R,), that they belong to, exposed them."""
        moved = self.log_gains - self.guess
        gains = (self.guess + moved - moved.mean(0)).exp()
        return color * F.embedding(view, gains)

    def spread(self) -> Tensor:
        """Mean square of what the logarithmic gains have moved by: a scalar."""
        return (self.log_gains - self.guess).square().mean()


class Query(NamedTuple):
    """The query view of an iteration."""
    view: int             # of the query viewpoints
    lattice: Lattice      # of its pixels
    noise_level: float    # in [0, 1], at which denoising starts


class Rays(NamedTuple):
    """R rays and where their samples are."""
    o: Tensor             # (R, 3)
    d: Tensor             # (R, 3)
    u: Tensor             # (R, D) in [0, 1), of `volume.uniform_draws`
    u_importance: Tensor  # (R, I)


class InputPixels(NamedTuple):
    """R pixels of input views: the rays through them and what the photographs show."""
    rays: Rays      # k * R; those of a pixel follow one another
    color: Tensor   # (R, 3)
    mask: Tensor    # (R, 1)
    valid: Tensor   # (R, 1) 1 where they show anything, 0 in the padding
    view: Tensor    # (R,) which input view


class EFTPixels(NamedTuple):
    """R pixels of a query view: the rays through them and what the EFT's image shows."""
    rays: Rays
    color: Tensor   # (R, 3)
    mask: Tensor    # (R, 1)


class DenoisedView(NamedTuple):
    """A query view: rays through a lattice of its pixels, and what the VLDM made of an earlier rendering."""
    rays: Rays
    grid: Tensor     # (1, S, S, 2) of the lattice
    x_hat: Tensor    # (1, 3, S, S)
    weight: Tensor   # () of the pixels' distance


class Distillation:
    """The field of one instance with everything that its optimization needs: `run` repeats `step`, the algorithm."""

    def __init__(self, input_views: Scene, config: DistillConfig, seed: int, prior: Prior | None = None):
        """input_views (V): in the object frame. Without a `prior` the field fits them alone."""
        self.input_views = input_views
        self.config = config
        self.seed = seed
        self.prior = prior
        self.prior_weight = config.prior_weight(len(input_views))
        self.completed = 0      # iterations
        self.seconds = 0.0      # that they took

        # The field, and where the masks allow it to be.
        device = input_views.images.device
        self.generator = torch.Generator(device)
        self.field = Field(config.field, torch.Generator().manual_seed(stream_seed(seed, "field"))).to(device)
        self.occupancy = Occupancy(config.field).to(device)
        whole = input_views.whole or input_views
        self.occupancy.carve(whole.masks, whole.cameras, whole.valid)
        self.exposures = Exposures(config.guess_exposures(input_views)).to(device)

        # One optimizer, a learning rate for each of its three groups.
        self.graphs = Graphs(device)
        self.adam = GraphedAdam([
            (self.field.encoding.parameters(), config.lr_grid),
            (self.field.network_parameters(), config.lr_mlp),
            (self.exposures.parameters(), config.lr_exposure),
        ], config.betas, config.eps, device)

        # On the device, so that nothing waits for it: the present iteration, and the first in which a loss broke.
        self.iteration = torch.zeros((), dtype=torch.long, device=device)
        self.broken = {}  # by the loss's name
        self.input_error = torch.zeros((), device=device)  # mean squared, of the last colors, for the progress bar

        # Targets: of the input views the photographs, of the bootstrap the EFT's images.
        self.colors = blurred(input_views.images, input_views.valid, config.blur)
        self.masks = blurred(input_views.masks, input_views.valid, config.blur)
        self.eft_images = None if prior is None else prior.eft_images()

        # Pixels of all views that show anything and see cells which the masks allow: no others teach the field.
        hull = self.occupancy.silhouettes(input_views.cameras, input_views.images.shape[-1])
        self.valid_pixels = ((input_views.valid > 0.5) & hull[:, None]).flatten().nonzero().squeeze(-1)

        self.buffer = self.new_buffer() if device.type == "cuda" else None  # for shapes that never change
        self.targets = {}   # x_hat (1, 3, S, S) of the present and the next iterations
        self.loss = None    # () of the latest update
        # By its name, a loss in all iterations, (iterations,); -1 where it was not used.
        self.losses = defaultdict(lambda: torch.full((config.iterations,), -1.0, device=device))

    # ------------------------------------------------------------------ the algorithm

    def step(self, i: int) -> None:
        """The algorithm box (supplement)."""
        self.begin(i)

        # 1. An input view against its photograph.
        self.update(self.input_loss, self.sample_input(i))

        # 2. A query view: first against the EFT's image, later against its own rendering, noised and denoised.
        if self.prior is not None and i < self.config.bootstrap:
            self.update(self.bootstrap_loss, self.sample_eft_target(i))
        elif self.prior is not None:
            if i not in self.targets:
                self.targets = self.denoise_ahead(i)
            self.update(self.distillation_loss, self.sample_query(i, self.targets[i]))

        # Occupied cells follow the field, unless it is broken.
        if (i + 1) % self.config.occupancy_every == 0:
            self.check_losses()
            self.occupancy.update(self.field, self.generator)
            self.fit_buffer()

    def begin(self, i: int) -> None:
        """All randomness of iteration i follows from the seed and i: a resumed run draws the same numbers. Python's
        generator chooses views and lattices, which a GPU does not have to wait for.
        """
        self.generator.manual_seed(stream_seed(self.seed, f"iteration {i}"))
        self.iteration.fill_(i)

    def update(self, loss: Callable[[NamedTuple], Tensor], batch: NamedTuple) -> None:
        """A step of Adam down a loss of a batch; on a GPU all of `descend` is one CUDA graph."""
        self.broken.setdefault(loss.__name__, torch.full_like(self.iteration, NEVER))
        self.loss = self.graphs.run(loss.__name__, partial(self.descend, loss), batch)
        self.losses[loss.__name__][self.completed] = self.loss

    def descend(self, loss: Callable[[NamedTuple], Tensor], batch: NamedTuple) -> Tensor:
        """The loss of a batch, its gradient, a step of Adam. Returns the loss, a scalar."""
        self.adam.zero_grad(set_to_none=True)
        value = loss(batch)
        value.backward()
        self.adam.step()

        # When it broke, if it did, without looking at it.
        value = value.detach()
        now = torch.where(value.isfinite(), NEVER, self.iteration)
        broken = self.broken[loss.__name__]
        torch.minimum(broken, now, out=broken)
        return value

    def input_loss(self, batch: InputPixels) -> Tensor:
        """Pixels of input views against their photographs: color, silhouette, opacity, exposures."""
        config = self.config
        rendering = self.render(batch.rays)
        color = rendering.color.unflatten(0, (len(batch.view), -1)).mean(1)
        silhouette = rendering.opacity.unflatten(0, (len(batch.view), -1, 1)).mean(1)
        exposed = self.exposures(color, batch.view)
        self.input_error.copy_((exposed.detach() - batch.color).square().mean())

        loss = photometric_loss(exposed, silhouette, batch.color, batch.mask, config.weight_background,
                                batch.valid)
        loss = loss + config.weight_opacity * opacity_loss(silhouette)
        return loss + config.weight_exposure * self.exposures.spread()

    def bootstrap_loss(self, batch: EFTPixels) -> Tensor:
        """Pixels of a query view against the EFT's image."""
        rendering = self.render(batch.rays)
        silhouette = rendering.opacity[:, None]
        loss = self.prior_weight * photometric_loss(rendering.color, silhouette, batch.color, batch.mask)
        return loss + self.config.weight_opacity * opacity_loss(silhouette)

    def distillation_loss(self, batch: DenoisedView) -> Tensor:
        """A query view against its denoised version; no gradient flows through the diffusion model."""
        rendering = self.render(batch.rays)
        x = self.full_image(rendering.color, batch.grid)

        # Move it towards the denoised version, in pixels and in features.
        pixels = (x - batch.x_hat).abs().mean()
        perceptual = self.prior.perceptual_loss(x, batch.x_hat).mean()
        loss = self.prior_weight * (batch.weight * pixels + self.config.weight_perceptual * perceptual)
        return loss + self.config.weight_opacity * opacity_loss(rendering.opacity)

    # ------------------------------------------------------------------ what an iteration is fit to

    def sample_input(self, i: int) -> InputPixels:
        """Pixels of one random input view, on a random lattice; or random pixels of all of them."""
        if self.config.input_pixels:
            return self.sample_scattered()
        rng = random.Random(f"{self.seed} {i} input")
        view = rng.randrange(len(self.input_views))
        lattice = random_lattice(self.config.render_size, self.input_views.images.shape[-1], rng)
        rays = self.cast(self.input_views.cameras[view], lattice)
        color = as_rows(lattice.pick(self.colors[view:view + 1]))
        mask = as_rows(lattice.pick(self.masks[view:view + 1]))
        valid = as_rows(lattice.pick(self.input_views.valid[view:view + 1]))
        return InputPixels(rays, color, mask, valid, torch.full((len(color),), view, device=color.device))

    def sample_scattered(self) -> InputPixels:
        """Random pixels of all input views, of those that teach anything."""
        size = self.input_views.images.shape[-1]
        device = self.valid_pixels.device
        chosen = torch.randint(len(self.valid_pixels), (self.config.input_pixels,), generator=self.generator,
                               device=device)
        pixel = self.valid_pixels[chosen]
        view = pixel // size**2
        pixel = pixel % size**2

        # Each pixel has a camera of its own, and one or several rays through its square.
        parts = pixel_grid(self.config.pixel_side, self.config.pixel_side, device=device) / size
        xy = pixel_grid(size, size, device=device)[pixel][:, None] + parts
        o, d = self.input_views.cameras[view].rays(xy)
        rays = self.with_samples(o.reshape(-1, 3), d.reshape(-1, 3))

        # What the photographs show there.
        row = pixel // size
        column = pixel % size
        color = self.colors[view, :, row, column]
        mask = self.masks[view, :, row, column]
        return InputPixels(rays, color, mask, torch.ones_like(mask), view)

    def query(self, i: int) -> Query:
        """A random query view of iteration i, which follows from the seed and i alone."""
        rng = random.Random(f"{self.seed} {i} query")
        view = rng.randrange(len(self.prior.viewpoints))
        lattice = random_lattice(self.config.render_size, self.prior.model.preset.image_size, rng)
        noise_level = self.config.min_noise_level + (1 - self.config.min_noise_level) * rng.random()
        return Query(view, lattice, noise_level)

    def sample_eft_target(self, i: int) -> EFTPixels:
        """The query view's lattice, as the EFT sees it."""
        view, lattice, _ = self.query(i)
        rays = self.cast(self.prior.viewpoints[view], lattice)
        target = lattice.pick(self.eft_images[view:view + 1])
        return EFTPixels(rays, as_rows(target), as_rows(brightness_mask(target)))

    def sample_query(self, i: int, x_hat: Tensor) -> DenoisedView:
        """The query view's lattice, and its denoised version x_hat (1, 3, S, S)."""
        view, lattice, noise_level = self.query(i)
        rays = self.cast(self.prior.viewpoints[view], lattice)

        # Filled, not copied, for a copy waits until a GPU has done all before it.
        weight = rays.o.new_full((), fusion_weight(noise_level))
        return DenoisedView(rays, lattice.grid(rays.o.device), x_hat, weight)

    @torch.no_grad()
    def denoise_ahead(self, first: int) -> dict[int, Tensor]:
        """Render the query views of the iterations from `first` on, and denoise them in one batch, each from its noise
        level: x_hat (1, 3, S, S) of each iteration.
        """
        # Batches begin at the same iterations as in a run from the start, where a longer run resumes a shorter one.
        batch = self.config.denoise_batch
        end = first + batch - (first - self.config.bootstrap) % batch
        iterations = range(first, min(end, self.config.iterations))
        queries = [self.query(i) for i in iterations]
        images = []
        for view, lattice, _ in queries:
            rays = self.cast(self.prior.viewpoints[view], lattice)
            color = self.graphs.run("color", lambda rays: self.render(rays).color, rays)
            images.append(self.full_image(color, lattice.grid(color.device)))

        features = torch.stack([self.prior.condition.features[query.view] for query in queries])
        noise_levels = [query.noise_level for query in queries]
        denoised = self.prior.model.denoise(torch.cat(images), features, noise_levels, self.generator,
                                            self.config.sampler)
        return dict(zip(iterations, denoised.split(1)))

    # ------------------------------------------------------------------ rendering

    def cast(self, camera: Cameras, lattice: Lattice) -> Rays:
        """Rays through a lattice of a view's pixels, with random places of their samples."""
        return self.with_samples(*camera.rays(lattice.centers(camera.T.device)))

    def with_samples(self, o: Tensor, d: Tensor) -> Rays:
        """Rays (R, 3) with random places of their samples."""
        return Rays(o, d, *volume.uniform_draws(self.config.field, len(o), self.generator, o))

    def render(self, rays: Rays, buffer: SampleBuffer | None = None) -> volume.Rendering:
        """What rays see of the field."""
        draws = (rays.u, rays.u_importance)
        return volume.render(self.field, rays.o, rays.d, None, self.occupancy, draws, buffer or self.buffer)

    def full_image(self, color: Tensor, grid: Tensor) -> Tensor:
        """Colors (s * s, 3) on the lattice of a query view as an image of the diffusion model's size, (1, 3, S, S)."""
        image = color.t().unflatten(1, (self.config.render_size, -1))[None]
        return upsample(image, grid)

    @torch.no_grad()
    def new_buffer(self) -> SampleBuffer:
        """A buffer for the samples of every view that may be rendered, and a tenth more."""
        # A buffer of one sample renders nothing, but counts.
        counter = SampleBuffer(1, self.input_views.images.device)
        if self.config.input_pixels:
            self.render(self.sample_scattered().rays, counter)

        # The query viewpoints are those of the inputs and others.
        views = []
        if self.prior is not None:
            views = self.prior.viewpoints
        elif not self.config.input_pixels:
            views = self.input_views.cameras
        size = self.input_views.images.shape[-1]
        for view in views:
            self.render(self.cast(view, Lattice(size, size // self.config.render_size, 0, 0)), counter)
        return SampleBuffer(int(1.1 * counter.most) + 1024, counter.most.device)

    def fit_buffer(self) -> None:
        """Make a larger buffer where the present one was too small, a smaller one where half of it is empty."""
        # Only after a change of the occupied cells, for that is where samples are.
        if self.buffer is None:
            return
        most = int(self.buffer.most)
        if most > self.buffer.size:
            print(f"{most - self.buffer.size} of {most} samples of a rendering counted as empty, beyond the buffer's "
                  "capacity; it is larger now")
        if most > self.buffer.size or most < self.buffer.size / 2:
            self.buffer = self.new_buffer()
            self.graphs.forget()
        self.buffer.most.zero_()

    # ------------------------------------------------------------------ the loop

    def run(self, title: str | None = None, save: Callable[[], None] | None = None) -> None:
        """All iterations that are left. `title` shows progress; `save` is called about once a minute."""
        total = self.config.iterations
        progress = Progress(range(self.completed, total), title, self.completed, total)
        saved = time.monotonic()
        for i in progress:
            began = time.monotonic()
            self.adam.set_rates(self.config.final_lr_fraction ** (i / total))
            self.step(i)
            self.completed = i + 1

            # Now and then, for to look at a loss is to wait for a GPU.
            if self.completed % LOOK_EVERY == 0 or self.completed == total:
                self.check_losses()
                psnr = -10 * math.log10(float(self.input_error) + 1e-10)
                progress.note = f"loss {float(self.loss):.4f}, input view {psnr:.1f} dB"
            self.seconds += time.monotonic() - began

            # Something to resume from.
            if save is not None and time.monotonic() - saved > SAVE_SECONDS:
                self.check_losses()
                save()
                saved = time.monotonic()

    def check_losses(self) -> None:
        """Raises `FloatingPointError` if a loss was not finite so far, naming it and the first such iteration."""
        for name, iteration in sorted(self.broken.items(), key=lambda item: int(item[1])):
            if iteration < NEVER:
                raise FloatingPointError(f"the {name.replace('_', ' ')} is not a finite number in iteration "
                                         f"{int(iteration)}; the field cannot recover from that")

    def state_dict(self) -> dict:
        """What a rerun resumes from."""
        parts = {name: getattr(self, name).state_dict() for name in ("field", "occupancy", "exposures")}
        return parts | {
            "optimizer": self.adam.state_dict(),
            "targets": {i: x_hat.clone() for i, x_hat in self.targets.items() if i >= self.completed},
            "losses": dict(self.losses),
            "completed": self.completed,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume from a state. Raises nearly anything where it is none of a distillation with these numbers."""
        for name in ("field", "occupancy", "exposures"):
            files.check_weights(state[name], getattr(self, name))
            getattr(self, name).load_state_dict(state[name])
        self.adam.load_state_dict(state["optimizer"])
        self.graphs.forget()
        self.completed = state["completed"]
        self.seconds = float(state["seconds"])
        for name, losses in state["losses"].items():
            self.losses[name][:self.completed] = losses[:self.completed]

        # What was denoised ahead; a finished run has no prior and needs none of it.
        targets = {} if self.prior is None else state["targets"]
        for i, x_hat in targets.items():
            if x_hat.shape != self.eft_images[:1].shape:
                raise ValueError(f"a target has the shape {tuple(x_hat.shape)}")
            self.targets[i] = x_hat.to(self.input_views.images)


def as_rows(images: Tensor) -> Tensor:
    """Pixels of one image (1, C, s, s), row-major: (s * s, C)."""
    return images[0].flatten(1).t()


# ---------------------------------------------------------------------------------------------- losses

def pseudo_huber(x: Tensor, scale: float = 0.1) -> Tensor:
    """(sqrt(1 + (x / s)^2) - 1) s, elementwise (Charbonnier et al., 1994): the color loss of training and distillation.

    Quadratic near 0, linear far from it. [released: common_utils.py:183-190]
    """
    return ((1 + x**2 / scale**2).sqrt() - 1) * scale


def photometric_loss(color: Tensor, silhouette: Tensor, target: Tensor, mask: Tensor, weight_background: float = 1.0,
                     valid: Tensor | float = 1.0) -> Tensor:
    """Pseudo-Huber color loss plus pseudo-Huber silhouette loss, means over (B, 3, s, s) and (B, 1, s, s): a scalar.

    Pixels outside the mask weigh `weight_background`, those inside 1; those that no photograph shows, where `valid` is
    0, nothing. [released: distillation.py:218-227]
    """
    weight = valid * (weight_background + (1 - weight_background) * mask)
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


def blurred(images: Tensor, valid: Tensor, side: int) -> Tensor:
    """Means of (B, C, H, W) over squares of `side` pixels a side, an odd number, around each pixel.

    valid (B, 1, H, W) is 0 where pictures show nothing: that, and what is outside of them, does not count.
    Premultiplied colors and their masks are filtered alike, so that the object keeps its color up to the rim.
    """
    # A single pixel is its own mean.
    if side == 1:
        return images

    # Where nothing valid is near, the mean is 0.
    pool = partial(F.avg_pool2d, kernel_size=side, stride=1, padding=side // 2)
    share = pool(valid)
    return pool(images * valid) / torch.where(share > 0, share, 1)


# ---------------------------------------------------------------------------------------------- coarse renderings

class Lattice(NamedTuple):
    """Every `step`-th pixel of a square picture of S pixels a side: s of them a side."""
    size: int    # S
    step: int
    row: int     # of the first pixel
    column: int  # of the first pixel

    def pick(self, images: Tensor) -> Tensor:
        """The lattice's pixels of images (B, C, S, S): (B, C, s, s)."""
        return images[..., self.row::self.step, self.column::self.step]

    def centers(self, device: torch.device) -> Tensor:
        """NDC of the pixel centers, row-major: (s * s, 2)."""
        grid = pixel_grid(self.size, self.size, device=device).unflatten(0, (self.size, self.size))
        return grid[self.row::self.step, self.column::self.step].flatten(0, 1)

    def grid(self, device: torch.device) -> Tensor:
        """Where all pixels of the picture lie between the lattice's, for `upsample`: (1, S, S, 2)."""
        # The lattice's outermost pixels are at -1 and 1.
        side = self.size // self.step
        pixel = torch.arange(self.size, device=device)
        y = (pixel - self.row) / self.step * (2 / (side - 1)) - 1
        x = (pixel - self.column) / self.step * (2 / (side - 1)) - 1
        y, x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack([x, y], -1)[None]


def random_lattice(side: int, size: int, rng: random.Random) -> Lattice:
    """`side` x `side` pixels of `size` x `size`, a multiple, evenly spaced from a random first one."""
    # Else some pixels would never be cast.
    if size % side:
        raise ValueError(f"a rendering of {side} pixels a side does not divide an image of {size}")
    step = size // side
    row = rng.randrange(step)
    column = rng.randrange(step)
    return Lattice(size, step, row, column)


def upsample(images: Tensor, grid: Tensor) -> Tensor:
    """Bilinear, from the pixels (B, C, s, s) of a lattice to all (B, C, S, S), by its grid (1, S, S, 2)."""
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=True)


# ---------------------------------------------------------------------------------------------- the numbers

@dataclass(frozen=True)
class DistillConfig:
    """The numbers of one distillation. The defaults are the released ones where the released code has such a number;
    `RELEASED` adds what the released code does otherwise.
    """
    half_side: float = HALF_SIDE         # of the object in the field; 0: a scene's units stay, as with released weights
    cut: bool = True                     # own photographs are cut to the object, as CO3D's are
    iterations: int = 3000               # updates of each kind [released: demo.py:101]
    bootstrap: int = 1001                # first iterations, fit to the EFT images [released: distillation.py:156, 294]
    viewpoints: int = 50                 # query viewpoints on the circle path [released: distillation.py:73]
    jitter: float = 0.17                 # radians; random swing of each of them [released: distillation.py:73]
    image_size: int = 256                # S of the pictures where there is no prior to say
    render_size: int = 128               # s of a rendering, upsampled to S [released: distillation.py:85]
    input_pixels: int = 0                # random pixels of all input views an update; 0: a lattice of one view's
    pixel_side: int = 1                  # rays per side of the square of each of these pixels
    picture_side: int = 1                # rays per side of a pixel's square in pictures of the finished field
    lr_grid: float = 5e-3                # Adam's rate for the encoding's table [released: network_grid.py:223-228]
    lr_mlp: float = 5e-4                 # Adam's rate for the network, from the same lines
    # The rates fall exponentially to this fraction by the end; 1: constant [released: distillation.py:166, 247, 352].
    final_lr_fraction: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's decay rates [released: distillation.py:165]
    eps: float = 1e-8                    # Adam's smallest denominator [released: distillation.py:165]
    lr_exposure: float = 0.0             # Adam's rate for the gains of the input views; 0: all were exposed alike
    weight_exposure: float = 0.3         # of the gains' spread; at 0 the colors of two sides become gains
    blur: int = 1                        # pixels a side, odd, of the squares over which input views are blurred
    weight_background: float = 1.0       # of pixels outside an input's mask; below 1 where masks are rough
    weight_opacity: float = 1e-3         # of the opacity term [released: distillation.py:150-151]
    # Input views that a prior is worth: with V of them the query views' losses weigh this / V, at most 1; 0: always 1.
    prior_views: float = 0.0
    weight_perceptual: float = 0.1       # of the perceptual term of distillation [released: distillation.py:312-314]
    min_noise_level: float = 0.0         # noise levels are drawn from U(this, 1)
    # Query views denoised at once, each the target of one of as many iterations; a GPU divides those above 32.
    denoise_batch: int = 1
    # Input views that these numbers are for; more of them bear a finer field (`fitted`). 0: the numbers stay.
    reference_views: int = 0
    iterations_per_view: int = 0         # that each input view beyond those adds
    occupancy_every: int = 16            # iterations between two looks at where space is empty
    mesh_resolution: int = 128           # cells along the longest side of the meshed box, at most
    mesh_faces: int = 100_000            # triangles of the mesh, at most
    turntable_frames: int = 24           # azimuths of the turntable and the page; 0: neither
    eft_train_mode: bool = False         # dropout and batch statistics on [released: load_model.py:33-45, 179]
    metrics_on_inputs: bool = False      # measure input views, too [released: distillation.py:395-443]
    sampler: vldm.SamplerConfig = vldm.SamplerConfig()
    field: FieldConfig = ngp.FieldConfig()

    def __post_init__(self):
        # Each number for itself.
        check_ranges(self, _RANGES)
        if max(self.betas) >= 1 or min(self.betas) < 0:
            raise ValueError(f"betas {self.betas} must be at least 0 and below 1")

        # Numbers that must fit each other.
        if not 0 <= self.bootstrap <= self.iterations:
            raise ValueError(f"bootstrap {self.bootstrap} is not between 0 and the {self.iterations} iterations")
        if self.blur % 2 == 0:
            raise ValueError(f"blur {self.blur} is not an odd number of pixels")
        rays = max(self.input_pixels * self.pixel_side**2, self.render_size**2)
        samples = rays * (self.field.samples_per_ray + self.field.importance_samples)
        if samples > MOST_SAMPLES:
            raise ValueError(f"{rays} rays of an update have {samples} samples, more than {MOST_SAMPLES}")

    def with_iterations(self, iterations: int) -> DistillConfig:
        """The same for another number of iterations: the bootstrap keeps its length, but takes at most two thirds of
        them.
        """
        return replace(self, iterations=iterations, bootstrap=min(self.bootstrap, iterations * 2 // 3),
                       iterations_per_view=0)

    def prior_weight(self, views: int) -> float:
        """Of the query views' losses, in [0, 1]: the more the input views say, the less is left to a prior to say."""
        return min(1.0, self.prior_views / views) if self.prior_views else 1.0

    def guess_exposures(self, input_views: Scene) -> Tensor:
        """Logarithmic gains (V,) of input views with which their optimization begins; 0 where none are learned."""
        if not self.lr_exposure:
            return torch.zeros(len(input_views), device=input_views.images.device)
        return guess_exposures(input_views.images, input_views.masks)

    def exposed_alike(self, input_views: Scene) -> Tensor:
        """The images (V, 3, S, S) of input views for a prior, as if they had been exposed as most are."""
        gains = self.guess_exposures(input_views).exp()[:, None, None, None]
        return (input_views.images / gains).clamp(0, 1)

    def fitted(self, views: int) -> DistillConfig:
        """The same for a number of input views and the size of their pictures: what they show more of, a finer grid and
        a wider network can hold, with fewer pixels blurred into its cells, more samples to find it and more iterations
        to learn it.
        """
        # How many times as many views as these numbers are for, and with them as large pictures.
        growth = views / self.reference_views if self.reference_views else 1.0
        if growth <= 1:
            return replace(self, reference_views=0, iterations_per_view=0)
        larger = max(self.image_size / REFERENCE_SIZE, 1.0)

        # More pixels determine finer cells, and samples find them that are all in occupied ones.
        doubled = min(math.log2(growth), 4)
        field = replace(
            self.field,
            levels=self.field.levels + round(doubled + math.log2(larger)),
            finest_resolution=min(round(self.field.finest_resolution * growth * larger), MOST_CELLS),
            log2_hashmap_size=self.field.log2_hashmap_size + round(doubled / 2 + math.log2(larger)),
            samples_per_ray=self.field.samples_per_ray // 2,
            bins_per_ray=256,
            occupancy_cells=min(round(self.field.occupancy_cells * (growth * larger)**0.5), 192),
        )

        # That is more to learn, of colors less blurred.
        further = min(self.iterations_per_view * (views - self.reference_views), MOST_FURTHER) * larger**0.5
        iterations = self.iterations + round(further)
        blur = max(round(self.blur / growth / 2 - 0.5), 0) * 2 + 1  # odd
        fitted = replace(self, field=field, iterations=iterations, blur=blur, reference_views=0, iterations_per_view=0)

        # Where there is time for it, a wider network, more samples, and what a pixel sees beside its center.
        if iterations < LONG:
            return fitted
        samples = min(round(self.field.samples_per_ray * larger**0.5), 128)
        field = replace(field, width=2 * self.field.width, samples_per_ray=samples)
        return replace(fitted, field=field, pixel_side=2 * self.pixel_side, input_pixels=self.input_pixels // 2)


_ANY = (0, math.inf)
_RANGES = {"half_side": _ANY, "iterations": (1, 10**7), "viewpoints": (1, 2000), "jitter": _ANY,
           "image_size": (1, 4096), "render_size": (2, 4096), "input_pixels": (0, 2**24),
           "pixel_side": (1, 64), "picture_side": (1, 64), "lr_grid": _ANY, "lr_mlp": _ANY,
           "final_lr_fraction": (1e-9, 1e9), "eps": _ANY, "lr_exposure": _ANY, "weight_exposure": _ANY,
           "blur": (1, 255), "weight_background": _ANY, "weight_opacity": _ANY, "prior_views": _ANY,
           "weight_perceptual": _ANY, "min_noise_level": (0, 1),
           "denoise_batch": (1, 1024), "reference_views": (0, 10**6), "iterations_per_view": (0, 10**6),
           "occupancy_every": (1, 10**7), "mesh_resolution": (1, 1024), "mesh_faces": (100, 10**7),
           "turntable_frames": (0, 3600)}


def guess_exposures(images: Tensor, masks: Tensor) -> Tensor:
    """Logarithmic gains (V,) of photographs (V, 3, S, S) with masks (V, 1, S, S) that were exposed otherwise than most.

    The object in such a one is over `UNLIKE` times as bright or as dark as in the median photograph. Others have 0:
    that much may be their side of the object; their exposures are learned. With two photographs it is unknown which
    one differs.
    """
    if len(images) < 3:
        return images.new_zeros(len(images))
    brightness = images.mean((1, 2, 3)) / masks.mean((1, 2, 3))
    stops = brightness.clamp(min=1e-3).log()
    stops = stops - stops.median()
    return torch.where(stops.abs() > math.log(UNLIKE), stops, 0)
