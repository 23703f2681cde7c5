"""Pictures of a toy: signed distances and shading, which `tracing.py` renders. Plain torch, on any device; the march
on a GPU has the same distances in `tracing.cu`.

Shading does not depend on the view, because the field does not, either.

Shapes: `P` primitives, `R` rays or points, `V` views, `H W` rows and columns of pixels.
Points are in the toy's own axes and units (see `toy_shapes.py`) unless a docstring says otherwise.
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import Cameras
from sample import tracing
from sample.toy_shapes import SHAPES, Decal, Toy
from sample.tracing import CHUNK, Surface

BLEND = 0.09       # toy units: how far body parts melt into each other
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


def surface(toy: Toy) -> Surface:
    """`distance` and its numbers for a kernel."""
    numbers = [toy.frames, toy.box, toy.inverse_radii, len(toy.colors), toy.blended, BLEND]
    return Surface(partial(distance, toy), "march_toy", numbers)


def _homogeneous(points: Tensor) -> Tensor:
    """Points (R, 3) as (x, |x|, y, z, 1): (5, R)."""
    x, y, z = points.unbind(-1)
    return torch.stack([x, x.abs(), y, z, torch.ones_like(x)])


# ---------------------------------------------------------------------------------------------- shading

def render(toy: Toy, cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Color over black (V, 3, H, W) and coverage (V, 1, H, W), as `tracing.render` says."""
    return tracing.render(toy, surface(toy), partial(_shade, toy), cameras, height, width)


def _shade(toy: Toy, points: Tensor, directions: Tensor) -> Tensor:
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
