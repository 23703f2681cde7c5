"""The sample category: synthetic toys, written to disk as a CO3Dv2 tree. Nothing in it is a photograph of anything.

    python sample/toys.py --root DIR --instances N --seed S [--views V] [--device D]

Each toy is an animal or robot of about 20 signed-distance primitives with random proportions and colours, painted with stripes or
spots, a face and a badge in front. Its back carries a backpack, a tail, a shell, a wind-up key or only an emblem, of shapes and
colours that nothing in front gives away: from two pictures the unseen side is really uncertain, which is what SparseFusion is about.
The tree mimics what CO3D has (Sec. 4 of the paper): rectangular off-centre pictures before a backdrop, soft masks, turntable cameras
with jitter, both intrinsics formats, and CO3D's scale (the toy fits the field's cube [-4, 4]^3; cameras about 10 units away).
Shading has no view-dependent term, because the field has none.

A toy depends on (seed, index) only, not on how many are made; the same seed on the same device gives the same bytes.
Seeds: 1-99 train the nano models, 1000 is the shipped `sample/co3d`, 2000 the reported evaluation, 3000 tuning.

How it renders: coarse rays, one per block of 4 x 4 pixels, march until the block's cone may touch the toy; then the 2 x 2 rays of every
pixel of those blocks do. All primitives share one formula, so they are an axis of a tensor; left-right pairs share a row.

Letters: `P` primitives, `R` rays or points, `V` views, `H W` rows and columns.
Toy axes: +x the toy's left, +y up, +z where it looks; toy units: a standing toy is about 5 high, before it is scaled.
"""
from __future__ import annotations

import argparse
import colorsys
import gzip
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, the modules lie one folder up
from cameras import Cameras, look_at  # noqa: E402

CATEGORY = "toys"
LONG_SIDE, SHORT_SIDE = 192, 144  # pixels; the crop of a toy (its mask's box grown by 30 %) is then about 128
SUPER, BLOCK = 2, 8               # rays per pixel side; rays per side of a coarse block
COARSE_STEPS, FINE_STEPS = 16, 40  # of sphere tracing, multiples of 4
BLEND = 0.09                      # toy units: how far body parts melt into each other (log-sum-exp union)
SURFACE, STRIDE = 0.003, 0.004    # toy units: a ray this near has arrived; step n is at least n strides, so that grazing rays get on
BADGES = ("disc", "square", "heart", "star", "plus")
KINDS = {"stance": ("standing", "sitting", "on fours"), "ears": ("round", "long", "pointed", "floppy", "antenna"),
         "hat": ("none", "cap", "beanie", "top hat"), "badge": BADGES, "back": ("backpack", "tail", "shell", "key", "emblem")}
RANGES = {"torso width": (0.85, 1.2), "head size": (0.95, 1.35), "head boxiness": (0, 0.6), "eye size": (0.2, 0.31),
          "ear size": (0.8, 1.25), "arm raise": (-1.2, 1.1)}  # toy units, but fractions of boxiness and radians above the horizontal
ATTRIBUTES = (*(f"{part} {c}" for part in ("body", "second", "badge", "hat", "back") for c in "rgb"), *RANGES,
              *(f"{kind}: {option}" for kind, options in KINDS.items() for option in options))
CHUNK = {"cpu": 1 << 12, "cuda": 1 << 21}  # points at a time: a CPU wants (3, P, R) numbers in its caches, a GPU wants to be full


# ---- a toy: primitives, paint, place --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Decal:
    """Paint: a flat shape projected along its own third axis onto some of the primitives."""
    shape: str            # a key of SHAPES
    parts: list[int]      # the primitives that take the paint
    frame: Tensor         # (3, 5): (x, |x|, y, z, 1) -> coordinates in which the shape has radius 1 and faces +z
    color: Tensor         # (3,) in [0, 1]
    edge: float           # width of the soft edge, in shape radii
    through: bool         # painted on both sides, not only where the third coordinate is positive


@dataclass(frozen=True)
class Toy:
    """P primitives, each a box inflated by an ellipsoid (box 0: ellipsoid; equal radii: rounded box or capsule), and where they stand."""
    frames: Tensor        # (3, P, 5): (x, |x|, y, z, 1) -> axes of each primitive, in units of its radii; |x| makes a mirrored pair
    box: Tensor           # (3, P) half extents of the box, in units of the radii
    inverse_radii: Tensor  # (3, P) per toy unit
    blended: int          # the first so many primitives melt into each other
    colors: Tensor        # (P, 3) in [0, 1]
    decals: list[Decal]   # in order of painting
    rotation: Tensor      # (3, 3) toy -> world, applied from the right
    offset: Tensor        # (3,) world position of the toy's origin, CO3D units
    scale: float          # CO3D units per toy unit
    light: Tensor         # (3,) unit vector towards the light, in the toy's axes
    backdrop: Tensor      # (2, 3) colours at the top and the bottom of its photographs
    attributes: list[float] = field(repr=False)  # the numbers ATTRIBUTES, in [0, 1]
    parts: dict[str, int] = field(repr=False)    # name -> primitive

    def to_toy(self, points: Tensor) -> Tensor:
        """World points (R, 3) in toy units (R, 3)."""
        return (points - self.offset) @ self.rotation.T / self.scale


def _axes(up, front=(0.0, 0.0, 1.0)) -> np.ndarray:
    """Rows: an orthonormal frame whose y axis is `up`, z axis as near to `front` as can be. (3, 3)"""
    y = np.asarray(up, float) / np.linalg.norm(up)
    x = np.cross(y, front)
    x = x / np.linalg.norm(x) if np.linalg.norm(x) > 1e-3 else np.array([1.0, 0.0, 0.0])
    return np.stack([x, y, np.cross(x, y)])


def _affine(axes: np.ndarray, center, size, pair: bool) -> np.ndarray:
    """The map (x, |x|, y, z, 1) -> axes @ (p - center) / size, with |x| in the place of x for a mirrored pair. (3, 5)"""
    columns = [axes[:, 0] * (not pair), axes[:, 0] * pair, axes[:, 1], axes[:, 2], -axes @ np.asarray(center, float)]
    return np.stack(columns, 1) / np.broadcast_to(size, 3)[:, None]


class _Workshop:
    """Collects the primitives and decals of one toy, in toy units, and draws its random numbers."""

    def __init__(self, generator: torch.Generator):
        self.generator, self.prims, self.decals = generator, {}, []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def choice(self, options, weights=None):
        weights = torch.tensor(weights or [1] * len(options), dtype=torch.float)
        return options[torch.multinomial(weights, 1, generator=self.generator).item()]

    def color(self, saturation=(0.55, 0.9), value=(0.8, 1.0), apart_from=(), apart=0.12) -> np.ndarray:
        """A random colour whose hue is at least `apart` (of a turn) from those given."""
        while True:
            hue = self.uniform()
            hues = [colorsys.rgb_to_hsv(*c)[0] for c in apart_from]
            if all(abs((hue - h + 0.5) % 1 - 0.5) >= apart for h in hues):
                return np.array(colorsys.hsv_to_rgb(hue, self.uniform(*saturation), self.uniform(*value)))

    def add(self, name, center, radii, color, box=(0, 0, 0), axes=np.eye(3), pair=False, hard=False):
        """A box of half extents `box` inflated by an ellipsoid of `radii` (a number for a ball), around `center`."""
        self.prims[name] = dict(center=np.asarray(center, float), radii=np.broadcast_to(np.asarray(radii, float), 3), color=color,
                                box=np.asarray(box, float), axes=axes, pair=pair, hard=hard)

    def limb(self, name, a, b, radius, color, **kind):
        """A capsule from `a` to `b`."""
        a, b = np.asarray(a, float), np.asarray(b, float)
        self.add(name, (a + b) / 2, radius, color, (0, np.linalg.norm(b - a) / 2, 0), _axes(b - a), **kind)

    def paint(self, shape, parts, center, size, color, up=(0, 1, 0), front=(0, 0, 1), pair=False, through=False):
        """A shape of radius `size` (one number, or three along its axes) on `parts`."""
        matrix = _affine(_axes(up, front), center, size, pair)
        self.decals.append((shape, [p for p in parts if p in self.prims], matrix, color, 0.05 / np.min(size), through))

    def on(self, name, x, y, front=1) -> np.ndarray:
        """The point of an untilted primitive's surface over (x, y), on its front (1) or back (-1) side. (3,)"""
        p = self.prims[name]
        u, v = (max(abs(d) - b, 0) / r for d, b, r in zip((x - p["center"][0], y - p["center"][1]), p["box"], p["radii"]))
        return np.array([x, y, p["center"][2] + front * (p["box"][2] + p["radii"][2] * math.sqrt(max(1 - u * u - v * v, 0.04)))])

    def bounds(self) -> np.ndarray:
        """The lowest and highest corner of everything. (2, 3)"""
        corners = []
        for p in self.prims.values():
            extent = np.abs(p["axes"].T) @ p["box"] + np.sqrt((p["axes"].T ** 2) @ p["radii"] ** 2)
            corners += [p["center"] - extent, p["center"] + extent]
            corners += [c * [-1, 1, 1] for c in corners[-2:]] if p["pair"] else []
        return np.array([np.min(corners, 0), np.max(corners, 0)])


def _body(w: _Workshop, c: dict, a: dict):
    """Torso, limbs and feet, in one of three stances."""
    width, boxy = a["torso width"], w.choice([0.0, 0.35, 0.55], [3, 1, 1])
    arm, leg = w.uniform(0.25, 0.34), w.uniform(0.3, 0.4)
    if a["stance"] == "on fours":
        size, height = np.array([0.9 * width, w.uniform(0.75, 0.95), w.uniform(1.15, 1.5)]), w.uniform(0.75, 1.15)
        center = np.array([0, height + 0.7 * size[1], 0])
        for legs, feet, z in (("legs", "feet", 0.62 * size[2]), ("hind legs", "hind feet", -0.66 * size[2])):
            w.limb(legs, (0.58 * size[0], center[1] - 0.1, z), (0.66 * size[0], leg, z), leg, c["body"], pair=True)
            w.add(feet, (0.68 * size[0], 0.2, z + 0.16), (leg + 0.06, 0.24, leg + 0.16), c["second"], pair=True)
    else:
        size = np.array([width, w.uniform(0.95, 1.3), w.uniform(0.75, 0.95)])
        height = 0.1 if a["stance"] == "sitting" else w.uniform(0.55, 0.95)
        center = np.array([0, height + 0.9 * size[1], 0])
        for name, side in (("left arm", 1), ("right arm", -1)):
            angle, forward = a[name], w.uniform(0, 0.55)
            shoulder = np.array([side * 0.8 * size[0], center[1] + 0.45 * size[1], 0.05])
            reach = w.uniform(0.85, 1.15) * np.array([side * math.cos(angle), math.sin(angle), forward])
            w.limb(name, shoulder, shoulder + reach, arm, c["body"])
            c.setdefault("gloves", []).append((name, shoulder + reach, reach))
        if a["stance"] == "sitting":
            w.limb("legs", (0.5 * size[0], 0.38, 0.4), (0.85 * size[0], 0.36, 1.35), leg, c["body"], pair=True)
            w.add("feet", (0.88 * size[0], 0.5, 1.6), (0.36, 0.5, 0.24), c["second"], pair=True)
        else:
            w.limb("legs", (0.48 * size[0], height + 0.3, 0), (0.55 * size[0], leg, 0), leg, c["body"], pair=True)
            w.add("feet", (0.58 * size[0], 0.24, 0.2), (0.4, 0.26, 0.58), c["second"], pair=True)
    w.add("torso", center, size * (1 - boxy), c["body"], size * boxy)


def _head(w: _Workshop, c: dict, a: dict):
    """Head, ears, snout, nose and eyes, with the paint of the face."""
    torso, fours = w.prims["torso"], a["stance"] == "on fours"
    size = a["head size"] * np.array([w.uniform(1.0, 1.15), w.uniform(0.85, 1.0), w.uniform(0.82, 0.95)])
    top = torso["center"] + (torso["radii"] + torso["box"]) * ([0, 0.75, 0.85] if fours else [0, 1, 0])
    center = top + size * ([0, 0.55, 0.45] if fours else [0, 0.78, 0.08])
    w.add("head", center, size * (1 - a["head boxiness"]), c["body"], size * a["head boxiness"])
    y = center[1]
    _ears(w, c, a, center, size)
    eye, apart, high = a["eye size"], w.uniform(0.36, 0.5) * size[0], y + w.uniform(0.05, 0.25) * size[1]
    beak, low, out = w.uniform() < 0.2, y - w.uniform(0.3, 0.42) * size[1], w.uniform(0.22, 0.4)
    w.add("snout", w.on("head", 0, low), (w.uniform(0.42, 0.6) * size[0], 0.3 * size[1], out) if not beak else (0.34, 0.2, out + 0.3),
          c["light"] if not beak else np.array([1.0, 0.62, 0.12]), hard=beak)
    tip = w.on("snout", 0, low + (0.16 * size[1] if not beak else 0))
    if not beak:
        w.add("nose", tip, (w.uniform(0.14, 0.22), w.uniform(0.1, 0.15), 0.12), c["nose"], hard=True)
        w.paint("smile", ["snout"], (0, low + 0.02, 0), (0.26 * size[0], 0.17 * size[1], 1), c["dark"])
        w.paint("bar", ["snout"], (0, low - 0.02, 0), (0.045, 0.12, 1), c["dark"])
    w.paint("disc", ["head"], (apart + 0.3 * size[0], low + 0.12, 0), (0.17, 0.13, 1), c["cheek"], pair=True)
    at = w.on("head", apart, high) - [0, 0, 0.3 * eye]
    w.add("eyes", at, (eye, eye * w.uniform(1.0, 1.3), eye * 0.7), np.array([0.97, 0.97, 0.95]), pair=True, hard=True)
    pupil = eye * w.uniform(0.5, 0.68)
    w.paint("disc", ["eyes"], at + [-0.12 * eye, -0.05 * eye, 0], pupil, c["iris"], pair=True)
    w.paint("disc", ["eyes"], at + [-0.12 * eye, -0.05 * eye, 0], 0.72 * pupil, c["dark"], pair=True)
    w.paint("disc", ["eyes"], at + [0.1 * eye, 0.22 * eye, 0], 0.3 * pupil, np.ones(3), pair=True)


def _ears(w: _Workshop, c: dict, a: dict, center: np.ndarray, size: np.ndarray):
    """One of five kinds of ears."""
    k, kind, (_, y, z) = a["ear size"], a["ears"], center
    if kind == "round":
        at = np.array([0.78 * size[0], y + 0.78 * size[1], z - 0.05])
        w.add("ears", at, (0.46 * k, 0.46 * k, 0.2), c["body"], pair=True)
        w.paint("disc", ["ears"], at, 0.28 * k, c["light"], pair=True)
    elif kind == "long":
        up = np.array([w.uniform(0.1, 0.5), 1.0, -0.1])
        at = np.array([0.4 * size[0], y + 0.85 * size[1], z - 0.1]) + 0.6 * k * up
        w.add("ears", at, (0.25 * k, 0.95 * k, 0.17), c["body"], axes=_axes(up), pair=True)
        w.paint("disc", ["ears"], at, (0.13 * k, 0.7 * k, 1), c["light"], up=up, pair=True)
    elif kind == "pointed":
        at = np.array([0.62 * size[0], y + 0.72 * size[1], z - 0.05])
        w.add("ears", at, 0.08, c["body"], box=(0.36 * k, 0.36 * k, 0.06), axes=_axes((1.0, 0.75, 0)), pair=True)
        w.paint("square", ["ears"], at, 0.3 * k, c["light"], up=(1.0, 0.75, 0), pair=True)
    elif kind == "floppy":
        down = np.array([w.uniform(0.2, 0.6), -1.0, 0.1])
        w.add("ears", np.array([0.92 * size[0], y + 0.42 * size[1], z]) + 0.4 * k * down, (0.16, 0.62 * k, 0.32 * k), c["second"],
              axes=_axes(down), pair=True)
    else:
        foot, tip = np.array([0.35 * size[0], y + 0.8 * size[1], z]), np.array([0.55 * size[0], y + size[1] + 0.6 * k, z])
        w.limb("antennae", foot, tip, 0.08, c["second"], pair=True, hard=True)
        w.add("ears", tip, 0.2 * k, c["badge"], pair=True, hard=True)


def _clothes(w: _Workshop, c: dict, a: dict):
    """Pattern, belly, gloves and badge of the body, and a hat."""
    torso, fours = w.prims["torso"], a["stance"] == "on fours"
    middle, half = torso["center"], torso["radii"] + torso["box"]
    limbs = ["torso", "left arm", "right arm", "legs", "hind legs"]
    pattern = w.choice(["plain", "stripes", "spots", "trousers"])
    if pattern == "stripes":
        w.paint("stripes", ["torso"] + limbs[1:] * (w.uniform() < 0.5), middle + [0, w.uniform(), 0], w.uniform(0.42, 0.65), c["second"],
                up=(0, 0, 1) if fours else (0, 1, 0), front=(0, 1, 0) if fours else (0, 0, 1), through=True)
    elif pattern == "spots":
        w.paint("spots", limbs + ["head"] * fours, middle + [w.uniform(), w.uniform(), 0], w.uniform(0.6, 0.8), c["second"], through=True)
    elif pattern == "trousers":
        w.paint("half", limbs[:1] + limbs[3:], middle - [0, w.uniform(0, 0.45) * half[1], 0], 1, c["second"], up=(0, -1, 0), through=True)
    elif not fours:
        w.paint("disc", ["torso"], middle - [0, 0.1, 0], (0.66 * half[0], 0.72 * half[1], 1), c["light"])
    for name, hand, reach in c.get("gloves", []):
        w.paint("half", [name], hand - 0.12 * reach, 1, c["second"], up=reach, front=(0.1, 0.2, 1), through=True)
    at, front, size = middle + [0, 0.05, -0.1], (1, 0, 0), 0.44
    if not fours:
        at, front, size = middle + [0, 0.12 * half[1], 0], (0, 0, 1), w.uniform(0.4, 0.5)
    for grown, color in ((1.25, c["light"]), (1.0, c["badge"])):
        w.paint(a["badge"], ["torso"], at, grown * size, color, front=front, pair=fours)
    head, hat = w.prims["head"], a["hat"]
    (_, y, z), size = head["center"], head["radii"] + head["box"]
    if hat in ("cap", "beanie"):
        w.paint("half", ["head"], (0, y + 0.42 * size[1], z), 1, c["hat"], up=(0, 1, -0.15), through=True)
    if hat == "cap":
        w.add("visor", w.on("head", 0, y + 0.5 * size[1]) + [0, 0, 0.12], (0.72 * size[0], 0.09, 0.5), c["hat"], hard=True)
    elif hat == "beanie":
        w.paint("bar", ["head"], (0, y + 0.45 * size[1], z), (9, 0.1, 1), c["badge"], up=(0, 1, -0.15), through=True)
        w.add("pompom", (0, y + size[1] + 0.12, z), 0.3, c["badge"], hard=True)
    elif hat == "top hat":
        top = y + head["box"][1] + 0.96 * head["radii"][1]
        w.add("brim", (0, top, z), (0.72, 0.06, 0.72), c["hat"], (0, 0.02, 0), hard=True)
        w.add("crown", (0, top + 0.4, z), (0.46, 0.08, 0.46), c["hat"], (0, 0.34, 0), hard=True)
        w.paint("bar", ["crown"], (0, top + 0.18, z), (9, 0.13, 1), c["badge"], through=True)


def _back(w: _Workshop, c: dict, a: dict):
    """What the unseen side holds: on the back, or, on fours, on top and behind."""
    torso, fours, kind = w.prims["torso"], a["stance"] == "on fours", a["back"]
    middle, half = torso["center"], torso["radii"] + torso["box"]
    out, up = (np.array([0, 1.0, 0]), np.array([0, 0, 1.0])) if fours else (np.array([0, 0, -1.0]), np.array([0, 1.0, 0]))
    axes = np.stack([np.cross(up, out), up, out])  # rows x, y, z of things on the back: z points away from it
    deep, tall = np.abs(out) @ half, np.abs(up) @ half
    spot = middle + out * deep
    if kind == "backpack":
        size = np.array([w.uniform(0.45, 0.62), w.uniform(0.5, 0.65), w.uniform(0.22, 0.36)])
        at = spot + out * 0.5 * size[2] + up * 0.1 * tall
        w.add("backpack", at, 0.14, c["back"], size - 0.14 + [0, 0, 0.08], axes, hard=True)
        w.add("pocket", at + out * (size[2] + 0.1) - up * 0.42 * size[1], 0.1, c["back 2"], (0.5 * size[0], 0.2, 0.1), axes, hard=True)
        w.paint(a["emblem"], ["backpack"], at + up * 0.45 * size[1], 0.26, c["back 2"], up=up, front=out)
        return
    if kind == "tail":
        root = middle + [0, -0.35 * half[1], -0.85 * half[2]]
        if w.uniform() < 0.4:
            w.add("tail", root + [0, 0.05, -0.3], w.uniform(0.36, 0.5), c["back"], hard=True)
        else:
            bend, tip = root + [0, 0.05, -0.6], root + [0, w.uniform(0.7, 1.4), w.uniform(-1.0, -0.6)]
            w.limb("tail", root, bend, 0.2, c["back"])
            w.limb("tail tip", bend, tip, 0.2, c["back"])
            w.paint("half", ["tail tip"], 0.4 * bend + 0.6 * tip, 1, c["back 2"], up=tip - bend, front=(0, 0.3, 1), through=True)
        spot = spot + up * 0.15 * tall
    elif kind == "shell":
        w.add("shell", spot - out * 0.15, np.array([0.85 * half[0], 0.85 * tall, 0.5]), c["back"], axes=axes, hard=True)
        w.paint("spots", ["shell"], spot, 0.62, c["back 2"], up=up, front=out, through=True)
        return
    elif kind == "key":
        spot = spot + up * 0.15 * tall
        w.limb("stem", spot - out * 0.1, spot + out * 0.5, 0.1, c["back"], hard=True)
        lobe = spot + out * 0.62 + [0.3, 0, 0]
        w.add("key", lobe, (0.34, 0.34, 0.13), c["back"], axes=np.stack([[1, 0, 0], out, up]), pair=True, hard=True)
        w.paint("disc", ["key"], lobe, 0.16, c["back 2"], up=out, front=up, pair=True, through=True)
        spot = spot - up * 0.6 * tall
    size = w.uniform(0.34, 0.48) * (1.4 if kind == "emblem" else 0.8)
    w.paint(a["emblem"], ["torso"], spot - 0.5 * deep * out, size, c["back 2"], up=up, front=out)


def _palette(w: _Workshop) -> dict:
    """The colours of one toy. What the back wears is drawn without regard to the rest."""
    body = w.color((0.45, 0.85), (0.85, 1.0))
    second = w.color((0.5, 0.9), (0.75, 1.0), [body])
    return {"body": body, "second": second, "light": 0.35 * body + 0.65 * np.array([1.0, 0.95, 0.86]),
            "badge": w.color((0.75, 0.95), (0.85, 1.0), [body, second], 0.14), "hat": w.color((0.6, 0.95), (0.75, 1.0), [body], 0.1),
            "back": w.color((0.65, 0.95), (0.7, 1.0)), "back 2": w.color((0.3, 0.95), (0.8, 1.0)),
            "nose": w.choice([np.array([0.35, 0.2, 0.2]), np.array([0.85, 0.3, 0.35]), np.array([0.25, 0.25, 0.4])]),
            "iris": w.color((0.5, 0.8), (0.45, 0.7)), "dark": np.array([0.1, 0.08, 0.12]), "cheek": np.array([1.0, 0.5, 0.5])}


def _generator(seed: int, index: int) -> torch.Generator:
    """The source of every random number of one toy, its cameras included."""
    return torch.Generator().manual_seed(seed * 100_000 + index)


def _attributes(c: dict, a: dict) -> list[float]:
    """The numbers ATTRIBUTES of a toy with colours `c` and choices `a`, each in [0, 1]."""
    colors = [c["body"], c["second"], c["badge"], c["hat"] * (a["hat"] != "none"), c["back"]]
    sizes = [(a[k] - low) / (high - low) for k, (low, high) in RANGES.items()]
    return [float(x) for x in (*np.concatenate(colors), *sizes, *(a[k] == option for k, options in KINDS.items() for option in options))]


def _make_toy(generator: torch.Generator, device) -> Toy:
    w = _Workshop(generator)
    c, u = _palette(w), w.uniform
    a = {"stance": w.choice(KINDS["stance"], [4, 3, 4]), "ears": w.choice(KINDS["ears"]), "hat": w.choice(KINDS["hat"]),
         "badge": w.choice(BADGES), "back": w.choice(KINDS["back"], [3, 2, 2, 2, 2]), "emblem": w.choice(BADGES),
         "torso width": u(*RANGES["torso width"]), "head size": u(*RANGES["head size"]),
         "head boxiness": w.choice([0.0, u(0.3, 0.6)], [2, 1]), "eye size": u(*RANGES["eye size"]), "ear size": u(*RANGES["ear size"]),
         "left arm": u(-1.2, 1.1), "right arm": u(-1.2, 1.1)}
    a["arm raise"] = (a["left arm"] + a["right arm"]) / 2
    for build in (_body, _head, _clothes, _back):
        build(w, c, a)
    prims = dict(sorted(w.prims.items(), key=lambda p: p[1]["hard"]))  # blended ones first
    names = {name: i for i, name in enumerate(prims)}
    low, high = w.bounds()
    scale, yaw = u(3.0, 3.3) / (np.linalg.norm(high - low) / 2), u(0, 2 * math.pi)
    azimuth, elevation = u(0, 2 * math.pi), u(0.65, 1.1)
    sun = [math.cos(elevation) * math.cos(azimuth), math.sin(elevation), math.cos(elevation) * math.sin(azimuth)]
    rotation = np.array([[math.cos(yaw), 0, -math.sin(yaw)], [0, 1, 0], [math.sin(yaw), 0, math.cos(yaw)]])
    offset = np.array([u(-0.2, 0.2) for _ in range(3)]) - (low + high) / 2 @ rotation * scale
    backdrop = w.color((0.08, 0.3), (0.55, 0.85))
    rows, tensor = prims.values(), lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float32, device=device)
    return Toy(
        frames=tensor(np.stack([_affine(p["axes"], p["center"], p["radii"], p["pair"]) for p in rows], 1)),
        box=tensor(np.stack([p["box"] / p["radii"] for p in rows], 1)), inverse_radii=tensor(np.stack([1 / p["radii"] for p in rows], 1)),
        blended=sum(not p["hard"] for p in rows), colors=tensor(np.stack([p["color"] for p in rows])),
        decals=[Decal(shape, [names[part] for part in parts], tensor(frame), tensor(color), edge, through)
                for shape, parts, frame, color, edge, through in w.decals],
        rotation=tensor(rotation), offset=tensor(offset), scale=float(scale), light=tensor(sun) @ tensor(rotation).T,
        backdrop=tensor(np.stack([backdrop * 1.12, backdrop * 0.8])), attributes=_attributes(c, a), parts=names)


def make_toys(n: int, seed: int, device="cpu") -> list[Toy]:
    """The first `n` toys of a seed."""
    return [_make_toy(_generator(seed, i), device) for i in range(n)]


# ---- rendering ------------------------------------------------------------------------------------------------------------------

def _star(x: Tensor, y: Tensor) -> Tensor:
    turn = torch.atan2(x, y) / (2 * math.pi / 5) + 0.5
    angle = (turn - turn.floor() - 0.5).abs() * (2 * math.pi / 5)
    r = torch.hypot(x, y)
    return ((r * angle.cos() - 1) * 0.2645 + r * angle.sin() * 0.636) / 0.689  # signed distance from the line between tip and notch


SHAPES = {  # (x, y, z) in radii -> about the distance to the shape's edge, negative inside
    "disc": lambda x, y, z: torch.hypot(x, y) - 1,
    "square": lambda x, y, z: torch.maximum(x.abs(), y.abs()) - 0.85,
    "bar": lambda x, y, z: torch.maximum(x.abs(), y.abs()) - 1,
    "plus": lambda x, y, z: torch.minimum(torch.maximum(x.abs() - 0.34, y.abs() - 1), torch.maximum(x.abs() - 1, y.abs() - 0.34)),
    "heart": lambda x, y, z: torch.hypot(x, 1.15 * y + 0.1 - 0.72 * (x.abs() + 1e-4).sqrt()) - 0.92,
    "star": lambda x, y, z: _star(x, y),
    "half": lambda x, y, z: -y,
    "stripes": lambda x, y, z: (y - y.floor() - 0.5).abs() - 0.25,
    "spots": lambda x, y, z: torch.stack([x + 0.5 * y.floor(), y, z]).frac().abs().sub(0.5).norm(dim=0) - 0.33,
    "smile": lambda x, y, z: torch.maximum((torch.hypot(x, y) - 1).abs() - 0.2, y + 0.2),
}


def _homogeneous(points: Tensor) -> Tensor:
    """(R, 3) -> (x, |x|, y, z, 1), (5, R)"""
    x, y, z = points.unbind(-1)
    return torch.stack([x, x.abs(), y, z, torch.ones_like(x)])


def distances(toy: Toy, points: Tensor) -> Tensor:
    """About the signed distance (P, R) of toy points (R, 3) to every primitive, toy units.

    With q the part of a point outside the box: f = |q / r|, and (f - 1) f / |q / r^2| is (f - 1) over its own gradient's length.
    """
    q = (toy.frames.flatten(0, 1) @ _homogeneous(points)).reshape(3, -1, len(points))  # (3P, 5) @ (5, R) -> (3, P, R)
    q = q.abs_().sub_(toy.box[..., None]).clamp_min_(1e-4)  # not 0: both lengths vanish inside the box
    f = q.square().sum(0).sqrt_()                           # (P, R); norm(dim=0) takes 20 times as long on a CPU
    slope = q.mul_(toy.inverse_radii[..., None]).square_().sum(0).sqrt_()
    return (f - 1).mul_(f).div_(slope)


def distance(toy: Toy, points: Tensor) -> Tensor:
    """About the signed distance (R,) of toy points (R, 3) to the toy: log-sum-exp union of the body, hard union of the rest."""
    result = []
    for chunk in points.split(CHUNK[points.device.type]):
        d = distances(toy, chunk)
        soft = (d[:toy.blended] / -BLEND).exp_().sum(0).clamp_min_(1e-37).log_().mul_(-BLEND)
        result.append(torch.minimum(soft, d[toy.blended:].amin(0)))
    return torch.cat(result)


def _march(toy: Toy, o: Tensor, d: Tensor, t: Tensor, far: Tensor, cone: float, steps: int) -> tuple[Tensor, Tensor]:
    """Sphere tracing of unit rays `o + t d` (R, 3) with cones of half width `cone * t` around them -> length (R,), arrived (R,) bool.

    Finished rays are dropped every few steps. A cone that runs out of steps may yet touch, so it counts as arrived; a ray does not.
    """
    length, arrived = t.clone(), torch.zeros_like(t, dtype=torch.bool)
    alive = torch.arange(len(t), device=t.device)
    for step in range(steps):
        free = distance(toy, o + t[:, None] * d) - cone * t
        near_by = free < (cone * t).clamp_min(SURFACE)
        t = t + torch.where(near_by, free.clamp_max(0), (free * (0.95 / (1 + cone))).clamp_min(STRIDE * step))  # back out if too far
        if step % 4 == 3:
            length[alive], arrived[alive] = t, near_by
            keep = (~near_by & (t < far)).nonzero()[:, 0]
            alive, o, d, t, far = alive[keep], o[keep], d[keep], t[keep], far[keep]
            if len(alive) == 0:
                break
    arrived[alive] = cone > 0
    return length, arrived


def _shade(toy: Toy, points: Tensor) -> Tensor:
    """Colours (R, 3) of surface points (R, 3): paint, Lambert's law, light from the sky, ambient occlusion; no view dependence."""
    result = []
    corners = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], device=points.device)
    for p in points.split(CHUNK[points.device.type] // 4):
        taps = distance(toy, (p + 0.01 * corners[:, None]).flatten(0, 1)).reshape(4, -1)
        normal = torch.nn.functional.normalize(taps.T @ corners, dim=-1)
        open_ = 1.0
        for reach, strength in ((0.12, 0.35), (0.4, 0.45)):
            open_ = open_ - strength * (1 - distance(toy, p + reach * normal) / reach).clamp(0, 1)
        weights = torch.softmax(distances(toy, p) / -0.02, 0)  # (P, R): which primitive a point belongs to
        color, x = weights.T @ toy.colors, _homogeneous(p)
        for decal in toy.decals:
            u, v, n = decal.frame @ x
            cover = (0.5 - SHAPES[decal.shape](u, v, n) / decal.edge).clamp(0, 1) * weights[decal.parts].sum(0) * ((n > 0) | decal.through)
            color = torch.lerp(color, decal.color, cover[:, None])
        light = 0.66 + 0.12 * normal[:, 1] + 0.36 * (normal @ toy.light).clamp_min(0)
        result.append((color * (light * open_)[:, None]).clamp(0, 1))
    return torch.cat(result)


@torch.no_grad()
def render(toy: Toy, cameras: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """One toy from V cameras (isotropic NDC: half the shorter side is 1), `height` and `width` multiples of 4.

    Returns colour over black (V, 3, H, W) and coverage (V, 1, H, W), both in [0, 1] on the toy's device.
    """
    device, views, h, w = toy.frames.device, len(cameras), height * SUPER, width * SUPER
    cone = BLOCK / min(h, w) * math.sqrt(2) / cameras.focal.min().item()                # half a block's diagonal at distance 1
    cameras = cameras.to(device)
    def grid(step):  # NDC of the centres of squares of `step` x `step` rays
        y = (h / 2 - torch.arange(step / 2, h, step, device=device)) * (2 / min(h, w))
        x = (w / 2 - torch.arange(step / 2, w, step, device=device)) * (2 / min(h, w))
        return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)
    def rays(xy):  # (V, ..., 2) -> origins and unit directions in toy units
        o, d = cameras.rays(xy.reshape(views, -1, 2))
        d = torch.nn.functional.normalize(d @ toy.rotation.T, dim=-1)
        return toy.to_toy(o[:, :1]).expand_as(d).reshape(-1, 3), d.reshape(-1, 3)
    coarse_o, coarse_d = rays(grid(BLOCK).expand(views, -1, -1, -1))                    # (V * blocks, 3)
    reach = (coarse_o - toy.to_toy(torch.zeros(1, 3, device=device))).norm(dim=-1)      # to the world's origin; no toy is 4 units off it
    start, touched = _march(toy, coarse_o, coarse_d, reach - 4 / toy.scale, reach + 4 / toy.scale, cone, COARSE_STEPS)
    fine = grid(1).reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK, 2).permute(0, 2, 1, 3, 4)  # (rows, columns, BLOCK, BLOCK, 2) of blocks
    blocks = touched.nonzero()[:, 0]
    o, d = (x.reshape(-1, BLOCK ** 2, 3)[blocks].flatten(0, 1) for x in rays(fine.expand(views, *fine.shape)))
    each = lambda x: x[blocks, None].expand(-1, BLOCK ** 2).flatten()  # noqa: E731
    length, hit = _march(toy, o, d, each(start), each(reach + 4 / toy.scale), 0.0, FINE_STEPS)
    image, found = torch.zeros(len(touched), BLOCK ** 2, 4, device=device), torch.zeros(len(hit), 4, device=device)
    found[hit] = torch.nn.functional.pad(_shade(toy, o[hit] + length[hit, None] * d[hit]), (0, 1), value=1.0)
    image[blocks] = found.reshape(-1, BLOCK ** 2, 4)
    image = image.reshape(views, h // BLOCK, w // BLOCK, BLOCK // SUPER, SUPER, BLOCK // SUPER, SUPER, 4).mean((4, 6))
    image = image.permute(0, 5, 1, 3, 2, 4).reshape(views, 4, height, width)
    return image[:, :3], image[:, 3:]


# ---- the CO3Dv2 tree ------------------------------------------------------------------------------------------------------------

def turntable(generator: torch.Generator, views: int) -> Cameras:
    """Cameras (V) on a ring around the world's y axis, with jitter in azimuth, elevation (8-35 degrees), radius, aim and roll."""
    def jitter(amount, *shape):
        return (2 * torch.rand(views, *shape, generator=generator) - 1) * amount
    def once(low, high):
        return low + (high - low) * torch.rand((), generator=generator)
    azimuth = (once(0, views) + torch.arange(views) + jitter(0.3)) * (2 * math.pi / views)
    elevation = torch.deg2rad(once(13, 30) + jitter(5))
    radius = once(9.6, 10.6) + jitter(0.4)
    center = torch.stack([elevation.cos() * azimuth.cos(), elevation.sin(), elevation.cos() * azimuth.sin()], -1) * radius[:, None]
    R, T = look_at(center, jitter(0.3, 3), torch.cat([jitter(0.04, 1), torch.ones(views, 1), jitter(0.04, 1)], -1))
    focal = (once(2.8, 3.05) * (1 + jitter(0.01, 1))).expand(-1, 2).contiguous()
    return Cameras(R, T, focal, jitter(0.04, 2) + (2 * torch.rand(2, generator=generator) - 1) * 0.06)


def _annotations(name: str, cameras: Cameras, height: int, width: int, per_axis: bool, mass: list[float]) -> list[dict]:
    """Frame annotations of one sequence. `per_axis`: each axis in units of half its own side (`ndc_norm_image_bounds`)."""
    unit = np.array([width, height]) / min(height, width) if per_axis else np.ones(2)
    frames = []
    for i, (R, T, f, p) in enumerate(zip(*(x.tolist() for x in (cameras.R, cameras.T, cameras.focal, cameras.principal))), 1):
        frames.append({
            "sequence_name": name, "frame_number": i, "frame_timestamp": i / 10,
            "image": {"path": f"{CATEGORY}/{name}/images/frame{i:06d}.jpg", "size": [height, width]},
            "depth": None, "mask": {"path": f"{CATEGORY}/{name}/masks/frame{i:06d}.png", "mass": mass[i - 1]},
            "viewpoint": {"R": R, "T": T, "focal_length": list(f / unit), "principal_point": list(p / unit),
                          "intrinsics_format": "ndc_norm_image_bounds" if per_axis else "ndc_isotropic"},
            "meta": {"frame_type": "test_known", "frame_splits": ["fewview_dev"], "eval_batch_maps": []}})
    return frames


def _write_pictures(root: Path, frames: list[dict], pixels: np.ndarray):
    """`pixels` (V, H, W, 4) uint8: a JPEG of the colours and a PNG of the mask per frame."""
    for kind in ("image", "mask"):
        (root / frames[0][kind]["path"]).parent.mkdir(parents=True, exist_ok=True)
    for frame, picture in zip(frames, pixels):
        Image.fromarray(np.ascontiguousarray(picture[..., :3])).save(root / frame["image"]["path"], quality=94, subsampling=0)
        Image.fromarray(np.ascontiguousarray(picture[..., 3])).save(root / frame["mask"]["path"], compress_level=6)


def _write_json(path: Path, data):
    """JSON, gzipped if the name ends in `.jgz`, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw, temporary = json.dumps(data).encode(), path.with_name(path.name + ".tmp")
    temporary.write_bytes(gzip.compress(raw, 6, mtime=0) if path.suffix == ".jgz" else raw)
    temporary.replace(path)


def write_tree(root: Path, instances: int, seed: int, views: int, device):
    """Render `instances` toys and write `<root>/toys`. The annotations come last: before them, the tree does not exist for a reader."""
    frames, sequences, jobs = [], [], []
    with ThreadPoolExecutor(4) as pool:  # Pillow's encoders release the interpreter's lock
        for index in tqdm(range(instances), desc="synthetic toys", disable=None):
            generator = _generator(seed, index)
            toy, cameras, name = _make_toy(generator, device), turntable(generator, views), f"toy_{seed}_{index:05d}"
            height, width = (LONG_SIDE, SHORT_SIDE) if index % 2 == 0 else (SHORT_SIDE, LONG_SIDE)
            rgb, mask = render(toy, cameras, height, width)
            backdrop = torch.lerp(*toy.backdrop[:, :, None, None], torch.linspace(0, 1, height, device=device)[:, None])  # (3, H, 1)
            pixels = (torch.cat([rgb + (1 - mask) * backdrop, mask], 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            new = _annotations(name, cameras, height, width, index % 4 == 3, (pixels[..., 3] / 255).sum((1, 2)).tolist())
            frames += new
            sequences.append({"sequence_name": name, "category": CATEGORY, "video": None, "point_cloud": None,
                              "viewpoint_quality_score": None, "attributes": toy.attributes})
            jobs.append(pool.submit(_write_pictures, root, new, pixels))
        for job in jobs:
            job.result()
    listed = [[f["sequence_name"], f["frame_number"], f["image"]["path"]] for f in frames]
    _write_json(root / CATEGORY / "set_lists" / "set_lists_fewview_dev.json", {"train": listed, "val": [], "test": listed})
    _write_json(root / CATEGORY / "sequence_annotations.jgz", sequences)
    _write_json(root / CATEGORY / "frame_annotations.jgz", frames)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Write synthetic toys as a CO3Dv2 tree.")
    parser.add_argument("--root", type=Path, required=True, help="folder for the tree; the toys go to ROOT/toys")
    parser.add_argument("--instances", type=int, required=True, help="number of toys")
    parser.add_argument("--seed", type=int, required=True, help="1-99 training, 1000 shipped, 2000 reported, 3000 tuning")
    parser.add_argument("--views", type=int, default=16, help="photographs per toy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for flag, low, high in (("instances", 1, 100_000), ("seed", 0, 40_000), ("views", 1, 1000)):
        if not low <= getattr(args, flag) <= high:
            parser.error(f"--{flag} is {getattr(args, flag)}; it must lie between {low} and {high}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but torch finds no CUDA device; use cpu")
    try:
        write_tree(args.root, args.instances, args.seed, args.views, args.device)
    except OSError as e:
        parser.error(f"--root {args.root} cannot be written: {e}")


if __name__ == "__main__":
    main()
