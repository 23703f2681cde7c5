"""Cameras all round an object: where the turntable and the page look from.

Shapes: `A` cameras.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cameras import Cameras, circle_path, look_at, upright_axis

SWING = 0.45    # radians, between two rows of cameras
STEEPEST = 1.4  # radians, at most, from which an object is looked at


class Orbit(NamedTuple):
    """A sphere around an object in the user's world, from which cameras look at its middle. Tensors are float64."""
    middle: Tensor     # (3,)
    axes: Tensor       # (3, 3) unit vectors in rows: to azimuth 0, up, to azimuth 90 degrees
    distance: Tensor   # () of the cameras from the middle
    elevation: Tensor  # () of the cameras that it was made for, in radians
    focal: float       # NDC, of all cameras

    def rows(self) -> Tensor:
        """Elevations (3,) in radians: that of the scene's cameras between a lower and a higher one."""
        return (self.elevation + torch.tensor([-SWING, 0, SWING]).double()).clamp(-STEEPEST, STEEPEST)

    def cameras(self, azimuths: int, elevations: Tensor) -> Cameras:
        """Cameras at elevations (E,) in radians, and at each of them at evenly spaced azimuths: (E * azimuths,)."""
        turns = torch.arange(azimuths).double() * (2 * torch.pi / azimuths)
        e, a = torch.cartesian_prod(elevations, turns).T
        direction = torch.stack([e.cos() * a.cos(), e.sin(), e.cos() * a.sin()], -1)
        eye = self.middle + self.distance * direction @ self.axes
        R, T = look_at(eye, self.middle, self.axes[1])
        return Cameras(R, T, torch.full_like(T[:, :2], self.focal), torch.zeros_like(T[:, :2]))

    def local(self, points: Tensor) -> Tensor:
        """Points (*, 3) of the user's world in the orbit's own: its axes, its middle, its distance as the unit."""
        return (points.cpu().double() - self.middle) @ self.axes.T / self.distance


def orbit_around(cameras: Cameras, middle: Tensor) -> Orbit:
    """The orbit round a point (3,) as far away and as high as the circle path of a scene's cameras (B,)."""
    path = circle_path(cameras.to("cpu", torch.float64), 9)[:-1]
    up = upright_axis(path)
    offset = path.centers() - middle
    distance = offset.norm(dim=-1).mean()
    elevation = (offset @ up).mean() / distance

    # The first camera's horizontal axis is level, even where it looks straight down.
    start = torch.linalg.cross(up, path.R[0, :, 0])
    return Orbit(middle, torch.stack([start, up, torch.linalg.cross(start, up)]), distance, elevation.asin(), 1.0)
