"""What a thing is: one to a dozen parts, melted together, perhaps with one cut out of them.

On a GPU `tracing.cu` has the same distances for the march.

One formula serves every part: an outline in the half plane (rho, y), turned about the y axis; rho is the length of
(x, z / squash) in a p-norm, so that p = 2 makes fruit, vases, rods and rings, and a larger one rounds boxes and plates.
The signed distance to an outline is looked up in a picture of it, made once per part.

Shapes: `P` parts, `S` of them solid, `N` points of an outline, `R` points, `W` waves.
Own axes: +y up. Own units: a thing's largest part is about 2 high; `Thing.scale` makes CO3D units of them.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sample.tracing import CHUNK, Surface

ROWS, COLUMNS = 96, 64  # of the picture of an outline: y from -reach to reach, rho from 0 to its reach
MARGIN = 1.15           # reach of the picture over that of the outline
CELLS = 64              # a side of the grid of a `Room`
SHARP = 1e-6            # own units: for a kernel, parts that do not melt together do so by this


# ---------------------------------------------------------------------------------------------- one part

@dataclass(frozen=True)
class Part:
    """One part in the making, in own units."""
    outline: np.ndarray  # (N, 2) points (rho, y), from the axis above to the axis below, or closed beside the axis
    center: np.ndarray   # (3,)
    axes: np.ndarray     # (3, 3) rows: its x, y and z axis
    power: float         # p of the norm, at least 2
    squash: float        # z over x, at most 1

    def point(self, along: float, angle: float) -> np.ndarray:
        """The point of the surface at a fraction of its outline and an angle about its axis: (3,)."""
        rho, y = self.outline[int(along * (len(self.outline) - 1))]
        return self.center + np.array([rho * np.cos(angle), y, self.squash * rho * np.sin(angle)]) @ self.axes

    def moved(self, matrix: np.ndarray) -> Part:
        """The part after a rotation or reflection (3, 3) about the origin."""
        return replace(self, center=self.center @ matrix, axes=self.axes @ matrix)

    def size(self) -> np.ndarray:
        """Its largest rho and y: (2,)."""
        return np.abs(self.outline).max(0)


def _pictures(outlines: Tensor, reach: Tensor) -> Tensor:
    """Signed distances (P, 1, ROWS, COLUMNS) to outlines (P, N, 2), in a half plane that ends at `reach` (P, 2)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, ROWS), torch.linspace(0, 1, COLUMNS), indexing="ij")
    unit = torch.stack([x, y], -1).to(reach.device)
    points = reach[:, None, None, None] * unit[..., None, :]                           # (P, ROWS, COLUMNS, 1, 2)
    start = outlines[:, None, None, :-1]
    along = outlines[:, None, None, 1:] - start
    away = points - start                                                              # (P, ROWS, COLUMNS, N - 1, 2)

    # The nearest point of each piece.
    fraction = (away * along).sum(-1) / along.square().sum(-1).clamp_min(1e-12)
    distance = (away - fraction.clamp(0, 1)[..., None] * along).norm(dim=-1).amin(-1)

    # Inside is where a way outwards crosses an odd number of pieces.
    level = (away[..., 1] >= 0) != (points[..., 1] >= outlines[:, None, None, 1:, 1])
    height = torch.where(along[..., 1] == 0, torch.ones_like(along[..., 1]), along[..., 1])
    crossed = level & (away[..., 0] < away[..., 1] / height * along[..., 0])
    return torch.where(crossed.sum(-1) % 2 == 1, -distance, distance)[:, None]


# ---------------------------------------------------------------------------------------------- all parts

@dataclass(frozen=True)
class Shape:
    """The parts as tensors, the solid ones first, and what ripples their surface."""
    solid: int         # S
    boxes: Tensor      # numbers of the parts whose norm is not the common one
    frames: Tensor     # (3, P, 4): (x, y, z, 1) -> axes of each part, z over squash, own units
    power: Tensor      # (P, 1) p of the norms
    squash: Tensor     # (P, 1)
    reach: Tensor      # (P, 2) in rho and y, of the pictures
    pictures: Tensor   # (P, 1, ROWS, COLUMNS) signed distances to the outlines, own units
    blend: float       # own units: how far parts melt into each other; 0: not at all
    waves: Tensor      # (4, W) of the surface: (x, y, z, 1) -> phase
    ripple: float      # own units: the height of them all together
    half: float        # own units: half a side of a cube around everything; its middle is the origin

    def local(self, points: Tensor) -> Tensor:
        """Points (R, 3) in the axes of every part: (3, P, R)."""
        turned = self.frames[..., :3].flatten(0, 1) @ points.T
        return turned.view(3, -1, len(points)) + self.frames[..., 3:]

    def distances(self, points: Tensor) -> Tensor:
        """At most the signed distance (P, R) of points (R, 3) to every part, own units."""
        # Into the half plane.
        x, y, z = self.local(points)
        rho = torch.hypot(x, z)
        if len(self.boxes):
            power = self.power[self.boxes]
            powers = x[self.boxes].abs() ** power + z[self.boxes].abs() ** power
            rho[self.boxes] = powers ** (1 / power)

        # There into the picture, which is as wide as high from -1 to 1.
        width, height = self.reach[..., None].unbind(1)
        place = torch.stack([rho / (width / 2) - 1, y / height], -1)                  # (P, R, 2)
        found = F.grid_sample(self.pictures, place[:, None], padding_mode="border", align_corners=True)[:, 0, 0]

        # Outside of the picture, nothing is nearer than this.
        beyond = torch.hypot((rho - width).clamp_min_(0), (y.abs() - height).clamp_min_(0))
        return torch.where(beyond > 0, torch.hypot(beyond, found), found).mul_(self.squash)

    def distance(self, points: Tensor) -> Tensor:
        """About the signed distance (R,) of points (R, 3), own units: the solid parts melted together, less the others.
        """
        steep = self._steepness()
        result = []
        for chunk in points.split(CHUNK[points.device.type]):
            every = self.distances(chunk)
            solid = every[:self.solid]
            value = solid.amin(0)
            if self.blend:
                value = value - torch.exp((value - solid) / self.blend).sum(0).log_().mul_(self.blend)
            if len(every) > self.solid:
                value = torch.maximum(value, -every[self.solid:].amin(0))
            if self.ripple:
                value = value + torch.cos(chunk @ self.waves[:3] + self.waves[3]).mean(1).mul_(self.ripple)
            result.append(value / steep)
        return torch.cat(result)

    def _steepness(self) -> Tensor:
        """How much steeper the ripples make the distance, at most."""
        return 1 + self.ripple * self.waves[:3].norm(dim=0).mean()

    def surface(self) -> Surface:
        """`distance` and its numbers for a kernel."""
        tensors = [self.frames, self.power, self.squash, self.reach, self.pictures, self.waves, self._steepness()]
        counts = [len(self.squash), self.solid, ROWS, COLUMNS, self.waves.shape[1]]
        return Surface(self.distance, "march_thing", [*tensors, *counts, max(self.blend, SHARP), self.ripple])

    def room(self) -> Room:
        """The room around it."""
        axis = torch.linspace(-self.half, self.half, CELLS, device=self.frames.device)
        grid = self.distance(torch.cartesian_prod(axis, axis, axis))
        return Room(grid.view(1, 1, CELLS, CELLS, CELLS), self.half)


class Room(NamedTuple):
    """The signed distances on a grid around a shape: fast, and good enough for what is dim or far away."""
    grid: Tensor   # (1, 1, CELLS, CELLS, CELLS) own units
    half: float    # half a side, own units

    def distance(self, points: Tensor) -> Tensor:
        """About the signed distance (R,) of points (R, 3)."""
        place = points.flip(-1).div(self.half)[None, None, None]
        return F.grid_sample(self.grid, place, padding_mode="border", align_corners=True)[0, 0, 0, 0]

    def extent(self) -> tuple[np.ndarray, float, bool]:
        """The middle (3,) and the radius of a ball around everything, and whether all is in one piece, own units."""
        # What a cell's surroundings can touch is taken.
        axis = torch.linspace(-self.half, self.half, CELLS, device=self.grid.device)
        step = (axis[1] - axis[0]).item()
        cells = torch.cartesian_prod(axis, axis, axis)[self.grid.flatten() < step / 2]
        middle = (cells.amin(0) + cells.amax(0)) / 2
        radius = (cells - middle).norm(dim=1).max().item() + step / 2

        # From the deepest cell, eight of them at once, through all that it touches.
        deepest = F.max_pool3d((self.grid == self.grid.min()).float(), 2)
        taken = F.max_pool3d((self.grid < step / 2).float(), 2)
        for _ in range(CELLS):
            deepest = F.max_pool3d(deepest, 3, 1, 1) * taken
        return middle.cpu().numpy(), radius, bool((deepest == taken).all())


def tensor(x, device) -> Tensor:
    """Numbers of any shape in float32, on a device."""
    return torch.as_tensor(np.asarray(x), dtype=torch.float32, device=device)


def assemble(solid: list[Part], cut: list[Part], blend: float, waves: np.ndarray, ripple: float, device) -> Shape:
    """The shape of some parts, on a device; `waves` (4, W) and the other numbers are those of `Shape`."""
    # Outlines; shorter ones stay at their last point.
    parts = solid + cut
    longest = max(len(part.outline) for part in parts)
    padded = [np.pad(part.outline, ((0, longest - len(part.outline)), (0, 0)), "edge") for part in parts]
    outlines = tensor(np.stack(padded), device)
    reach = tensor(np.stack([part.size() for part in parts]), device) * MARGIN + 0.02

    # Frames and norms.
    frames = []
    for part in parts:
        frame = np.column_stack([part.axes, -part.axes @ part.center])
        frames.append(frame / np.array([[1], [1], [part.squash]]))
    boxes = torch.tensor([i for i, part in enumerate(parts) if part.power != 2], dtype=torch.long, device=device)
    power = tensor([[part.power] for part in parts], device)
    squash = tensor([[part.squash] for part in parts], device)

    # The corners of boxes are farthest from the axis; melting and ripples add some.
    half = max(np.linalg.norm(part.center) + np.linalg.norm(part.size() * [math.sqrt(2), 1]) for part in parts) + 0.15
    return Shape(len(solid), boxes, tensor(np.stack(frames, 1), device), power, squash, reach,
                 _pictures(outlines, reach), blend, tensor(waves, device), ripple, float(half))
