"""The SparseFusion model: EFT, VAE and VLDM as one object, and its files (Sec. 3.1).

A `Preset` has every number of a model; `presets.py` has the paper's beside the sample's. The interface is
`SparseFusion.condition` (what the EFT sees from a viewpoint), `.sample_view` (one novel view from the VLDM) and
`.denoise` (multi-step denoising of a rendering, which distillation calls).

Shapes: `V` input views, `Q` query views, `B` batch, `C` feature channels, `S` image side, `h` side of the latent.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import eft
import metrics
import unet
import vae
import vldm
from cameras import Cameras, depth_range, object_sphere, pixel_grid
from common import files
from common.machine import randn, stream_seed
from common.progress import Progress
from common.settings import check_numbers
from gpu.graphs import HalfFeatures, accelerate, half_copy, half_is_accurate
from gpu.groupnorm import fuse, fused_unet_block, fused_vae_block

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "sample" / "nano.pt"    # the prior of toys
THINGS = ROOT / "sample" / "things.pt"  # that of anything else

TRAINED_DISTANCE = 9.8  # mean distance of the toys' cameras from the origin, to which our training brings every scene

# Bytes of the tokens that go through the EFT at once, in float32: what fits a CPU's caches, what fills a GPU.
HULL_RAYS = 2048  # whose ways through the visual hull are looked for at once
EFT_BYTES = {"cpu": 2**21, "cuda": 2**29}

VAE_AT_ONCE = 4  # pictures that a GPU encodes or decodes at once: more are no faster, and the largest maps take memory


# ---------------------------------------------------------------------------------------------- presets

@dataclass(frozen=True)
class Preset:
    """Every number of a model."""
    name: str
    image_size: int                   # S: side of the square crops, pixels
    eft: eft.EFTConfig
    vae: vae.VAEConfig
    unet: unet.UNetConfig
    diffusion: vldm.DiffusionConfig

    def __post_init__(self):
        check_numbers(self)
        if self.image_size % self.vae.factor:
            raise ValueError(f"image_size {self.image_size} is no multiple of {self.vae.factor}, the side of what "
                             "becomes one pixel of the VAE's latent")
        if self.vae.channels != self.unet.channels:
            raise ValueError(f"vae.channels {self.vae.channels} are not the UNet's channels {self.unet.channels}")
        if self.eft.width != self.unet.cond_channels:
            raise ValueError(f"eft.width {self.eft.width} is not the UNet's cond_channels {self.unet.cond_channels}")

    @property
    def latent_size(self) -> int:
        """h: side of the latent."""
        return self.image_size // self.vae.factor

    @property
    def map_size(self) -> int:
        """Rays a side of the EFT's feature map, which the UNet takes beside the latent."""
        return self.latent_size * self.unet.cond_unshuffle

    @staticmethod
    def from_dict(numbers: dict) -> Preset:
        """The inverse of `dataclasses.asdict`."""
        return Preset(
            name=numbers["name"],
            image_size=numbers["image_size"],
            eft=eft.EFTConfig(**numbers["eft"]),
            vae=vae.VAEConfig(**numbers["vae"]),
            unet=unet.UNetConfig(**numbers["unet"]),
            diffusion=vldm.DiffusionConfig(**numbers["diffusion"]),
        )


# ---------------------------------------------------------------------------------------------- the model

class Condition(NamedTuple):
    """What the EFT says about query views."""
    features: Tensor  # (Q, C, s, s), s the preset's `map_size`
    images: Tensor    # (Q, 3, s, s) in [0, 1], the EFT image


class SparseFusion(nn.Module):
    """p(query view | input views): EFT -> features -> latent diffusion, in the VAE's latent space (Sec. 3.1)."""

    def __init__(self, preset: Preset):
        super().__init__()
        self.preset = preset
        self.fingerprint = None  # of the file that the weights came from
        self.trained_distance = None  # of cameras from the origin, which the EFT knows; None: scenes as they are
        self.eft = eft.EFT(preset.eft)
        self.vae = vae.VAE(preset.vae)
        self.vldm = vldm.VLDM(preset.unet, preset.diffusion)

    def eft_world(self, cameras: Cameras) -> tuple[Tensor, float, float, float]:
        """What brings a scene with cameras (B,) to the EFT: the new origin (3,), then the scale of its lengths, and
        after that the least and the largest depth of a ray's points.

        In the relative form the sphere round the object is the unit sphere. Otherwise the object is at the origin, and
        where the weights know how far cameras stand, the scene is brought there. The range stays as wide as in
        training: narrower ones, for objects that a long lens shows from afar, made better EFT images and a worse
        result.
        """
        if self.preset.eft.relative:
            center, radius = object_sphere(cameras)
            return center, 1 / radius, -1.0, 1.0
        origin = torch.zeros(3)
        margin = self.preset.eft.depth_margin
        near, far = depth_range(cameras, margin)
        if self.trained_distance is None:
            return origin, 1.0, near, far
        distance = (near + far) / 2  # of the cameras, on average
        scale = self.trained_distance / distance
        return origin, scale, self.trained_distance - margin, self.trained_distance + margin

    @torch.no_grad()
    def condition(self, images: Tensor, cameras: Cameras, queries: Cameras, all_cameras: Cameras,
                  possible: Tensor | None = None, where: Tensor | None = None, dropout_seed: int | None = None,
                  title: str | None = None) -> Condition:
        """Features and EFT images of Q query viewpoints.

        images (V, 3, S, S) in [0, 1] with black background, `cameras` (V,) theirs, `queries` (Q,). `all_cameras` (B,):
        those of the scene; they decide on its units. `where` (Q, s, s): the rays to evaluate, boolean; the others are
        zero (default: all of s x s, s the preset's `map_size`). `possible` (V, 1, h, w), which `eft.hull_maps` makes of
        the inputs' masks: in the relative form rays are evaluated in their visual hull alone. A `dropout_seed` turns
        dropout and batch statistics on; a view's dropout follows from it, the view's position among the queries and the
        rays. `title` shows a progress bar.
        """
        # In the units that the weights know.
        origin, scale, *depth_range = self.eft_world(all_cameras)
        cameras = cameras.about(origin).scaled(scale)
        queries = queries.about(origin).scaled(scale)

        # As many rays at once as suit the machine: several views, or a part of one. Dropout goes view by view, and so
        # do views of different rays.
        train_mode = dropout_seed is not None
        size = self.preset.map_size if where is None else where.shape[-1]
        rays = max(1, EFT_BYTES[images.device.type] // self.eft.ray_bytes(len(images)))
        carved = possible is not None and self.preset.eft.relative
        together = 1 if train_mode or carved or where is not None else max(1, rays // size**2)
        gpus = [images.device] if images.is_cuda else []  # whose random numbers dropout takes
        half = not train_mode and self._runs_in_half(images, cameras, queries[:1], depth_range)
        views = []
        with _training(self.eft, train_mode), torch.autocast("cuda", torch.float16, enabled=half):
            # The inputs are encoded once; every query viewpoint looks at the same maps.
            maps = self.eft.encode(images)
            look = partial(self.eft.image, maps[None], images[None], cameras.unsqueeze(0))
            for first in Progress(range(0, len(queries), together), title):
                # Dropout draws from torch's own generators, which are as they were afterwards.
                with torch.random.fork_rng(gpus, enabled=train_mode):
                    if train_mode:
                        torch.manual_seed(stream_seed(dropout_seed, f"EFT dropout {first}"))
                    some = queries[first:first + together]
                    rays_wanted = None if where is None else where[first]
                    if carved:
                        rays_wanted, *depth_range = self._see_hull(possible, cameras, some[0], size, rays_wanted)
                    views.append(look(some, size, *depth_range, rays, rays_wanted))

        # Side by side.
        features = torch.cat([view.features for view in views])
        colors = torch.cat([view.color for view in views])
        return Condition(features, colors)

    def _see_hull(self, possible: Tensor, cameras: Cameras, query: Cameras, size: int,
                  where: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The rays of a view of `size` x `size` that see the visual hull of `possible` (V, 1, h, w), of those `where`
        (size, size) is true: boolean, the same shape, and the ends of their parts in the hull, (1, R) each.
        """
        grid = pixel_grid(size, size, full=self.preset.image_size, device=possible.device)
        asked = torch.ones_like(grid[:, 0]) if where is None else where.flatten()
        index = asked.nonzero()[:, 0]
        parts = [self.eft.see_hull(possible, cameras, query, xy) for xy in grid[index].split(HULL_RAYS)]
        near, far, sees = (torch.cat(x) for x in zip(*parts))
        seen = torch.zeros_like(asked, dtype=torch.bool).index_fill(0, index[sees], True)
        return seen.view(size, size), near[None, sees], far[None, sees]

    def _runs_in_half(self, images: Tensor, cameras: Cameras, query: Cameras, depth_range: tuple[float, float]) -> bool:
        """On a GPU: whether the EFT says the same in half precision and in float32 of 256 rays of a query view (1,).
        If not, a line says so.
        """
        if not images.is_cuda:
            return False
        features = []
        for half in (False, True):
            with torch.autocast("cuda", torch.float16, enabled=half):
                maps = self.eft.encode(images)
                view = self.eft.image(maps[None], images[None], cameras.unsqueeze(0), query, 16, *depth_range, 256)
            features.append(view.features)

        exact, rounded = features
        return half_is_accurate("the EFT", rounded, exact)

    @torch.no_grad()
    def denoise(self, images: Tensor, features: Tensor, noise_levels: Sequence[float], generator: torch.Generator,
                sampler: vldm.SamplerConfig) -> Tensor:
        """What the VLDM makes of images (B, 3, S, S) in [0, 1] after noising them: multi-step denoising (Sec. 3.2).

        features (B, C, s, s); noise levels in [0, 1], one per image. The same shape, in [0, 1].
        """
        latents = self.vae.encode(images)
        denoiser = self.vldm.denoiser(features, sampler)
        draw = partial(randn, *latents.shape, generator=generator, device=latents.device)
        return self.decode(vldm.denoise(denoiser, latents, noise_levels, draw, sampler))

    @torch.no_grad()
    def sample_view(self, features: Tensor, generators: list[torch.Generator], sampler: vldm.SamplerConfig) -> Tensor:
        """One novel view for each of (B, C, s, s) features, from pure noise (Sec. 3.1): (B, 3, S, S) in [0, 1].

        Every view draws from a generator of its own.
        """
        side = self.preset.latent_size
        shape = (self.preset.vae.channels, side, side)
        denoiser = self.vldm.denoiser(features, sampler)

        def draw() -> Tensor:
            """Standard normal noise for all views, each view's by its own generator."""
            return torch.stack([randn(*shape, generator=one, device=features.device) for one in generators])

        return self.decode(vldm.ancestral_sampling(denoiser, draw, sampler))

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, channels, h, h) -> images (B, 3, S, S), clamped to [0, 1]."""
        return self.vae.decode(latent).clamp(0, 1)

    def feature_distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of images (B, 3, S, S) in the VAE encoder's features, in LPIPS' form: (B,). Differentiable; not
        LPIPS.
        """
        return metrics.perceptual_distance(self.vae.features, a, b)


@contextmanager
def _training(module: nn.Module, enabled: bool) -> Iterator[None]:
    """In training mode, if enabled, but without a trace: the running statistics stay, and evaluation mode returns."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    module.train(enabled)
    for norm in norms:
        norm.track_running_stats = not enabled

    # Whatever happens within.
    try:
        yield
    finally:
        module.eval()
        for norm in norms:
            norm.track_running_stats = True


# ---------------------------------------------------------------------------------------------- files

def save(model: SparseFusion, path: Path, half: bool = True, stage: str = "prior",
         trained_on: Sequence[dict] = ()) -> None:
    """One file: the preset and the weights, floating point ones in half precision if `half`.

    `stage` is "vae" where only the autoencoder is trained yet. `trained_on`: of every training so far, oldest first,
    what was trained ("vae" or "prior"), on which "category", and whatever else is worth knowing about its data.
    """
    # Half precision is what the file is for; training resumes from full precision.
    weights = model.state_dict()
    if half:
        weights = {name: x.half() if x.is_floating_point() else x for name, x in weights.items()}
    data = {"preset": asdict(model.preset), "weights": weights, "stage": stage, "trained_on": list(trained_on),
            "trained_distance": model.trained_distance}
    files.save_tensors(data, path)


def load(path: Path, device: str = "cpu", stage: str = "prior") -> SparseFusion:
    """The model that `save` wrote, `ready`, in float32. Raises `FileNotFoundError` or `ValueError` with one line.

    A file of `train.py vae` has no prior yet, and is only taken where `stage` says "vae".
    """
    preset = read_preset(path)
    data = files.read_tensors(path)
    if stage == "prior" and data.get("stage", "prior") != "prior":
        raise ValueError(f"{path}: only its autoencoder is trained; `train.py prior --vae {path}` comes next")

    # Preset and weights must be made for each other, which is known before any memory is reserved.
    try:
        with torch.device("meta"):
            model = SparseFusion(preset)
        files.check_weights(data["weights"], model)
        weights = {name: x.to(device) for name, x in data["weights"].items()}  # as they are, since half is half the way
        model.load_state_dict({name: x.float() if x.is_floating_point() else x for name, x in weights.items()},
                              assign=True)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:160]
        raise ValueError(f"{path}: preset and weights do not fit together ({reason})") from e
    model.fingerprint = files.fingerprint(path)
    model.trained_distance = trained_distance(path)
    return ready(model, device)


def read_preset(path: Path) -> Preset:
    """The preset of a file that `save` wrote; reads no weights."""
    try:
        return Preset.from_dict(_header(path)["preset"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:160]
        raise ValueError(f"{path}: not a model's preset and weights ({reason})") from e


def read_trained_on(path: Path) -> list[dict]:
    """The trainings recorded in a file of `save`, oldest first."""
    trainings = _header(path).get("trained_on")
    if not isinstance(trainings, list):
        trainings = []
    return [x for x in trainings if isinstance(x, dict) and isinstance(x.get("category"), str)]


def trained_distance(path: Path) -> float | None:
    """How far from the origin the EFT of a file knows cameras; None for the released one, which takes CO3D's own units.

    Files from before 0.3 do not say; those of our own training hold the toys'.
    """
    header = _header(path)
    ours = header["preset"]["name"] != "paper" or read_trained_on(path) != []
    distance = header.get("trained_distance", TRAINED_DISTANCE if ours else None)
    if not (distance is None or isinstance(distance, float) and 0 < distance < math.inf):
        raise ValueError(f"{path}: trained_distance {distance!r:.40} is no distance")
    return distance


def _header(path: Path) -> dict:
    """What a file of `save` has beside its weights."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    status = path.stat()
    return _read_header(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read_header(path: Path, date: int, size: int) -> dict:
    """Cached: several parts of a command use it, and reading it reads the names of a thousand tensors."""
    data = files.read_tensors(path)
    return {name: x for name, x in data.items() if name != "weights"}


def blank(preset: Preset, device: str = "cpu") -> SparseFusion:
    """A model on a device whose weights are about to be loaded: to draw 500 million random ones first would take longer
    than to read them.
    """
    with torch.device("meta"):
        model = SparseFusion(preset)
    return model.to_empty(device=device)


def ready(model: SparseFusion, device: str) -> SparseFusion:
    """The model for inference: on the device, channels last (1.1 to 1.4 times faster on a CPU), no gradients, graphs
    on CUDA.
    """
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if next(model.parameters()).is_cuda:
        run_in_half(model.vae, model.vldm.unet)
    return model


def run_in_half(autoencoder: vae.VAE, denoiser: unet.UNet) -> None:
    """From now on, on a GPU, what needs no weights' gradients runs on this moment's weights in half precision."""
    half = fuse(half_copy(autoencoder), {vae.VAEBlock: fused_vae_block})
    names = {"encode": "the autoencoder's encoder", "decode": "the autoencoder's decoder"}
    accelerate(autoencoder, half, names, VAE_AT_ONCE)
    encoder = autoencoder.encoder
    encoder.features = HalfFeatures(half.encoder.features, encoder.features, autoencoder.encode)

    half = fuse(half_copy(denoiser, unet.UNet.EXACT), {unet.ResBlock: fused_unet_block})
    accelerate(denoiser, half, {"embed_features": "the UNet's first layer", "predict": "the UNet"})
