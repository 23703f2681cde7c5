"""Do photographs, masks and cameras fit together? And if they do not, which mistake is it likely to be?

The judge is what masks and cameras have to do with each other (`silhouettes.py`). The usual mistakes are undone one at
a time (`mistakes.py`). If the masks fit then, and only then, the mistake is named.

What changes no silhouette cannot be seen and does no harm: another origin, scale or orientation of the world, or
everything mirrored.

Shapes: `V` views, `S` side of their square pictures in pixels.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cameras import Cameras, Scene, evenly_spaced
from datasets.pictures import inverted
from photographs.figure import Stand, stand
from photographs.mistakes import alternatives
from photographs.normalization import cloud, mask_corners
from photographs.shots import AXES, Convention
from photographs.silhouettes import REACH, Misfit, Silhouettes, misfit, silhouettes

CO3D = Convention(AXES["PyTorch3D"], False)  # for row vectors, but so is `Cameras.R`
MOST = 12          # views that are compared; of more an even choice
SIZE = 400         # pixels a side of the pictures that the command reads
# What supports a name. Tuned on toys of seed 3000 and the first half of the chair's photographs (docs/check.md).
CLEAR = 0.010      # cells: a misfit below it is none, if there are at least `ENOUGH` views
ENOUGH = 6         # views; fewer need a clearer misfit
FEW = 7            # power of `ENOUGH` / V by which the thresholds grow
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

@dataclass(frozen=True)
class Findings:
    """What `examine` found."""
    lines: list[str]     # what to print
    scene: Scene         # the views that were compared, with their cameras
    given: Misfit        # of the cameras as they are
    fits: bool           # whether the masks fit them
    mistake: str | None  # the one clear mistake; None where nothing is wrong, or nothing can be named
    alike: list[str]     # mistakes that cannot be told from what fits best
    focal: tuple[float, float]  # least and greatest factor of the focal length that fit about as well as the best one

    @property
    def can_tell(self) -> bool:
        """Whether the masks rule out all mistakes but one, or all of them. Two photographs never do."""
        return not self.alike and len(self.scene) > 2


def examine(scene: Scene, convention: Convention = CO3D, whole: bool = False) -> Findings:
    """Do the masks of a scene fit its cameras, and which mistake is likely where they do not?

    The cameras (V,) must be those of the user's own world, as read from a file written in `convention`. `whole`: the
    pictures are whole photographs, not cut to the object. Raises `ValueError` for fewer than two views, an empty
    mask, or cameras that are all at one place.
    """
    if len(scene) < 2:
        raise ValueError("one photograph alone cannot be checked; two or more can")

    # The given cameras.
    scene = scene[evenly_spaced(len(scene), MOST)].to("cpu").with_cameras(lambda cameras: cameras.to(torch.float64))
    cloud(scene.cameras, f"{scene.sequence}: ")
    views = silhouettes(scene)
    given = misfit(views, scene.cameras)

    # Everything else that the cameras could be.
    corner = mask_corners(scene.valid)[:, 0] if whole else None
    tried = _misfits(views, alternatives(scene.cameras, convention, corner), given.total())
    focal, refocused = _search_focal(views, scene.cameras)
    tried |= refocused

    # What cannot be told from the best, which may be the given cameras.
    fits = given.total() < CLEAR
    best, undone = min([("", given), *tried.items()], key=lambda item: item[1].total())
    explained = not fits and _explains(best, undone, given)
    alike = [name for name, one in tried.items() if _alike(one, undone)]

    # With few views much fits by chance, and a range of focal lengths is no name.
    clear = CLEAR * max(1, ENOUGH / len(scene)) ** FEW
    sure = given.total() > clear and len(scene) > 2 and not (focal[1] / focal[0] > VAGUE and best.startswith(FOCAL))
    mistake = best if explained and sure and len(alike) == 1 else None

    # In words.
    place = stand(scene)
    understood = _understood(scene, place, whole)
    found = Findings(understood, scene, given, fits, mistake, [] if mistake else alike, focal)
    lines = _verdict(found, undone if explained else None, place)

    # Inverted masks may fit: they are as large as the pictures.
    count = inverted(scene.masks, scene.valid).sum().item()
    if count > len(scene) / 2:
        found = replace(found, fits=False, mistake=None)
        lines = [f"{count} of {len(scene)} masks are white along the border: probably inverted; white is the object"]
    return replace(found, lines=understood + lines)


def _misfits(views: Silhouettes, candidates: dict, least: float) -> dict:
    """Misfits of cameras by their keys, without those that are clearly worse than the best one or than `least`."""
    found = {}
    for key, cameras in candidates.items():
        other = misfit(views, cameras, 2 * least + 4 * LIKE)
        if other:
            found[key] = other
            least = min(least, other.total())
    return found


def _search_focal(views: Silhouettes, cameras: Cameras) -> tuple[tuple[float, float], dict[str, Misfit]]:
    """The focal length by which the masks fit best, by trying factors: the least and the greatest of those that fit
    about as well as the best one, and the misfit of their middle by the mistake's name, if it is one.
    """
    # From 1 outwards.
    steps = sorted(range(-FOCAL_STEPS, FOCAL_STEPS + 1), key=abs)
    found = _misfits(views, {step: _refocused(cameras, step) for step in steps}, REACH)
    best = min(found.values(), key=Misfit.total)

    # Where many fit about equally well, their middle.
    weights = {step: 1 / (one.total() + LIKE / 10) for step, one in found.items() if _alike(one, best)}
    middle = sum(step * weight for step, weight in weights.items()) / sum(weights.values())
    least, most = FOCAL_STEP ** min(weights), FOCAL_STEP ** max(weights)
    factor = FOCAL_STEP**middle
    if most / least > VAGUE:
        name = f"{FOCAL} {1 / most:.2g} to {1 / least:.2g}"
    elif 1 / SAME_FOCAL < factor < SAME_FOCAL:
        return (least, most), {}
    else:
        name = f"{FOCAL} {1 / factor:.2g}"
    return (least, most), {name: misfit(views, _refocused(cameras, middle))}


def _refocused(cameras: Cameras, step: float) -> Cameras:
    """Cameras whose focal length is so many steps longer."""
    return replace(cameras, focal=cameras.focal * FOCAL_STEP**step)


def _alike(a: Misfit, b: Misfit) -> bool:
    """Does `a` fit about as well as `b`, or better?"""
    return a.total() <= b.total() + max(LIKE, b.total() / 3)


def _explains(name: str, undone: Misfit, given: Misfit) -> bool:
    """Does a mistake, undone, leave so little of the misfit that it is no chance?"""
    left = undone.total() / given.total()
    gain = given.outline - undone.outline  # (V,)
    agreed = gain.mean() > SURE * gain.std() / len(gain) ** 0.5

    # Rough masks leave more. Then the views have to agree that it is better. A shorter focal length does not count:
    # it makes all cones wider, which hides rough cameras.
    return left < EXPLAINED or (left <= HALF and not name.startswith(FOCAL) and bool(agreed))


# ---------------------------------------------------------------------------------------------- in words

def _verdict(found: Findings, undone: Misfit | None, place: Stand) -> list[str]:
    """The judgement in a line or two. `undone`: the misfit without the likeliest mistake, where there is one."""
    # The view that says most, by its mask or, about small mistakes, by the mask's outline.
    outline = found.given.outside.max() <= 0.03
    part = "outline" if outline else "mask"
    outside = 100 * (found.given.touching if outline else found.given.outside)
    view = outside.argmax().item()
    before = outside[view].item()
    misfit = f"{before:.0f} % of the {part} of frame {found.scene.names[view]} lies outside what the others allow"

    # One mistake, or several possible ones.
    if found.mistake:
        after = 100 * (undone.touching if outline else undone.outside)[view]
        return [f"likely a mistake: {found.mistake}", f"  {misfit}; with that undone {after:.0f} %"]
    names = "; ".join(found.alike[:LISTED]) or "other cameras"
    if len(found.alike) > LISTED:
        names += f"; and {len(found.alike) - LISTED} others"
    if undone:
        return [f"masks and cameras fit badly, and these masks cannot tell why: {misfit}",
                f"  rough masks and cameras may do that, and this: {names} ({_why(place)})"]

    # None.
    lines = ["masks and cameras fit"]
    if not found.fits:
        lines = [f"masks and cameras fit {'badly' if before > ROUGH else 'roughly'}: {misfit}",
                 "  no usual mistake explains it; masks that miss pieces do, or rough cameras"]
    if not found.can_tell:
        lines.append(f"  but they would fit as well with {names}: cannot tell ({_why(place)})")
    return lines


def _why(place: Stand) -> str:
    """Why masks cannot tell."""
    count = len(place.distance)
    if count == 2:
        return "two photographs share little: two planes that touch the object"
    if place.around < 30:
        return f"the viewpoints are within {place.around:.0f} degrees of each other"
    return f"{count} photographs leave much to chance" if count < ENOUGH else "the object looks alike from all sides"


def _understood(scene: Scene, place: Stand, whole: bool) -> list[str]:
    """What was understood, in a few lines."""
    # The part of the square that shows anything, its angles, and how much of it is object.
    corners = mask_corners(scene.valid)
    angles = torch.rad2deg(2 * torch.atan((corners[:, 0] - corners[:, 1]) / 2 / scene.cameras.focal))
    covered = scene.masks.sum((1, 2, 3)) / scene.valid.sum((1, 2, 3))

    pictures = "photographs" if whole else "pictures (cut to it)"
    lines = [f"{len(scene)} photographs compared; cameras {_range(place.distance)} from the object",
             f"  {place.elevation.min():.0f} to {place.elevation.max():.0f} degrees above it, spread over "
             f"{place.around:.0f} of 360 round it",
             f"object {_range(place.size)} across; masks cover {_range(100 * covered)} % of the {pictures}",
             f"  which see {_range(angles[:, 0])} degrees across and {_range(angles[:, 1])} down"]
    behind = (place.depth < 0).sum().item()
    if behind:
        lines.insert(2, f"  {behind} of them look away from it")
    return lines


def _range(values: Tensor) -> str:
    """The range of some numbers, to three digits."""
    low = f"{values.min().item():.3g}"
    high = f"{values.max().item():.3g}"
    return low if low == high else f"{low} to {high}"
