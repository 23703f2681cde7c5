"""Evaluation: the protocol whatever the workers and the order, what is taken up, what is left out, tables."""
import errno
import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distill
import evaluate
import sparsefusion
from common import files
from datasets import protocol
from distillation import Distillation
from evaluation.instance import run_instance
from evaluation.tables import markdown, mean_and_error, means, paired, table
from presets import PRESETS
from tests.support import trees
from tests.support.small import SHORT, tiny_model

SAMPLE = Path(__file__).resolve().parents[2] / "sample" / "co3d"
METHODS = ["nearest", "ngp", "eft", "vldm", "sparsefusion"]
QUICK = ["--set", "iterations=2", "bootstrap=1", "viewpoints=1", "render_size=16", "mesh_resolution=8",
         "turntable_frames=0", "denoise_steps=1", "sample_steps=1", "field.levels=2", "samples_per_ray=8",
         "occupancy_cells=8", "log2_hashmap_size=8"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that evaluates the first toys of the sample: the summary, and the (sequence, seed) of what was
    made.
    """
    monkeypatch.setitem(PRESETS, "nano", SHORT)
    sparsefusion.save(tiny_model(), tmp_path / "tiny.pt")
    made, make = [], run_instance

    def noted(instance, *args, **options):
        made.append((instance.source.sequence, instance.seed))
        return make(instance, *args, **options)

    monkeypatch.setattr(evaluate, "run_instance", noted)

    def evaluation(*flags, root=SAMPLE, category="toys", instances=2):
        argv = ["--root", root, "--category", category, "--instances", instances, "--weights", tmp_path / "tiny.pt",
                "--device", "cpu", "--out", tmp_path / "out", *flags]
        made.clear()
        evaluate.main([str(x) for x in argv])
        return json.loads((tmp_path / "out" / "evaluation.json").read_text()), list(made)
    return evaluation


# --- the protocol ---

def test_a_made_tree(run, tmp_path, capsys):
    """40, 32 and 8 frames and a broken picture: inputs, targets and seeds by the rules; the broken one is named and
    left out.
    """
    tree = trees.write(tmp_path / "co3d", {"a": 40, "b": 32, "c": 8, "d": 12, "e": 11})
    (tree / "things" / "d" / "images" / "3.png").write_bytes(b"broken")
    flags = dict(root=tree, category="things", instances=0)
    summary, made = run(*QUICK, **flags)
    assert made == [("a", 0), ("b", 1), ("d", 2), ("e", 3)] and summary["instances"] == 3 and summary["missing"] == 1
    printed = capsys.readouterr().out
    assert "left out: d" in printed and "3.png" in printed and len(summary["left_out"]) == 1
    for entry in protocol.paper_list(tree, "things"):
        file = tmp_path / "out" / "things" / entry.sequence / "metrics.json"
        if entry.sequence != "d":
            result = json.loads(file.read_text())
            names = [str(number) for number in entry.frames]
            inputs = [names[i] for i in protocol.choose_views(len(names), 2, entry.index)]
            assert result["input_frames"] == inputs
            assert result["target_frames"] == [name for name in names if name not in inputs]

    # Alone, from its list, and by the main command a sequence gives what it gave among others.
    protocol.save_list([protocol.paper_list(tree, "things")[3]], tmp_path / "one.json")
    alone, made = run(*QUICK, "--list", tmp_path / "one.json", "--out", tmp_path / "alone", **flags)
    assert made == [("e", 3)]
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert alone["sequences"]["e"] == summary["sequences"]["e"]
    argv = ["--root", tree, "--category", "things", "--sequence", "e", "--targets", 0, "--device", "cpu",
            "--weights", tmp_path / "tiny.pt", "--out", tmp_path / "main", *QUICK]
    distill.main([str(x) for x in argv])
    assert json.loads((tmp_path / "main" / "metrics.json").read_text())["methods"] == summary["sequences"]["e"]

    # Killed after two and repeated, the same table; the repaired picture completes it.
    (tmp_path / "out" / "things" / "b" / "metrics.json").unlink()
    again, made = run(*QUICK, **flags)
    assert [name for name, _ in made] == ["b", "d"] and again["mean"] == summary["mean"]
    (tree / "things" / "d" / "images" / "3.png").write_bytes((tree / "things" / "d" / "images" / "4.png").read_bytes())
    whole, made = run(*QUICK, **flags)
    assert [name for name, _ in made] == ["d"] and whole["instances"] == 4 and not whole["left_out"]


@pytest.fixture
def threads():
    """A function that sets the number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_workers_and_shares_change_nothing(tmp_path, monkeypatch, forked, threads):
    tree = trees.write(tmp_path / "co3d", {"a": 12, "b": 11, "c": 12})
    sparsefusion.save(tiny_model(), tmp_path / "tiny.pt")

    def evaluation(out, *flags):
        argv = ["--root", tree, "--category", "all", "--weights", tmp_path / "tiny.pt", "--device", "cpu",
                "--targets", 2, "--out", tmp_path / out, *flags, *QUICK]
        evaluate.main([str(x) for x in argv])
        return json.loads((tmp_path / out / "evaluation.json").read_text())["sequences"]

    # As many threads as each of two processes gets: sums are added in another order by more.
    threads(max(1, (os.cpu_count() or 1) // 2))
    one = evaluation("one")
    assert evaluation("two", "--workers", 2) == one
    for rank in (1, 0):  # as torchrun sets them
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "0")
        shares = evaluation("shares")
    assert shares == one


def test_strict_stops_at_a_bad_sequence(run, tmp_path, capsys):
    tree = trees.write(tmp_path / "co3d", {"a": 12, "b": 12})
    (tree / "things" / "a" / "masks" / "1.png").unlink()
    with pytest.raises(SystemExit):
        run(*QUICK, "--strict", "--targets", 1, root=tree, category="things")
    assert "1.png" in capsys.readouterr().err and not (tmp_path / "out" / "things" / "b").exists()


def test_a_full_disk_stops_it(run, monkeypatch, capsys):
    """It would be full for the other sequences, too; what a sequence lacks leaves out that one alone."""
    calls = []

    def fail(instance, *args):
        calls.append(instance)
        raise OSError(number, "too bad", "field.pt")

    monkeypatch.setattr(evaluate, "run_instance", fail)
    for number, count in ((errno.ENOSPC, 1), (errno.EACCES, 2)):
        calls.clear()
        with pytest.raises(SystemExit) as e:
            run(*QUICK)
        error = capsys.readouterr().err
        assert e.value.code == 2 and len(calls) == count and "field.pt" in error and len(error.splitlines()) == 1


def test_a_samples_noise_is_the_views_own(run, tmp_path):
    """One target or three, the VLDM's sample of a view is the same picture."""
    run("--targets", 1, instances=1)
    run("--targets", 3, "--out", tmp_path / "three", instances=1)
    folder = Path("toys") / "toy_1000_00000" / "views"
    one = {p.name: p.read_bytes() for p in (tmp_path / "out" / folder).glob("*_vldm.png")}
    three = {p.name: p.read_bytes() for p in (tmp_path / "three" / folder).glob("*_vldm.png")}
    shared = one.keys() & three.keys()
    assert len(one) == 1 and len(three) == 3 and shared and len(set(three.values())) == 3
    assert all(one[name] == three[name] for name in shared)


# --- what is taken up ---

def test_an_interrupted_evaluation_goes_on(run, tmp_path, capsys, monkeypatch):
    """SIGTERM in the second sequence's distillation: exit code 143, and the same numbers afterwards."""
    steps, step = itertools.count(1), Distillation.step
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # whatever the tests' parent process ignores

    def interrupted(*args):
        if next(steps) == 2 * SHORT.iterations + 2:  # two fits a sequence
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(Distillation, "step", interrupted)
        run("--targets", 1)
    signal.signal(signal.SIGTERM, before)
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 143 and len(lines) == 1 and "has 2 of 6 iterations" in lines[0]
    summary, made = run("--targets", 1)
    assert [name for name, _ in made] == ["toy_1000_00001"]
    assert "resumed at iteration 2" in capsys.readouterr().out
    assert summary["sequences"] == run("--targets", 1, "--out", tmp_path / "straight")[0]["sequences"]


def test_names_in_a_list_are_no_paths(run, tmp_path, capsys):
    """A list from somebody may name any category and sequence; results stay below --out."""
    entry = protocol.paper_list(SAMPLE, "toys")[0].row()
    files.save_json([entry, entry | {"sequence": "../../../x"}, entry | {"category": "/y"}], tmp_path / "list.json")
    summary, _ = run("--list", tmp_path / "list.json", *QUICK, "--targets", 1)
    assert summary["instances"] == 1 and len(summary["left_out"]) == 2
    assert capsys.readouterr().out.count("no names for folders") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"list.json", "out", "tiny.pt"}


def test_only_results_of_the_same_settings_are_taken_up(run, tmp_path, capsys, monkeypatch):
    names, flags = ["toy_1000_00000", "toy_1000_00001"], ["--targets", 1, *QUICK]
    fresh, made = run(*flags)
    assert made == [(names[0], 0), (names[1], 1)] and fresh["instances"] == 2
    capsys.readouterr()
    again, made = run(*flags)
    assert again == fresh and not made and "2 of 2 sequences are there already" in capsys.readouterr().out
    (tmp_path / "tiny.pt").touch()
    assert not run(*flags)[1]  # the same weights

    # Other settings, other weights or an edited preset: refused in one line, or replaced where that is asked for.
    for other, word in ((["--seed", 1], "seed"), (["--set", "weight_opacity=0.01"], "config")):
        with pytest.raises(SystemExit):
            run(*flags, *other)
        assert f"{word} differ" in capsys.readouterr().err
    assert run(*flags, "--seed", 1, "--overwrite")[1] == [(names[0], 1), (names[1], 2)]
    sparsefusion.save(tiny_model(seed=5), tmp_path / "tiny.pt")
    assert len(run(*flags, "--seed", 1, "--overwrite")[1]) == 2
    monkeypatch.setitem(PRESETS, "nano", replace(SHORT, weight_opacity=0.02))
    assert len(run(*flags, "--seed", 1, "--overwrite")[1]) == 2


def test_files_that_changed_are_read_again(run, tmp_path):
    tree = trees.write(tmp_path / "co3d", {"a": 12})
    flags = dict(root=tree, category="things")
    run(*QUICK, "--targets", 1, **flags)
    assert not run(*QUICK, "--targets", 1, **flags)[1]
    image = tree / "things" / "a" / "images" / "3.png"
    image.write_bytes((tree / "things" / "a" / "images" / "4.png").read_bytes() + b" ")
    assert len(run(*QUICK, "--targets", 1, "--overwrite", **flags)[1]) == 1


# --- tables ---

def rows(*psnrs):
    """A method and the EFT on some sequences."""
    return [{"eft": {"psnr": theirs, "perceptual": 1.0}, "sparsefusion": {"psnr": ours, "perceptual": 0.5, "iou": 0.9}}
            for ours, theirs in psnrs]


def test_means_errors_and_pairs_by_hand():
    some = rows((24.0, 22.0), (26.0, 25.0), (21.0, 21.5))
    mean = means(some)["sparsefusion"]["psnr"]
    assert mean == pytest.approx({"mean": 71 / 3, "error": (19 / 3 / 3) ** 0.5})
    pair = paired(some, "sparsefusion", "eft")
    error = ((7 / 6) ** 2 + (1 / 6) ** 2 + (8 / 6) ** 2) ** 0.5 / 6**0.5
    assert pair["psnr"] == pytest.approx({"mean": 2.5 / 3, "error": error, "wins": 2})
    assert pair["perceptual"]["wins"] == 3 and "iou" not in pair
    assert mean_and_error([2.0]) == {"mean": 2.0, "error": 0.0}


def test_markdown_and_text():
    text = markdown(rows((24.0, 22.0), (26.0, 25.0)), "a network")
    assert "| EFT | 23.50 ± 1.50 | - | 1.000 ± 0.000 | - |" in text
    assert "| EFT | +1.50 ± 0.50 (2 of 2) | - | -0.500 ± 0.000 (2 of 2) | - |" in text
    assert table(rows((24.0, 22.0))[0]).splitlines()[1].split() == ["EFT", "22.00", "-", "1.000", "-"]
    field = markdown([{"ngp": {"psnr": 20.0}}], "a network")
    assert "SparseFusion" not in field
