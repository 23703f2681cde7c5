"""Training: the autoencoder, the prior, and the network that measures perceptual distance (Sec. 3.1 and supplement).

    python train.py vae --root toys --out vae.pt                  # the autoencoder of a category, from its pictures
    python train.py prior --root toys --vae vae.pt --out prior.pt # EFT and UNet jointly, the VAE frozen
    python train.py perceptual --root toys --out perceptual.pt    # the network of the evaluation's perceptual distance

The step is the paper's: one random query view, random input views, 12 noisings of the query latent, the diffusion
loss and the EFT's color loss together. The schedule is `training/fit.py`'s.

Shapes: `N` sequences in memory, `V` input views, `B` sequences or pictures per step, `S` image side, `s` rays a side
of the EFT's map.
"""
from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsefusion
from cameras import Cameras, pixel_grid
from common import cli, files
from common.machine import rand, randn, stream_seed
from common.settings import check_ranges
from datasets.protocol import TRAINING, available
from distillation import pseudo_huber
from evaluation.attributes import AttributeNet
from presets import MODELS
from sparsefusion import Preset, SparseFusion
from training.fit import Fit, FitConfig, Numbers
from training.packed import PackedScenes, load_packed
from vae import VAE
from vldm import latent_mask

MOST_PARAMETERS = 2**31  # of a model; the paper's has 492 million


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of one training."""
    batch: int = 32     # B: pictures per step; for the prior sequences per step
    frames: int = 16    # evenly spaced frames of each sequence that are kept in memory
    min_views: int = 1  # fewest input views of the prior [released: 2, train.py:594]
    max_views: int = 4  # most input views of the prior [released: 5, train.py:594]
    fit: FitConfig = FitConfig()
    model: Preset = MODELS["nano"]  # a prior's comes from its --vae file

    def __post_init__(self):
        check_ranges(self, {"batch": (1, 2**14), "frames": (1, 10_000), "min_views": (1, 64), "max_views": (1, 64)})
        if not self.min_views <= self.max_views:
            raise ValueError(f"min_views {self.min_views} is more than max_views {self.max_views}")


# ---------------------------------------------------------------------------------------------- data of a step

def draw_images(data: PackedScenes, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random pictures (B, 3, S, S) in [0, 1] on black, and the indices (B,) of their sequences."""
    n, views = data.rgba.shape[:2]
    device = data.rgba.device
    scene = torch.randint(n, (count,), generator=generator, device=generator.device).to(device)
    view = torch.randint(views, (count,), generator=generator, device=generator.device).to(device)
    return data.rgba[scene, view, :3].float() / 255, scene


class Batch(NamedTuple):
    """From each of B sequences a query view and V input views."""
    target: Tensor    # (B, 3, S, S) the query's picture
    valid: Tensor     # (B, 1, S, S) where it shows anything
    query: Cameras    # (B,)
    images: Tensor    # (B, V, 3, S, S) the inputs
    cameras: Cameras  # (B, V)
    scene: Tensor     # (B,) indices of the sequences


def draw_batch(data: PackedScenes, batch: int, views: tuple[int, int], generator: torch.Generator) -> Batch:
    """Random sequences, and of each a random query view and random others as inputs, between `views` = (fewest, most)
    of them.

    (In the released code a query view may be among its own inputs [released: camera_utils.py:159-161].)
    """
    device = data.rgba.device
    scene = (rand(batch, generator=generator, device=device) * len(data)).long()

    # The number of input views is the same for all, and does not come from the GPU, which would have to be waited for.
    inputs = random.Random(generator.initial_seed()).randint(*views)

    # A random order of each sequence's views: the query comes first, then its inputs.
    order = rand(batch, data.rgba.shape[1], generator=generator, device=device).argsort(1)
    order = order[:, :1 + inputs]
    images = data.rgba[scene[:, None], order][:, :, :3].float() / 255
    cameras = data.cameras[scene[:, None], order]
    valid = data.valid[scene, order[:, 0]].float()
    return Batch(images[:, 0], valid, cameras[:, 0], images[:, 1:], cameras[:, 1:], scene)


def colors_at(images: Tensor, xy: Tensor, aligned: bool = False) -> Tensor:
    """Bilinear samples of images (B, C, S, S) at NDC positions xy (R, 2): (B, R, C).

    NDC 1 - 1/S is the center of the outermost pixel. `aligned` puts that center at NDC 1 instead, half a pixel off at
    the border [released: common_utils.py:220-224].
    """
    grid = -xy.expand(len(images), 1, -1, 2)
    samples = F.grid_sample(images, grid, align_corners=aligned, padding_mode="zeros")
    return samples.squeeze(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------- losses

def vae_loss(vae: VAE, images: Tensor, generator: torch.Generator) -> Tensor:
    """Reconstruction (L1, L2, L1 of image gradients) of images (B, 3, S, S) through a posterior sample, and 1e-6 KL:
    a scalar.
    """
    # Encode to a posterior, draw from it, decode.
    mean, log_var = vae.moments(images)
    noise = randn(*mean.shape, generator=generator, device=mean.device)
    latent = mean + (log_var / 2).exp() * noise
    error = vae.decode(latent * vae.config.scale).float() - images

    # The picture, its edges, and a posterior near the standard normal distribution.
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).float().flatten(1).sum(1).mean()
    return error.abs().mean() + (error**2).mean() + gradients + 1e-6 * kl


def prior_loss(model: SparseFusion, batch: Batch, near: Tensor, far: Tensor,
               generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One training step of EFT and UNet: the diffusion loss of the query latents and the EFT's color loss, scalars.

    near, far (B,): the depth range of each sequence.
    """
    config = model.preset.diffusion
    device = batch.target.device
    side = model.preset.map_size

    # The EFT looks at the inputs along the rays of the query view.
    xy = pixel_grid(side, side, full=model.preset.image_size, device=device)
    maps = model.eft.encode(batch.images)
    seen = model.eft(maps, batch.images, batch.cameras, batch.query, xy, near, far)
    error = pseudo_huber(seen.color.float() - colors_at(batch.target, xy))
    color_loss = (error * (colors_at(batch.valid, xy) > 0.5)).mean()

    # The clean latent of the query view, once for each of its noisings.
    with torch.no_grad():
        x0 = model.vae.encode(batch.target).float().repeat_interleave(config.noisings, 0)
        mask = latent_mask(batch.valid, model.preset.latent_size).repeat_interleave(config.noisings, 0)

    # Noise levels: stratified over (0, t_max), in random order. (Released: independent draws [released:
    # train.py:381-393].)
    n = len(x0)
    strata = torch.arange(n, device=device) + rand(n, generator=generator, device=device)
    t = strata / n * config.t_max
    t = t[rand(n, generator=generator, device=device).argsort()]

    # Now and then the features are dropped, so that the UNet learns the unconditional distribution as well.
    keep = (rand(n, generator=generator, device=device) >= config.drop).to(x0.dtype)[:, None, None, None]
    eps = randn(*x0.shape, generator=generator, device=device)
    features = seen.features.transpose(1, 2).unflatten(-1, (side, side)).repeat_interleave(config.noisings, 0)
    return model.vldm.loss(x0, features * keep, t, eps, mask), color_loss


# ---------------------------------------------------------------------------------------------- the three trainings

class VAETraining:
    """The autoencoder; at the end its latents are scaled to unit variance."""

    def __init__(self, data: PackedScenes, config: TrainConfig, seed: int, trained_on: Sequence[dict] = ()):
        self.data = data
        self.config = config
        self.seed = seed
        self.trained_on = trained_on  # what the weights file says about its trainings
        self.module = VAE(config.model.vae).to(data.rgba.device, memory_format=torch.channels_last)

    def loss(self, generator: torch.Generator) -> tuple[Tensor, Numbers]:
        """What a step minimizes, and what it shows."""
        images, _ = draw_images(self.data, self.config.batch, generator)
        value = vae_loss(self.module, images.contiguous(memory_format=torch.channels_last), generator)
        return value, {"loss": value}

    @torch.no_grad()
    def finish(self, average: dict[str, Tensor], out: Path) -> None:
        """Write a weights file: the averaged autoencoder, whose scale is measured here, and an untrained EFT and
        UNet.
        """
        torch.manual_seed(stream_seed(self.seed, "untrained weights"))  # the same after an interruption
        model = SparseFusion(self.config.model)
        model.vae.load_state_dict(average)
        device = self.data.rgba.device
        model.to(device).eval()

        # The scale that brings latents to unit variance, and how good the pictures come back.
        generator = torch.Generator(device).manual_seed(stream_seed(self.seed, "scale"))
        count = min(256, self.data.rgba.shape[:2].numel())
        images, _ = draw_images(self.data, count, generator)
        scale = 1 / float(model.vae.moments(images)[0].std())
        again = model.vae.decode(model.vae.encode(images))
        psnr = -10 * torch.log10(((again - images) ** 2).mean())

        model.preset = replace(self.config.model, vae=replace(self.config.model.vae, scale=scale))
        sparsefusion.save(model, out, half=False, stage="vae", trained_on=self.trained_on)
        print(f"VAE: {psnr:.2f} dB, latent scale {scale:.4f}")


class PriorTraining:
    """EFT and UNet of a model jointly, on top of its frozen autoencoder."""

    def __init__(self, data: PackedScenes, config: TrainConfig, model: SparseFusion, trained_on: Sequence[dict] = ()):
        self.config = config
        self.model = model
        self.trained_on = trained_on  # what the weights file says about its trainings
        self.model.preset = config.model
        self.model.vldm.config = config.model.diffusion
        self.module = nn.ModuleDict({"eft": self.model.eft, "vldm": self.model.vldm}).requires_grad_(True)

        # Every sequence is brought to one distance, and has its own depth range.
        self.model.trained_distance = sparsefusion.TRAINED_DISTANCE
        units = [self.model.eft_units(data.cameras[i]) for i in range(len(data))]
        scale, self.near, self.far = torch.tensor(units, device=data.rgba.device).T
        self.data = replace(data, cameras=data.cameras.scaled(scale[:, None, None]))
        if data.rgba.is_cuda:
            self.capture_unet()

    def capture_unet(self) -> None:
        """The UNet's forward and backward pass as CUDA graphs: a thousand small kernels in one launch (110 -> 30 ms a
        step on an H100).
        """
        preset = self.model.preset
        n = self.config.batch * preset.diffusion.noisings
        side, map_side = preset.latent_size, preset.map_size
        latent = torch.randn(n, preset.vae.channels, side, side, device="cuda")
        log_snr = torch.zeros(n, device="cuda")
        features = torch.randn(n, preset.unet.cond_channels, map_side, map_side, device="cuda", requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            torch.cuda.make_graphed_callables(self.model.vldm.unet.train(), (latent, log_snr, features))

    def loss(self, generator: torch.Generator) -> tuple[Tensor, Numbers]:
        """What a step minimizes, and what it shows."""
        views = (self.config.min_views, self.config.max_views)
        batch = draw_batch(self.data, self.config.batch, views, generator)
        near = self.near[batch.scene]
        far = self.far[batch.scene]
        diffusion, color = prior_loss(self.model, batch, near, far, generator)
        return diffusion + color, {"diffusion": diffusion, "color": color}

    def finish(self, average: dict[str, Tensor], out: Path) -> None:
        """Write a weights file: the averaged EFT and UNet, and the autoencoder as it was."""
        result = SparseFusion(self.model.preset)
        result.trained_distance = self.model.trained_distance
        result.load_state_dict(self.model.vae.state_dict(prefix="vae.") | average)
        sparsefusion.save(result, out, trained_on=self.trained_on)


class PerceptualTraining:
    """The attribute network. Its features measure distance in the evaluation; no loss ever uses them."""

    def __init__(self, data: PackedScenes, config: TrainConfig, truth: Tensor):
        """truth (N, A): the attributes of every sequence."""
        self.data = data
        self.config = config
        self.truth = truth.to(data.rgba.device)
        self.module = AttributeNet(truth.shape[1]).to(data.rgba.device, memory_format=torch.channels_last)

    def loss(self, generator: torch.Generator) -> tuple[Tensor, Numbers]:
        """What a step minimizes, and what it shows."""
        images, scene = draw_images(self.data, self.config.batch, generator)
        value = F.mse_loss(self.module(images).float(), self.truth[scene])
        return value, {"mse": value}

    def finish(self, average: dict[str, Tensor], out: Path) -> None:
        """Write the averaged weights, floating point ones in half precision."""
        weights = {name: x.half() if x.is_floating_point() else x for name, x in average.items()}
        files.save_tensors({"weights": weights}, out)


def attributes(roots: list[Path], category: str, names: list[str]) -> Tensor:
    """What the generator knows about each synthetic toy, from `sequence_annotations.jgz`: (N, A) in [0, 1]."""
    known = {}
    for root in roots:
        file = root / category / "sequence_annotations.jgz"
        for record in json.loads(gzip.decompress(file.read_bytes())):
            known[record["sequence_name"]] = record.get("attributes")
    if not all(known.get(name) for name in names):
        raise ValueError(f"{file}: no attributes; only the synthetic toys of sample/toys.py have them")
    return torch.tensor([known[name] for name in names])


# ---------------------------------------------------------------------------------------------- the command

def config_from_flags(args: argparse.Namespace) -> TrainConfig:
    """Every number of a training. A prior's model comes from its --vae file, of which only the diffusion's numbers
    may change.
    """
    preset = MODELS[args.preset]
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

    # What a prior's file fixes, and what a sequence must have.
    if args.what == "prior" and replace(config.model, diffusion=preset.diffusion) != preset:
        raise ValueError("--set: a number of the architecture, which the --vae file fixes")
    if args.what == "prior" and config.max_views >= config.frames:
        raise ValueError(f"--max-views {config.max_views}: of {config.frames} frames one is the query view")
    return config


def command(args: argparse.Namespace) -> None:
    """Train what the command names."""
    # The pictures of all sequences of the training split, in memory.
    config = config_from_flags(args)
    for root in args.root:
        available(root, args.category, TRAINING)
    size = config.model.image_size
    data = load_packed(args.root, args.category, config.frames, size, split=TRAINING).to(args.device)
    print(f"{len(data)} sequences of {data.rgba.shape[1]} pictures")

    # Where it goes, before the work; a network to train. Its file will tell what it has seen.
    files.require_writable(args.out)
    torch.manual_seed(stream_seed(args.seed, "weights"))
    seen = {"what": args.what, "category": args.category, "sequences": len(data), "frames": config.frames,
            "steps": config.fit.steps}
    if args.what == "vae":
        training = VAETraining(data, config, args.seed, [seen])
    elif args.what == "prior":
        trained_on = [*sparsefusion.read_trained_on(args.vae), seen]
        training = PriorTraining(data, config, sparsefusion.load(args.vae, stage="vae").to(args.device), trained_on)
    else:
        training = PerceptualTraining(data, config, attributes(args.root, args.category, data.names))

    # Train it, or resume.
    settings = {
        "what": args.what,
        "root": [str(root.resolve()) for root in args.root],
        "category": args.category,
        "vae": files.fingerprint(args.vae) if args.what == "prior" else None,
        "config": asdict(config),
    }
    fit = Fit(training, config.fit, args.out, args.seed, args.device, settings)
    fit.resume()
    fit.run(f"train {args.what}", args.minutes)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__)
    p.add_argument("what", choices=["vae", "prior", "perceptual"])
    p.add_argument("--out", type=Path, required=True, metavar="F",
                   help="weights file to write; the same command resumes from F.state")

    # What is given.
    given = p.add_argument_group("what is given")
    given.add_argument("--root", type=Path, nargs="+", required=True, metavar="DIR", help="CO3Dv2 folders")
    given.add_argument("--category", default="toys", metavar="C", help="category in them (default: toys)")
    given.add_argument("--frames", type=cli.count, metavar="N", help="frames of each sequence to use (default: 16)")
    given.add_argument("--preset", choices=MODELS, default="nano",
                       help="vae, perceptual: numbers of the model (default: nano)")
    given.add_argument("--vae", type=Path, metavar="F",
                       help="prior: the weights file that `train.py vae` wrote, or a prior to start from")

    # How long and how.
    how = p.add_argument_group("how it is trained")
    how.add_argument("--min-views", type=cli.count, metavar="N", help="prior: fewest input views (default: 1)")
    how.add_argument("--max-views", type=cli.count, metavar="N", help="prior: most input views (default: 4)")
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
