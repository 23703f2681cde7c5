"""The usual mistakes in writing cameras down, undone: what the cameras would be without each of them.

Other conventions for a pose, mirrored axes, other units for a focal length, intrinsics of a picture of another size.
A mistake's name says what was done.

Shapes: `V` views.
"""
from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from cameras import Cameras
from photographs.shots import AXES, Convention, world_to_view

SIDES = (4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16)  # of a picture, one to the other
SIZES = (1 / 8, 1 / 4, 1 / 3, 1 / 2, 2, 3, 4, 8)      # of a picture, to another copy of it
# Mirrored and exchanged axes: the old ones as a row vector times this are the new ones.
CHANGES = {
    "x negated": ((-1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "y negated": ((1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "z negated": ((1, 0, 0), (0, 1, 0), (0, 0, -1)),
    "y and z exchanged": ((1, 0, 0), (0, 0, 1), (0, 1, 0)),
    "y and z exchanged and y negated": ((1, 0, 0), (0, 0, 1), (0, -1, 0)),
    "y and z exchanged and z negated": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
}


def alternatives(cameras: Cameras, convention: Convention, corner: Tensor | None) -> dict[str, Cameras]:
    """Cameras (V,) of a file that is written in a convention, with each of the usual mistakes undone: by its name.

    corner (V, 2) is the photographs' top left corner in NDC; None where the pictures are cut out of photographs.
    """
    found = _other_readings(cameras, convention) | _mirrored(cameras, convention)

    # Units of half a side for x and y each, or of half the shorter side for both: their ratio is the picture's.
    for ratio in SIDES:
        for axis, label in enumerate("xy"):
            factors = torch.ones(2)
            factors[axis] = ratio
            name = f"the focal length in {label} times {1 / ratio:.3g}"
            found[name] = replace(cameras, focal=cameras.focal * factors)

    # Intrinsics of a picture of another size: all pixels, counted from the top left corner, are other ones.
    if corner is not None:
        for factor in SIZES:
            principal = corner + factor * (cameras.principal - corner)
            name = f"the intrinsics those of a picture {1 / factor:.3g} times as large"
            found[name] = replace(cameras, focal=cameras.focal * factor, principal=principal)
    return found


def _other_readings(cameras: Cameras, convention: Convention) -> dict[str, Cameras]:
    """The same numbers in the file, read in all other conventions."""
    # With R transposed as well: rows for columns.
    matrices = _matrices(cameras, convention)
    turned = matrices.clone()
    turned[:, :3, :3] = matrices[:, :3, :3].transpose(-1, -2)
    variants = {"": matrices, "R transposed": turned}

    # Only what is different has a name.
    own = {flip: name for name, flip in AXES.items()}[convention.flip]
    found = {}
    for exchanged, variant, axes in product((False, True), variants, AXES):
        direction = "camera-to-world and world-to-camera exchanged" if exchanged else ""
        other_axes = f"{axes}'s axes for {own}'s" if axes != own else ""
        parts = [part for part in (variant, direction, other_axes) if part]
        if parts:
            other = Convention(AXES[axes], convention.camera_to_world != exchanged)
            R, T = world_to_view(variants[variant], other)
            found[" and ".join(parts)] = replace(cameras, R=R, T=T)
    return found


def _mirrored(cameras: Cameras, convention: Convention) -> dict[str, Cameras]:
    """One axis mirrored, or y and z exchanged: of the camera, or of the translation in the file alone."""
    matrices = _matrices(cameras, convention)
    found = {}
    for name, rows in CHANGES.items():
        # A change is undone by its transpose.
        undo = torch.tensor(rows, dtype=torch.float64).T.to(matrices)
        found[f"the camera's axes with {name}"] = replace(cameras, R=cameras.R @ undo, T=cameras.T @ undo)

        # The translation alone.
        moved = matrices.clone()
        moved[:, :3, 3] = matrices[:, :3, 3] @ undo
        R, T = world_to_view(moved, convention)
        found[f"the translation with {name}"] = replace(cameras, R=R, T=T)
    return found


def _matrices(cameras: Cameras, convention: Convention) -> Tensor:
    """The poses (V, 4, 4) as a file in a convention has them. The inverse of `world_to_view`."""
    # World-to-camera, or else its inverse.
    flip = torch.tensor(convention.flip).to(cameras.T)
    matrices = torch.eye(4).to(cameras.T).repeat(len(cameras), 1, 1)
    matrices[:, :3, :3] = (cameras.R * flip).transpose(-1, -2)
    matrices[:, :3, 3] = cameras.T * flip
    return torch.linalg.inv(matrices) if convention.camera_to_world else matrices
