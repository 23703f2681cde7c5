"""The instance field: a multi-resolution grid encoding, a small network, its volume renderer and its surface (Sec. 3.2).

Instant NGP (Mueller et al. 2022) in plain torch, on any device. A point is looked up in grids of growing resolution, whose cells
share tables by a spatial hash; a small network turns the features into density and colour; rays are integrated as in NeRF
(Mildenhall et al. 2020), with samples in empty space never evaluated.

Differences from the released code, which runs two CUDA extensions:
- the table index is Instant NGP's spatial hash; `hashed=False` gives the released *tiled* index, in which nine of the sixteen
  levels do not depend on z;
- a coarse grid of occupied cells (`Occupancy`), carved by the input masks, decides where to sample and what to evaluate;
- depth is in units of t along the ray, not a fraction of the cube's interval, and a ray that misses the cube is black, not NaN.

Letters: `N` points, `L` levels, `C` features a level, `R` rays, `D` samples a ray, `G` occupancy cells a side, `V` views, `H W` rows
and columns. Rays are not normalised: `o + t d` lies at depth t of the camera, and density is per unit of t, as released.
"""
from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameras import Cameras


@dataclass(frozen=True)
class FieldConfig:
    """The numbers of one field and its renderer; the defaults are the released ones."""
    levels: int = 16                # L, grids of different resolution (Instant NGP, table 1)
    features: int = 2               # C, features of a level (Instant NGP, table 1)
    log2_table: int = 16            # a level has at most 2^log2_table rows (released code)
    base_resolution: int = 16       # cells a side of the coarsest level (Instant NGP, table 1)
    finest_resolution: int = 8192   # cells a side of the finest level (released code: 2048 * bound)
    hashed: bool = True             # spatial hash (Instant NGP, Eq. 4) or the released code's tiled index
    bound: float = 4.0              # the field lives in the cube [-bound, bound]^3, CO3D units (released code)
    width: int = 64                 # channels of the network (Instant NGP, Sec. 4)
    hidden_layers: int = 2          # of the network (released code)
    blob_density: float = 5.0       # start with an object in the middle: height of a Gaussian in the density logit (DreamFusion)
    blob_radius: float = 0.2        # its standard deviation, CO3D units (DreamFusion)
    samples: int = 64               # D, stratified samples of a ray (released code)
    importance: int = 64            # further samples where those found something (released code; 0: none)
    near: float = 0.1               # least t of a sample (released code)
    occupancy_cells: int = 128      # G (Instant NGP, appendix E.2)
    occupancy_decay: float = 0.95   # of a cell's running maximum of density at each update (Instant NGP, appendix E.2)
    occupancy_alpha: float = 0.01   # a cell is empty when crossing it absorbs less than this (Instant NGP, appendix E.2)


PAPER = FieldConfig()
# For the sample category and for CPUs: fewer, wider levels and a smaller network cost less.
NANO = FieldConfig(levels=5, features=4, base_resolution=8, finest_resolution=160, width=32, hidden_layers=1, blob_density=0.0,
                   samples=64, importance=0, occupancy_cells=48, occupancy_decay=0.8)

PRIMES = (1, 2654435761, 805459861)  # Instant NGP, Eq. 4
CHUNK = 2**18  # points evaluated at once where no gradient is needed
FORGIVEN = 6       # one view of so many may be wrong about a cell: photographs' masks miss pieces, and carving is for good
MASK_LEVEL = 0.1  # a soft mask above this may be object: low, because carving is for good


# ---------------------------------------------------------------------------------------------------------------------- the field

class _WeightedRows(torch.autograd.Function):
    """out[i] = sum_k weights[i, k] * table[index[i, k]]; a gradient for the table only.

    torch's own embedding_bag computes this but its backward sorts the indices; adding column by column takes half the time.
    """

    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # (rows, C), (B, 8) int32, (B, 8) -> (B, C)
        ctx.save_for_backward(index, weights)
        ctx.rows = len(table)
        return F.embedding_bag(index, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, weights = ctx.saved_tensors
        columns = grad.new_zeros(grad.shape[1], ctx.rows)  # (C, rows)
        for column, g in zip(columns, grad.unbind(1)):
            column.index_add_(0, index.flatten(), (weights * g[:, None]).flatten())
        return columns.t(), None, None


class GridEncoding(nn.Module):
    """Multi-resolution grid encoding, all levels in one gather (Instant NGP, Sec. 3; trilinear). Differentiable in its table.

    Level l has a grid of `base * growth^l` cells a side. A grid with more corners than 2^log2_table shares rows: by the spatial hash,
    or, tiled as released, by the running index modulo the table size with axes left out once their stride exceeds the table.
    The arithmetic is the released kernel's, in float32 and wrapping 32-bit integers, so that its tables can be used.
    """

    def __init__(self, config: FieldConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.bound, self.features = config.bound, config.features
        log2_growth = np.log2(config.finest_resolution / config.base_resolution) / max(config.levels - 1, 1)
        # Scales are float32 and computed once, since one unit in their last place moves fine features; the exponential itself is
        # rounded from double because float32 ones differ between processors.
        exponent = np.arange(config.levels, dtype=np.float32) * np.float32(log2_growth)
        growth = np.exp2(exponent.astype(np.float64)).astype(np.float32)
        scale = growth * np.float32(config.base_resolution) - np.float32(1)
        rows, stride, hashed = [], [], []
        for l, cells in enumerate(np.ceil(scale).astype(int).tolist()):
            wanted = (math.ceil(config.base_resolution * np.exp2(log2_growth) ** l) + 1) ** 3
            rows.append(math.ceil(min(2**config.log2_table, wanted) / 8) * 8)
            side = cells + 2  # corners a side, as the kernel counts them
            hashed.append(config.hashed and side**3 > rows[-1])
            stride.append(PRIMES if hashed[-1] else [side**axis if side**axis <= rows[-1] else 0 for axis in range(3)])
        self.hashed_from = hashed.index(True) if True in hashed else config.levels  # all finer levels are hashed, too

        def constant(name: str, value) -> None:
            self.register_buffer(name, torch.as_tensor(value), persistent=False)
        constant("scale", scale[:, None])  # (L, 1)
        constant("stride", np.array(stride, dtype=np.uint32).astype(np.int32))  # (L, 3), wraps around as the kernel's uint32
        constant("rows", np.array(rows, dtype=np.int32)[:, None])  # (L, 1)
        constant("offset", np.cumsum([[0]] + [[r] for r in rows[:-1]], axis=0, dtype=np.int32))  # (L, 1)
        self.table = nn.Parameter(torch.empty(sum(rows), config.features).uniform_(-1e-4, 1e-4, generator=generator))

    def corners(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Table rows (N, L, 8), int32, and weights (N, L, 8) of the cell corners around points x (N, 3). Outside the cube weights are 0."""
        u = (x + self.bound) / (2 * self.bound)
        position = u[:, None] * self.scale + 0.5  # (N, L, 3)
        cell = position.floor()
        above = position - cell
        inside = ((u >= 0) & (u <= 1)).all(-1)[:, None, None]  # (N, 1, 1)
        lower = cell.int() * self.stride  # (N, L, 3)
        # Of each axis the terms of the lower and of the upper corner, (N, L) each.
        terms = list(zip(lower.unbind(-1), (lower + self.stride).unbind(-1)))
        parts = list(zip(((1 - above) * inside).unbind(-1), (above * inside).unbind(-1)))
        index = torch.empty(*cell.shape[:2], 8, dtype=torch.int32, device=x.device)
        weights = torch.empty(*cell.shape[:2], 8, dtype=x.dtype, device=x.device)
        dense, hashed = slice(None, self.hashed_from), slice(self.hashed_from, None)
        for corner, (i, j, k) in enumerate(itertools.product((0, 1), repeat=3)):  # writing in place: several times faster than broadcasting
            a, b, c = terms[0][i], terms[1][j], terms[2][k]
            index[:, dense, corner] = a[:, dense] + b[:, dense] + c[:, dense]
            index[:, hashed, corner] = a[:, hashed] ^ b[:, hashed] ^ c[:, hashed]
            weights[..., corner] = parts[0][i] * parts[1][j] * parts[2][k]
        return index.remainder_(self.rows).add_(self.offset), weights

    def forward(self, x: Tensor) -> Tensor:
        """Points (N, 3) -> features (N, L * C), level by level; 0 outside the cube."""
        with torch.no_grad():
            index, weights = self.corners(x)
        features = _WeightedRows.apply(self.table, index.reshape(-1, 8), weights.reshape(-1, 8))  # (N * L, C)
        return features.reshape(len(x), len(self.scale) * self.features)


class _TruncatedExp(torch.autograd.Function):
    """exp(x) whose value and gradient stop growing at x = 15, so that one wild logit cannot destroy the field (torch-ngp)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clamp(max=15).exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Field(nn.Module):
    """A scene: density and colour of every point of the cube, independent of the viewing direction (Sec. 3.2)."""

    def __init__(self, config: FieldConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.encoding = GridEncoding(config, generator)
        widths = [config.levels * config.features] + [config.width] * config.hidden_layers + [4]
        layers = []
        for fan_in, fan_out in zip(widths, widths[1:]):
            layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
            for parameter in layer.parameters():  # torch's default, with our generator
                nn.init.uniform_(parameter, -fan_in**-0.5, fan_in**-0.5, generator=generator)
            layers += [layer, nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def blob(self, x: Tensor) -> Tensor:
        """What is added to the density logit: a Gaussian around the origin. (N, 3) -> (N,)"""
        return self.config.blob_density * torch.exp(-x.square().sum(-1) / (2 * self.config.blob_radius**2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Points (N, 3) -> density (N,), per unit of length, and colour (N, 3) in [0, 1]."""
        h = self.mlp(self.encoding(x))
        return _TruncatedExp.apply(h[:, 0] + self.blob(x)), torch.sigmoid(h[:, 1:])

    def density(self, x: Tensor) -> Tensor:
        """Points (N, 3) -> density (N,)."""
        return self(x)[0]


# --------------------------------------------------------------------------------------------------------------------- empty space

class Occupancy(nn.Module):
    """Which of G^3 cells of the cube may hold something (Instant NGP, Sec. 5.4 and appendix E.2); its state belongs in checkpoints."""

    def __init__(self, config: FieldConfig):
        super().__init__()
        self.config = config
        cells = (config.occupancy_cells,) * 3
        self.cell = 2 * config.bound / config.occupancy_cells  # side length
        self.threshold = -math.log(1 - config.occupancy_alpha) / self.cell  # a density
        self.register_buffer("possible", torch.ones(cells, dtype=torch.bool))  # not ruled out by the masks
        # A cell starts at twice the threshold: only after several updates that find nothing is it empty.
        self.register_buffer("density", torch.full(cells, 2 * self.threshold))
        self.register_buffer("occupied", torch.ones(cells, dtype=torch.bool))
        self.register_buffer("box", torch.tensor([[-config.bound] * 3, [config.bound] * 3]))  # around the occupied cells

    def forward(self, x: Tensor) -> Tensor:
        """Are the points (*, 3) in occupied cells? (*,) boolean; a point outside the cube counts as in the nearest cell."""
        g = self.config.occupancy_cells
        cell = ((x + self.config.bound) / self.cell).int().clamp(0, g - 1)
        return self.occupied.flatten()[(cell[..., 0] * g + cell[..., 1]) * g + cell[..., 2]]

    def _set(self, occupied: Tensor) -> None:
        """Take over the cells (G, G, G) and their bounding box."""
        self.occupied.copy_(occupied)
        for axis in range(3):
            used = occupied.any((axis + 1) % 3, keepdim=True).any((axis + 2) % 3, keepdim=True).flatten().nonzero()
            self.box[0, axis] = used.min() * self.cell - self.config.bound
            self.box[1, axis] = (used.max() + 1) * self.cell - self.config.bound

    @torch.no_grad()
    def carve(self, masks: Tensor, cameras: Cameras, valid: Tensor | None = None) -> None:
        """Rule out the cells that some view shows to be empty: the visual hull (Laurentini 1994), conservatively.

        masks (V, 1, H, W) in [0, 1] and the V cameras they belong to; valid (V, 1, H, W) is 1 where an image shows anything
        (default: everywhere). A cell stays if any pixel of its footprint is in the mask. What lies outside a view's image is unknown
        and stays if the mask touches the image's border; where it does not touch, the view shows the whole object, so nothing is there.
        """
        valid = torch.ones_like(masks) if valid is None else valid
        axis = torch.linspace(-self.config.bound, self.config.bound, self.config.occupancy_cells + 1, device=masks.device)
        lattice = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)  # (G + 1, G + 1, G + 1, 3)
        refused = torch.zeros_like(self.possible, dtype=torch.int32)  # by how many views, a cell
        for mask, shown, camera in zip(masks > MASK_LEVEL, valid > 0.5, cameras):
            unknown = F.pad(~shown, (1, 1, 1, 1), value=True)  # (1, H + 2, W + 2)
            mask = F.pad(mask & shown, (1, 1, 1, 1))
            border = F.max_pool2d(unknown.float(), 3, stride=1, padding=1) > 0
            maybe = (mask | unknown) if (mask & border).any() else mask
            refused += ~_footprint_hits(maybe[0], lattice, camera)
        self.possible &= refused <= len(masks) // FORGIVEN
        if not self.possible.any():
            raise ValueError(f"masks and cameras: no part of the cube of half side {self.config.bound:g} round the world origin lies "
                             "in every mask; the object must be inside the cube")
        self._set(self.possible)

    @torch.no_grad()
    def update(self, field: Field, generator: torch.Generator | None = None) -> None:
        """Look at the field at one point of every possible cell, jittered by the generator, and empty the cells that absorb nothing."""
        cells = self.possible.nonzero()
        jitter = 0.5 if generator is None else torch.rand(cells.shape, generator=generator, device=generator.device).to(cells.device)
        found = _in_chunks(field.density, (cells + jitter) * self.cell - self.config.bound)
        found = torch.maximum(self.density[self.possible] * self.config.occupancy_decay, found)
        self.density[self.possible] = found
        # Half the mean as well (Instant NGP: the mean), so that a field that is thin everywhere stays visible.
        self._set(self.possible & (self.density >= (found.mean() / 2).clamp(max=self.threshold)))


def _footprint_hits(maybe: Tensor, lattice: Tensor, camera: Cameras) -> Tensor:
    """Does the projection of each cell touch a pixel of `maybe` (H + 2, W + 2), a mask with one pixel around the image that stands
    for everything outside? lattice (G + 1, G + 1, G + 1, 3): cell corners. Returns (G, G, G) boolean."""
    height, width = maybe.shape[0] - 2, maybe.shape[1] - 2
    view = camera.to_view(lattice.reshape(-1, 3)).reshape(lattice.shape).movedim(-1, 0)  # (3, G + 1, G + 1, G + 1)
    low, high = -F.max_pool3d(-view[None], 2, stride=1)[0], F.max_pool3d(view[None], 2, stride=1)[0]  # bounds of X, Y, Z in a cell
    near, far = low[2].clamp(min=1e-6), high[2].clamp(min=1e-6)
    focal, principal = camera.focal[:, None, None, None], camera.principal[:, None, None, None]
    xy_low = focal * torch.minimum(low[:2] / near, low[:2] / far) + principal  # the extremes of X/Z over the cell's intervals
    xy_high = focal * torch.maximum(high[:2] / near, high[:2] / far) + principal
    size = torch.tensor([width, height], device=maybe.device)[:, None, None, None]
    # NDC +x is left and +y is up: the largest coordinate is the first pixel. Index 0 is the pixel before the image.
    first = ((1 - xy_high) / 2 * size).floor().clamp(min=-1).minimum(size).long() + 1
    last = ((1 - xy_low) / 2 * size).floor().clamp(min=-1).minimum(size).long() + 1
    total = F.pad(maybe.long().cumsum(0).cumsum(1), (1, 0, 1, 0))  # summed area table
    (c0, r0), (c1, r1) = first, last + 1
    hits = total[r1, c1] - total[r0, c1] - total[r1, c0] + total[r0, c0] > 0
    outside = bool(maybe[0, 0])  # behind the camera is outside the image, too
    return torch.where(high[2] > 0, hits, outside)


def _in_chunks(function, x: Tensor, size: int = CHUNK) -> Tensor:
    """function(x) of many rows, `size` at a time, to bound memory."""
    return torch.cat([function(piece) for piece in x.split(size)])


# ----------------------------------------------------------------------------------------------------------------------- renderer

class Rendering(NamedTuple):
    """What R rays see, before a black background."""
    colour: Tensor   # (R, 3) in [0, 1], premultiplied
    opacity: Tensor  # (R,) in [0, 1]
    depth: Tensor    # (R,) sum of weight * t: the mean depth times the opacity


def ray_interval(rays_o: Tensor, rays_d: Tensor, box: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """Entry (at least `near`) and exit t of rays (R, 3) through an axis-aligned box (2, 3): (R,) each. Missed where exit <= entry."""
    rays_d = torch.where(rays_d.abs() < 1e-12, 1e-12, rays_d)
    t = (box[:, None] - rays_o) * rays_d.reciprocal()  # (2, R, 3); not a division: the released kernel's rounding moves fine features
    return t.amin(0).amax(-1).clamp(min=near), t.amax(0).amin(-1)


def uniform_draws(config: FieldConfig, rays: int, generator: torch.Generator | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform numbers that place the samples: (rays, samples) and (rays, importance). Without a generator: the middle of every stratum."""
    if generator is None:
        centers = (torch.arange(config.importance).to(like) + 0.5) / max(config.importance, 1)
        return like.new_full((rays, config.samples), 0.5), centers.expand(rays, -1)
    counts = (config.samples, config.importance)
    return tuple(torch.rand(rays, n, generator=generator, device=generator.device).to(like) for n in counts)


def place_importance(middle: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """Samples distributed like the weights: inverse of their cumulative distribution at u (NeRF, Sec. 5.2).

    middle (R, D - 1): t between neighbouring samples, weights (R, D - 2): of the inner samples, u (R, I) in [0, 1) -> t (R, I).
    """
    weights = weights + 1e-5
    cdf = F.pad((weights / weights.sum(-1, keepdim=True)).cumsum(-1), (1, 0))  # (R, D - 1)
    above = torch.searchsorted(cdf, u.contiguous(), right=True)
    below, above = (above - 1).clamp(min=0), above.clamp(max=cdf.shape[-1] - 1)
    low, high = cdf.gather(-1, below), cdf.gather(-1, above)
    span = torch.where(high - low < 1e-5, 1, high - low)
    start, end = middle.gather(-1, below), middle.gather(-1, above)
    return start + (u - low) / span * (end - start)


def absorption(density: Tensor, t: Tensor, last: Tensor) -> Tensor:
    """Weights of the samples in the integral along the ray (NeRF, Eq. 3), exponents summed rather than factors multiplied.

    density (R, D), increasing t (R, D), last (R, 1): length that the last sample stands for -> (R, D), w_i = T_i (1 - exp(-d_i s_i)).
    """
    depth = density * torch.cat([t.diff(dim=-1), last], -1)  # optical depth of every segment
    return torch.exp(depth - depth.cumsum(-1)) * -torch.expm1(-depth)


def _evaluate(field: Field, rays_o: Tensor, rays_d: Tensor, t: Tensor, occupancy: Occupancy | None) -> tuple[Tensor, Tensor]:
    """Density (R, D) and colour (R, D, 3) at `o + t d`; 0 in empty cells, where the field is not asked."""
    x = rays_o.t()[..., None] + rays_d.t()[..., None] * t  # (3, R, D): three long rows are faster than many short ones
    x, shape = x.clamp(-field.config.bound, field.config.bound).reshape(3, -1).t(), t.shape  # (R * D, 3)
    if occupancy is None:
        density, colour = field(x)
    else:
        there = occupancy(x).nonzero().squeeze(-1)
        density, colour = field(x[there])
        density, colour = density.new_zeros(len(x)).index_copy(0, there, density), colour.new_zeros(len(x), 3).index_copy(0, there, colour)
    return density.reshape(shape), colour.reshape(*shape, 3)


def render(field: Field, rays_o: Tensor, rays_d: Tensor, generator: torch.Generator | None = None, occupancy: Occupancy | None = None,
           draws: tuple[Tensor, Tensor] | None = None) -> Rendering:
    """Render rays (R, 3) before a black background: stratified samples, importance samples, integration (NeRF, Sec. 4 and 5.2).

    With a generator the samples are jittered. With an occupancy, samples lie in the box around the occupied cells and those in empty
    cells are skipped. `draws` overrides the generator's numbers with given ones (see `uniform_draws`). Rays that miss are 0.
    """
    config = field.config
    box = rays_o.new_tensor([[-config.bound] * 3, [config.bound] * 3]) if occupancy is None else occupancy.box.to(rays_o)
    near, far = ray_interval(rays_o, rays_d, box, config.near)
    hit = (far > near).nonzero().squeeze(-1)
    o, d, near, far = rays_o[hit], rays_d[hit], near[hit, None], far[hit, None]
    u, u_importance = uniform_draws(config, len(hit), generator, rays_o) if draws is None else (draw[hit] for draw in draws)
    stratum = (far - near) / config.samples
    t = near + (far - near) * torch.linspace(0, 1, config.samples).to(u) + (u - 0.5) * stratum
    if config.importance:
        with torch.no_grad():
            weights = absorption(_evaluate(field, o, d, t, occupancy)[0], t, stratum)
            more = place_importance((t[:, 1:] + t[:, :-1]) / 2, weights[:, 1:-1], u_importance)
            t = torch.cat([t, more], -1).sort(-1).values
    density, colour = _evaluate(field, o, d, t, occupancy)
    weights = absorption(density, t, stratum)
    seen = torch.cat([torch.einsum("rd,rdc->rc", weights, colour), weights.sum(-1, keepdim=True),
                      (weights * t.clamp(near, far)).sum(-1, keepdim=True)], -1)  # (hit rays, 5)
    seen = seen.new_zeros(len(rays_o), 5).index_copy(0, hit, seen)
    return Rendering(seen[:, :3], seen[:, 3], seen[:, 4])


# ------------------------------------------------------------------------------------------------------------------------ surface

class Mesh(NamedTuple):
    """A triangle mesh."""
    vertices: Tensor  # (N, 3) in the field's coordinates
    faces: Tensor     # (M, 3) int64, counter-clockwise seen from outside
    colours: Tensor   # (N, 3) in [0, 1]


def _tetrahedra() -> tuple[Tensor, Tensor]:
    """Marching tetrahedra's two tables: the corners (6, 4) of a cube's tetrahedra, and the edges (16, 2, 3, 2) of the triangles.

    Corner 4 i + 2 j + k is at (i, j, k). Kuhn's tetrahedra walk from corner 0 to corner 7 along the axes in any order, so they
    match across faces of neighbouring cubes. Bit n of a case says that corner n is inside; -1 where there is no triangle.
    """
    def odd(order) -> bool:
        return sum(a > b for a, b in itertools.combinations(order, 2)) % 2 == 1

    tetrahedra = []
    for order in itertools.permutations(range(3)):
        x, y, z = (4 >> axis for axis in order)
        tetrahedra.append([0, x + y, x, 7] if odd(order) else [0, x, x + y, 7])  # all right-handed
    triangles = -torch.ones(16, 2, 3, 2, dtype=torch.int64)
    for case in range(1, 15):
        inside = [n for n in range(4) if case >> n & 1]
        a, b, c, d = order = inside + [n for n in range(4) if n not in inside]
        if odd(order):
            a, b, c, d = (a, b, d, c) if len(inside) < 3 else (b, a, c, d)
        found = {1: [[(a, b), (a, c), (a, d)]], 2: [[(a, c), (a, d), (b, d)], [(a, c), (b, d), (b, c)]],
                 3: [[(d, a), (d, b), (d, c)]]}[len(inside)]
        triangles[case, :len(found)] = torch.tensor(found)
    return torch.tensor(tetrahedra), triangles


@torch.no_grad()
def extract_mesh(field: Field, resolution: int = 128, threshold: float | None = None, occupancy: Occupancy | None = None) -> Mesh:
    """The surface where density passes the threshold, by marching tetrahedra (Doi and Koide 1991): always closed.

    The field is sampled `resolution` times along the longest side of its cube, or of the occupancy's box, outside whose occupied
    cells it counts as empty. `threshold` is a density; by default one that absorbs all but e^-5 along that side, whatever the units.
    A field that never reaches it gives an empty mesh.
    """
    bound = field.config.bound
    box = field.encoding.table.new_tensor([[-bound] * 3, [bound] * 3]) if occupancy is None else occupancy.box
    longest = (box[1] - box[0]).max()
    step, threshold = longest / resolution, 5 / longest if threshold is None else threshold
    counts = [n + 3 for n in torch.ceil((box[1] - box[0]) / step - 1e-3).int().tolist()]  # with an empty ring around the box

    def position(index: Tensor) -> Tensor:
        return box[0] + (torch.stack(torch.unravel_index(index, tuple(counts)), -1) - 1) * step

    def level(index: Tensor) -> Tensor:
        """Log density over threshold, nearly linear across a surface; bounded, or an empty neighbour would pull the surface inwards."""
        x = position(index)
        inner = ((x >= box[0] - 1e-3 * step) & (x <= box[1] + 1e-3 * step)).all(-1)
        inner = (inner if occupancy is None else inner & occupancy(x)).nonzero().squeeze(-1)
        density = x.new_zeros(len(x)).index_copy(0, inner, field.density(x[inner]))
        return (density / threshold).log().clamp(-5, 5)

    values = _in_chunks(level, torch.arange(math.prod(counts), device=box.device))
    inside = values > 0
    grid = inside.reshape(1, *counts).float()
    mixed = F.max_pool3d(grid, 2, stride=1) != -F.max_pool3d(-grid, 2, stride=1)  # cubes that the surface crosses
    strides = torch.tensor([counts[1] * counts[2], counts[2], 1], device=box.device)
    offsets = torch.tensor(list(itertools.product((0, 1), repeat=3)), device=box.device)
    corners = ((mixed[0].nonzero()[:, None] + offsets) * strides).sum(-1)  # (cubes, 8)
    tetrahedra, triangles = (table.to(box.device) for table in _tetrahedra())
    tetrahedra = corners[:, tetrahedra].reshape(-1, 4)
    edges = triangles[(inside[tetrahedra] * torch.tensor([1, 2, 4, 8], device=box.device)).sum(-1)]  # (tetrahedra, 2, 3, 2)
    which, triangle = (edges[..., 0, 0] >= 0).nonzero().unbind(-1)
    edges = tetrahedra[which[:, None, None], edges[which, triangle]].sort(-1).values  # (M, 3, 2) lattice points
    keys, faces = (edges[..., 0] * len(values) + edges[..., 1]).unique(return_inverse=True)  # one vertex an edge
    start, end = keys // len(values), keys % len(values)
    fraction = values[start] / (values[start] - values[end])
    vertices = position(start) + fraction[:, None] * (position(end) - position(start))
    return Mesh(vertices, faces, _colours_below(field, vertices, faces, step, occupancy))


def _colours_below(field: Field, vertices: Tensor, faces: Tensor, step: Tensor, occupancy: Occupancy | None, samples: int = 8) -> Tensor:
    """What rays see that enter a surface against its normals, within `samples` steps: colours (N, 3) in [0, 1] (NeRF, Eq. 3).

    vertices (N, 3), faces (M, 3). The outermost layer of a field is so faint that no picture ever taught it its colour.
    """
    corners = vertices[faces]  # (M, 3, 3)
    across = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = F.normalize(torch.zeros_like(vertices).index_add(0, faces.flatten(), across.repeat_interleave(3, 0)), dim=-1)
    depths = (torch.arange(samples, device=vertices.device) + 0.5) * step

    def seen(rays: Tensor) -> Tensor:
        t = depths.expand(len(rays), -1)
        density, colour = _evaluate(field, rays[:, :3], rays[:, 3:], t, occupancy)
        weights = absorption(density, t, step.expand(len(rays), 1))[..., None] + 1e-6  # never all zero
        return (weights * colour).sum(1) / weights.sum(1)
    return _in_chunks(seen, torch.cat([vertices, -normals], 1), CHUNK // samples)


def largest_component(mesh: Mesh) -> Mesh:
    """The connected part of a mesh with most faces: the object without floaters."""
    label, last = torch.arange(len(mesh.vertices), device=mesh.faces.device), None
    while last is None or not torch.equal(label, last):  # every vertex takes the least label of its triangles, then that one's label
        last, least = label, label[mesh.faces].amin(-1, keepdim=True).expand(-1, 3)
        label = label.scatter_reduce(0, mesh.faces.flatten(), least.flatten(), "amin")
        label = label[label]
    faces = mesh.faces[label[mesh.faces[:, 0]] == label[mesh.faces[:, 0]].mode().values] if len(mesh.faces) else mesh.faces
    used, faces = faces.unique(return_inverse=True)
    return Mesh(mesh.vertices[used], faces, mesh.colours[used])


def write_ply(path: str | Path, mesh: Mesh) -> None:
    """Write a mesh as binary little-endian PLY with vertex colours, under a temporary name first."""
    path = Path(path)
    vertices = np.empty(len(mesh.vertices), dtype=[("position", "<f4", 3), ("colour", "u1", 3)])
    vertices["position"] = mesh.vertices.cpu().numpy()
    vertices["colour"] = (mesh.colours.clamp(0, 1) * 255).round().byte().cpu().numpy()
    faces = np.empty(len(mesh.faces), dtype=[("count", "u1"), ("vertex", "<i4", 3)])
    faces["count"], faces["vertex"] = 3, mesh.faces.cpu().numpy()
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property float {axis}" for axis in "xyz"] + [f"property uchar {name}" for name in ("red", "green", "blue")]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes("\n".join(header).encode() + vertices.tobytes() + faces.tobytes())
    os.replace(temporary, path)
