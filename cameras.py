"""Cameras, rays, frames and the circle path (Sec. 3 and the supplement of the paper).

The convention is PyTorch3D's, which CO3D uses. Points are row vectors:

    X_view = X_world @ R + T          view axes: +X left, +Y up, +Z into the scene
    xy_ndc = focal * XY_view / Z_view + principal

NDC of a square image run from -1 to 1, +x to the left and +y up, so a point in the top left corner has NDC (1, 1). Image rows
and columns run the other way: sampling a feature map at a projected point negates both coordinates.

The path of virtual viewpoints differs from the released code in its jitter (`circle_path`), and it exists for any cameras: where one, two,
or nearly coinciding ones do not determine a circle, it goes round the vertical that upright photographs imply.

Letters: `*` any leading shape, `B` cameras, `P` points, `R` rays (and, as an attribute, the rotation), `H W` rows and columns.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """A batch of perspective cameras with any leading shape `*`; indexing, stacking and moving act on that shape."""
    R: Tensor          # (*, 3, 3) world -> view rotation, applied from the right
    T: Tensor          # (*, 3) world -> view translation, CO3D units
    focal: Tensor      # (*, 2) focal length (x, y), NDC
    principal: Tensor  # (*, 2) principal point (x, y), NDC

    def _map(self, f) -> Cameras:
        return Cameras(*(f(getattr(self, field.name)) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.T)

    def __getitem__(self, index) -> Cameras:
        """Cameras at `index` of the leading shape (an integer drops the axis, as with tensors; a list, slice or mask keeps it)."""
        return self._map(lambda x: x[index])

    def to(self, *args) -> Cameras:
        """The same cameras on another device or in another dtype."""
        return self._map(lambda x: x.to(*args))

    def unsqueeze(self, axis: int) -> Cameras:
        """One more axis of size 1 in the leading shape; `axis` counts from the left, from 0."""
        return self._map(lambda x: x.unsqueeze(axis))

    @staticmethod
    def cat(cameras: list[Cameras]) -> Cameras:
        """Concatenate along the first axis."""
        return Cameras(*(torch.cat([getattr(c, field.name) for c in cameras]) for field in fields(Cameras)))

    @staticmethod
    def stack(cameras: list[Cameras]) -> Cameras:
        """Stack along a new first axis."""
        return Cameras(*(torch.stack([getattr(c, field.name) for c in cameras]) for field in fields(Cameras)))

    def centers(self) -> Tensor:
        """Camera centres in the world: -T R^T. (*, 3)"""
        return -torch.einsum("...j,...ij->...i", self.T, self.R)

    def to_view(self, points: Tensor) -> Tensor:
        """World points (*, P, 3) in view coordinates (*, P, 3)."""
        return points @ self.R + self.T.unsqueeze(-2)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """World points (*, P, 3) -> NDC (*, P, 2) and depth (*, P). Depth is Z in the view, negative behind the camera."""
        view = self.to_view(points)
        depth = view[..., 2]
        return self.focal.unsqueeze(-2) * view[..., :2] / depth.unsqueeze(-1) + self.principal.unsqueeze(-2), depth

    def unproject(self, xy: Tensor, depth: Tensor) -> Tensor:
        """NDC (*, P, 2) at depth (*, P) -> world points (*, P, 3). The inverse of `project`."""
        xy_view = (xy - self.principal.unsqueeze(-2)) / self.focal.unsqueeze(-2) * depth.unsqueeze(-1)
        view = torch.cat([xy_view, depth.unsqueeze(-1)], -1)
        return (view - self.T.unsqueeze(-2)) @ self.R.transpose(-1, -2)

    def rays(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Rays through NDC positions (*, R, 2): origins and directions in the world, (*, R, 3) each.

        A direction is the difference of the points at depth 2 and depth 1, so it is not normalised: `o + t d` has depth t.
        """
        ones = torch.ones_like(xy[..., 0])
        near, far = self.unproject(xy, ones), self.unproject(xy, 2 * ones)
        rays_d = far - near
        return near - rays_d, rays_d


def pixel_grid(height: int, width: int, full: int | None = None, device=None) -> Tensor:
    """NDC of an H x W grid of rays, row-major from the top left: (H * W, 2).

    The outer rays pass through the outermost pixel centres of an image of `full` pixels a side (default: of H x W itself), not
    through the centres of coarse cells: x runs from 1 - 1/full down to -(1 - 1/full). That is how the released models were trained.
    """
    y = torch.linspace(1 - 1 / (full or height), -1 + 1 / (full or height), height, device=device)
    x = torch.linspace(1 - 1 / (full or width), -1 + 1 / (full or width), width, device=device)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).reshape(-1, 2)


def relative_to(cameras: Cameras, query: Cameras, move_origin: bool = True) -> Cameras:
    """`cameras` (*, ...) in a world whose axes are the view axes of `query`: R' = R_q^T R (Sec. 3.1).

    With `move_origin` the origin moves to the query's centre as well, T' = T - T_q R', and the query itself becomes the identity
    (the EFT's query-relative frame). Without it the world keeps its origin, T' = T (the object frame of the neural field).
    """
    R = query.R.transpose(-1, -2) @ cameras.R
    T = cameras.T - torch.einsum("...i,...ij->...j", query.T, R) if move_origin else cameras.T
    return Cameras(R, T, cameras.focal, cameras.principal)


def look_at(eye: Tensor, at: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Cameras at `eye` whose +Z axis points to `at` and whose +Y axis is as near to `up` as it can be; all (*, 3), broadcast together.

    Returns R (*, 3, 3) and T (*, 3). The world axes of the camera are the columns of R. An `up` along the line of sight says nothing
    about the roll; any roll is returned then.
    """
    eye, at, up = torch.broadcast_tensors(eye, at, up)
    z = F.normalize(at - eye, dim=-1)
    x = _perpendicular(up, z)
    R = torch.stack([x, torch.linalg.cross(z, x), z], -1)
    return R, -torch.einsum("...i,...ij->...j", eye, R)


def nearest_point_to_axes(cameras: Cameras) -> Tensor:
    """The point nearest in least squares to the optical axes of cameras (B): (3,), world. What the circle path looks at (supp.).

    Minimises sum_i |(I - d_i d_i^T)(x - o_i)|^2 over x, with o_i the centres and d_i unit directions. As released, the axes pass
    through the *mean* principal point. Parallel axes (or a single one) leave a line of such points: its nearest to the world origin.
    """
    cameras64 = cameras.to("cpu", torch.float64)
    rays_o, rays_d = cameras64.rays(cameras64.principal.mean(0).expand(len(cameras), 1, 2))  # (B, 1, 3) each
    rays_o, rays_d = rays_o[:, 0], F.normalize(rays_d[:, 0], dim=-1)
    P = torch.eye(3, dtype=torch.float64) - rays_d.unsqueeze(2) * rays_d.unsqueeze(1)  # (B, 3, 3) projections off the axes
    # rtol: axes within about a third of a degree of each other count as parallel
    point = torch.linalg.pinv(P.mean(0), rtol=1e-5, hermitian=True) @ torch.einsum("bij,bj->i", P, rays_o) / len(cameras)
    return point.to(cameras.T)


def depth_range(cameras: Cameras, margin: float = 5.0) -> tuple[float, float]:
    """Nearest and farthest depth of the EFT's points: the mean distance of cameras (B) from the world origin -+ `margin`, CO3D units."""
    distance = cameras.centers().norm(dim=-1).mean().item()
    return distance - margin, distance + margin


def circle_path(cameras: Cameras, n: int, jitter: float = 0.0, generator: torch.Generator | None = None) -> Cameras:
    """`n` cameras on the circle that fits cameras (B), looking at their `nearest_point_to_axes` (supp.): the viewpoints of distillation.

    The first one has the bearing of camera 0; the last one closes the circle and coincides with it. Intrinsics are the mean ones.
    `jitter` (radians) swings each camera towards or away from the pole by an angle ~ U(-jitter, jitter) about the point it looks at, so
    its distance to that point stays. (The released one turns by about angle / sqrt(n) and pulls the cameras inwards.)
    """
    cameras64 = cameras.to("cpu", torch.float64)  # a dozen numbers: exact, and the same on every device
    at = _point_ahead(cameras64)
    center, normal, bearing, radius = _fit_circle(cameras64, at) or _upright_circle(cameras64, at)
    angle = torch.linspace(0, 2 * math.pi, n, dtype=torch.float64).unsqueeze(-1)
    eye = center + radius * (angle.cos() * bearing + angle.sin() * torch.linalg.cross(normal, bearing))  # (n, 3)
    if jitter:
        device = generator.device if generator else "cpu"
        swing = jitter * (2 * torch.rand(n, 1, generator=generator, device=device).to(eye) - 1)
        offset = eye - at
        axis = _perpendicular(offset, -normal.expand_as(offset))
        eye = at + swing.cos() * offset + swing.sin() * torch.linalg.cross(axis, offset)
    R, T = look_at(eye, at, -normal)
    mean = Cameras(R, T, cameras64.focal.mean(0).expand(n, 2), cameras64.principal.mean(0).expand(n, 2))
    return mean.to(cameras.T.device, cameras.T.dtype)


def _perpendicular(a: Tensor, b: Tensor) -> Tensor:
    """Unit vectors along a x b, (*, 3) each; any unit vector perpendicular to `b` where the two are parallel."""
    cross = torch.linalg.cross(a, b)
    least = F.one_hot(b.abs().argmin(-1), 3).to(b)  # the coordinate axis least along b
    parallel = cross.norm(dim=-1, keepdim=True) <= 1e-6 * a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    return F.normalize(torch.where(parallel, torch.linalg.cross(least, b), cross), dim=-1)


def _point_ahead(cameras: Cameras) -> Tensor:
    """What cameras (B) look at, (3,): the nearest point to their axes where all have it in front of them. Cameras that turn on the
    spot or look away from each other do not; then it is the world origin, or else a point one unit ahead of camera 0."""
    ahead = cameras.centers()[0] + cameras.R[0, :, 2]
    for point in (nearest_point_to_axes(cameras), torch.zeros_like(ahead)):
        if (cameras.to_view(point.expand(len(cameras), 1, 3))[..., 2] > 1e-3).all():
            return point
    return ahead


def _upright(cameras: Cameras) -> Tensor:
    """The world's vertical as cameras (B) that are held upright suggest it: (3,), a unit vector.

    It is at right angles to their horizontal axes. A small pull towards the mean up axis decides where those leave a choice (one camera).
    """
    x, up = cameras.R[:, :, 0], cameras.R[:, :, 1].mean(0)
    vertical = torch.linalg.eigh(x.T @ x / len(x) - 0.002 * up.outer(up)).eigenvectors[:, 0]
    return vertical if vertical @ up >= 0 else -vertical


def _fit_circle(cameras: Cameras, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The circle of the paper: plane by SVD, algebraic least squares (Kasa) inside it. Centre, normal, bearing of camera 0, radius.

    None where the centres do not determine it: fewer than three distinct ones, or so short or noisy an arc that the plane stands across
    the cameras' vertical, the circle does not go round what they look at, or it is a dot above it.
    """
    centers, upright = cameras.centers(), _upright(cameras)
    mean = centers.mean(0)
    _, spread, axes = torch.linalg.svd(centers - mean)  # axes: rows, the last one normal to the plane
    if len(centers) < 3 or spread[1] <= 1e-3 * spread[0]:
        return None
    normal, plane = axes[2], axes[:2]
    # As released, where the mean centre decides; nearer to the plane through the origin the SVD's sign is arbitrary: cameras stand upright.
    flip = normal @ mean > 1.5 if (normal @ mean).abs() > 1.5 else normal @ upright > 0
    normal = -normal if flip else normal

    xy = (centers - mean) @ plane.T  # (B, 2); |xy|^2 = 2 c.xy + (r^2 - |c|^2)
    solution = torch.linalg.lstsq(torch.cat([2 * xy, torch.ones_like(xy[:, :1])], 1), xy.square().sum(1, keepdim=True)).solution[:, 0]
    c, radius = solution[:2], (solution[2] + solution[:2].square().sum()).sqrt()
    center = mean + c @ plane
    round_at = (plane @ (at - center)).norm() < radius / 3 and radius > 0.3 * (centers - at).norm(dim=-1).mean()
    if not round_at or (normal @ upright).abs() < 0.5:
        return None
    bearing = F.normalize(centers[0] - center, dim=0)  # as released: not projected, so the path tilts towards camera 0
    return center, normal, bearing if (bearing @ normal).abs() < 0.5 else plane[0], radius


def _upright_circle(cameras: Cameras, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without a fit: the circle round the vertical through `at` at the cameras' mean height and radius. As `_fit_circle` returns it."""
    upright, offset = _upright(cameras), cameras.centers() - at
    across = offset - (offset @ upright).unsqueeze(-1) * upright  # (B, 3) horizontal part
    radius = across.norm(dim=-1).mean().clamp(min=0.3 * offset.norm(dim=-1).mean())
    return at + (offset @ upright).mean() * upright, -upright, _perpendicular(_perpendicular(upright, across[0]), upright), radius
