"""Captures that tests write: colored balls photographed in any world, in every layout that `photographs.py` reads.

The matrices are made here by inverting 4 x 4 matrices, not as the readers understand them.
"""
import gzip
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from cameras import Cameras, Scene, look_at, pixel_grid
from metrics import psnr
from photographs.reading import read_capture
from photographs.shots import world_to_view
from tests.support import fields

# Three balls that no reflection or rotation maps to themselves: middle, radius, color.
BALLS = (((0.3, -0.2, 0.1), 0.5, (0.9, 0.2, 0.1)), ((-0.4, 0.3, 0.3), 0.35, (0.1, 0.8, 0.3)),
         ((0.1, 0.5, -0.5), 0.25, (0.2, 0.3, 0.9)))
FROM_OPENCV = torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64))  # view axes to PyTorch3D's
FROM_OPENGL = torch.diag(torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64))
MODELS = {"SIMPLE_PINHOLE": (0, "f cx cy"), "PINHOLE": (1, "fx fy cx cy"), "SIMPLE_RADIAL": (2, "f cx cy k1"),
          "RADIAL": (3, "f cx cy k1 k2"), "OPENCV": (4, "fx fy cx cy k1 k2 p1 p2")}


def turn(x, y, z):
    """A rotation (3, 3), float64, about an axis by its length in radians."""
    return torch.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


@dataclass(frozen=True)
class Shoot:
    """V photographs of one size with their cameras in pixels."""
    R: torch.Tensor         # (V, 3, 3) float64, of `Cameras`
    T: torch.Tensor         # (V, 3)
    width: int
    height: int
    focal: tuple            # (x, y) pixels
    principal: tuple        # (column, row) pixels
    distortion: tuple = (0.0, 0.0, 0.0, 0.0)
    rgba: tuple = ()        # V arrays (H, W, 4) uint8

    def __len__(self):
        return len(self.T)

    def square_cameras(self):
        """As a reader should give them: NDC of the photograph padded to a square about its middle."""
        half = max(self.width, self.height) / 2
        focal = torch.tensor(self.focal, dtype=torch.float64) / half
        middle = torch.tensor([self.width / 2, self.height / 2], dtype=torch.float64)
        principal = (middle - torch.tensor(self.principal, dtype=torch.float64)) / half
        return Cameras(self.R, self.T, focal.expand(len(self), 2), principal.expand(len(self), 2))

    def matrices(self, axes):
        """Poses (V, 4, 4): "opengl" camera-to-world or "opencv" world-to-camera."""
        view = torch.eye(4, dtype=torch.float64).repeat(len(self), 1, 1)
        view[:, :3, :3] = self.R.transpose(1, 2)
        view[:, :3, 3] = self.T
        if axes == "opencv":
            return torch.linalg.inv(FROM_OPENCV) @ view
        return torch.linalg.inv(torch.linalg.inv(FROM_OPENGL) @ view)

    def in_world(self, R, scale, shift):
        """The same photographs in a world where a point x of this one is scale * R @ x + shift."""
        turned = R @ self.R
        T = scale * self.T - torch.einsum("i,vij->vj", shift, turned)
        return replace(self, R=turned, T=T)

    def at(self, index):
        """Some of them."""
        return replace(self, R=self.R[index], T=self.T[index], rgba=tuple(self.rgba[i] for i in index))


def see_balls(rays_o, rays_d):
    """Color and mask (R, 4) in [0, 1] of rays (R, 3): the nearest ball, unshaded but for its position."""
    d = torch.nn.functional.normalize(rays_d, dim=-1)
    nearest = torch.full((len(d),), math.inf, dtype=d.dtype)
    rgba = torch.zeros(len(d), 4, dtype=d.dtype)
    for middle, radius, color in BALLS:
        o = rays_o - torch.tensor(middle, dtype=d.dtype)
        b = (o * d).sum(-1)
        inside = b**2 - (o**2).sum(-1) + radius**2
        t = -b - inside.clamp(min=0).sqrt()
        hit = (inside > 0) & (t < nearest)
        nearest = torch.where(hit, t, nearest)
        shade = 0.6 + 0.4 * (o + t[:, None] * d) / radius
        paint = torch.cat([torch.tensor(color, dtype=d.dtype) * shade, torch.ones(len(d), 1, dtype=d.dtype)], -1)
        rgba = torch.where(hit[:, None], paint, rgba)
    return rgba


def balls(count=8, width=48, height=36, focal=(60.0, 60.0), principal=None, distortion=(0.0, 0.0, 0.0, 0.0), seed=0,
          aside=(0.0, 0.0)):
    """`count` photographs from around the balls, four units away; they look so far to the right of and below them."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.arange(count) * (2 * math.pi / count) + 0.2 * torch.rand(count, generator=generator)
    up = 0.8 + 1.5 * torch.rand(count, generator=generator)
    eye = torch.stack([4 * angle.cos(), up, 4 * angle.sin()], -1).double()
    at = (0.2 * torch.rand(count, 3, generator=generator) - 0.1).double()
    R, T = look_at(eye, at, torch.tensor([0.1, 1.0, 0.05], dtype=torch.float64))
    T = T + torch.tensor([*aside, 0.0], dtype=torch.float64)
    shoot = Shoot(R, T, width, height, focal, principal or (width / 2, height / 2), distortion)
    return replace(shoot, rgba=tuple(_picture(shoot, i) for i in range(count)))


def _picture(shoot, i):
    """What a lens with distortion shows: the direction of every pixel is found by fixed-point iteration."""
    k1, k2, p1, p2 = shoot.distortion
    row, column = np.mgrid[:shoot.height, :shoot.width] + 0.5
    seen_x = torch.from_numpy((column - shoot.principal[0]) / shoot.focal[0]).flatten()
    seen_y = torch.from_numpy((row - shoot.principal[1]) / shoot.focal[1]).flatten()
    x, y = seen_x, seen_y
    for _ in range(60 if any(shoot.distortion) else 1):
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2**2
        x, y = ((seen_x - 2 * p1 * x * y - p2 * (r2 + 2 * x * x)) / radial,
                (seen_y - p1 * (r2 + 2 * y * y) - 2 * p2 * x * y) / radial)
    directions = torch.stack([-x, -y, torch.ones_like(x)], -1) @ shoot.R[i].T
    center = (-shoot.T[i] @ shoot.R[i].T).expand(len(x), 3)
    rgba = see_balls(center, directions).reshape(shoot.height, shoot.width, 4)
    return (rgba * 255).round().byte().numpy()


# ---------------------------------------------------------------------------------------------- writers

def write_pictures(folder, shoot, masks=None, ending="png", names=None):
    """The photographs in folder/images: with alpha channels, or with masks named by a pattern such as
    "masks/{0}.png".
    """
    names = names or [f"{i:03d}" for i in range(len(shoot))]
    for name, rgba in zip(names, shoot.rgba):
        file = folder / "images" / f"{name}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if masks is None:
            Image.fromarray(rgba).save(file)
            continue
        Image.fromarray(np.ascontiguousarray(rgba[..., :3])).save(file)
        mask = folder / masks.format(file.name, file.stem)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(rgba[..., 3])).save(mask)
    return [f"images/{name}.{ending}" for name in names]


def write_transforms(folder, shoot, masks=None, each=False, name="transforms.json", paths=None, **more):
    """A transforms.json with every number for all frames, or with each frame's own."""
    paths = paths or write_pictures(folder, shoot, masks)
    k1, k2, p1, p2 = shoot.distortion
    lens = dict(fl_x=shoot.focal[0], fl_y=shoot.focal[1], cx=shoot.principal[0], cy=shoot.principal[1],
                w=shoot.width, h=shoot.height, k1=k1, k2=k2, p1=p1, p2=p2)
    frames = []
    for path, matrix in zip(paths, shoot.matrices("opengl")):
        frame = {"file_path": path, "transform_matrix": matrix.tolist()}
        frames.append(frame | lens if each else frame)
    content = ({} if each else lens) | more | {"frames": frames}
    (folder / name).write_text(json.dumps(content))
    return folder


def quaternion(matrix):
    """(w, x, y, z) of a rotation: the main axis of a symmetric matrix (Bar-Itzhack 2000)."""
    trace = matrix.trace()
    K = torch.zeros(4, 4, dtype=torch.float64)
    K[:3, :3] = matrix + matrix.T - trace * torch.eye(3, dtype=torch.float64)
    K[3, :3] = torch.stack([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    K[:3, 3] = K[3, :3]
    K[3, 3] = trace
    x, y, z, w = torch.linalg.eigh(K).eigenvectors[:, -1].tolist()
    return [w, x, y, z]


def write_colmap(folder, shoot, model="PINHOLE", binary=True, points=(), masks=None, place="sparse/0", names=None):
    """A COLMAP model and its pictures; points (P, 3) of the world."""
    paths = write_pictures(folder, shoot, masks, names=names)
    names = [Path(path).relative_to("images").as_posix() for path in paths]
    values = dict(zip(("k1", "k2", "p1", "p2"), shoot.distortion))
    values |= dict(f=shoot.focal[0], fx=shoot.focal[0], fy=shoot.focal[1], cx=shoot.principal[0], cy=shoot.principal[1])
    number, keys = MODELS[model]
    lens = [values[key] for key in keys.split()]
    poses = []
    for matrix in shoot.matrices("opencv"):
        poses.append(quaternion(matrix[:3, :3]) + matrix[:3, 3].tolist())
    (folder / place).mkdir(parents=True, exist_ok=True)
    write = _write_binary if binary else _write_text
    write(folder / place, (model, number, shoot.width, shoot.height, lens), poses, names, points)
    return folder


def _write_text(folder, lens, poses, names, points):
    model, _, width, height, numbers = lens
    words = " ".join(map(repr, numbers))
    (folder / "cameras.txt").write_text(f"# Camera list\n7 {model} {width} {height} {words}\n")
    lines = ["# Image list with two lines of data per image:"]
    for i, (pose, name) in enumerate(zip(poses, names)):
        lines += [f"{i + 1} {' '.join(map(repr, pose))} 7 {name}", "10.5 11.5 -1" if i % 2 else ""]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{i} {' '.join(repr(float(x)) for x in point)} 9 9 9 0.5 1 0" for i, point in enumerate(points)]
    (folder / "points3D.txt").write_text("\n".join(["# points", *rows]) + "\n")


def _write_binary(folder, lens, poses, names, points):
    _, number, width, height, numbers = lens
    cameras = struct.pack("<QiiQQ", 1, 7, number, width, height) + struct.pack(f"<{len(numbers)}d", *numbers)
    (folder / "cameras.bin").write_bytes(cameras)
    images = struct.pack("<Q", len(names))
    for i, (pose, name) in enumerate(zip(poses, names)):
        images += struct.pack("<i7di", i + 1, *pose, 7) + name.encode() + b"\0"
        images += struct.pack("<Q", i % 2) + struct.pack("<ddq", 10.5, 11.5, -1) * (i % 2)
    (folder / "images.bin").write_bytes(images)
    cloud = struct.pack("<Q", len(points))
    for i, point in enumerate(points):
        cloud += struct.pack("<Q3d3BdQ", i, *map(float, point), 9, 9, 9, 0.5, 1) + struct.pack("<ii", 1, 0)
    (folder / "points3D.bin").write_bytes(cloud)


def write_co3d(root, shoot):
    """The photographs as the sequence `one` of the category `thing` of a CO3Dv2 tree."""
    write_pictures(root / "thing", shoot, "masks/{1}.png")
    half = min(shoot.width, shoot.height) / 2
    records = []
    for i in range(len(shoot)):
        viewpoint = {"R": shoot.R[i].tolist(), "T": shoot.T[i].tolist(), "intrinsics_format": "ndc_isotropic",
                     "focal_length": [x / half for x in shoot.focal],
                     "principal_point": [(shoot.width / 2 - shoot.principal[0]) / half,
                                         (shoot.height / 2 - shoot.principal[1]) / half]}
        records.append({"sequence_name": "one", "frame_number": i, "frame_timestamp": float(i),
                        "image": {"path": f"thing/images/{i:03d}.png", "size": [shoot.height, shoot.width]},
                        "mask": {"path": f"thing/masks/{i:03d}.png"}, "viewpoint": viewpoint})
    (root / "thing" / "frame_annotations.jgz").write_bytes(gzip.compress(json.dumps(records).encode()))
    return root


# ---------------------------------------------------------------------------------------------- what is compared

def assert_same_cameras(capture, shoot, tolerance=1e-5):
    """The scene's cameras, led back to the user's world, are the file's."""
    found = capture.scene.world.cameras(capture.scene.cameras)
    wanted = shoot.square_cameras()
    unit = wanted.centers().norm(dim=-1).mean()
    for name in ("R", "focal", "principal"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=tolerance)
    torch.testing.assert_close(found.T / unit, wanted.T / unit, rtol=0, atol=tolerance)


def field_psnr(one, other, scale=1.0, size=40):
    """The least PSNR between what two sets of cameras see of a field that is made for cameras `scale` units away."""
    def color(x):
        return (0.5 + 0.4 * torch.sin(3 * x + torch.tensor([0.3, 1.1, 2.0]))).clamp(0, 1)
    field = fields.Analytic(lambda x: 4 * torch.sigmoid(8 * (0.9 - (x * torch.tensor([1.0, 1.4, 0.8])).norm(dim=-1))),
                            color, samples_per_ray=32)
    pictures = []
    for cameras in (one, other):
        cameras = Cameras(cameras.R, cameras.T / scale, cameras.focal, cameras.principal).to(torch.float32)
        colors = fields.images(field, cameras, size).color
        pictures.append(colors.transpose(1, 2).reshape(-1, 3, size, size))
    assert pictures[0].mean() > 0.01
    return psnr(*pictures).min()


def worst_picture(capture):
    """The least PSNR between a picture with its mask and what its camera sees of the balls, in the pixels' middles."""
    scene = capture.scene
    size = scene.images.shape[-1]
    cameras = capture.scene.world.cameras(scene.cameras)
    values = []
    for i in range(len(scene)):
        rays_o, rays_d = cameras[i].rays(pixel_grid(size, size).double())
        seen = see_balls(rays_o, rays_d).T.reshape(1, 4, size, size).float()
        both = torch.cat([scene.images[i], scene.masks[i]])
        values.append(psnr(seen * scene.valid[i], both[None]))
    return torch.cat(values).min()


class Capture(NamedTuple):
    """A folder of photographs, and the scene of it."""
    scene: Scene
    inputs: list[int] | None
    targets: list[int] | None
    source: str


def captured(folder, size=None, cut=False):
    """The capture in a folder."""
    photographs = read_capture(folder)
    return Capture(photographs.load(size, cut), photographs.inputs, photographs.targets, photographs.source)


def cameras_of(photographs, convention=None):
    """The cameras (V,) as the files have them, or in another convention, NDC of the padded square."""
    matrices = torch.stack([shot.matrix for shot in photographs.shots])
    R, T = world_to_view(matrices, convention or photographs.convention)
    focal, principal = (torch.stack([getattr(shot, x) for shot in photographs.shots]) for x in ("focal", "principal"))
    sides = torch.tensor([[shot.width, shot.height] for shot in photographs.shots], dtype=torch.float64)
    half = sides.amax(1, keepdim=True) / 2
    return Cameras(R, T, focal / half, (sides / 2 - principal) / half)
