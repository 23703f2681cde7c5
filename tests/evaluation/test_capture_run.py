"""The main command on own photographs: from a folder to a mesh in its world, the check before it, bad input."""
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import distill
import sparsefusion
from evaluation.views import choose_targets
from photographs import examine
from photographs.reading import read_capture
from presets import PRESETS
from tests.support.captures import balls, turn, write_co3d, write_colmap, write_transforms
from tests.support.helpers import one_line
from tests.support.small import SHORT, tiny_model

PLAIN = replace(SHORT, iterations=80, bootstrap=0, lr_grid=3e-2, mesh_resolution=24, occupancy_every=8)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Small numbers for the same command."""
    monkeypatch.setitem(PRESETS, "nano", SHORT)
    monkeypatch.setitem(PRESETS, "plain", PLAIN)


@pytest.fixture(scope="module")
def shoot():
    return balls(10, 128, 96, (160.0, 160.0))


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    sparsefusion.save(tiny_model(), path, trained_on=[{"what": "prior", "category": "hydrant"}])
    return path


def command(folder, out, *flags):
    """`python distill.py --capture folder ... --out out`: what `metrics.json` holds."""
    distill.main([str(x) for x in ("--capture", folder, "--device", "cpu", "--out", out, *flags)])
    return json.loads((out / "metrics.json").read_text())


def vertices(file):
    """The vertices of a PLY file, (N, 3)."""
    header, body = file.read_bytes().split(b"end_header\n", 1)
    count = int(header.split(b"element vertex ")[1].split()[0])
    rows = torch.frombuffer(bytearray(body[:count * 27]), dtype=torch.uint8).reshape(count, 27)
    return rows[:, :12].contiguous().view(torch.float32).double()


def transpose_rotations(folder):
    """The mistake: R transposed in a transforms.json."""
    file = folder / "transforms.json"
    content = json.loads(file.read_text())
    for frame in content["frames"]:
        pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
        pose[:3, :3] = pose[:3, :3].T.clone()
        frame["transform_matrix"] = pose.tolist()
    file.write_text(json.dumps(content))


def names(*numbers):
    return [f"{i:03d}.png" for i in numbers]


# --- from a folder to a mesh ---

def test_a_folder_is_parsed_once_and_a_picture_decoded_twice(shoot, tmp_path, monkeypatch):
    """Once for the check, once for the fit; and once more its header is looked at."""
    parsed, opened = [], Counter()
    read, open_file = distill.read_capture, Image.open
    monkeypatch.setattr(distill, "read_capture", lambda folder: parsed.append(folder) or read(folder))

    def count(path, **options):
        opened[Path(path).name] += 1
        return open_file(path, **options)

    monkeypatch.setattr(Image, "open", count)
    folder = write_transforms(tmp_path / "balls", shoot)
    command(folder, tmp_path / "out", "--targets", 0)
    assert len(parsed) == 1 and len(opened) >= 10
    assert {name: n for name, n in opened.items() if n > 3 and name != "previews.png"} == {}


@pytest.mark.parametrize("write, scale", [(write_transforms, 1.0), (write_colmap, 13.0)])
def test_the_mesh_comes_back_in_the_users_world(write, scale, shoot, tmp_path, capsys):
    """Whatever it is: the vertices lie on the balls as that world's cameras see them."""
    if scale != 1:
        shoot = shoot.in_world(turn(0.4, -2.0, 0.9), scale, torch.tensor([500.0, -20.0, 7.0]).double())
    result = command(write(tmp_path, shoot), tmp_path / "out")
    assert result["input_frames"] == names(0, 1, 2, 3, 4, 6, 7, 8, 9) and result["target_frames"] == names(5)
    assert set(result["methods"]) == {"nearest", "ngp"} and result["settings"]["weights"] is None
    found = vertices(tmp_path / "out" / "mesh.ply")
    cameras = shoot.square_cameras()
    for i in range(len(shoot)):
        xy, depth = cameras[i].project(found)
        column, row = (64 - 64 * xy).long().clamp(0, 127).T  # of the square
        row = (row - 16).clamp(0, 95)
        assert (torch.from_numpy(shoot.rgba[i])[row, column, 3] > 0).double().mean() > 0.9 and (depth > 0).all()

    # Where the user's world lies is kept with the field, and the sheet and the rest are there.
    state = torch.load(tmp_path / "out" / "field.pt", weights_only=True)
    world = {name: torch.as_tensor(x, dtype=torch.float64).tolist() for name, x in state["world"].items()}
    assert world == result["world"]
    assert state["frame"]["R"].shape == (3, 3) and len(state["cameras"]["T"]) == 10
    assert result["world"]["scale"] == pytest.approx(0.36 * scale, rel=0.2)
    assert {"comparison.png", "mesh.glb", "views"} <= {path.name for path in (tmp_path / "out").iterdir()}
    printed = capsys.readouterr().out
    assert "10 photographs" in printed and "masks and cameras of 9 input views fit" in printed
    assert "9 input photographs are enough for a field alone" in printed


def test_a_few_photographs_get_the_prior(shoot, tiny_weights, tmp_path, monkeypatch, capsys):
    """And their own folder below output/, though its name is none for a folder."""
    folder = tmp_path / "a:b"
    folder.mkdir()
    write_transforms(folder, shoot.at([0, 3, 7]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sparsefusion, "THINGS", tiny_weights)
    distill.main(["--capture", str(folder), "--device", "cpu", "--iterations", "4"])
    out, = (tmp_path / "output").iterdir()
    result = json.loads((out / "metrics.json").read_text())
    assert result["sequence"] == "a:b" and out.name.startswith("a_b_")
    assert set(result["methods"]) == {"nearest", "ngp", "eft", "vldm", "sparsefusion"}
    assert result["input_frames"] == result["target_frames"] == names(0, 1, 2)
    printed = capsys.readouterr().out
    assert "3 input photographs, with the prior tiny.pt, which knows hydrant and sees them in everything" in printed
    assert "all views are inputs" in printed and "'a:b' is no name for a folder" in printed


def test_flags_decide_about_the_prior(shoot, tiny_weights, tmp_path, capsys):
    folder = write_transforms(tmp_path, shoot)
    many = command(folder, tmp_path / "many", "--weights", tiny_weights, "--iterations", 2, "--targets", 1)
    assert "sparsefusion" in many["methods"] and "9 input photographs, with the prior" in capsys.readouterr().out
    few = command(folder, tmp_path / "few", "--no-prior", "--input-frames", "007.png,002.png", "--targets", 3)
    assert few["input_frames"] == names(7, 2) and set(few["methods"]) == {"nearest", "ngp"}
    assert few["target_frames"] == names(0, 4, 9) and "prior" not in capsys.readouterr().out


# --- which photographs ---

def choice(folder, *flags):
    """Names of the inputs and of the targets that the flags give."""
    args = distill.parser().parse_args(["--capture", str(folder), *flags])
    source = read_capture(folder)
    inputs = distill.choose_photographs(source, args)
    targets = choose_targets(source, [source.names.index(name) for name in inputs], args.targets, False)
    return list(inputs), [source.names[i] for i in targets]


@pytest.fixture
def split(shoot, tmp_path):
    """Six training and four test photographs, as NeRF-synthetic has them."""
    paths = [f"images/{i:03d}" for i in range(10)]
    write_transforms(tmp_path, shoot)
    (tmp_path / "transforms.json").unlink()
    write_transforms(tmp_path, shoot.at(list(range(6))), paths=paths[:6], name="transforms_train.json")
    write_transforms(tmp_path, shoot.at(list(range(6, 10))), paths=paths[6:], name="transforms_test.json")
    return tmp_path


def test_what_the_files_name_is_the_default(split):
    assert choice(split) == (names(*range(6)), names(*range(6, 10)))
    assert choice(split, "--targets", "2") == (names(*range(6)), names(6, 9))
    inputs, targets = choice(split, "--views", "3")
    assert len(inputs) == 3 and set(inputs) < set(names(*range(6))) and targets == names(6, 7, 8, 9)
    assert choice(split, "--views", "3", "--seed", "1")[0] != inputs
    assert choice(split, "--input-frames", "001.png,008.png") == (names(1, 8), names(6, 7, 9))


@pytest.mark.parametrize("count, flags, held_out", [
    (7, [], []), (8, [], [4]), (10, ["--targets", "2"], [2, 7]), (10, ["--targets", "0"], []), (17, [], [4, 12])])
def test_else_some_are_held_out(count, flags, held_out, tmp_path, capsys):
    folder = write_transforms(tmp_path, balls(count))
    inputs, targets = choice(folder, *flags)
    assert inputs == names(*[i for i in range(count) if i not in held_out])
    if held_out:
        assert targets == names(*held_out)
    else:
        assert set(targets) <= set(inputs) and "all views are inputs" in capsys.readouterr().out


def test_random_inputs_leave_the_others_as_targets(shoot, tmp_path):
    folder = write_transforms(tmp_path, shoot)
    inputs, targets = choice(folder, "--views", "2")
    assert len(inputs) == 2 and len(targets) == 8 and not set(inputs) & set(targets)


@pytest.mark.parametrize("given", ["transforms.json", "images", "images/001.png", "."])
def test_photographs_without_their_flag(given, shoot, tmp_path, capsys):
    """The command that works is told."""
    folder = write_transforms(tmp_path / "two words", shoot.at([0, 3, 7]))
    command_line = f"python distill.py --capture '{folder}'"
    one_line(capsys, distill.main, [folder / given, "--views", 2], "unrecognized arguments: ", command_line)
    one_line(capsys, distill.main, ["--views", 2, folder / given, folder], "unrecognized arguments: ", command_line)
    one_line(capsys, distill.main, ["a.jpg", "b.jpg"], "python distill.py --capture DIR", "docs/photographs.md")
    one_line(capsys, distill.main, ["x" * 5000], "unrecognized arguments: xxx", "python distill.py --capture DIR")
    one_line(capsys, distill.main, ["--no-such-flag"], "error: unrecognized arguments: --no-such-flag")


# --- what is taken up ---

def test_settings_tell_a_capture_from_others(shoot, tmp_path, capsys):
    folder, out = write_transforms(tmp_path, shoot.at([0, 3, 7])), tmp_path / "out"
    flags = ["--no-prior", "--iterations", 2]
    first = command(folder, out, *flags)
    assert command(folder, out, *flags) == first
    assert "has the results of these settings already" in capsys.readouterr().out
    picture = folder / "images" / "001.png"
    picture.write_bytes(picture.read_bytes() + b" ")
    one_line(capsys, distill.main, ["--capture", folder, "--device", "cpu", "--out", out, *flags],
             "pictures differ", "--overwrite")
    assert command(folder, out, *flags, "--overwrite")["settings"] != first["settings"]


# --- the check before it ---

def test_a_mistake_stops_the_command_unless_it_is_forced(shoot, tmp_path, capsys):
    folder, out = write_transforms(tmp_path, shoot), tmp_path / "out"
    transpose_rotations(folder)
    argv = ["--capture", folder, "--out", out]
    one_line(capsys, distill.main, argv, "likely a mistake: R transposed", "with that undone", "--force")
    assert not out.exists()
    write_transforms(folder, replace(shoot, focal=(320.0, 320.0)))
    one_line(capsys, distill.main, argv, "likely a mistake: the focal length times 2")
    result = command(folder, out, "--force", "--iterations", 2)
    assert len(result["input_frames"]) == 9 and "likely a mistake: the focal length" in capsys.readouterr().out


def test_sequences_of_co3d_are_checked_too(shoot, tmp_path, capsys):
    root = tmp_path / "right"
    argv = ["--category", "thing", "--protocol", "all", "--no-prior", "--iterations", "2", "--targets", "1"]
    distill.main(["--root", str(write_co3d(root, shoot)), *argv, "--views", "7", "--out", str(tmp_path / "out")])
    assert "masks and cameras of 7 input views fit" in capsys.readouterr().out
    wrong = write_co3d(tmp_path / "wrong", replace(shoot, R=shoot.R.transpose(1, 2)))
    argv = ["--root", wrong, *argv, "--out", tmp_path / "none"]
    one_line(capsys, distill.main, [*argv, "--views", "7"], "R transposed", "--force")
    assert not (tmp_path / "none").exists()


def test_a_single_view_is_not_checked(shoot, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(examine, "examine", None)
    command(write_transforms(tmp_path, shoot), tmp_path / "out", "--no-prior", "--views", 1, "--iterations", 1)
    assert "masks and cameras" not in capsys.readouterr().out


# --- bad input ---

@pytest.mark.parametrize("flags, words", [
    (["--root", "x"], ["--capture", "--root"]),
    (["--category", "toys", "--sequence", "s"], ["--category, --sequence"]),
    (["--protocol", "all"], ["--protocol"]),
    (["--views", "11"], ["--views 11", "10"]),
    (["--targets", "10"], ["--targets 10", "10 photographs"]),
    (["--input-frames", "003.png,3.png"], ["--input-frames", "3.png", "000.png"]),
    (["--no-prior", "--set", "image_size=33"], ["render_size", "33"])])
def test_bad_flags(flags, words, shoot, tmp_path, capsys):
    folder = write_transforms(tmp_path, shoot)
    one_line(capsys, distill.main, ["--capture", folder, "--out", tmp_path / "out", *flags], *words)
    assert not (tmp_path / "out").exists()


def test_no_photographs(tmp_path, capsys):
    one_line(capsys, distill.main, ["--capture", tmp_path / "nowhere"], tmp_path / "nowhere", "no such folder")
    one_line(capsys, distill.main, ["--capture", tmp_path], tmp_path, "no transforms.json")
