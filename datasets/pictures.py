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
from PIL import Image, ImageOps
from torch import Tensor

# Of Pillow's readers these and no others: a file's name does not say which it needs, and some start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
LOSSY = ("JPEG", "WEBP")
ORIENTATION = 0x0112  # EXIF's tag: 1 is upright, from 5 on rows are columns
CLEAR = 0.005         # part of an alpha channel that is transparent at least, if it is a mask
FEW = 16              # colors of a picture with labels, at most; masks with soft edges have more, or no areas of them
AREA = 5              # pixels a side of a square of one color that no soft edge has


# ---------------------------------------------------------------------------------------------- files

def find_file(path: Path) -> Path:
    """What is there under a path: the same, or else what differs from it only in upper and lower case, or in how
    Unicode spells it (a letter with an accent is one character or two). The path itself where there is nothing.
    """
    if path.exists() or path == path.parent:
        return path
    folder = find_file(path.parent)
    return folder / _names(folder).get(_plain(path.name), path.name)


@lru_cache
def _names(folder: Path) -> dict[str, str]:
    """The names in a folder by their plain spellings; none where it is no folder."""
    return {_plain(name): name for name in sorted(os.listdir(folder))} if folder.is_dir() else {}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def forget_names() -> None:
    """Look into all folders anew."""
    _names.cache_clear()


# ---------------------------------------------------------------------------------------------- pictures

def open_picture(path: Path) -> Image.Image:
    """The picture in a file, whose size and mode are known and whose pixels are not decoded yet.

    Raises `FileNotFoundError`, or `ValueError` for anything that is not one of `FORMATS`. Decoding what is broken may
    raise nearly anything.
    """
    try:
        return Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as e:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{path}: not a readable picture of one of the formats {kinds} ({type(e).__name__})") from None


def orientation(picture: Image.Image) -> int:
    """EXIF's orientation of an open picture, 1 to 8: how its pixels are to be turned or mirrored. 1: as they are."""
    try:
        tag = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # broken tags raise nearly anything
        return 1
    return tag if tag in range(1, 9) else 1


def pixels(picture: Image.Image, mode: str, path: Path, full: float | None = 65535, turned: bool = False) -> np.ndarray:
    """Decoded pixels of an open picture, uint8: (H, W) for mode "L", else (H, W, channels). Raises `ValueError`.

    full: white in a picture of more than 8 bits; None: its largest number. `turned`: as its EXIF tag says.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            if turned:
                picture = ImageOps.exif_transpose(picture)

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
        lossy = picture.format in LOSSY
        alpha = alpha_mask(picture, file, turned)
        if alpha is not None:
            return alpha
        colors = pixels(picture, "RGB", file, None, turned)

    # Many colors are a soft mask.
    gray = colors.max(-1)
    few = None if lossy else Image.fromarray(colors).getcolors(FEW)
    if few is None:
        return gray

    # Few ones are labels, but for those of soft edges, which fill no area. Black and one other label are a mask.
    labels = {(red << 16) + (green << 8) + blue for _, (red, green, blue) in few}
    if len(few) > 2:
        codes = torch.from_numpy(colors @ np.array([1 << 16, 1 << 8, 1])).float()
        brightest = codes.flatten()[gray.argmax()]
        labels = {int(code) for code in [*codes[_area(codes)].unique(), brightest]}
    if len(labels - {0}) > 1:
        values = ", ".join(f"{code:06x}" if code % 0x010101 else f"{code % 256}" for code in sorted(labels))
        raise ValueError(f"{file}: not black and one other color, but {values}; a mask is white where the object is, "
                         "black elsewhere")
    return (gray * 255.0 / max(gray.max(), 1)).astype(np.uint8)


def alpha_mask(picture: Image.Image, path: Path, turned: bool = False) -> np.ndarray | None:
    """The alpha channel of an open picture, (H, W) uint8; None where there is none, or hardly anything transparent."""
    if not picture.has_transparency_data:
        return None
    alpha = pixels(picture, "RGBA", path, turned=turned)[..., 3]
    return alpha if (alpha < alpha.max() / 2).mean() > CLEAR else None


def border(inside: Tensor) -> float:
    """The part of a picture's border that lies in a mask (H, W), boolean."""
    edge = torch.cat([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    return edge.float().mean().item()


def _area(codes: Tensor) -> Tensor:
    """Where a square of `AREA` pixels has one color, (H, W) boolean."""
    planes = torch.stack([codes, -codes])[:, None]
    high, low = F.max_pool2d(planes, AREA, 1, AREA // 2)[:, 0]
    return high == -low
