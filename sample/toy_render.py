"""Pictures of a toy: signed distances, sphere tracing, shading. Plain torch, on any device.

Coarse rays come first, one per block of 8 x 8 rays (4 x 4 pixels): each marches until the cone around it may touch the
toy. Then the rays of those blocks start from there, 2 x 2 per pixel. Shading does not depend on the view, because the
field does not, either.

Shapes: `P` primitives, `R` rays or points, `V` views, `N` blocks (of all views), `H W` rows and columns of pixels.
Points are in the toy's own axes and units (see `toy_shapes.py`) unless a docstring says otherwise.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import Cameras
from sample.toy_shapes import SHAPES, Decal, Toy

SUPER = 2          # rays per pixel side
BLOCK = 8          # rays per side of a coarse block
COARSE_STEPS = 16  # of sphere tracing, multiples of CHECK_EVERY
FINE_STEPS = 40
CHECK_EVERY = 4    # steps after which finished rays are dropped
SURFACE = 0.003    # toy units: a ray this near has arrived
STRIDE = 0.004     # toy units: step n is at least n strides, so that grazing rays get on
BLEND = 0.09       # toy units: how far body parts melt into each other
REACH = 4.0        # CO3D units: no toy is farther from the world's origin

# Points at a time: a CPU wants (3, P, R) numbers in its caches, a GPU wants to be full.
CHUNK = {"cpu": 1 << 12, "cuda": 1 << 21}

AMBIENT = 0.66     # light from all around
SKY = 0.12         # more of it from above, less from below
SUN = 0.36         # light from the direction `Toy.light`
OCCLUSIONS = ((0.12, 0.35), (0.4, 0.45))  # toy units off the surface, and how much light it takes to be enclosed there
SEAM = 0.02        # toy units: how far the colors of two primitives mix
TAP = 0.01         # toy units: how far from a point the distances are taken that give its normal
TETRAHEDRON = [[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]]


# ---------------------------------------------------------------------------------------------- signed distances

def distances(toy: Toy, points: Tensor) -> Tensor:
    """About the signed distance (P, R) of points (R, 3) to every primitive, toy units.

    With q the part of a point outside the box and r the radii: f = |q / r|, and (f - 1) f / |q / r^2| is (f - 1) over
    the length of its own gradient.
    """
    # Points in the axes of every primitive, in units of its radii.
    q = toy.frames.flatten(0, 1) @ _homogeneous(points)     # (3P, 5) @ (5, R)
    q = q.reshape(3, -1, len(points))

    # What of them is outside the box; not 0, since both lengths vanish inside it.
    q = q.abs_().sub_(toy.box[..., None]).clamp_min_(1e-4)  # (3, P, R)

    # In place: the march spends its time here. norm(dim=0) takes 20 times as long on a CPU.
    f = q.square().sum(0).sqrt_()                           # (P, R)
    slope = q.mul_(toy.inverse_radii[..., None]).square_().sum(0).sqrt_()
    return (f - 1).mul_(f).div_(slope)


def distance(toy: Toy, points: Tensor) -> Tensor:
    """About the signed distance (R,) of points (R, 3) to the toy, toy units.

    The union is a log-sum-exp for the primitives that melt into each other, and hard for the rest.
    """
    result = []
    for chunk in points.split(CHUNK[points.device.type]):
        every = distances(toy, chunk)
        body = every[:toy.blended] / -BLEND
        body = body.exp_().sum(0).clamp_min_(1e-37).log_().mul_(-BLEND)
        rest = every[toy.blended:].amin(0)
        result.append(torch.minimum(body, rest))
    return torch.cat(result)


def _homogeneous(points: Tensor) -> Tensor:
    """Points (R, 3) as (x, |x|, y, z, 1): (5, R)."""
    x, y, z = points.unbind(-1)
    return torch.stack([x, x.abs(), y, z, torch.ones_like(x)])


# ---------------------------------------------------------------------------------------------- sphere tracing

class Rays(NamedTuple):
    """Rays o + t d with unit directions, (R, 3) each."""
    origins: Tensor
    directions: Tensor

    def at(self, t: Tensor) -> Tensor:
        """The points (R, 3) at lengths (R,)."""
        return self.origins + t[:, None] * self.directions

    def pick(self, index: Tensor) -> Rays:
        """Some of them, by number or by mask."""
        return Rays(self.origins[index], self.directions[index])


def _march(toy: Toy, rays: Rays, start: Tensor, far: Tensor, cone: float, steps: int) -> tuple[Tensor, Tensor]:
    """Sphere tracing of rays (R) with cones of half width `cone * t` around them, from `start` to `far`, (R,) each.

    Returns how far each came, (R,), and whether it arrived, (R,) bool. A cone that runs out of steps may yet touch the
    toy, so it counts as arrived; a ray does not.
    """
    length = start.clone()
    arrived = torch.zeros_like(start, dtype=torch.bool)
    alive = torch.arange(len(start), device=start.device)
    t = start

    for step in range(steps):
        # The free space around the cone's end; it has arrived where that is no wider than itself.
        width = cone * t
        free = distance(toy, rays.at(t)) - width
        near_by = free < width.clamp_min(SURFACE)

        # Go on through the free space, or back out if already inside.
        forward = (free * (0.95 / (1 + cone))).clamp_min(STRIDE * step)
        t = t + torch.where(near_by, free.clamp_max(0), forward)

        # Every few steps, keep what was found and drop the rays that have arrived or left.
        if (step + 1) % CHECK_EVERY == 0:
            length[alive] = t
            arrived[alive] = near_by
            keep = (~near_by & (t < far)).nonzero()[:, 0]
            alive = alive[keep]
            rays = rays.pick(keep)
            t = t[keep]
            far = far[keep]
            if len(alive) == 0:
                break

    arrived[alive] = cone > 0
    return length, arrived


# ---------------------------------------------------------------------------------------------- shading

def _shade(toy: Toy, points: Tensor) -> Tensor:
    """Colors (R, 3) of surface points (R, 3): paint, Lambert's law, light from the sky, ambient occlusion."""
    result = []
    for chunk in points.split(CHUNK[points.device.type] // 4):
        normal = _normals(toy, chunk)
        toward_sun = (normal @ toy.light).clamp_min(0)
        light = AMBIENT + SKY * normal[:, 1] + SUN * toward_sun
        light = light * _openness(toy, chunk, normal)
        shaded = _colors(toy, chunk) * light[:, None]
        result.append(shaded.clamp(0, 1))
    return torch.cat(result)


def _normals(toy: Toy, points: Tensor) -> Tensor:
    """Unit normals (R, 3) at surface points (R, 3), from the distances at the corners of a small tetrahedron."""
    corners = torch.tensor(TETRAHEDRON, device=points.device)   # (4, 3)
    taps = (points + TAP * corners[:, None]).flatten(0, 1)      # (4 R, 3)
    taps = distance(toy, taps).reshape(4, -1)
    return F.normalize(taps.T @ corners, dim=-1)


def _openness(toy: Toy, points: Tensor, normal: Tensor) -> Tensor:
    """How little is in the way of light from all around, at points (R, 3) with normals (R, 3): (R,) in [0, 1]."""
    openness = 1.0
    for reach, strength in OCCLUSIONS:
        free = distance(toy, points + reach * normal) / reach
        openness = openness - strength * (1 - free).clamp(0, 1)
    return openness


def _colors(toy: Toy, points: Tensor) -> Tensor:
    """Colors (R, 3) of surface points (R, 3) before light: those of the primitives they belong to, and paint."""
    # Each point belongs to the nearest primitive, at a seam to both.
    belongs = torch.softmax(distances(toy, points) / -SEAM, 0)  # (P, R)
    color = belongs.T @ toy.colors

    # One decal over the other.
    homogeneous = _homogeneous(points)
    for decal in toy.decals:
        cover = _cover(decal, homogeneous, belongs)
        color = torch.lerp(color, decal.color, cover[:, None])
    return color


def _cover(decal: Decal, homogeneous: Tensor, belongs: Tensor) -> Tensor:
    """How much of a decal's paint is at points (5, R) that belong to primitives as (P, R) says: (R,) in [0, 1]."""
    x, y, z = decal.frame @ homogeneous
    inside = (0.5 - SHAPES[decal.shape](x, y, z) / decal.edge).clamp(0, 1)
    on_parts = belongs[decal.parts].sum(0)
    facing = (z > 0) | decal.through
    return inside * on_parts * facing


# ---------------------------------------------------------------------------------------------- pictures

@torch.no_grad()
def render(toy: Toy, cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """One toy from V cameras (isotropic NDC: half the shorter side is 1), `height` and `width` multiples of 4 pixels.

    Returns color over black (V, 3, H, W) and coverage (V, 1, H, W), both in [0, 1] on the toy's device.
    """
    # The cone of a coarse ray: half a block's diagonal at distance 1.
    cone = BLOCK / (min(height, width) * SUPER) * math.sqrt(2) / cameras.focal.min().item()
    cameras = cameras.to(toy.frames.device)

    # Coarse: which blocks does the toy touch, and how far away?
    rays = _rays(toy, cameras, _grid(toy, height, width, BLOCK))           # (N, 3)
    origin = toy.to_toy(torch.zeros_like(toy.offset)[None])                # the world's
    depth = (rays.origins - origin).norm(dim=-1)
    near = depth - REACH / toy.scale
    far = depth + REACH / toy.scale
    start, touched = _march(toy, rays, near, far, cone, COARSE_STEPS)
    blocks = touched.nonzero()[:, 0]

    # Fine: all rays of those blocks, from there on.
    rays = _rays(toy, cameras, _fine_grid(toy, height, width))
    origins = rays.origins.reshape(-1, BLOCK ** 2, 3)[blocks].flatten(0, 1)
    directions = rays.directions.reshape(-1, BLOCK ** 2, 3)[blocks].flatten(0, 1)
    rays = Rays(origins, directions)
    start = start[blocks].repeat_interleave(BLOCK ** 2)
    far = far[blocks].repeat_interleave(BLOCK ** 2)
    length, hit = _march(toy, rays, start, far, 0.0, FINE_STEPS)

    # A ray that hits has a color and covers; one that misses is black and does not.
    found = torch.zeros(len(hit), 4, device=hit.device)
    color = _shade(toy, rays.pick(hit).at(length[hit]))
    found[hit] = F.pad(color, (0, 1), value=1.0)

    image = torch.zeros(len(touched), BLOCK ** 2, 4, device=hit.device)    # (N, BLOCK^2, 4)
    image[blocks] = found.reshape(-1, BLOCK ** 2, 4)
    image = _assemble(image, height, width)
    return image[:, :3], image[:, 3:]


def _grid(toy: Toy, height: int, width: int, step: int) -> Tensor:
    """NDC of the centers of squares of `step` x `step` rays in a picture of H x W pixels: (rows, columns, 2)."""
    rows = height * SUPER
    columns = width * SUPER
    unit = 2 / min(rows, columns)
    y = (rows / 2 - torch.arange(step / 2, rows, step, device=toy.frames.device)) * unit
    x = (columns / 2 - torch.arange(step / 2, columns, step, device=toy.frames.device)) * unit
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], -1)


def _fine_grid(toy: Toy, height: int, width: int) -> Tensor:
    """NDC of every ray, block by block: (rows, columns of blocks, BLOCK, BLOCK, 2)."""
    grid = _grid(toy, height, width, 1)
    grid = grid.reshape(height * SUPER // BLOCK, BLOCK, width * SUPER // BLOCK, BLOCK, 2)
    return grid.transpose(1, 2)


def _rays(toy: Toy, cameras: Cameras, xy: Tensor) -> Rays:
    """The rays of V cameras through the same NDC (..., 2), in the toy's axes: view by view, (V * ..., 3)."""
    xy = xy.reshape(1, -1, 2).expand(len(cameras), -1, -1)
    origins, directions = cameras.rays(xy)
    directions = F.normalize(directions @ toy.rotation.T, dim=-1)
    origins = toy.to_toy(origins[:, :1]).expand_as(directions)
    return Rays(origins.reshape(-1, 3), directions.reshape(-1, 3))


def _assemble(blocks: Tensor, height: int, width: int) -> Tensor:
    """Pictures (V, C, H, W) from blocks of rays (N, BLOCK^2, C): each pixel is the mean of its rays."""
    rows = height * SUPER // BLOCK
    columns = width * SUPER // BLOCK
    pixels = BLOCK // SUPER  # per side of a block
    channels = blocks.shape[-1]
    image = blocks.reshape(-1, rows, columns, pixels, SUPER, pixels, SUPER, channels).mean((4, 6))
    return image.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)
