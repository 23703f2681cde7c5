"""Several processes of one training: the same numbers as one, one end for all; and trainings that are killed."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import files

ROOT = Path(__file__).resolve().parents[2]


def run(folder, *args):
    """What `tests.support.trainings` prints: of every training its processes' exit codes."""
    command = [sys.executable, "-m", "tests.support.trainings", args[0], folder, *args[1:]]
    done = subprocess.run([str(x) for x in command], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"XDG_CACHE_HOME": str(folder)})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of trainings in one process and in two, and the exit codes by name."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = [line.split(" ", 1) for line in run(folder, "ranks")]
    return folder, dict(lines)


def said(folder, name):
    """What a process wrote."""
    return (folder / f"{name}.log").read_text().splitlines()


@pytest.mark.parametrize("part", ["vae", "prior", "perceptual"])
def test_two_processes_train_as_one(part, two):
    folder, codes = two
    assert codes[f"{part}.1"] == "[0]" and codes[f"{part}.2"] == "[0, 0]"
    one = torch.load(folder / f"{part}.1.pt.seen.0")
    for rank in (0, 1):
        seen = torch.load(folder / f"{part}.2.pt.seen.{rank}")
        assert len(seen["losses"]) == len(one["losses"]) == 8
        for a, b in zip(seen["gradients"], one["gradients"], strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-5)
        assert torch.allclose(torch.tensor(seen["losses"]), torch.tensor(one["losses"]), rtol=1e-5)
    assert max(g.abs().max() for g in one["gradients"]) > 0.1

    # Held-out losses are the first process's alone.
    logs = [[json.loads(line)["losses"] for line in (folder / f"{part}.{count}.pt.run/log.jsonl").open()]
            for count in (1, 2)]
    assert [len(log) for log in logs] == [2, 2] and any(name.startswith("held-out ") for name in logs[0][0])
    for a, b in zip(*logs):
        assert a == pytest.approx(b, rel=1e-3)
    one, other = (files.read_tensors(folder / f"{part}.{count}.pt.state", "average")["average"] for count in (1, 2))
    for name in one:  # moments of batch norms, too
        assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4), name
    assert said(folder, f"{part}.2.0")[-1].startswith("next: python ") and said(folder, f"{part}.2.1") == []


def test_a_signal_to_one_process_stops_all_after_the_same_step(two):
    folder, codes = two
    assert codes["stopped.15"] == "[143, 143]"
    line = said(folder, "stopped.15.0")[-1]
    completed = files.read_tensors(folder / "stopped.15.pt.state", "module")["completed"]
    assert line.startswith("stopped by SIGTERM") and f"has {completed} of 10000 steps" in line
    assert said(folder, "stopped.15.1") == []


def test_the_death_of_one_process_ends_the_others(two):
    folder, codes = two
    assert codes["stopped.9"] == "[2, -9]"
    assert said(folder, "stopped.9.0")[-1].startswith("error: another process of this training has ended")


@pytest.mark.parametrize("name, words", [("odd", "batch 5: not a multiple of 2 processes"), ("none", "cars"),
                                         ("flag", "--steps")])
def test_one_of_them_says_what_is_wrong(name, words, two):
    folder, codes = two
    lines = [line for line in said(folder, f"{name}.0") if line.startswith("error:")]
    assert codes[name] == "[2, 2]" and len(lines) == 1 and words in lines[0] and said(folder, f"{name}.1") == []


def test_a_training_that_is_killed_again_and_again_is_the_same(tmp_path):
    """At random moments, by SIGKILL, SIGTERM or SIGINT. (Ten times: `python -m tests.support.trainings kills`.)"""
    lines = run(tmp_path, "kills", 2, 0)
    for name, code in map(str.split, lines[:-1]):
        number = getattr(signal, name)
        assert int(code) in (-number, 128 + number, 0)  # before the command began, later, or after its end
    assert len(lines) == 3 and lines[-1] == "whole 0"
    log = (tmp_path / "killed.log").read_text()
    assert "resuming killed.pt at step" in log and "Traceback" not in log
    whole, killed = (files.read_tensors(tmp_path / f"{name}.pt.state", "module") for name in ("whole", "killed"))
    assert whole["completed"] == killed["completed"] == 100
    logs = [(tmp_path / f"{name}.pt.run" / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    whole_log, killed_log = ({x["step"]: x["losses"] for x in map(json.loads, log)} for log in logs)
    assert len(killed_log) == len(logs[1]) >= len(whole_log) and killed_log | whole_log == killed_log
    for part in ("module", "average"):
        assert all(torch.equal(x, killed[part][name]) for name, x in whole[part].items())
