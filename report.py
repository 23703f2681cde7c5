"""What a person looks at: pictures, the sheet that compares methods, the turntable, tables. Knows tensors and
numbers, no field and no model.

Letters: `T` target views, `S` side of an image in pixels.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

import files
from scenes import Scene, evenly_spaced

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


class Views(NamedTuple):
    """What a method shows from some cameras."""
    images: Tensor       # (T, 3, S, S) in [0, 1]
    silhouettes: Tensor  # (T, 1, S, S) in [0, 1]


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> a picture."""
    pixels = (x.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def comparison(scene: Scene, inputs: list[int], targets: list[int], pictures: dict[str, Views],
               rows: int = 6) -> Image.Image:
    """A sheet: on top the input views; below, for up to `rows` target views, the photograph and what every method
    shows.
    """
    # An empty sheet: a column a method and one for the truth, a line of text above every picture.
    size = scene.images.shape[-1]
    shown = evenly_spaced(len(targets), rows)
    columns = max(len(inputs), 1 + len(pictures))
    sheet = Image.new("RGB", (columns * size, (size + TEXT) * (1 + len(shown))), BACKDROP)
    draw = ImageDraw.Draw(sheet)

    def place(row: int, column: int, label: str, image: Tensor) -> None:
        left = column * size
        top = row * (size + TEXT)
        draw.text((left + 4, top + 2), label, fill="white")
        sheet.paste(to_image(image), (left, top + TEXT))

    # What was given.
    for column, view in enumerate(inputs):
        place(0, column, f"input, frame {scene.names[view]}", scene.images[view])

    # What there is to see, and what every method made of it.
    for row, position in enumerate(shown, 1):
        target = targets[position]
        place(row, 0, f"frame {scene.names[target]}", scene.images[target])
        for column, (method, views) in enumerate(pictures.items(), 1):
            place(row, column, LABELS[method], views.images[position])
    return sheet


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture in the format of the path's ending."""
    with files.write_atomically(path) as temporary:
        image.save(temporary)


def save_animation(images: Tensor, path: Path, milliseconds: int = 80) -> None:
    """Write pictures (T, 3, H, W) in [0, 1] as an endless GIF."""
    frames = [to_image(x) for x in images]
    with files.write_atomically(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


def table(methods: dict[str, dict[str, float]]) -> str:
    """Metrics as text, a method a line."""
    lines = [f"{'':<16}{'PSNR':>8}{'SSIM':>8}{'perceptual':>12}{'IoU':>8}"]
    for method, row in methods.items():
        numbers = f"{row['psnr']:>8.2f}{row['ssim']:>8.3f}{row['perceptual']:>12.3f}{row['iou']:>8.3f}"
        lines.append(f"{LABELS[method]:<16}{numbers}")
    return "\n".join(lines)
