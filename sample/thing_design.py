"""What the dice decide about a thing: its parts, their paint, and the light on it.

Four families: fruit, vessels (vases, bottles, bowls, cups), furniture, and assemblies of anything. The order in which
numbers are drawn is part of the format: another order makes other things of the same seed.
"""
from __future__ import annotations

import colorsys
import math
from dataclasses import replace

import numpy as np
import torch

from common.machine import randn
from sample.thing_render import OCTAVES, PATTERNS, WAVES, Paint, Thing
from sample.thing_shapes import Part, Room, Shape, assemble
from sample.toy_design import Dice, random_place

UPRIGHT = np.eye(3)
SHADES = 4      # colors that a material has
GAMMA = 2.2     # of photographs: paint is drawn as it looks, light adds up before
DARK = 0.2      # part of the things that are dark


def normals(dice: Dice, *shape: int) -> np.ndarray:
    """Standard normal numbers of a shape."""
    return randn(*shape, generator=dice.generator, device="cpu").double().numpy()


def random_axes(dice: Dice) -> np.ndarray:
    """A random rotation, (3, 3)."""
    return np.linalg.qr(normals(dice, 3, 3))[0]


# ---------------------------------------------------------------------------------------------- outlines
# From half width and half height to points (N, 2), see `Part.outline`.

def super_ellipse(width: float, height: float, dice: Dice) -> np.ndarray:
    """From a spindle (1.5) over an ellipse (2) to nearly a rectangle (6)."""
    angle = np.linspace(0, math.pi, 48)
    power = 2 / dice.choice([2.0, dice.uniform(1.5, 2.5), dice.uniform(2.5, 6)])
    rho = np.sin(angle) ** power
    y = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** power
    return np.stack([width * rho, height * y], 1)


def rectangle(width: float, height: float, rounding: float) -> np.ndarray:
    """With rounded corners: a box, plate, rod, cylinder, capsule."""
    angle = np.linspace(0, math.pi / 2, 8)
    r = rounding * min(width, height)
    corner = np.stack([width - r + r * np.sin(angle), height - r + r * np.cos(angle)], 1)
    return np.concatenate([[[0, height]], corner, corner[::-1] * [1, -1], [[0, -height]]])


def fruit(width: float, height: float, dice: Dice) -> np.ndarray:
    """A ball with a dent above and below, thicker below or above: apple, pear, egg, pepper."""
    angle = np.linspace(0, math.pi, 64)
    above = dice.uniform(0, 0.35) * np.exp(-(angle / 0.45) ** 2)
    below = dice.uniform(0, 0.2) * np.exp(-((math.pi - angle) / 0.35) ** 2)
    radius = (1 - above - below) * (1 + dice.uniform(-0.25, 0.15) * np.cos(angle))
    return np.stack([width * radius * np.sin(angle), height * radius * np.cos(angle)], 1)


def spline(width: float, height: float, dice: Dice) -> np.ndarray:
    """Through three to seven random radii: vases, spindles, bells; a bottle's are its belly, shoulder and neck."""
    radii = np.array([dice.uniform(0.25, 1) for _ in range(dice.choice([3, 4, 5, 7]))])
    if dice.uniform() < 0.25:
        radii = np.array([dice.uniform(0.25, 0.4), dice.uniform(0.25, 0.35), 0.9, 1, dice.uniform(0.8, 1)])

    # Between two of them half a wave.
    place = np.linspace(0, len(radii) - 1, 48)
    left = np.minimum(place.astype(int), len(radii) - 2)
    blend = (1 - np.cos((place - left) * math.pi)) / 2
    radius = radii[left] * (1 - blend) + radii[left + 1] * blend
    side = np.stack([width * radius / radii.max(), np.linspace(height, -height, 48)], 1)
    return np.concatenate([[[0, height]], side, [[0, -height]]])


def ring(width: float, dice: Dice) -> np.ndarray:
    """A torus, thin or thick, round or flat."""
    angle = np.linspace(0, 2 * math.pi, 32)
    thick = width * dice.uniform(0.12, 0.35)
    return np.stack([width - thick + thick * np.cos(angle), thick * dice.uniform(0.5, 1.5) * np.sin(angle)], 1)


# ---------------------------------------------------------------------------------------------- parts

def random_part(dice: Dice, size: float, axes: np.ndarray, thin: bool) -> Part:
    """Any part, about `size` large, with its middle at the origin."""
    kind = dice.choice(["rod", "plate"] if thin else ["box", "ellipsoid", "capsule", "ring", "spline", "fruit"],
                       None if thin else [5, 4, 2, 2, 4, 2])
    width = size * dice.uniform(0.5, 1.0)
    height = size * dice.uniform(0.4, 1.1)
    power = dice.choice([2.0, dice.uniform(2, 4), 8.0], [3, 1, 1])
    squash = dice.choice([1.0, dice.uniform(0.5, 1)])
    outlines = {
        "rod": lambda: rectangle(dice.uniform(0.06, 0.12), 1.3 * size, dice.uniform(0.1, 1)),
        "plate": lambda: rectangle(size, dice.uniform(0.06, 0.1), dice.uniform(0.1, 1)),
        "box": lambda: rectangle(width, height, dice.uniform(0.05, 0.5)),
        "ellipsoid": lambda: super_ellipse(width, height, dice),
        "capsule": lambda: rectangle(0.5 * width, size, 1.0),
        "ring": lambda: ring(size, dice),
        "spline": lambda: spline(width, height, dice),
        "fruit": lambda: fruit(width, height, dice),
    }
    if kind in ("capsule", "ring", "spline", "fruit"):
        power = 2.0
    if kind == "box":
        power = dice.choice([2.0, 8.0], [1, 2])
    return Part(outlines[kind](), np.zeros(3), axes, power, squash)


def attach(part: Part, to: Part, dice: Dice) -> Part:
    """The part with its middle on the surface of another, or moved along its y axis, so that it sticks out of it."""
    at = to.point(dice.uniform(), dice.uniform(0, 2 * math.pi))
    height = part.size()[1]
    outward = math.copysign(1, part.axes[1] @ (at - to.center))
    return replace(part, center=at + outward * dice.uniform(0, 0.85) * height * part.axes[1])


def assembly(dice: Dice) -> tuple[list[Part], list[Part]]:
    """One to seven parts on one another, some of them twice, mirrored; one of five has a part cut out."""
    parts = [random_part(dice, dice.uniform(0.8, 1.2), UPRIGHT, False)]
    count = dice.choice([1, 2, 3, 4, 5, 6, 7])
    thin = dice.uniform() < 0.3
    while len(parts) < count:
        axes = dice.choice([UPRIGHT, UPRIGHT[[2, 0, 1]], UPRIGHT[[1, 2, 0]], random_axes(dice)], [3, 1, 1, 2])
        part = random_part(dice, dice.uniform(0.3, 0.75), axes, thin and dice.uniform() < 0.6)
        part = attach(part, dice.choice(parts, [2] + [1] * (len(parts) - 1)), dice)
        parts.append(part)
        if dice.uniform() < 0.35:
            parts.append(part.moved(np.diag([-1.0, 1, 1])))

    cut = []
    if dice.uniform() < 0.2:
        part = random_part(dice, dice.uniform(0.3, 0.6), random_axes(dice), False)
        cut = [replace(part, center=parts[0].point(dice.uniform(0.1, 0.9), dice.uniform(0, 2 * math.pi)))]
    return parts, cut


def fruit_with_stem(dice: Dice) -> tuple[list[Part], list[Part]]:
    """A fruit, often with a stem."""
    body = Part(fruit(dice.uniform(0.7, 1), dice.uniform(0.7, 1.2), dice), np.zeros(3), UPRIGHT, 2.0,
                dice.uniform(0.9, 1))
    top = body.outline[0, 1]
    stem = rectangle(dice.uniform(0.03, 0.07), 0.3, 0.5)
    tilt = dice.uniform(-0.3, 0.3)
    axes = np.array([[math.cos(tilt), -math.sin(tilt), 0], [math.sin(tilt), math.cos(tilt), 0], [0, 0, 1]])
    stems = [Part(stem, np.array([0, top + 0.1, 0]), axes, 2.0, 1.0)]
    return [body] + stems * (dice.uniform() < 0.6), []


def vessel(dice: Dice) -> tuple[list[Part], list[Part]]:
    """A vase, bottle, bowl or cup, two of three hollow, some with a handle or a pair of them."""
    width = dice.uniform(0.45, 1.0)
    height = dice.uniform(0.5, 1.2)
    sides = dice.choice([2.0, 6.0], [6, 1])
    outline = dice.choice([spline(width, height, dice), spline(width, height, dice),
                           rectangle(width, height, dice.uniform(0.05, 0.3)), super_ellipse(width, height, dice)])
    parts = [Part(outline, np.zeros(3), UPRIGHT, sides, dice.choice([1.0, dice.uniform(0.6, 1)], [4, 1]))]

    # A ring whose hole is beside the wall.
    if dice.uniform() < 0.4:
        at = parts[0].point(dice.uniform(0.35, 0.65), 0.0)
        handle = Part(ring(dice.uniform(0.3, 0.5) * height, dice), at, UPRIGHT[[0, 2, 1]], 2.0, dice.uniform(0.7, 1))
        parts += [handle] + [handle.moved(np.diag([-1.0, 1, 1]))] * (dice.uniform() < 0.25)

    # The same outline, thinner, from the ground up and out at the top.
    cut = []
    if dice.uniform() < 0.67:
        wall = dice.uniform(0.06, 0.12)
        inner = np.maximum(outline - [wall, 0], [0, wall - height])
        mouth = inner[:, 0][inner[:, 1] > 0.9 * height].max()
        inner = np.concatenate([[[0, 1.2 * height], [mouth, 1.2 * height]], inner[1:]])
        cut = [replace(parts[0], outline=inner)]
    return parts, cut


def furniture(dice: Dice) -> tuple[list[Part], list[Part]]:
    """A plate on rods, often with a back: tables, stools, chairs, shelves."""
    width = dice.uniform(0.6, 1.0)
    squash = dice.uniform(0.6, 1)
    power = dice.choice([2.0, 8.0], [1, 3])
    rounding = dice.uniform(0.1, 0.6)
    parts = [Part(rectangle(width, dice.uniform(0.05, 0.15), rounding), np.zeros(3), UPRIGHT, power, squash)]

    # Legs, a little apart at the ground.
    length = dice.uniform(0.3, 0.6)
    leg = rectangle(dice.uniform(0.05, 0.1), length, rounding)
    inset = dice.uniform(0.6, 0.85) * (0.7 if power == 2 else 1)
    apart = dice.uniform(0, 0.2)
    for x in (-1, 1):
        for z in (-1, 1):
            y_axis = np.array([-x * apart, 1, -z * apart]) / math.sqrt(1 + 2 * apart ** 2)
            x_axis = np.cross(y_axis, [0, 0, 1.0])
            x_axis /= np.linalg.norm(x_axis)
            axes = np.stack([x_axis, y_axis, np.cross(x_axis, y_axis)])
            top = np.array([x * inset * width, 0, z * inset * width * squash])
            parts.append(Part(leg, top - length * y_axis, axes, dice.choice([2.0, 8.0]), 1.0))

    # Back, arms or whatever stands on it.
    if dice.uniform() < 0.6:
        high = dice.uniform(0.4, 0.8)
        back = rectangle(high, dice.uniform(0.05, 0.12), rounding)
        z = -squash * width * 0.9
        parts.append(Part(back, np.array([0, high, z]), np.array([[0, 1.0, 0], [0, 0, 1], [1, 0, 0]]), power,
                          min(1.0, 0.9 * width / high)))
    for _ in range(dice.choice([0, 0, 1, 2])):
        parts.append(attach(random_part(dice, dice.uniform(0.2, 0.5), UPRIGHT, False), parts[0], dice))
    return parts, []


FAMILIES = [fruit_with_stem, vessel, furniture, assembly]


# ---------------------------------------------------------------------------------------------- paint and light

def palette(dice: Dice, dark: bool) -> np.ndarray:
    """Colors of one material before light, (SHADES, 3): relatives of one hue, or any."""
    hue = dice.choice([dice.uniform(), dice.uniform(-0.03, 0.15)])  # half of them from red over brown to yellow
    spread = dice.choice([0.03, 0.12, 1.0])
    saturation = dice.choice([dice.uniform(0, 0.25), dice.uniform(0.3, 0.95)], [1, 2])
    value = dice.uniform(0.15, 0.35) if dark else dice.uniform(0.45, 1.0)
    contrast = dice.uniform(0.15, 0.7)
    colors = []
    for _ in range(SHADES):
        shade = np.clip(value * (1 + dice.uniform(-contrast, contrast)), 0.06, 0.97)
        like = np.clip(saturation + dice.uniform(-0.2, 0.2), 0, 1)
        colors.append(colorsys.hsv_to_rgb((hue + dice.uniform(-spread, spread) / 2) % 1, like, shade))
    return np.array(colors) ** GAMMA


def random_paint(dice: Dice, dark: bool, glossy: bool) -> dict[str, np.ndarray]:
    """One row of `Paint`."""
    # Octaves fade, the smoother the faster.
    fade = dice.uniform(0.45, 1.0) ** np.arange(OCTAVES)
    pattern = dice.choice(list(PATTERNS), [24, 36, 9, 9, 6, 16])
    return {
        "shades": palette(dice, dark),
        "pattern": list(PATTERNS).index(pattern),
        "frequency": dice.uniform(1, 4) if pattern == "noise" else math.exp(dice.uniform(math.log(3), math.log(20))),
        "octaves": np.repeat(fade / np.linalg.norm(fade), WAVES // OCTAVES) / math.sqrt(WAVES / OCTAVES / 2),
        "axis": dice.choice([UPRIGHT[1], UPRIGHT[0], random_axes(dice)[0]]),
        "warp": dice.choice([0.0, dice.uniform(0, 1.5)]),
        "window": dice.uniforms((-math.pi, math.pi), (0.4, 1.2), (-0.3, 0.3), (0.15, 0.5)),
        "roughness": dice.uniform(0.15, 0.5) if glossy else dice.uniform(0.5, 1),
        "metal": float(glossy and dice.uniform() < 0.15),
    }


def random_shape(dice: Dice, device) -> tuple[Shape, Room, tuple[np.ndarray, float]]:
    """A shape in one piece, the room around it, and its ball: middle (3,) and radius, own units."""
    # Drawn anew until all of it hangs together: what is cut may leave pieces.
    whole = False
    while not whole:
        solid, cut = dice.choice(FAMILIES, [25, 27, 12, 36])(dice)
        turn = dice.choice([UPRIGHT, random_axes(dice)], [3, 1])
        solid, cut = ([part.moved(turn) for part in parts] for parts in (solid, cut))

        # Ripples, the lower the closer they are; parts that touch or that melt together.
        frequencies = dice.uniform(2, 14) * normals(dice, 3, 8) / math.sqrt(3)
        waves = np.concatenate([frequencies, 7 * normals(dice, 1, 8)])
        steepness = dice.choice([0.0, dice.uniform(0.02, 0.6)], [3, 2])
        ripple = min(steepness / np.linalg.norm(frequencies, axis=0).mean(), 0.08)
        blend = dice.choice([0.0, dice.uniform(0.02, 0.1)])

        shape = assemble(solid, cut, blend, waves, ripple, device)
        room = shape.room()
        middle, radius, whole = room.extent()
    return shape, room, (middle, radius)


def random_paints(dice: Dice, parts: int, device) -> Paint:
    """The paint of so many parts: one for all, or others."""
    dark = dice.uniform() < DARK
    glossy = dice.uniform() < 0.4
    one = random_paint(dice, dark, glossy)
    rows = [one] * parts
    if dice.uniform() < 0.6:
        rows = [dice.choice([one, random_paint(dice, dark, glossy)], [1, 2]) for _ in range(parts)]

    # Noise: waves of all directions, in every octave as many.
    octave = np.repeat(2.0 ** np.arange(OCTAVES), WAVES // OCTAVES)
    directions = normals(dice, 3, WAVES)
    directions *= octave / np.linalg.norm(directions, axis=0)
    return Paint.of(rows, np.concatenate([directions, 7 * normals(dice, 1, WAVES)]), device)


def random_lights(dice: Dice) -> tuple[np.ndarray, np.ndarray]:
    """One to three lights from above, the first of them the strongest, and light from below and above all around:
    `Thing.lights` and `Thing.sky`.
    """
    lights = []
    for i in range(dice.choice([1, 2, 3])):
        direction = normals(dice, 3) * [1, 0.5, 1] + [0, 0.9, 0]
        color = dice.color((0, 0.25), (1, 1)) * (dice.uniform(0.6, 1.4) if i == 0 else dice.uniform(0.1, 0.5))
        hardness = math.exp(dice.uniform(math.log(3), math.log(60)))
        lights.append([*direction / np.linalg.norm(direction), *color, hardness])
    above = dice.color((0, 0.2), (1, 1)) * dice.uniform(0.3, 0.7)
    below = dice.color((0, 0.3), (1, 1)) * dice.uniform(0.05, 0.3)
    return np.array(lights), np.stack([below, above])


def make_thing(generator: torch.Generator, device="cpu") -> Thing:
    """A random thing; its numbers are the next ones of the generator, which lives on the CPU."""
    dice = Dice(generator)
    shape, room, (middle, radius) = random_shape(dice, device)
    paint = random_paints(dice, shape.solid, device)

    # A cube whose corners are on the ball.
    half = radius / math.sqrt(3)
    place = random_place(middle - half, middle + half, dice)
    lights, sky = random_lights(dice)
    return Thing.of(shape, room, (middle, radius), paint, place, lights, sky, device)
