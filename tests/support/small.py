"""Small things that several test modules share: a prior of the real classes that runs in milliseconds, and an
analytic scene.
"""
import math
from dataclasses import replace

import torch

import presets
import sparsefusion
import unet
import vae
from cameras import Cameras, Scene, look_at, pixel_grid
from presets import PRESETS

TINY = sparsefusion.Preset(
    "nano", 32,
    replace(presets.NANO.eft, stem=8, stages=(8, 12, 16), blocks=1, width=16, layers=1, feedforward=16, depths=4,
            relative=False),
    vae.VAEConfig(widths=(8, 8, 16), groups=4, blocks=1),
    unet.UNetConfig(cond_channels=16, widths=(16, 16, 16), attention=(False, True), kernels=(3,), groups=4, heads=2,
                    head_dim=8, time_dim=32, token_dim=16),
    replace(presets.NANO.diffusion, noisings=2))
RELATIVE = replace(TINY, eft=replace(TINY.eft, relative=True), vae=replace(TINY.vae, channels=8),
                   unet=replace(TINY.unet, channels=8))
FIELD = replace(presets.NANO_FIELD, levels=3, log2_hashmap_size=12, finest_resolution=32, width=16, samples_per_ray=32,
                occupancy_cells=32)
SHORT = replace(PRESETS["nano"], iterations=6, bootstrap=3, viewpoints=2, image_size=32, render_size=16,
                occupancy_every=2, turntable_frames=0, mesh_resolution=16,
                sampler=replace(presets.NANO_SAMPLER, denoise_steps=2, sample_steps=3),
                field=replace(FIELD, bound=4.0, samples_per_ray=16, occupancy_cells=16))


def tiny_model(seed=0, preset=TINY):
    """A random prior whose UNet has an opinion: its last layer starts at zero otherwise."""
    torch.manual_seed(seed)
    model = sparsefusion.SparseFusion(preset)
    for p in model.vldm.unet.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return sparsefusion.ready(model, "cpu")


def two_viewpoints(cameras, config, seed):
    """Instead of `reconstruction.query_viewpoints`, which has all of the scene's cameras: the EFT takes long to see
    what they do.
    """
    return cameras[:2]


def ring(n, distance=3.0, height=0.8):
    """n cameras round the origin."""
    angle = torch.arange(n) * (2 * math.pi / n) + 0.3
    eye = torch.stack([distance * angle.cos(), torch.full_like(angle, height), distance * angle.sin()], -1)
    R, T = look_at(eye, torch.zeros(3), torch.tensor([0.0, 1, 0]))
    return Cameras(R, T, torch.full((n, 2), 2.2), torch.zeros(n, 2))


def ball(n, size, radius=0.8):
    """n views of a ball colored by its normal, rendered analytically."""
    cameras = ring(n)
    rays_o, rays_d = cameras.rays(pixel_grid(size, size).expand(n, -1, 2))
    d = torch.nn.functional.normalize(rays_d, dim=-1)
    b = (rays_o * d).sum(-1)
    inside = b**2 - (rays_o**2).sum(-1) + radius**2
    normal = (rays_o + (-b - inside.clamp(min=0).sqrt())[..., None] * d) / radius
    mask = (inside > 0).float()[:, None]  # (n, 1, R)
    images = (0.5 + 0.5 * normal.transpose(1, 2)) * mask
    shape = (n, -1, size, size)
    names = [str(i) for i in range(n)]
    return Scene(images.reshape(shape), mask.reshape(shape), torch.ones(n, 1, size, size), cameras, names, "ball")
