"""Fields whose density and color are known functions, and rays and cameras to look at them."""
import dataclasses

import torch

import cameras
import ngp
import presets
import volume
from tests.support import parity

TINY = dataclasses.replace(presets.NANO_FIELD, levels=3, features_per_level=2, log2_hashmap_size=6, base_resolution=2,
                           finest_resolution=9, bound=1.5, width=5, samples_per_ray=6, occupancy_cells=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Analytic(ngp.Field):
    """A field whose density and color are given functions of (N, 3) points."""

    def __init__(self, density, color=lambda x: torch.full_like(x, 0.5), **config):
        super().__init__(dataclasses.replace(TINY, **config))
        self.functions = density, color

    def forward(self, x, directions=None):
        return tuple(f(x) for f in self.functions)


def ball(radius: float = 0.8, **config) -> Analytic:
    """A solid ball at the origin whose color is its position; log density is linear across its surface, at 10."""
    def density(x):
        return 10 * torch.exp(60 * (radius - x.norm(dim=-1)).clamp(-0.5, 0.2))
    return Analytic(density, lambda x: (x / 3 + 0.5).clamp(0, 1), **config)


def random_rays(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays from a sphere of radius 4 to points near the origin, of any length."""
    g = seeded(seed)
    o = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1) * 4
    return o, (torch.rand(n, 3, generator=g) * 2 - 1 - o) * (0.2 + torch.rand(n, 1, generator=g))


def around(n: int, focal: float = 2.4, distance: float = 4.0, center=(0.0, 0.0), seed: int = 0) -> cameras.Cameras:
    """n cameras in random directions, looking at the origin."""
    eye = torch.nn.functional.normalize(torch.randn(n, 3, generator=seeded(seed)), dim=-1) * distance
    R, T = cameras.look_at(eye, torch.zeros(3), torch.tensor([0.0, 1, 0]))
    return cameras.Cameras(R, T, torch.full((n, 2), focal), torch.tensor(center).expand(n, 2))


def images(field: ngp.Field, views: cameras.Cameras, size: int) -> volume.Rendering:
    """Pictures of the field: (V, size * size, ...)."""
    renderings = [volume.render(field, *view.rays(cameras.pixel_grid(size, size))) for view in views]
    return volume.Rendering(*(torch.stack(part).detach() for part in zip(*renderings)))


def centers(config: ngp.FieldConfig) -> torch.Tensor:
    """Centers of the occupancy cells, (G, G, G, 3)."""
    axis = (torch.arange(config.occupancy_cells) + 0.5) * 2 * config.bound / config.occupancy_cells - config.bound
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def released_field() -> tuple[ngp.Field, dict]:
    """The released field with rule-made weights, under its own names, and the fixture."""
    f = parity.load("ngp")
    field = ngp.Field(dataclasses.replace(ngp.FieldConfig(), hashed=False, samples_per_ray=f["in_rand_z"].shape[1],
                                          importance_samples=f["in_rand_pdf"].shape[1]))
    released = parity.weights("ngp")
    state = {"encoding.table": released["encoder.embeddings"]}
    for layer in range(3):
        for leaf in ("weight", "bias"):
            state[f"mlp.{2 * layer}.{leaf}"] = released[f"sigma_net.net.{layer}.{leaf}"]
    field.load_state_dict(state)
    return field, f
