"""Seeded draws, stopping, signs of life, several processes."""
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
import types
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

import pytest
import torch

from common import runtime
from common.runtime import Progress


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


# --- stopping ---

@pytest.fixture
def heard():
    """Signals are heard in this test, whatever the tests' parent process ignores."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in numbers)  # as it was
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def in_time():
    """A test that hangs fails after a minute."""
    def end(number, frame):
        """What the alarm does."""
        for process in multiprocessing.active_children():
            process.kill()
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once_where_nothing_is_to_lose(number, heard):
    with pytest.raises(runtime.Interrupted) as e, runtime.stoppable():
        signal.raise_signal(number)
        pytest.fail("it went on")
    assert e.value.number == number
    runtime.heed()  # it is over


def test_a_signal_waits_for_the_end_of_a_whole(heard):
    done = []
    with pytest.raises(runtime.Interrupted), runtime.stoppable(), runtime.whole():
        with runtime.whole():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)
        done.append(2)
    assert done == [1, 2]


@pytest.mark.parametrize("title", [None, "fitting"])
def test_a_signal_waits_for_the_end_of_a_step(title, heard):
    """Even in something whole, which can save what the steps made."""
    halves = []
    with pytest.raises(runtime.Interrupted), runtime.stoppable(), runtime.whole():
        for step in Progress(range(5), title):
            halves.append(step)
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            halves.append(step)
    assert halves == [0, 0, 1, 1, 2, 2]


def test_a_second_signal_kills(heard):
    with pytest.raises(runtime.Interrupted), runtime.stoppable(), runtime.whole():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_the_parent_ignores_stays_ignored(heard):
    """As under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with runtime.stoppable():
        signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) == signal.SIG_IGN


def slow(folder):
    """A job of steps, which ends one that has begun. That of folder "a" asks all processes to stop, as a shell would,
    once both jobs have begun.
    """
    for step in Progress(range(100), None):
        (folder / f"{step}_begun").touch()
        if step == 0 and folder.name == "a":
            while not folder.with_name("b").joinpath("0_begun").exists():
                time.sleep(0.01)
            for process in (os.getpid(), os.getppid()):
                os.kill(process, signal.SIGTERM)
        time.sleep(0.1)
        (folder / f"{step}_ended").touch()


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms")
def test_other_processes_end_their_steps(tmp_path, heard, in_time):
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(runtime.Interrupted), runtime.stoppable():
        list(runtime.map_processes(slow, [tmp_path / "a", tmp_path / "b"], 2))
    for folder in tmp_path.iterdir():
        begun = len(list(folder.glob("*_begun")))
        assert 1 <= begun < 50 and begun == len(list(folder.glob("*_ended")))


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


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(runtime.time, "monotonic", lambda: self.now)


def test_lines_of_a_plan(capsys, monkeypatch):
    """Three steps of 10, 100 and 50 s as planned; all take twice as long. The first is over before it says anything."""
    clock = Clock(monkeypatch)
    with runtime.planned({"loading": 10, "fitting": 100, "meshing": 50}):
        runtime.begin("loading")
        clock.now += 20
        for _ in Progress(range(10), "fitting"):
            clock.now += 20
        for _ in Progress(range(2), "not planned"):
            pass
        runtime.begin("meshing")
        clock.now += 100
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["step 2 of 3, fitting: 1 of 10, about 3 min left, 5 min to the end",
                         "step 2 of 3, fitting: 3 of 10, about 2 min left, 4 min to the end"]
    assert lines[-1] == "step 2 of 3, fitting: 9 of 10, about 20 s left, 2 min to the end" and len(lines) == 5


def test_a_plan_of_which_an_earlier_run_has_done_a_part(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with runtime.planned({"fitting": 100, "meshing": 50}):
        for _ in Progress(range(8, 10), "fitting", start=8, total=10):
            clock.now += 40
    line = capsys.readouterr().err.splitlines()[0]
    assert line == "step 1 of 2, fitting: 9 of 10, about 40 s left, 4 min to the end"  # 40 s for 10, so 200 s for 50
    assert runtime.Plan.active is None


def test_seconds_by_step(monkeypatch):
    """Of steps with progress and without, in several parts, and of the one that runs."""
    clock = Clock(monkeypatch)
    assert runtime.seconds_by_step() == {}
    with runtime.planned({"loading": 1, "fitting": 1, "meshing": 1}):
        runtime.begin("loading")
        clock.now += 2
        for _ in Progress(range(4), "fitting"):
            clock.now += 1.26
        runtime.begin("loading")
        clock.now += 1
        assert runtime.seconds_by_step() == {"loading": 3.0, "fitting": 5.0}
        runtime.begin("meshing")
        assert runtime.seconds_by_step() == {"loading": 3.0, "fitting": 5.0, "meshing": 0.0}


def test_a_step_without_progress_says_so_after_a_silence(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with runtime.planned({"a": 1, "b": 1, "c": 1}):
        for title in "abc":
            runtime.begin(title)
            clock.now += 20
        runtime.begin("not planned")
    assert capsys.readouterr().err.splitlines() == ["step 3 of 3, c"]


def test_times_for_people():
    assert [runtime.duration(x) for x in (0, 119.4, 120, 5400, 9000)] == ["0 s", "119 s", "2 min", "90 min", "2.5 h"]


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


def die_or_wait(job):
    """One process dies two seconds after the other has begun to wait so long, or has nothing left to do."""
    path, seconds = job
    path.touch()
    if seconds is not None:
        time.sleep(seconds)
        return
    while not path.with_name("other").exists():
        time.sleep(0.1)
    time.sleep(2)
    os._exit(1)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms")
@pytest.mark.parametrize("seconds", [0, 300])
@pytest.mark.parametrize("place", [0, 1])
def test_a_process_that_dies_takes_the_others_along(tmp_path, in_time, monkeypatch, place, seconds):
    """Those of its pool: the other one, begun before or after it, waits for the end of its job or for another job."""
    begin = ProcessPoolExecutor._adjust_process_count

    def begin_late(pool):
        """After the thread that watches processes has looked which there are."""
        time.sleep(0.3)
        begin(pool)

    monkeypatch.setattr(ProcessPoolExecutor, "_adjust_process_count", begin_late)
    stranger = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,), daemon=True)
    stranger.start()
    jobs = [(tmp_path / "other", seconds)]
    jobs.insert(place, (tmp_path / "one", None))
    with pytest.raises(BrokenProcessPool):
        list(runtime.map_processes(die_or_wait, jobs, 2))
    assert multiprocessing.active_children() == [stranger]
    stranger.kill()
    stranger.join()


def list_processes(*args):
    list(runtime.map_processes(*args))


def wait_or_end(path):
    """One of two jobs goes on for five minutes, the other is over at once."""
    path.write_text(str(os.getpid()))
    if path.name == "waits":
        time.sleep(300)


def is_alive(pid):
    """Of a process that may be no child of this one."""
    try:
        os.kill(pid, 0)
        return not os.path.exists("/proc") or "zombie" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms")
def test_no_process_outlives_its_parent(tmp_path, in_time):
    paths = [tmp_path / "waits", tmp_path / "ends"]
    parent = multiprocessing.get_context("spawn").Process(target=list_processes, args=(wait_or_end, paths, 2))
    parent.start()
    while not all(path.exists() and path.read_text() for path in paths):
        time.sleep(0.1)
    parent.kill()
    parent.join()
    pids = [int(path.read_text()) for path in paths]
    end = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


# --- the machine ---

def test_memory_and_name_of_the_cpu():
    before = runtime.peak_gb("cpu")
    ballast = torch.ones(50_000_000)  # 0.2 GB
    if before is not None:  # some systems do not tell
        assert 0.05 < before < 1000 and runtime.peak_gb(torch.device("cpu")) >= 0.2
    assert ballast.sum() > 0 and runtime.device_name("cpu") == f"cpu, {torch.get_num_threads()} threads"


def test_jobs_in_threads():
    """In order; gradients off stays off; this thread's own number of threads is what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        def job(number):
            return number, torch.is_grad_enabled(), torch.get_num_threads(), threading.get_ident()
        with torch.no_grad():
            done = runtime.map_threads(job, list(range(6)))
        assert [x[:3] for x in done] == [(number, False, 1) for number in range(6)]
        assert threading.get_ident() not in {x[3] for x in done} and torch.get_num_threads() == 2
        assert runtime.map_threads(job, [7]) == [(7, True, 2, threading.get_ident())]
        nested = runtime.map_threads(lambda number: runtime.map_threads(job, [number, number]), [1, 2])
        assert [[x[0] for x in pair] for pair in nested] == [[1, 1], [2, 2]]  # and no thread waits for ever
    finally:
        torch.set_num_threads(before)


# --- memory ---

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

    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    runtime.spare_the_cpu()
    torch.set_flush_denormal(False)
    assert heard == calls


@pytest.mark.parametrize("broken", [OSError, TypeError, AttributeError])
def test_tiny_numbers_become_zero(broken, monkeypatch):
    """Also where the C library cannot be had, or is another one."""
    def absent(name):
        raise broken("no such library")

    monkeypatch.setattr(runtime.ctypes, "CDLL", absent)
    torch.set_flush_denormal(False)
    tiny = torch.tensor([1e-30])
    assert (tiny * 1e-9).item() > 0
    try:
        runtime.spare_the_cpu()
        assert (tiny * 1e-9).item() == 0 and (tiny * 1e-7).item() > 0
    finally:
        torch.set_flush_denormal(False)


# --- processes that are asked to end before they can heed it ---

def ask_at_once(path):
    """What a process does that is asked to end before it knows how: it lives on until it listens."""
    os.kill(os.getpid(), signal.SIGTERM)
    path.touch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    path.with_name("deaf").touch()


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks")
def test_a_process_that_begins_hears_no_signal(tmp_path):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with runtime._deaf_children():
        process = multiprocessing.get_context("spawn").Process(target=ask_at_once, args=(tmp_path / "alive",))
        process.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    process.join()
    assert (tmp_path / "alive").exists() and not (tmp_path / "deaf").exists() and process.exitcode == -signal.SIGTERM
