"""Masks as many programs write them: read right, or named in one line."""
import json

import numpy as np
import pytest
from PIL import Image

from photographs.capture import load_pictures
from photographs.reading import read_capture
from tests.support.captures import balls, captured, write_transforms

SHOOT = balls(3, 60, 44, (75.0, 75.0))
SOFT = np.array(Image.fromarray(SHOOT.rgba[0][..., 3]).resize((120, 88), Image.Resampling.BICUBIC))
SOFT = np.array(Image.fromarray(SOFT).resize((60, 44), Image.Resampling.BOX))  # with soft edges


def palette(labels, *colors):
    """A picture of labels in the colors of a palette."""
    picture = Image.fromarray(labels.astype(np.uint8)).convert("P")
    picture.putdata(labels.flatten().tolist())
    picture.putpalette([x for color in colors for x in color])
    return picture


def with_alpha(gray, alpha):
    return np.dstack([gray] * 3 + [np.broadcast_to(np.uint8(alpha), gray.shape)])


def corner(value):
    """An alpha channel that is opaque but for one pixel."""
    alpha = np.full((44, 60), 255, np.uint8)
    alpha[0, 0] = value
    return alpha


ON = SHOOT.rgba[0][..., 3] > 127
WHITE = ON * np.uint8(255)
TWO = ON + 1 * (ON & (np.arange(60) > 30))  # labels of two objects
RIGHT = {
    "white": WHITE, "ones": ON * np.uint8(1), "label 2": ON * np.uint8(2), "gray": ON * np.uint8(127), "one bit": ON,
    "16 bits": ON * np.uint16(65535), "16 bits of 255": ON * np.uint16(255), "16 bits of 1": ON * np.uint16(1),
    "12 bits": ON * np.uint16(4095), "32 bits": ON * np.int32(70000), "floats": ON.astype(np.float32),
    "red": np.dstack([WHITE, 0 * WHITE, 0 * WHITE]),
    "palette": palette(ON, (0, 0, 0), (128, 0, 0)), "black palette last": palette(~ON, (9, 99, 200), (0, 0, 0)),
    "cut-out": with_alpha(0 * WHITE, WHITE), "opaque": with_alpha(WHITE, 255), "nearly opaque": with_alpha(WHITE, 254),
    "a clear pixel": with_alpha(WHITE, corner(0)), "clear": with_alpha(WHITE, 0), "alpha of 1": with_alpha(WHITE, ON),
}
SOFT_ONES = {"soft": SOFT, "half": SOFT // 2, "16 bits": SOFT * np.uint16(257), "10 bits": SOFT * np.uint16(4),
             "red": np.dstack([SOFT, 0 * SOFT, 0 * SOFT])}
WRONG = {
    "labels": (TWO.astype(np.uint8), "0, 1, 2"), "spread labels": ((127 * TWO).astype(np.uint8), "0, 127, 254"),
    "two colors": (palette(TWO, (0, 0, 0), (255, 0, 0), (0, 255, 0)), "0, 00ff00, ff0000"),
    "a border of 255": (np.where(np.roll(ON, 1, 1) & ~ON, 255, ON).astype(np.uint8), "0, 1, 255"),
    "from 1": ((ON + 1).astype(np.uint8), "1, 2"), "yellow on purple": (
        palette(ON, (68, 1, 84), (253, 231, 36)), "440154, fde724"),
    "everything": (np.full((44, 60), 255, np.uint8), "covers all"), "ones everywhere": (0 * WHITE + 1, "covers all"),
    "inverted": (255 - WHITE, "inverted"), "inverted ones": (np.uint8(1) - ON, "inverted"),
    "empty": (0 * WHITE, "empty"), "inverted and cut": (255 - np.roll(WHITE, 12, 0), "inverted"),
    "a photograph": (SHOOT.rgba[0][..., :3] // 2 + np.random.default_rng(0).integers(0, 99, (44, 60, 3), np.uint8),
                     "gray"),
}


def written(folder, mask):
    """The folder with this mask of the first photograph."""
    write_transforms(folder, SHOOT, "masks/{1}.png")
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    mask.save(folder / "masks/000.png", format="TIFF" if mask.mode in "IF" else "PNG")  # by content, not by name
    return folder


@pytest.mark.parametrize("name", RIGHT)
def test_masks_that_are_read(tmp_path, name):
    scene = load_pictures(read_capture(written(tmp_path, RIGHT[name])))
    assert np.array_equal(scene.masks[0, 0, 8:52].numpy(), ON)
    assert scene.images[0].max() > 0.5


@pytest.mark.parametrize("name", SOFT_ONES)
def test_soft_edges_stay(tmp_path, name):
    scene = load_pictures(read_capture(written(tmp_path, SOFT_ONES[name])))
    assert np.abs(scene.masks[0, 0, 8:52].numpy() - SOFT / SOFT.max()).max() < 0.006


@pytest.mark.parametrize("value", [255, 250, 127])
def test_lossy_masks(tmp_path, value):
    """JPEG's numbers are nearly those that were written, above and below."""
    folder = written(tmp_path, WHITE)
    Image.fromarray(ON * np.uint8(value)).save(folder / "masks/000.png", format="JPEG", quality=80)
    mask = load_pictures(read_capture(folder)).masks[0, 0, 8:52].numpy()
    assert ((mask > 0.5) == ON).all() and np.median(mask[ON]) > 0.98


@pytest.mark.parametrize("name", WRONG)
def test_masks_that_are_named(tmp_path, name):
    mask, words = WRONG[name]
    with pytest.raises(ValueError, match=f"masks/000.png: .*{words}"):
        captured(written(tmp_path, mask))


@pytest.mark.parametrize("alpha", [254, 255, 0, corner(0), corner(254)], ids=str)
def test_an_alpha_channel_without_a_background_is_no_mask(tmp_path, alpha):
    write_transforms(tmp_path, SHOOT)
    Image.fromarray(with_alpha(WHITE, alpha)).save(tmp_path / "images/001.png")
    with pytest.raises(ValueError, match="images/001.png: no mask"):
        captured(tmp_path)


# ---------------------------------------------------------------------------------------------- EXIF

TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
         8: Image.Transpose.ROTATE_270}


def turned(file, tag):
    """The same picture to a viewer, stored turned, with a tag."""
    exif = Image.Exif()
    exif[0x0112] = tag
    picture = Image.open(file)
    picture.transpose(TURNS[tag]).save(file, exif=exif)


def stored(folder, tag, masks="masks/{1}.png", **more):
    """Photographs that are stored turned, with a tag; masks and cameras are upright."""
    write_transforms(folder, SHOOT, masks, **more)
    for file in (folder / "images").iterdir():
        turned(file, tag)
    return folder


@pytest.mark.parametrize("tag", [6, 8])
@pytest.mark.parametrize("masks", ["upright", "turned alike", "alpha"])
def test_a_tag_is_applied_where_sizes_ask_for_it(tmp_path, tag, masks):
    expected = load_pictures(read_capture(write_transforms(tmp_path, SHOOT, "masks/{1}.png")))
    (tmp_path / "b").mkdir()
    stored(tmp_path / "b", tag, None if masks == "alpha" else "masks/{1}.png")
    if masks == "turned alike":
        for file in (tmp_path / "b/masks").iterdir():
            turned(file, tag)
    scene = load_pictures(read_capture(tmp_path / "b"))
    assert scene.images.equal(expected.images) and scene.masks.equal(expected.masks)
    assert scene.cameras.focal.equal(expected.cameras.focal)


def test_a_tag_is_ignored_where_masks_and_cameras_are_of_the_stored_pixels(tmp_path):
    write_transforms(tmp_path, SHOOT, "masks/{1}.png")
    expected = load_pictures(read_capture(tmp_path))
    for file in (tmp_path / "images").iterdir():
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(file).save(file, exif=exif)
    assert load_pictures(read_capture(tmp_path)).images.equal(expected.images)


@pytest.mark.parametrize("tag", [2, 3])
@pytest.mark.parametrize("masks", ["masks/{1}.png", None])
def test_a_tag_that_sizes_cannot_tell_is_named(tmp_path, tag, masks):
    with pytest.raises(ValueError, match=f"images/00.\\.png: an EXIF tag .orientation {tag}.*auto-orient"):
        read_capture(stored(tmp_path, tag, masks))


def test_tags_that_only_one_of_mask_and_camera_follows_are_named(tmp_path):
    """A mask of the turned picture and a camera of the stored one; no size of a camera, and the mask in the picture."""
    folder = stored(tmp_path, 6)
    content = json.loads((folder / "transforms.json").read_text())
    (folder / "transforms.json").write_text(json.dumps(content | {"w": 44, "h": 60}))
    with pytest.raises(ValueError, match="mask is 60 x 44 pixels, the photograph .* 44 x 60"):
        read_capture(folder)
    (tmp_path / "b").mkdir()
    folder = stored(tmp_path / "b", 6, None)
    del content["w"], content["h"]
    (folder / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="EXIF tag"):
        read_capture(folder)
