"""What a training shows of itself: held-out sequences, lines, curves, pictures; and folders of captures."""
import functools
import json
import shutil
import xml.etree.ElementTree as ET

import pytest
import torch
from PIL import Image
from torch import nn

import presets
import sparsefusion
import train
from tests.support import captures, trees
from tests.support.helpers import one_line, same
from tests.support.small import TINY
from training import fit, packed, ranks, record
from training.packed import load_packed

load = functools.partial(sparsefusion.load, stage="vae")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree of nine sequences, one of which is held out, of which some are shorter than others; a cache for all."""
    folder = tmp_path_factory.mktemp("record")
    counts = {f"s{i}": 3 + i % 2 for i in range(9)}
    with pytest.MonkeyPatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        m.setattr(train, "load_packed", functools.partial(load_packed, workers=1))
        m.setitem(presets.MODELS, "nano", TINY)
        m.setattr(fit, "LOGGED", 1)  # at the steps where it says how it goes
        yield trees.write(folder / "tree", counts, training=counts)


@pytest.fixture
def training(tree, tmp_path):
    """A function that trains on the tree and returns the weights file."""
    def run(what, out, *flags):
        argv = [what, "--root", tree, "--category", "things", "--device", "cpu", "--out", tmp_path / out, *flags]
        train.main([str(x) for x in (*argv, "--set", "batch=2", "max_views=2")])
        return tmp_path / out
    return run


def lines(out):
    """The lines of a training's log."""
    return [json.loads(line) for line in (out.with_name(out.name + ".run") / "log.jsonl").read_text().splitlines()]


# --- what is held out ---

def test_a_held_out_sequence_is_never_trained_on(tree):
    data = load_packed([tree], ["things"], 5, 16, workers=1)
    held_out, = data.held_out().drawn.tolist()
    assert sorted([held_out, *data.drawn.tolist()]) == list(range(9))
    drawn, others = set(), set()
    for step in range(60):
        draws = ranks.Draws(0, step, 4, range(4))
        for part, found in ((data, drawn), (data.held_out(), others)):
            found |= set(train.draw_images(part, draws)[1].tolist())
            found |= set(train.draw_views(part, draws, (1, 3)).scene.tolist())
    assert drawn == set(data.drawn.tolist()) and others == {held_out}


def test_what_is_held_out_follows_from_names():
    """Whatever their order and folder; and from 64 on nothing that was trained on is held out when others come."""
    names = [("here", "things", f"{i}") for i in range(200)]

    def held_out(sequences):
        drawn = packed._trained_on(sequences).tolist()
        return {sequences[i][1:] for i in range(len(sequences)) if i not in drawn}

    for few, count in ((0, 0), (7, 0), (8, 1), (40, 5), (64, 8), (200, 8)):
        assert len(held_out(names[:few])) == count
    assert held_out([("there", *name[1:]) for name in reversed(names)]) == held_out(names)
    for more in range(65, 200):
        assert not held_out(names[:more]) & ({name[1:] for name in names[:more - 1]} - held_out(names[:more - 1]))


def test_few_sequences_are_packed_by_this_process(tree, monkeypatch):
    """Another one takes seconds to begin."""
    seen = []

    def map_here(function, jobs, workers):
        seen.append((len(jobs), workers))
        return map(function, jobs)

    monkeypatch.setattr(packed, "map_processes", map_here)
    monkeypatch.setattr(packed.os, "cpu_count", lambda: 4)
    for size, share in ((17, 9), (18, 8), (19, 1)):
        monkeypatch.setattr(packed, "SHARE", share)
        load_packed([tree], ["things"], 2, size)
    assert seen == [(9, 1), (9, 2), (9, 4)]


def test_few_sequences_hold_out_none(tree):
    data = load_packed([tree], ["things"], 5, 16, workers=1)
    few = packed.PackedScenes(data.pixels[:7], data.cameras[:7], data.counts[:7], data.sequences[:7], "",
                              packed._trained_on(data.sequences[:7]))
    assert few.held_out() is None and few.drawn.tolist() == list(range(7))
    assert train.pictured(few, "cpu")[0] == "trained on" and train.pictured(data, "cpu")[0] == "held out"


# --- what is written ---

def test_a_resumed_training_repeats_no_line(training, capsys):
    fast = ["--set", "lr=1e-2", "warmup=1", "--steps"]
    whole = training("vae", "whole.pt", *fast, 3)
    parts = training("vae", "parts.pt", *fast, 3, "--minutes", 1e-9)
    assert [line["step"] for line in lines(parts)] == [1]
    with open(parts.with_name("parts.pt.run") / "log.jsonl", "a") as file:
        file.write('{"step": 2}\n')  # before a kill
    training("vae", "parts.pt", *fast, 3)
    training("vae", "parts.pt", *fast, 5)
    found = lines(parts)
    assert [line["step"] for line in found] == [1, 3, 5]
    assert [line["losses"] for line in found[:2]] == [line["losses"] for line in lines(whole)]
    for line in found:
        assert list(line["losses"]) == ["loss", "held-out loss"] and line["losses"]["held-out loss"] > 0
        assert line["per_second"] > 0 and line["memory_gb"] > 0 and line["seconds"] >= 0 and line["seconds_left"] >= 0
    assert found[2]["losses"]["held-out loss"] < found[0]["losses"]["held-out loss"]
    folder = parts.with_name("parts.pt.run")
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000001.jpg", "00000003.jpg", "00000005.jpg", "log.jsonl", "losses.svg"]
    out = capsys.readouterr().out
    assert "9 sequences of 3 to 4 pictures, 8 of them to train on" in out
    assert f"next: python train.py prior --out prior.pt --vae {parts} --root " in out.splitlines()[-1]


def test_held_out_losses_change_no_training(training, monkeypatch):
    vae = training("vae", "vae.pt", "--steps", 2)
    with_them = training("prior", "a.pt", "--vae", vae, "--steps", 3)
    found = lines(with_them)
    assert len(found) == 2
    assert list(found[0]["losses"]) == ["diffusion", "color", "held-out diffusion", "held-out color"]
    monkeypatch.setattr(fit, "LOGGED", 10**9)
    assert same(load(training("prior", "b.pt", "--vae", vae, "--steps", 3)), load(with_them))


def test_the_picture_shows_held_out_sequences(tree, training):
    """One row: the query view, what EFT and VLDM make of it, and the inputs; of the VAE pairs."""
    vae = training("vae", "vae.pt", "--steps", 1)
    prior = training("prior", "prior.pt", "--vae", vae, "--steps", 1)
    data = load_packed([tree], ["things"], 16, 32, workers=1)
    n, = data.held_out().drawn.tolist()
    views = int(data.counts[n])
    truth = data.pixels[n][1, :3].float()
    for out, columns, place in ((vae, 2 * views, 2), (prior, 2 + views, 0)):
        with Image.open(out.with_name(out.name + ".run") / "00000001.jpg") as picture:
            assert picture.size == (32 * columns, 16 + 32)
            tile = picture.convert("RGB").crop((32 * place, 16, 32 * place + 32, 48))
        shown = torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8).reshape(32, 32, 3).permute(2, 0, 1)
        assert (shown.float() - truth).abs().mean() < 12  # it is a JPEG


def test_curves_are_drawn():
    found = [{"step": 100 * i, "losses": {"a<b": 0.5 / i, "held-out": 0.0 if i == 3 else 2.0}} for i in (1, 2, 3)]
    root = ET.fromstring(record.draw_losses([{"step": x["step"], "losses": {"a": x["losses"]["a<b"],
                                              "held-out a": x["losses"]["held-out"]}} for x in found]))
    curves = [line.attrib["points"].split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(curve) for curve in curves] == [3, 3]
    heights = [[float(point.split(",")[1]) for point in curve] for curve in curves]
    assert heights[0] == sorted(heights[0]) and heights[1][:2] == [10, 10] and heights[1][2] == 180  # down is less
    assert record.draw_losses([{"step": 1, "losses": {"a": 0.25}}])  # a scale of one value


def test_batch_norms_that_do_not_train_take_their_running_moments():
    """In one of several processes, which would wait for the others."""
    norm = nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    norm(x + 1)
    norm.eval()
    expected = norm(x)
    norm.forward = functools.partial(ranks.batch_norm, norm)
    assert torch.equal(norm(x), expected)


# --- folders of captures ---

@pytest.fixture
def shoots(tmp_path):
    """Two captures and one with a photograph that cannot be read."""
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for seed, folder in enumerate(folders):
        captures.write_transforms(folder, captures.balls(count=5, seed=seed))
    broken = folders[2] / "images" / "002.png"
    broken.write_bytes(broken.read_bytes()[:-100])
    return folders


def test_captures_are_trained_on(shoots, tree, tmp_path, capsys):
    """As `distill.py` sees them; one that cannot be read is left out by name. Beside trees, too."""
    data = load_packed([tree], ["things"], 4, 32, captures=shoots, workers=1)
    out = capsys.readouterr().out
    assert len(data) == 11 and "002.png: not a readable picture" in out and "fewer than 1 frames: 1" in out
    for n, folder in enumerate(shoots[:2]):
        assert data.sequences[n] == (folder, "photographs", folder.name)
        scene = packed.read_capture(folder).at([0, 1, 2, 4]).load(32)
        assert torch.equal(data.pixels[n][:, :3], (scene.images * 255).round().byte())
        assert torch.equal(data.cameras[n].T, scene.cameras.T)

    argv = ["vae", "--capture", *shoots[:2], "--device", "cpu", "--steps", 1, "--set", "batch=2", "--out"]
    train.main([str(x) for x in (*argv, tmp_path / "vae.pt")])
    argv = ["prior", "--vae", tmp_path / "vae.pt", *argv[1:]]
    train.main([str(x) for x in (*argv, tmp_path / "prior.pt")])
    assert f"next: python distill.py --weights {tmp_path}/prior.pt --capture {shoots[0]}" in capsys.readouterr().out
    assert [x["category"] for x in sparsefusion.read_trained_on(tmp_path / "prior.pt")] == ["photographs"] * 2
    shutil.copy(shoots[0] / "images" / "001.png", shoots[0] / "images" / "002.png")  # other data by now
    one_line(capsys, train.main, [*argv, tmp_path / "prior.pt"], "another training", "data differ")


def test_what_to_train_on_is_needed(tmp_path, capsys):
    one_line(capsys, train.main, ["vae", "--out", tmp_path / "x"], "--root or --capture")
    one_line(capsys, train.main, ["vae", "--capture", tmp_path / "none", "--out", tmp_path / "x"], tmp_path / "none")
