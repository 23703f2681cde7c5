"""The instance field: density and color of every point (Sec. 3.2).

Instant NGP (Mueller et al. 2022). The hash encoding (`hashgrid.py`) has the features of a point; a small network turns
them into density and color. `volume.py` has the empty space and the integral along rays. All of it is plain torch; for
encoding and network a GPU has kernels.

Differences from the released code, which runs two CUDA extensions:
- the index of the encoding is Instant NGP's spatial hash, not a tiled one (`FieldConfig.hashed`);
- samples are evaluated in the occupied cells of a coarse grid alone (`volume.Occupancy`), which the input masks carve
  (`FieldConfig.carve`); theirs is off, and every sample in the cube is evaluated
  [released: distillation.py:505; nerf/renderer_df.py:647-650];
- in training mode a GPU's kernels round the network's factors to bfloat16; theirs is float32 [released:
  distillation.py:208, 514].

Shapes: `N` points.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.settings import check_ranges
from gpu import mlp
from hashgrid import HashGrid


@dataclass(frozen=True)
class FieldConfig:
    """The numbers of one field and its renderer; those that do not fit together raise `ValueError`.

    The defaults are the released numbers, where the released code has such a number at all, except for `hashed`. It
    carves nothing (`carve`).
    """
    levels: int = 16                # L, grids of the encoding [released: ngp_encoder.py:50-53]
    features_per_level: int = 2     # C, features of a grid's corner [released: ngp_encoder.py:50-53]
    log2_hashmap_size: int = 16     # log2 of the most rows a level can have [released: nerf/network_grid.py:50]
    base_resolution: int = 16       # cells per side of the coarsest grid [released: ngp_encoder.py:50-53]
    finest_resolution: int = 8192   # cells per side of the finest, 2048 bound [released: nerf/network_grid.py:50]
    # True: a spatial hash (Instant NGP, Eq. 4). False: a tiled index, by which nine of these sixteen levels do not
    # depend on z [released: nerf/network_grid.py:50; gridencoder/src/gridencoder.cu:55-72].
    hashed: bool = True
    bound: float = 4.0              # half side of the field's cube, in its own units [released: distillation.py:519]
    width: int = 64                 # channels of the network's hidden layers [released: nerf/network_grid.py:39-52]
    hidden_layers: int = 2          # hidden layers of the network [released: nerf/network_grid.py:14-33]
    # The color depends on the viewing direction by spherical harmonics below this degree (Instant NGP: 4); 0: it does
    # not, as in the paper.
    view_degree: int = 0
    blob_density: float = 5.0       # height of the Gaussian in the density logit [released: nerf/network_grid.py:69-88]
    blob_radius: float = 0.2        # standard deviation of the Gaussian in the density logit (DreamFusion)
    samples_per_ray: int = 64       # D, stratified samples of a ray [released: distillation.py:507]
    importance_samples: int = 64    # I, samples added where density is; 0: none [released: distillation.py:508]
    # Bins in which a ray's occupied cells are looked for, so that all its samples are placed there; 0: they are placed
    # in the whole box around the occupied cells, and those that fall into others are skipped.
    bins_per_ray: int = 0
    near: float = 0.1               # least t of a sample [released: distillation.py:520]
    occupancy_cells: int = 128      # G, occupancy cells per side (Instant NGP, appendix E.2)
    occupancy_decay: float = 0.95   # factor of a cell's running maximum of density at an update (Instant NGP, E.2)
    occupancy_alpha: float = 0.01   # opacity of one cell's length below which the cell is empty (Instant NGP, E.2)
    carve: bool = True              # whether cells that the input masks show to be empty are ruled out permanently
    mask_threshold: float = 0.1     # value above which a mask's pixel may be object: low, as carving is permanent
    forgiven_views: int = 6         # one view of so many may be wrong about a cell, as photographs' masks miss pieces

    def __post_init__(self):
        check_ranges(self, _RANGES)

        # Numbers that must fit each other.
        _require(self.view_degree == 0 or self.hidden_layers > 0, "view_degree needs a hidden layer")
        _require(self.base_resolution <= self.finest_resolution,
                 f"base_resolution {self.base_resolution} is above finest_resolution {self.finest_resolution}")
        _require(self.levels * self.features_per_level << self.log2_hashmap_size <= 2**28,
                 f"{self.levels} levels of 2^{self.log2_hashmap_size} rows: over 2^28 numbers")
        _require(self.importance_samples == 0 or self.bins_per_ray == 0,
                 "bins_per_ray already say where samples are needed, so importance_samples must be 0")
        _require(self.importance_samples == 0 or self.samples_per_ray >= 3,
                 f"importance_samples need samples_per_ray of at least 3, not {self.samples_per_ray}")


_RANGES = {"levels": (1, 64), "features_per_level": (1, 64), "log2_hashmap_size": (1, 28),
           "base_resolution": (1, 2**20), "finest_resolution": (1, 2**20), "bound": (1e-3, 1e6), "width": (1, 4096),
           "hidden_layers": (0, 64), "view_degree": (0, 4), "blob_radius": (1e-6, math.inf),
           "samples_per_ray": (1, 4096), "importance_samples": (0, 1024), "bins_per_ray": (0, 4096),
           "near": (0, math.inf), "occupancy_cells": (1, 512), "occupancy_decay": (0, 1),
           "occupancy_alpha": (1e-9, 0.999), "mask_threshold": (0, 0.999), "forgiven_views": (1, 10**6)}


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


CHUNK = {"cpu": 2**13, "cuda": 2**18}  # points evaluated at once where no gradient is needed


# ---------------------------------------------------------------------------------------------- the field

class _TruncatedExp(torch.autograd.Function):
    """exp(x) with the gradient exp(clamp(x, -15, 15)), so that one wild logit cannot destroy the field.

    [released: ngp_activation.py:13-21]
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """The gradient in exp(x) -> in x, the same shape, finite however large x is."""
        x, = ctx.saved_tensors
        return grad * x.clamp(-15, 15).exp()


def spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    """The real spherical harmonics below a degree of at most 4, orthonormal on the sphere: directions (N, 3), of any
    length but 0 -> (N, degree^2).
    """
    x, y, z = F.normalize(directions, dim=-1).unbind(-1)
    xx, yy, zz = x * x, y * y, z * z

    # One band per degree, with Condon and Shortley's phase left out.
    values = [0.28209479 * torch.ones_like(x)]
    values += [0.48860251 * y, 0.48860251 * z, 0.48860251 * x]
    values += [1.09254843 * x * y, 1.09254843 * y * z]
    values += [0.31539157 * (3 * zz - 1)]
    values += [1.09254843 * x * z, 0.54627421 * (xx - yy)]
    values += [0.59004359 * y * (3 * xx - yy), 2.89061144 * x * y * z]
    values += [0.45704579 * y * (5 * zz - 1)]
    values += [0.37317633 * z * (5 * zz - 3)]
    values += [0.45704579 * x * (5 * zz - 1)]
    values += [1.44530572 * z * (xx - yy), 0.59004359 * x * (xx - 3 * yy)]
    return torch.stack(values[:degree**2], -1)


class Field(nn.Module):
    """A scene: density and color of every point of the cube (Sec. 3.2)."""

    def __init__(self, config: FieldConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.encoding = HashGrid(config.levels, config.features_per_level, config.log2_hashmap_size,
                                 config.base_resolution, config.finest_resolution, config.hashed, config.bound,
                                 generator)

        # The network: features of all levels -> hidden layers -> logits of density and color.
        layers = []
        channels = config.levels * config.features_per_level
        for _ in range(config.hidden_layers):
            layers.append(_linear(channels, config.width, generator))
            layers.append(nn.ReLU())
            channels = config.width
        layers.append(_linear(channels, 4, generator))
        self.mlp = nn.Sequential(*layers)

        # What the viewing direction adds to the logits of color; 0 at first.
        self.view_mlp = None
        if config.view_degree:
            hidden = _linear(channels + config.view_degree**2, config.width, generator)
            last = nn.Linear(config.width, 3)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.view_mlp = nn.Sequential(hidden, nn.ReLU(), last)

    def blob(self, x: Tensor) -> Tensor:
        """What is added to the density logit of points (N, 3): a Gaussian around the origin, (N,)."""
        variance = self.config.blob_radius**2
        return self.config.blob_density * torch.exp(-x.square().sum(-1) / (2 * variance))

    def forward(self, x: Tensor, directions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (N, 3) -> density (N,), per unit of length, and color (N, 3) in [0, 1].

        `directions` (N, 3): of the rays through the points, of any length; without them, or with a `view_degree` of 0,
        the color is that of all directions. In training mode a GPU may round what the network multiplies.
        """
        features = self.encoding(x)
        if self.view_mlp is None or directions is None:
            logits = mlp.run(self.mlp, features, self.training)
            color = logits[:, 1:]
        else:
            hidden = mlp.run(self.mlp[:-1], features, self.training)
            logits = mlp.run(self.mlp[-1:], hidden, self.training)
            harmonics = spherical_harmonics(directions, self.config.view_degree)
            inputs = torch.cat([hidden, harmonics], -1)
            color = logits[:, 1:] + mlp.run(self.view_mlp, inputs, self.training)
        density = _TruncatedExp.apply(logits[:, 0] + self.blob(x))
        return density, torch.sigmoid(color)

    def density(self, x: Tensor) -> Tensor:
        """Points (N, 3) -> density (N,)."""
        return self(x)[0]

    def network_parameters(self) -> list[nn.Parameter]:
        """All parameters but the encoding's table."""
        return [x for name, x in self.named_parameters() if not name.startswith("encoding.")]


def _linear(fan_in: int, fan_out: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer with torch's default initial weights, drawn from a generator."""
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    limit = fan_in**-0.5
    nn.init.uniform_(layer.weight, -limit, limit, generator=generator)
    nn.init.uniform_(layer.bias, -limit, limit, generator=generator)
    return layer


def cube(config: FieldConfig) -> Tensor:
    """The field's cube as a box, (2, 3): least and greatest corner."""
    return torch.tensor([[-config.bound] * 3, [config.bound] * 3])


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, size: int | None = None) -> Tensor:
    """function(x) of many rows, `size` at a time, to bound memory: by default what fits a CPU's caches or fills a
    GPU.
    """
    size = size or CHUNK[x.device.type]
    return torch.cat([function(piece) for piece in x.split(size)])
