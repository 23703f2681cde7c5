"""Seeded draws, threads and memory of a CPU."""
import threading
import types

import pytest
import torch

from common import machine
from common.machine import device_name, map_threads, peak_gb, rand, randn, spare_the_cpu, stream_seed


@pytest.mark.parametrize("draw,reference", [(rand, torch.rand), (randn, torch.randn)])
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
    assert torch.equal(rand(4, generator=None, device="cpu"), expected)


def test_streams_are_independent():
    streams = ["field", "path", "weights", "\ud800", *(f"{kind} {i}" for kind in ("iteration", "dropout")
                                                       for i in range(3000))]
    seeds = [stream_seed(seed, stream) for seed in (0, 1, 2**31 - 1) for stream in streams]
    assert max(seeds) < 2**32 and len(set(seeds)) == len(seeds)
    assert stream_seed(0, "field") == stream_seed(0, "field")

    # What a generator on the CPU makes of further bits.
    first, second = (rand(4, generator=torch.Generator().manual_seed(x), device="cpu") for x in (5, 5 + 2**40))
    assert torch.equal(first, second)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_are_the_same_for_every_device():
    numbers = randn(5, generator=torch.Generator().manual_seed(1), device="cuda")
    assert numbers.is_cuda
    assert torch.equal(numbers.cpu(), torch.randn(5, generator=torch.Generator().manual_seed(1)))


def test_memory_and_name_of_the_cpu():
    before = peak_gb("cpu")
    ballast = torch.ones(50_000_000)  # 0.2 GB
    if before is not None:  # some systems do not tell
        assert 0.05 < before < 1000 and peak_gb(torch.device("cpu")) >= 0.2
    assert ballast.sum() > 0 and device_name("cpu") == f"cpu, {torch.get_num_threads()} threads"


def test_jobs_in_threads():
    """In order; gradients off stays off; this thread's own number of threads is what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        def job(number):
            return number, torch.is_grad_enabled(), torch.get_num_threads(), threading.get_ident()
        with torch.no_grad():
            done = map_threads(job, list(range(6)))
        assert [x[:3] for x in done] == [(number, False, 1) for number in range(6)]
        assert threading.get_ident() not in {x[3] for x in done} and torch.get_num_threads() == 2
        assert map_threads(job, [7]) == [(7, True, 2, threading.get_ident())]
        nested = map_threads(lambda number: map_threads(job, [number, number]), [1, 2])
        assert [[x[0] for x in pair] for pair in nested] == [[1, 1], [2, 2]]  # and no thread waits for ever
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("most, calls", [
    (2**30, [(-3, 2**30), (-1, 2**30)]),
    (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**30)]),
    (0, [(-3, 2**30), (-3, 2**25)]),
])
def test_freed_memory_stays(most, calls, monkeypatch):
    """By a C library that takes numbers up to some most; one that takes none keeps its own ways."""
    heard = []

    def mallopt(option, number):
        heard.append((option, number))
        return int(option == -1 or number <= most)

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    spare_the_cpu()
    torch.set_flush_denormal(False)
    assert heard == calls


@pytest.mark.parametrize("broken", [OSError, TypeError, AttributeError])
def test_tiny_numbers_become_zero(broken, monkeypatch):
    """Also where the C library cannot be had, or is another one."""
    def absent(name):
        raise broken("no such library")

    monkeypatch.setattr(machine.ctypes, "CDLL", absent)
    torch.set_flush_denormal(False)
    tiny = torch.tensor([1e-30])
    assert (tiny * 1e-9).item() > 0
    try:
        spare_the_cpu()
        assert (tiny * 1e-9).item() == 0 and (tiny * 1e-7).item() > 0
    finally:
        torch.set_flush_denormal(False)
