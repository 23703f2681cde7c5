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
    """Somebody asked this process to stop, by the signal `number`: Ctrl-C or SIGTERM.

    Its notes say what is saved. Not an `Exception`: whoever expects errors does not mean this.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class _Stop:
    """What this process was asked, and whether it is in the middle of something."""
    asked: int | None = None  # number of the signal
    whole: int = 0            # pieces of work, one within another, that are not to be cut
    again = signal.SIG_DFL    # what the next signal does: what signals do without us


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM raise `Interrupted`: at once, or where `whole` or a step of `Progress` ends. A second
    signal kills.
    """
    # Only the main thread hears signals. A signal that the parent process ignores stays ignored.
    numbers = [] if threading.current_thread() is not threading.main_thread() else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, _ask)

    try:
        yield
    finally:
        _Stop.asked = None
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _ask(number: int, frame) -> None:
    """A signal has come."""
    signal.signal(signal.SIGINT, _Stop.again)
    signal.signal(signal.SIGTERM, _Stop.again)
    _Stop.asked = number

    # Other processes end their steps, too.
    for process in multiprocessing.active_children():
        process.terminate()
    if not _Stop.whole:
        heed()


def heed() -> None:
    """Raises `Interrupted` if somebody asked."""
    if _Stop.asked is not None:
        raise Interrupted(_Stop.asked)


@contextmanager
def whole() -> Iterator[None]:
    """A piece of work that is not to be cut: a signal waits for its end, or for that of a step of `Progress` within."""
    _Stop.whole += 1
    try:
        yield
    finally:
        _Stop.whole -= 1
    if not _Stop.whole:
        heed()


# ---------------------------------------------------------------------------------------------- processes

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
            # All of them begin now. A pool watches none that it has begun since something last came back.
            with _deaf_children():
                begun = pool.map(abs, range(workers))  # any job
            list(begun)
            yield from pool.map(partial(_do_job, function), jobs)
        except BrokenProcessPool:
            # The pool asks the others to end and waits for them, but they wait for a job before they heed it.
            for process in multiprocessing.active_children():
                if process not in strangers:
                    process.kill()
            heed()  # or it died because it was asked to
            raise


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that begin within hear no SIGTERM until they know what to do about it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_process(threads: int) -> None:
    """One of several processes: Ctrl-C is its parent's, whose SIGTERM it heeds where a step ends."""
    torch.set_num_threads(threads)
    spare_the_cpu()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    # A signal to all processes comes twice: the parent passes it on.
    _Stop.again = signal.SIG_IGN
    _Stop.whole = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _ask)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_with_parent() -> None:
    """End this process where its parent has been killed: it would wait for another job for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _do_job(function: Callable, job):
    heed()
    return function(job)
