"""Work that can be stopped without losing anything, and work that several processes share.
"""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait

import torch

from common.machine import spare_the_cpu


# ---------------------------------------------------------------------------------------------- stopping

class Interrupted(BaseException):
    """This process was asked to stop, by Ctrl-C or SIGTERM: `args` has the signal's number, the notes what is saved.

    Not an `Exception`: a handler of errors does not mean this.
    """


class _Stop:
    """What this process was asked, and whether it is in the middle of something."""
    number: int | None = None  # of the signal
    uninterruptible: int = 0   # pieces of work, one within another


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM raise `Interrupted`: at once, or where `uninterruptible` or a step of `Progress` ends.
    A second signal kills.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)

    try:
        yield
    finally:
        _Stop.number = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame) -> None:
    """A signal has come; the next one kills."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _note(number, frame)
    if not _Stop.uninterruptible:
        check_interrupt()


def _note(number: int, frame) -> None:
    """A signal has come, for `check_interrupt`."""
    _Stop.number = number


def asked() -> int:
    """The number of the signal that has come, or 0."""
    return _Stop.number or 0


def check_interrupt() -> None:
    """Raises `Interrupted` if a signal has come; other processes end their steps, too."""
    if _Stop.number is not None:
        for process in multiprocessing.active_children():
            process.terminate()
        raise Interrupted(_Stop.number)


@contextmanager
def uninterruptible() -> Iterator[None]:
    """A piece of work that is not to be cut: a signal waits for its end, or for that of a step of `Progress` within."""
    _Stop.uninterruptible += 1
    try:
        yield
    finally:
        _Stop.uninterruptible -= 1
    if not _Stop.uninterruptible:
        check_interrupt()


# ---------------------------------------------------------------------------------------------- processes

def is_first(rank: str = "RANK") -> bool:
    """Whether this is the process that speaks for all that `torchrun` has started for one command, or the only one;
    by "LOCAL_RANK" of those on this machine. Those of `map_processes` never do.
    """
    return os.environ.get(rank, "0") == "0" and multiprocessing.parent_process() is None


def map_processes(function: Callable, jobs: list, workers: int) -> Iterator:
    """`function(job)` of every job, in their order, by as many processes as `workers`, which share the cores; 1: by
    this one.

    Processes are spawned, since a fork of one with CUDA or threads can hang. Where one dies the others are killed, and
    it raises `BrokenProcessPool`; where this one is killed they end.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return

    # Each process takes its share of the cores, or they would get in one another's way.
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    strangers = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, context, _begin_process, (threads,)) as pool:
        try:
            # All of them begin before the first job: a pool watches none that it has begun since something last came
            # back, and a signal would kill one that does not know yet what to do about it.
            with uninterruptible():
                list(pool.map(abs, range(workers)))
            yield from pool.map(partial(_do_job, function), jobs)
        except BrokenProcessPool:
            # The pool asks the others to end and waits for them, but they wait for a job before they check.
            for process in multiprocessing.active_children():
                if process not in strangers:
                    process.kill()
            check_interrupt()  # or it died because it was asked to
            raise


def _begin_process(threads: int) -> None:
    """One of several processes: Ctrl-C is its parent's, whose SIGTERM ends it where a step ends."""
    torch.set_num_threads(threads)
    spare_the_cpu()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _note)


def _end_with_parent() -> None:
    """End this process where its parent has been killed: it would wait for another job for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _do_job(function: Callable, job):
    """`function(job)`, unless this process was asked to end."""
    check_interrupt()
    return function(job)
