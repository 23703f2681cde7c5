"""A scene from arrays: photographs, masks and cameras that a program has already, in whatever world they are.

Shapes: `V` photographs of `H W` rows and columns, which may differ from one to the next.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cameras import Scene
from photographs.capture import Photographs, normalized, scene_of_layers
from photographs.shots import AXES, Convention, Shot, pose

CONVENTIONS = {name.lower(): Convention(flip, False) for name, flip in AXES.items()}


def scene_from_arrays(images: Sequence, masks: Sequence, R, T, K, axes: str = "opencv", size: int = 128,
                      cut: bool = True, name: str = "arrays") -> Scene:
    """V photographs of one object as a scene of `size` pixels a side; what is made of it is in the arrays' world.

    images: V of (H, W, 3), uint8 or floats in [0, 1]. masks: V of (H, W), boolean, uint8 or floats in [0, 1]. R (V, 3,
    3) and T (V, 3) lead from the world to the view, whose axes are "opencv", "opengl" or "pytorch3d"; there R acts from
    the right. K (V, 3, 3) or (3, 3): pinhole intrinsics in pixels, whose first pixel has its center at (0.5, 0.5).
    `cut`: to the object. Raises `ValueError` with one line that says which of them is wrong.
    """
    count = len(images)
    if count < 2:
        raise ValueError(f"images: {count} of them; a scene needs two or more")
    if axes not in CONVENTIONS:
        raise ValueError(f"axes {axes!r} are none of {', '.join(CONVENTIONS)}")
    if len(masks) != count:
        raise ValueError(f"masks: {len(masks)} of them for {count} images")

    # Numbers: poses for column vectors, and pinholes without skew.
    R = _numbers("R", R, (count, 3, 3))
    T = _numbers("T", T, (count, 3))
    K = _numbers("K", K, (count, 3, 3))
    if axes == "pytorch3d":
        R = R.transpose(1, 2)
    matrices = torch.cat([R, T.unsqueeze(2)], 2)
    zeros = K[:, [0, 1, 2, 2], [1, 0, 0, 1]]
    if K.diagonal(dim1=1, dim2=2).amin() <= 0 or zeros.any() or (K[:, 2, 2] != 1).any():
        raise ValueError("K: not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with focal lengths above 0, in pixels")

    # The same as files would have it; pictures are looked at one at a time.
    shots = []
    undistorted = torch.zeros(4, dtype=torch.float64)
    for i in range(count):
        height, width = _layers(images, masks, i).shape[1:]
        matrix = pose(matrices[i], f"R[{i}]")
        shots.append(Shot(str(i), None, None, width, height, K[i].diagonal()[:2], K[i, :2, 2], undistorted, matrix))
    nothing = torch.zeros(0, 3, dtype=torch.float64)
    photographs = Photographs(Path(name), shots, CONVENTIONS[axes], nothing)
    decode = partial(_layers, images, masks)
    return normalized(scene_of_layers(photographs, decode, size, cut), nothing)


def _layers(images: Sequence, masks: Sequence, i: int) -> Tensor:
    """Masked colors, mask, and ones, (5, H, W) in [0, 1], of photograph `i`."""
    color = _picture(f"images[{i}]", images[i], 3)
    mask = _picture(f"masks[{i}]", masks[i], 1, tuple(color.shape[1:]))
    return torch.cat([color * mask, mask, torch.ones_like(mask)])


def _numbers(what: str, x, shape: tuple[int, ...]) -> Tensor:
    """Finite numbers of a shape, float64; those of one view stand for all."""
    try:
        numbers = torch.as_tensor(np.asarray(x, dtype=np.float64))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what}: no array of numbers") from None
    if what == "K" and numbers.shape == shape[1:]:
        numbers = numbers.expand(shape)
    if numbers.shape != shape:
        raise ValueError(f"{what}: its shape is {tuple(numbers.shape)} instead of {shape}")
    if not numbers.isfinite().all():
        raise ValueError(f"{what}: a number in it is not finite")
    return numbers


def _picture(what: str, x, channels: int, size: tuple[int, ...] | None = None) -> Tensor:
    """(channels, H, W) in [0, 1] from (H, W, 3), or from (H, W) for one channel."""
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    wanted = "(H, W, 3)" if channels == 3 else f"{size}, that of its image"
    fits = array.ndim == 3 and array.shape[2] == 3 if channels == 3 else array.shape == size
    if not fits or array.size == 0:
        raise ValueError(f"{what}: its shape is {array.shape} instead of {wanted}")
    if not (array.dtype == bool or array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(f"{what}: {array.dtype} numbers; uint8, or floats in [0, 1]")

    # Bytes are 255 times as much, but for a mask of zeros and ones.
    picture = torch.from_numpy(np.array(array, dtype=np.float32)).reshape(*array.shape[:2], channels).permute(2, 0, 1)
    if array.dtype == np.uint8 and (channels == 3 or picture.amax() > 1):
        picture = picture / 255
    if not (picture.amin() >= 0 and picture.amax() <= 1):
        raise ValueError(f"{what}: floats from {picture.amin():g} to {picture.amax():g}, not in [0, 1]")
    return picture
