"""Look at a finished field again: all round or along a path of cameras, larger, as depth, normals or opacity.

    python render.py output/toy_1000_00000 --size 512
    python render.py output/toy_1000_00000 --show depth normals --elevation 40 --format png
    python render.py output/chair --path chair/transforms_test.json

FOLDER is what `distill.py` left.
"""
from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch import Tensor

from cameras import Cameras, pixel_grid
from common import cli, files
from common.progress import Progress
from export.pictures import Views, save_animation, save_picture, to_image
from photographs.reading import read_path
from reconstruction import Reconstruction

KINDS = ("color", "depth", "normals", "opacity")
STEEPEST = 80  # degrees


def elevation(text: str) -> float:
    """An elevation in radians from one in degrees, for argparse."""
    degrees = float(text)
    if not abs(degrees) <= STEEPEST:
        raise argparse.ArgumentTypeError(f"{text} is not from -{STEEPEST} to {STEEPEST} degrees")
    return math.radians(degrees)


def color(text: str) -> Tensor:
    """A color (3, 1, 1) in [0, 1] by its name or as #rrggbb, for argparse."""
    return torch.tensor(ImageColor.getrgb(text)[:3])[:, None, None] / 255


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path, help="what distill.py left: a folder with field.pt")
    p.add_argument("--show", nargs="+", choices=KINDS, default=["color"], help="default: color")

    # From where.
    p.add_argument("--frames", type=cli.whole_number(1, 3600), default=36, metavar="N",
                   help="pictures of the circle (default: 36)")
    p.add_argument("--elevation", type=elevation, metavar="DEGREES",
                   help="of the circle, from -80 to 80 (default: that of the photographs' cameras)")
    p.add_argument("--path", type=Path, metavar="FILE", help="instead of a circle the cameras of a file like "
                   "transforms.json, in the world of the photographs' cameras")

    # How.
    p.add_argument("--size", type=cli.whole_number(1, 4096), default=256, metavar="N",
                   help="pixels a side (default: 256)")
    p.add_argument("--background", type=color, default="black", help="name or #rrggbb (default: black)")
    p.add_argument("--format", choices=("gif", "png"), default="gif", help="one moving picture, or numbered ones")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: FOLDER/render")
    p.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    cli.add_device(p)
    return p


def shown(kind: str, views: Views, camera: Cameras, depths: tuple[float, float], background: Tensor) -> Tensor:
    """The only one of `views` as a picture (3, S, S) in [0, 1]: its color, its depth in gray from the nearest of
    `depths` (white) to the farthest, its normals, or its opacity.
    """
    opacity = views.silhouettes[0]
    if kind == "opacity":
        return opacity.expand(3, -1, -1)
    if kind == "color":
        return views.images[0] + (1 - opacity) * background

    # Of what is seen, how far away it is.
    depth = views.depths[0] / opacity.clamp(min=1e-6)  # (1, S, S)
    if kind == "normals":
        gray = normals(depth[0], camera) / 2 + 0.5
    else:
        near, far = depths
        gray = ((far - depth) / (far - near)).clamp(0, 1).expand(3, -1, -1)
    return opacity * gray + (1 - opacity) * background


def normals(depth: Tensor, camera: Cameras) -> Tensor:
    """Unit normals (3, S, S) of the surface at a depth (S, S) from a camera (): x to the right, y up, z towards it."""
    # Where each pixel's ray meets the surface, in the camera's axes.
    size = len(depth)
    slope = (pixel_grid(size, size) - camera.principal) / camera.focal
    points = torch.cat([-slope[:, :1], slope[:, 1:], -torch.ones_like(slope[:, :1])], 1)
    points = points.T.reshape(3, size, size).to(depth) * depth

    # From one neighbor to the other, across and upwards.
    points = F.pad(points, (1, 1, 1, 1), mode="replicate")
    across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    upwards = points[:, :-2, 1:-1] - points[:, 2:, 1:-1]
    return F.normalize(torch.linalg.cross(across, upwards, dim=0), dim=0)


def command(args: argparse.Namespace) -> None:
    """Open, look, write."""
    # What is looked at, from where, and where the pictures go.
    result = Reconstruction.load(args.folder, args.device)
    if args.path:
        path = read_path(args.path)
    else:
        orbit = result.orbit(args.elevation)
        path = orbit.cameras(args.frames, orbit.elevation[None])
    out = args.out or args.folder / "render"
    taken = [file for kind in args.show for file in sorted(out.glob(f"{kind}*.{args.format}"))]
    if taken and not args.overwrite:
        raise ValueError(f"{taken[0]} is there already; choose another --out, or --overwrite")
    files.require_writable(out / f"{args.show[0]}.gif")
    for file in taken:
        file.unlink()

    # How near and how far the object is at most, by its occupied cells.
    cells = result.occupancy.centers()[result.occupancy.occupied]
    cells = result.in_world(cells).to(path.T)
    ends = [camera.project(cells)[1].aminmax() for camera in path]
    depths = min(end.min for end in ends).item(), max(end.max for end in ends).item()

    # One view after the other.
    pictures = {kind: [] for kind in args.show}
    for i in Progress(range(len(path)), "render"):
        views = result.render(path[i:i + 1], args.size)
        for kind in pictures:
            picture = shown(kind, views, path[i], depths, args.background.to(args.device)).cpu()
            if args.format == "png":
                save_picture(to_image(picture), out / f"{kind}_{i:04}.png")
            else:
                pictures[kind].append(picture)
    for kind, images in pictures.items():
        if images:
            save_animation(torch.stack(images), out / f"{kind}.gif")
    if "depth" in pictures:
        print(f"depth: {depths[0]:.4g} is white, {depths[1]:.4g} black, in the unit of the cameras")
    print(f"{len(path)} views; pictures in {out}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
