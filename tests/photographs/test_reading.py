"""Folders of photographs: their axes, where models and masks lie, and everything that may be wrong with them.

Each mistake ends in one line that names the file and the key.
"""
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from photographs.capture import load_pictures
from photographs.colmap import find_models, read_model
from photographs.reading import read_capture
from photographs.shots import CONVENTIONS, Convention, world_to_view
from tests.support import captures
from tests.support.captures import balls, cameras_of, captured, turn, write_colmap, write_transforms

SHOOT = balls(3, 24, 18, (30.0, 30.0))


def refused(folder, *words, kind=ValueError):
    """Loading ends in one line that has all the words."""
    with pytest.raises(kind) as error:
        captured(folder, 24)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    assert all(str(word) in text for word in words), (text, words)


def broken(folder, key, value, frame=None, write=write_transforms, **more):
    """A transforms.json with another value of a key, of frame number `frame` or of all; None: without it."""
    file = write(folder, SHOOT, **more) / "transforms.json"
    content = json.loads(file.read_text())
    place = content if frame is None else content["frames"][frame]
    if value is None:
        del place[key]
    else:
        place[key] = value
    file.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------- axes

def test_the_table_of_axes():
    """Each row of docs/photographs.md: a camera two units from the world's origin, seen along its own axes."""
    table, formulas = {}, []
    for row in (Path(__file__).resolve().parents[2] / "docs" / "photographs.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in row.strip("|").split("|")]
        if len(cells) == 6 and cells[1] in ("left", "right"):
            table[cells[0]] = cells[1:5]
        elif len(cells) == 3 and "diag" in cells[1]:
            formulas.append(cells)
    conventions = {"PyTorch3D": Convention((1, 1, 1), False), "OpenCV": CONVENTIONS["colmap"],
                   "OpenGL, Blender": CONVENTIONS["opengl"], "COLMAP": CONVENTIONS["colmap"]}
    assert table.keys() == conventions.keys() and len(formulas) == 2
    signs = {"left": 1, "right": -1, "up": 1, "down": -1, "forward": 1, "backward": -1}
    R, T = turn(0.3, 0.5, -0.2), torch.tensor([0.1, -0.3, 2.0], dtype=torch.float64)
    for name, (x, y, z, direction) in table.items():
        # The pose, written as the row says, as a 4 x 4 matrix for column vectors.
        view = torch.eye(4, dtype=torch.float64)
        view[:3, :3], view[:3, 3] = R.T, T
        matrix = diagonal(signs[x], signs[y], signs[z], 1) @ view
        camera_to_world = direction == "camera-to-world"
        if camera_to_world:
            matrix = torch.linalg.inv(matrix)

        # What the reader of that row's files makes of it.
        convention = conventions[name]
        assert convention == Convention((signs[x], signs[y], signs[z]), camera_to_world)
        found_R, found_T = world_to_view(matrix, convention)
        torch.testing.assert_close(found_R, R)
        torch.testing.assert_close(found_T, T)

        # The second table: what to write instead of calling the reader.
        for names, R_formula, T_formula in formulas:
            if name in names:
                values = {"R": matrix[:3, :3], "t": matrix[:3, 3], "diag": diagonal}
                torch.testing.assert_close(eval(R_formula, values), R)
                torch.testing.assert_close(eval(T_formula, values), T)


def diagonal(*numbers):
    """numpy.diag of several numbers."""
    return torch.diag(torch.tensor(numbers, dtype=torch.float64))


def test_another_reading_of_the_raw_matrices(tmp_path):
    """What a check can try: the file's own convention gives the cameras, another one others."""
    shoot = balls(focal=(60.0, 66.0), principal=(22.0, 19.5))
    photographs = read_capture(write_transforms(tmp_path, shoot))
    assert photographs.convention == CONVENTIONS["opengl"]
    matrices = torch.stack([shot.matrix for shot in photographs.shots])
    torch.testing.assert_close(matrices, shoot.matrices("opengl"))
    cameras, wanted = cameras_of(photographs), shoot.square_cameras()
    for part in ("R", "T", "focal", "principal"):
        torch.testing.assert_close(getattr(cameras, part), getattr(wanted, part))
        torch.testing.assert_close(getattr(load_pictures(photographs).cameras, part), getattr(wanted, part))
    assert (cameras_of(photographs, CONVENTIONS["colmap"]).R - shoot.R).abs().max() > 0.5


# ---------------------------------------------------------------------------------------------- any folder

def test_folders_without_a_capture(tmp_path):
    refused(tmp_path / "none", "none: no such folder", kind=FileNotFoundError)
    refused(tmp_path, "no transforms.json", "COLMAP", kind=FileNotFoundError)


@pytest.mark.parametrize("given", ["transforms.json", "images", "images/000.png", "no_such", "images/no_such.png"])
def test_what_lies_in_a_capture_is_told_its_folder(tmp_path, given):
    """With the two commands that work, whichever way its poses come."""
    folder = write_transforms(tmp_path / "one", SHOOT)
    refused(folder / given, f"{folder / given}: not the folder with the poses, which is {folder}: ",
            f"python check.py {folder}", f"python distill.py --capture {folder}", kind=FileNotFoundError)
    if given.startswith("images"):
        folder = write_colmap(tmp_path / "two", SHOOT)
        refused(folder / given, f"python distill.py --capture {folder}", kind=FileNotFoundError)


def test_a_folder_below_the_home(tmp_path, monkeypatch):
    """A shell leaves ~ as it is in quotes and behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_transforms(tmp_path / "cup", SHOOT)
    refused("~/cup", f"distill.py --capture {folder}", kind=FileNotFoundError)
    refused("~/saucer", "~/saucer: no such folder of photographs", kind=FileNotFoundError)
    refused("~nobody_of_that_name/cup", "no such folder", kind=FileNotFoundError)


def test_a_photograph_alone(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    refused(tmp_path / "photo.jpg", "photo.jpg: a file, no folder of photographs", "docs/photographs.md",
            kind=FileNotFoundError)


def test_one_photograph_is_no_scene(tmp_path):
    refused(write_transforms(tmp_path, SHOOT.at([0])), "1 photograph", "two or more")


def test_cameras_at_one_place_or_looking_apart(tmp_path):
    """A camera on a tripod that turns, and the poses of another convention."""
    (tmp_path / "a").mkdir()
    write_transforms(tmp_path / "a", SHOOT)
    content = json.loads((tmp_path / "a/transforms.json").read_text())
    for frame in content["frames"]:
        for row in range(3):
            frame["transform_matrix"][row][3] = 1.5
    (tmp_path / "a/transforms.json").write_text(json.dumps(content))
    refused(tmp_path / "a", tmp_path / "a", "all cameras are at one place")

    (tmp_path / "b").mkdir()
    paths = captures.write_pictures(tmp_path / "b", SHOOT)
    frames = []
    for path, matrix in zip(paths, SHOOT.matrices("opencv").inverse()):
        frames.append({"file_path": path, "transform_matrix": matrix.tolist()})
    (tmp_path / "b/transforms.json").write_text(json.dumps({"fl_x": 30.0, "frames": frames}))
    refused(tmp_path / "b", tmp_path / "b", "do not look at one place", "convention")


def test_masks_that_have_nothing_in_common(tmp_path):
    shoot = balls(4, 48, 36)
    write_transforms(tmp_path, shoot, "masks/{1}.png")
    for i in range(4):
        mask = np.zeros((36, 48), np.uint8)
        mask[2:5, 12 * i + 1:12 * i + 4] = 255
        Image.fromarray(np.roll(mask, 9 * i, 0)).save(tmp_path / f"masks/{i:03d}.png")
    refused(tmp_path, tmp_path, "no part of space lies in every mask")


# ---------------------------------------------------------------------------------------------- masks and pictures

def test_no_masks(tmp_path):
    """One line says which photograph, how many, and how to get them."""
    write_transforms(tmp_path, SHOOT, "masks/{1}.png")
    (tmp_path / "masks/001.png").unlink()
    refused(tmp_path, "images/001.png: no mask (1 of 3", "001.png in", "masks", "alpha channel", "rembg")


def test_opaque_alpha_is_no_mask(tmp_path):
    write_transforms(tmp_path, SHOOT)
    rgba = SHOOT.rgba[1].copy()
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "images/001.png")
    refused(tmp_path, "images/001.png: no mask", "opaque everywhere")


def test_empty_masks_and_masks_of_another_size(tmp_path):
    write_transforms(tmp_path, SHOOT, "masks/{1}.png")
    Image.fromarray(np.zeros((18, 24), np.uint8)).save(tmp_path / "masks/002.png")
    refused(tmp_path, "masks/002.png: the mask is empty")
    Image.fromarray(np.zeros((24, 18), np.uint8)).save(tmp_path / "masks/002.png")
    refused(tmp_path, "masks/002.png: the mask is 18 x 24", "002.png 24 x 18")


def test_pictures_that_are_none(tmp_path):
    """Broken ones, and formats that would start another program: a PostScript file named .png."""
    write_transforms(tmp_path, SHOOT)
    good = (tmp_path / "images/000.png").read_bytes()
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 18\nshowpage\n", b"junk", b""):
        (tmp_path / "images/000.png").write_bytes(content)
        refused(tmp_path, "images/000.png: not a readable picture", "JPEG, PNG, WEBP, TIFF, BMP")
    (tmp_path / "images/000.png").write_bytes(good[:len(good) // 2])
    refused(tmp_path, "images/000.png: not a readable picture")


# ---------------------------------------------------------------------------------------------- transforms.json

@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"frames": 3}', '{"frames": []}', '{"frames": [3]}', "\x00\xff"])
def test_files_that_are_no_transforms(tmp_path, text):
    (tmp_path / "transforms.json").write_bytes(text.encode("latin1"))
    refused(tmp_path, tmp_path / "transforms.json")


def test_names_that_lead_nowhere_or_out(tmp_path):
    for name in ("../x.png", "/etc/passwd", "images/../../x.png", "C:/x.png", "..\\x.png", "", 3):
        broken(tmp_path, "file_path", name, frame=2)
        refused(tmp_path, "transforms.json: frame 2: file_path", repr(name))
    broken(tmp_path, "mask_path", "../x.png", frame=1)
    refused(tmp_path, "frame 1: mask_path", "leads out of")
    broken(tmp_path, "mask_path", "x.png", frame=1)
    refused(tmp_path, "x.png: no such file", kind=FileNotFoundError)
    broken(tmp_path, "file_path", "images/000.png", frame=1)
    refused(tmp_path, "2 photographs have the same name, images_000.png")


@pytest.mark.parametrize("write", [write_transforms, write_colmap])
def test_frames_whose_pictures_are_absent_are_skipped(tmp_path, write):
    """Of four, one may be gone, or two; one line says how many. A single one is no scene."""
    write(tmp_path, balls(4, 24, 18, (30.0, 30.0)))
    names = [shot.name for shot in read_capture(tmp_path).shots]
    assert "absent" not in read_capture(tmp_path).source
    for gone in (1, 2):
        (tmp_path / "images" / names[gone]).unlink()
        found = read_capture(tmp_path)
        assert [shot.name for shot in found.shots] == [names[0], *names[gone + 1:]]
        assert f"{4 - gone} photographs ({gone} more are listed and absent, {names[1]} first)" in found.source
    (tmp_path / "images" / names[0]).unlink()
    refused(tmp_path, "no such file", names[0], kind=FileNotFoundError)


@pytest.mark.parametrize("key", ["file_path", "transform_matrix"])
def test_missing_keys(tmp_path, key):
    broken(tmp_path, key, None, frame=1)
    refused(tmp_path, f"transforms.json: frame 1: no {key}")


def test_lenses_that_make_no_sense(tmp_path):
    for key, value in (("fl_x", "30"), ("fl_x", float("nan")), ("cx", None), ("k1", [1]), ("w", 0), ("h", True)):
        if value is not None:
            broken(tmp_path, key, value)
            refused(tmp_path, "transforms.json: frame 0: ", key)
    broken(tmp_path, "fl_x", None)
    refused(tmp_path, "frame 0: neither fl_x nor camera_angle_x")
    for angle in (0, -1, 40.0):
        broken(tmp_path, "camera_angle_x", angle)
        content = json.loads((tmp_path / "transforms.json").read_text())
        del content["fl_x"]
        (tmp_path / "transforms.json").write_text(json.dumps(content))
        refused(tmp_path, "frame 0: camera_angle_x", "radians")
    broken(tmp_path, "fl_x", -30.0)
    refused(tmp_path, "frame 0", "not above 0")
    for key, value in (("camera_model", "OPENCV_FISHEYE"), ("is_fisheye", True),
                       ("ftheta_p0", 0.1), ("camera_model", ["PINHOLE"]), ("k3", 0.1), ("k4", -0.2)):
        broken(tmp_path, key, value, frame=2)
        refused(tmp_path, "frame 2", "undistort the photographs first")
    broken(tmp_path, "camera_model", "pinhole")
    assert len(read_capture(tmp_path).shots) == 3
    broken(tmp_path, "w", 18, frame=2)
    refused(tmp_path, "frame 2", "18 x 18 pixels", "002.png has 24 x 18", "EXIF")


def test_matrices_that_are_no_poses(tmp_path):
    good = SHOOT.matrices("opengl")[1]
    cases = {"not 4 rows": [3, [], [[1, 2], [3]], "I", good[:2].tolist(), [["a"] * 4] * 4, None]}
    nan, big, mirrored, sheared = good.clone(), good.clone(), good.clone(), good.clone()
    nan[0, 3] = float("nan")
    big[:3, :3] *= 1.5
    mirrored[:, 1] *= -1
    sheared[3, 0] = 0.1
    cases |= {"not finite": [nan.tolist()], "scales or shears": [big.tolist()],
              "its last row is": [sheared.tolist(), good.T.tolist()],
              "a reflection": [mirrored.tolist(), good[[0, 2, 1, 3]].tolist()]}
    for words, matrices in cases.items():
        for matrix in matrices:
            file = write_transforms(tmp_path, SHOOT) / "transforms.json"
            content = json.loads(file.read_text())
            content["frames"][1]["transform_matrix"] = matrix
            file.write_text(json.dumps(content))
            refused(tmp_path, "transforms.json: frame 1: transform_matrix", words)

    # Three rows are a pose, and rounded numbers a rotation.
    content["frames"][1]["transform_matrix"] = [[round(x, 4) for x in row] for row in good[:3].tolist()]
    file.write_text(json.dumps(content))
    R = cameras_of(read_capture(tmp_path)).R[1]
    torch.testing.assert_close(R.T @ R, torch.eye(3, dtype=torch.float64))
    assert (R - SHOOT.R[1]).abs().max() < 1e-4


@pytest.mark.parametrize("place", ["frames", "top"])
def test_nerfstudios_list_of_distortion(tmp_path, place):
    """[k1, k2, k3, k4, p1, p2] of a frame goes before what all have."""
    listed = [-0.2, 0.05, 0, 0, 0.001, 0.002]
    file = write_transforms(tmp_path, SHOOT) / "transforms.json"
    content = json.loads(file.read_text())
    for numbers in content["frames"] if place == "frames" else [content]:
        numbers["distortion_params"] = listed
    file.write_text(json.dumps(content))
    for shot in read_capture(tmp_path).shots:
        assert shot.distortion.tolist() == [-0.2, 0.05, 0.001, 0.002]
    for wrong, words in (([0.1, 0, 0, 0], "k1, k2, k3, k4, p1, p2"), ("no", "k1, k2"), ([0, 0, 0.1, 0, 0, 0], "k3"),
                         ([0, 0, 0, 0, 0, "x"], "p2")):
        numbers["distortion_params"] = wrong
        file.write_text(json.dumps(content))
        refused(tmp_path, "transforms.json", "distortion_params" if wrong == "no" else "", words)


def test_a_frames_own_focal_length_goes_first(tmp_path):
    """Whatever key it has, and for both axes."""
    file = write_transforms(tmp_path, SHOOT) / "transforms.json"
    content = json.loads(file.read_text())
    content["frames"][1]["camera_angle_x"] = 2 * math.atan(12 / 50)
    content["frames"][2]["fl_x"] = 40
    file.write_text(json.dumps(content))
    focal = [shot.focal.tolist() for shot in read_capture(tmp_path).shots]
    assert focal == [[30, 30], pytest.approx([50, 50]), [40, 40]]


@pytest.mark.parametrize("lists, inputs, targets", [
    ({"train": [1, 2], "test": [0], "val": [0]}, [1, 2], [0]), ({"train": [0, 2, 3]}, [0, 2, 3], [1, 4, 5]),
    ({"test": [5]}, [0, 1, 2, 3, 4], [5]), ({"val": [2, 3]}, [0, 1, 4, 5], [2, 3]),
    ({"train": [0, 1], "val": [2], "test": []}, [0, 1], [2]),
    ({"train": [0, 1], "val": [2], "test": [3]}, [0, 1], [3]),
    ({"train": [], "test": None}, None, None)])
def test_nerfstudios_lists_of_inputs_and_targets(tmp_path, lists, inputs, targets):
    shoot = balls(6, 24, 18, (30.0, 30.0))
    names = {f"{part}_filenames": x and [f"./images/{i:03d}.png" for i in x] for part, x in lists.items()}
    found = read_capture(write_transforms(tmp_path, shoot, **names))
    if inputs is None:
        assert found.inputs is found.targets is None and len(found.shots) == 6
        return
    assert [found.shots[i].name for i in found.inputs] == [f"{i:03d}.png" for i in inputs]
    assert [found.shots[i].name for i in found.targets] == [f"{i:03d}.png" for i in targets]
    assert len(found.shots) == len(inputs + targets)


def test_lists_that_contradict_the_frames(tmp_path):
    refused(write_transforms(tmp_path, SHOOT, train_filenames=["images/7.png"]), "transforms.json", "images/7.png")
    refused(write_transforms(tmp_path, SHOOT, train_filenames=["images/000.png"], test_filenames=["images/000.png"]),
            "transforms.json: 'images/000.png' is in train_filenames and in another list")
    refused(write_transforms(tmp_path, SHOOT, test_filenames=3), "transforms.json", "'3'")


def test_numbers_in_other_units(tmp_path):
    """Principal points and focal lengths in widths of the picture, millimeters, degrees."""
    for key, value, words in (("cx", 0.5, ""), ("fl_x", 1.39, "another unit"), ("fl_x", 1e-300, "another unit"),
                              ("fl_x", 30000.0, "another unit"), ("fl_y", 1.39, "another unit")):
        more = {"cy": 0.5} if key == "cx" else {}
        broken(tmp_path, key, value, **more)
        content = json.loads((tmp_path / "transforms.json").read_text())
        (tmp_path / "transforms.json").write_text(json.dumps(content | more))
        refused(tmp_path, "transforms.json: frame 0: ", key, words)
    for cx, cy in ((0.0, 0.0), (-0.01, 0.02)):
        (tmp_path / "transforms.json").write_text(json.dumps(content | {"fl_y": 30.0, "cx": cx, "cy": cy}))
        refused(tmp_path, "frame 0: fl_x, fl_y, cx, cy: [30.0, 30.0, ", "another unit")


@pytest.mark.parametrize("row", [[0, 0, 1e-16, 1], [0, 0, 0, 1.0000000000000002], [1e-7, 0, -0.0, 0.9999999]])
def test_last_rows_up_to_rounding(tmp_path, row):
    file = write_transforms(tmp_path, SHOOT) / "transforms.json"
    content = json.loads(file.read_text())
    for frame in content["frames"]:
        frame["transform_matrix"][3] = row
    file.write_text(json.dumps(content))
    assert [shot.matrix[3].tolist() for shot in read_capture(tmp_path).shots] == [[0, 0, 0, 1]] * 3


# ---------------------------------------------------------------------------------------------- names of files

@pytest.mark.parametrize("listed, there", [
    ("images/IMG_1", "images/IMG_1.JPG"), ("images/IMG_1.jpg", "images/IMG_1.JPG"),
    ("IMAGES/IMG_1", "images/IMG_1.png"),
    ("images/\u00e9", "images/e\u0301.png"), ("images/e\u0301.png", "images/\u00e9.png"),
    ("\u00e9/1.png", "e\u0301/1.png"), ("images\\1", "images/1.JPEG")])
def test_files_in_another_spelling(tmp_path, listed, there):
    """Endings left out and in any case; both forms of Unicode, in files and in folders; the names are a keyboard's."""
    file = write_transforms(tmp_path, SHOOT) / "transforms.json"
    content = json.loads(file.read_text())
    content["frames"][0]["file_path"] = listed
    file.write_text(json.dumps(content))
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / "images/000.png").rename(tmp_path / there)
    shot = read_capture(tmp_path).shots[0]
    assert shot.file == tmp_path / there and shot.name == Path(there).name.replace("e\u0301", "\u00e9")


@pytest.mark.parametrize("mask", ["masks/000.PNG", "Masks/000.png", "masks/000_Mask.png", "masks/images/000.Png"])
def test_masks_in_another_case(tmp_path, mask):
    write_transforms(tmp_path, SHOOT, "masks/{1}.png")
    folder = (tmp_path / "masks").rename(tmp_path / Path(mask).parts[0])
    (tmp_path / mask).parent.mkdir(exist_ok=True)
    (folder / "000.png").rename(tmp_path / mask)
    assert read_capture(tmp_path).shots[0].mask == tmp_path / mask


def test_one_mask_for_several_photographs(tmp_path):
    """Of many cameras, whose photographs have the same name; and the same `mask_path` in all frames."""
    names = [f"cam{i}/0001" for i in range(3)]
    paths = captures.write_pictures(tmp_path, SHOOT, "masks/{1}.png", names=names)
    write_transforms(tmp_path, SHOOT, paths=paths)
    refused(tmp_path, "3 photographs have the same mask", "masks/0001.png")
    for name, rgba in zip(names, SHOOT.rgba):
        (tmp_path / "masks" / name).parent.mkdir()
        Image.fromarray(np.ascontiguousarray(rgba[..., 3])).save(tmp_path / f"masks/{name}.png")
    assert len({shot.mask for shot in read_capture(tmp_path).shots}) == 3
    (tmp_path / "b").mkdir()
    write_transforms(tmp_path / "b", SHOOT, "masks/{1}.png")
    content = json.loads((tmp_path / "b/transforms.json").read_text())
    for frame in content["frames"]:
        frame["mask_path"] = "masks/001.png"
    (tmp_path / "b/transforms.json").write_text(json.dumps(content))
    refused(tmp_path / "b", "3 photographs have the same mask", "masks/001.png")


# ---------------------------------------------------------------------------------------------- COLMAP

@pytest.mark.parametrize("points", ["none", "empty", "filled", "some", "commented"])
def test_lines_of_points_may_be_left_out(tmp_path, points):
    """Wholly, or of some images; blank lines and comments stand anywhere."""
    write_colmap(tmp_path, balls(6, 24, 18, (30.0, 30.0)), binary=False)
    file = tmp_path / "sparse/0/images.txt"
    images = [line for line in file.read_text().splitlines() if line.endswith(".png")]
    rows = {"none": [], "empty": [""], "filled": ["10.5 11.5 -1 1e1 3 7\r"], "commented": ["# points", "1 2 -1", ""]}
    lines = ["# Image list"]
    for i, image in enumerate(images):
        lines += [image, *rows.get(points, [["1 2 3"], [], [""]][i % 3])]
    file.write_text("\n".join(lines) + "\n")
    assert len(read_capture(tmp_path).shots) == 6


def test_the_largest_of_several_models(tmp_path):
    """COLMAP numbers what it cannot connect. A line says which one it is."""
    write_colmap(tmp_path, SHOOT.at([0, 1]), place="sparse/0")
    write_colmap(tmp_path, SHOOT, place="sparse/1", binary=False)
    found = read_capture(tmp_path)
    assert len(found.shots) == 3 and "text (sparse/1, the largest of 2 models)" in found.source
    (tmp_path / "sparse/0").rename(tmp_path / "sparse_away")
    for file in (tmp_path / "sparse_away").iterdir():
        file.unlink()
    assert len(read_capture(tmp_path).shots) == 3 and "largest" not in read_capture(tmp_path).source


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path, encoding):
    write_colmap(tmp_path, SHOOT, binary=False, points=[[1, 2, 3]])
    for file in (tmp_path / "sparse/0").iterdir():
        file.write_text(file.read_text(), encoding=encoding)
    assert len(read_capture(tmp_path).shots) == 3


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", ["IMG  1", "a b/c  (2)", "\u00fc", "12 34"])
def test_names_of_images(tmp_path, binary, name):
    write_colmap(tmp_path, SHOOT, binary=binary, names=[name, "b", "c"])
    assert Path(name).name + ".png" in [shot.name for shot in read_capture(tmp_path).shots]


@pytest.mark.parametrize("binary", [True, False])
def test_names_that_are_not_utf8(tmp_path, binary):
    write_colmap(tmp_path, SHOOT, binary=binary, names=["\u00fc", "b", "c"])
    file = next((tmp_path / "sparse/0").glob("images.*"))
    file.write_bytes(file.read_bytes().replace("\u00fc".encode(), b"\xfc"))
    refused(tmp_path, file, "xfc", "not UTF-8")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("place", ["sparse/0", "sparse", "colmap/sparse/0", "."])
def test_places_and_points_of_a_model(tmp_path, binary, place):
    points = [[0.1, 0.2, 0.3], [1e5, -2.0, 3.25]]
    write_colmap(tmp_path, SHOOT, "RADIAL", binary, points, place=place, names=["b/2 x", "a", "b/1"])
    assert find_models(tmp_path) == [tmp_path / place]
    frames, found, kind = read_model(tmp_path / place)
    assert found.tolist() == points and kind == ("binary" if binary else "text")
    assert [frame.name for frame in frames] == ["a.png", "b/1.png", "b/2 x.png"]
    photographs = read_capture(tmp_path)
    assert [shot.name for shot in photographs.shots] == ["a.png", "1.png", "2 x.png"]
    assert photographs.convention == CONVENTIONS["colmap"] and "RADIAL, 2 points" in photographs.source
    order = [1, 2, 0]
    assert (cameras_of(photographs).T - SHOOT.T[order]).abs().max() < 1e-12
    (tmp_path / place / f"points3D.{'bin' if binary else 'txt'}").unlink()
    assert len(read_capture(tmp_path).points) == 0


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_truncated_binaries(tmp_path, name):
    """At every length but the whole one."""
    write_colmap(tmp_path, SHOOT, points=[[1, 2, 3]])
    file = tmp_path / f"sparse/0/{name}.bin"
    content = file.read_bytes()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        refused(tmp_path, f"{name}.bin: truncated: it ends after {length} bytes")
    file.write_bytes(struct.pack("<Q", 2**63) + content[8:])
    refused(tmp_path, f"{name}.bin: ")


def test_models_of_cameras_that_cannot_be_undone(tmp_path):
    write_colmap(tmp_path, SHOOT)
    file = tmp_path / "sparse/0/cameras.bin"
    content = file.read_bytes()
    for number, name in ((5, "OPENCV_FISHEYE"), (6, "FULL_OPENCV"), (10, "THIN_PRISM_FISHEYE"), (99, "number 99")):
        file.write_bytes(content[:12] + struct.pack("<i", number) + content[16:])
        refused(tmp_path, "cameras.bin: camera 7", name, "image_undistorter")
    (tmp_path / "t").mkdir()
    write_colmap(tmp_path / "t", SHOOT, binary=False)
    for line, words in (("7 FOV 24 18 1 2 3 4 5", "FOV is none of"), ("7 PINHOLE 24 18 1 2", "4 parameters"),
                        ("7 PINHOLE 24 x 1 2 3 4", "line 1"), ("7 PINHOLE 24", "line 1: 3 words"),
                        ):
        (tmp_path / "t/sparse/0/cameras.txt").write_text(line)
        refused(tmp_path / "t", "cameras.txt, line 1", words)
    (tmp_path / "t/sparse/0/cameras.txt").write_text("7 PINHOLE 0 18 1 2 3 4")
    refused(tmp_path / "t", "image '000.png'", "0 x 18 pixels")
    (tmp_path / "t/sparse/0/cameras.txt").write_text("7 PINHOLE 24 18 nan 2 3 4")
    refused(tmp_path / "t", "image '000.png'", "not finite")


def test_images_of_a_model_that_make_no_sense(tmp_path):
    write_colmap(tmp_path, SHOOT, binary=False)
    file = tmp_path / "sparse/0/images.txt"
    lines = file.read_text().splitlines()

    def with_line(line):
        file.write_text("\n".join([line, "", *lines[3:]]))

    pose = "1 1 0 0 0 0 0 3 7"
    with_line(f"{pose} ../x.png")
    refused(tmp_path, "image '../x.png'", "leads out of")
    with_line(f"{pose} /etc/passwd")
    refused(tmp_path, "image '/etc/passwd'", "leads out of")
    with_line(f"{pose} nothing.png")
    assert len(read_capture(tmp_path).shots) == 2
    with_line("1 1 0 0 0 0 0 3 8 000.png")
    refused(tmp_path, "images.txt: image '000.png' has the camera 8, which cameras.txt")
    with_line("1 0 0 0 0 0 0 3 7 000.png")
    refused(tmp_path, "image '000.png'", "not finite")
    with_line("1 1 0 0 0 0 inf 3 7 000.png")
    refused(tmp_path, "image '000.png'", "not finite")
    with_line("1 1 0 0 000.png")
    refused(tmp_path, "images.txt, line 1: 5 words")
    file.write_bytes(b"# caf\xc3\xa9\n# caf\xe9\n")
    refused(tmp_path, "images.txt: b'# caf\\xe9': not UTF-8")
    file.write_text("# nothing\n")
    refused(tmp_path, "no image")
    (tmp_path / "sparse/0/cameras.txt").unlink()
    refused(tmp_path, "cameras.txt: no such file", kind=FileNotFoundError)


def test_pictures_of_a_model_in_other_folders(tmp_path):
    """`images/` is the habit, `input/` and the folder itself are others."""
    write_colmap(tmp_path, SHOOT)
    (tmp_path / "images").rename(tmp_path / "input")
    assert read_capture(tmp_path).shots[0].file == tmp_path / "input/000.png"
    for file in sorted((tmp_path / "input").iterdir()):
        file.rename(tmp_path / file.name)
    assert read_capture(tmp_path).shots[2].file == tmp_path / "002.png"
    assert math.isclose(read_capture(tmp_path).shots[2].focal[0], 30)
