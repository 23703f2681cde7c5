"""Pictures of whatever has a signed distance and colors: sphere tracing, in plain torch or, on a GPU, by kernels.

Coarse rays come first, one per block of 8 x 8 rays (4 x 4 pixels): each marches until the cone around it may touch the
body. Then the rays of those blocks start from there, 2 x 2 per pixel.

Shapes: `R` rays or points, `V` views, `N` blocks (of all views), `H W` rows and columns of pixels.
A body has its own axes and units. Points are in these unless a docstring says otherwise.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import Cameras
from gpu import kernels

SUPER = 2          # rays per pixel side
BLOCK = 8          # rays per side of a coarse block
COARSE_STEPS = 16  # of sphere tracing, multiples of CHECK_EVERY
FINE_STEPS = 40
CHECK_EVERY = 4    # steps after which finished rays are dropped
SURFACE = 0.003    # own units: a ray this near has arrived
STRIDE = 0.004     # own units: step n is at least n strides, so that grazing rays get on
REACH = 4.0        # CO3D units: no body is farther from the world's origin
SOURCE = Path(__file__).with_name("tracing.cu")
KERNELS = ("march_toy", "march_thing")
THREADS = 128      # of a block of a kernel

# Points at a time: a CPU wants all numbers of some points in its caches, a GPU wants to be full.
CHUNK = {"cpu": 1 << 12, "cuda": 1 << 21}


class Body(Protocol):
    """Where a body stands."""
    rotation: Tensor  # (3, 3) own axes -> world, applied from the right
    offset: Tensor    # (3,) world position of its origin, CO3D units
    scale: float      # CO3D units per own unit


def to_own(body: Body, points: Tensor) -> Tensor:
    """World points (R, 3) in a body's own units (R, 3)."""
    return (points - body.offset) @ body.rotation.T / body.scale


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


def march(distance: Callable, rays: Rays, start: Tensor, far: Tensor, cone: float,
          steps: int) -> tuple[Tensor, Tensor]:
    """Sphere tracing of rays (R) with cones of half width `cone * t` around them, from `start` to `far`, (R,) each;
    `distance` takes points (R, 3) to about their signed distance (R,), own units.

    Returns how far each came, (R,), and whether it arrived, (R,) bool. A cone that runs out of steps may yet touch the
    body, so it counts as arrived; a ray does not.
    """
    length = start.clone()
    arrived = torch.zeros_like(start, dtype=torch.bool)
    alive = torch.arange(len(start), device=start.device)
    t = start

    for step in range(steps):
        # The free space around the cone's end; it has arrived where that is no wider than itself.
        width = cone * t
        free = distance(rays.at(t)) - width
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


class Surface(NamedTuple):
    """Signed distances twice: as a function of points (R, 3), and as what a kernel of `tracing.cu` reads of a body."""
    distance: Callable
    kernel: str
    numbers: list[Tensor | int | float]  # the kernel's first arguments


def marcher(surface: Surface, device: torch.device) -> Callable:
    """`march` of a surface on a device, without its first argument: by a kernel where there is one."""
    compiled = _compile(device.index) if device.type == "cuda" else None
    if compiled is None:
        return partial(march, surface.distance)
    return partial(march_by_kernel, compiled[KERNELS.index(surface.kernel)], surface.numbers)


def march_by_kernel(kernel: Callable, numbers: list, rays: Rays, start: Tensor, far: Tensor, cone: float,
                    steps: int) -> tuple[Tensor, Tensor]:
    """As `march`, a thread per ray: 1 launch instead of 25 a step. `numbers` are those of a `Surface`."""
    length = torch.empty_like(start)
    arrived = torch.empty_like(start, dtype=torch.bool)
    read = [kernels.readable(x) for x in (*rays, start, far)]
    blocks = max(1, math.ceil(len(start) / THREADS))
    with kernels.current_device(start.device):
        kernel(grid=(blocks, 1, 1), block=(THREADS, 1, 1),
               args=[*numbers, *read, length, arrived, len(start), cone, steps])
    return length, arrived


@cache
def _compile(device: int) -> list[Callable] | None:
    """KERNELS for a GPU; None where they cannot be had."""
    options = [f"-DSURFACE={SURFACE}f", f"-DSTRIDE={STRIDE}f", f"-DCHECK_EVERY={CHECK_EVERY}"]
    return kernels.compile_kernels(SOURCE, KERNELS, options, device)


# ---------------------------------------------------------------------------------------------- pictures

@torch.no_grad()
def render(body: Body, surface: Surface, shade: Callable, cameras: Cameras, height: int,
           width: int) -> tuple[Tensor, Tensor]:
    """One body from V cameras (isotropic NDC: half the shorter side is 1), `height` and `width` multiples of 4 pixels.

    `shade` takes points on the surface and the unit directions of the rays that came there, (R, 3) each, to colors
    (R, 3).

    Returns color over black (V, 3, H, W) and coverage (V, 1, H, W) in [0, 1], on the body's device.
    """
    # The cone of a coarse ray: half a block's diagonal at distance 1.
    cone = BLOCK / (min(height, width) * SUPER) * math.sqrt(2) / cameras.focal.min().item()
    cameras = cameras.to(body.offset.device)
    march_to_surface = marcher(surface, body.offset.device)

    # Coarse: which blocks does the body touch, and how far away?
    rays = _rays(body, cameras, _grid(body, height, width, BLOCK))         # (N, 3)
    origin = to_own(body, torch.zeros_like(body.offset)[None])             # the world's
    depth = (rays.origins - origin).norm(dim=-1)
    near = depth - REACH / body.scale
    far = depth + REACH / body.scale
    start, touched = march_to_surface(rays, near, far, cone, COARSE_STEPS)
    blocks = touched.nonzero()[:, 0]

    # Fine: all rays of those blocks, from there on.
    rays = _rays(body, cameras, _fine_grid(body, height, width))
    origins = rays.origins.reshape(-1, BLOCK ** 2, 3)[blocks].flatten(0, 1)
    directions = rays.directions.reshape(-1, BLOCK ** 2, 3)[blocks].flatten(0, 1)
    rays = Rays(origins, directions)
    start = start[blocks].repeat_interleave(BLOCK ** 2)
    far = far[blocks].repeat_interleave(BLOCK ** 2)
    length, hit = march_to_surface(rays, start, far, 0.0, FINE_STEPS)
    hit = hit.nonzero()[:, 0]

    # A ray that hits has a color and covers; one that misses is black and does not.
    found = torch.zeros(len(length), 4, device=hit.device)
    rays = rays.pick(hit)
    color = shade(rays.at(length[hit]), rays.directions)
    found[hit] = F.pad(color, (0, 1), value=1.0)

    image = torch.zeros(len(touched), BLOCK ** 2, 4, device=hit.device)    # (N, BLOCK^2, 4)
    image[blocks] = found.reshape(-1, BLOCK ** 2, 4)
    image = _assemble(image, height, width)
    return image[:, :3], image[:, 3:]


def _grid(body: Body, height: int, width: int, step: int) -> Tensor:
    """NDC of the centers of squares of `step` x `step` rays in a picture of H x W pixels: (rows, columns, 2)."""
    rows = height * SUPER
    columns = width * SUPER
    unit = 2 / min(rows, columns)
    y = (rows / 2 - torch.arange(step / 2, rows, step, device=body.offset.device)) * unit
    x = (columns / 2 - torch.arange(step / 2, columns, step, device=body.offset.device)) * unit
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], -1)


def _fine_grid(body: Body, height: int, width: int) -> Tensor:
    """NDC of every ray, block by block: (rows, columns of blocks, BLOCK, BLOCK, 2)."""
    grid = _grid(body, height, width, 1)
    grid = grid.reshape(height * SUPER // BLOCK, BLOCK, width * SUPER // BLOCK, BLOCK, 2)
    return grid.transpose(1, 2)


def _rays(body: Body, cameras: Cameras, xy: Tensor) -> Rays:
    """The rays of V cameras through the same NDC (..., 2), in the body's axes: view by view, (V * ..., 3)."""
    xy = xy.reshape(1, -1, 2).expand(len(cameras), -1, -1)
    origins, directions = cameras.rays(xy)
    directions = F.normalize(directions @ body.rotation.T, dim=-1)
    origins = to_own(body, origins[:, :1]).expand_as(directions)
    return Rays(origins.reshape(-1, 3), directions.reshape(-1, 3))


def _assemble(blocks: Tensor, height: int, width: int) -> Tensor:
    """Pictures (V, C, H, W) from blocks of rays (N, BLOCK^2, C): each pixel is the mean of its rays."""
    rows = height * SUPER // BLOCK
    columns = width * SUPER // BLOCK
    pixels = BLOCK // SUPER  # per side of a block
    channels = blocks.shape[-1]
    image = blocks.reshape(-1, rows, columns, pixels, SUPER, pixels, SUPER, channels).mean((4, 6))
    return image.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)
