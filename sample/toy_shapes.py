"""What a toy is: some twenty primitives, flat paint on them, and a place in the world.

One formula serves every primitive: a box inflated by an ellipsoid. A box of size 0 leaves an ellipsoid, equal radii
make a rounded box or a capsule. So the primitives of a toy are one axis of a tensor; a left-right pair shares a row,
in which |x| stands for x.

A `Figure` is a toy in the making: numpy, parts with names (`toy_parts.py` builds one). A `Toy` is a finished figure:
tensors on a device (`toy_render.py` draws it).

Shapes: `P` primitives, `R` points.
Toy axes: +x the toy's left, +y up, +z where it looks. Toy units: a standing toy is about 5 high, before it is scaled.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEFT = (1.0, 0.0, 0.0)
UP = (0.0, 1.0, 0.0)
FRONT = (0.0, 0.0, 1.0)
POINT = (0.0, 0.0, 0.0)  # a box without extent: its primitive is an ellipsoid
UPRIGHT = np.eye(3)      # the axes of a primitive that is not tilted
SOFT_EDGE = 0.05         # toy units: how wide an edge of paint is


# ---------------------------------------------------------------------------------------------- a finished toy

@dataclass(frozen=True)
class Decal:
    """Paint: a flat shape projected along its own third axis onto some of the primitives."""
    shape: str       # a key of SHAPES
    parts: Tensor    # numbers of the primitives that take the paint
    frame: Tensor    # (3, 5): (x, |x|, y, z, 1) -> coordinates in which the shape has radius 1 and faces +z
    color: Tensor    # (3,) in [0, 1]
    edge: float      # width of the soft edge, in shape radii
    through: bool    # painted on both sides, not only where the third coordinate is positive


@dataclass(frozen=True)
class Toy:
    """P primitives, their paint, and where they stand."""
    frames: Tensor         # (3, P, 5): (x, |x|, y, z, 1) -> axes of each primitive, in units of its radii
    box: Tensor            # (3, P) half extents of each primitive's box, in units of its radii
    inverse_radii: Tensor  # (3, P) per toy unit
    blended: int           # the first so many primitives melt into each other
    colors: Tensor         # (P, 3) in [0, 1]
    decals: list[Decal]    # in order of painting
    rotation: Tensor       # (3, 3) toy -> world, applied from the right
    offset: Tensor         # (3,) world position of the toy's origin, CO3D units
    scale: float           # CO3D units per toy unit
    light: Tensor          # (3,) unit vector towards the light, in the toy's axes
    backdrop: Tensor       # (2, 3) colors at the top and at the bottom of its photographs, in [0, 1]
    attributes: list[float] = field(repr=False)  # what a network can learn to tell from its pictures, each in [0, 1]


# ---------------------------------------------------------------------------------------------- frames

def upright_axes(up, front=FRONT) -> np.ndarray:
    """An orthonormal frame, axes as rows (3, 3): y along `up`, z as near to `front` as can be."""
    y = np.asarray(up, float) / np.linalg.norm(up)
    x = np.cross(y, front)
    length = np.linalg.norm(x)

    # Where `up` is along `front`, any x will do.
    x = x / length if length > 1e-3 else np.array(LEFT)
    return np.stack([x, y, np.cross(x, y)])


def affine(axes: np.ndarray, center, size, pair: bool) -> np.ndarray:
    """The map (x, |x|, y, z, 1) -> axes @ (p - center) / size, (3, 5). A mirrored pair takes |x| in the place of x."""
    matrix = np.zeros((3, 5))
    matrix[:, 1 if pair else 0] = axes[:, 0]
    matrix[:, 2:4] = axes[:, 1:]
    matrix[:, 4] = -axes @ np.asarray(center, float)
    return matrix / np.broadcast_to(size, 3)[:, None]


# ---------------------------------------------------------------------------------------------- a toy in the making

class Block(NamedTuple):
    """The room that a part takes up: center and half extents, (3,) each."""
    center: np.ndarray
    half: np.ndarray

    def at(self, x: float, y: float, z: float = 0.0) -> np.ndarray:
        """The point so many half extents away from the center: (3,)."""
        return self.center + self.half * [x, y, z]


@dataclass(frozen=True)
class Primitive:
    """A box inflated by an ellipsoid. Lengths are toy units."""
    center: np.ndarray  # (3,)
    radii: np.ndarray   # (3,) of the ellipsoid, along the axes
    color: np.ndarray   # (3,) in [0, 1]
    box: np.ndarray     # (3,) half extents of the box, along the axes
    axes: np.ndarray    # (3, 3) rows: its own axes
    pair: bool          # there is a second one, mirrored to the other side of the toy
    hard: bool          # does not melt into the others

    @property
    def block(self) -> Block:
        """Its center, and half of its extents along its axes."""
        return Block(self.center, self.radii + self.box)

    def front_at(self, x: float, y: float) -> np.ndarray:
        """The point over (x, y) on the front of a primitive that is not tilted: (3,)."""
        # How far from the box, in radii: 1 is the rim of the ellipsoid, where the front ends.
        across = max(abs(x - self.center[0]) - self.box[0], 0) / self.radii[0]
        along = max(abs(y - self.center[1]) - self.box[1], 0) / self.radii[1]
        bulge = math.sqrt(max(1 - across * across - along * along, 0.04))
        return np.array([x, y, self.center[2] + (self.box[2] + self.radii[2] * bulge)])

    def corners(self) -> list[np.ndarray]:
        """The lowest and the highest corner around it in the toy's axes, (3,) each; of a pair, on both sides."""
        # The extents of a turned box and of a turned ellipsoid add up.
        to_toy = self.axes.T
        extent = np.abs(to_toy) @ self.box + np.sqrt((to_toy ** 2) @ self.radii ** 2)
        corners = [self.center - extent, self.center + extent]
        if self.pair:
            corners += [corner * [-1, 1, 1] for corner in corners]
        return corners


class Paint(NamedTuple):
    """A `Decal` in the making: its parts have names."""
    shape: str
    parts: list[str]
    frame: np.ndarray
    color: np.ndarray
    edge: float
    through: bool


class Place(NamedTuple):
    """Where a toy stands and in what light."""
    rotation: np.ndarray  # (3, 3) toy -> world, applied from the right
    offset: np.ndarray    # (3,) world position of the toy's origin, CO3D units
    scale: float          # CO3D units per toy unit
    sun: np.ndarray       # (3,) unit vector towards the light, in the world
    backdrop: np.ndarray  # (2, 3) colors at the top and at the bottom of its photographs, in [0, 1]


class Figure:
    """Collects the primitives and the paint of one toy, in toy units."""

    def __init__(self):
        self.primitives: dict[str, Primitive] = {}
        self.paints: list[Paint] = []

    def block(self, name: str) -> Block:
        """The room that a primitive takes up."""
        return self.primitives[name].block

    def front_of(self, name: str, x: float, y: float) -> np.ndarray:
        """The point over (x, y) on the front of a primitive that is not tilted: (3,)."""
        return self.primitives[name].front_at(x, y)

    def add(self, name: str, center, radii, color, box=POINT, axes=UPRIGHT, pair=False, hard=False):
        """A primitive as `Primitive` says; one number for the radii makes them equal."""
        center = np.asarray(center, float)
        radii = np.broadcast_to(np.asarray(radii, float), 3)
        box = np.asarray(box, float)
        self.primitives[name] = Primitive(center, radii, color, box, axes, pair, hard)

    def add_block(self, name: str, block: Block, boxiness: float, color):
        """A primitive that fills a block, of which so large a fraction is box."""
        self.add(name, block.center, block.half * (1 - boxiness), color, block.half * boxiness)

    def add_limb(self, name: str, start, end, radius: float, color, pair=False, hard=False):
        """A capsule from `start` to `end`, (3,) each."""
        start = np.asarray(start, float)
        end = np.asarray(end, float)
        along = end - start
        box = (0, np.linalg.norm(along) / 2, 0)
        self.add(name, (start + end) / 2, radius, color, box, upright_axes(along), pair, hard)

    def paint(self, shape: str, parts: str | list[str], center, size, color,
              up=UP, front=FRONT, pair=False, through=False):
        """A shape of radius `size` (one number, or three along its axes), projected along `front` on a part.

        Of several parts, those take it that the toy has.
        """
        parts = [parts] if isinstance(parts, str) else parts
        parts = [part for part in parts if part in self.primitives]
        frame = affine(upright_axes(up, front), center, size, pair)
        edge = SOFT_EDGE / np.min(size)
        self.paints.append(Paint(shape, parts, frame, color, edge, through))

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest corner of everything, (3,) each."""
        corners = [corner for primitive in self.primitives.values() for corner in primitive.corners()]
        return np.min(corners, 0), np.max(corners, 0)

    def finish(self, place: Place, attributes: list[float], device) -> Toy:
        """The toy, on a device."""
        def tensor(x):
            """Numbers of any shape in float32, on the device."""
            return torch.as_tensor(np.asarray(x), dtype=torch.float32, device=device)

        # The primitives become rows; those that melt into each other come first.
        ordered = dict(sorted(self.primitives.items(), key=lambda item: item[1].hard))
        number = {name: i for i, name in enumerate(ordered)}
        rows = ordered.values()
        frames = tensor(np.stack([affine(row.axes, row.center, row.radii, row.pair) for row in rows], 1))
        box = tensor(np.stack([row.box / row.radii for row in rows], 1))
        inverse_radii = tensor(np.stack([1 / row.radii for row in rows], 1))
        blended = sum(not row.hard for row in rows)
        colors = tensor(np.stack([row.color for row in rows]))

        # Paint refers to its parts by number. All of it goes to the device at once: a GPU waits for every copy.
        parts = [[number[part] for part in paint.parts] for paint in self.paints]
        numbers = torch.tensor(sum(parts, []), dtype=torch.long, device=device).split([len(some) for some in parts])
        paint_frames = tensor(np.reshape([paint.frame for paint in self.paints], (-1, 3, 5)))
        paint_colors = tensor(np.reshape([paint.color for paint in self.paints], (-1, 3)))
        decals = []
        for paint, some, frame, color in zip(self.paints, numbers, paint_frames, paint_colors):
            decals.append(Decal(paint.shape, some, frame, color, paint.edge, paint.through))

        # The place; the light turns with the toy.
        rotation = tensor(place.rotation)
        offset = tensor(place.offset)
        light = tensor(place.sun) @ rotation.T
        backdrop = tensor(place.backdrop)
        return Toy(frames, box, inverse_radii, blended, colors, decals,
                   rotation, offset, place.scale, light, backdrop, attributes)


# ---------------------------------------------------------------------------------------------- shapes of paint
# Each takes coordinates in radii, (R,) each, to about the distance to the shape's edge, (R,), negative inside.


def _disc(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1


def _square(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _bar(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 1


def _plus(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    upright = torch.maximum(x.abs() - 0.34, y.abs() - 1)
    level = torch.maximum(x.abs() - 1, y.abs() - 0.34)
    return torch.minimum(upright, level)


def _heart(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    # A disc that is pushed up at both sides of its middle.
    lobes = 0.72 * (x.abs() + 1e-4).sqrt()
    return torch.hypot(x, 1.15 * y + 0.1 - lobes) - 0.92


def _star(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    # Five tips: fold the plane into the tenth between the axis of a tip, angle 0, and a notch, angle pi / 5.
    turn = torch.atan2(x, y) / (2 * math.pi / 5) + 0.5
    angle = (turn - turn.floor() - 0.5).abs() * (2 * math.pi / 5)
    radius = torch.hypot(x, y)
    along = radius * angle.cos()
    across = radius * angle.sin()

    # Signed distance from the line between the tip at radius 1 and the notch at 0.45: back by 0.636, across by 0.2645.
    return ((along - 1) * 0.2645 + across * 0.636) / 0.689


def _half(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return -y


def _stripes(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (y - y.floor() - 0.5).abs() - 0.25


def _spots(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    # A ball in the middle of every unit cube, each layer shifted by half a cube.
    place = torch.stack([x + 0.5 * y.floor(), y, z]).frac().abs()
    return (place - 0.5).norm(dim=0) - 0.33


def _smile(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    # The lower part of a ring.
    ring = (torch.hypot(x, y) - 1).abs() - 0.2
    return torch.maximum(ring, y + 0.2)


SHAPES = {"disc": _disc, "square": _square, "bar": _bar, "plus": _plus, "heart": _heart, "star": _star,
          "half": _half, "stripes": _stripes, "spots": _spots, "smile": _smile}
