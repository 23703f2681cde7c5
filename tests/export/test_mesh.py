"""The surface of a field: ambiguous cubes, closed meshes of analytic fields, colors, floaters, PLY and glTF; one scene
overfitted."""
import dataclasses
import itertools
import json
import struct

import numpy as np
import pytest
import torch

import cameras
import ngp
import presets
import volume
from export.mesh import (Mesh, ambiguous_cases, connected_parts, extract_mesh, largest_component, surface_net,
                         write_glb, write_ply)
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


def areas(mesh: Mesh) -> torch.Tensor:
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    return torch.linalg.cross(b - a, c - a).norm(dim=-1) / 2


# ---------------------------------------------------------------------------------------------- ambiguous cubes

CORNERS = list(itertools.product((0, 1), repeat=3))  # of a cube: 4 i + 2 j + k


def parts(corners: set) -> int:
    """How many parts a set of a cube's corners has whose neighbors are connected."""
    count = 0
    left = set(corners)
    while left:
        reached = [left.pop()]
        while reached:
            at = reached.pop()
            near = {c for c in left if sum(abs(x - y) for x, y in zip(at, c)) == 1}
            left -= near
            reached += near
        count += 1
    return count


def test_ambiguous_cubes_are_those_whose_corners_fall_apart():
    found = ambiguous_cases()
    for case in range(256):
        inside = {c for n, c in enumerate(CORNERS) if case >> n & 1}
        assert found[case] == (parts(inside) > 1 or parts(set(CORNERS) - inside) > 1)


def test_any_grid_has_a_closed_surface_that_does_not_touch_itself():
    """Around any vertex, faces are one fan: no edge has four of them, no vertex two fans."""
    values = torch.full((14, 15, 16), -1.0)
    values[1:-1, 1:-1, 1:-1] = torch.randn(12, 13, 14, generator=seeded())
    vertices, faces = surface_net(values)
    mesh = Mesh(vertices, faces, vertices, vertices)
    assert_closed_and_oriented(mesh)
    assert volume_and_area(mesh)[0] > 0 and areas(mesh).min() > 1e-5
    following = {}
    for a, b, c in faces.tolist():
        for at, start, end in ((a, b, c), (b, c, a), (c, a, b)):
            following.setdefault(at, {})[start] = end
    for fan in following.values():
        start, seen = next(iter(fan)), set()
        while start not in seen:
            seen.add(start)
            start = fan[start]
        assert seen == set(fan)


# ---------------------------------------------------------------------------------------------- surfaces

@pytest.mark.parametrize("with_occupancy", [False, True])
def test_surface_of_a_ball(with_occupancy):
    field, occupancy = ball(occupancy_cells=15), None
    if with_occupancy:
        occupancy = Occupancy(field.config)
        occupancy.set_occupied(centers(field.config).norm(dim=-1) < 1.1)
    mesh = extract_mesh(field, 40, 10.0, occupancy=occupancy, smoothings=0)
    assert_closed_and_oriented(mesh)
    filled, area = volume_and_area(mesh)  # positive: the faces look outwards
    assert abs(filled / (4 / 3 * np.pi * 0.8**3) - 1) < 0.02 and abs(area / (4 * np.pi * 0.8**2) - 1) < 0.02
    assert len(mesh.vertices) - len(edges_of(mesh)) / 2 + len(mesh.faces) == 2  # Euler: a sphere
    assert (mesh.vertices.norm(dim=-1) - 0.8).abs().max() < 0.01
    assert (mesh.normals * mesh.vertices / 0.8).sum(-1).min() > 0.99
    # A color is a position: the vertex's own, moved straight inwards by some steps.
    below = ((mesh.colors - 0.5) * 3 / mesh.vertices)[mesh.vertices.abs() > 0.2]
    parity.assert_close(below, torch.full_like(below, 0.92), atol=0.07)


def euler(mesh: Mesh) -> int:
    return len(mesh.vertices) - len(edges_of(mesh)) // 2 + len(mesh.faces)


def torus_distance(x: torch.Tensor) -> torch.Tensor:
    """From points (N, 3) to a torus round z, whose tube is 0.3 thick at 0.8 from the axis: negative inside."""
    return torch.stack([x[:, :2].norm(dim=-1) - 0.8, x[:, 2]], -1).norm(dim=-1) - 0.3


@pytest.mark.parametrize("distance, number", [(lambda x: x.norm(dim=-1) - 0.8, 2), (torus_distance, 0)])
def test_a_smoothed_surface_stays_where_it_was(distance, number):
    """Half a cell is allowed; rough density becomes a surface as smooth as the shape, without handles or holes."""
    noise = torch.randn(1, 1, 60, 60, 60, generator=seeded())

    def density(x):
        rough = torch.nn.functional.grid_sample(noise, x[None, None, None] / 1.5, align_corners=True).flatten()
        return 10 * torch.exp(-60 * distance(x).clamp(-0.5, 0.5) + 2 * rough)
    rough, smooth = (extract_mesh(Analytic(density), 64, 10.0, smoothings=n) for n in (0, 3))
    assert_closed_and_oriented(smooth)
    assert euler(smooth) == number and volume_and_area(smooth)[0] > 0
    assert distance(smooth.vertices).abs().max() < 0.5 * 3 / 64
    x = smooth.vertices.double().requires_grad_()
    outwards, = torch.autograd.grad(distance(x).sum(), x)
    assert (outwards * smooth.normals).sum(-1).min() > 0.9
    assert areas(smooth).min() > 1e-3 * (3 / 64) ** 2
    assert roughness(smooth) < 0.6 * roughness(rough)


def roughness(mesh: Mesh) -> float:
    """The mean angle between the normals of neighboring faces, in degrees."""
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    normal = torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1)
    edges = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).sort(-1).values
    order = (edges[:, 0] * len(mesh.vertices) + edges[:, 1]).argsort().reshape(-1, 2) // 3
    return normal[order].prod(1).sum(-1).clamp(-1, 1).acos().rad2deg().mean().item()


def test_a_mesh_has_at_most_so_many_faces():
    fine, coarse = (extract_mesh(ball(), 64, 10.0, most_faces=most) for most in (100_000, 2_000))
    assert len(fine.faces) > 8_000 and 1_500 < len(coarse.faces) <= 2_000
    assert_closed_and_oriented(coarse)
    assert abs(volume_and_area(coarse)[0] / volume_and_area(fine)[0] - 1) < 0.15
    full = Analytic(lambda x: torch.full_like(x[:, 0], 1e4))
    assert len(extract_mesh(full, 16, most_faces=1).faces) == 48  # of one cell, the coarsest grid that there is


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
    assert_closed_and_oriented(extract_mesh(Analytic(density), 48, 10.0, smoothings=1))
    mesh = extract_mesh(Analytic(density), 48, 10.0, smoothings=0)
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
    write_glb(tmp_path / "empty.glb", mesh)
    assert b'{"asset": {"version": "2.0"}}' in (tmp_path / "empty.glb").read_bytes()


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
    vertices = np.frombuffer(body, dtype="<f4,<f4,<f4,<f4,<f4,<f4,u1,u1,u1", count=len(mesh.vertices))
    faces = np.frombuffer(body, dtype="u1,<i4,<i4,<i4", offset=vertices.nbytes)
    assert len(faces) == len(mesh.faces) and (faces["f0"] == 3).all()
    columns = [torch.from_numpy(np.stack([array[f"f{i}"] for i in axes], 1).copy()) for array, axes in
               ((vertices, (0, 1, 2)), (vertices, (3, 4, 5)), (faces, (1, 2, 3)), (vertices, (6, 7, 8)))]
    assert torch.equal(columns[0], mesh.vertices) and torch.equal(columns[1], mesh.normals)
    assert torch.equal(columns[2], mesh.faces.int())
    parity.assert_close(columns[3] / 255, mesh.colors, atol=0.5 / 255 + 1e-6)


def read_glb(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """The document of a binary glTF, and the arrays of its only primitive, by the specification of glTF 2.0: sections
    4.4 (GLB), 3.6 (buffers and accessors), 3.7 (geometry).
    """
    # The header: magic, version, length in all.
    magic, version, length = struct.unpack_from("<III", data)
    assert (magic, version, length) == (0x46546C67, 2, len(data)) and length % 4 == 0

    # Chunks of whole words: JSON padded with spaces, then the binary buffer.
    chunks = []
    at = 12
    while at < length:
        size, kind = struct.unpack_from("<II", data, at)
        chunks.append((kind, data[at + 8:at + 8 + size]))
        assert size % 4 == 0
        at += 8 + size
    assert [kind for kind, _ in chunks] == [0x4E4F534A, 0x004E4942]
    document, binary = json.loads(chunks[0][1]), chunks[1][1]
    assert document["asset"]["version"] == "2.0" and "uri" not in document["buffers"][0]
    assert document["buffers"][0]["byteLength"] <= len(binary) <= document["buffers"][0]["byteLength"] + 3

    # What an accessor says of its numbers, and where its view of the buffer has them.
    types = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
    sizes = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
    primitive = document["meshes"][0]["primitives"][0]
    assert primitive.get("mode", 4) == 4  # triangles
    arrays = {}
    for name, index in (primitive["attributes"] | {"indices": primitive["indices"]}).items():
        accessor = document["accessors"][index]
        view = document["bufferViews"][accessor["bufferView"]]
        kind, width = np.dtype(types[accessor["componentType"]]), sizes[accessor["type"]]
        start = view["byteOffset"] + accessor.get("byteOffset", 0)
        assert start % 4 == 0 and kind.itemsize * width % 4 == 0 and "byteStride" not in view
        assert accessor["count"] * width * kind.itemsize <= view["byteLength"]
        assert view["target"] == (34963 if name == "indices" else 34962)
        array = np.frombuffer(binary, kind, accessor["count"] * width, start).reshape(-1, width)
        arrays[name] = array / np.iinfo(kind).max if accessor.get("normalized") else array
    assert document["accessors"][primitive["attributes"]["POSITION"]]["min"] == arrays["POSITION"].min(0).tolist()
    assert document["accessors"][primitive["attributes"]["POSITION"]]["max"] == arrays["POSITION"].max(0).tolist()
    return document, arrays


@pytest.mark.parametrize("up", [(0.0, 1, 0), (0, -1, 0), (0, 0, 1), (0.36, -0.48, 0.8)])
def test_glb_reads_back(tmp_path, up):
    mesh = extract_mesh(ball(), 12)._replace(up=torch.tensor(up, dtype=torch.float32))
    write_glb(tmp_path / "ball.glb", mesh)
    document, arrays = read_glb((tmp_path / "ball.glb").read_bytes())
    assert np.array_equal(arrays["POSITION"], mesh.vertices) and np.array_equal(arrays["NORMAL"], mesh.normals)
    assert np.array_equal(arrays["indices"].reshape(-1, 3), mesh.faces)

    # Light, not what a screen is told: the standard's curve backwards gives the colors.
    linear = torch.tensor(arrays["COLOR_0"])
    assert (linear[:, 3] == 1).all()
    curve = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    parity.assert_close(curve[:, :3].float(), mesh.colors, atol=2e-4)

    # The node's quaternion (x, y, z, w) turns `up` to +Y.
    node = document["nodes"][document["scenes"][document["scene"]]["nodes"][0]]
    x, y, z, w = node["rotation"]
    axis, vector = torch.tensor([x, y, z]), torch.tensor(up, dtype=torch.float32)
    turned = vector + 2 * torch.linalg.cross(axis, torch.linalg.cross(axis, vector) + w * vector)
    parity.assert_close(turned, torch.tensor([0.0, 1, 0]), atol=1e-6)
    assert abs(x * x + y * y + z * z + w * w - 1) < 1e-6 and node["mesh"] == 0


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
