"""Cameras, rays, frames, the circle path, and scenes: posed views of one object (Sec. 3 and the supplement).

The convention is PyTorch3D's, which CO3D uses. Points are row vectors:

    X_view = X_world @ R + T          view axes: +X left, +Y up, +Z into the scene
    xy_ndc = focal * XY_view / Z_view + principal

NDC of a square image run from -1 to 1, +x to the left and +y up, so a point in the top left corner has NDC (1, 1).
Image rows and columns run the other way: sampling a feature map at a projected point negates both coordinates.

The path of virtual viewpoints differs from the released code in its jitter (`circle_path`), and it exists for any
cameras: where one, two, or nearly coinciding ones do not determine a circle, it goes round the vertical that upright
photographs imply.

Shapes: `*` any leading shape, `B` cameras, `P` points, `R` rays (and, as an attribute, the rotation), `H W` rows and
columns.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.machine import rand

CONTEXT = 0.3    # what a crop shows around the box of the object's mask, as a fraction of the box
HALF_SIDE = 2.5  # of an object, along its longest side, as CO3D normalizes them; CO3D units. Toys: 2.25 to 2.9


# ---------------------------------------------------------------------------------------------- cameras

@dataclass(frozen=True)
class Cameras:
    """A batch of perspective cameras with any leading shape `*`; indexing, stacking and moving act on that shape."""
    R: Tensor          # (*, 3, 3) world -> view rotation, applied from the right
    T: Tensor          # (*, 3) world -> view translation, CO3D units
    focal: Tensor      # (*, 2) focal length (x, y), NDC
    principal: Tensor  # (*, 2) principal point (x, y), NDC

    def __len__(self) -> int:
        return len(self.T)

    def __getitem__(self, index) -> Cameras:
        """Cameras at `index` of the leading shape: an integer drops the axis, a list, slice or mask keeps it."""
        return self.map(lambda x: x[index])

    def to(self, *args) -> Cameras:
        """The same cameras on another device or in another dtype."""
        return self.map(lambda x: x.to(*args))

    def unsqueeze(self, axis: int) -> Cameras:
        """One more axis of size 1 in the leading shape; `axis` counts from the left, from 0."""
        return self.map(lambda x: x.unsqueeze(axis))

    def map(self, function: Callable[[Tensor], Tensor]) -> Cameras:
        """`function` of each of the four parts."""
        return Cameras(function(self.R), function(self.T), function(self.focal), function(self.principal))

    def scaled(self, factor: float | Tensor) -> Cameras:
        """The same cameras in a world `factor` times as large; a tensor is broadcast to T (*, 3)."""
        return replace(self, T=self.T * factor)

    def about(self, center: Tensor) -> Cameras:
        """The same cameras in a world whose origin is at `center` of this one; a tensor, broadcast to (*, 3)."""
        return replace(self, T=self.T + torch.einsum("...i,...ij->...j", center.to(self.T), self.R))

    def zoomed(self, factor: float) -> Cameras:
        """The same cameras, whose pictures show everything `factor` times as large about their middle."""
        return replace(self, focal=self.focal * factor, principal=self.principal * factor)

    @staticmethod
    def cat(cameras: list[Cameras]) -> Cameras:
        """Concatenate along the first axis."""
        return Cameras._join(cameras, torch.cat)

    @staticmethod
    def stack(cameras: list[Cameras]) -> Cameras:
        """Stack along a new first axis."""
        return Cameras._join(cameras, torch.stack)

    @staticmethod
    def _join(cameras: list[Cameras], join: Callable[[list[Tensor]], Tensor]) -> Cameras:
        R = join([camera.R for camera in cameras])
        T = join([camera.T for camera in cameras])
        focal = join([camera.focal for camera in cameras])
        principal = join([camera.principal for camera in cameras])
        return Cameras(R, T, focal, principal)

    def centers(self) -> Tensor:
        """Camera centers in the world: -T R^T. (*, 3)"""
        return -torch.einsum("...j,...ij->...i", self.T, self.R)

    def to_view(self, points: Tensor) -> Tensor:
        """World points (*, P, 3) in view coordinates (*, P, 3)."""
        return points @ self.R + self.T.unsqueeze(-2)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """World points (*, P, 3) -> NDC (*, P, 2) and depth (*, P), which is Z in the view: negative behind it."""
        view = self.to_view(points)
        depth = view[..., 2]
        scaled = self.focal.unsqueeze(-2) * view[..., :2] / depth.unsqueeze(-1)
        return scaled + self.principal.unsqueeze(-2), depth

    def unproject(self, xy: Tensor, depth: Tensor) -> Tensor:
        """NDC (*, P, 2) at depth (*, P) -> world points (*, P, 3). The inverse of `project`."""
        slope = (xy - self.principal.unsqueeze(-2)) / self.focal.unsqueeze(-2)
        depth = depth.unsqueeze(-1)
        view = torch.cat([slope * depth, depth], -1)
        return (view - self.T.unsqueeze(-2)) @ self.R.transpose(-1, -2)

    def rays(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Rays through NDC positions (*, R, 2): origins and directions in the world, (*, R, 3) each.

        A direction is the difference of the points at depth 2 and depth 1, so it is not normalized: `o + t d` has
        depth t [released: render_utils.py:43-65].
        """
        ones = torch.ones_like(xy[..., 0])
        near = self.unproject(xy, ones)
        far = self.unproject(xy, 2 * ones)
        rays_d = far - near
        return near - rays_d, rays_d


def pixel_grid(height: int, width: int, full: int | None = None, device=None) -> Tensor:
    """NDC of an H x W grid of rays, row-major from the top left: (H * W, 2).

    The outer rays pass through the outermost pixel centers of an image of `full` pixels a side (default: of H x W
    itself), not through the centers of coarse cells: x runs from 1 - 1/full down to -(1 - 1/full). That is how the
    released models were trained [released: render_utils.py:119-144; train.py:178-203].
    """
    top = 1 - 1 / (full or height)
    left = 1 - 1 / (full or width)
    y = torch.linspace(top, -top, height, device=device)
    x = torch.linspace(left, -left, width, device=device)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], -1).reshape(-1, 2)


# ---------------------------------------------------------------------------------------------- frames

def relative_to(cameras: Cameras, query: Cameras, move_origin: bool = True) -> Cameras:
    """`cameras` (*, ...) in a world whose axes are the view axes of `query`: R' = R_q^T R (Sec. 3.1).

    With `move_origin` the origin moves to the query's center as well, T' = T - T_q R', and the query itself becomes
    the identity: the EFT's query-relative frame [released: camera_utils.py:98-135]. Without it the world keeps its
    origin, T' = T: the object frame of the neural field.
    """
    R = query.R.transpose(-1, -2) @ cameras.R
    T = cameras.T
    if move_origin:
        T = T - torch.einsum("...i,...ij->...j", query.T, R)
    return Cameras(R, T, cameras.focal, cameras.principal)


def look_at(eye: Tensor, at: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Cameras at `eye` whose +Z axis points to `at` and whose +Y axis is as near to `up` as it can be.

    All three are (*, 3), broadcast together. Returns R (*, 3, 3) and T (*, 3). The world axes of the camera are the
    columns of R. An `up` along the line of sight says nothing about the roll; any roll is returned then.
    """
    eye, at, up = torch.broadcast_tensors(eye, at, up)
    z = F.normalize(at - eye, dim=-1)
    x = _perpendicular(up, z)
    y = torch.linalg.cross(z, x)
    R = torch.stack([x, y, z], -1)
    return R, -torch.einsum("...i,...ij->...j", eye, R)


def depth_range(cameras: Cameras, margin: float = 5.0) -> tuple[float, float]:
    """Nearest and farthest depth of the EFT's points: the mean distance of cameras (B) from the origin -+ `margin`.

    In CO3D units. Not clamped: the nearest depth is negative where cameras are nearer than `margin`
    [released: distillation.py:82-84].
    """
    distance = cameras.centers().norm(dim=-1).mean().item()
    return distance - margin, distance + margin


def object_half_side(cameras: Cameras) -> float:
    """Half of an object's longest side, in its world's unit, from the cameras (B,) of its crops. It is at the origin.

    A crop shows the object and `CONTEXT` around it, so distance and focal length say how large it is, whatever the
    unit. Seen along its longest side it looks smaller, so the largest views count, but for one in ten.
    """
    shown = cameras.centers().norm(dim=-1) / cameras.focal.amin(-1)
    return shown.quantile(0.9).item() / (1 + CONTEXT)


def object_sphere(cameras: Cameras) -> tuple[Tensor, float]:
    """A sphere round the object that crops (B,) show, in any world: its center (3,), float64, and its radius.

    A crop has the object in its middle, so the center is the point nearest to the rays there. The radius is half the
    width that the largest views show, but for one in ten.
    """
    cameras = cameras.to("cpu", torch.float64)
    rays_o, rays_d = cameras.rays(torch.zeros(len(cameras), 1, 2, dtype=torch.float64))
    center = nearest_point(rays_o[:, 0], rays_d[:, 0])
    shown = cameras.about(center).centers().norm(dim=-1) / cameras.focal.amin(-1)
    return center, shown.quantile(0.9).item()


def nearest_point_to_axes(cameras: Cameras) -> Tensor:
    """The point nearest in least squares to the optical axes of cameras (B): (3,), world (supplement).

    Minimizes sum_i |(I - d_i d_i^T)(x - o_i)|^2 over x, with o_i the centers and d_i unit directions. The axes pass
    through the *mean* principal point [released: camera_utils.py:370-400]. Parallel axes, or a single one, leave a
    line of such points: its nearest to the world origin.
    """
    cameras64 = cameras.to("cpu", torch.float64)
    principal = cameras64.principal.mean(0).expand(len(cameras), 1, 2)
    rays_o, rays_d = cameras64.rays(principal)  # (B, 1, 3) each
    return nearest_point(rays_o[:, 0], rays_d[:, 0]).to(cameras.T)


def nearest_point(rays_o: Tensor, rays_d: Tensor) -> Tensor:
    """The point nearest in least squares to rays (R, 3), float64: (3,). Of parallel ones the nearest to the origin."""
    # The normal equations: the mean projection P off the rays times x is the mean of the projected origins.
    rays_d = F.normalize(rays_d, dim=-1)
    along = rays_d.unsqueeze(2) * rays_d.unsqueeze(1)
    P = torch.eye(3, dtype=torch.float64) - along  # (R, 3, 3)
    projected = torch.einsum("bij,bj->i", P, rays_o)

    # With this tolerance rays within about a third of a degree of each other count as parallel.
    inverse = torch.linalg.pinv(P.mean(0), rtol=1e-5, hermitian=True)
    return inverse @ projected / len(rays_o)


# ---------------------------------------------------------------------------------------------- the circle path

class Circle(NamedTuple):
    """A circle in space, and where on it a path begins."""
    center: Tensor   # (3,)
    normal: Tensor   # (3,) unit vector across the plane, away from the up axis of cameras on the circle
    bearing: Tensor  # (3,) unit vector from the center to the first viewpoint
    radius: Tensor   # ()


def circle_path(cameras: Cameras, n: int, jitter: float = 0.0, generator: torch.Generator | None = None) -> Cameras:
    """`n` cameras on the circle that fits cameras (B): the query viewpoints of distillation (supplement).

    They look at the `nearest_point_to_axes`. The first one has the bearing of camera 0; the last one closes the circle
    and coincides with it. Intrinsics are the mean ones, the up axis is the circle's negative normal (its pole)
    [released: camera_utils.py:245-254].

    `jitter` (radians) swings each camera towards or away from the pole by an angle ~ U(-jitter, jitter) about the
    point it looks at, so its distance to that point stays. The released one turns by about angle / sqrt(n) and pulls
    the cameras inwards [released: camera_utils.py:238-241, 348-354].
    """
    # A dozen numbers, in double precision on the CPU: the same path on every device.
    cameras64 = cameras.to("cpu", torch.float64)
    at = _point_ahead(cameras64)
    circle = _fit_circle(cameras64, at)
    if circle is None:
        circle = _upright_circle(cameras64, at)

    # Once round the circle.
    angle = torch.linspace(0, 2 * math.pi, n, dtype=torch.float64).unsqueeze(-1)  # (n, 1)
    sideways = torch.linalg.cross(circle.normal, circle.bearing)
    direction = angle.cos() * circle.bearing + angle.sin() * sideways
    eye = circle.center + circle.radius * direction  # (n, 3)

    # Swing every eye about the axis that is level and at right angles to its line of sight.
    if jitter:
        uniform = rand(n, 1, generator=generator, device="cpu").double()
        swing = jitter * (2 * uniform - 1)
        offset = eye - at
        axis = _perpendicular(offset, -circle.normal.expand_as(offset))
        eye = at + swing.cos() * offset + swing.sin() * torch.linalg.cross(axis, offset)

    R, T = look_at(eye, at, -circle.normal)
    focal = cameras64.focal.mean(0).expand(n, 2)
    principal = cameras64.principal.mean(0).expand(n, 2)
    return Cameras(R, T, focal, principal).to(cameras.T.device, cameras.T.dtype)


def _fit_circle(cameras: Cameras, at: Tensor) -> Circle | None:
    """The circle of the paper: the plane by SVD, an algebraic least-squares circle inside it.

    None where the centers do not determine it: fewer than three distinct ones, or so short or noisy an arc that the
    plane stands across the cameras' vertical, the circle does not go round what they look at, or it is a dot above it.
    """
    # The plane of the centers: two rows of `axes` span it, the third is normal to it.
    centers = cameras.centers()
    mean = centers.mean(0)
    _, spread, axes = torch.linalg.svd(centers - mean)
    if len(centers) < 3 or spread[1] <= 1e-3 * spread[0]:
        return None
    plane = axes[:2]
    normal = axes[2]

    # The SVD leaves the normal's sign open. A mean center over 1.5 units along it turns it round, so that it points
    # back to the origin [released: camera_utils.py:211-217]. Nearer than that the sign that the SVD gives is arbitrary;
    # there the cameras' vertical decides.
    upright = upright_axis(cameras)
    height = normal @ mean
    turned = height > 0 if height.abs() > 1.5 else normal @ upright > 0
    if turned:
        normal = -normal

    # The circle with center c and radius r (Kasa): |xy|^2 = 2 c.xy + (r^2 - |c|^2), linear in c and r^2 - |c|^2.
    xy = (centers - mean) @ plane.T  # (B, 2)
    system = torch.cat([2 * xy, torch.ones_like(xy[:, :1])], 1)
    solution = torch.linalg.lstsq(system, xy.square().sum(1, keepdim=True)).solution[:, 0]
    c = solution[:2]
    radius = (solution[2] + c.square().sum()).sqrt()
    center = mean + c @ plane

    # A circle that cameras could have gone round the object on, level or nearly so.
    aside = (plane @ (at - center)).norm()
    distance = (centers - at).norm(dim=-1).mean()
    round_at = aside < radius / 3 and radius > 0.3 * distance
    if not round_at or (normal @ upright).abs() < 0.5:
        return None

    # Not projected into the plane, so the path tilts towards camera 0 [released: camera_utils.py:234-236].
    bearing = F.normalize(centers[0] - center, dim=0)
    if (bearing @ normal).abs() >= 0.5:
        bearing = plane[0]
    return Circle(center, normal, bearing, radius)


def _upright_circle(cameras: Cameras, at: Tensor) -> Circle:
    """Without a fit: the circle round the vertical through `at` at the cameras' mean height and radius."""
    # The cameras' places, split into height above `at` and distance across.
    upright = upright_axis(cameras)
    offset = cameras.centers() - at  # (B, 3)
    height = offset @ upright        # (B,)
    across = offset - height.unsqueeze(-1) * upright

    # Cameras straight above what they look at would make it a dot.
    smallest = 0.3 * offset.norm(dim=-1).mean()
    radius = across.norm(dim=-1).mean().clamp(min=smallest)
    center = at + height.mean() * upright
    sideways = _perpendicular(upright, across[0])
    bearing = _perpendicular(sideways, upright)
    return Circle(center, -upright, bearing, radius)


def _point_ahead(cameras: Cameras) -> Tensor:
    """What cameras (B) look at, (3,): the nearest point to their axes where all have it in front of them.

    Cameras that turn on the spot or look away from each other do not; then it is the world origin, or else a point one
    unit ahead of camera 0.
    """
    nearest = nearest_point_to_axes(cameras)
    for point in (nearest, torch.zeros_like(nearest)):
        depth = cameras.to_view(point.expand(len(cameras), 1, 3))[..., 2]
        if (depth > 1e-3).all():
            return point
    return cameras.centers()[0] + cameras.R[0, :, 2]


def upright_axis(cameras: Cameras) -> Tensor:
    """The world's vertical as cameras (B) that are held upright suggest it: (3,), a unit vector.

    It is at right angles to their horizontal axes. A small pull towards the mean up axis decides where those leave a
    choice (one camera).
    """
    x = cameras.R[:, :, 0]
    up = cameras.R[:, :, 1].mean(0)
    scatter = x.T @ x / len(x) - 0.002 * up.outer(up)
    vertical = torch.linalg.eigh(scatter).eigenvectors[:, 0]
    return vertical if vertical @ up >= 0 else -vertical


def _perpendicular(a: Tensor, b: Tensor) -> Tensor:
    """Unit vectors along a x b, (*, 3) each; any unit vector perpendicular to `b` where the two are parallel."""
    cross = torch.linalg.cross(a, b)
    tolerance = 1e-6 * a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    parallel = cross.norm(dim=-1, keepdim=True) <= tolerance

    # Instead: at right angles to `b` and to the coordinate axis that is least along it.
    least = F.one_hot(b.abs().argmin(-1), 3).to(b)
    instead = torch.linalg.cross(least, b)
    return F.normalize(torch.where(parallel, instead, cross), dim=-1)


# ---------------------------------------------------------------------------------------------- scenes

class Similarity(NamedTuple):
    """From the normalized world to the user's: x_user = scale * R @ x + shift. Tensors are float64."""
    R: Tensor      # (3, 3) a rotation
    scale: float   # the user's units in one CO3D unit
    shift: Tensor  # (3,) where the user's world has the middle of the object

    def points(self, x: Tensor) -> Tensor:
        """Points (*, 3) of the normalized world in the user's, in the same dtype."""
        moved = self.scale * x.double() @ self.R.T.to(x.device) + self.shift.to(x.device)
        return moved.to(x.dtype)

    def cameras(self, cameras: Cameras) -> Cameras:
        """Cameras (*) of the normalized world in the user's, float64: a world may be far from its origin."""
        cameras = cameras.to("cpu", torch.float64)
        R = self.R @ cameras.R
        T = self.scale * cameras.T - torch.einsum("i,...ij->...j", self.shift, R)
        return Cameras(R, T, cameras.focal, cameras.principal)

    def normalized(self, cameras: Cameras) -> Cameras:
        """The inverse: cameras (*) of the user's world in the normalized one, float64."""
        cameras = cameras.to("cpu", torch.float64)
        T = cameras.T + torch.einsum("i,...ij->...j", self.shift, cameras.R)
        return Cameras(self.R.T @ cameras.R, T / self.scale, cameras.focal, cameras.principal)

    def then(self, after: Similarity) -> Similarity:
        """First this one, then another: from this one's normalized world to the other's user."""
        shift = after.points(self.shift)
        return Similarity(after.R @ self.R, after.scale * self.scale, shift)


@dataclass(frozen=True)
class Scene:
    """V views of one object, S pixels a side. Images are multiplied by their soft masks: the background is black."""
    images: Tensor    # (V, 3, S, S) in [0, 1]
    masks: Tensor     # (V, 1, S, S) soft, probability of foreground in [0, 1]
    valid: Tensor     # (V, 1, S, S) 1 where the photograph is, 0 in the padding
    cameras: Cameras  # (V,), NDC of the square output
    names: list[str]  # frame numbers as annotated
    sequence: str     # the sequence's name
    whole: Scene | None = None  # the same views before they were cut to the object, where they are known
    world: Similarity | None = None  # from the cameras' world, if it is the normalized one, to the user's

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index) -> Scene:
        """The scene with the views at `index` only: a list, a slice or a tensor of positions."""
        # Positions in a list work for tensors and names alike.
        index = torch.arange(len(self))[index].tolist()
        names = [self.names[i] for i in index]
        cameras = self.cameras[index]
        whole = self.whole and self.whole[index]
        return Scene(self.images[index], self.masks[index], self.valid[index], cameras, names, self.sequence, whole,
                     self.world)

    def to(self, device) -> Scene:
        """The same scene on another device."""
        images = self.images.to(device)
        masks = self.masks.to(device)
        valid = self.valid.to(device)
        whole = self.whole and self.whole.to(device)
        return replace(self, images=images, masks=masks, valid=valid, cameras=self.cameras.to(device), whole=whole)

    def user_cameras(self) -> Cameras:
        """The cameras (V,) of the views, whole ones where they are known, in the user's world, where results are."""
        cameras = (self.whole or self).cameras
        return cameras if self.world is None else self.world.cameras(cameras)

    def world_numbers(self) -> dict | None:
        """`world` as plain data."""
        world = self.world
        return world and {"R": world.R.tolist(), "scale": world.scale, "shift": world.shift.tolist()}

    def with_cameras(self, function: Callable[[Cameras], Cameras]) -> Scene:
        """The same views by other cameras: `function` of these, and of those of the whole views."""
        whole = self.whole and self.whole.with_cameras(function)
        return replace(self, cameras=function(self.cameras), whole=whole)


def evenly_spaced(n: int, count: int) -> list[int]:
    """Positions of `count` evenly spaced ones of `n` things: the first, the last and between; or all where n <= count.

    A single one is the first.
    """
    if n <= count:
        return list(range(n))
    return torch.linspace(0, n - 1, count).long().tolist()
