"""Seeded draws, signs of life, several processes."""
import os
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

import runtime
from runtime import Progress


# --- random numbers ---

@pytest.mark.parametrize("draw,reference", [(runtime.rand, torch.rand), (runtime.randn, torch.randn)])
def test_draws_are_the_generators(draw, reference):
    expected = reference(2, 3, generator=torch.Generator().manual_seed(5))
    for device in ("cpu", torch.device("cpu")):
        numbers = draw(2, 3, generator=torch.Generator().manual_seed(5), device=device)
        assert numbers.dtype == torch.float32 and torch.equal(numbers, expected)
    generator = torch.Generator().manual_seed(5)
    assert draw(generator=generator, device="cpu").shape == ()
    assert not torch.equal(draw(2, 3, generator=generator, device="cpu"), expected)


def test_without_a_generator_draws_are_torchs_own():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(runtime.rand(4, generator=None, device="cpu"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_are_the_same_for_every_device():
    numbers = runtime.randn(5, generator=torch.Generator().manual_seed(1), device="cuda")
    assert numbers.is_cuda
    assert torch.equal(numbers.cpu(), torch.randn(5, generator=torch.Generator().manual_seed(1)))


# --- progress ---

def test_silent(capsys, monkeypatch):
    monkeypatch.setattr(runtime, "LOG_SECONDS", 0)
    assert list(Progress(range(3), None)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_lines_in_a_log(capsys, monkeypatch):
    """A clock that advances ten seconds a look: half a minute is three steps."""
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(runtime.time, "monotonic", lambda: next(seconds))
    progress = Progress(range(100, 108), "fitting", start=100)
    steps = []
    for step in progress:
        progress.note = f"loss {step}"
        steps.append(step)
    assert steps == list(range(100, 108))
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "fitting: 103 of 108, about 50 s left; loss 102",
        "fitting: 106 of 108, about 20 s left; loss 105"]


def test_a_quick_thing_says_nothing_in_a_log(capsys):
    assert len(list(Progress([7] * 5, "quick"))) == 5
    assert capsys.readouterr() == ("", "")


def test_a_total_for_steps_without_a_length(capsys, monkeypatch):
    monkeypatch.setattr(runtime, "LOG_SECONDS", 0)
    assert list(Progress(iter("ab"), "letters", total=2)) == ["a", "b"]
    err = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in err] == ["letters: 1 of 2", "letters: 2 of 2"]


def test_a_bar_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(range(10, 13), "fitting", start=10)
    for step in progress:
        progress.note = f"loss {step}"
    err = capsys.readouterr().err
    assert "fitting" in err and "10/13" in err


# --- processes ---

def square(x):
    return x * x, os.getpid(), torch.get_num_threads()


def fail(x):
    if x == 2:
        raise ValueError("two")
    return x


def die(x):
    os._exit(1)


@pytest.mark.parametrize("workers,jobs", [(1, 3), (0, 3), (4, 1), (4, 0)])
def test_one_process_is_this_one(workers, jobs):
    results = list(runtime.map_processes(square, list(range(jobs)), workers))
    assert [value for value, *_ in results] == [x * x for x in range(jobs)]
    assert all(pid == os.getpid() for _, pid, _ in results)


def test_several_processes_keep_the_order_and_share_the_cores():
    results = list(runtime.map_processes(square, list(range(6)), 2))
    assert [value for value, *_ in results] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {pid for _, pid, _ in results}
    assert {threads for *_, threads in results} == {max(1, os.cpu_count() // 2)}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_job_arrives(workers):
    results = runtime.map_processes(fail, [0, 1, 2, 3], workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_a_process_that_dies_is_noticed():
    with pytest.raises(BrokenProcessPool):
        list(runtime.map_processes(die, [0, 1], 2))


# --- the machine ---

def test_memory_and_name_of_the_cpu():
    before = runtime.peak_gb("cpu")
    ballast = torch.ones(50_000_000)  # 0.2 GB
    if before is not None:  # some systems do not tell
        assert 0.05 < before < 1000 and runtime.peak_gb(torch.device("cpu")) >= 0.2
    assert ballast.sum() > 0 and runtime.device_name("cpu") == f"cpu, {torch.get_num_threads()} threads"
