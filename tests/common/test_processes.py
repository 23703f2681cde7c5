"""Stopping, and several processes."""
import multiprocessing
import os
import pathlib
import signal
import time
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

import pytest
import torch

from common import processes
from common.progress import Progress


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
    with pytest.raises(processes.Interrupted) as e, processes.stoppable():
        signal.raise_signal(number)
        pytest.fail("it went on")
    assert e.value.args == (number,)
    processes.check_interrupt()  # it is over


def test_a_signal_waits_for_the_end_of_uninterruptible_work(heard):
    done = []
    with pytest.raises(processes.Interrupted), processes.stoppable(), processes.uninterruptible():
        with processes.uninterruptible():
            signal.raise_signal(signal.SIGTERM)
            done.append(1)
        done.append(2)
    assert done == [1, 2]


@pytest.mark.parametrize("title", [None, "fitting"])
def test_a_signal_waits_for_the_end_of_a_step(title, heard):
    """Even in something uninterruptible, which can save what the steps made."""
    halves = []
    with pytest.raises(processes.Interrupted), processes.stoppable(), processes.uninterruptible():
        for step in Progress(range(5), title):
            halves.append(step)
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            halves.append(step)
    assert halves == [0, 0, 1, 1, 2, 2]


def test_a_second_signal_kills(heard):
    with pytest.raises(processes.Interrupted), processes.stoppable(), processes.uninterruptible():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_the_parent_ignores_stays_ignored(heard):
    """As under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with processes.stoppable():
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
            for process in (os.getpid(), multiprocessing.parent_process().pid):
                os.kill(process, signal.SIGTERM)
        time.sleep(0.1)
        (folder / f"{step}_ended").touch()


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms")
def test_other_processes_end_their_steps(tmp_path, forked, heard, in_time):
    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(processes.Interrupted), processes.stoppable():
        list(processes.map_processes(slow, [tmp_path / "a", tmp_path / "b"], 2))
    for folder in tmp_path.iterdir():
        begun = len(list(folder.glob("*_begun")))
        assert 1 <= begun < 50 and begun == len(list(folder.glob("*_ended")))


def square(x):
    return x * x, os.getpid(), torch.get_num_threads()


def fail(x):
    if x == 2:
        raise ValueError("two")
    return x


@pytest.mark.parametrize("workers,jobs", [(1, 3), (0, 3), (4, 1), (4, 0)])
def test_one_process_is_this_one(workers, jobs):
    results = list(processes.map_processes(square, list(range(jobs)), workers))
    assert [value for value, *_ in results] == [x * x for x in range(jobs)]
    assert all(pid == os.getpid() for _, pid, _ in results)


def test_several_processes_keep_the_order_and_share_the_cores():
    results = list(processes.map_processes(square, list(range(6)), 2))
    assert [value for value, *_ in results] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {pid for _, pid, _ in results}
    assert {threads for *_, threads in results} == {max(1, os.cpu_count() // 2)}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_job_arrives(workers, forked):
    results = processes.map_processes(fail, [0, 1, 2, 3], workers)
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
@pytest.mark.parametrize("place, seconds", [(0, 0), (1, 300)])
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
        list(processes.map_processes(die_or_wait, jobs, 2))
    assert multiprocessing.active_children() == [stranger]
    stranger.kill()
    stranger.join()


def list_processes(*args):
    list(processes.map_processes(*args))


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
