"""What SparseFusion is compared with (Sec. 4): the nearest input view, the EFT's picture, one sample of the VLDM.

The fourth baseline, the field alone, is `reconstruction.reconstruct` without a model. The EFT and the VLDM make
pictures, which have no silhouette of their own: no mask is measured for them. Every baseline returns what it shows from
the target cameras, whole where the scene is cut; `inputs` and `targets` are positions in the scene.

Shapes: `T` target views, `S` side of an image in pixels.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import Cameras, Scene, pixel_grid
from common.machine import stream_seed
from common.progress import Progress
from distillation import DistillConfig
from eft import hull_maps
from export.pictures import Views
from sparsefusion import Condition, SparseFusion

VIEWS_AT_ONCE = 8  # in a batch of the VLDM


def nearest_input(scene: Scene, inputs: list[int], targets: list[int]) -> Views:
    """The input view whose camera is nearest in bearing, seen from the world's origin."""
    scene = scene.whole or scene

    # Bearings, because crops hide how far away a camera stands.
    bearing = F.normalize(scene.cameras.centers(), dim=-1)
    cosine = bearing[targets] @ bearing[inputs].T  # (T, V)
    nearest = [inputs[j] for j in cosine.argmax(1).tolist()]
    return Views(scene.images[nearest], scene.masks[nearest])


def eft_images(scene: Scene, inputs: list[int], targets: list[int], model: SparseFusion, config: DistillConfig,
               seed: int, hull: Tensor, title: str | None = None) -> Views:
    """The EFT's picture at full resolution, a ray per pixel (Sec. 3.1).

    hull (T, S, S), boolean: the pixels to render, from which the visual hull is seen. The others, about half of
    them with two views, are black. On toys the EFT says so itself, to less than a level of 8 bits.
    """
    cameras = (scene.whole or scene).cameras[targets]
    condition = _condition(scene, inputs, cameras, model, config, seed, hull, title)
    return Views(condition.images, None)


def vldm_samples(scene: Scene, inputs: list[int], targets: list[int], model: SparseFusion, config: DistillConfig,
                 seed: int, title: str | None = None) -> Views:
    """One ancestral sample per view (Sec. 3.1): sharp, but every view imagines for itself.

    A view's random numbers follow from the seed and its frame alone, whichever other views there are.
    """
    cameras = scene.cameras[targets]
    condition = _condition(scene, inputs, cameras, model, config, seed)
    device = scene.images.device
    generators = []
    for target in targets:
        generators.append(torch.Generator(device).manual_seed(stream_seed(seed, scene.names[target])))

    # A few views at a time: the decoder takes much memory at full size.
    images = []
    for start in Progress(range(0, len(targets), VIEWS_AT_ONCE), title):
        part = slice(start, start + VIEWS_AT_ONCE)
        images.append(model.sample_view(condition.features[part], generators[part], config.sampler))
    images = torch.cat(images)
    if scene.whole is not None:
        images = put_back(images, cameras, scene.whole.cameras[targets])
    return Views(images, None)


def put_back(images: Tensor, cut: Cameras, whole: Cameras) -> Tensor:
    """Pictures (T, 3, S, S) of cameras (T,) as cameras at the same places show them: black where they show nothing."""
    # Where a pixel's light comes from, in either camera's NDC; four points per pixel, for the whole picture is coarser.
    size = images.shape[-1]
    xy = pixel_grid(2 * size, 2 * size, device=images.device)
    slope = (xy - whole.principal[:, None]) / whole.focal[:, None]
    there = slope * cut.focal[:, None] + cut.principal[:, None]
    grid = -there.unflatten(1, (2 * size, 2 * size))
    return F.avg_pool2d(F.grid_sample(images, grid, align_corners=False), 2)


def _condition(scene: Scene, inputs: list[int], cameras: Cameras, model: SparseFusion, config: DistillConfig,
               seed: int, where: Tensor | None = None, title: str | None = None) -> Condition:
    """What the EFT says about the views of cameras (T,)."""
    input_views = scene[inputs]
    possible = hull_maps(input_views.masks, input_views.valid)
    return model.condition(config.exposed_alike(input_views), input_views.cameras, cameras, scene.cameras, possible,
                           where, seed if config.eft_train_mode else None, title)
