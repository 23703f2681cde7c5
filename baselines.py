"""What SparseFusion is compared with (Sec. 4): the nearest input view, the EFT's picture, one sample of the VLDM.

The fourth baseline, the field alone, is `distill.reconstruct` without a model. Every baseline returns what it shows
from the target cameras; `inputs` and `targets` are positions in the scene.

Letters: `T` target views, `S` side of an image in pixels.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from distillation import brightness_mask
from report import Views
from scenes import Scene
from sparsefusion import SparseFusion
from vldm import SamplerConfig


def nearest_input(scene: Scene, inputs: list[int], targets: list[int]) -> Views:
    """The input view whose camera is nearest in bearing, seen from the world's origin."""
    # Bearings, because crops hide how far away a camera stands.
    bearing = F.normalize(scene.cameras.centers(), dim=-1)
    cosine = bearing[targets] @ bearing[inputs].T  # (T, V)
    nearest = [inputs[j] for j in cosine.argmax(1).tolist()]
    return Views(scene.images[nearest], scene.masks[nearest])


def eft_images(scene: Scene, inputs: list[int], targets: list[int], model: SparseFusion, train_mode: bool = False,
               title: str | None = None) -> Views:
    """The EFT's picture at full resolution, a ray a pixel (Sec. 3.1)."""
    given = scene[inputs]
    size = scene.images.shape[-1]
    depth_range = model.depth_range(scene.cameras)
    queries = scene.cameras[targets]
    condition = model.condition(given.images, given.cameras, queries, depth_range, size, train_mode, title)
    return Views(condition.images, brightness_mask(condition.images))


def vldm_samples(scene: Scene, inputs: list[int], targets: list[int], model: SparseFusion, sampler: SamplerConfig,
                 seed: int, train_mode: bool = False) -> Views:
    """One ancestral sample a view (Sec. 3.1): sharp, but every view imagines for itself."""
    given = scene[inputs]
    depth_range = model.depth_range(scene.cameras)
    queries = scene.cameras[targets]
    condition = model.condition(given.images, given.cameras, queries, depth_range, train_mode=train_mode)

    # All views in one batch, from pure noise.
    generator = torch.Generator(scene.images.device).manual_seed(seed)
    images = model.sample_view(condition.features, generator, sampler)
    return Views(images, brightness_mask(images))
