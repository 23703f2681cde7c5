"""The surface of a field: the tables, closed meshes of analytic fields, colors, floaters, PLY; one scene overfitted."""
import dataclasses
import itertools

import numpy as np
import pytest
import torch

import cameras
import ngp
import presets
import volume
from export.mesh import TETRAHEDRA, Mesh, connected_parts, extract_mesh, largest_component, triangle_table, write_ply
from tests.support import parity
from tests.support.fields import Analytic, around, ball, centers, images, seeded
from volume import Occupancy


def edges_of(mesh: Mesh) -> torch.Tensor:
    return mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)


def assert_closed_and_oriented(mesh: Mesh):
    edges = edges_of(mesh)
    assert len(edges.unique(dim=0)) == len(edges)  # no direction twice ...
    opposite = edges.flip(-1)
    assert torch.equal(edges.unique(dim=0), opposite.unique(dim=0))  # ... and each with its opposite: two faces an edge
    assert len(mesh.faces.unique()) == len(mesh.vertices) == len(mesh.colors)


def volume_and_area(mesh: Mesh) -> tuple[float, float]:
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    return (a * normal).sum().item() / 6, normal.norm(dim=-1).sum().item() / 2


# ---------------------------------------------------------------------------------------------- the tables

CUBE = torch.tensor(list(itertools.product((0, 1), repeat=3))).double()  # its corners: 4 i + 2 j + k


def test_the_tetrahedra_fill_the_cube_and_match_across_its_faces():
    edges = CUBE[TETRAHEDRA[:, 1:]] - CUBE[TETRAHEDRA[:, :1]]
    parity.assert_close(torch.linalg.det(edges), torch.full((6,), 1.0), atol=1e-12)  # right-handed; a sixth each
    points = torch.rand(1000, 3, generator=seeded(), dtype=torch.float64)
    inside = torch.linalg.solve(edges[:, None].mT, points[..., None])[..., 0]  # along the three edges of corner 0
    inside = (inside >= 0).all(-1) & (inside.sum(-1) <= 1)
    assert (inside.sum(0) == 1).all()
    pairs = {frozenset(pair) for row in TETRAHEDRA.tolist() for pair in itertools.combinations(row, 2)}
    for axis in (4, 2, 1):  # the diagonals of two opposite faces are the same
        low = {pair for pair in pairs if not any(corner & axis for corner in pair)}
        high = {frozenset(corner - axis for corner in pair) for pair in pairs if all(corner & axis for corner in pair)}
        assert low == high and len(low) == 5


@pytest.mark.parametrize("case", range(16))
def test_the_triangles_of_a_case_part_inside_from_outside(case):
    """They lie on exactly the edges between the two, face outside, and are as many as the edges need."""
    corners = CUBE[TETRAHEDRA[0]]
    triangles = triangle_table()[case]
    triangles = triangles[triangles[:, 0, 0] >= 0]  # (0, 1 or 2; 3, 2)
    is_inside = [bool(case >> n & 1) for n in range(4)]
    crossed = {(a, b) for a in range(4) for b in range(4) if is_inside[a] and not is_inside[b]}
    assert {tuple(edge) for triangle in triangles.tolist() for edge in triangle} == crossed
    assert len(triangles) == (0 if not crossed else len(crossed) - 2)
    for triangle in triangles:
        a, b, c = corners[triangle].mean(1)
        normal = torch.linalg.cross(b - a, c - a)
        for n in range(4):
            side = normal @ (corners[n] - a)
            assert side < -1e-9 if is_inside[n] else side > 1e-9


# ---------------------------------------------------------------------------------------------- surfaces

@pytest.mark.parametrize("with_occupancy", [False, True])
def test_surface_of_a_ball(with_occupancy):
    field, occupancy = ball(occupancy_cells=15), None
    if with_occupancy:
        occupancy = Occupancy(field.config)
        occupancy.set_occupied(centers(field.config).norm(dim=-1) < 1.1)
    mesh = extract_mesh(field, 40, 10.0, occupancy=occupancy)
    assert_closed_and_oriented(mesh)
    filled, area = volume_and_area(mesh)  # positive: the faces look outwards
    assert abs(filled / (4 / 3 * np.pi * 0.8**3) - 1) < 0.02 and abs(area / (4 * np.pi * 0.8**2) - 1) < 0.02
    assert len(mesh.vertices) - len(edges_of(mesh)) / 2 + len(mesh.faces) == 2  # Euler: a sphere
    assert (mesh.vertices.norm(dim=-1) - 0.8).abs().max() < 0.01
    # A color is a position: the vertex's own, moved straight inwards by some steps.
    below = ((mesh.colors - 0.5) * 3 / mesh.vertices)[mesh.vertices.abs() > 0.2]
    parity.assert_close(below, torch.full_like(below, 0.92), atol=0.07)


def test_colors_of_a_surface_are_those_below_a_faint_skin():
    """Shells: a thin faint one of green, a dense one of red, blue emptiness; a surface between the first two is red."""
    shells = torch.tensor([0.6, 0.78, 0.8])
    def layer(x):
        return torch.bucketize(x.norm(dim=-1), shells)
    field = Analytic(lambda x: torch.tensor([0.0, 2000, 12, 0])[layer(x)],
                     lambda x: torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]])[layer(x)])
    colors = extract_mesh(field, 100, 10.0).colors
    assert colors[:, 0].mean() > 0.9 and colors[:, 1].mean() < 0.1 and colors[:, 2].max() < 1e-3


def test_surface_is_closed_at_the_cube_and_for_any_field():
    noise = torch.randn(1, 1, 9, 9, 9, generator=seeded())
    def density(x):  # random blobs that cross the sides of the cube
        blobs = torch.nn.functional.grid_sample(noise, x[None, None, None] / 1.5, align_corners=True)
        return 10 * torch.exp(3 * blobs.flatten())
    mesh = extract_mesh(Analytic(density), 32, 10.0)
    assert_closed_and_oriented(mesh)
    inside = (density(torch.rand(100_000, 3, generator=seeded(1)) * 3 - 1.5) > 10).float().mean().item()
    assert abs(volume_and_area(mesh)[0] / 3**3 / inside - 1) < 0.05
    full = extract_mesh(Analytic(lambda x: torch.full_like(x[:, 0], 1e4)), 8)
    assert_closed_and_oriented(full)
    assert 3**3 < volume_and_area(full)[0] < (3 + 3 / 8) ** 3


def test_empty_field_has_an_empty_surface(tmp_path):
    mesh = extract_mesh(Analytic(lambda x: torch.zeros_like(x[:, 0])), 8)
    assert mesh.vertices.shape == mesh.faces.shape == mesh.colors.shape == (0, 3)
    assert len(largest_component(mesh).faces) == 0
    write_ply(tmp_path / "empty.ply", mesh)
    assert b"element vertex 0" in (tmp_path / "empty.ply").read_bytes()


def test_connected_parts_are_those_of_a_search():
    """Random graphs, a long path in random order, single vertices: the least vertex that a search reaches."""
    g = seeded(3)
    path = torch.randperm(500, generator=g)
    graphs = [(torch.stack([path[:-1], path[1:]], 1), 500), (torch.zeros(0, 2, dtype=torch.int64), 4)]
    graphs += [(torch.randint(60, (edges, 2), generator=g), 60) for edges in (10, 25, 40, 80)]
    for edges, count in graphs:
        neighbors = {v: set() for v in range(count)}
        for a, b in edges.tolist():
            neighbors[a].add(b), neighbors[b].add(a)
        expected = [-1] * count
        for start in range(count):
            reached = [start] if expected[start] < 0 else []
            while reached:
                vertex = reached.pop()
                if expected[vertex] < 0:
                    expected[vertex] = start
                    reached += neighbors[vertex]
        assert connected_parts(edges, count).tolist() == expected


def test_largest_component_drops_floaters():
    def density(x):
        floater = (x - torch.tensor([1.1, 1.1, 1.1])).norm(dim=-1)
        return 10 * torch.exp(60 * torch.maximum(0.6 - x.norm(dim=-1), 0.2 - floater).clamp(-0.5, 0.2))
    both, one = extract_mesh(Analytic(density), 40, 10.0), extract_mesh(ball(0.6), 40, 10.0)
    kept = largest_component(both)
    assert len(both.faces) > len(kept.faces) and len(kept.faces) == len(one.faces)
    assert_closed_and_oriented(kept)
    assert abs(volume_and_area(kept)[0] - volume_and_area(one)[0]) < 1e-4
    parity.assert_close(kept.colors, kept.vertices / 3 * 0 + 0.5, atol=1e-6)


def test_ply_reads_back(tmp_path):
    mesh = extract_mesh(ball(), 12)
    write_ply(tmp_path / "ball.ply", mesh)
    assert [p.name for p in tmp_path.iterdir()] == ["ball.ply"]
    header, body = (tmp_path / "ball.ply").read_bytes().split(b"end_header\n", 1)
    first = ["ply", "format binary_little_endian 1.0", f"element vertex {len(mesh.vertices)}"]
    assert header.decode().split("\n")[:3] == first
    vertices = np.frombuffer(body, dtype="<f4,<f4,<f4,u1,u1,u1", count=len(mesh.vertices))
    faces = np.frombuffer(body, dtype="u1,<i4,<i4,<i4", offset=vertices.nbytes)
    assert len(faces) == len(mesh.faces) and (faces["f0"] == 3).all()
    columns = [torch.from_numpy(np.stack([array[f"f{i}"] for i in axes], 1).copy()) for array, axes in
               ((vertices, (0, 1, 2)), (faces, (1, 2, 3)), (vertices, (3, 4, 5)))]
    assert torch.equal(columns[0], mesh.vertices) and torch.equal(columns[1], mesh.faces.int())
    parity.assert_close(columns[2] / 255, mesh.colors, atol=0.5 / 255 + 1e-6)


# ---------------------------------------------------------------------------------------------- a scene

def test_one_scene_is_learned():
    """A colored ball, from 8 pictures of 32 x 32 to a new one: over 25 dB, a surface in its place, the same twice."""
    truth, size = ball(0.8, samples_per_ray=128), 32
    views, new = around(8, seed=1), around(2, seed=2)
    target, target_new = images(truth, views, size), images(truth, new, size)
    rays = [view.rays(cameras.pixel_grid(size, size)) for view in views]
    def learn(iterations):
        config = dataclasses.replace(presets.NANO_FIELD, bound=1.5, finest_resolution=96)
        field, g = ngp.Field(config, seeded()), seeded(1)
        occupancy = Occupancy(field.config)
        occupancy.carve(target.opacity.reshape(8, 1, size, size), views)
        adam = torch.optim.Adam([{"params": field.encoding.parameters(), "lr": 2e-2},
                                 {"params": field.mlp.parameters(), "lr": 5e-3}])
        for i in range(iterations):
            v = i % 8
            seen = volume.render(field, *rays[v], g, occupancy)
            loss = (seen.color - target.color[v]).square().mean() + (seen.opacity - target.opacity[v]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if i % 16 == 15:
                occupancy.update(field, g)
        return field, occupancy, loss.item()
    field, occupancy, _ = learn(160)
    with torch.no_grad():
        new_rays = [view.rays(cameras.pixel_grid(size, size)) for view in new]
        seen = torch.stack([volume.render(field, *rays, None, occupancy).color for rays in new_rays])
    psnr = -10 * (seen - target_new.color).square().mean().log10()
    assert psnr > 25.5, f"{psnr:.1f} dB"
    assert occupancy.occupied.float().mean() < 0.15
    filled, _ = volume_and_area(extract_mesh(field, 32, occupancy=occupancy))
    assert abs(filled / (4 / 3 * np.pi * 0.8**3) - 1) < 0.15
    assert learn(8)[2] == learn(8)[2]
