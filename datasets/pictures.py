"""Pictures and masks in files, as many programs write them.

A mask is the alpha channel of a cut-out, or else black with the object in one other color: white, 1 of 255, 1 of 65535,
red of a palette. Labels of several objects are an error.

Shapes: `H W` rows and columns of a picture.
"""
from __future__ import annotations

import os
import unicodedata
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

# Of large pictures and odd bytes; a picture above Pillow's hard limit is an error. (Threads share the filters.)
warnings.filterwarnings("ignore", module="PIL")

# Of Pillow's readers these and no others: a file's name does not say which it needs, and some start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
CODE = np.array([1 << 16, 1 << 8, 1])  # times a color: one number
CLEAR = 0.005         # part of an alpha channel that is transparent at least, if it is a mask
FEW = 16              # colors of a picture with labels, at most; masks with soft edges have more, or no areas of them
LOOK = 1024           # pixels a side, at most, in which areas are looked for
BORDER = 0.8          # part of a picture's border in its mask, from which on the mask is probably inverted
AREA = 5              # pixels a side of a square of one color that no soft edge has


# ---------------------------------------------------------------------------------------------- files

def find_file(path: Path) -> Path:
    """What is there under a path: the same, or else what differs from it only in upper and lower case, or in how
    Unicode spells it (a letter with an accent is one character or two). The path itself where there is nothing.
    """
    if path.exists() or path == path.parent:
        return path
    folder = find_file(path.parent)
    names = _names(folder, folder.stat().st_mtime_ns) if folder.is_dir() else {}
    return folder / names.get(plain(path.name), path.name)


@lru_cache
def _names(folder: Path, date: int) -> dict[str, str]:
    """The names in a folder by their plain spellings. They are read anew when its date changes."""
    return {plain(name): name for name in sorted(os.listdir(folder))}


def plain(name: str) -> str:
    """One spelling for all that differ in upper and lower case or in Unicode's form only."""
    return unicodedata.normalize("NFC", name).casefold()


# ---------------------------------------------------------------------------------------------- pictures

def open_picture(path: Path) -> Image.Image:
    """The picture in a file, whose size and mode are known and whose pixels are not decoded yet.

    Raises `FileNotFoundError`, or `ValueError` for anything that is not one of `FORMATS`. Decoding what is broken may
    raise nearly anything.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return Image.open(path, formats=FORMATS)
    except Exception as e:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{path}: not a readable picture of one of the formats {kinds} ({type(e).__name__})") from None


def orientation(picture: Image.Image) -> int:
    """EXIF's orientation of an open picture: 1 is upright, up to 4 it is mirrored or upside down, from 5 on rows are
    columns.
    """
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation) or 1)
    except Exception:  # broken tags raise nearly anything
        return 1


def pixels(picture: Image.Image, mode: str, path: Path, full: float | None = 65535, turned: bool = False) -> np.ndarray:
    """Decoded pixels of an open picture, uint8: (H, W) for mode "L", else (H, W, channels). Raises `ValueError`.

    full: white in a picture of more than 8 bits; None: its largest number. `turned`: as its EXIF tag says.
    """
    try:
        picture = ImageOps.exif_transpose(picture) if turned else picture

        # Pillow would clip them to 8 bits.
        if picture.mode.startswith("I") or picture.mode == "F" and full is None:
            numbers = np.nan_to_num(np.asarray(picture, dtype=np.float64))
            numbers = numbers * 255 // (full or max(numbers.max(), 1e-9))
            picture = Image.fromarray(numbers.clip(0, 255).astype(np.uint8))
        return np.array(picture.convert(mode))
    # On broken bytes the decoders raise nearly anything.
    except Exception as e:
        raise ValueError(f"{path}: not a readable picture ({e})") from None


# ---------------------------------------------------------------------------------------------- masks

def read_mask(file: Path, turned: bool = False) -> np.ndarray:
    """A mask's file, (H, W) uint8: the alpha channel of a cut-out, or else its gray, 255 for the object of one label.

    Raises `ValueError` for labels of several objects.
    """
    with open_picture(file) as picture:
        alpha = alpha_mask(picture, file, turned)
        if alpha is not None:
            return alpha
        colors = pixels(picture, "RGB", file, None, turned)

    # Many colors are a soft mask.
    gray = np.maximum(np.maximum(colors[..., 0], colors[..., 1]), colors[..., 2])
    few = None if picture.format in ("JPEG", "WEBP") else Image.fromarray(colors).getcolors(FEW)
    if few is None:
        return gray

    # Few ones are labels, but for those of soft edges, which fill no area. Black and one other label are a mask.
    labels = {int(color @ CODE) for color in np.array([color for _, color in few])}
    if len(few) > 2:
        step = 1 + max(gray.shape) // LOOK
        codes = torch.from_numpy(colors[::step, ::step] @ CODE).float()[None]
        area = F.max_pool2d(codes, AREA, 1, AREA // 2) == -F.max_pool2d(-codes, AREA, 1, AREA // 2)
        brightest = colors.reshape(-1, 3)[gray.argmax()] @ CODE
        labels = {int(code) for code in [*codes[area].unique(), brightest]}
    if len(labels - {0}) > 1:
        values = ", ".join(f"{code:06x}" if code % 0x010101 else f"{code % 256}" for code in sorted(labels))
        raise ValueError(f"{file}: not black and one other color but {values}; white is where the object is")
    return (gray * 255.0 / max(gray.max(), 1)).astype(np.uint8)


def alpha_mask(picture: Image.Image, path: Path, turned: bool = False) -> np.ndarray | None:
    """The alpha channel of an open picture, (H, W) uint8; None where there is none, or hardly anything transparent."""
    if not picture.has_transparency_data:
        return None
    alpha = pixels(picture, "RGBA", path, turned=turned)[..., 3]
    return alpha if (alpha < alpha.max() / 2).mean() > CLEAR else None


def inverted(masks: Tensor, valid: Tensor) -> Tensor:
    """Which of V masks are white along the border of what is valid, as those of the background are: (V,), boolean.

    Both (V, 1, H, W) in [0, 1].
    """
    inner = -F.max_pool2d(-F.pad(valid, [1] * 4), 3, 1)
    border = valid - inner
    return ((masks > 0.5) * border).sum((1, 2, 3)) > BORDER * border.sum((1, 2, 3))
