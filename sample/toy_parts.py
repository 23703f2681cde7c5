"""The parts of a toy: torso and limbs, head and face, clothes, and what it carries on its back.

Each function adds primitives and paint to a `Figure`, as a `Design` says, and leaves the rest to the dice. The order
of drawing and of adding is part of the format (see `toy_design.py`). Axes and units are those of `toy_shapes.py`:
numbers are toy units, or fractions of half extents.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from sample.toy_design import Design, Dice
from sample.toy_shapes import FRONT, LEFT, UP, Block, Figure, upright_axes

LIMBS = ["left arm", "right arm", "legs", "hind legs"]

BEAK = np.array([1.0, 0.62, 0.12])
EYEBALL = np.array([0.97, 0.97, 0.95])
GLINT = np.ones(3)
DARK = np.array([0.1, 0.08, 0.12])
CHEEK = np.array([1.0, 0.5, 0.5])


# ---------------------------------------------------------------------------------------------- torso and limbs

class Hand(NamedTuple):
    """The end of an arm: where it is, and the way there from the shoulder, (3,) each."""
    arm: str
    at: np.ndarray
    reach: np.ndarray


def add_body(figure: Figure, design: Design, dice: Dice) -> list[Hand]:
    """Torso, limbs and feet, in one of three stances. Returns the hands, if there are any."""
    boxiness = dice.choice([0.0, 0.35, 0.55], [3, 1, 1])
    arm = dice.uniform(0.25, 0.34)
    leg = dice.uniform(0.3, 0.4)

    # The torso: its half extents, and how far it is off the ground.
    if design.on_fours:
        width = 0.9 * design.torso_width
        height = dice.uniform(0.75, 0.95)
        depth = dice.uniform(1.15, 1.5)
        clearance = dice.uniform(0.75, 1.15)
        middle = clearance + 0.7 * height
    else:
        width = design.torso_width
        height = dice.uniform(0.95, 1.3)
        depth = dice.uniform(0.75, 0.95)
        clearance = 0.1 if design.stance == "sitting" else dice.uniform(0.55, 0.95)
        middle = clearance + 0.9 * height
    torso = Block(np.array([0, middle, 0]), np.array([width, height, depth]))

    # Limbs, and the torso between them.
    hands = []
    if design.on_fours:
        _add_four_legs(figure, design, torso, leg)
    else:
        hands = _add_arms(figure, design, dice, torso, arm)
        _add_two_legs(figure, design, torso, leg, clearance)
    figure.add_block("torso", torso, boxiness, design.colors.body)
    return hands


def _add_arms(figure: Figure, design: Design, dice: Dice, torso: Block, radius: float) -> list[Hand]:
    """Two arms, each raised by an angle of its own and stretched forward somewhat."""
    hands = []
    for arm, side, angle in (("left arm", 1, design.left_arm), ("right arm", -1, design.right_arm)):
        # From near the top of the torso, mostly sideways.
        forward = dice.uniform(0, 0.55)
        length = dice.uniform(0.85, 1.15)
        shoulder = torso.at(side * 0.8, 0.45) + [0, 0, 0.05]
        reach = length * np.array([side * math.cos(angle), math.sin(angle), forward])
        hand = shoulder + reach
        figure.add_limb(arm, shoulder, hand, radius, design.colors.body)
        hands.append(Hand(arm, hand, reach))
    return hands


def _add_four_legs(figure: Figure, design: Design, torso: Block, radius: float):
    width, _, depth = torso.half
    top = torso.center[1] - 0.1
    for legs, feet, z in (("legs", "feet", 0.62 * depth), ("hind legs", "hind feet", -0.66 * depth)):
        # The legs spread a little; the feet stick out in front.
        hip = (0.58 * width, top, z)
        ankle = (0.66 * width, radius, z)
        foot = (0.68 * width, 0.2, z + 0.16)
        figure.add_limb(legs, hip, ankle, radius, design.colors.body, pair=True)
        figure.add(feet, foot, (radius + 0.06, 0.24, radius + 0.16), design.colors.second, pair=True)


def _add_two_legs(figure: Figure, design: Design, torso: Block, radius: float, clearance: float):
    width = torso.half[0]
    if design.stance == "sitting":
        # Stretched forward, the soles in front.
        hip = (0.5 * width, 0.38, 0.4)
        ankle = (0.85 * width, 0.36, 1.35)
        foot = (0.88 * width, 0.5, 1.6)
        radii = (0.36, 0.5, 0.24)
    else:
        # Nearly upright, the soles on the ground.
        hip = (0.48 * width, clearance + 0.3, 0)
        ankle = (0.55 * width, radius, 0)
        foot = (0.58 * width, 0.24, 0.2)
        radii = (0.4, 0.26, 0.58)
    figure.add_limb("legs", hip, ankle, radius, design.colors.body, pair=True)
    figure.add("feet", foot, radii, design.colors.second, pair=True)


# ---------------------------------------------------------------------------------------------- head

def add_head(figure: Figure, design: Design, dice: Dice):
    """Head, ears and face."""
    torso = figure.block("torso")
    half = design.head_size * dice.uniforms((1.0, 1.15), (0.85, 1.0), (0.82, 0.95))

    # It sits on top of the torso, on fours on its front end.
    if design.on_fours:
        center = torso.at(0, 0.75, 0.85) + half * [0, 0.55, 0.45]
    else:
        center = torso.at(0, 1) + half * [0, 0.78, 0.08]
    head = Block(center, half)
    figure.add_block("head", head, design.head_boxiness, design.colors.body)

    # What is on it.
    EARS[design.ears](figure, design, dice, head)
    _add_face(figure, design, dice, head)


def _add_round_ears(figure: Figure, design: Design, dice: Dice, head: Block):
    size = design.ear_size
    at = head.at(0.78, 0.78) - [0, 0, 0.05]
    figure.add("ears", at, (0.46 * size, 0.46 * size, 0.2), design.colors.body, pair=True)
    figure.paint("disc", "ears", at, 0.28 * size, design.colors.light, pair=True)


def _add_long_ears(figure: Figure, design: Design, dice: Dice, head: Block):
    # They point upwards, somewhat outwards and backwards.
    size = design.ear_size
    up = np.array([dice.uniform(0.1, 0.5), 1.0, -0.1])
    at = head.at(0.4, 0.85) - [0, 0, 0.1] + 0.6 * size * up
    radii = (0.25 * size, 0.95 * size, 0.17)
    inside = (0.13 * size, 0.7 * size, 1)
    figure.add("ears", at, radii, design.colors.body, axes=upright_axes(up), pair=True)
    figure.paint("disc", "ears", at, inside, design.colors.light, up, pair=True)


def _add_pointed_ears(figure: Figure, design: Design, dice: Dice, head: Block):
    # Squares that stand on a corner, half of them inside the head.
    size = design.ear_size
    up = (1.0, 0.75, 0)
    at = head.at(0.62, 0.72) - [0, 0, 0.05]
    box = (0.36 * size, 0.36 * size, 0.06)
    figure.add("ears", at, 0.08, design.colors.body, box, upright_axes(up), pair=True)
    figure.paint("square", "ears", at, 0.3 * size, design.colors.light, up, pair=True)


def _add_floppy_ears(figure: Figure, design: Design, dice: Dice, head: Block):
    size = design.ear_size
    down = np.array([dice.uniform(0.2, 0.6), -1.0, 0.1])
    at = head.at(0.92, 0.42) + 0.4 * size * down
    radii = (0.16, 0.62 * size, 0.32 * size)
    figure.add("ears", at, radii, design.colors.second, axes=upright_axes(down), pair=True)


def _add_antennae(figure: Figure, design: Design, dice: Dice, head: Block):
    size = design.ear_size
    root = head.at(0.35, 0.8)
    tip = head.at(0.55, 1) + [0, 0.6 * size, 0]
    figure.add_limb("antennae", root, tip, 0.08, design.colors.second, pair=True, hard=True)
    figure.add("ears", tip, 0.2 * size, design.colors.badge, pair=True, hard=True)


EARS = {"round": _add_round_ears, "long": _add_long_ears, "pointed": _add_pointed_ears, "floppy": _add_floppy_ears,
        "antenna": _add_antennae}


def _add_face(figure: Figure, design: Design, dice: Dice, head: Block):
    """Eyes, snout or beak, and cheeks."""
    width, height, _ = head.half
    middle = head.center[1]

    # Where things are: the eyes at the sides and above the middle of the head, the mouth below it.
    eye_x = dice.uniform(0.36, 0.5) * width
    eye_y = middle + dice.uniform(0.05, 0.25) * height
    has_beak = dice.uniform() < 0.2
    mouth_y = middle - dice.uniform(0.3, 0.42) * height
    depth = dice.uniform(0.22, 0.4)

    # Snouts are light and have a nose; beaks are bare and stick out farther.
    mouth = figure.front_of("head", 0, mouth_y)
    if has_beak:
        figure.add("snout", mouth, (0.34, 0.2, depth + 0.3), BEAK, hard=True)
    else:
        _add_snout(figure, design, dice, head, mouth, depth)

    # Cheeks are below the eyes, paint only.
    cheek = (eye_x + 0.3 * width, mouth_y + 0.12, 0)
    figure.paint("disc", "head", cheek, (0.17, 0.13, 1), CHEEK, pair=True)
    _add_eyes(figure, design, dice, figure.front_of("head", eye_x, eye_y))


def _add_snout(figure: Figure, design: Design, dice: Dice, head: Block, at: np.ndarray, depth: float):
    """A snout with a nose and a mouth."""
    width, height, _ = head.half
    snout_width = dice.uniform(0.42, 0.6) * width
    figure.add("snout", at, (snout_width, 0.3 * height, depth), design.colors.light)

    # The nose is on the upper half of its front.
    y = at[1]
    tip = figure.front_of("snout", 0, y + 0.16 * height)
    nose_width, nose_height = dice.uniforms((0.14, 0.22), (0.1, 0.15))
    figure.add("nose", tip, (nose_width, nose_height, 0.12), design.colors.nose, hard=True)

    # The mouth is an arc, and a line from it up to the nose.
    arc = (0.26 * width, 0.17 * height, 1)
    figure.paint("smile", "snout", (0, y + 0.02, 0), arc, DARK)
    figure.paint("bar", "snout", (0, y - 0.02, 0), (0.045, 0.12, 1), DARK)


def _add_eyes(figure: Figure, design: Design, dice: Dice, at: np.ndarray):
    """A pair of eyes at a point of the head's surface, with iris, pupil and glint."""
    radius = design.eye_size
    center = at - [0, 0, 0.3 * radius]
    radii = (radius, radius * dice.uniform(1.0, 1.3), radius * 0.7)
    figure.add("eyes", center, radii, EYEBALL, pair=True, hard=True)

    # They squint a little, towards the nose.
    iris = radius * dice.uniform(0.5, 0.68)
    gaze = center + [-0.12 * radius, -0.05 * radius, 0]
    glint = center + [0.1 * radius, 0.22 * radius, 0]
    figure.paint("disc", "eyes", gaze, iris, design.colors.iris, pair=True)
    figure.paint("disc", "eyes", gaze, 0.72 * iris, DARK, pair=True)
    figure.paint("disc", "eyes", glint, 0.3 * iris, GLINT, pair=True)


# ---------------------------------------------------------------------------------------------- clothes

def add_clothes(figure: Figure, design: Design, dice: Dice, hands: list[Hand]):
    """Pattern, gloves and badge of the body, and a hat."""
    _paint_pattern(figure, design, dice)
    for hand in hands:
        # A glove is all that lies beyond the wrist.
        wrist = hand.at - 0.12 * hand.reach
        figure.paint("half", hand.arm, wrist, 1, design.colors.second, hand.reach, (0.1, 0.2, 1), through=True)
    _paint_badge(figure, design, dice)
    _add_hat(figure, design)


def _paint_pattern(figure: Figure, design: Design, dice: Dice):
    """Stripes, spots, trousers, or a plain body with a light belly."""
    torso = figure.block("torso")
    color = design.colors.second
    pattern = dice.choice(["plain", "stripes", "spots", "trousers"])

    if pattern == "stripes":
        # Around the torso from end to end, half of the time also around the limbs.
        everywhere = dice.uniform() < 0.5
        parts = ["torso", *LIMBS] if everywhere else ["torso"]
        start = torso.center + [0, dice.uniform(), 0]
        period = dice.uniform(0.42, 0.65)
        up, front = (FRONT, UP) if design.on_fours else (UP, FRONT)
        figure.paint("stripes", parts, start, period, color, up, front, through=True)

    elif pattern == "spots":
        # On the torso and the limbs; animals on fours have them on the head, too.
        parts = ["torso", *LIMBS, "head"] if design.on_fours else ["torso", *LIMBS]
        start = torso.center + [dice.uniform(), dice.uniform(), 0]
        period = dice.uniform(0.6, 0.8)
        figure.paint("spots", parts, start, period, color, through=True)

    elif pattern == "trousers":
        parts = ["torso", "legs", "hind legs"]
        belt = torso.at(0, -dice.uniform(0, 0.45))
        figure.paint("half", parts, belt, 1, color, (0, -1, 0), through=True)

    elif not design.on_fours:
        # A belly.
        width, height, _ = torso.half
        center = torso.center - [0, 0.1, 0]
        figure.paint("disc", "torso", center, (0.66 * width, 0.72 * height, 1), design.colors.light)


def _paint_badge(figure: Figure, design: Design, dice: Dice):
    """The badge and a light rim around it: on the chest, or on both flanks."""
    torso = figure.block("torso")
    if design.on_fours:
        at = torso.center + [0, 0.05, -0.1]
        front = LEFT
        size = 0.44
    else:
        at = torso.at(0, 0.12)
        front = FRONT
        size = dice.uniform(0.4, 0.5)

    # The rim is a larger badge below it.
    both = design.on_fours
    figure.paint(design.badge, "torso", at, 1.25 * size, design.colors.light, UP, front, both)
    figure.paint(design.badge, "torso", at, size, design.colors.badge, UP, front, both)


def _add_hat(figure: Figure, design: Design):
    """A cap, a beanie, a top hat or none. Cap and beanie are paint on the head, with a visor or a pompom."""
    colors = design.colors
    head = figure.primitives["head"]
    _, y, z = head.center
    width, height, _ = head.block.half
    tilt = (0, 1, -0.15)  # the rim is higher in front

    if design.hat in ("cap", "beanie"):
        rim = (0, y + 0.42 * height, z)
        figure.paint("half", "head", rim, 1, colors.hat, tilt, through=True)

    if design.hat == "cap":
        at = figure.front_of("head", 0, y + 0.5 * height) + [0, 0, 0.12]
        figure.add("visor", at, (0.72 * width, 0.09, 0.5), colors.hat, hard=True)

    elif design.hat == "beanie":
        hem = (0, y + 0.45 * height, z)
        top = (0, y + height + 0.12, z)
        figure.paint("bar", "head", hem, (9, 0.1, 1), colors.badge, tilt, through=True)
        figure.add("pompom", top, 0.3, colors.badge, hard=True)

    elif design.hat == "top hat":
        # Brim and crown are thick discs; a ribbon goes around the crown.
        brim = y + head.box[1] + 0.96 * head.radii[1]
        crown = (0, brim + 0.4, z)
        ribbon = (0, brim + 0.18, z)
        figure.add("brim", (0, brim, z), (0.72, 0.06, 0.72), colors.hat, (0, 0.02, 0), hard=True)
        figure.add("crown", crown, (0.46, 0.08, 0.46), colors.hat, (0, 0.34, 0), hard=True)
        figure.paint("bar", "crown", ribbon, (9, 0.13, 1), colors.badge, through=True)


# ---------------------------------------------------------------------------------------------- the unseen side

class Rear(NamedTuple):
    """Where a toy carries what is not seen from the front: on its back, or, on fours, on top."""
    spot: np.ndarray  # (3,) the middle of the surface there
    out: np.ndarray   # (3,) unit vector away from the body
    up: np.ndarray    # (3,) unit vector that points up for one who looks at it
    depth: float      # half extents of the torso along `out` and along `up`
    height: float

    def axes(self) -> np.ndarray:
        """The axes of things that lie on it, as rows: x, y up and z away from the body. (3, 3)"""
        return np.stack([np.cross(self.up, self.out), self.up, self.out])


def add_back(figure: Figure, design: Design, dice: Dice):
    """What the unseen side holds."""
    torso = figure.block("torso")
    out = np.array(UP if design.on_fours else (0, 0, -1.0))
    up = np.array(FRONT if design.on_fours else UP)

    # How large the torso is in these directions.
    depth = np.abs(out) @ torso.half
    height = np.abs(up) @ torso.half
    rear = Rear(torso.center + out * depth, out, up, depth, height)
    BACKS[design.back](figure, design, dice, rear)


def _add_backpack(figure: Figure, design: Design, dice: Dice, rear: Rear):
    half = dice.uniforms((0.45, 0.62), (0.5, 0.65), (0.22, 0.36))
    width, height, depth = half
    at = rear.spot + rear.out * 0.5 * depth + rear.up * 0.1 * rear.height
    figure.add("backpack", at, 0.14, design.colors.back, half - 0.14 + [0, 0, 0.08], rear.axes(), hard=True)

    # A pocket is low on it.
    pocket = at + rear.out * (depth + 0.1) - rear.up * 0.42 * height
    figure.add("pocket", pocket, 0.1, design.colors.back_second, (0.5 * width, 0.2, 0.1), rear.axes(), hard=True)

    # The emblem is high on it.
    emblem = at + rear.up * 0.45 * height
    figure.paint(design.emblem, "backpack", emblem, 0.26, design.colors.back_second, rear.up, rear.out)


def _add_tail(figure: Figure, design: Design, dice: Dice, rear: Rear):
    colors = design.colors
    root = figure.block("torso").at(0, -0.35, -0.85)
    is_stub = dice.uniform() < 0.4
    if is_stub:
        # A ball.
        center = root + [0, 0.05, -0.3]
        figure.add("tail", center, dice.uniform(0.36, 0.5), colors.back, hard=True)
    else:
        # Two limbs: out, then up; the end has another color.
        bend = root + [0, 0.05, -0.6]
        tip = root + [0, dice.uniform(0.7, 1.4), dice.uniform(-1.0, -0.6)]
        border = 0.4 * bend + 0.6 * tip
        figure.add_limb("tail", root, bend, 0.2, colors.back)
        figure.add_limb("tail tip", bend, tip, 0.2, colors.back)
        figure.paint("half", "tail tip", border, 1, colors.back_second, tip - bend, (0, 0.3, 1), through=True)

    above = rear.spot + rear.up * 0.15 * rear.height
    _paint_emblem(figure, design, dice, rear, above, 0.8)


def _add_shell(figure: Figure, design: Design, dice: Dice, rear: Rear):
    # As wide and as tall as the torso, nearly.
    width = figure.block("torso").half[0]
    radii = (0.85 * width, 0.85 * rear.height, 0.5)
    center = rear.spot - rear.out * 0.15
    figure.add("shell", center, radii, design.colors.back, axes=rear.axes(), hard=True)
    figure.paint("spots", "shell", rear.spot, 0.62, design.colors.back_second, rear.up, rear.out, through=True)


def _add_key(figure: Figure, design: Design, dice: Dice, rear: Rear):
    # A wind-up key: the stem comes out of the body.
    root = rear.spot + rear.up * 0.15 * rear.height
    inside = root - rear.out * 0.1
    end = root + rear.out * 0.5
    figure.add_limb("stem", inside, end, 0.1, design.colors.back, hard=True)

    # Two lobes with holes, which are only painted.
    lobe = root + rear.out * 0.62 + [0.3, 0, 0]
    axes = np.stack([LEFT, rear.out, rear.up])
    figure.add("key", lobe, (0.34, 0.34, 0.13), design.colors.back, axes=axes, pair=True, hard=True)
    figure.paint("disc", "key", lobe, 0.16, design.colors.back_second, rear.out, rear.up, pair=True, through=True)

    below = root - rear.up * 0.6 * rear.height
    _paint_emblem(figure, design, dice, rear, below, 0.8)


def _add_emblem(figure: Figure, design: Design, dice: Dice, rear: Rear):
    _paint_emblem(figure, design, dice, rear, rear.spot, 1.4)


BACKS = {"backpack": _add_backpack, "tail": _add_tail, "shell": _add_shell, "key": _add_key, "emblem": _add_emblem}


def _paint_emblem(figure: Figure, design: Design, dice: Dice, rear: Rear, at: np.ndarray, factor: float):
    """The emblem on the torso itself, `factor` times as large as usual."""
    size = dice.uniform(0.34, 0.48) * factor
    inside = at - 0.5 * rear.depth * rear.out  # so that a round surface is in front of it, too
    figure.paint(design.emblem, "torso", inside, size, design.colors.back_second, rear.up, rear.out)
