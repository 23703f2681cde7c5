"""The CO3D reader: a tree written here, its cached annotations, a real sequence, the toy file, all of them broken."""
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cameras import Cameras, look_at
from common import files
from datasets import annotations, co3d
from datasets.co3d import frame_numbers, load_sequence, sequences
from tests.support import parity
from training.packed import load_packed

REAL = Path(__file__).resolve().parents[3] / "shared" / "co3d_real"
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An annotation cache of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    annotations._open_archive.cache_clear()
    return folder / "sparsefusion"


# ---------------------------------------------------------------------------------------------- a tree

def write_tree(root: Path, content: dict[str, list[dict]], category: str = "thing", splits: dict | None = None):
    """A CO3Dv2 tree of {sequence: frames}, a frame being image, mask, viewpoint, time; frame numbers are 3, 6, ..."""
    records = []
    for sequence, frames in content.items():
        for number, frame in enumerate(frames, 1):
            paths = [f"{category}/{sequence}/{kind}/frame{3 * number:06d}.png" for kind in ("images", "masks")]
            for path, pixels in zip(paths, (frame["image"], frame["mask"])):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / path)
            records.append(dict(
                sequence_name=sequence, frame_number=3 * number, frame_timestamp=frame["time"], depth=None, meta=None,
                image=dict(path=paths[0], size=list(frame["mask"].shape)), viewpoint=frame["viewpoint"],
                mask=dict(path=paths[1], mass=frame.get("mass", float(frame["mask"].sum() / 255)))))
    (root / category / "frame_annotations.jgz").write_bytes(gzip.compress(json.dumps(records).encode()))
    for name, members in (splits or {}).items():
        (root / category / "set_lists").mkdir(exist_ok=True)
        (root / category / "set_lists" / f"set_lists_{name}.json").write_text(json.dumps(members))


DOT = torch.tensor([[0.3, -0.2, 0.4]])  # world point that the photographs show as a white dot


def photograph(azimuth: float, height: int, width: int, isotropic: bool, time: float = 0.0) -> dict:
    """A black box with a white dot at `DOT`; the camera has two focal lengths and an off-center principal point."""
    direction = torch.tensor([np.sin(azimuth), 0.3, np.cos(azimuth)], dtype=torch.float32)
    R, T = look_at(6 * direction, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    focal, principal = torch.tensor([2.4, 2.2]), torch.tensor([0.15, -0.1])
    xy = Cameras(R, T, focal, principal).project(DOT)[0][0]
    half = torch.tensor([width, height]) / 2
    column, row = (half - xy * (half.min() if isotropic else half)).tolist()  # pixel edges: centers are at + 0.5
    y, x = np.mgrid[:height, :width] + 0.5
    dot = np.clip(6 - np.hypot(x - column, y - row), 0, 1)
    mask = (np.abs(x - column - 4) < width * 0.3) & (np.abs(y - row + 3) < height * 0.25)
    image = (255 * np.stack([dot] * 3, -1)).astype(np.uint8)
    viewpoint = dict(
        R=R.tolist(), T=T.tolist(), focal_length=focal.tolist(), principal_point=principal.tolist(),
        intrinsics_format="ndc_isotropic" if isotropic else "ndc_norm_image_bounds")
    return dict(image=image, mask=(mask * 255).astype(np.uint8), time=time, viewpoint=viewpoint)


@pytest.fixture
def tree(tmp_path):
    """Two sequences with 4 and 3 frames: portrait, landscape, square; both formats; one stored out of order."""
    shapes = [(150, 110, True), (110, 150, True), (150, 110, False), (128, 128, False)]
    first = [photograph(0.5 * i, *shape, time=float(-i)) for i, shape in enumerate(shapes)]
    second = [photograph(0.7 * i, *shape, time=0.1 * i) for i, shape in enumerate(shapes[:3])]
    members = {"train": [["a", 3, "thing/a/images/frame000003.png"], ["a", 9, "thing/a/images/frame000009.png"]],
               "test": [["b", i, f"thing/b/images/frame{i:06d}.png"] for i in (3, 6, 9)]}
    write_tree(tmp_path, {"b": second, "a": first}, splits={"fewview_dev": members})
    return tmp_path


def test_a_tree_made_of_the_recorded_frames(tmp_path):
    """The whole way through files and annotations gives the recorded cameras, masks and masked images (`co3d.npz`)."""
    recorded = parity.load("co3d")
    size = int(recorded["in_out_size"])
    keys = dict(R="R", T="T", focal_length="focal", principal_point="pp", intrinsics_format="format")
    frames = []
    for i in range(len(recorded["in_R"])):
        image, mask = recorded[f"in_image{i}"].numpy(), recorded[f"in_mask{i}"].numpy()
        viewpoint = {key: recorded[f"in_{name}"][i].tolist() for key, name in keys.items()}
        frames.append(dict(image=image, mask=mask, time=recorded["in_timestamp"][i].item(), viewpoint=viewpoint))
    write_tree(tmp_path, {"recorded": frames})
    scene = load_sequence(tmp_path, "thing", "recorded", size)
    cameras = scene.cameras
    for value, name in zip((cameras.R, cameras.T, cameras.focal, cameras.principal), ("R", "T", "focal", "pp")):
        parity.assert_close(value, recorded[f"out_{name}"], **CLOSE)
    assert torch.equal((scene.masks * 255).round(), recorded["out_masks_u8"].float())
    parity.assert_close(scene.images[..., 3::8, 3::8], recorded["out_images_strided"], **CLOSE)


@pytest.mark.parametrize("size", [64, 129])
def test_crops_and_cameras_agree(tree, size):
    """The cropped camera projects the world point onto the white dot of the cropped photograph."""
    scene = load_sequence(tree, "thing", "a", size)
    assert scene.images.shape == (4, 3, size, size) and scene.masks.shape == scene.valid.shape == (4, 1, size, size)
    xy = scene.cameras.project(DOT.expand(4, 1, 3))[0][:, 0]
    pixel = (1 - xy) * size / 2 - 0.5  # column, row
    index = torch.arange(size, dtype=torch.float32)
    for image, expected in zip(scene.images.mean(1), pixel):
        centroid = torch.stack([(image.sum(0) * index).sum(), (image.sum(1) * index).sum()]) / image.sum()
        parity.assert_close(centroid, expected, atol=0.5)


def test_order_names_splits_and_selection(tree):
    assert sequences(tree, "thing") == ["a", "b"]
    assert sequences(tree, "thing", "fewview_dev/test") == ["b"]
    assert sequences(str(tree), "thing", "fewview_dev/train") == ["a"]
    assert frame_numbers(tree, "thing", "a") == [12, 9, 6, 3]  # by time
    assert frame_numbers(tree, "thing", "a", "fewview_dev/train") == [9, 3]
    scene, part = load_sequence(tree, "thing", "a", 48), load_sequence(tree, "thing", "a", 48, frames=[3, 12])
    assert scene.names == ["12", "9", "6", "3"] and part.names == ["3", "12"] and scene.sequence == "a"
    for sub in (scene[[3, 0]], scene[torch.tensor([3, 0])]):
        assert sub.names == part.names and torch.equal(sub.images, part.images)
        assert torch.equal(sub.cameras.T, part.cameras.T)
    assert len(scene[1:]) == 3 and scene.to("cpu").names == scene.names
    assert (scene.images * (scene.masks == 0)).max() == 0 and (scene.masks * (1 - scene.valid)).max() == 0


def test_frames_that_cannot_be_used_are_left_out(tree):
    file = tree / "thing" / "frame_annotations.jgz"
    records = json.loads(gzip.decompress(file.read_bytes()))
    of_a = [r for r in records if r["sequence_name"] == "a"]
    of_a[0]["mask"], of_a[1]["viewpoint"], of_a[2]["mask"]["mass"] = None, None, 1.0
    file.write_bytes(gzip.compress(json.dumps(records).encode()))
    assert frame_numbers(tree, "thing", "a") == [12] and load_sequence(tree, "thing", "a", 32).names == ["12"]


def test_records_of_several_sequences_may_be_mixed(tree):
    file = tree / "thing" / "frame_annotations.jgz"
    records = json.loads(gzip.decompress(file.read_bytes()))
    file.write_bytes(gzip.compress(json.dumps(records[::2] + records[1::2]).encode()))
    assert sequences(tree, "thing") == ["a", "b"]
    assert frame_numbers(tree, "thing", "a") == [12, 9, 6, 3] and frame_numbers(tree, "thing", "b") == [3, 6, 9]


@pytest.mark.parametrize("write", [
    lambda x: x // 255, lambda x: x * np.uint16(257), lambda x: np.dstack([x, 0 * x, x])])
def test_masks_of_other_programs(tree, write):
    """Zeros and ones, sixteen bits, a color."""
    expected = load_sequence(tree, "thing", "a", 32)
    for file in (tree / "thing/a/masks").iterdir():
        Image.fromarray(write(np.array(Image.open(file)))).save(file)
    scene = load_sequence(tree, "thing", "a", 32)
    assert scene.masks.equal(expected.masks) and scene.images.equal(expected.images)


def test_paths_in_another_spelling_of_unicode(tree):
    """The folder's name has the accent as a character of its own; so come files from a Mac."""
    file = tree / "thing" / "frame_annotations.jgz"
    text = gzip.decompress(file.read_bytes()).decode().replace("thing/a/", "thing/\\u00e9/")
    file.write_bytes(gzip.compress(text.encode()))
    (tree / "thing/a").rename(tree / "thing/e\u0301")
    assert len(load_sequence(tree, "thing", "a", 32)) == 4


def test_a_frame_listed_twice_counts_once(tree):
    twice(tree)
    assert frame_numbers(tree, "thing", "a") == [12, 9, 6, 3]


def test_formats_in_upper_case(tree):
    expected = load_sequence(tree, "thing", "a", 32)
    file = tree / "thing" / "frame_annotations.jgz"
    text = gzip.decompress(file.read_bytes()).decode()
    file.write_bytes(gzip.compress(text.replace("ndc_isotropic", "NDC_ISOTROPIC").encode()))
    assert load_sequence(tree, "thing", "a", 32).cameras.focal.equal(expected.cameras.focal)


def test_only_the_frames_asked_for_are_decoded(tree):
    for number in (3, 9, 12):
        (tree / f"thing/a/images/frame{number:06d}.png").unlink()
    shutil.rmtree(tree / "thing/b")
    assert len(load_sequence(tree, "thing", "a", 32, frames=[6])) == 1


def test_annotations_are_parsed_once_until_they_change(tree, cache, monkeypatch):
    parsed = []
    records = annotations._records
    monkeypatch.setattr(annotations, "_records", lambda file: parsed.append(file) or records(file))

    def fresh(expected):  # as another process would see it
        annotations._open_archive.cache_clear()
        assert sequences(tree, "thing") == expected

    fresh(["a", "b"])
    fresh(["a", "b"])
    assert len(parsed) == 1 and len(list(cache.iterdir())) == 1
    write_tree(tree, {"c": [photograph(0, 60, 60, True)]})
    fresh(["c"])
    fresh(["c"])
    assert len(parsed) == 2 and len(list(cache.iterdir())) == 1
    next(cache.iterdir()).write_bytes(b"not a database" * 100)
    fresh(["c"])
    assert len(parsed) == 3
    set_list = tree / "thing" / "set_lists" / "set_lists_fewview_dev.json"
    set_list.write_text(json.dumps({"val": [["c", 3, "thing/c/images/frame000003.png"]]}))  # another source changes
    fresh(["c"])
    assert len(parsed) == 4 and sequences(tree, "thing", "fewview_dev/val") == ["c"]
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")  # a cache that cannot be written
    fresh(["c"])


def test_packed(tree, forked, monkeypatch, capsys):
    packed = load_packed([tree], ["thing"], 3, 40, workers=2)
    assert [name for _, _, name in packed.sequences] == ["a", "b"] and packed.counts.tolist() == [3, 3]
    assert all(x.shape == (3, 5, 40, 40) and x.dtype == torch.uint8 for x in packed.pixels)
    for n, (name, frames) in enumerate([("a", [12, 9, 3]), ("b", [3, 6, 9])]):
        expected = load_sequence(tree, "thing", name, 40, frames)
        parity.assert_close(packed.pixels[n][:, :3] / 255, expected.images, atol=0.51 / 255)
        assert torch.equal(packed.pixels[n][:, 3:4] / 255, expected.masks)
        assert torch.equal(packed.pixels[n][:, 4:].float(), expected.valid)
        assert torch.equal(packed.cameras[n].focal, expected.cameras.focal)
        assert packed.cameras[n].R.shape == (3, 3, 3)
    more = load_packed([tree], ["thing"], 4, 40, workers=1)
    assert more.counts.tolist() == [4, 3]  # what they have
    assert [name for _, _, name in load_packed([tree], ["thing"], 4, 40, least=4, workers=1).sequences] == ["a"]
    assert "with fewer than 4 frames: 1" in capsys.readouterr().out
    assert len(load_packed([tree, tree], ["thing"], 3, 40, workers=1)) == 4
    with pytest.raises(ValueError, match="no sequence of thing has 5 frames"):
        load_packed([tree], ["thing"], 5, 40, least=5, workers=1)
    with pytest.raises(FileNotFoundError, match="other"):
        load_packed([tree], ["thing", "other"], 3, 40, workers=1)

    # What is packed is not decoded again, until it changes.
    loaded = []
    monkeypatch.setattr(co3d, "load_sequence", lambda *job: loaded.append(job[2]) or load_sequence(*job))
    assert load_packed([tree], ["thing"], 3, 40, workers=1).fingerprint == packed.fingerprint and not loaded
    capsys.readouterr()
    (tree / "thing/b/images/frame000006.png").write_bytes(b"\x89PNG broken")
    broken = load_packed([tree], ["thing"], 3, 40, workers=1)
    assert loaded == ["b"] * 3 and broken.counts.tolist() == [3, 2] and broken.fingerprint != packed.fingerprint
    assert torch.equal(broken.pixels[1], packed.pixels[1][[0, 2]])
    for _ in range(2):  # and every time it is told
        out = capsys.readouterr().out
        assert "frames skipped: 1 (" in out and "frame000006.png: not a readable picture" in out
        load_packed([tree], ["thing"], 3, 40, workers=1)
    assert loaded == ["b"] * 3

    # Broken packs are made again.
    for file in files.cache_folder().rglob("3x40/*.pt"):
        file.write_bytes(b"junk")
    assert load_packed([tree], ["thing"], 3, 40, workers=1).fingerprint == broken.fingerprint


# ---------------------------------------------------------------------------------------------- what can be wrong

def break_records(tree: Path, edit):
    file = tree / "thing" / "frame_annotations.jgz"
    records = json.loads(gzip.decompress(file.read_bytes()))
    edit(records[-1])  # frame 12 of sequence a
    file.write_bytes(gzip.compress(json.dumps(records).encode()))


def break_camera(tree: Path, edit):
    break_records(tree, lambda record: edit(record["viewpoint"]))


def twice(tree: Path, edit=lambda record: None):
    """The last record once more, edited."""
    file = tree / "thing" / "frame_annotations.jgz"
    records = json.loads(gzip.decompress(file.read_bytes()))
    again = json.loads(json.dumps(records[-1]))
    edit(again)
    file.write_bytes(gzip.compress(json.dumps([*records, again]).encode()))


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-30])


def tag_image(file: Path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(file).save(file, exif=exif)


ANNOTATIONS = "thing/frame_annotations.jgz"
IMAGE, MASK = "thing/a/images/frame000012.png", "thing/a/masks/frame000012.png"
BROKEN = {
    "missing image": (lambda t: (t / IMAGE).unlink(), FileNotFoundError, "frame000012.png: no such file"),
    "missing mask": (lambda t: (t / MASK).unlink(), FileNotFoundError, "masks/frame000012.png: no such file"),
    "truncated image": (lambda t: truncate(t / IMAGE), ValueError, "images/frame000012.png: not a readable picture"),
    "text as image": (
        lambda t: (t / IMAGE).write_text("hello"), ValueError, "images/frame000012.png: not a readable picture"),
    "empty mask": (
        lambda t: Image.new("L", (128, 128)).save(t / MASK), ValueError, "masks/frame000012.png: the mask is empty"),
    "mask of another size": (
        lambda t: Image.new("L", (64, 128), 255).save(t / MASK), ValueError, "64 x 128 pixels, the image 128 x"),
    "truncated annotations": (lambda t: truncate(t / ANNOTATIONS), ValueError, "frame_annotations.jgz: not a complete"),
    "annotations not gzipped": (
        lambda t: (t / ANNOTATIONS).write_text("[]"), ValueError, "annotations.jgz: not a complete"),
    "annotations cut in JSON": (
        lambda t: (t / ANNOTATIONS).write_bytes(gzip.compress(b'[{"a": 1}, ')), ValueError, "annotations.jgz"),
    "record without image": (lambda t: break_records(t, lambda r: r.pop("image")), ValueError, "record 6 lacks"),
    "camera of 8 numbers": (
        lambda t: break_camera(t, lambda v: v["R"][0].pop()), ValueError, "not a camera, .*frame 12 of 'a'"),
    "camera of 13 numbers": (
        lambda t: break_camera(t, lambda v: v["T"].append(float("nan"))), ValueError, "frame 12 of 'a'"),
    "camera not finite": (
        lambda t: break_camera(t, lambda v: v.update(T=[0, 0, np.nan])), ValueError, "frame 12 of 'a'"),
    "mask of labels": (
        lambda t: Image.fromarray(np.repeat(np.uint8([0, 1, 2]), 50)[:, None].repeat(110, 1)).save(t / MASK),
        ValueError, "masks/frame000012.png: not black and one other color but 0, 1, 2"),
    "image with an EXIF tag": (lambda t: tag_image(t / IMAGE), ValueError, "frame000012.png: an EXIF tag turns it"),
    "R scaled": (lambda t: break_camera(t, lambda v: v.update(R=(2 * np.array(v["R"])).tolist())), ValueError,
                 "annotations.jgz: R: no rotation and shift: it scales .*frame 12 of 'a'"),
    "R mirrored": (lambda t: break_camera(t, lambda v: v.update(R=(-np.array(v["R"])).tolist())), ValueError,
                   "annotations.jgz: R: a reflection"),
    "R of ones": (lambda t: break_camera(t, lambda v: v.update(R=[[1, 1, 1]] * 3)), ValueError, "R: no rotation"),
    "negative focal length": (lambda t: break_camera(t, lambda v: v.update(focal_length=[-3, 3])), ValueError,
                              "annotations.jgz: focal_length, principal_point: .-192.0, 192.0, "),
    "focal length in pixels": (lambda t: break_camera(t, lambda v: v.update(focal_length=[300, 300])), ValueError,
                               "focal_length, .*another unit"),
    "focal length of 1e-30": (lambda t: break_camera(t, lambda v: v.update(focal_length=[1e-30, 2])), ValueError,
                              "focal_length"),
    "T of 0": (lambda t: break_camera(t, lambda v: v.update(T=[0, 0, 0])), ValueError, "T is 0, so a camera stands at"),
    "huge numbers": (lambda t: break_camera(t, lambda v: v.update(T=[0, 0, 10**400])), ValueError, "not a camera"),
    "format of another type": (
        lambda t: break_camera(t, lambda v: v.update(intrinsics_format=3)), ValueError, "annotations.jgz: .*format 3"),
    "a frame twice, differently": (lambda t: twice(t, lambda r: r["viewpoint"].update(T=[0, 0, 7])), ValueError,
                                   "annotations.jgz: record 7: frame 12 of 'a' was another"),
    "a frame twice, renumbered": (lambda t: twice(t, lambda r: r.update(frame_number=99)), ValueError,
                                  "annotations.jgz: record 7: frame 99 of 'a' was another"),
    "principal point in pixels": (lambda t: break_camera(t, lambda v: v.update(principal_point=[640, 480])), ValueError,
                                  "principal_point: .*another unit"),
    "unknown format": (
        lambda t: break_camera(t, lambda v: v.update(intrinsics_format="mm")), ValueError, "format 'mm'"),
    "broken set list": (
        lambda t: (t / "thing/set_lists/set_lists_x.json").write_text("{"), ValueError, "set_lists_x.json: not a JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_named_in_one_line(tree, name):
    damage, kind, message = BROKEN[name]
    damage(tree)
    with pytest.raises(kind, match=message) as error:
        load_sequence(tree, "thing", "a", 32)
    assert "\n" not in str(error.value)


def test_names_that_do_not_exist(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        sequences(tmp_path / "nowhere", "thing")
    with pytest.raises(FileNotFoundError, match="categories of .*: thing"):
        sequences(tree, "apple")
    with pytest.raises(ValueError, match="no sequence 'z'; there is a, b"):
        load_sequence(tree, "thing", "z")
    with pytest.raises(ValueError, match="no usable frame 7; it has 12, 9, 6, 3"):
        load_sequence(tree, "thing", "a", frames=[12, 7])
    with pytest.raises(ValueError, match="no split 'dev'; there is fewview_dev/test, fewview_dev/train"):
        sequences(tree, "thing", "dev")
    with pytest.raises(ValueError, match="no sequence 'a' in split 'fewview_dev/test'; there is b"):
        frame_numbers(tree, "thing", "a", "fewview_dev/test")


# ---------------------------------------------------------------------------------------------- the released toy data

def write_toy(root: Path, size: int = 32, views: int = 5, **changes) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(2):
        masks = torch.rand(views, 1, size, size, generator=generator)
        images = torch.rand(views, 3, size, size, generator=generator) * masks
        items.append(dict(
            images=images, masks=masks, valid_region=torch.ones_like(masks), R=torch.eye(3).expand(views, 3, 3).clone(),
            T=torch.rand(views, 3, generator=generator), f=torch.full((views, 2), 2.0), c=torch.zeros(views, 2),
            image_size=torch.full((views, 2), float(size)), idx="a name", frame_type=["x"] * views) | changes)
    (root / "hydrant").mkdir(parents=True, exist_ok=True)
    torch.save({"hydrant": items}, root / "hydrant" / "hydrant_toy.pt")
    return items


def test_toy_file(tmp_path):
    items = write_toy(tmp_path)
    assert sequences(tmp_path, "hydrant") == ["toy0", "toy1"]
    assert frame_numbers(tmp_path, "hydrant", "toy1") == [0, 1, 2, 3, 4]
    scene = load_sequence(tmp_path, "hydrant", "toy1", 32, frames=[4, 1])
    assert torch.equal(scene.images, items[1]["images"][[4, 1]]) and torch.equal(scene.masks, items[1]["masks"][[4, 1]])
    assert torch.equal(scene.cameras.T, items[1]["T"][[4, 1]]) and scene.names == ["4", "1"]
    assert scene.cameras.focal.shape == (2, 2)
    small = load_sequence(tmp_path, "hydrant", "toy0", 16)
    halved = torch.nn.functional.avg_pool2d(items[0]["images"], 2)  # what bilinear is at half the size
    parity.assert_close(small.images, halved, atol=1e-6)
    assert torch.equal(small.masks, items[0]["masks"][..., ::2, ::2])
    packed = load_packed([tmp_path], ["hydrant"], 3, 16, workers=1)
    assert packed.pixels[1].shape == (3, 5, 16, 16) and packed.sequences[1] == (tmp_path, "hydrant", "toy1")


def test_toy_file_of_bytes_and_without_a_channel_axis(tmp_path):
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).remainder(256).to(torch.uint8)
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    write_toy(tmp_path, 8, 2, images=images, masks=torch.full((2, 8, 8), 255, dtype=torch.uint8), valid_region=valid)
    scene = load_sequence(tmp_path, "hydrant", "toy0", 8)
    parity.assert_close(scene.images, images / 255, atol=1e-7)
    assert scene.masks.shape == scene.valid.shape == (2, 1, 8, 8) and scene.masks.min() == scene.valid.min() == 1


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_toy_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_toy(tmp_path)
    with pytest.raises(ValueError, match="no sequence 'toy2'; there is toy0, toy1"):
        load_sequence(tmp_path, "hydrant", "toy2")
    file = tmp_path / "hydrant" / "hydrant_toy.pt"
    torch.save({"hydrant": [{"R": torch.zeros(2, 3, 3)}]}, file)
    with pytest.raises(ValueError, match="hydrant_toy.pt: toy0 is not a sequence"):
        load_sequence(tmp_path, "hydrant", "toy0")
    for content in ({"hydrant": [Malice()]}, {"apple": []}, 3):
        torch.save(content, file)
        with pytest.raises(ValueError, match="hydrant_toy.pt: not a toy dataset") as error:
            sequences(tmp_path, "hydrant")
        assert "\n" not in str(error.value)
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match="hydrant_toy.pt: not a toy dataset"):
        sequences(tmp_path, "hydrant")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------- photographs

@pytest.mark.skipif(not REAL.is_dir(), reason="the real sequence is not in ../shared/co3d_real")
def test_real_sequence_is_one_object_in_all_views():
    """The rays through the masks' centroids meet, and the visual hull of all masks projects back onto each of them."""
    scene = load_sequence(REAL, "apple", "real_apple", 64)
    assert sequences(REAL, "apple") == ["real_apple"] and scene.names[:3] == ["7", "12", "17"] and len(scene) == 14
    assert len(frame_numbers(REAL, "apple", "real_apple", "fewview_dev/test")) == 14
    assert 0.2 < scene.images.mean() / scene.masks.mean() < 0.8
    column, row = (scene.masks.sum(axis)[:, 0] @ torch.arange(64.0) / scene.masks.sum((1, 2, 3)) for axis in (2, 3))
    centroid = 1 - (torch.stack([column, row], -1) + 0.5) / 32  # (14, 2) NDC
    rays_o, rays_d = (x[:, 0] for x in scene.cameras.rays(centroid.unsqueeze(1)))
    rays_d = torch.nn.functional.normalize(rays_d, dim=-1)
    P = torch.eye(3) - rays_d.unsqueeze(2) * rays_d.unsqueeze(1)
    center = torch.linalg.solve(P.sum(0), torch.einsum("bij,bj->i", P, rays_o))
    xy, depth = scene.cameras.project(center.expand(14, 1, 3))
    assert (xy[:, 0] - centroid).abs().max() < 4 / 32 and depth.min() > 10  # 4 of 64 pixels: the masks are rough

    extent = 0.75 * (depth[:, 0] / scene.cameras.focal[:, 0]).mean()  # a little more than the apple's radius
    axis = torch.linspace(-1, 1, 72) * extent
    points = center + torch.cartesian_prod(axis, axis, axis)
    xy = scene.cameras.project(points.expand(14, -1, 3))[0]
    at_points = torch.nn.functional.grid_sample(scene.masks, -xy.unsqueeze(1), align_corners=False)[:, 0, 0]  # (14, P)
    hull = xy[:, (at_points > 0.5).all(0)]
    assert hull.shape[1] > 1000
    for mask, points in zip(scene.masks[:, 0] > 0.5, ((1 - hull) * 32).long().clamp(0, 63)):
        covered = torch.zeros_like(mask)
        covered[points[:, 1], points[:, 0]] = True
        assert (covered & mask).sum() / (covered | mask).sum() > 0.8


@pytest.mark.parametrize("part", ["image", "mask"])
@pytest.mark.parametrize("path", ["../outside.png", "/etc/hosts", "thing/../../outside.png", "C:/outside.png"])
def test_pictures_lie_below_the_root(tree, part, path):
    annotations = tree / "thing" / "frame_annotations.jgz"
    with gzip.open(annotations, "rt") as file:
        records = json.load(file)
    for i, record in enumerate(records):
        record[part]["path"] = f"{path}{i}"
    with gzip.open(annotations, "wt") as file:
        json.dump(records, file)
    with pytest.raises(ValueError, match="frame_annotations.jgz: .* leads out of the folder"):
        load_sequence(tree, "thing", "a", 40)
