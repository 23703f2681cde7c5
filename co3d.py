"""CO3Dv2 sequences as cropped images, soft masks and cameras (Sec. 4 of the paper; CO3D: Reizenstein et al., ICCV 2021).

Reads, without PyTorch3D, a dataset folder as CO3D's own downloader leaves it,

    <root>/<category>/frame_annotations.jgz       gzipped JSON, one record a frame: image, mask, camera
    <root>/<category>/set_lists/set_lists_*.json  optional: which frames are train, val and test
    <root>/<category>/<sequence>/images, masks    wherever the records say

(`sequence_annotations.jgz`, the depth maps and the point clouds hold nothing that the method needs), or the released preprocessed toy data
`<root>/<category>/<category>_toy.pt`. Annotations of one category are hundreds of megabytes of JSON: they are parsed once into an
SQLite file under the user's cache folder, which is renewed when a source file's date or size changes.

As released: the crop is the mask's box grown by 30 %, not made square, scaled so that its longer side fills the output, and placed in
its top left corner; resizing is bilinear without anti-aliasing; about one crop in ten comes out a pixel short while its camera keeps the
nominal scale. Different: an all but empty mask is an error instead of a crop of the whole image; frames of a short sequence are
never repeated to make up a number.

Letters: `N` sequences, `V` frames (views) of one, `S` side of the square output in pixels, `H W` rows and columns of a photograph.
"""
from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import re
import sqlite3
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cameras import Cameras

MASK_THRESHOLD = 0.4  # foreground probability that counts as the object (released loader)
CONTEXT = 0.3         # growth of the mask's box, as a fraction of its width and height (released loader)
LISTED = 5            # names that an error message lists


# ---- what the rest of the code sees ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Scene:
    """V views of one object. Images are already multiplied by their soft masks: the background is black."""
    images: Tensor    # (V, 3, S, S) in [0, 1]
    masks: Tensor     # (V, 1, S, S) soft, probability of foreground in [0, 1]
    valid: Tensor     # (V, 1, S, S) 1 where the photograph is, 0 in the padding
    cameras: Cameras  # (V,), NDC of the square output
    names: list[str]  # frame numbers as annotated
    sequence: str     # the sequence's name

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index) -> Scene:
        """The scene with the views at `index` only: a list, a slice or a tensor of positions."""
        index = torch.arange(len(self))[index].tolist()
        names = [self.names[i] for i in index]
        return Scene(self.images[index], self.masks[index], self.valid[index], self.cameras[index], names, self.sequence)

    def to(self, device) -> Scene:
        """The same scene on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)[:4]})


@dataclass(frozen=True)
class PackedScenes:
    """N sequences with V views each, in bytes: what training keeps in memory. Colours are within 1/510 of `Scene`'s."""
    rgba: Tensor            # (N, V, 4, S, S) uint8: masked colours and soft mask, times 255
    valid: Tensor           # (N, V, 1, S, S) uint8, 0 or 1
    cameras: Cameras        # (N, V)
    names: list[str]        # N sequences
    frames: list[list[str]]  # N lists of V frame numbers

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, n: int) -> Scene:
        """Sequence number `n` as a scene."""
        rgba = self.rgba[n].float() / 255
        return Scene(rgba[:, :3], rgba[:, 3:], self.valid[n].float(), self.cameras[n], self.frames[n], self.names[n])

    def to(self, device) -> PackedScenes:
        """The same scenes on another device."""
        return replace(self, rgba=self.rgba.to(device), valid=self.valid.to(device), cameras=self.cameras.to(device))


def sequences(root, category: str, split: str | None = None) -> list[str]:
    """Names of the sequences of a category. `split`, such as "fewview_dev/test": only those with frames listed as `test` in
    `set_lists/set_lists_fewview_dev.json`."""
    return _source(root, category).sequences(split)


def frame_numbers(root, category: str, sequence: str, split: str | None = None) -> list[int]:
    """Numbers of the frames of a sequence in order of time, optionally of one `split` only (see `sequences`). Decodes nothing.

    Frames without a mask, with an empty one (annotated mass of at most one pixel) or without a camera do not count.
    """
    return _source(root, category).frame_numbers(sequence, split)


def load_sequence(root, category: str, sequence: str, size: int = 256, frames: Iterable[int] | None = None) -> Scene:
    """A sequence, or those of its frames with the numbers `frames` in that order, cropped to `size` pixels a side.

    `root` is a `str` or `Path`; raises `FileNotFoundError` or `ValueError` with one line on what is missing or broken.
    """
    source = _source(root, category)
    numbers = source.frame_numbers(sequence, None)
    if frames is not None:
        frames, known = list(frames), set(numbers)
        if absent := [i for i in frames if i not in known]:
            raise ValueError(f"{root}/{category}: sequence {sequence!r} has no usable frame {absent[0]}; it has {_some(numbers)}")
        numbers = frames
    return source.load(sequence, size, numbers)


def load_packed(roots: list, category: str, names: list[str] | None, views: int, size: int, workers: int | None = None) -> PackedScenes:
    """`views` evenly spaced frames of each of the sequences `names` (None: all) of each of the folders `roots`.

    Decoded by `workers` processes (None: one a core). Sequences with fewer frames are left out. One bar shows the progress.
    """
    jobs = []
    for root in roots:
        source, before = _source(root, category), len(jobs)
        for name in source.sequences(None) if names is None else names:
            numbers = source.frame_numbers(name, None)
            if len(numbers) >= views:
                jobs.append((root, name, [numbers[i] for i in evenly_spaced(len(numbers), views)]))
        if len(jobs) == before:
            raise ValueError(f"{root}/{category}: no sequence has {views} frames")

    rgba = torch.empty(len(jobs), views, 4, size, size, dtype=torch.uint8)
    valid = torch.empty(len(jobs), views, 1, size, size, dtype=torch.uint8)
    cameras = []
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    with _pool(workers) as pool:
        packed = (pool.imap if pool else map)(partial(_load_bytes, category, size), jobs)
        for n, arrays in enumerate(tqdm(packed, f"reading {category}", len(jobs), unit="sequence", disable=None)):
            rgba.numpy()[n], valid.numpy()[n] = arrays[:2]  # not torch's copy, whose threads would take the cores from the workers
            cameras.append(Cameras(*(torch.from_numpy(x) for x in arrays[2:])))
    return PackedScenes(rgba, valid, Cameras.stack(cameras), [name for _, name, _ in jobs], [[str(i) for i in n] for _, _, n in jobs])


def evenly_spaced(n: int, count: int) -> list[int]:
    """Positions of `count` evenly spaced ones of `n` things, first and last included; all of them where there are fewer.

    The paper's protocol on the whole dataset: the frames at `evenly_spaced(n, 32)` of every sequence with more than 10.
    """
    return list(range(n)) if n <= count else torch.linspace(0, n - 1, count).long().tolist()


# ---- the arithmetic of crop, resize and intrinsics -------------------------------------------------------------------------------

class Crop(NamedTuple):
    """One photograph cut to its object, with the camera of the result."""
    image: Tensor      # (3, S, S) in [0, 1], not yet masked
    mask: Tensor       # (1, S, S) in [0, 1]
    valid: Tensor      # (1, S, S) 0 or 1
    focal: Tensor      # (2,) NDC of the output
    principal: Tensor  # (2,) NDC of the output
    mask_box: tuple[int, int, int, int]  # x, y, width, height in pixels of the photograph: of the mask
    crop_box: tuple[int, int, int, int]  # the same of the part that the output shows


def crop_and_resize(image: np.ndarray, mask: np.ndarray, focal, principal, intrinsics_format: str, size: int) -> Crop:
    """Photograph (H, W, 3) and mask (H, W), both uint8, with NDC intrinsics (2,) each -> the crop of `size` pixels a side.

    NDC of CO3D annotations have two units: half the image's own width and height (`ndc_norm_image_bounds`), or half its shorter side for
    both axes (`ndc_isotropic`). Raises `ValueError` for an empty mask, another format, or sizes that differ.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, the image {image.shape[1]} x {image.shape[0]}")
    height, width = mask.shape
    probability = torch.from_numpy(mask).float() / 255
    mask_box = _mask_box(probability)
    bounds = torch.tensor([width, height, width, height])
    x0, y0, x1, y1 = torch.minimum(context_box(mask_box).clamp(min=0), bounds).round().int().tolist()  # round half to even
    scale = size / max(x1 - x0, y1 - y0)
    rows, columns = (max(int(side * scale), 1) for side in (y1 - y0, x1 - x0))  # as released: floored, so 255 happens

    def place(x: Tensor, mode: str, **options) -> Tensor:  # (C, y1 - y0, x1 - x0) -> (C, S, S), in the top left corner
        return F.pad(F.interpolate(x[None], (rows, columns), mode=mode, **options)[0], (0, size - columns, 0, size - rows))

    pixels = torch.from_numpy(image[y0:y1, x0:x1]).permute(2, 0, 1).float() / 255
    half = torch.tensor([width, height], dtype=torch.float64) / 2
    if intrinsics_format not in ("ndc_norm_image_bounds", "ndc_isotropic"):
        raise ValueError(f"intrinsics format {intrinsics_format!r} is neither 'ndc_norm_image_bounds' nor 'ndc_isotropic'")
    unit = half if intrinsics_format == "ndc_norm_image_bounds" else half.min()
    focal, principal = (torch.as_tensor(x, dtype=torch.float64) for x in (focal, principal))
    principal_pixels = half - principal * unit - torch.tensor([x0, y0])  # NDC point left and up, pixels right and down
    return Crop(
        place(pixels, "bilinear", align_corners=False), place(probability[None, y0:y1, x0:x1], "nearest"),
        place(torch.ones(1, y1 - y0, x1 - x0), "nearest"), (focal * unit * scale / (size / 2)).float(),
        ((size / 2 - principal_pixels * scale) / (size / 2)).float(), mask_box, (x0, y0, x1 - x0, y1 - y0))


def _mask_box(probability: Tensor) -> tuple[int, int, int, int]:
    """Tight box (x, y, width, height) of the pixels of (H, W) over the threshold, which drops by 0.05 while at most one is."""
    threshold = MASK_THRESHOLD
    while (probability > threshold).sum() <= 1:
        threshold -= 0.05
        if threshold < -0.01:
            raise ValueError("the mask is empty")
    rows, columns = (torch.nonzero((probability > threshold).any(axis))[[0, -1], 0].tolist() for axis in (1, 0))
    return columns[0], rows[0], columns[1] - columns[0] + 1, rows[1] - rows[0] + 1


def context_box(box) -> Tensor:
    """Box (x, y, width, height) -> corners (x0, y0, x1, y1), float32, grown by `CONTEXT` about the centre and at least 2 pixels wide."""
    box = torch.as_tensor(box, dtype=torch.float32)
    corner, sides = box[:2] - box[2:] * CONTEXT / 2, box[2:] + box[2:] * CONTEXT
    return torch.cat([corner, corner + sides.clamp(min=2)])


# ---- a CO3Dv2 tree ---------------------------------------------------------------------------------------------------------------

class _Tree:
    """One category of a dataset folder."""

    def __init__(self, root: Path, category: str):
        self.root, self.folder = root, root / category
        self.annotations = self.folder / "frame_annotations.jgz"
        sources = [self.annotations, *sorted((self.folder / "set_lists").glob("set_lists_*.json"))]
        stamp = [(p.name, s.st_mtime_ns, s.st_size) for p in sources for s in [p.stat()]]
        self.index = _open_index(self.folder.resolve(), tuple(sources), json.dumps([_SCHEMA, stamp]))

    def sequences(self, split: str | None) -> list[str]:
        """Names of all sequences, or of those with frames in the split, sorted."""
        names = self._column(f"SELECT DISTINCT sequence FROM frames WHERE {_IN_SPLIT} ORDER BY sequence", split=split)
        splits = [] if names else self._column("SELECT DISTINCT split FROM splits ORDER BY split")
        if split is not None and not names and split not in splits:
            raise ValueError(f"{self.folder}/set_lists: no split {split!r}; there is {_some(splits)}")
        return names

    def frame_numbers(self, sequence: str, split: str | None) -> list[int]:
        """Numbers of the frames in order of time."""
        query = f"SELECT number FROM frames WHERE sequence = :sequence AND {_IN_SPLIT} ORDER BY time, number"
        numbers = self._column(query, sequence=sequence, split=split)
        if not numbers:
            where = f" in split {split!r}" if split else ""
            raise ValueError(f"{self.folder}: no sequence {sequence!r}{where}; there is {_some(self.sequences(split))}")
        return numbers

    def _column(self, query: str, **values) -> list:
        return [value for (value,) in self.index.execute(query, values)]

    def load(self, sequence: str, size: int, numbers: list[int]) -> Scene:
        """The frames with these numbers."""
        rows = self.index.execute("SELECT number, image, mask, viewpoint FROM frames WHERE sequence = ?", (sequence,))
        rows = {number: row for number, *row in rows}
        crops, poses = zip(*(self._frame(sequence, number, *rows[number], size) for number in numbers))
        masks, (R, T) = torch.stack([c.mask for c in crops]), zip(*poses)
        cameras = Cameras(torch.stack(R), torch.stack(T), torch.stack([c.focal for c in crops]), torch.stack([c.principal for c in crops]))
        return Scene(torch.stack([c.image for c in crops]) * masks, masks, torch.stack([c.valid for c in crops]), cameras,
                     [str(i) for i in numbers], sequence)

    def _frame(self, sequence: str, number: int, image: str, mask: str, viewpoint: str, size: int) -> tuple[Crop, tuple[Tensor, Tensor]]:
        """One frame: its crop, and R (3, 3) and T (3,)."""
        viewpoint, pixels = json.loads(viewpoint), [_decode(self.root / image, "RGB"), _decode(self.root / mask, "L")]
        try:
            numbers = [torch.tensor(viewpoint[k], dtype=torch.float64).reshape(shape)
                       for k, shape in (("R", (3, 3)), ("T", 3), ("focal_length", 2), ("principal_point", 2))]
        except (KeyError, TypeError, ValueError, RuntimeError):
            numbers = [torch.tensor(torch.nan)]
        if not all(x.isfinite().all() for x in numbers):
            raise ValueError(f"{self.annotations}: the camera of frame {number} of {sequence!r} is not R (3, 3), T (3), "
                             "focal_length (2) and principal_point (2) in finite numbers")
        R, T, focal, principal = numbers
        try:
            crop = crop_and_resize(*pixels, focal, principal, viewpoint.get("intrinsics_format", "ndc_norm_image_bounds"), size)
        except ValueError as e:
            raise ValueError(f"{self.root / mask}: {e} (frame {number} of {sequence!r})") from None
        return crop, (R.float(), T.float())


_SCHEMA = """
    CREATE TABLE stamp (stamp);
    CREATE TABLE frames (sequence, number, time, image, mask, viewpoint);
    CREATE INDEX by_sequence ON frames (sequence);
    CREATE TABLE splits (split, image);
    CREATE INDEX by_split ON splits (split, image);
"""
_IN_SPLIT = "(:split IS NULL OR EXISTS (SELECT 1 FROM splits WHERE split = :split AND splits.image = frames.image))"


@lru_cache(maxsize=8)
def _open_index(folder: Path, sources: tuple[Path, ...], stamp: str) -> sqlite3.Connection:
    """The frames of a category as a database: the cached one if it was made from these sources, otherwise a new one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")).absolute() / "sparsefusion"
    file = cache / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.sqlite"
    try:
        index = sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
        if index.execute("SELECT stamp FROM stamp").fetchone() == (stamp,):
            return index
    except sqlite3.Error:  # none yet, or not one of ours
        pass
    index = sqlite3.connect(":memory:", check_same_thread=False)
    index.executescript(_SCHEMA)
    index.execute("INSERT INTO stamp VALUES (?)", (stamp,))
    index.executemany("INSERT INTO frames VALUES (?, ?, ?, ?, ?, ?)", _usable_frames(sources[0]))
    for set_list in sources[1:]:
        index.executemany("INSERT INTO splits VALUES (?, ?)", _split_members(set_list))
    index.commit()
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(temporary)) as copy:
            index.backup(copy)
        os.replace(temporary, file)
    except (OSError, sqlite3.Error):  # a cache that cannot be written only costs time
        if temporary.is_file():
            temporary.unlink()
    return index


def _usable_frames(annotations: Path) -> Iterator[tuple]:
    """Rows of the table `frames`: every record that has an image, a mask of more than one pixel (as released) and a camera."""
    for i, record in enumerate(_records(annotations)):
        try:
            mask, viewpoint = record.get("mask"), record.get("viewpoint")
            if mask and viewpoint and (mask.get("mass") is None or mask["mass"] > 1):
                yield (record["sequence_name"], record["frame_number"], record.get("frame_timestamp") or 0.0, record["image"]["path"],
                       mask["path"], json.dumps(viewpoint))
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{annotations}: record {i} lacks sequence_name, frame_number, image.path or mask.path") from None


def _records(file: Path) -> Iterator[dict]:
    """The records of a gzipped JSON list, one at a time: a whole category as Python objects would take gigabytes."""
    try:
        text, decoder, separator = gzip.decompress(file.read_bytes()).decode(), json.JSONDecoder(), re.compile(r"[\s,]*")
        position = separator.match(text, text.index("[") + 1).end()
        while text[position] != "]":
            record, position = decoder.raw_decode(text, position)
            yield record
            position = separator.match(text, position).end()
    except (OSError, EOFError, ValueError, IndexError, zlib.error):
        raise ValueError(f"{file}: not a complete gzipped JSON list; download it again") from None


def _split_members(set_list: Path) -> Iterator[tuple[str, str]]:
    """Rows of the table `splits`: ("fewview_dev/test", image path) for each entry [sequence, frame number, image path] of the file."""
    try:
        for split, members in json.loads(set_list.read_text()).items():
            yield from ((f"{set_list.stem.removeprefix('set_lists_')}/{split}", image) for _, _, image in members)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{set_list}: not a JSON object of lists of [sequence, frame number, image path]") from None


def _decode(file: Path, mode: str) -> np.ndarray:
    """Pixels of an image file, uint8: (H, W, 3) for mode "RGB", (H, W) for "L"."""
    try:
        with Image.open(file) as image:
            return np.array(image.convert(mode))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file, though frame_annotations.jgz lists it") from None
    except Exception as e:  # on broken bytes the decoders raise nearly anything
        raise ValueError(f"{file}: not a readable image ({e})") from None


# ---- the released toy data -------------------------------------------------------------------------------------------------------

class _Toy:
    """`<category>_toy.pt`: {category: [{images, R, T, f, c, masks, valid_region, ...}]}, already cropped, images already masked."""

    def __init__(self, root: Path, category: str):
        self.file = _toy_file(root, category)
        try:  # mapped where the format allows it: only what is used is read
            data = torch.load(self.file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.file))
            self.items = {f"toy{i}": item for i, item in enumerate(data[category])}
            self.counts = {name: len(item["R"]) for name, item in self.items.items()}
        except Exception as e:
            reason = str(e).strip().split("\n")[0][:100]
            raise ValueError(f"{self.file}: not a toy dataset {{{category!r}: [sequences]}} that loads safely ({reason})") from None

    def sequences(self, split: str | None) -> list[str]:
        """`toy0`, `toy1`, ... in the file's order; the file has no splits."""
        return list(self.items)

    def frame_numbers(self, sequence: str, split: str | None) -> list[int]:
        """0, 1, ..."""
        if sequence not in self.items:
            raise ValueError(f"{self.file}: no sequence {sequence!r}; there is {_some(list(self.items))}")
        return list(range(self.counts[sequence]))

    def load(self, sequence: str, size: int, numbers: list[int]) -> Scene:
        """The frames with these numbers, resized where the file has another size."""
        item = self.items[sequence]
        try:
            R, T, focal, principal, images, masks, valid = (
                torch.as_tensor(item[k])[numbers] for k in ("R", "T", "f", "c", "images", "masks", "valid_region"))
            images = _resized(images, 3, size, "bilinear", align_corners=False)
            masks, valid = (_resized(x, 1, size, "nearest") for x in (masks, valid))
            cameras = Cameras(*(x.float().reshape(-1, *s) for x, s in ((R, (3, 3)), (T, (3,)), (focal, (2,)), (principal, (2,)))))
        except (KeyError, TypeError, IndexError, RuntimeError, ValueError) as e:
            raise ValueError(f"{self.file}: {sequence} is not a sequence of the toy dataset ({type(e).__name__}: {e})") from None
        return Scene(images, masks, valid, cameras, [str(i) for i in numbers], sequence)


def _resized(x: Tensor, channels: int, size: int, mode: str, **options) -> Tensor:
    """(V, C, H, W), or (V, H, W) for one channel, floats in [0, 1] or bytes -> (V, C, S, S) floats in [0, 1]."""
    x = x.float() / (255 if x.dtype == torch.uint8 and x.max() > 1 else 1)
    x = x.reshape(len(x), channels, *x.shape[-2:])
    return x if x.shape[-2:] == (size, size) else F.interpolate(x, (size, size), mode=mode, **options)


# ---- helpers ---------------------------------------------------------------------------------------------------------------------

def _source(root, category: str) -> _Tree | _Toy:
    """The dataset of a category under `root`, in either layout."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; the root of a dataset is the one with a folder for each category")
    if (root / category / "frame_annotations.jgz").is_file():
        return _Tree(root, category)
    if _toy_file(root, category).is_file():
        return _Toy(root, category)
    found = sorted(p.name for p in root.iterdir() if (p / "frame_annotations.jgz").is_file() or _toy_file(root, p.name).is_file())
    raise FileNotFoundError(f"{root / category}: no frame_annotations.jgz or {category}_toy.pt there; categories of {root}: {_some(found)}")


def _toy_file(root: Path, category: str) -> Path:
    return root / category / f"{category}_toy.pt"


def _some(names: list) -> str:
    """The first few of a list of names, for a message."""
    more = f", ... ({len(names)} in all)" if len(names) > LISTED else ""
    return ", ".join(map(str, names[:LISTED])) + more if names else "none"


def _pool(workers: int):
    """Processes that decode, one thread each. Spawned, since a fork of a process with CUDA or threads can hang."""
    return multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) if workers > 1 else nullcontext()


def _load_bytes(category: str, size: int, job: tuple) -> list[np.ndarray]:
    """A job of `load_packed`: (root, name, frame numbers) -> rgba (V, 4, S, S) and valid (V, 1, S, S) as uint8, R, T, focal, principal.

    NumPy arrays travel between processes as bytes; tensors would each hold a file descriptor open.
    """
    root, name, numbers = job
    scene = load_sequence(root, category, name, size, numbers)
    rgba = torch.cat([scene.images, scene.masks], 1).mul(255).round().byte()
    cameras = scene.cameras
    return [x.numpy() for x in (rgba, scene.valid.byte(), cameras.R, cameras.T, cameras.focal, cameras.principal)]
