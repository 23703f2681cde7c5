"""A CO3Dv2 tree of small pictures: discs before a backdrop, cameras round them."""
import gzip
import json

import numpy as np
from PIL import Image

from tests.support.small import ring

SIDE = 24  # pixels


def write(root, counts, training=()):
    """The category `things` with `counts` frames of each sequence; those in `training` are in fewview_train only."""
    folder = root / "things"
    frames, tested, trained = [], [], []
    for sequence, count in counts.items():
        for part in ("images", "masks"):
            (folder / sequence / part).mkdir(parents=True)
        cameras = ring(count, distance=10.0)
        for i in range(count):
            record = _frame(root, sequence, i, cameras[i])
            frames.append(record)
            listed = trained if sequence in training else tested
            listed.append([sequence, i + 1, record["image"]["path"]])
    with gzip.open(folder / "frame_annotations.jgz", "wt") as file:
        json.dump(frames, file)
    lists = folder / "set_lists"
    lists.mkdir()
    (lists / "set_lists_fewview_dev.json").write_text(json.dumps({"train": [], "val": [], "test": tested}))
    (lists / "set_lists_fewview_train.json").write_text(json.dumps({"train": trained, "val": [], "test": []}))
    return root


def _frame(root, sequence, i, camera):
    """Write one picture and its mask; its annotation."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    mask = (x**2 + y**2 < (SIDE / 3) ** 2).astype(np.uint8)
    picture = np.full((SIDE, SIDE, 3), (40, 80, 120), np.uint8) + mask[..., None] * np.uint8(i)
    image, silhouette = f"things/{sequence}/images/{i + 1}.png", f"things/{sequence}/masks/{i + 1}.png"
    Image.fromarray(picture).save(root / image)
    Image.fromarray(mask * 255).save(root / silhouette)
    viewpoint = {"R": camera.R.tolist(), "T": camera.T.tolist(), "focal_length": [2.2, 2.2],
                 "principal_point": [0.0, 0.0]}
    return {"sequence_name": sequence, "frame_number": i + 1, "frame_timestamp": i / 10,
            "image": {"path": image, "size": [SIDE, SIDE]}, "mask": {"path": silhouette, "mass": int(mask.sum())},
            "viewpoint": viewpoint}
