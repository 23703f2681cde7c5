"""What a CO3Dv2 category says about its frames: the images, masks, cameras and splits, parsed once.

    <category>/frame_annotations.jgz       gzipped JSON, one record a frame: image, mask, camera
    <category>/set_lists/set_lists_*.json  optional: {"test": [[sequence, frame number, image path], ...], ...}

These are hundreds of megabytes of JSON. What is needed of them goes into a zip file in the user's cache folder, with a
JSON list of frames for every sequence, so that reading one sequence reads no other. It is plain
data, and made anew when a source's date or size changes.
"""
from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from common import files

ANNOTATIONS_FILE = "frame_annotations.jgz"
FORMAT = 2  # layout of the cached file; another number renews it


class Frame(NamedTuple):
    """What is kept of a record. Paths are below the dataset's root."""
    sequence: str
    number: int
    time: float        # seconds
    image: str
    mask: str
    viewpoint: str     # the camera, JSON
    splits: list[str]  # such as "fewview_dev/test"


class Annotations:
    """The usable frames of a category: those with a mask of more than one pixel and a camera."""

    def __init__(self, folder: Path):
        # A cached file is known by names, dates and sizes of its sources: reading their content is what it saves.
        stamp = [FORMAT, *map(date_and_size, _sources(folder))]
        self.made_from = folder.resolve(), json.dumps(stamp).encode()
        self.archive = _open_archive(*self.made_from)

    def sequences(self, split: str | None = None) -> list[str]:
        """Names of all sequences, or of those with frames in the split, sorted."""
        names = sorted(self.archive.namelist())
        return [name for name in names if split is None or self.frames(name, split)]

    def splits(self) -> list[str]:
        """All splits that frames are in, sorted."""
        names = self.archive.namelist()
        return sorted({split for name in names for frame in self.frames(name) for split in frame.splits})

    def frames(self, sequence: str, split: str | None = None) -> list[Frame]:
        """The frames of a sequence in order of time, or those in the split; of an unknown sequence, none."""
        try:
            rows = json.loads(self.archive.read(sequence))
        except KeyError:
            return []
        except Exception:
            # Broken bytes in a cached file raise nearly anything. It is made anew.
            os.unlink(self.archive.filename)
            _open_archive.cache_clear()
            self.archive = _open_archive(*self.made_from)
            return self.frames(sequence, split)
        frames = [Frame._make(row) for row in rows]
        frames.sort(key=lambda frame: (frame.time, frame.number))
        return [frame for frame in frames if split is None or split in frame.splits]


# ---------------------------------------------------------------------------------------------- the cached file

def _sources(folder: Path) -> list[Path]:
    """The annotations of a category, then its set lists."""
    set_lists = (folder / "set_lists").glob("set_lists_*.json")
    return [folder / ANNOTATIONS_FILE, *sorted(set_lists)]


def date_and_size(path: Path) -> list:
    """Name, date and size of a file: equal ones say that nothing has changed."""
    status = path.stat()
    return [path.name, status.st_mtime_ns, status.st_size]


@lru_cache(maxsize=8)
def _open_archive(folder: Path, stamp: bytes) -> zipfile.ZipFile:
    """The frames of a category, a member a sequence: the cached file if it has this stamp, otherwise a new one."""
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    cached = files.cache_folder() / f"{folder.name}-{digest}.zip"

    # There may be none yet, or broken bytes, which raise nearly anything.
    try:
        archive = zipfile.ZipFile(cached)
        if archive.comment == _comment(stamp, archive):
            return archive
        archive.close()
    except Exception:
        pass

    # A cache that cannot be written only costs time.
    content = _pack(folder, stamp)
    try:
        files.save_bytes(content, cached)
    except OSError:
        pass
    return zipfile.ZipFile(io.BytesIO(content))


def _pack(folder: Path, stamp: bytes) -> bytes:
    """A zip file: for every sequence a JSON list of its frames under its name, and `_comment` as the file's."""
    annotations, *set_lists = _sources(folder)
    splits = _read_set_lists(set_lists)

    # Frames wait as text: as Python objects those of a whole category would take gigabytes. One listed twice is one.
    frames = defaultdict(dict)
    numbers = {}
    for i, record in enumerate(_records(annotations)):
        try:
            frame = _usable_frame(record, splits)
        except (AttributeError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{annotations}: record {i} lacks sequence_name, frame_number, image.path "
                             "or mask.path") from None
        if frame is not None:
            text = json.dumps(frame)
            again = numbers.setdefault((frame.sequence, frame.image), frame.number) != frame.number
            if again or frames[frame.sequence].setdefault(frame.number, text) != text:
                raise ValueError(f"{annotations}: record {i}: frame {frame.number} of {frame.sequence!r} was another")

    # A member a sequence: one is read without the others.
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for sequence, texts in frames.items():
            archive.writestr(sequence, f"[{','.join(texts.values())}]")
        archive.comment = _comment(stamp, archive)
    return content.getvalue()


def _comment(stamp: bytes, archive: zipfile.ZipFile) -> bytes:
    """The stamp, and a checksum of the sequences' names, for which a zip file has none."""
    return b"%s %08x" % (stamp, zlib.crc32("\n".join(archive.namelist()).encode()))


# ---------------------------------------------------------------------------------------------- the sources

def _records(file: Path) -> Iterator[dict]:
    """The records of a gzipped JSON list, one at a time."""
    decoder = json.JSONDecoder()
    separator = re.compile(r"[\s,]*")
    try:
        # From the bracket that opens the list to the one that closes it.
        text = gzip.decompress(file.read_bytes()).decode()
        position = separator.match(text, text.index("[") + 1).end()
        while text[position] != "]":
            record, position = decoder.raw_decode(text, position)
            yield record
            position = separator.match(text, position).end()
    except (OSError, EOFError, ValueError, IndexError, RecursionError, zlib.error):
        raise ValueError(f"{file}: not a complete gzipped JSON list; download it again") from None


def _usable_frame(record: dict, splits: dict[str, list[str]]) -> Frame | None:
    """The frame of a record, or None without a mask of more than one pixel [released: co3d_dataloader.py:763-782].

    A mask whose area is not annotated is usable here; a camera is needed too.
    """
    mask = record.get("mask")
    viewpoint = record.get("viewpoint")
    if not mask or not viewpoint:
        return None
    area = mask.get("mass")
    if area is not None and area <= 1:
        return None

    # What a frame is found by. The name has a place in a zip file.
    sequence = record["sequence_name"]
    number = record["frame_number"]
    time = record.get("frame_timestamp") or 0.0
    image = record["image"]["path"]
    if type(number) is not int or type(time) not in (int, float) or not abs(time) < math.inf:
        raise TypeError("not a number")
    if not isinstance(image, str) or not isinstance(mask["path"], str):
        raise TypeError("not a path")
    if not isinstance(sequence, str) or not sequence or not sequence.isprintable():
        raise TypeError("not a name")

    # The camera stays JSON, parsed for decoded frames only.
    return Frame(sequence, number, time, image, mask["path"], json.dumps(viewpoint), splits.get(image, []))


def _read_set_lists(set_lists: list[Path]) -> dict[str, list[str]]:
    """The splits that each image is listed in, by its path."""
    splits = defaultdict(list)
    for file in set_lists:
        # set_lists_fewview_dev.json has the splits "fewview_dev/train", "fewview_dev/val", "fewview_dev/test".
        subset = file.stem.removeprefix("set_lists_")
        try:
            text = file.read_text() if file.is_file() else ""  # a pipe would be waited for
            for stage, members in json.loads(text).items():
                for _, _, image in members:
                    splits[image].append(f"{subset}/{stage}")
        except (AttributeError, TypeError, ValueError, RecursionError):
            raise ValueError(f"{file}: not a JSON object of lists of [sequence, frame number, image path]") from None
    return splits
