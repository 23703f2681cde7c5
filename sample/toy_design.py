"""What the dice decide about a toy before it is built: its colors, its kinds of parts, its sizes, and where it stands.

What the back carries is drawn without regard to the rest. Nothing in front gives its shape or its colors away: from two
pictures the unseen side is really uncertain, which is what SparseFusion is about (Sec. 1 of the paper).

The order in which numbers are drawn is part of the format: another order makes other toys of the same seed.
"""
from __future__ import annotations

import colorsys
import math

import numpy as np
import torch

from common.machine import rand
from sample.toy_shapes import Place

BADGES = ("disc", "square", "heart", "star", "plus")
KINDS = {
    "stance": ("standing", "sitting", "on fours"),
    "ears": ("round", "long", "pointed", "floppy", "antenna"),
    "hat": ("none", "cap", "beanie", "top hat"),
    "badge": BADGES,
    "back": ("backpack", "tail", "shell", "key", "emblem"),
}
RANGES = {
    "torso_width": (0.85, 1.2),   # half of it, toy units
    "head_size": (0.95, 1.35),    # half of it, toy units
    "head_boxiness": (0.0, 0.6),  # fraction of the extent that is box
    "eye_size": (0.2, 0.31),      # radius, toy units
    "ear_size": (0.8, 1.25),      # factor
    "arm_raise": (-1.2, 1.1),     # mean of both arms, radians above the horizontal
}
COLORED = ("body", "second", "badge", "hat", "back")

# The names of the numbers in `Toy.attributes`.
ATTRIBUTES = [f"{part} {channel}" for part in COLORED for channel in "rgb"]
ATTRIBUTES += [name.replace("_", " ") for name in RANGES]
ATTRIBUTES += [f"{kind}: {option}" for kind, options in KINDS.items() for option in options]

CREAM = np.array([1.0, 0.95, 0.86])
BROWN = np.array([0.35, 0.2, 0.2])
RED = np.array([0.85, 0.3, 0.35])
SLATE = np.array([0.25, 0.25, 0.4])


class Dice:
    """The random numbers of one toy."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number between `low` and `high`."""
        return low + (high - low) * rand(generator=self.generator, device="cpu").item()

    def uniforms(self, *ranges: tuple[float, float]) -> np.ndarray:
        """A number of every range (low, high), in their order."""
        return np.array([self.uniform(low, high) for low, high in ranges])

    def choice(self, options, weights=None):
        """One of the options, with chances in proportion to the weights, or all alike."""
        weights = torch.tensor(weights or [1] * len(options), dtype=torch.float)
        index = torch.multinomial(weights, 1, generator=self.generator).item()
        return options[index]

    def color(self, saturations=(0.55, 0.9), values=(0.8, 1.0), apart_from=(), apart=0.12) -> np.ndarray:
        """A color, (3,) in [0, 1], whose hue is at least `apart` (of a turn) from those given."""
        # Draw hues until one is far enough from all others.
        taken = [colorsys.rgb_to_hsv(*other)[0] for other in apart_from]
        hue = self.uniform()
        while any(_hue_distance(hue, other) < apart for other in taken):
            hue = self.uniform()

        saturation = self.uniform(*saturations)
        value = self.uniform(*values)
        return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def _hue_distance(first: float, second: float) -> float:
    """How far apart two hues are on the circle, in turns."""
    return abs((first - second + 0.5) % 1 - 0.5)


class Palette:
    """The colors of one toy, (3,) in [0, 1] each."""

    def __init__(self, dice: Dice):
        # What shows from the front has hues that can be told apart.
        self.body = dice.color((0.45, 0.85), (0.85, 1.0))
        self.second = dice.color((0.5, 0.9), (0.75, 1.0), [self.body])
        self.light = 0.35 * self.body + 0.65 * CREAM
        self.badge = dice.color((0.75, 0.95), (0.85, 1.0), [self.body, self.second], 0.14)
        self.hat = dice.color((0.6, 0.95), (0.75, 1.0), [self.body], 0.1)

        # The unseen side has any.
        self.back = dice.color((0.65, 0.95), (0.7, 1.0))
        self.back_second = dice.color((0.3, 0.95), (0.8, 1.0))

        # The face.
        self.nose = dice.choice((BROWN, RED, SLATE))
        self.iris = dice.color((0.5, 0.8), (0.45, 0.7))


class Design:
    """What is decided about one toy before it is built: colors, kinds (of KINDS), sizes (in RANGES)."""

    def __init__(self, dice: Dice):
        self.colors = Palette(dice)

        # Kinds. The emblem is what the back shows, as the badge is what the chest shows.
        self.stance = dice.choice(KINDS["stance"], [4, 3, 4])
        self.ears = dice.choice(KINDS["ears"])
        self.hat = dice.choice(KINDS["hat"])
        self.badge = dice.choice(BADGES)
        self.back = dice.choice(KINDS["back"], [3, 2, 2, 2, 2])
        self.emblem = dice.choice(BADGES)

        # Sizes. Two heads of three are round.
        self.torso_width = dice.uniform(*RANGES["torso_width"])
        self.head_size = dice.uniform(*RANGES["head_size"])
        self.head_boxiness = dice.choice([0.0, dice.uniform(0.3, 0.6)], [2, 1])
        self.eye_size = dice.uniform(*RANGES["eye_size"])
        self.ear_size = dice.uniform(*RANGES["ear_size"])

        # Arms, in radians above the horizontal.
        self.left_arm = dice.uniform(*RANGES["arm_raise"])
        self.right_arm = dice.uniform(*RANGES["arm_raise"])
        self.arm_raise = (self.left_arm + self.right_arm) / 2

    @property
    def on_fours(self) -> bool:
        """Whether the toy stands on hands and feet."""
        return self.stance == "on fours"

    def attributes(self) -> list[float]:
        """The numbers ATTRIBUTES, each in [0, 1]."""
        # Colors; where there is no hat, it counts as black.
        numbers = []
        for part in COLORED:
            color = getattr(self.colors, part)
            if part == "hat" and self.hat == "none":
                color = np.zeros(3)
            numbers += color.tolist()

        # Sizes as fractions of their ranges, kinds as zeros and ones.
        for name, (low, high) in RANGES.items():
            numbers.append((getattr(self, name) - low) / (high - low))
        for kind, options in KINDS.items():
            numbers += [float(getattr(self, kind) == option) for option in options]
        return numbers


def random_place(low: np.ndarray, high: np.ndarray, dice: Dice) -> Place:
    """A place for a figure between the corners `low` and `high`, (3,) each, in toy units.

    It is near the world's origin, turned anyhow about the vertical. The toy fits the field's cube [-4, 4]^3 there.
    """
    # Size: the radius, in CO3D units, of the ball around it.
    radius = dice.uniform(3.0, 3.3)
    scale = radius / (np.linalg.norm(high - low) / 2)

    # Direction.
    yaw = dice.uniform(0, 2 * math.pi)
    cos = math.cos(yaw)
    sin = math.sin(yaw)
    rotation = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])

    # A sun well above the horizon.
    azimuth = dice.uniform(0, 2 * math.pi)
    elevation = dice.uniform(0.65, 1.1)
    level = math.cos(elevation)
    sun_x = level * math.cos(azimuth)
    sun_z = level * math.sin(azimuth)
    sun = np.array([sun_x, math.sin(elevation), sun_z])

    # The middle of the toy comes near the origin.
    near_origin = dice.uniforms((-0.2, 0.2), (-0.2, 0.2), (-0.2, 0.2))
    middle = (low + high) / 2
    offset = near_origin - middle @ rotation * scale

    # A backdrop that is lighter above.
    color = dice.color((0.08, 0.3), (0.55, 0.85))
    backdrop = np.stack([color * 1.12, color * 0.8])
    return Place(rotation, offset, float(scale), sun, backdrop)
