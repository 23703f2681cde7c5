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
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
    lr_exposure: float = 0.0        # Adam, logarithmic gain of every input view and channel; 0: all photographs were exposed alike
    footprint: int = 1              # pixels a side, odd: an input view's colours are means over such squares
    background: float = 1.0         # weight of an input view's pixels outside its mask; below 1 where masks may miss pieces
    opacity: float = 1e-3           # weight of the opacity term
    perceptual: float = 0.1         # weight of the perceptual term of distillation
    t_min: float = 0.0              # noise levels ~ U(t_min, 1); at least 1 / (2 steps), below which no step is taken
    steps: int = 50                 # of multi-step denoising from t = 1/2 or above
    occupancy_every: int = 16       # iterations between looks at where space is empty
    field: FieldConfig = ngp.PAPER


# Exposures: the appearance codes of NeRF in the Wild (Martin-Brualla et al. 2021), reduced to gains.
# Weight of the mean square of the logarithmic gains: without it, an object's differently coloured sides pass for exposures.
EXPOSURE_PRIOR = 0.3

PAPER = DistillConfig()
NANO = DistillConfig(iterations=500, bootstrap=120, viewpoints=24, image_size=128, render_size=64, lr_grid=5e-2, lr_mlp=1e-2,
                     decay=0.1, steps=5, t_min=0.2, field=ngp.NANO)
# Photographs without a prior: exposure varies, masks are rough, and resizing without a filter (as released) aliases.
PLAIN = DistillConfig(iterations=1000, image_size=256, render_size=64, lr_grid=3e-2, lr_mlp=1e-2, decay=0.05, lr_exposure=1e-2,
                      footprint=5, background=0.3, field=replace(ngp.NANO, levels=6, finest_resolution=96, log2_table=17))
PRESETS = {"paper": PAPER, "nano": NANO, "plain": PLAIN}


# ---------------------------------------------------------------------------------------------- losses (supplement)


def photometric_loss(colour: Tensor, silhouette: Tensor, target: Tensor, mask: Tensor, background: float = 1.0) -> Tensor:
    """Pseudo-Huber colour loss plus pseudo-Huber silhouette loss, means over (B, 3, s, s) and (B, 1, s, s): a scalar.

    Pixels outside the mask weigh `background`, those inside 1.
    """
    weight = background + (1 - background) * mask
    return (weight * sf.pseudo_huber(colour - target)).mean() + (weight * sf.pseudo_huber(silhouette - mask)).mean()


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


def lattice(size: int, full: int, rng: random.Random, device) -> tuple[Tensor, tuple[int, int]]:
    """Every (full / size)-th pixel centre of a `full` x `full` image, from a random first one (row, column), which is returned too.

    NDC (size * size, 2), row-major. Over time every pixel's ray is seen (as released: always the same size x size rays).
    """
    step = full // size
    first = (rng.randrange(step), rng.randrange(step))
    grid = pixel_grid(full, full, device=device).reshape(full, full, 2)
    return grid[first[0]::step, first[1]::step].reshape(-1, 2), first


def upsample(image: Tensor, full: int, first: tuple[int, int] = (0, 0), step: float | None = None) -> Tensor:
    """Bilinear (B, C, s, s) -> (B, C, full, full), where sample (i, j) is the image's pixel `first + step (i, j)`.

    Default step: the outer samples are the image's outermost pixels, as those of `cameras.pixel_grid` are.
    """
    s = image.shape[-1]
    step = step or (full - 1) / (s - 1)
    y, x = (((torch.arange(full, device=image.device) - f) / step) * (2 / (s - 1)) - 1 for f in first)
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)  # (full, full, 2) as (x, y)
    return F.grid_sample(image, grid.expand(len(image), -1, -1, -1), padding_mode="border", align_corners=True)


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
        self.colours = F.avg_pool2d(inputs.images, config.footprint, stride=1, padding=config.footprint // 2)
        self.exposure = torch.zeros(len(inputs), 3, device=device, requires_grad=True)  # logarithmic gains; only their differences count
        self.optimizer = torch.optim.Adam([{"params": self.field.encoding.parameters(), "lr": config.lr_grid},
                                           {"params": self.field.mlp.parameters(), "lr": config.lr_mlp},
                                           {"params": [self.exposure], "lr": config.lr_exposure}], betas=(0.9, 0.99), eps=1e-15)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.iteration, self.seconds, self.generator = 0, 0.0, torch.Generator(device)
        self.condition = None

    def input_step(self) -> Tensor:
        """Loss of one random input view (step 1)."""
        scene, i = self.inputs, self.random.randrange(len(self.inputs))
        seen, xy, _ = self.render(scene.cameras[i], scene.images.shape[-1])
        target = sf.colours_at(torch.cat([self.colours[i], scene.masks[i]])[None], xy)  # (1, R, 4)
        target = target.transpose(1, 2).reshape(seen.shape)
        colour = seen[:, :3] * (self.exposure[i] - self.exposure.mean(0)).exp()[:, None, None]
        psnr = -10 * math.log10((colour.detach() - target[:, :3]).square().mean().item() + 1e-10)
        self.psnr = psnr if self.psnr is None else 0.95 * self.psnr + 0.05 * psnr
        loss = photometric_loss(colour, seen[:, 3:], target[:, :3], target[:, 3:], self.config.background)
        return loss + self.config.opacity * opacity_loss(seen[:, 3:]) + EXPOSURE_PRIOR * self.exposure.square().mean()

    def query_step(self) -> Tensor:
        """Loss of one random query viewpoint (step 2): towards the EFT image, later towards the denoised rendering."""
        c, q, S = self.config, self.random.randrange(len(self.viewpoints)), self.model.preset.image_size
        seen, xy, first = self.render(self.viewpoints[q], S)
        features, guess = self.condition.features[q:q + 1], self.condition.images[q:q + 1]
        if self.iteration < c.bootstrap:
            guess = sf.colours_at(upsample(guess, S), xy).transpose(1, 2).reshape(1, 3, *seen.shape[2:])
            loss = photometric_loss(seen[:, :3], seen[:, 3:], guess, eft_mask(guess))
        else:
            x = upsample(seen[:, :3], S, first, S // c.render_size)
            level = c.t_min + (1 - c.t_min) * self.random.random()
            x_hat = self.model.denoise(x.detach(), features, level, self.generator, steps=c.steps, **self.sampler)
            loss = fusion_weight(level) * (x - x_hat).abs().mean() + c.perceptual * self.perceptual(x, x_hat).mean()
        return loss + c.opacity * opacity_loss(seen[:, 3:])

    def render(self, camera: Cameras, full: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Colour and silhouette (1, 4, s, s) on a random lattice of a view's pixels, their NDC (s * s, 2), and the first pixel."""
        s = self.config.render_size
        xy, first = lattice(s, full, self.random, camera.T.device)
        seen = ngp.render(self.field, *camera.rays(xy), self.generator, self.occupancy)
        return torch.cat([seen.colour, seen.opacity[:, None]], 1).t().reshape(1, 4, s, s), xy, first

    def run(self, progress: str | None = None, checkpoint=None) -> None:
        """All iterations that are left. `checkpoint()` is called about once a minute."""
        c, self.psnr, saved = self.config, None, time.time()
        if self.model is not None and self.condition is None and self.iteration < c.iterations:
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
        return {"field": self.field.state_dict(), "occupancy": self.occupancy.state_dict(), "exposure": self.exposure.detach(),
                "optimizer": self.optimizer.state_dict(), "iteration": self.iteration, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state."""
        for name in ("field", "occupancy", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.exposure.data.copy_(state["exposure"])
        self.iteration, self.seconds = state["iteration"], state["seconds"]

    @torch.no_grad()
    def views(self, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, size, size) and silhouettes (B, 1, size, size) of the field."""
        parts = [render_view(self.field, cameras[i], size, size, None, self.occupancy) for i in range(len(cameras))]
        return tuple(torch.cat(x) for x in zip(*parts))


# ---------------------------------------------------------------------------------------------- one instance, start to end


class Job:
    """Everything about one sequence: its inputs and targets, the models, where results go."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began = args, time.time()
        self.model = None if args.no_prior else self.load_model()
        name = args.preset or ("plain" if args.no_prior else self.model.preset.name)
        config = replace(PRESETS[name], **({"iterations": args.iterations} if args.iterations else {}))
        config = replace(config, bootstrap=min(config.bootstrap, config.iterations * 2 // 3))
        self.config = replace(config, field=replace(config.field, hashed=args.grid == "hashed"))
        if self.model and name == "paper" and args.device == "cpu":
            print("note: the paper's size takes minutes an iteration on a CPU; it is meant for --device cuda")
        size = self.model.preset.image_size if self.model else config.image_size
        self.sequence = args.sequence or sequences(args.root, args.category)[0]
        scene = load_sequence(args.root, args.category, self.sequence, size)
        self.choose_frames(scene)
        self.limits = sf.depth_limits((self.model.preset if self.model else sf.PRESETS["paper"]), scene.cameras)
        # The field lives in the object frame (Sec. 3.2): the first camera's axes, the world's origin.
        scene = replace(scene, cameras=relative_to(scene.cameras, scene.cameras[self.inputs[0]].unsqueeze(0), move_origin=False))
        self.scene = scene.to(args.device)
        if args.lpips:
            self.lpips = metrics.VGG16LPIPS(*args.lpips).to(args.device)
            self.loss_distance, self.distance, self.distance_name = self.lpips, self.lpips, "LPIPS (VGG16, v0.1)"
        else:
            net = load_attribute_net(args.perceptual).to(args.device)
            self.distance = lambda a, b: metrics.perceptual_distance(net.layers, a, b)
            self.loss_distance = self.model.perceptual if self.model else None
            self.distance_name = "attribute network (not LPIPS)"
            if self.model:
                print("perceptual term: the VAE encoder's features (no --lpips files given; this is not LPIPS)")

    def load_model(self) -> sf.SparseFusion:
        """The prior that the flags name."""
        model = sf.load(self.args.weights, self.args.device)
        if self.args.eft_train_mode:
            model.eft.train()
        return model

    def choose_frames(self, scene: Scene) -> None:
        """Positions of the input views and of the target views."""
        n, args = len(scene), self.args
        if args.input_frames:
            position = {name: i for i, name in enumerate(scene.names)}
            unknown = [f for f in args.input_frames if f not in position]
            if unknown:
                raise ValueError(f"--input-frames: {self.sequence} has no frame {unknown[0]}; it has {', '.join(scene.names[:8])}, ...")
            self.inputs = [position[f] for f in args.input_frames]
        else:
            views = n if args.views == 0 else args.views
            if views > n:
                raise ValueError(f"--views {views}: {self.sequence} has {n} frames")
            # as released: the first of a random permutation, by a CPU generator
            self.inputs = torch.randperm(n, generator=torch.Generator().manual_seed(args.seed))[:views].tolist()
        rest = [i for i in range(n) if i not in self.inputs]
        if args.metrics_on_inputs or not rest:
            rest = list(range(n))
        self.targets = [rest[i] for i in evenly_spaced(len(rest), args.targets)]

    def distillation(self, prior: bool, config: DistillConfig) -> Distillation:
        """The optimisation, with the prior or without."""
        inputs, args = self.scene[self.inputs], self.args
        if not prior:
            return Distillation(inputs, config, args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        viewpoints = Cameras.cat([circle_path(self.scene.cameras.to("cpu"), config.viewpoints, config.jitter, generator).to(args.device),
                                  self.scene.cameras])
        return Distillation(inputs, config, args.seed, self.model, viewpoints, self.limits, self.loss_distance,
                            ancestral=args.ancestral, unnoised_start=args.unnoised_start)

    def fit(self) -> Distillation:
        """The main optimisation; goes on where an interrupted one with the same settings stopped."""
        work = self.distillation(self.model is not None, self.config)
        file = self.args.out / "field.pt"
        settings = {"config": asdict(self.config), "sequence": self.sequence, "inputs": [self.scene.names[i] for i in self.inputs],
                    "flags": {k: v for k, v in flags(self.args).items() if k != "targets"}}
        if self.model:
            settings["weights"] = sum(float(p.double().sum()) for p in self.model.parameters())

        def checkpoint() -> None:
            sf.save_atomically({"settings": settings, **work.state_dict()}, file)

        if file.exists():
            saved = sf.read_checkpoint(file, "field")
            if saved.get("settings") == settings:
                work.load_state_dict(saved)
                print(f"{file}: going on at iteration {work.iteration}")
        work.run("distillation" if self.model else "field fit", checkpoint)
        checkpoint()
        return work

    def pictures(self, work: Distillation) -> dict[str, tuple[Tensor, Tensor]]:
        """What every method shows in the target views: (T, 3, S, S) and its silhouette (T, 1, S, S), in [0, 1]."""
        scene, S = self.scene, self.scene.images.shape[-1]
        cameras, inputs = scene.cameras[self.targets], scene[self.inputs]
        bearing = F.normalize(scene.cameras.centers(), dim=-1)
        nearest = [self.inputs[j] for j in (bearing[self.targets] @ bearing[self.inputs].T).argmax(1).tolist()]
        result = {"nearest": (scene.images[nearest], scene.masks[nearest])}
        if self.model is None:
            return result | {"ngp": work.views(cameras, S)}
        plain = self.distillation(False, replace(self.config, iterations=max(1, self.config.iterations // 2)))
        plain.run("field without prior")
        result["ngp"] = plain.views(cameras, S)
        see = lambda size, title: self.model.condition(inputs.images, inputs.cameras, cameras, *self.limits, size, title)
        full = see(S, "EFT, a ray a pixel").images
        generator = torch.Generator(self.args.device).manual_seed(self.args.seed)
        sample = self.model.sample(see(None, None).features, generator)
        result["eft"], result["vldm"] = (full, eft_mask(full)), (sample, eft_mask(sample))
        return result | {"sparsefusion": work.views(cameras, S)}

    @torch.no_grad()
    def measure(self, pictures: dict) -> dict:
        """Metrics of every method, means over the target views; the PSNR of equal pictures is 100 dB, for JSON has no infinity."""
        truth, masks, rows = self.scene.images[self.targets], self.scene.masks[self.targets], {}
        for name, (image, silhouette) in pictures.items():
            image = image.clamp(0, 1)
            rows[name] = {"psnr": metrics.psnr(image, truth).clamp(max=100), "ssim": metrics.ssim(image, truth),
                          "perceptual": self.distance(image, truth), "iou": metrics.iou(silhouette, masks)}
            rows[name] = {k: round(float(v.mean()), 4) for k, v in rows[name].items()}
        return rows

    def run(self) -> dict:
        """Fit, compare, write everything; returns what `metrics.json` holds."""
        out = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        work = self.fit()
        pictures = self.pictures(work)
        result = {"sequence": self.sequence, "input_frames": [self.scene.names[i] for i in self.inputs],
                  "target_frames": [self.scene.names[i] for i in self.targets], "seed": self.args.seed, "seconds": 0.0,
                  "methods": self.measure(pictures), "perceptual": self.distance_name, "command": " ".join(sys.argv), "flags": flags(self.args),
                  "versions": {"python": platform.python_version(), "torch": torch.__version__, "device": self.device_name()}}
        comparison(self.scene, self.inputs, self.targets, pictures).save(out / "comparison.png")
        turntable(work, self.scene, out / "turntable.gif")
        mesh = ngp.largest_component(ngp.extract_mesh(work.field, 160, occupancy=work.occupancy))
        ngp.write_ply(out / "mesh.ply", mesh)
        result |= {"seconds": round(time.time() - self.began, 1), "distillation_seconds": round(work.seconds, 1),
                   "peak_gb": peak_gb(self.args.device)}
        temporary = out / "metrics.json.tmp"
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(out / "metrics.json")
        return result

    def device_name(self) -> str:
        """What the numbers were made on."""
        return torch.cuda.get_device_name() if self.args.device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"


def flags(args: argparse.Namespace) -> dict[str, str]:
    """The flags that decide a result, as text."""
    return {k: str(v) for k, v in vars(args).items() if k not in ("out", "run", "workers", "instances")}


def peak_gb(device: str) -> float:
    """The most memory used so far, 10^9 bytes: of the GPU if it is one, else of this process."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def load_attribute_net(path: Path) -> metrics.AttributeNet:
    """The network that measures perceptual distance, in evaluation mode."""
    weights = sf.read_checkpoint(path)["weights"]
    try:
        net = metrics.AttributeNet(len(weights["head.bias"]))
        net.load_state_dict(weights)
    except (LookupError, TypeError, RuntimeError) as e:
        raise ValueError(f"{path}: not the weights of a perceptual network (`sparsefusion.py train perceptual` writes one)") from e
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- pictures


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> a picture."""
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


LABELS = {"nearest": "nearest input", "ngp": "field alone", "eft": "EFT", "vldm": "VLDM sample", "sparsefusion": "SparseFusion"}


def comparison(scene: Scene, inputs: list[int], targets: list[int], pictures: dict, rows: int = 6) -> Image.Image:
    """Top: the input views. Below, for up to `rows` unseen views: the photograph and what every method shows."""
    S, text = scene.images.shape[-1], 16
    rows = evenly_spaced(len(targets), rows)
    columns = ["target", *pictures]
    width = max(len(inputs), len(columns))
    sheet = Image.new("RGB", (width * S, (S + text) * (len(rows) + 1)), (32, 32, 32))
    draw = ImageDraw.Draw(sheet)
    for i, view in enumerate(inputs):
        draw.text((i * S + 4, 2), f"input, frame {scene.names[view]}", fill="white")
        sheet.paste(to_image(scene.images[view]), (i * S, text))
    for r, row in enumerate(rows, 1):
        for c, column in enumerate(columns):
            label = f"frame {scene.names[targets[row]]}" if column == "target" else LABELS[column]
            draw.text((c * S + 4, r * (S + text) + 2), label, fill="white")
            image = scene.images[targets[row]] if column == "target" else pictures[column][0][row]
            sheet.paste(to_image(image), (c * S, r * (S + text) + text))
    return sheet


def turntable(work: Distillation, scene: Scene, path: Path, frames: int = 36) -> None:
    """An animation of the field on the circle path, the box around its occupied cells in the middle of the picture."""
    cameras = circle_path(scene.cameras.to("cpu"), frames + 1)[:-1].to(scene.cameras.T.device)
    middle, _ = cameras.project(work.occupancy.box.mean(0).expand(frames, 1, 3))  # crops of photographs look past the object
    cameras = replace(cameras, principal=cameras.principal - middle[:, 0])
    images = [to_image(x) for x in work.views(cameras, scene.images.shape[-1])[0]]
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0)


def table(methods: dict) -> str:
    """Metrics as text, a method a line."""
    lines = [f"{'':<16}{'PSNR':>8}{'SSIM':>8}{'perceptual':>12}{'IoU':>8}"]
    lines += [f"{LABELS[k]:<16}{m['psnr']:>8.2f}{m['ssim']:>8.3f}{m['perceptual']:>12.3f}{m['iou']:>8.3f}" for k, m in methods.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the command


def add_job_flags(p: argparse.ArgumentParser) -> None:
    """The flags that `distill.py` and `sparsefusion.py evaluate` share."""
    p.add_argument("--root", type=Path, default=ROOT / "sample" / "co3d", help="CO3Dv2 folder (default: the shipped synthetic sample)")
    p.add_argument("--category", default="toys", help="category in it (default: toys)")
    p.add_argument("--views", type=int, default=2, metavar="N", help="random input views; 0 for all (default: 2)")
    p.add_argument("--weights", type=Path, default=sf.SHIPPED, help="the prior (default: the shipped nano weights)")
    p.add_argument("--preset", choices=PRESETS, help="numbers of the distillation (default: those of the weights; plain without a prior)")
    p.add_argument("--iterations", type=sf.count, metavar="N", help="default: the preset's")
    p.add_argument("--targets", type=sf.count, default=8, metavar="N", help="held-out views to compare, evenly spaced (default: 8)")
    p.add_argument("--seed", type=int, default=0, help="of input views, noise and initial weights (default: 0)")
    p.add_argument("--perceptual", type=Path, default=sf.SHIPPED_PERCEPTUAL, metavar="F", help="network of the perceptual metric")
    p.add_argument("--lpips", type=Path, nargs=2, metavar=("VGG16", "LINEAR"),
                   help="vgg16-397923af.pth and LPIPS' vgg.pth: use LPIPS as loss and as metric")
    sf.add_device(p)
    r = p.add_argument_group("as released", "the released code's behaviour, where it differs (see the README)")
    r.add_argument("--grid", choices=["hashed", "tiled"], default="hashed", help="index of the grid encoding (released: tiled)")
    r.add_argument("--ancestral", action="store_true", help="fresh noise after every step of multi-step denoising")
    r.add_argument("--unnoised-start", action="store_true", help="start levels of 0.99 and more from the clean latent")
    r.add_argument("--eft-train-mode", action="store_true", help="leave dropout and batch statistics of the EFT on")
    r.add_argument("--metrics-on-inputs", action="store_true", help="average metrics over the input views as well")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = sf.Parser(description=__doc__.splitlines()[0], epilog="Run without flags: two views of a synthetic toy, on a CPU in minutes.")
    add_job_flags(p)
    p.add_argument("--sequence", metavar="S", help="default: the first of the category")
    p.add_argument("--input-frames", type=lambda s: s.split(","), metavar="I,J,...",
                   help="frame numbers of the input views, instead of --views")
    p.add_argument("--no-prior", action="store_true", help="fit the field to the input views alone")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: output/<sequence>")
    return p


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    def command(args: argparse.Namespace) -> None:
        if args.views < 0:
            raise ValueError(f"--views {args.views}: a number of views, or 0 for all")
        args.out = args.out or Path("output") / (args.sequence or sequences(args.root, args.category)[0])
        result = Job(args).run()
        print(f"\n{result['sequence']}: inputs {', '.join(result['input_frames'])}; means over {len(result['target_frames'])} target views; "
              f"perceptual: {result['perceptual']}\n{table(result['methods'])}\n{result['seconds']:.0f} s; results in {args.out}")
    sf.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
