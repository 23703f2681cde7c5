"""The surface of a field as a triangle mesh: surface nets, normals, colors, the largest part, PLY and glTF.

The field is evaluated on a grid of points. Every cube between eight of them that the surface crosses gets one vertex,
and around every edge of a cube that it crosses four vertices make a quadrilateral (Gibson 1998). Cubes in which two
sheets of the surface would share a vertex are filled first, so the mesh is always closed and never touches itself.

Shapes: `N` vertices, `M` faces.
"""
from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import save_bytes
from ngp import CHUNK, Field, in_chunks
from volume import Occupancy, evaluate_samples, sampled_box, weights_of_lengths

# What a cube's eight corners are multiplied by, so that their sum tells which of them are inside. Corner 4 i + 2 j + k
# lies at (x, y, z) = (i, j, k).
BITS = 2 ** torch.arange(8.0).reshape(1, 1, 2, 2, 2)

LIMIT = 5.0        # of log density above and below the surface's
SMOOTHINGS = 3     # means over 3 x 3 x 3 points of a grid of `FINE`; fewer of a coarser one, or thin parts vanish
FINE = 128         # points a side
BARELY_INSIDE = 0.1  # log density of a point that is filled
SHORTEST = 0.02    # nearest that the surface comes to a point of the grid, in steps: no face is degenerate

PLY_HEADER = """\
ply
format binary_little_endian 1.0
element vertex {vertices}
property float x
property float y
property float z
property float nx
property float ny
property float nz
property uchar red
property uchar green
property uchar blue
element face {faces}
property list uchar int vertex_indices
end_header
"""

# Numbers of glTF 2.0 for kinds of components and of buffers.
UNSIGNED_SHORT, UNSIGNED_INT, FLOAT = 5123, 5125, 5126
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
ATTRIBUTES = {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}


class Mesh(NamedTuple):
    """A triangle mesh."""
    vertices: Tensor  # (N, 3) in the field's coordinates
    faces: Tensor     # (M, 3) int64, counter-clockwise seen from outside
    normals: Tensor   # (N, 3) unit vectors that point outwards
    colors: Tensor    # (N, 3) in [0, 1], as pictures have them (sRGB)
    up: Tensor = torch.tensor([0.0, 1, 0])  # (3,) unit vector: what is above in the vertices' coordinates

    def linear_colors(self) -> Tensor:
        """Colors in proportion to light, (N, 3) in [0, 1]: what glTF and WebGL calculate with (IEC 61966-2-1)."""
        c = self.colors.clamp(0, 1)
        return torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


@torch.no_grad()
def extract_mesh(field: Field, resolution: int = 128, threshold: float | None = None,
                 occupancy: Occupancy | None = None, most_faces: int = 100_000,
                 smoothings: int | None = None) -> Mesh:
    """The surface where density passes the threshold, by surface nets: always closed, every edge between two faces.

    The field is sampled `resolution` times along the longest side of its cube, or of the occupancy's box, outside whose
    occupied cells it counts as empty; more coarsely where the surface would have more than `most_faces`. Log density is
    averaged over 3 x 3 x 3 points `smoothings` times (default: up to three), or the surface would have a field's noise.
    `threshold` is a density; by default one that absorbs all but e^-5 along that side, whatever the units. A field that
    never reaches it gives an empty mesh.
    """
    # A grid that fills the box, with an empty ring around it; z runs fastest.
    box = sampled_box(field, occupancy)
    sides = box[1] - box[0]
    longest = sides.max()
    step = longest / resolution
    counts = (torch.ceil(sides / step - 1e-3).int() + 3).tolist()
    axes = [box[0, i] + torch.arange(-1, counts[i] - 1, device=box.device) * step for i in range(3)]
    x = torch.cartesian_prod(*axes)  # (points, 3)

    # The field on it, smooth.
    surface_density = 5 / longest if threshold is None else threshold
    values = _log_ratio(field, x, box, step, surface_density, occupancy).reshape(1, 1, *counts)
    usual = round(SMOOTHINGS * min(1, resolution / FINE) ** 2)
    for _ in range(usual if smoothings is None else smoothings):
        values = F.avg_pool3d(F.pad(values, [1] * 6, value=-LIMIT), 3, stride=1)

    # The surface, in steps from the grid's first point.
    points, faces = surface_net(values[0, 0])
    if len(faces) > most_faces and resolution > 1:
        coarser = max(1, min(resolution - 1, int(resolution * (most_faces / len(faces)) ** 0.5)))
        return extract_mesh(field, coarser, threshold, occupancy, most_faces, smoothings)
    vertices = x[0] + points * step
    normals = _normals(vertices, faces)
    return Mesh(vertices, faces, normals, _colors_below(field, vertices, normals, step, occupancy))


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
    found = in_chunks(field.density, x[inside])
    density = x.new_zeros(len(x)).index_copy(0, inside, found)
    return (density / surface_density).log().clamp(-LIMIT, LIMIT)


# ---------------------------------------------------------------------------------------------- surface nets

def surface_net(values: Tensor) -> tuple[Tensor, Tensor]:
    """The surface between positive and other values of a grid (X, Y, Z), whose outermost ones are not positive.

    Returns vertices (N, 3) in steps of the grid, and faces (M, 3), counter-clockwise seen from where values are not
    positive.
    """
    # One vertex for each cube that the surface crosses.
    values, case = _unambiguous(values)
    crossed = (case > 0) & (case < 255)
    number = crossed.flatten().cumsum(0).reshape(crossed.shape) - 1
    total = values.new_zeros(int(crossed.sum()), 4)

    quads = []
    for axis in range(3):
        # The edges along this axis that the surface crosses, by their lower ends, and where it crosses them.
        below, above = values[:-1, :-1, :-1], values.roll(-1, axis)[:-1, :-1, :-1]
        edges = ((below > 0) != (above > 0)).nonzero()  # (E, 3)
        below, above = below[edges.unbind(1)], above[edges.unbind(1)]
        crossing = edges.to(values)
        crossing[:, axis] += (below / (below - above)).clamp(SHORTEST, 1 - SHORTEST)

        # The four cubes around each, counter-clockwise seen from above or, where outside is below, from below.
        u, v = F.one_hot(torch.tensor([axis + 1, axis + 2]) % 3, 3).to(edges.device)
        cubes = edges[:, None] - torch.stack([u + v, v, 0 * u, u])  # (E, 4, 3)
        quad = number[cubes.unbind(2)]
        quads.append(torch.where(below[:, None] > 0, quad, quad.flip(1)))

        # A vertex is the mean of where the surface crosses its cube's edges.
        crossing = F.pad(crossing, (0, 1), value=1.0).repeat_interleave(4, 0)
        total.index_add_(0, quad.flatten(), crossing)
    vertices = total[:, :3] / total[:, 3:]

    # Every quadrilateral is cut along its shorter diagonal.
    quads = torch.cat(quads)
    a, b, c, d = vertices[quads].unbind(1)
    shorter = ((a - c).norm(dim=-1) <= (b - d).norm(dim=-1))[:, None]
    quads = torch.where(shorter, quads, quads.roll(-1, 1))
    return vertices, torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def _unambiguous(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (X, Y, Z) without the cubes in which a surface would touch itself, and each cube's set of positive
    corners (X - 1, Y - 1, Z - 1), a sum of `BITS`.

    Where a cube's corners inside, or those outside, are not connected along its edges, all become inside, but for the
    grid's outermost; that repeats until there is no such cube: the grid is well-composed (Latecki 1997).
    """
    values = values.clone()
    inner = values[1:-1, 1:-1, 1:-1]
    ambiguous = ambiguous_cases().to(values)
    while True:
        case = F.conv3d((values > 0).to(values)[None, None], BITS.to(values))[0, 0].long()
        touched = F.max_pool3d(ambiguous[case][None], 2, stride=1)[0] > 0
        if not touched.any():
            return values, case
        inner[touched] = inner[touched].clamp(min=BARELY_INSIDE)


def ambiguous_cases() -> Tensor:
    """For every set of a cube's corners, a sum of `BITS`, whether these or the others are not connected: (256,)."""
    # A graph of 256 cubes, in which neighbors of one kind are connected.
    case = torch.arange(256)[:, None]
    corner = torch.arange(8)
    vertex = 8 * case + corner  # (256, 8)
    edges = []
    for bit in (1, 2, 4):
        alike = (case >> corner & 1) == (case >> (corner ^ bit) & 1)
        edges.append(torch.stack([vertex[alike], (vertex ^ bit)[alike]], 1))
    label = connected_parts(torch.cat(edges), vertex.numel())
    return (label.reshape(256, 8) == vertex).sum(1) > 2


# ---------------------------------------------------------------------------------------------- of a mesh

def _normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Normals of vertices (N, 3): means of those of their faces (M, 3), by area. (N, 3)"""
    a, b, c = vertices[faces].unbind(1)  # (M, 3) each
    normal = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices).index_add(0, faces.flatten(), normal.repeat_interleave(3, 0))
    return F.normalize(normals, dim=-1)


def _colors_below(field: Field, vertices: Tensor, normals: Tensor, step: Tensor, occupancy: Occupancy | None,
                  samples: int = 8) -> Tensor:
    """What rays see that enter a surface against its normals, within `samples` steps: colors (N, 3) in [0, 1].

    vertices (N, 3), normals (N, 3). The outermost layer of a field is so faint that no picture ever taught it its
    color.
    """
    depths = (torch.arange(samples, device=vertices.device) + 0.5) * step

    def mean_color(rays: Tensor) -> Tensor:
        """What rays (N, 6), origins and directions, see in the thickness of the surface: (N, 3) in [0, 1]."""
        t = depths.expand(len(rays), -1)
        density, color = evaluate_samples(field, rays[:, :3], rays[:, 3:], t, occupancy)
        weights = weights_of_lengths(density, step)[..., None] + 1e-6  # never all zero
        return (weights * color).sum(1) / weights.sum(1)

    rays = torch.cat([vertices, -normals], 1)
    return in_chunks(mean_color, rays, CHUNK[rays.device.type] // samples)


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
    return Mesh(mesh.vertices[used], faces, mesh.normals[used], mesh.colors[used], mesh.up)


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
    """Write a mesh as binary little-endian PLY with normals and colors."""
    # Two arrays of records, which the header describes.
    vertices = np.empty(len(mesh.vertices), dtype=[("position", "<f4", 3), ("normal", "<f4", 3), ("color", "u1", 3)])
    colors = (mesh.colors.clamp(0, 1) * 255).round()
    vertices["position"] = mesh.vertices.cpu().numpy()
    vertices["normal"] = mesh.normals.cpu().numpy()
    vertices["color"] = colors.byte().cpu().numpy()
    faces = np.empty(len(mesh.faces), dtype=[("count", "u1"), ("vertex", "<i4", 3)])
    faces["count"] = 3
    faces["vertex"] = mesh.faces.cpu().numpy()

    header = PLY_HEADER.format(vertices=len(vertices), faces=len(faces))
    save_bytes(header.encode() + vertices.tobytes() + faces.tobytes(), path)


def write_glb(path: str | Path, mesh: Mesh) -> None:
    """Write a mesh as binary glTF 2.0 with normals and colors, under a node that turns `up` to +Y, glTF's upwards."""
    # Four arrays: attributes of vertices, and the corners of faces. Colors get an opacity to be eight bytes.
    colors = F.pad(mesh.linear_colors(), (0, 1), value=1.0) * 65535
    parts = [
        ("VEC3", FLOAT, ARRAY_BUFFER, mesh.vertices.cpu().numpy().astype("<f4")),
        ("VEC3", FLOAT, ARRAY_BUFFER, mesh.normals.cpu().numpy().astype("<f4")),
        ("VEC4", UNSIGNED_SHORT, ARRAY_BUFFER, colors.round().cpu().numpy().astype("<u2")),
        ("SCALAR", UNSIGNED_INT, ELEMENT_ARRAY_BUFFER, mesh.faces.flatten().cpu().numpy().astype("<u4")),
    ]

    # The same as glTF describes them: where they lie, and what their numbers are.
    data = b""
    views = []
    accessors = []
    for shape, component, target, array in parts:
        accessors.append({"bufferView": len(views), "componentType": component, "count": len(array), "type": shape})
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": array.nbytes, "target": target})
        data += array.tobytes()

    # The shortest turn from `up` to +Y; from straight below it is half a turn about x.
    x, y, z = mesh.up.tolist()
    turn = torch.tensor([-z, 0, x, 1 + y] if y > -1 + 1e-6 else [1.0, 0, 0, 0])

    # A scene of one node, unless there is nothing to see.
    document = {"asset": {"version": "2.0"}}
    if len(mesh.faces):
        accessors[2]["normalized"] = True
        accessors[0] |= {"min": mesh.vertices.amin(0).tolist(), "max": mesh.vertices.amax(0).tolist()}
        document |= {
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0, "rotation": F.normalize(turn, dim=0).tolist()}],
            "meshes": [{"primitives": [{"attributes": ATTRIBUTES, "indices": 3, "material": 0}]}],
            "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}],
            "buffers": [{"byteLength": len(data)}],
            "bufferViews": views,
            "accessors": accessors,
        }

    # Two chunks, each of whole words, behind a header.
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data
    save_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks, path)
