"""The surface of a field as a triangle mesh: marching tetrahedra, colors, the largest part, PLY.

The field is evaluated on a grid of points. Every cube between eight of them is divided into six tetrahedra, and in each
the surface where density passes a threshold is one triangle or two (Doi and Koide 1991). Unlike marching cubes, this
has no ambiguous cases, so the mesh is always closed.

Shapes: `N` vertices, `M` faces.
"""
from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import write_atomically
from ngp import Field, in_chunks
from volume import Occupancy, cell_bounds, compositing_weights, evaluate_samples, sampled_box

# Kuhn's six tetrahedra of a cube, whose corner 4 i + 2 j + k lies at (x, y, z) = (i, j, k). All have the diagonal from
# corner 0 to corner 7 as an edge. Along it the cube looks like a hexagon (right), and they are its six slices. Each is
# right-handed. Cubes are cut alike, so the tetrahedra match across the face between two of them.
#
#         3-------7                  5-------4
#        /|      /|                 / \     / \
#       1-------5 |      z         /   \   /   \
#       | |     | |      |  y     1-----0,7-----6
#       | 2-----|-6      | /       \   /   \   /
#       |/      |/       |/         \ /     \ /
#       0-------4        +---x       3-------2
TETRAHEDRA = torch.tensor([[0, 4, 6, 7], [0, 5, 4, 7], [0, 6, 2, 7], [0, 2, 3, 7], [0, 1, 5, 7], [0, 3, 1, 7]])

# The triangles in a tetrahedron with corners 0 to 3, for every set of corners that are inside. Their own corners lie on
# edges of the tetrahedron: 02 is the edge from corner 0, inside, to corner 2, outside. They turn counter-clockwise as
# seen from outside the surface.
CASES = (
    "",                    # none inside
    "01 02 03",            # 0
    "10 13 12",            # 1
    "02 03 13  02 13 12",  # 0 1
    "20 21 23",            # 2
    "03 01 21  03 21 23",  # 0 2
    "10 13 23  10 23 20",  # 1 2
    "03 13 23",            # 0 1 2
    "30 32 31",            # 3
    "01 02 32  01 32 31",  # 0 3
    "12 10 30  12 30 32",  # 1 3
    "12 02 32",            # 0 1 3
    "20 21 31  20 31 30",  # 2 3
    "01 21 31",            # 0 2 3
    "20 10 30",            # 1 2 3
    "",                    # all inside
)

# Points evaluated at once: what fits a CPU's caches, what fills a GPU.
POINTS = {"cpu": 2**13, "cuda": 2**18}

PLY_HEADER = """\
ply
format binary_little_endian 1.0
element vertex {vertices}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
element face {faces}
property list uchar int vertex_indices
end_header
"""


class Mesh(NamedTuple):
    """A triangle mesh."""
    vertices: Tensor  # (N, 3) in the field's coordinates
    faces: Tensor     # (M, 3) int64, counter-clockwise seen from outside
    colors: Tensor    # (N, 3) in [0, 1]


def triangle_table() -> Tensor:
    """`CASES` as numbers of corners, (16 cases, 2 triangles, 3 edges, 2 ends); -1 where there is no triangle."""
    table = torch.full((16, 2, 3, 2), -1)
    for case, edges in enumerate(CASES):
        ends = [int(corner) for corner in edges if corner != " "]
        triangles = torch.tensor(ends, dtype=torch.int64).reshape(-1, 3, 2)
        table[case, :len(triangles)] = triangles
    return table


@torch.no_grad()
def extract_mesh(field: Field, resolution: int = 128, threshold: float | None = None,
                 occupancy: Occupancy | None = None) -> Mesh:
    """The surface where density passes the threshold, by marching tetrahedra: always closed.

    The field is sampled `resolution` times along the longest side of its cube, or of the occupancy's box, outside whose
    occupied cells it counts as empty. `threshold` is a density; by default one that absorbs all but e^-5 along that
    side, whatever the units. A field that never reaches it gives an empty mesh.
    """
    # A grid that fills the box, with an empty ring around it; z runs fastest.
    box = sampled_box(field, occupancy)
    sides = box[1] - box[0]
    longest = sides.max()
    step = longest / resolution
    counts = (torch.ceil(sides / step - 1e-3).int() + 3).tolist()
    axes = [box[0, i] + torch.arange(-1, counts[i] - 1, device=box.device) * step for i in range(3)]
    x = torch.cartesian_prod(*axes)  # (points, 3)

    # The field on it, and the triangles between what is inside and what is outside.
    surface_density = 5 / longest if threshold is None else threshold
    values = _log_ratio(field, x, box, step, surface_density, occupancy)
    edges = _triangles(values > 0, counts)

    # One vertex an edge, however many triangles meet there.
    edges = edges.sort(-1).values
    keys = edges[..., 0] * len(x) + edges[..., 1]  # (M, 3) one number from the points at both ends
    keys, faces = keys.unique(return_inverse=True)
    start = keys // len(x)
    end = keys % len(x)

    # The vertex is where the log density, taken as linear, passes the threshold.
    fraction = values[start] / (values[start] - values[end])
    vertices = x[start] + fraction[:, None] * (x[end] - x[start])
    return Mesh(vertices, faces, _colors_below(field, vertices, faces, step, occupancy))


def _log_ratio(field: Field, x: Tensor, box: Tensor, step: Tensor, surface_density: float | Tensor,
               occupancy: Occupancy | None) -> Tensor:
    """Log of density over that of the surface, at points x (K, 3) that are `step` apart: (K,), nearly linear across it.

    It is bounded, or an empty neighbor would pull the surface inwards. Outside the box and in empty cells density is 0.
    """
    slack = 1e-3 * step
    inside = ((x >= box[0] - slack) & (x <= box[1] + slack)).all(-1)
    if occupancy is not None:
        inside &= occupancy(x)
    inside = inside.nonzero().squeeze(-1)
    found = in_chunks(field.density, x[inside], POINTS[x.device.type])
    density = x.new_zeros(len(x)).index_copy(0, inside, found)
    return (density / surface_density).log().clamp(-5, 5)


def _triangles(inside: Tensor, counts: list[int]) -> Tensor:
    """The triangles between inside and outside, by the edges that their corners lie on: (M, 3, 2) points of the grid.

    inside: (points,) boolean, of a grid with `counts` points along the axes.
    """
    # Cubes that the surface crosses, by their lowest corner.
    low, high = cell_bounds(inside.reshape(1, *counts).float())
    crossed = (low != high)[0]
    cubes = crossed.nonzero()  # (cubes, 3)

    # All eight corners, by the numbers of the points.
    offsets = torch.tensor(list(itertools.product((0, 1), repeat=3)), device=inside.device)
    strides = torch.tensor([counts[1] * counts[2], counts[2], 1], device=inside.device)
    corners = cubes[:, None] + offsets  # (cubes, 8, 3)
    corners = (corners * strides).sum(-1)  # (cubes, 8)

    # The case of each of their tetrahedra: bit n says that corner n is inside.
    tetrahedra = corners[:, TETRAHEDRA.to(inside.device)].reshape(-1, 4)
    bits = torch.tensor([1, 2, 4, 8], device=inside.device)
    case = (inside[tetrahedra] * bits).sum(-1)

    # The triangles that the table has for it: as corners of the tetrahedron, then as points of the grid.
    triangles = triangle_table().to(inside.device)[case]  # (tetrahedra, 2, 3, 2)
    exists = triangles[..., 0, 0] >= 0
    which, _ = exists.nonzero().unbind(-1)
    return tetrahedra[which[:, None, None], triangles[exists]]


def _colors_below(field: Field, vertices: Tensor, faces: Tensor, step: Tensor, occupancy: Occupancy | None,
                  samples: int = 8) -> Tensor:
    """What rays see that enter a surface against its normals, within `samples` steps: colors (N, 3) in [0, 1].

    vertices (N, 3), faces (M, 3). The outermost layer of a field is so faint that no picture ever taught it its color.
    """
    # Normals of vertices: means of their faces', by area.
    a, b, c = vertices[faces].unbind(1)  # (M, 3) each
    normal = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices).index_add(0, faces.flatten(), normal.repeat_interleave(3, 0))
    normals = F.normalize(normals, dim=-1)
    depths = (torch.arange(samples, device=vertices.device) + 0.5) * step

    def mean_color(rays: Tensor) -> Tensor:
        """What rays (N, 6), origins and directions, see in the thickness of the surface: (N, 3) in [0, 1]."""
        t = depths.expand(len(rays), -1)
        density, color = evaluate_samples(field, rays[:, :3], rays[:, 3:], t, occupancy)
        weights = compositing_weights(density, t, step.expand(len(rays), 1))
        weights = weights[..., None] + 1e-6  # never all zero
        return (weights * color).sum(1) / weights.sum(1)

    rays = torch.cat([vertices, -normals], 1)
    return in_chunks(mean_color, rays, POINTS[rays.device.type] // samples)


def largest_component(mesh: Mesh) -> Mesh:
    """The connected part of a mesh with most faces: the object without floaters."""
    if len(mesh.faces) == 0:
        return mesh

    # Two edges of a triangle connect its corners.
    edges = torch.cat([mesh.faces[:, :2], mesh.faces[:, 1:]])
    label = connected_parts(edges, len(mesh.vertices))

    # Keep the faces of the most frequent label, and the vertices that they use.
    component = label[mesh.faces[:, 0]]  # (M,)
    largest = component.mode().values
    faces = mesh.faces[component == largest]
    used, faces = faces.unique(return_inverse=True)
    return Mesh(mesh.vertices[used], faces, mesh.colors[used])


def connected_parts(edges: Tensor, count: int) -> Tensor:
    """The least vertex that each of `count` vertices is connected to by edges (E, 2): (count,), equal in a part.

    In each round every vertex hooks on to its least neighbor, and what hangs together becomes one vertex. Only vertices
    below all their neighbors are left, at most half, so the rounds are few (Shiloach and Vishkin 1982).
    """
    vertices = torch.arange(count, device=edges.device)
    label = vertices
    while len(edges):
        least = torch.minimum(edges[:, :1], edges[:, 1:]).expand(-1, 2)
        parent = vertices.scatter_reduce(0, edges.flatten(), least.flatten(), "amin")

        # Follow the hooks to their ends.
        above = parent[parent]
        while not torch.equal(above, parent):
            parent = above
            above = parent[parent]

        # Edges inside a vertex are done.
        label = parent[label]
        edges = parent[edges]
        edges = edges[edges[:, 0] != edges[:, 1]]
    return label


def write_ply(path: str | Path, mesh: Mesh) -> None:
    """Write a mesh as binary little-endian PLY with vertex colors."""
    # Two arrays of records, which the header describes.
    vertices = np.empty(len(mesh.vertices), dtype=[("position", "<f4", 3), ("color", "u1", 3)])
    colors = (mesh.colors.clamp(0, 1) * 255).round()
    vertices["position"] = mesh.vertices.cpu().numpy()
    vertices["color"] = colors.byte().cpu().numpy()
    faces = np.empty(len(mesh.faces), dtype=[("count", "u1"), ("vertex", "<i4", 3)])
    faces["count"] = 3
    faces["vertex"] = mesh.faces.cpu().numpy()

    header = PLY_HEADER.format(vertices=len(vertices), faces=len(faces))
    with write_atomically(path) as temporary:
        temporary.write_bytes(header.encode() + vertices.tobytes() + faces.tobytes())
