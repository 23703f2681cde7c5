"""Training: the autoencoder, the prior, and the network that measures perceptual distance (Sec. 3.1 and supplement).

    python train.py vae --root toys --out vae.pt                  # the autoencoder of a category, from its pictures
    python train.py prior --root toys --vae vae.pt --out prior.pt # EFT and UNet jointly, the VAE frozen
    python train.py perceptual --root toys --out perceptual.pt    # the network of the evaluation's perceptual distance

The step is the paper's: one random query view, random input views, 12 noisings of the query latent, the diffusion
loss and the EFT's color loss together. The schedule is `training/fit.py`'s. `torchrun --nproc_per_node=G train.py ...`
trains the same on G GPUs (`training/ranks.py`).

Shapes: `N` sequences, `V` input views, `B` sequences or pictures per step, `b` of these in this process, `S` image
side, `h` that of the latent, `R` rays.
"""
from __future__ import annotations

import argparse
import gzip
import json
import math
import shlex
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import sparsefusion
from cameras import Cameras, evenly_spaced, pixel_grid
from common import cli, files
from common.machine import stream_seed
from common.processes import is_first
from common.settings import check_ranges
from distillation import pseudo_huber
from eft import hull_maps
from evaluation.attributes import AttributeNet
from export.pictures import LABELS, sheet
from gpu.graphs import map_tensors
from gpu.groupnorm import fuse, fused_unet_block, fused_vae_block
from presets import MODELS, PRESETS
from sparsefusion import Preset, SparseFusion
from training import ranks
from training.fit import Fit, FitConfig, Losses
from training.packed import PackedScenes, load_packed
from training.ranks import Draws
from training.roughness import Roughness, draw_roughness, roughen
from unet import ResBlock
from vae import VAE, VAEBlock
from vldm import latent_mask

LEVELS = torch.tensor([255, 255, 255, 255, 1])[:, None, None]  # of 1 in packed colors, masks and valid regions
WEIGHT_KL = 1e-7  # of the divergence from the standard normal distribution, a sum over a latent's numbers
MOST_PARAMETERS = 2**31  # of a model; the paper's has 492 million
NEXT = {"vae": "train.py prior --out prior.pt --vae", "prior": "distill.py --weights",
        "perceptual": "evaluate.py --feature-net"}  # commands that use the weights
RAY_SAMPLES = 32  # query views from which the number of rays to ask about is estimated
RAY_STEP = 32     # of which it is a multiple
PICTURED = 4  # sequences in a picture of how far a training is, and views of each, at most
SAMPLE_STEPS = 20  # of the VLDM's samples in it


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of one training."""
    batch: int = 32     # B: pictures per step; for the prior sequences per step
    frames: int = 16    # evenly spaced frames of each sequence that are used, if it has as many
    min_views: int = 1  # fewest input views of the prior [released: 2, train.py:594]
    max_views: int = 8  # most input views of the prior [released: 5, train.py:594]
    rough: float = 0.0  # how rough masks and exposures of its input views become, to 1: of drawn ones, which are exact
    fit: FitConfig = FitConfig()
    model: Preset = MODELS["nano"]  # a prior's comes from its --vae file

    def __post_init__(self):
        check_ranges(self, {"batch": (1, 2**14), "frames": (1, 10_000), "min_views": (1, 64), "max_views": (1, 64),
                            "rough": (0, 1)})
        if not self.min_views <= self.max_views:
            raise ValueError(f"min_views {self.min_views} is more than max_views {self.max_views}")


# ---------------------------------------------------------------------------------------------- data of a step

def draw_images(data: PackedScenes, draws: Draws) -> tuple[Tensor, Tensor]:
    """Random pictures (b, 3, S, S) in [0, 1] on black, and the indices (b,) of their sequences, of which every one is
    as likely.
    """
    scene = data.drawn[draws.choose(len(data.drawn))]
    view = (draws.rand() * data.counts[scene]).long()
    images = [data.pixels[n][v, :3] for n, v in zip(scene.tolist(), view.tolist())]
    return torch.stack(images).float() / 255, scene


def pictured(data: PackedScenes, device: str) -> tuple[str, list[tuple[Tensor, Cameras]]]:
    """Some evenly spaced pictures (V, 5, S, S) with masks and valid regions and cameras (V,) of each of the first
    held-out sequences, or of trained ones where none is held out; and what to call them.
    """
    shown = data.held_out() or data
    scenes = []
    for n in shown.drawn[:PICTURED].tolist():
        frames = evenly_spaced(len(data.pixels[n]), PICTURED)
        pixels = data.pixels[n][frames] / LEVELS
        scenes.append((pixels.to(device), data.cameras[n][frames].to(device)))
    return "trained on" if shown is data else "held out", scenes


class Views(NamedTuple):
    """From each of b sequences a query view and V input views, in packed bytes, of which `LEVELS` stand for 1."""
    target: Tensor    # (b, 5, S, S) the query's colors, mask, and where it shows anything
    query: Cameras    # (b,)
    images: Tensor    # (b, V, 5, S, S) the inputs'
    cameras: Cameras  # (b, V)
    scene: Tensor     # (b,) indices of the sequences


def draw_views(data: PackedScenes, draws: Draws, views: tuple[int, int]) -> Views:
    """Random sequences, and of each a random query view and random others as inputs, between `views` = (fewest, most)
    of them: the more, the rarer.

    (In the released code a query view may be among its own inputs [released: camera_utils.py:159-161].)
    """
    # The number of input views is the same for all; sequences that have fewer frames wait for another step.
    fewest = views[0]
    most = min(views[1], int(data.counts[data.drawn].max()) - 1)
    inputs = int(fewest * ((most + 1) / fewest) ** float(torch.rand((), generator=draws.common)))
    enough = data.drawn[data.counts[data.drawn] > inputs]
    scene = enough[draws.choose(len(enough))]

    # A random order of each sequence's views: the query comes first, then its inputs.
    order = draws.rand(int(data.counts.max()))
    absent = torch.arange(order.shape[1]) >= data.counts[scene][:, None]
    order = order.masked_fill(absent, 1).argsort(1)[:, :1 + inputs]
    chosen = list(zip(scene.tolist(), order))
    pixels = torch.stack([data.pixels[n][frames] for n, frames in chosen])
    cameras = Cameras.stack([data.cameras[n][frames] for n, frames in chosen])

    return Views(pixels[:, 0], cameras[:, 0], pixels[:, 1:], cameras[:, 1:], scene)


def colors_at(images: Tensor, xy: Tensor, aligned: bool = False) -> Tensor:
    """Bilinear samples of images (B, C, S, S) at NDC positions xy (R, 2) or (B, R, 2): (B, R, C).

    NDC 1 - 1/S is the center of the outermost pixel. `aligned` puts that center at NDC 1 instead, half a pixel off at
    the border [released: common_utils.py:220-224].
    """
    grid = -xy.expand(len(images), *xy.shape[-2:]).unsqueeze(1)
    samples = F.grid_sample(images, grid, align_corners=aligned, padding_mode="zeros")
    return samples.squeeze(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------- the autoencoder

class VAELosses(nn.Module):
    """Reconstruction (L1, L2, L1 of image gradients) through a posterior sample, and a little of the KL divergence.

    Latent diffusion weighs it by 1e-6 beside sums over pixels (Rombach et al. 2022), which is far less than that beside
    our means: with 1e-6 four of eight channels, or eight of twelve, carried nothing.
    """

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, batch: tuple[Tensor, Tensor]) -> Losses:
        """Of images (b, 3, S, S) in [0, 1], and of the noise (b, channels, h, h) of the posterior samples: one scalar,
        the mean over the pictures.
        """
        # Encode to a posterior, draw from it, decode.
        images, noise = batch
        mean, log_var = self.vae.moments(images)
        latent = mean + (log_var / 2).exp() * noise
        error = self.vae.decode(latent * self.vae.config.scale).float() - images

        # The picture, its edges, and a posterior near the standard normal distribution.
        gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).float().flatten(1).sum(1).mean()
        return {"loss": error.abs().mean() + (error**2).mean() + gradients + WEIGHT_KL * kl}


class VAETraining:
    """The autoencoder; at the end its latents are scaled to unit variance."""

    def __init__(self, data: PackedScenes, config: TrainConfig, seed: int, device: str):
        self.data = data
        self.config = config
        self.seed = seed
        self.device = device
        vae = VAE(config.model.vae).to(device, memory_format=torch.channels_last)
        self.module = VAELosses(fuse(vae, {VAEBlock: fused_vae_block}) if device == "cuda" else vae)

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The batch of a step."""
        model = self.config.model
        images, _ = draw_images(self.data, draws)
        noise = draws.randn(model.vae.channels, model.latent_size, model.latent_size)
        return images.contiguous(memory_format=torch.channels_last), noise

    @torch.no_grad()
    def finish(self, average: dict[str, Tensor], out: Path, trained_on: list[dict]) -> Image.Image:
        """Write a weights file: the averaged autoencoder, whose scale is measured here, and an untrained EFT and
        UNet. Returns pictures of held-out sequences beside what it makes of them.
        """
        torch.manual_seed(stream_seed(self.seed, "untrained weights"))  # the same after an interruption
        model = SparseFusion(self.config.model)
        model.load_state_dict(average, strict=False)
        model.to(self.device).eval()

        # The scale that brings latents to unit variance, and how good the pictures come back.
        count = min(256, int(self.data.counts.sum()))
        images, _ = draw_images(self.data, Draws(self.seed, -1, count, range(count)))
        images = images.to(self.device)
        mean, log_var = model.vae.moments(images)
        scale = 1 / float(mean.std())
        used = int((mean.var((0, 2, 3)) > log_var.exp().mean((0, 2, 3))).sum())
        again = model.vae.decode(model.vae.encode(images))
        psnr = -10 * torch.log10(((again - images) ** 2).mean())

        model.preset = replace(self.config.model, vae=replace(self.config.model.vae, scale=scale))
        sparsefusion.save(model, out, half=False, stage="vae", trained_on=trained_on)
        print(f"VAE: {psnr:.2f} dB, latent scale {scale:.4f}, {used} of {mean.shape[1]} channels used")

        rows = []
        label, scenes = pictured(self.data, self.device)
        for pixels, _ in scenes:
            images = pixels[:, :3]
            again = model.vae.decode(model.vae.encode(images))
            rows.append([tile for pair in zip(images, again) for tile in zip((label, "reconstruction"), pair)])
        return sheet(rows)


# ---------------------------------------------------------------------------------------------- the prior

class PriorBatch(NamedTuple):
    """What the losses of EFT and UNet take: `b` sequences, each of whose query latents is noised `n` times."""
    views: Views
    near: Tensor    # (b,) the depth range of each sequence
    far: Tensor     # (b,)
    order: Tensor   # (b, s * s) random numbers in [0, 1], by which rays of the query views are chosen
    times: Tensor   # (b, n) of the noisings, in [0, 1]
    keep: Tensor    # (b, n) 1, or 0 where the UNet does without features
    noise: Tensor   # (b, n, channels, h, h) standard normal
    rough: Roughness


class PriorLosses(nn.Module):
    """A training step of EFT and UNet (Sec. 3.1): the diffusion loss of the query latents and the EFT's color loss."""

    def __init__(self, model: SparseFusion, rough: float = 0.0):
        super().__init__()
        self.preset = model.preset
        self.encode = model.vae.encode  # frozen, so no part of this module
        self.eft = model.eft
        self.vldm = model.vldm
        self.register_buffer("levels", LEVELS.clone(), persistent=False)
        self.rough = rough
        self.rays = {}  # number of input views -> how many rays of a query view the EFT is asked about (default: all)

    def forward(self, batch: PriorBatch) -> Losses:
        """Two scalars, means over the sequences."""
        # The EFT looks at the inputs along rays of the query view.
        views = batch.views
        target = views.target / self.levels
        inputs = self.inputs(batch)
        images = inputs[:, :, :3]
        index, xy, near, far, sees = self.choose_rays(batch, inputs)
        seen = self.eft(self.eft.encode(images), images, views.cameras, views.query, xy, near, far)
        truth = colors_at(target, xy)
        color = (pseudo_huber(seen.color.float() - truth[..., :3]) * (truth[..., 4:] > 0.5)).mean()

        # Its features are a map, empty at all other rays.
        side = self.preset.map_size
        features = seen.features * sees[..., None]
        features = torch.zeros_like(features[:, :1]).expand(-1, side**2, -1).scatter(
            1, index[..., None].expand_as(features), features)

        # The clean latent of the query view, once for each of its noisings.
        n = batch.times.shape[1]
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            latent = self.encode(target[:, :3]).float()
        x0 = latent.repeat_interleave(n, 0)
        mask = latent_mask(target[:, 4:], self.preset.latent_size).repeat_interleave(n, 0)

        # Now and then the features are dropped, so that the UNet learns the unconditional distribution as well.
        features = features.transpose(1, 2).unflatten(-1, (side, side)).repeat_interleave(n, 0)
        features = features * batch.keep.reshape(-1, 1, 1, 1)
        diffusion = self.vldm.loss(x0, features, batch.times.flatten(), batch.noise.flatten(0, 1), mask)
        return {"diffusion": diffusion, "color": color}

    def inputs(self, batch: PriorBatch) -> Tensor:
        """The input views (b, V, 5, S, S) as the EFT is shown them, in [0, 1]."""
        images = batch.views.images / self.levels
        return roughen(images, batch.rough, self.rough) if self.rough else images

    def choose_rays(self, batch: PriorBatch, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same number of rays R of every query view, in the relative form first those that see the visual hull of
        the input views (b, V, 5, S, S): their places in the map (b, R), their NDC (b, R, 2), their depth ranges (b, R),
        and whether they see it (b, R).
        """
        views = batch.views
        side = self.preset.map_size
        grid = pixel_grid(side, side, full=self.preset.image_size, device=batch.order.device)
        near, far = (x[:, None].expand_as(batch.order) for x in (batch.near, batch.far))
        sees = torch.ones_like(batch.order)
        if self.preset.eft.relative:
            possible = hull_maps(*inputs[:, :, 3:].split(1, dim=2))
            near, far, sees = self.eft.see_hull(possible, views.cameras, views.query, grid)
        count = self.rays.get(views.images.shape[1], side**2)
        index = (sees + batch.order).topk(count).indices
        near, far, sees = (x.gather(1, index) for x in (near, far, sees.float()))
        return index, grid[index], near, far, sees


class PriorTraining:
    """EFT and UNet of a model jointly, on top of its frozen autoencoder."""

    def __init__(self, data: PackedScenes, config: TrainConfig, model: SparseFusion, device: str):
        if config.min_views >= data.counts.max():
            raise ValueError(f"--min-views {config.min_views}: of {data.counts.max()} frames one is the query view")
        self.data = data
        self.config = config
        self.device = device
        self.model = model
        self.model.preset = config.model
        self.model.vldm.config = config.model.diffusion
        self.module = PriorLosses(model, config.rough).to(device).requires_grad_(True)
        if device == "cuda":
            fuse(model.vldm.unet, {ResBlock: fused_unet_block})

        # Every sequence is brought to one distance, or its object to one size, and has its own depth range.
        self.model.trained_distance = sparsefusion.TRAINED_DISTANCE
        origins, *units = zip(*(self.model.eft_world(cameras) for cameras in data.cameras))
        self.origin = torch.stack(origins).float()
        self.scale, self.near, self.far = torch.tensor(units)

        # The rays that see the visual hull are a part of all; all but a few views have no more than that.
        most = min(config.max_views, int(data.counts.max()) - 1)
        for inputs in range(config.min_views, most + 1) if config.model.eft.relative else ():
            draws = Draws(0, f"rays {inputs}", RAY_SAMPLES, range(RAY_SAMPLES))
            batch = map_tensors(lambda x: x.to(device), self.batch(draws, (inputs, inputs)))
            *_, sees = self.module.choose_rays(batch, self.module.inputs(batch))
            count = float(sees.sum(1).quantile(0.98))
            self.module.rays[inputs] = min(RAY_STEP * math.ceil(count / RAY_STEP + 1e-9), config.model.map_size**2)

    def batch(self, draws: Draws, number: tuple[int, int] | None = None) -> PriorBatch:
        """The batch of a step, with so many input views, from the fewest to the most (default: the configuration's)."""
        number = number or (self.config.min_views, self.config.max_views)
        views = draw_views(self.data, draws, number)
        scale = self.scale[views.scene]
        origin = self.origin[views.scene]
        query = views.query.about(origin).scaled(scale[:, None])
        cameras = views.cameras.about(origin[:, None]).scaled(scale[:, None, None])
        views = views._replace(query=query, cameras=cameras)

        # Noise levels: stratified over (0, t_max), those of all sequences between one another. (Released: independent
        # draws [released: train.py:381-393].)
        diffusion = self.config.model.diffusion
        n = diffusion.noisings
        offsets = (draws.places[:, None] + draws.rand(n)) / draws.batch
        times = (torch.arange(n) + offsets) / n * diffusion.t_max
        keep = (draws.rand(n) >= diffusion.drop).float()

        model = self.config.model
        noise = draws.randn(n, model.vae.channels, model.latent_size, model.latent_size)
        order = draws.rand(model.map_size**2)
        rough = draw_roughness(draws, views.images.shape[1], model.image_size)
        return PriorBatch(views, self.near[views.scene], self.far[views.scene], order, times, keep, noise, rough)

    def finish(self, average: dict[str, Tensor], out: Path, trained_on: list[dict]) -> Image.Image:
        """Write a weights file: the averaged EFT and UNet, and the autoencoder as it was. Returns a query view of each
        of some held-out sequences, beside what EFT and VLDM make of it and its input views.
        """
        result = sparsefusion.blank(self.model.preset, self.device).eval()
        result.trained_distance = self.model.trained_distance
        result.load_state_dict(self.model.vae.state_dict(prefix="vae.") | average)
        sparsefusion.save(result, out, trained_on=trained_on)

        # What the EFT sees; the second view is the query.
        rows = []
        features = []
        label, scenes = pictured(self.data, self.device)
        for pixels, cameras in scenes:
            images = pixels[:, :3]
            inputs = [0, *range(2, len(images))]
            possible = hull_maps(pixels[inputs, 3:4], pixels[inputs, 4:])
            seen = result.condition(images[inputs], cameras[inputs], cameras[[1]], cameras, possible)
            features.append(seen.features)
            color = F.interpolate(seen.images, images.shape[-2:])[0]
            rows.append([(label, images[1]), (LABELS["eft"], color), *(("input", x) for x in images[inputs])])

        # What the VLDM samples, from the same noise every time.
        sampler = replace(PRESETS[result.preset.name].sampler, sample_steps=SAMPLE_STEPS)
        generators = [torch.Generator(self.device).manual_seed(stream_seed(n, "picture")) for n in range(len(rows))]
        for row, sample in zip(rows, result.sample_view(torch.cat(features), generators, sampler)):
            row.insert(2, (LABELS["vldm"], sample))
        return sheet(rows)


# ---------------------------------------------------------------------------------------------- the perceptual network

class PerceptualLosses(nn.Module):
    """How well a network reads the attributes."""

    def __init__(self, net: AttributeNet):
        super().__init__()
        self.net = net

    def forward(self, batch: tuple[Tensor, Tensor]) -> Losses:
        """Of images (b, 3, S, S) in [0, 1] and the toys' attributes (b, A): one scalar, the mean over the pictures."""
        images, truth = batch
        return {"mse": F.mse_loss(self.net(images).float(), truth)}


class PerceptualTraining:
    """The attribute network. Its features measure distance in the evaluation; no loss ever uses them."""

    def __init__(self, data: PackedScenes, config: TrainConfig, truth: Tensor, device: str):
        """truth (N, A): the attributes of every sequence."""
        self.data = data
        self.config = config
        self.truth = truth
        net = AttributeNet(truth.shape[1]).to(device, memory_format=torch.channels_last)
        self.module = PerceptualLosses(net)

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The batch of a step."""
        images, scene = draw_images(self.data, draws)
        return images, self.truth[scene]

    def finish(self, average: dict[str, Tensor], out: Path, trained_on: list[dict]) -> None:
        """Write the averaged weights, floating point ones in half precision."""
        weights = {name.removeprefix("net."): x.half() if x.is_floating_point() else x for name, x in average.items()}
        files.save_tensors({"weights": weights}, out)


def attributes(data: PackedScenes) -> Tensor:
    """What the generator knows about each synthetic toy, from `sequence_annotations.jgz`: (N, A) in [0, 1]."""
    known = {}
    found = []
    for root, category, name in data.sequences:
        file = root / category / "sequence_annotations.jgz"
        if file not in known:
            records = json.loads(gzip.decompress(file.read_bytes()))
            known[file] = {record["sequence_name"]: record.get("attributes") for record in records}
        if not known[file].get(name):
            raise ValueError(f"{file}: no attributes; only the synthetic toys of sample/toys.py have them")
        found.append(known[file][name])
    return torch.tensor(found)


# ---------------------------------------------------------------------------------------------- the command

def config_from_flags(args: argparse.Namespace) -> TrainConfig:
    """Every number of a training. A prior's model comes from its --vae file, of which only the diffusion's numbers
    may change.
    """
    preset = MODELS[args.preset]
    if not args.root and not args.capture:
        raise ValueError("--root or --capture: what to train on")
    if args.what == "prior":
        if args.vae is None:
            raise ValueError("train prior: needs --vae, the file of `train.py vae`")
        preset = sparsefusion.read_preset(args.vae)

    # Flags of their own are settings, too; --set has the last word.
    flags = ("steps", "frames", "min_views", "max_views")
    settings = [f"{name}={getattr(args, name)}" for name in flags if getattr(args, name)]
    config = cli.apply_settings(TrainConfig(model=preset), settings + args.settings)

    # What no machine holds is told before any of it is reserved.
    with torch.device("meta"):
        parameters = sum(x.numel() for x in SparseFusion(config.model).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"--set: a model of {parameters:,} parameters, more than {MOST_PARAMETERS:,}")

    # What a prior's file fixes.
    if args.what == "prior" and replace(config.model, diffusion=preset.diffusion) != preset:
        raise ValueError("--set: a number of the architecture, which the --vae file fixes")
    return config


def read_data(args: argparse.Namespace, config: TrainConfig) -> PackedScenes:
    """The pictures of all sequences of the training split, packed by the first process of a machine."""
    least = 2 if args.what == "prior" else 1
    load = partial(load_packed, args.root, args.category, config.frames, config.model.image_size, least, args.capture)
    with ranks.agreed():
        data = load() if is_first("LOCAL_RANK") else None
    with ranks.agreed():
        data = data or load()
    print(f"{len(data)} sequences of {data.counts.min()} to {data.counts.max()} pictures, {len(data.drawn)} of them to "
          "train on")
    return data


def make_training(args: argparse.Namespace, config: TrainConfig, data: PackedScenes) -> Fit:
    """A network to train, resumed where it has a state."""
    torch.manual_seed(stream_seed(args.seed, "weights"))
    history = []
    if args.what == "vae":
        training = VAETraining(data, config, args.seed, args.device)
    elif args.what == "prior":
        history = sparsefusion.read_trained_on(args.vae)
        model = sparsefusion.load(args.vae, stage="vae").to(args.device)
        training = PriorTraining(data, config, model, args.device)
    else:
        training = PerceptualTraining(data, config, attributes(data), args.device)

    # Its file will tell what it has seen.
    seen = {"what": args.what, "sequences": len(data.drawn), "frames": config.frames, "steps": config.fit.steps}
    trained = [seen | {"category": category} for category in dict.fromkeys(x[1] for x in data.sequences)]
    vae = files.fingerprint(args.vae) if args.what == "prior" else None
    settings = {"what": args.what, "data": data.fingerprint, "vae": vae, "config": asdict(config)}
    fit = Fit(training, config.fit, args.out, args.seed, args.device, settings, history, trained)
    fit.resume(args.fork)
    return fit


def command(args: argparse.Namespace) -> None:
    """Train what the command names."""
    with ranks.joined(args.device):
        with ranks.agreed():
            config = config_from_flags(args)
            if is_first():
                files.require_writable(args.out)
        data = read_data(args, config)
        with ranks.agreed():
            fit = make_training(args, config, data)
        fit.run(f"train {args.what}", args.minutes)
        if fit.completed == config.fit.steps:
            tree = ["--root", *args.root[:1], "--category", args.category[0]]
            data = tree if args.root else ["--capture", args.capture[0]]
            print("next: python", NEXT[args.what], shlex.join(map(str, [args.out, *data])))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__)
    p.add_argument("what", choices=["vae", "prior", "perceptual"])
    p.add_argument("--out", type=Path, required=True, metavar="F",
                   help="weights file to write; the same command resumes from F.state")
    p.add_argument("--fork", action="store_true",
                   help="if F.state is another training's, start anew from its weights")

    # What is given.
    given = p.add_argument_group("what is given")
    given.add_argument("--root", type=Path, nargs="+", default=[], metavar="DIR", help="CO3Dv2 folders")
    given.add_argument("--category", nargs="+", default=["toys"], metavar="C",
                       help="categories in them (default: toys)")
    given.add_argument("--capture", type=Path, nargs="+", default=[], metavar="DIR",
                       help="folders of own photographs with masks and poses, one object each")
    given.add_argument("--frames", type=cli.count, metavar="N", help="most frames of a sequence to use (default: 16)")
    given.add_argument("--preset", choices=MODELS, default="nano",
                       help="vae, perceptual: numbers of the model (default: nano)")
    given.add_argument("--vae", type=Path, metavar="F",
                       help="prior: the weights file that `train.py vae` wrote, or a prior to start from")

    # How long and how.
    how = p.add_argument_group("how it is trained")
    how.add_argument("--min-views", type=cli.count, metavar="N", help="prior: fewest input views (default: 1)")
    how.add_argument("--max-views", type=cli.count, metavar="N", help="prior: most input views (default: 8)")
    how.add_argument("--steps", type=cli.count, metavar="N", help="updates in all (default: 10000)")
    how.add_argument("--minutes", type=cli.positive, metavar="M", help="stop after that long")
    how.add_argument("--seed", type=cli.seed, default=0, metavar="N",
                     help="of initial weights, views and noise (default: 0)")
    cli.add_settings(how, TrainConfig)
    cli.add_device(how)
    return p


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
