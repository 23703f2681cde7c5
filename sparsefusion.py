"""The SparseFusion model: EFT, VAE and VLDM as one object, its presets, checkpoints, training and evaluation (Sec. 3.1 and 4).

    python sparsefusion.py train vae         the autoencoder of a category, from its pictures
    python sparsefusion.py train prior       EFT and UNet jointly, the VAE frozen (Sec. 3.1)
    python sparsefusion.py train perceptual  the small network whose features measure perceptual distance in the evaluation
    python sparsefusion.py convert           the released files -> one weights file of this program
    python sparsefusion.py evaluate          distil every sequence of a tree and average the metrics (Sec. 4)

`PRESETS["paper"]` is the released architecture, `PRESETS["nano"]` the same classes, small, for the synthetic sample category.
The interface is `SparseFusion.condition` (what the EFT sees from a viewpoint), `.sample` (one novel view from the VLDM) and
`.denoise` (multi-step denoising of a rendering, which distillation calls).

Letters: `V` input views, `Q` query views, `B` batch, `C` feature channels, `S` image side, `h` side of the latent.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import json
import math
import multiprocessing
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import eft
import released
import vldm
from cameras import Cameras, depth_range, pixel_grid
from co3d import PackedScenes, load_packed, sequences
from metrics import AttributeNet, feature_distance

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "sample" / "nano.pt"
SHIPPED_PERCEPTUAL = ROOT / "sample" / "perceptual.pt"


# ---------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Preset:
    """Every number of a model."""
    name: str
    image_size: int          # S: side of the square crops, pixels
    eft: eft.EFTConfig
    vae: vldm.VAEConfig
    unet: vldm.UNetConfig
    diffusion: vldm.DiffusionConfig

    @property
    def latent_size(self) -> int:
        """h: side of the latent; the VAE halves the image once a level but the last."""
        return self.image_size >> (len(self.vae.widths) - 1)

    @staticmethod
    def from_dict(d: dict) -> Preset:
        """The inverse of `dataclasses.asdict`."""
        return Preset(d["name"], d["image_size"], eft.EFTConfig(**d["eft"]), vldm.VAEConfig(**d["vae"]), vldm.UNetConfig(**d["unet"]),
                      vldm.DiffusionConfig(**d["diffusion"]))


PRESETS = {
    "paper": Preset("paper", 256, eft.PAPER, *vldm.PAPER),
    "nano": Preset("nano", 128, eft.NANO, *vldm.NANO),
}


# Part -> where a released file has its state dict, the rules from its names to ours, and what of it nothing uses.
RELEASED = {
    "eft": ("model_state_dict", eft.RELEASED_KEYS, eft.RELEASED_UNUSED),
    "vldm": ("model_state_dict", released.RELEASED_VLDM_KEYS, released.RELEASED_VLDM_UNUSED),
    "vae": ("state_dict", released.RELEASED_VAE_KEYS, []),
}


class Condition(NamedTuple):
    """What the EFT says about query views."""
    features: Tensor  # (Q, C, s, s), s = latent side times the UNet's cond_unshuffle
    images: Tensor    # (Q, 3, s, s) in [0, 1], the EFT image


class SparseFusion(nn.Module):
    """p(query view | input views): EFT -> features -> latent diffusion, in the VAE's latent space (Fig. 2)."""

    def __init__(self, preset: Preset):
        super().__init__()
        self.preset = preset
        self.eft, self.vae, self.vldm = eft.EFT(preset.eft), vldm.VAE(preset.vae), vldm.VLDM(preset.unet, preset.diffusion)

    @staticmethod
    def from_released(eft: Path, vldm: Path, vae: Path, device: str = "cpu") -> SparseFusion:
        """The released model: EFT and VLDM checkpoints, and the VAE of a Stable Diffusion v1 `.ckpt` or of a Diffusers `.safetensors`.

        Prints the numbers of parameters. Raises `ValueError` with one line for a file that is not exactly that; runs nothing in it.
        """
        model = blank(PRESETS["paper"])
        for part, path in (("eft", eft), ("vldm", vldm), ("vae", vae)):
            load_released(getattr(model, part), part, path)
        return ready(model, device)

    @torch.no_grad()
    def condition(self, images: Tensor, cameras: Cameras, queries: Cameras, near: float, far: float, size: int | None = None,
                  progress: str | None = None) -> Condition:
        """Features and EFT images of Q query viewpoints, one after the other.

        images (V, 3, S, S) in [0, 1] with black background, `cameras` (V,) theirs, `queries` (Q,), near and far the depth range in
        CO3D units. `size` rays a side (default: what the UNet takes); `progress` titles a progress bar.
        """
        size = size or self.preset.latent_size * self.preset.unet.cond_unshuffle
        chunk = 128 if images.device.type == "cpu" else 16384  # rays at once: what fits a CPU's caches, what fills a GPU
        maps = self.eft.encode(images)
        views = [self.eft.image(maps, images, cameras, queries[i], size, near, far, chunk)
                 for i in tqdm(range(len(queries)), desc=progress, disable=progress is None or None, leave=False)]
        return Condition(*(torch.stack(x) for x in zip(*views)))

    @torch.no_grad()
    def denoise(self, image: Tensor, features: Tensor, level: float, generator: torch.Generator, guidance: float = 1.0,
                steps: int | None = None, **sampler) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> what the VLDM makes of them after noising to `level` in [0, 1] (Sec. 3.2): the same
        shape, in [0, 1]. `steps` overrides the preset's; keyword arguments go to `vldm.plms`."""
        latent = self.vae.encode(image)
        return self.decode(self._plms(latent, features, level, generator, guidance, steps or self.preset.diffusion.steps, **sampler))

    @torch.no_grad()
    def sample(self, features: Tensor, generator: torch.Generator, guidance: float = 1.0, steps: int | None = None) -> Tensor:
        """One novel view for each of (B, C, s, s) features, from pure noise: (B, 3, S, S) in [0, 1]."""
        c = self.preset.diffusion
        shape = (len(features), self.preset.vae.channels, self.preset.latent_size, self.preset.latent_size)
        randn = lambda: torch.randn(shape, generator=generator, device=generator.device).to(features.device)
        latent = vldm.ancestral(self.vldm.denoiser(features, guidance), randn, steps or 5 * c.steps, c.clip, c.t_start)
        return self.decode(latent)

    def _plms(self, latent: Tensor, features: Tensor, level: float, generator: torch.Generator, guidance: float, steps: int,
              **sampler) -> Tensor:
        c = self.preset.diffusion
        randn = lambda: torch.randn(latent.shape, generator=generator, device=generator.device).to(latent.device)
        start = level = min(level, c.t_start)
        result = None
        for result, _, _ in vldm.plms(self.vldm.denoiser(features, guidance), latent, level, randn, steps, c.clip, **sampler):
            pass
        return vldm.start_latent(latent, start, randn) if result is None else result

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, 4, h, h) -> images (B, 3, S, S), clamped to [0, 1]."""
        return self.vae.decode(latent).clamp(0, 1)

    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of images (B, 3, S, S) in the VAE encoder's features, in LPIPS' form: (B,). Differentiable; not LPIPS."""
        return feature_distance(self.vae.encoder.features(2 * a - 1), self.vae.encoder.features(2 * b - 1))


def depth_limits(preset: Preset, cameras: Cameras) -> tuple[float, float]:
    """Near and far of the EFT's rays for a scene's cameras, CO3D units (Sec. 3.1)."""
    return depth_range(cameras, preset.eft.depth_margin)


# ---------------------------------------------------------------------------------------------- checkpoints


def save_atomically(data, path: Path) -> None:
    """`torch.save` to a temporary name, then rename: an interrupted run leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(data, temporary)
    os.replace(temporary, path)


def save(model: SparseFusion, path: Path, half: bool = True) -> None:
    """One file: the preset and the weights, floating point ones in half precision unless told otherwise."""
    weights = {k: v.half() if half and v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_atomically({"preset": asdict(model.preset), "weights": weights}, path)


def read_checkpoint(path: Path, entry: str = "weights") -> dict:
    """A checkpoint that this program wrote, with a state dict under `entry`, on the CPU; ValueError with one line for anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        data = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)  # tensors are read when they are used
    except Exception as e:
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({type(e).__name__})") from e
    if not isinstance(data, dict) or not isinstance(data.get(entry), dict):
        raise ValueError(f"{path}: not a checkpoint of this program (released files go through `sparsefusion.py convert` first)")
    return data


def load(path: Path, device: str = "cpu") -> SparseFusion:
    """The model that `save` wrote, in evaluation mode, float32."""
    data = read_checkpoint(path)
    try:
        model = blank(Preset.from_dict(data["preset"]))
        model.load_state_dict(data["weights"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path}: preset and weights do not fit together ({' '.join(str(e).split())[:160]})") from e
    return ready(model, device)


def load_released(module: nn.Module, part: str, path: Path) -> None:
    """Fill the `part` ("eft", "vldm" or "vae") of a model from its released file; says what the file has."""
    entry, rules, unused = RELEASED[part]
    state, beside = released.read(path, entry)
    diffusers = part == "vae" and not any(key.startswith("first_stage_model.") for key in state)
    if diffusers:
        rules = released.DIFFUSERS_VAE_KEYS
    elif part == "vae":  # the first stage is one of several networks in the file
        every, state = state, {key: value for key, value in state.items() if key.startswith("first_stage_model.")}
        beside += [f"{len(every) - len(state):,} keys of other networks"] * (len(every) > len(state))
    known = released.fill(module, state, rules, unused, path, matrices=diffusers)
    print(f"{path}: {part.upper()} with {released.count_parameters(state):,} parameters"
          + (f", of them {released.count_parameters(known):,} known to be unused" if known else "")
          + (f"; left alone: {', '.join(beside)}" if beside else ""))


def blank(preset: Preset) -> SparseFusion:
    """A model whose weights are about to be loaded: to draw 500 million random ones first would take longer than to read them."""
    with torch.device("meta"):
        model = SparseFusion(preset)
    return model.to_empty(device="cpu")


def ready(model: SparseFusion, device: str) -> SparseFusion:
    """The model for inference: on the device, channels last (1.1 to 1.4 times faster on a CPU), no gradients."""
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    model.vldm.accelerate()
    return model


# ---------------------------------------------------------------------------------------------- training


def pseudo_huber(x: Tensor, scale: float = 0.1) -> Tensor:
    """(sqrt(1 + (x / s)^2) - 1) s, elementwise (Charbonnier et al. 1994): the colour loss of Sec. 3 and the supplement."""
    return ((1 + x**2 / scale**2).sqrt() - 1) * scale


def colours_at(images: Tensor, xy: Tensor, aligned: bool = False) -> Tensor:
    """Bilinear samples of images (B, C, S, S) at NDC positions xy (R, 2): (B, R, C).

    NDC 1 - 1/S is the centre of the outermost pixel; `aligned` puts the centre at NDC 1 instead (as released, half a pixel off there).
    """
    grid = -xy.expand(len(images), 1, -1, 2)
    return F.grid_sample(images, grid, align_corners=aligned, padding_mode="zeros").squeeze(2).transpose(1, 2)


def draw_images(data: PackedScenes, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random pictures (B, 3, S, S) in [0, 1] on black, and the indices (B,) of their sequences."""
    n, views = data.rgba.shape[:2]
    i = torch.randint(n, (count,), generator=generator, device=generator.device).to(data.rgba.device)
    j = torch.randint(views, (count,), generator=generator, device=generator.device).to(data.rgba.device)
    return data.rgba[i, j, :3].float() / 255, i


def vae_loss(vae: vldm.VAE, images: Tensor, generator: torch.Generator) -> Tensor:
    """Reconstruction (L1, L2, L1 of image gradients) of images (B, 3, S, S) through a posterior sample, and 1e-6 KL: a scalar."""
    mean, log_var = vae.moments(images)
    noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
    error = vae.decode((mean + (log_var / 2).exp() * noise) * vae.config.scale).float() - images
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).float().flatten(1).sum(1).mean()
    return error.abs().mean() + (error**2).mean() + gradients + 1e-6 * kl


def prior_loss(model: SparseFusion, data: PackedScenes, limits: tuple[Tensor, Tensor], batch: int, views: tuple[int, int],
               generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One training step of EFT and UNet (Sec. 3.1 and supplement): diffusion loss and EFT colour loss, two scalars.

    From each of `batch` random sequences one random query view and as many other views as inputs, `views` = (fewest, most).
    """
    c, device = model.preset.diffusion, data.rgba.device
    rand = lambda *shape: torch.rand(shape, generator=generator, device=generator.device).to(device)
    scene = (rand(batch) * len(data.rgba)).long()
    V = random.Random(generator.initial_seed()).randint(*views)        # not from the GPU, which would have to be waited for
    order = rand(batch, data.rgba.shape[1]).argsort(1)[:, :1 + V]      # (B, 1 + V): the query first, then its inputs
    at = (scene[:, None], order)
    images, cameras = data.rgba[at][:, :, :3].float() / 255, data.cameras[at]
    target, inputs, valid = images[:, 0], images[:, 1:], data.valid[scene, order[:, 0]].float()

    side = model.preset.latent_size * model.preset.unet.cond_unshuffle
    xy = pixel_grid(side, side, full=model.preset.image_size, device=device)
    features, colour = model.eft(model.eft.encode(inputs), inputs, cameras[:, 1:], cameras[:, 0], xy, limits[0][scene], limits[1][scene])
    error = pseudo_huber(colour.float() - colours_at(target, xy))
    colour_loss = (error * (colours_at(valid, xy) > 0.5)).mean()

    with torch.no_grad():
        x0 = model.vae.encode(target).float().repeat_interleave(c.noisings, 0)
        mask = vldm.latent_mask(valid, model.preset.latent_size).repeat_interleave(c.noisings, 0)
    n = len(x0)
    t = (torch.arange(n, device=device) + rand(n)) / n * 0.999         # stratified U(0, 0.999)
    t = t[rand(n).argsort()]
    keep = (rand(n) >= c.drop).to(x0.dtype)[:, None, None, None]
    eps = torch.randn(x0.shape, generator=generator, device=generator.device).to(device)
    features = features.transpose(1, 2).unflatten(-1, (side, side)).repeat_interleave(c.noisings, 0)
    return model.vldm.loss(x0, features * keep, t, eps, mask), colour_loss


def fit(module: nn.Module, loss, out: Path, finish, args: argparse.Namespace) -> None:
    """Adam with warm-up, cosine decay and an exponential moving average; saves and resumes.

    `loss(generator)` returns a scalar to minimise and a dict of numbers to show; step k draws from a generator seeded by
    (seed, k), so an interrupted run goes on as it would have. Every two minutes and at the end the state goes to `<out>.state` and
    `finish(averaged weights)` writes `out`.
    """
    torch.backends.cudnn.benchmark = True
    module.to(memory_format=torch.channels_last).train()
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.99), fused=args.device == "cuda")
    state, start, shown = out.with_name(out.name + ".state"), 0, {}
    if state.exists():
        saved = read_checkpoint(state, "module")
        try:
            module.load_state_dict(saved["module"]), optimizer.load_state_dict(saved["optimizer"])
            average, start = {k: saved["average"][k].to(v.device) for k, v in average.items()}, saved["step"]
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"{state}: the state of another training; delete it or choose another --out") from e
        print(f"resuming {out.name} at step {start}")
    generator, began, written = torch.Generator(args.device), time.time(), time.time()

    def checkpoint(step: int) -> None:
        save_atomically({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}, state)
        finish(average)

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=f"train {args.what}", disable=None, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        generator.manual_seed(args.seed * 10_000_019 + step)
        torch.manual_seed(args.seed * 10_000_019 + step)  # dropout
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            value, numbers = loss(generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema(average, module, min(args.ema, (step + 1) / (step + 10)))
        shown = {k: 0.98 * shown.get(k, v.detach()) + 0.02 * v.detach() for k, v in numbers.items()}
        if step % 50 == 0 or step + 1 == args.steps:
            text = ", ".join(f"{k} {v:.4f}" for k, v in shown.items())
            bar.set_postfix_str(text)
            if step % 500 == 0 or step + 1 == args.steps:
                tqdm.write(f"step {step + 1} of {args.steps}, {time.time() - began:.0f} s: {text}")
            if args.minutes and time.time() - began > 60 * args.minutes:
                print(f"stopped after {args.minutes} minutes at step {step + 1}; the same command goes on from there")
                return checkpoint(step + 1)
            if time.time() - written > 120:
                checkpoint(step + 1)
                written = time.time()
    checkpoint(args.steps)


@torch.no_grad()
def ema(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights; buffers that are not floating point are copied."""
    now = module.state_dict()
    floats = [k for k, v in now.items() if v.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in floats], [now[k] for k in floats], 1 - decay)
    for k in now.keys() - set(floats):
        average[k].copy_(now[k])


def train(args: argparse.Namespace) -> None:
    """The `train` command: `vae`, `prior` or `perceptual`."""
    if args.what == "prior" and not (args.vae and args.fewest <= args.most < args.frames):
        raise ValueError("train prior: needs --vae, the file of `train vae`, and --fewest <= --most < --frames, "
                         f"not --vae {args.vae} --fewest {args.fewest} --most {args.most} --frames {args.frames}")
    data = load_packed(args.root, args.category, None, args.frames, PRESETS[args.preset].image_size).to(args.device)
    print(f"{data.rgba.shape[0]} sequences of {data.rgba.shape[1]} pictures")
    torch.manual_seed(args.seed)
    {"vae": train_vae, "prior": train_prior, "perceptual": train_perceptual}[args.what](data, args)


def attributes(roots: list[Path], category: str, names: list[str]) -> Tensor:
    """What the generator knows about each synthetic toy, from `sequence_annotations.jgz`: (N, A) in [0, 1]."""
    files = [root / category / "sequence_annotations.jgz" for root in roots]
    known = {x["sequence_name"]: x.get("attributes") for file in files for x in json.loads(gzip.decompress(file.read_bytes()))}
    if not all(known.get(name) for name in names):
        raise ValueError(f"{files[0]}: no attributes; only the synthetic toys of sample/toys.py have them")
    return torch.tensor([known[name] for name in names])


def train_vae(data: PackedScenes, args: argparse.Namespace) -> None:
    """Train the autoencoder; then scale its latents to unit variance."""
    preset = PRESETS[args.preset]
    vae = vldm.VAE(preset.vae).to(args.device)

    def loss(generator):
        images, _ = draw_images(data, args.batch, generator)
        value = vae_loss(vae, images.contiguous(memory_format=torch.channels_last), generator)
        return value, {"loss": value}

    def finish(average):
        model = SparseFusion(preset)
        model.vae.load_state_dict(average)
        model.to(args.device).eval()
        images, _ = draw_images(data, min(256, data.rgba.shape[:2].numel()), torch.Generator(args.device).manual_seed(args.seed))
        with torch.no_grad():
            scale = 1 / float(model.vae.moments(images)[0].std())
            psnr = -10 * torch.log10(((model.vae.decode(model.vae.encode(images)) - images) ** 2).mean())
        model.preset = replace(preset, vae=replace(preset.vae, scale=scale))
        save(model, args.out, half=False)
        print(f"VAE: {psnr:.2f} dB, latent scale {scale:.4f}")

    fit(vae, loss, args.out, finish, args)


def train_prior(data: PackedScenes, args: argparse.Namespace) -> None:
    """Train EFT and UNet jointly on top of the frozen autoencoder in `args.vae`."""
    model = load(args.vae, args.device)
    pair = nn.ModuleDict({"eft": model.eft, "vldm": model.vldm}).requires_grad_(True)
    limits = [depth_limits(model.preset, data.cameras[i]) for i in range(len(data.rgba))]
    limits = tuple(torch.tensor(x, device=args.device) for x in zip(*limits))

    if args.device == "cuda":  # a thousand small kernels: one launch instead (110 -> 30 ms a step on an H100)
        c, side = model.preset.diffusion, model.preset.latent_size
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            n, wide = args.batch * c.noisings, side * model.preset.unet.cond_unshuffle
            torch.cuda.make_graphed_callables(model.vldm.unet.train(), (
                torch.randn(n, model.preset.vae.channels, side, side, device="cuda"), torch.zeros(n, device="cuda"),
                torch.randn(n, model.preset.unet.cond_channels, wide, wide, device="cuda", requires_grad=True)))

    def loss(generator):
        diffusion, colour = prior_loss(model, data, limits, args.batch, (args.fewest, args.most), generator)
        return diffusion + colour, {"diffusion": diffusion, "colour": colour}

    def finish(average):
        result = SparseFusion(model.preset)
        result.load_state_dict(model.vae.state_dict(prefix="vae.") | average)
        save(result, args.out)

    fit(pair, loss, args.out, finish, args)


def train_perceptual(data: PackedScenes, args: argparse.Namespace) -> None:
    """Train the attribute network. Its features measure distance in the evaluation; no loss ever uses them."""
    truth = attributes(args.root, args.category, data.names).to(args.device)
    net = AttributeNet(truth.shape[1]).to(args.device)

    def loss(generator):
        images, scene = draw_images(data, args.batch, generator)
        value = F.mse_loss(net(images).float(), truth[scene])
        return value, {"mse": value}

    def finish(average):
        save_atomically({"weights": {k: v.half() if v.is_floating_point() else v for k, v in average.items()}}, args.out)

    fit(net, loss, args.out, finish, args)


def convert(args: argparse.Namespace) -> None:
    """The `convert` command: released files -> one weights file."""
    save(SparseFusion.from_released(args.eft, args.vldm, args.vae), args.out, half=args.half)
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB in {'half' if args.half else 'full'} precision, for --weights")


# ---------------------------------------------------------------------------------------------- evaluation


def evaluate_one(job: tuple) -> dict:
    """Distil one sequence, unless its results with these flags and weights are there already: what `metrics.json` holds."""
    import distill  # the main command knows this module, so this one only asks for it here

    args, k, name = job
    if args.workers > 1:  # the processes share the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    own = {"sequence": name, "out": args.out / name, "seed": args.seed + k, "input_frames": None, "no_prior": False}
    args, earlier = argparse.Namespace(**vars(args) | own), args.out / name / "metrics.json"
    if earlier.exists() and earlier.stat().st_mtime > args.weights.stat().st_mtime:
        result = json.loads(earlier.read_text())
        if result.get("flags") == distill.flags(args):
            return result
    return distill.Job(args).run()


def evaluate(args: argparse.Namespace) -> None:
    """The `evaluate` command (Sec. 4): every sequence of a category, input views excluded from the metrics."""
    import distill

    names = sequences(args.root, args.category)[:args.instances]
    jobs, results = [(args, k, name) for k, name in enumerate(names)], []
    with concurrent.futures.ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        run_all = pool.map(evaluate_one, jobs) if args.workers > 1 else map(evaluate_one, jobs)
        for result in tqdm(run_all, total=len(jobs), desc="instances", disable=None):
            results.append(result)
    each = [r["methods"] for r in results]
    mean = {m: {k: sum(e[m][k] for e in each) / len(each) for k in each[0][m]} for m in each[0]}
    better = {"psnr": 1, "ssim": 1, "perceptual": -1, "iou": 1}
    wins = {k: sum(sign * e["sparsefusion"][k] > sign * e["eft"][k] for e in each) for k, sign in better.items()}
    ratio = mean["sparsefusion"]["perceptual"] / mean["eft"]["perceptual"]
    summary = {"instances": len(results), "views": args.views, "mean": mean, "sparsefusion_beats_eft": wins, "perceptual_ratio": ratio,
               "perceptual": results[0]["perceptual"], "seconds": [r["seconds"] for r in results]}
    (args.out / "evaluation.json").write_text(json.dumps(summary, indent=1))
    print(f"{len(results)} instances, {args.views} input views each\n{distill.table(mean)}")
    print("SparseFusion better than EFT: " + ", ".join(f"{k} {n} of {len(each)}" for k, n in wins.items())
          + f"; perceptual distance {ratio:.2f} times EFT's")


# ---------------------------------------------------------------------------------------------- commands


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def decay(text: str) -> float:
    """A number in [0, 1), for argparse."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return float(text)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; exit code 2."""

    def error(self, message: str):
        """Without the usage, which --help prints."""
        self.exit(2, f"error: {message}\n")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag --device."""
    there = ["cpu", "cuda"][:1 + torch.cuda.is_available()]
    parser.add_argument("--device", choices=there, default=there[-1], help="cpu or cuda (default: cuda if there is one)")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    import distill

    top = Parser(description=__doc__.splitlines()[0], epilog="`python distill.py` is the main command.")
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", help="train a part of a model; the same command again goes on where it stopped")
    p.add_argument("what", choices=["vae", "prior", "perceptual"])
    p.add_argument("--root", type=Path, nargs="+", required=True, help="CO3Dv2 folders")
    p.add_argument("--category", default="toys")
    p.add_argument("--preset", choices=PRESETS, default="nano")
    p.add_argument("--out", type=Path, required=True, help="weights file to write; its training state goes to OUT.state")
    p.add_argument("--vae", type=Path, help="prior: the weights file that `train vae` wrote")
    p.add_argument("--frames", type=count, default=16, help="frames of each sequence to use (default 16)")
    p.add_argument("--fewest", type=count, default=1, help="prior: fewest input views")
    p.add_argument("--most", type=count, default=4, help="prior: most input views")
    p.add_argument("--steps", type=count, default=10000)
    p.add_argument("--batch", type=count, default=32, help="pictures (prior: sequences) a step")
    p.add_argument("--lr", type=positive, default=4e-4)
    p.add_argument("--ema", type=decay, default=0.999, help="decay of the average of weights that is kept")
    p.add_argument("--minutes", type=positive, help="stop after that long; the same command goes on from there")
    p.add_argument("--seed", type=int, default=0)
    add_device(p)
    p.set_defaults(run=train)
    p = commands.add_parser("convert", help="the released files -> one weights file of this program; nothing in them is run")
    p.add_argument("--eft", type=Path, required=True, metavar="F", help="the released EFT checkpoint of a category")
    p.add_argument("--vldm", type=Path, required=True, metavar="F", help="the released VLDM checkpoint of the same category")
    p.add_argument("--vae", type=Path, required=True, metavar="F", help="Stable Diffusion v1 (.ckpt), or its Diffusers VAE (.safetensors)")
    p.add_argument("--out", type=Path, required=True, metavar="F", help="weights file to write")
    p.add_argument("--half", action="store_true", help="half precision: 1 GB instead of 2, and rounded")
    p.set_defaults(run=convert)
    p = commands.add_parser("evaluate", help="distil every sequence of a category and average the metrics")
    distill.add_job_flags(p)
    p.add_argument("--out", type=Path, default=Path("output/evaluation"), metavar="DIR", help="results, a folder a sequence")
    p.add_argument("--instances", type=count, metavar="N", help="only the first N sequences")
    p.add_argument("--workers", type=count, default=1, metavar="N", help="sequences at a time, a process each")
    p.set_defaults(run=evaluate)
    return top


def run(function, args: argparse.Namespace) -> None:
    """Call a command; bad input ends in one line and exit code 2."""
    try:
        function(args)
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    run(args.run, args)


if __name__ == "__main__":
    main()
