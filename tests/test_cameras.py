"""Cameras against the released code's numbers (`cameras.npz`), round trips, hand-worked cases and degenerate paths."""
import math

import pytest
import torch

from cameras import Cameras, circle_path, depth_range, look_at, nearest_point_to_axes, pixel_grid, relative_to
from tests.support import parity

TOLERANCE = dict(rtol=1e-5, atol=1e-5)  # 1e-5 x (1 + magnitude)
PATH = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def recorded():
    return parity.load("cameras")


def cameras_of(recorded: dict, prefix: str) -> Cameras:
    return Cameras(*(recorded[f"{prefix}_{k}"] for k in "RTfc"))


def assert_same(actual: Cameras, recorded: dict, prefix: str, tolerance: dict):
    for name, value in zip("RTfc", (actual.R, actual.T, actual.focal, actual.principal)):
        parity.assert_close(value, recorded[f"{prefix}_{name}"], **tolerance)


def ring(n: int, elevation=0.0, radius=3.0, arc=2 * math.pi, noise=0.0, seed=0) -> Cameras:
    """n upright cameras looking at (0.1, 0.2, 0.3), azimuth from 0 to `arc` (end excluded), vertical +Y."""
    generator = torch.Generator().manual_seed(seed)
    azimuth = torch.arange(n) * (arc / n)
    elevation = elevation + noise * (2 * torch.rand(n, generator=generator) - 1)
    direction = torch.stack([elevation.cos() * azimuth.sin(), elevation.sin(), elevation.cos() * azimuth.cos()], -1)
    at = torch.tensor([0.1, 0.2, 0.3])
    R, T = look_at(at + radius * direction, at, torch.tensor([0.0, 1.0, 0.0]))
    return Cameras(R, T, torch.full((n, 2), 2.5), torch.zeros(n, 2))


@pytest.mark.parametrize("name", "ABC")
def test_centers_and_nearest_point(recorded, name):
    cameras = cameras_of(recorded, f"in_{name}")
    parity.assert_close(cameras.centers(), recorded[f"out_{name}_center"], **TOLERANCE)
    parity.assert_close(nearest_point_to_axes(cameras), recorded[f"out_{name}_centroid"], **TOLERANCE)


@pytest.mark.parametrize("name", "AB")
def test_circle_path(recorded, name):
    path = circle_path(cameras_of(recorded, f"in_{name}"), int(recorded["in_path_n"]))
    assert_same(path, recorded, f"out_{name}_path", PATH)
    parity.assert_close(path.centers(), recorded[f"out_{name}_path_eye"], **PATH)
    parity.assert_close(path.R[0], path.R[-1], atol=1e-5)


def test_circle_path_of_undetermined_sign(recorded):
    """Set C: the recorded sign of the normal is the SVD's whim. The opposite one travels the other way, upside down."""
    cameras = cameras_of(recorded, "in_C")
    path = circle_path(cameras, int(recorded["in_path_n"]))
    eye, up = recorded["out_C_path_eye"], recorded["out_C_path_up"]
    if (path.R[0, :, 1] @ up[0]) > 0:
        assert_same(path, recorded, "out_C_path", PATH)
    else:
        parity.assert_close(path.centers(), eye.flip(0), **PATH)
        R, T = look_at(eye.flip(0), recorded["out_C_path_at"], -up)
        parity.assert_close(path.R, R, **PATH)
        parity.assert_close(path.T, T, **PATH)
    assert (path.R[:, :, 1] @ cameras.R[:, :, 1].mean(0) > 0).all()  # ours: upright where the sign is free


@pytest.mark.parametrize("name", "ABC")
def test_look_at(recorded, name):
    R, T = look_at(*(recorded[f"out_{name}_path_{k}"] for k in ("eye", "at", "up")))
    parity.assert_close(R, recorded[f"out_{name}_path_R"], **TOLERANCE)
    parity.assert_close(T, recorded[f"out_{name}_path_T"], **TOLERANCE)


def test_relative_cameras_and_chain(recorded):
    cameras = cameras_of(recorded, "in_A")
    for q in recorded["in_query_idx"].tolist():
        for move in (0, 1):
            relative = relative_to(cameras, cameras[q], bool(move))
            assert_same(relative, recorded, f"out_A_rel_q{q}_origin{move}", TOLERANCE)
    first = relative_to(cameras, cameras[0])
    assert_same(relative_to(first[[4]], first[4]), recorded, "out_A_chain_query", TOLERANCE)
    assert_same(relative_to(first[[1, 6]], first[4]), recorded, "out_A_chain_input", TOLERANCE)
    both = Cameras.cat([cameras, cameras_of(recorded, "out_A_jitter")])
    parity.assert_close(both.R, recorded["out_A_cat_R"], **TOLERANCE)


def test_projection_and_unprojection(recorded):
    cameras, points = cameras_of(recorded, "in_A"), recorded["in_points"]
    points = points.expand(len(cameras), -1, -1)
    parity.assert_close(cameras.to_view(points), recorded["out_A_points_view"], **TOLERANCE)
    xy, depth = cameras.project(points)
    parity.assert_close(xy, recorded["out_A_points_ndc"][..., :2], **TOLERANCE)
    parity.assert_close(1 / depth, recorded["out_A_points_ndc"][..., 2], **TOLERANCE)
    xy_depth = recorded["in_xy_depth"].expand(len(cameras), -1, -1)
    points = cameras.unproject(xy_depth[..., :2], xy_depth[..., 2])
    parity.assert_close(points, recorded["out_A_unproject"], **TOLERANCE)


def test_angles_and_depth_range(recorded):
    cameras = cameras_of(recorded, "in_A")
    to_camera = torch.nn.functional.normalize(cameras.centers() - nearest_point_to_axes(cameras), dim=-1).double()
    angles = torch.rad2deg((to_camera @ to_camera[0]).clamp(-1, 1).acos())
    parity.assert_close(angles[1:], recorded["out_A_angles_deg"][1:], rtol=1e-5, atol=1e-4)
    parity.assert_close(torch.tensor(depth_range(cameras)), recorded["out_A_depth_range"], **TOLERANCE)
    near, far = depth_range(cameras, margin=1.5)
    assert far - near == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("name, factor", [("feat", 8), ("grid", 1), ("half", 2)])
def test_ray_grids(recorded, name, factor):
    cameras = cameras_of(recorded, "in_A")[[0, 2]]
    xys = recorded[f"out_A_rays_{name}_xys"]
    height, width = xys.shape[1:3]
    xy = pixel_grid(height, width, full=factor * height).expand(2, -1, -1)
    parity.assert_close(xy, xys.reshape(2, -1, 2), **TOLERANCE)
    near, far = depth_range(cameras_of(recorded, "in_A"))
    lengths = recorded.get(f"out_A_rays_{name}_lengths", recorded.get(f"out_A_rays_{name}_lengths_row"))
    parity.assert_close(torch.linspace(near, far, lengths.shape[-1]).expand(lengths.shape), lengths, **TOLERANCE)
    if f"out_A_rays_{name}_origins" not in recorded:
        return
    rays_o, rays_d = cameras.rays(xy)
    parity.assert_close(rays_o, recorded[f"out_A_rays_{name}_origins"].reshape(2, -1, 3), **TOLERANCE)
    parity.assert_close(rays_d, recorded[f"out_A_rays_{name}_directions"].reshape(2, -1, 3), **TOLERANCE)


def test_points_on_rays_project_back(recorded):
    cameras = cameras_of(recorded, "in_A")[[0, 2]]
    expected = recorded["out_A_project_back_ndc"]  # (2, rows, columns, points, 3)
    rays_o, rays_d = (recorded[f"out_A_rays_grid_{k}"] for k in ("origins", "directions"))
    lengths = recorded["out_A_rays_grid_lengths_row"][::32]
    points = rays_o.unsqueeze(3) + lengths[:, None] * rays_d.unsqueeze(3)
    xy, depth = cameras.project(points.reshape(2, -1, 3))
    xy = xy.reshape(expected[..., :2].shape)
    parity.assert_close(xy, expected[..., :2], **TOLERANCE)
    parity.assert_close(xy, recorded["out_A_rays_grid_xys"].unsqueeze(3).expand_as(xy), **TOLERANCE)
    parity.assert_close(1 / depth.reshape(expected.shape[:-1]), expected[..., 2], **TOLERANCE)


def test_round_trips():
    cameras = ring(5, elevation=0.3)
    xy = 2 * torch.rand(5, 7, 2, generator=torch.Generator().manual_seed(0)) - 1
    depth = torch.full((5, 7), 2.7)
    xy_again, depth_again = cameras.project(cameras.unproject(xy, depth))
    parity.assert_close(xy_again, xy, atol=1e-5)
    parity.assert_close(depth_again, depth, atol=1e-5)
    rays_o, rays_d = cameras.rays(xy)
    parity.assert_close(rays_o, cameras.centers().unsqueeze(1).expand_as(rays_o), atol=1e-5)
    parity.assert_close(rays_o + 2.7 * rays_d, cameras.unproject(xy, depth), atol=1e-5)
    again = relative_to(cameras, cameras[2])
    parity.assert_close(again.R[2], torch.eye(3), atol=1e-6)
    parity.assert_close(again.T[2], torch.zeros(3), atol=1e-6)


def test_look_at_by_hand():
    """Two units in front of the origin along +Z, looking back: view +X is left, so world +X has negative NDC x."""
    R, T = look_at(torch.tensor([0.0, 0.0, 2.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    camera = Cameras(R, T, torch.ones(2), torch.zeros(2))
    xy, depth = camera.project(torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [0.0, 1, 0]]))
    parity.assert_close(xy, torch.tensor([[0.0, 0.0], [-0.5, 0.0], [0.0, 0.5]]), atol=1e-6)
    parity.assert_close(depth, torch.full((3,), 2.0), atol=1e-6)
    straight_down, _ = look_at(torch.tensor([0.0, 2.0, 0.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    parity.assert_close(straight_down.T @ straight_down, torch.eye(3), atol=1e-6)
    assert torch.linalg.det(straight_down) > 0.99


@pytest.mark.parametrize("jitter", [0.17, 0.5])
def test_jitter_turns_by_the_angle_asked_for(jitter):
    """Seen from the look-at point each eye moves by its own angle in +-jitter, towards or away from the pole."""
    n = 64
    cameras = ring(12, elevation=0.3)
    at = nearest_point_to_axes(cameras)
    plain, moved = (circle_path(cameras, n, j, torch.Generator().manual_seed(1)).centers() - at for j in (0.0, jitter))
    parity.assert_close(moved.norm(dim=-1), plain.norm(dim=-1), rtol=1e-5)
    angle = torch.cosine_similarity(plain.double(), moved.double(), dim=-1).clamp(-1, 1).acos()
    assert 0.93 * jitter < angle.max() <= jitter * 1.001 and 0.3 * jitter < angle.mean() < 0.7 * jitter
    elevation = [(x[:, 1] / x.norm(dim=-1)).asin() for x in (plain, moved)]
    parity.assert_close((elevation[1] - elevation[0]).abs(), angle, atol=1e-3)
    draws = jitter * (2 * torch.rand(n, 1, generator=torch.Generator().manual_seed(1)) - 1)[:, 0]
    parity.assert_close(elevation[1] - elevation[0], draws, atol=1e-3)


def test_path_of_a_ring_and_of_a_noisy_arc():
    """A ring gives itself; half a turn, even 30 uneven degrees, gives a full, level circle at its distance."""
    cameras = ring(12, elevation=0.4)
    exact = circle_path(cameras, 13)
    parity.assert_close(exact.centers()[:-1].sort(0).values, cameras.centers().sort(0).values, atol=1e-4)
    for arc, seed in ((math.pi, 0), (math.pi, 1), (math.pi / 6, 2), (math.pi / 6, 3), (math.pi / 12, 4)):
        path = circle_path(ring(9, 0.3, arc=arc, noise=0.08, seed=seed), 16)
        offset = path.centers() - torch.tensor([0.1, 0.2, 0.3])
        assert (offset.norm(dim=-1) - 3).abs().max() < 0.4, (arc, seed)
        assert (offset[:, 1] / 3).asin().sub(0.3).abs().max() < 0.3, (arc, seed)
        azimuth = torch.atan2(offset[:, 0], offset[:, 2]).sort().values
        assert azimuth.diff().max() < 2 * math.pi / 10, (arc, seed)


def degenerate() -> dict[str, Cameras]:
    one, turned = ring(1, 0.3), ring(4)
    on_the_spot = -torch.einsum("j,bjk->bk", torch.tensor([1.0, 2.0, 3.0]), turned.R)
    row = torch.tensor([[x, 0.0, 5.0] for x in (-1.0, 0, 1, 2)])
    return {
        "one": one, "two": ring(2, 0.3), "two near": ring(2, 0.3, arc=0.02),
        "three": ring(3, 0.3), "three on an arc": ring(3, 0.2, arc=0.3),
        "one spot": Cameras.cat([one, one, one]), "two spots": Cameras.cat([ring(2, 0.3), ring(2, 0.3)]),
        "turning on the spot": Cameras(turned.R, on_the_spot, turned.focal, turned.principal),
        "turning at the origin": Cameras(turned.R, torch.zeros(4, 3), turned.focal, turned.principal),
        "identity": Cameras(torch.eye(3)[None], torch.zeros(1, 3), torch.ones(1, 2), torch.zeros(1, 2)),
        "in a row": Cameras(torch.eye(3).expand(4, 3, 3), row, torch.ones(4, 2), torch.zeros(4, 2)),
        "from the pole": ring(5, math.pi / 2 - 1e-3),
    }


@pytest.mark.parametrize("name", degenerate())
def test_path_of_cameras_that_determine_no_circle(name):
    """Finite, proper rotations, spread over a circle, all looking at the same point from in front; with jitter too."""
    for jitter in (0.0, 0.17):
        path = circle_path(degenerate()[name], 9, jitter, torch.Generator().manual_seed(0))
        assert all(x.isfinite().all() for x in (path.R, path.T, path.focal, path.principal))
        parity.assert_close(path.R.transpose(1, 2) @ path.R, torch.eye(3).expand(9, 3, 3), atol=1e-5)
        assert (torch.linalg.det(path.R) > 0.99).all()
        centers = path.centers()[:-1]
        at = nearest_point_to_axes(path)
        xy, depth = path.project(at.expand(9, 1, 3))
        assert depth.min() > 0 and (xy - path.principal.unsqueeze(1)).abs().max() < 1e-2
        assert torch.pdist(centers).min() > 0.05 * (centers - at).norm(dim=-1).mean()


@pytest.mark.parametrize("n", [1, 2])
def test_path_of_few_upright_cameras_is_level(n):
    """Two upright cameras at one elevation fix the vertical; one takes its own up axis. Both go round what they see."""
    cameras = ring(n, 0.3, arc=math.pi)
    path = circle_path(cameras, 8)
    parity.assert_close(path.centers()[0], cameras.centers()[0], atol=0.15)
    if n == 2:
        elevation = ((path.centers() - torch.tensor([0.1, 0.2, 0.3]))[:, 1] / 3).asin()
        parity.assert_close(elevation, torch.full((8,), 0.3), atol=0.05)
    else:
        at = nearest_point_to_axes(cameras)
        across = (path.centers() - at) @ cameras.R[0, :, 1]
        parity.assert_close(across, torch.zeros(8), atol=1e-4)


def test_nearest_point_where_the_axes_leave_it_open():
    """One axis, or equal ones: the point of the axis nearest to the world origin."""
    camera = ring(1, 0.3)
    o, d = camera.centers()[0], camera.R[0, :, 2]
    expected = o - (o @ d) * d
    parity.assert_close(nearest_point_to_axes(camera), expected, atol=1e-4)
    parity.assert_close(nearest_point_to_axes(Cameras.cat([camera, camera])), expected, atol=1e-4)


def test_container():
    cameras = ring(4)
    assert len(cameras) == 4 and len(cameras[[0, 2]]) == 2 and len(cameras[1:]) == 3 and cameras[1].T.shape == (3,)
    assert Cameras.stack([cameras, cameras]).R.shape == (2, 4, 3, 3) and cameras.unsqueeze(1).T.shape == (4, 1, 3)
    assert cameras.to(torch.float64).R.dtype == torch.float64
    assert cameras.unsqueeze(0).project(torch.zeros(1, 4, 6, 3))[0].shape == (1, 4, 6, 2)
