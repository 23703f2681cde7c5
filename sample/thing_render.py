"""How a thing is drawn: its paint and the light on it, which depends on the view where it shines.

Colors and light are linear: a camera's gamma comes later (`things.py`).

Shapes: `S` solid parts, `R` points, `W` waves, `L` lights.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cameras import Cameras
from sample import tracing
from sample.thing_shapes import Room, Shape, tensor
from sample.toy_render import TAP, TETRAHEDRON
from sample.toy_shapes import Place
from sample.tracing import CHUNK

PATTERNS = ("plain", "noise", "stripes", "spots", "checks", "label")
OCTAVES = 5
WAVES = 40             # of the noise, in all octaves
SHARP = 6.0            # how fast the colors of a pattern change at its edges
SHADOW_STEPS = 12
LIFT = 0.03            # own units: from where on the surface the way to a light begins
OCCLUSIONS = ((0.1, 0.4), (0.35, 0.45))  # own units off the surface, and how much light it takes to be enclosed there
REFLECTANCE = 0.04     # of what is no metal, at right angles
BRIGHTEST = 3.0        # of a highlight, where white is 1


@dataclass(frozen=True)
class Paint:
    """The materials of S parts."""
    shades: Tensor     # (S, SHADES, 3) colors, linear
    pattern: Tensor    # (S,) number in PATTERNS
    frequency: Tensor  # (S,) radians per own unit, of the pattern or of the noise's first octave
    octaves: Tensor    # (S, W) how much of each wave
    axis: Tensor       # (S, 3) across stripes
    warp: Tensor       # (S,) radians: how far noise moves the pattern
    window: Tensor     # (S, 4) of the label: angle about the y axis and half its width, y and half its height
    roughness: Tensor  # (S,) in [0, 1]
    metal: Tensor      # (S,) in [0, 1]
    waves: Tensor      # (4, W) of the noise: (x, y, z, 1) -> phase

    @classmethod
    def of(cls, rows: list[dict], waves: np.ndarray, device) -> Paint:
        """From rows of the first fields, and the waves."""
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"waves": waves}
        return cls(**{name: tensor(x, device) for name, x in columns.items()})

    def colors(self, part: Tensor, q: Tensor) -> Tensor:
        """Colors (R, 3) at points (R, 3) in the axes of the parts with numbers (R,)."""
        scaled = q * self.frequency[part, None]
        noise = (torch.cos(scaled @ self.waves[:3] + self.waves[3]) * self.octaves[part]).sum(1)
        scaled = scaled + (self.warp[part] * noise)[:, None]
        across = (scaled * self.axis[part]).sum(1)
        waved = scaled.cos().sum(1)

        # The label: strokes within its window.
        angle, width, middle, height = self.window[part].T
        turn = torch.atan2(q[:, 2], q[:, 0]) - angle
        turn = torch.atan2(turn.sin(), turn.cos())
        inside = (turn.abs() < width) & ((q[:, 1] - middle).abs() < height)
        strokes = (torch.sin(9 * turn + 2 * noise) * torch.sin(14 * q[:, 1]) * SHARP).clamp(-0.6, 1)

        # Every pattern from -1 to 1, then the one that the part has.
        every = torch.stack([
            0.12 * noise,
            0.6 * noise,
            torch.sin(across) * SHARP,
            (waved - 1.2) * SHARP / 2,
            scaled.sin().prod(1) * 2 * SHARP,
            torch.where(inside, strokes, -1 + 0.1 * noise),
        ])
        value = every.gather(0, self.pattern[part].long()[None])[0].clamp(-1, 1)

        # Between two of its shades.
        count = self.shades.shape[1]
        place = (value + 1) / 2 * (count - 1)
        lower = place.long().clamp_max(count - 2)
        weight = (place - lower)[:, None]
        return torch.lerp(self.shades[part, lower], self.shades[part, lower + 1], weight)


@dataclass(frozen=True)
class Thing:
    """A shape, its paint, and where it stands in which light."""
    shape: Shape
    room: Room        # around it
    paint: Paint
    rotation: Tensor  # (3, 3) own axes -> world, applied from the right
    offset: Tensor    # (3,) world position of its origin, CO3D units
    scale: float      # CO3D units per own unit
    middle: Tensor    # (3,) of the ball around it, in the world
    radius: float     # of the ball, CO3D units
    lights: Tensor    # (L, 7) direction in its own axes, color, hardness of the shadow
    sky: Tensor       # (2, 3) light from below and from above

    @classmethod
    def of(cls, shape: Shape, room: Room, ball: tuple, paint: Paint, place: Place, lights: np.ndarray, sky: np.ndarray,
           device) -> Thing:
        """A thing at a place; `ball` is the middle (3,) and radius of all of it, own units."""
        middle, radius = ball
        rotation = tensor(place.rotation, device)
        offset = tensor(place.offset, device)
        middle = offset + place.scale * tensor(middle, device) @ rotation
        return cls(shape, room, paint, rotation, offset, place.scale, middle, radius * place.scale,
                   tensor(lights, device), tensor(sky, device))


# ---------------------------------------------------------------------------------------------- light

def render(thing: Thing, cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Linear color over black (V, 3, H, W), to `BRIGHTEST`, and coverage (V, 1, H, W), as `tracing.render` says."""
    return tracing.render(thing, thing.shape.surface(), partial(_shade, thing), cameras, height, width)


def _shade(thing: Thing, points: Tensor, directions: Tensor) -> Tensor:
    """Colors (R, 3) of surface points (R, 3) seen along unit directions (R, 3)."""
    result = []
    for at, view in zip(points.split(CHUNK[points.device.type]), directions.split(CHUNK[points.device.type])):
        result.append(_shade_some(thing, at, view))
    return torch.cat(result)


def _shade_some(thing: Thing, points: Tensor, directions: Tensor) -> Tensor:
    """As `_shade`, of so many points that memory holds everything about them."""
    shape = thing.shape

    # The surface: its normal, and whose it is.
    corners = torch.tensor(TETRAHEDRON, device=points.device)
    taps = shape.distance((points + TAP * corners[:, None]).flatten(0, 1)).reshape(4, -1)
    normal = F.normalize(taps.T @ corners, dim=-1)
    part = shape.distances(points)[:shape.solid].argmin(0)
    own = shape.local(points)[:, part, torch.arange(len(part), device=part.device)].T
    albedo = thing.paint.colors(part, own)
    metal = thing.paint.metal[part, None]
    roughness = thing.paint.roughness[part, None]

    # From all around: diffuse, and mirrored with Schlick's Fresnel term.
    openness = 1.0
    for reach, strength in OCCLUSIONS:
        free = thing.room.distance(points + reach * normal) / reach
        openness = openness - strength * (1 - free).clamp(0, 1)
    openness = openness[:, None]
    facing = -(directions * normal).sum(-1, keepdim=True)
    mirrored = directions + 2 * facing * normal
    base = torch.lerp(torch.full_like(albedo, REFLECTANCE), albedo, metal)
    fresnel = base + (1 - roughness) * (1 - base) * (1 - facing.clamp(0, 1)) ** 5
    diffuse = _sky(thing, normal) * openness
    shine = _sky(thing, mirrored) * openness * fresnel

    # From each light: Lambert's law, and a lobe of GGX (Walter et al. 2007) around the mirrored ray.
    alpha = roughness ** 2
    visible = _visible(thing.room, points + LIFT * normal, thing.lights)
    for light, seen in zip(thing.lights, visible):
        toward = light[:3]
        arriving = light[3:6] * (seen * (normal @ toward).clamp_min(0))[:, None]
        half = F.normalize(toward - directions, dim=-1)
        spread = (half * normal).sum(-1, keepdim=True) ** 2 * (alpha ** 2 - 1) + 1
        diffuse = diffuse + arriving
        shine = shine + arriving * base * alpha ** 2 / (4 * spread ** 2).clamp_min(1e-6)
    return (albedo * (1 - metal) * diffuse + shine).clamp(0, BRIGHTEST)


def _sky(thing: Thing, directions: Tensor) -> Tensor:
    """Light (R, 3) from around unit directions (R, 3): from below to above."""
    return torch.lerp(thing.sky[0], thing.sky[1], (directions[:, 1:2] + 1) / 2)


def _visible(room: Room, points: Tensor, lights: Tensor) -> Tensor:
    """How much of each light (L, 7) is to be seen from points (R, 3): (L, R) in [0, 1].

    The way to it is as open as its narrowest place is wide, as seen from the point [Quilez, "soft shadows", 2010].
    """
    toward = lights[:, None, :3]
    hardness = lights[:, 6:]
    seen = torch.ones(len(lights), len(points), device=points.device)
    t = torch.full_like(seen, LIFT)
    for _ in range(SHADOW_STEPS):
        way = points + t[..., None] * toward                             # (L, R, 3)
        free = room.distance(way.flatten(0, 1)).view_as(t)
        seen = torch.minimum(seen, hardness * free / t)
        t = t + free.clamp(0.05, 0.5)
    return seen.clamp(0, 1)
