"""Do photographs, masks and cameras fit together? And if they do not, which mistake is it likely to be?

The judge is what masks and cameras have to do with each other (`silhouettes.py`). The usual mistakes are undone one at
a time (`mistakes.py`). If the masks fit then, and only then, the mistake is named.

What changes no silhouette cannot be seen and does no harm: another origin, scale or orientation of the world, or
everything mirrored.

Shapes: `V` views, `S` side of their square pictures in pixels.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cameras import Cameras, Scene, evenly_spaced
from photographs.figure import stand
from photographs.mistakes import alternatives
from photographs.reading import Convention
from photographs.silhouettes import REACH, Misfit, Silhouette, glance, misfit, silhouettes

CO3D = Convention((1, 1, 1), False)  # PyTorch3D's; for row vectors, but so is `Cameras.R`
MOST = 12          # views that are compared; of more an even choice
SIZE = 400         # pixels a side of the pictures that the command reads
# What supports a name. Tuned on toys of seed 3000 and the first half of the chair's photographs (docs/check.md).
CLEAR = 0.010      # cells: a misfit below it is none, if there are at least `ENOUGH` views
ENOUGH = 6         # views; of fewer views more is asked
FEW = 7            # power of `ENOUGH` / V by which more is asked
EXPLAINED = 0.25   # part of the misfit that a mistake, undone, may leave
HALF = 0.5         # part that it may leave where masks are rough, if nearly every view says so:
SURE = 3.0         # standard errors of the views' mean improvement
LIKE = 0.005       # cells: misfits that differ by less, or by less than a third, count as the same
FOCAL_STEP = 1.12  # between factors of the focal length that are tried
FOCAL_STEPS = 14   # of them on either side of 1
SAME_FOCAL = 1.08  # a focal length off by less is no mistake
ROUGH = 20         # percent of a mask outside what the others allow, above which the fit is bad
VAGUE = 1.4        # greatest to least factor of the focal length that fit alike, above which it is no number
LISTED = 4         # mistakes that a line lists
FOCAL = "the focal length times"


# ---------------------------------------------------------------------------------------------- the judgement

class Tried(NamedTuple):
    """An alternative and how badly it fits."""
    name: str
    misfit: Misfit


class Focal(NamedTuple):
    """Which factors of the focal length fit best."""
    factor: float   # in the middle of them
    least: float    # the least of them
    most: float     # the greatest
    misfit: Misfit  # of the one in the middle

    def vague(self) -> bool:
        """Whether it is a range rather than a number."""
        return self.most / self.least > VAGUE

    def name(self) -> str:
        """What a mistake would be that these factors undo."""
        if self.vague():
            return f"{FOCAL} {1 / self.most:.2g} to {1 / self.least:.2g}"
        return f"{FOCAL} {1 / self.factor:.2g}"


@dataclass(frozen=True)
class Findings:
    """What `examine` found."""
    lines: list[str]     # what to print
    scene: Scene         # the views that were compared, with their cameras
    given: Misfit        # of the cameras as they are
    fits: bool           # whether the masks fit them
    mistake: str | None  # the one clear mistake; None where nothing is wrong, or nothing can be named
    alike: list[str]     # mistakes that cannot be told from what fits best
    focal: Focal

    @property
    def can_tell(self) -> bool:
        """Whether the masks rule out all mistakes but one, or all of them. Two photographs never do."""
        return not self.alike and len(self.scene) > 2


def examine(scene: Scene, convention: Convention = CO3D, whole: bool = False) -> Findings:
    """Do the masks of a scene fit its cameras, and which mistake is likely where they do not?

    The cameras (V,) must be those of the user's own world, as read from a file written in `convention`. `whole`: the
    pictures are whole photographs, not cut to the object. Raises `ValueError` for fewer than two views or an empty
    mask.
    """
    if len(scene) < 2:
        raise ValueError("one photograph alone cannot be checked; two or more can")

    # The given cameras.
    scene = scene[evenly_spaced(len(scene), MOST)].to("cpu")
    scene = replace(scene, cameras=scene.cameras.to(torch.float64))
    views = silhouettes(scene)
    given = misfit(views, scene.cameras)

    # Everything else that the cameras could be: a glance at each, a closer look at those that might be it.
    corner = _corners(scene.valid) if whole else None
    tried = []
    least = given.total()
    for name, cameras in alternatives(scene.cameras, convention, corner):
        seen = glance(views, cameras, 2 * least + 10 * LIKE)
        least = min(least, seen)
        if seen < math.inf:
            tried.append(Tried(name, misfit(views, cameras)))
    focal = _search_focal(views, scene.cameras)
    if focal.vague() or not 1 / SAME_FOCAL < focal.factor < SAME_FOCAL:
        tried.append(Tried(focal.name(), focal.misfit))
    return _judge(scene, whole, given, tried, focal)


def _corners(valid: Tensor) -> Tensor:
    """Top left corner of the valid part of each view (V, 1, S, S), NDC (V, 2)."""
    columns = valid[:, 0].amax(1).argmax(1)
    rows = valid[:, 0].amax(2).argmax(1)
    return 1 - 2 * torch.stack([columns, rows], 1).double() / valid.shape[-1]


def _search_focal(views: list[Silhouette], cameras: Cameras) -> Focal:
    """The focal length by which the masks fit best, by trying factors."""
    factors = [FOCAL_STEP**step for step in range(-FOCAL_STEPS, FOCAL_STEPS + 1)]
    candidates = [replace(cameras, focal=cameras.focal * factor) for factor in factors]

    # A glance at each, from 1 outwards, then a closer look at the best.
    glances = {}
    least = REACH
    for i in sorted(range(len(factors)), key=lambda i: abs(i - FOCAL_STEPS)):
        glances[i] = glance(views, candidates[i], 2 * least + 4 * LIKE)
        least = min(least, glances[i])
    found = {}
    for i in range(len(factors)):
        if glances[i] <= 2 * least + 4 * LIKE:
            found[i] = misfit(views, candidates[i])
    best = min(found.values(), key=Misfit.total)
    good = [i for i, one in found.items() if _alike(one, best)]

    # Where many fit about equally well, their middle.
    weights = [1 / (found[i].total() + LIKE / 10) for i in good]
    step = sum(i * weight for i, weight in zip(good, weights)) / sum(weights) - FOCAL_STEPS
    middle = replace(cameras, focal=cameras.focal * FOCAL_STEP**step)
    return Focal(FOCAL_STEP**step, factors[good[0]], factors[good[-1]], misfit(views, middle))


def _alike(a: Misfit, b: Misfit) -> bool:
    """Does `a` fit about as well as `b`, or better?"""
    return a.total() <= b.total() + max(LIKE, b.total() / 3)


def _explains(better: Tried, given: Misfit) -> bool:
    """Does a mistake, undone, leave so little of the misfit that it is no chance?"""
    left = better.misfit.total() / given.total()
    if left < EXPLAINED or left > HALF:
        return left < EXPLAINED

    # Rough masks leave more. Then the views have to agree that it is better. A shorter focal length does not count:
    # it makes all cones wider, which hides rough cameras.
    if better.name.startswith(FOCAL):
        return False
    gain = given.outline - better.misfit.outline  # (V,)
    error = gain.std() / len(gain) ** 0.5
    return gain.mean().item() > SURE * error.item()


def _judge(scene: Scene, whole: bool, given: Misfit, tried: list[Tried], focal: Focal) -> Findings:
    """The findings: a mistake is named if it alone explains what the given cameras do not."""
    # What cannot be told from the best, which may be the given cameras.
    fits = given.total() < CLEAR
    best = min([Tried("", given), *tried], key=lambda one: one.misfit.total())
    explained = not fits and _explains(best, given)
    alike = [one.name for one in tried if _alike(one.misfit, best.misfit)]

    # With few views much fits by chance, and a range of focal lengths is no name.
    clear = CLEAR * max(1, ENOUGH / len(scene)) ** FEW
    sure = given.total() > clear and len(scene) > 2
    vague = focal.vague() and best.name == focal.name()
    mistake = None
    if explained and sure and len(alike) == 1 and not vague:
        mistake = best.name
        alike = []

    # In words.
    found = Findings([], scene, given, fits, mistake, alike, focal)
    undone = best.misfit if explained else None
    return replace(found, lines=[*_understood(scene, whole), *_verdict(found, undone)])


# ---------------------------------------------------------------------------------------------- in words

def _verdict(found: Findings, undone: Misfit | None) -> list[str]:
    """The judgement in a line or two. `undone`: the misfit without the likeliest mistake, where there is one."""
    worst = _worst(found.given, undone)
    frame = found.scene.names[worst.view]
    misfit = f"{worst.before:.0f} % of the {worst.part} of frame {frame} lies outside what the others allow"
    names = "; ".join(found.alike[:LISTED])
    if len(found.alike) > LISTED:
        names += f"; and {len(found.alike) - LISTED} others"

    # One mistake, or several possible ones.
    if found.mistake:
        return [f"likely a mistake: {found.mistake}", f"  {misfit}; with that undone {worst.after:.0f} %"]
    if undone:
        return [f"masks and cameras fit badly, and these masks cannot tell why: {misfit}",
                f"  rough masks and cameras may do that, and this: {names} ({_why(found.scene)})"]

    # None.
    lines = ["masks and cameras fit"]
    if not found.fits:
        quality = "badly" if worst.before > ROUGH else "roughly"
        lines = [f"masks and cameras fit {quality}: {misfit}"]
        lines.append("  no usual mistake explains it; masks that miss pieces do, or rough cameras")
    if not found.can_tell:
        lines.append(f"  but they would fit as well with {names or 'other cameras'}: cannot tell ({_why(found.scene)})")
    return lines


class Worst(NamedTuple):
    """The view that says most about a misfit."""
    view: int
    part: str      # "mask", or its "outline" where little of the mask is concerned
    before: float  # percent of it that lie outside what the others allow
    after: float   # the same without the likeliest mistake


def _worst(given: Misfit, undone: Misfit | None) -> Worst:
    """The view that says most, by its mask or, about small mistakes, by the mask's outline."""
    undone = undone or given
    view = given.outside.argmax().item()
    if given.outside[view] > 0.03:
        return Worst(view, "mask", 100 * given.outside[view].item(), 100 * undone.outside[view].item())
    view = given.touching.argmax().item()
    return Worst(view, "outline", 100 * given.touching[view].item(), 100 * undone.touching[view].item())


def _why(scene: Scene) -> str:
    """Why masks cannot tell."""
    if len(scene) == 2:
        return "two photographs share little: two planes that touch the object"
    spread = stand(scene).around
    if spread < 30:
        return f"the viewpoints are within {spread:.0f} degrees of each other"
    if len(scene) < ENOUGH:
        return f"{len(scene)} photographs leave much to chance"
    return "the object looks alike from all sides"


def _understood(scene: Scene, whole: bool) -> list[str]:
    """What was understood, in a few lines."""
    # The cameras.
    place = stand(scene)
    lowest = place.elevation.min().item()
    highest = place.elevation.max().item()
    lines = [f"{len(scene)} photographs compared; cameras {_range(place.distance)} from the object",
             f"  {lowest:.0f} to {highest:.0f} degrees above it, spread over {place.around:.0f} of 360 round it"]
    behind = (place.depth < 0).sum().item()
    if behind:
        lines.append(f"  {behind} of them look away from it")

    # The part of the square that shows anything, its angles, and how much of it is object.
    valid = scene.valid[:, 0].double()
    width = valid.amax(1).sum(1)
    height = valid.amax(2).sum(1)
    sides = torch.stack([width, height], 1) / valid.shape[-1]
    angles = torch.rad2deg(2 * torch.atan(sides / scene.cameras.focal))
    covered = scene.masks[:, 0].sum((1, 2)) / (width * height)

    pictures = "photographs" if whole else "pictures (cut to it)"
    lines.append(f"object {_range(place.size)} across; masks cover {_range(100 * covered)} % of the {pictures}")
    lines.append(f"  which see {_range(angles[:, 0])} degrees across and {_range(angles[:, 1])} down")
    return lines


def _range(values: Tensor) -> str:
    """The range of some numbers, to three digits."""
    low = f"{values.min().item():.3g}"
    high = f"{values.max().item():.3g}"
    return low if low == high else f"{low} to {high}"
