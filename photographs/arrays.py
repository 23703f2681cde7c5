"""A scene from arrays: photographs, masks and cameras that a program has already, in whatever world they are.

Shapes: `V` photographs of `H W` rows and columns, which may differ from one to the next.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cameras import Cameras, Scene
from datasets.crop import MASK_THRESHOLD
from photographs.capture import Squares, normalized, object_box
from photographs.reading import ROUNDING, Lens

# What turns the view's axes into PyTorch3D's (+X left, +Y up, +Z ahead); whether vectors are columns: X' = R X + T.
AXES = {
    "opencv": ((-1.0, -1.0, 1.0), True),     # +X right, +Y down, +Z ahead
    "opengl": ((-1.0, 1.0, -1.0), True),     # +X right, +Y up, +Z back
    "pytorch3d": ((1.0, 1.0, 1.0), False),   # rows: X' = X R + T
}


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
    cameras = _places(R, T, axes, count)
    K = _numbers("K", K, (count, 3, 3))
    _check_intrinsics(K)

    # Pictures: in squares, whole and cut.
    if len(masks) != count:
        raise ValueError(f"masks: {len(masks)} of them for {count} images")
    whole = Squares(count, size)
    crops = Squares(count, size)
    for i in range(count):
        color = _picture(f"images[{i}]", images[i], 3)
        mask = _picture(f"masks[{i}]", masks[i], 1, tuple(color.shape[1:]))
        if (mask > MASK_THRESHOLD).sum() <= 1:
            raise ValueError(f"masks[{i}]: empty, no pixel is above {MASK_THRESHOLD} of the largest value")

        # No lens distortion.
        layers = torch.cat([color * mask, mask, torch.ones_like(mask)])
        height, width = mask.shape[1:]
        lens = Lens(width, height, K[i].diagonal()[:2], K[i, :2, 2], torch.zeros(4, dtype=torch.float64))
        whole.place(i, layers, lens)
        crops.place(i, layers, lens, object_box(mask[0]))

    # The world decides about nothing.
    names = [str(i) for i in range(count)]
    scene = whole.scene(cameras, names, name)
    if cut:
        scene = replace(crops.scene(cameras, names, name), whole=scene)
    return normalized(scene)


def _places(R, T, axes: str, count: int) -> Cameras:
    """Where the cameras (V,) stand and look, in PyTorch3D's axes with row vectors; without a lens."""
    if axes not in AXES:
        raise ValueError(f"axes {axes!r} are none of {', '.join(AXES)}")
    R = _numbers("R", R, (count, 3, 3))
    T = _numbers("T", T, (count, 3))
    _check_rotations(R)
    signs, columns = AXES[axes]
    flip = torch.tensor(signs, dtype=torch.float64)
    rotation = R.transpose(1, 2) if columns else R
    return Cameras(rotation * flip, T * flip, torch.ones(count, 2), torch.zeros(count, 2))


def _numbers(what: str, x, shape: tuple[int, ...]) -> Tensor:
    """Finite numbers of a shape, float64; those of one view stand for all."""
    try:
        numbers = torch.as_tensor(np.asarray(x, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"{what}: no array of numbers") from None
    if what == "K" and numbers.shape == shape[1:]:
        numbers = numbers.expand(shape)
    if numbers.shape != shape:
        raise ValueError(f"{what}: its shape is {tuple(numbers.shape)} instead of {shape}")
    if not numbers.isfinite().all():
        raise ValueError(f"{what}: a number in it is not finite")
    return numbers


def _check_rotations(R: Tensor) -> None:
    """Raises `ValueError` unless R (V, 3, 3) are rotations."""
    error = (R @ R.transpose(1, 2) - torch.eye(3, dtype=R.dtype)).abs().amax((1, 2))
    worst = error.argmax().item()
    if error[worst] > ROUNDING:
        raise ValueError(f"R[{worst}]: no rotation, its rows are up to {error[worst]:.2g} off")
    mirrored = (torch.linalg.det(R) < 0).nonzero()
    if len(mirrored):
        raise ValueError(f"R[{mirrored[0].item()}]: a reflection (determinant -1): one axis points the wrong way")


def _check_intrinsics(K: Tensor) -> None:
    """Raises `ValueError` unless K (V, 3, 3) are those of pinholes without skew."""
    zeros = K[:, [0, 1, 2, 2], [1, 0, 0, 1]]
    if K.diagonal(dim1=1, dim2=2).amin() <= 0 or zeros.any() or (K[:, 2, 2] != 1).any():
        raise ValueError("K: not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with focal lengths above 0, in pixels")


def _picture(what: str, x, channels: int, size: tuple[int, ...] | None = None) -> Tensor:
    """(channels, H, W) in [0, 1] from (H, W, 3), or from (H, W) for one channel."""
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    wanted = "(H, W, 3)" if channels == 3 else f"{size}, that of its image"
    fits = array.ndim == 3 and array.shape[2] == 3 if channels == 3 else array.shape == size
    if not fits or array.size == 0:
        raise ValueError(f"{what}: its shape is {array.shape} instead of {wanted}")
    if not (array.dtype == bool or array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(f"{what}: {array.dtype} numbers; uint8, or floats in [0, 1]")

    # Bytes are 255 times as much.
    picture = torch.from_numpy(np.array(array, dtype=np.float32)).reshape(*array.shape[:2], channels).permute(2, 0, 1)
    if array.dtype == np.uint8:
        picture = picture / 255
    if not (picture.amin() >= 0 and picture.amax() <= 1):
        raise ValueError(f"{what}: floats from {picture.amin():g} to {picture.amax():g}, not in [0, 1]")
    return picture
