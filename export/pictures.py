"""What a person looks at: pictures, the sheet that compares methods, the turntable, tables. Knows tensors and
numbers, no field and no model.

Shapes: `T` target views, `S` side of an image in pixels.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from cameras import Scene, evenly_spaced
from common import files
from common.machine import map_threads
from datasets.pictures import open_picture

# Methods in the order of every table: short name -> what readers see.
LABELS = {
    "nearest": "nearest input",
    "ngp": "field alone",
    "eft": "EFT",
    "vldm": "VLDM sample",
    "sparsefusion": "SparseFusion",
}

TEXT = 16                # pixels of a line of text above a picture
BACKDROP = (32, 32, 32)  # of the sheet
WIDEST = 8               # most input views in a row of it
PREVIEWS = 12            # most renderings in the strip of previews


class Views(NamedTuple):
    """What a method shows from some cameras."""
    images: Tensor               # (T, 3, S, S) in [0, 1]
    silhouettes: Tensor | None   # (T, 1, S, S) in [0, 1]; None of a method that shows pictures only
    depths: Tensor | None = None  # (T, 1, S, S) the mean depth times the silhouette, in the unit of the cameras


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> a picture."""
    pixels = (x.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def comparison(scene: Scene, inputs: list[int], targets: list[int], pictures: dict[str, Views],
               rows: int = 6) -> Image.Image:
    """A sheet: on top the input views, `WIDEST` in a row; below, for up to `rows` target views, the photograph and
    what every method shows.
    """
    # What was given.
    shown = evenly_spaced(len(targets), rows)
    columns = max(min(len(inputs), WIDEST), 1 + len(pictures))
    given = [(f"input, frame {scene.names[view]}", scene.images[view]) for view in inputs]
    tiles = [given[first:first + columns] for first in range(0, len(given), columns)]

    # What there is to see, and what every method made of it.
    for position in shown:
        target = targets[position]
        truth = f"truth, frame {scene.names[target]}", scene.images[target]
        tiles.append([truth, *((LABELS[method], views.images[position]) for method, views in pictures.items())])
    return sheet(tiles)


def sheet(rows: list[list[tuple[str, Tensor]]]) -> Image.Image:
    """Rows of images (3, S, S) in [0, 1], of one size, each under its label, a line of text."""
    size = rows[0][0][1].shape[-1]
    columns = max(map(len, rows))
    picture = Image.new("RGB", (columns * size, len(rows) * (size + TEXT)), BACKDROP)
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        for j, (label, image) in enumerate(row):
            draw.text((j * size + 4, i * (size + TEXT) + 2), label, fill="white")
            picture.paste(to_image(image), (j * size, i * (size + TEXT) + TEXT))
    return picture


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture in the format of the path's ending."""
    with files.write_atomically(path) as temporary:
        image.save(temporary)


def add_preview(path: Path, image: Tensor) -> None:
    """Put a rendering (3, S, S) in [0, 1] to the right end of a strip, which keeps the last `PREVIEWS` of them."""
    # What an earlier run has shown stays, if it is there and can be read.
    newest = to_image(image)
    side = newest.width
    strip = Image.new("RGB", (0, side))
    try:
        earlier = open_picture(path).convert("RGB")
        if earlier.height == side:
            strip = earlier
    except Exception:  # broken bytes raise nearly anything
        pass

    # The last ones, and the new one.
    kept = strip.crop((max(0, strip.width - (PREVIEWS - 1) * side), 0, strip.width, side))
    longer = Image.new("RGB", (kept.width + side, side))
    longer.paste(kept, (0, 0))
    longer.paste(newest, (kept.width, 0))
    save_picture(longer, path)


def save_animation(images: Tensor, path: Path, milliseconds: int = 80) -> None:
    """Write pictures (T, 3, H, W) in [0, 1] as an endless GIF."""
    # Choosing for each frame the 256 colors that suit it best takes the time.
    frames = map_threads(lambda x: to_image(x).convert("P", palette=Image.Palette.ADAPTIVE), images.cpu())
    with files.write_atomically(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def save_views(pictures: dict[str, Views], truth: Tensor, names: list[str], folder: Path) -> None:
    """A PNG of every target view, the photograph's and every method's: `<frame>_<method>.png`. truth (T, 3, S, S).

    Those of an earlier run of other target views go.
    """
    for method in ("truth", *LABELS):
        for old in folder.glob(f"*_{method}.png"):
            old.unlink()

    # A frame is called what its data say, a file is not.
    jobs = []
    for method, images in [("truth", truth), *((method, views.images) for method, views in pictures.items())]:
        for frame, image in zip(names, images.cpu()):
            jobs.append((image, folder / f"{files.safe_name(frame)}_{method}.png"))
    map_threads(lambda job: save_picture(to_image(job[0]), job[1]), jobs)
