"""What long work needs, whatever the work is: seeded random numbers, signs of life, a way to stop it without losing
anything, more than one process, a look at the memory.
"""
from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait

import torch
from torch import Tensor
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3): freed bytes to keep, bytes that bypass the heap
LOG_SECONDS = 30  # between two lines of progress where the output is no terminal


# ---------------------------------------------------------------------------------------------- random numbers

def rand(*shape: int, generator: torch.Generator | None, device) -> Tensor:
    """Uniform numbers in [0, 1) of a shape, drawn where the generator lives and moved to `device`.

    A generator on the CPU gives the same numbers whatever device they are for.
    """
    return torch.rand(shape, generator=generator, device=_home(generator)).to(device)


def randn(*shape: int, generator: torch.Generator | None, device) -> Tensor:
    """Standard normal numbers of a shape, drawn where the generator lives and moved to `device`."""
    return torch.randn(shape, generator=generator, device=_home(generator)).to(device)


def _home(generator: torch.Generator | None) -> torch.device:
    # Without a generator torch's own draws, on the CPU.
    return torch.device("cpu") if generator is None else generator.device


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


# ---------------------------------------------------------------------------------------------- progress

class Plan:
    """The steps of a long command in their order, so that the progress of each can tell that of the whole.

    `costs`: title of a step -> about how long it takes beside the others, in any unit.
    """
    active: Plan | None = None  # of the command that runs

    def __init__(self, costs: dict[str, float]):
        self.costs = costs
        self.titles = list(costs)
        self.title = None                # of the step that runs
        self.share = 1.0                 # of it, that no earlier run has done
        self.began = time.monotonic()
        self.spoken = time.monotonic()   # when the last line was printed
        self.took = {}                   # title of a finished step -> seconds
        self.cost = 0.0                  # that was expected of them

    def begin(self, title: str, share: float = 1.0) -> None:
        """A step begins, or what an earlier run has left of it."""
        # The step before is over.
        now = time.monotonic()
        if self.title is not None:
            self.took = self.so_far()
            self.cost += self.share * self.costs[self.title]
        self.title = title
        self.share = share
        self.began = now

    def so_far(self) -> dict[str, float]:
        """Title of a step -> seconds, of the one that runs as well."""
        earlier = self.took.get(self.title, 0.0)
        return self.took | {self.title: earlier + time.monotonic() - self.began}

    def place(self) -> str:
        """Which step it is."""
        return f"step {self.titles.index(self.title) + 1} of {len(self.titles)}, "

    def left(self, done: float) -> float:
        """Seconds that the later steps may take, once a part `done` in (0, 1] of this one is done."""
        # As much longer than expected as all was so far.
        seconds = sum(self.so_far().values())
        cost = self.cost + done * self.share * self.costs[self.title]
        later = self.titles[self.titles.index(self.title) + 1:]
        return seconds / cost * sum(self.costs[title] for title in later)


@contextmanager
def planned(costs: dict[str, float]) -> Iterator[None]:
    """Within, `Progress` and `begin` tell which of these steps they are, and how long all may take. See `Plan`."""
    before = Plan.active
    Plan.active = Plan(costs)
    try:
        yield
    finally:
        Plan.active = before


def begin(title: str) -> None:
    """A step of the plan begins that has no progress of its own; in a log a line says so where the last one is long
    ago.
    """
    heed()
    plan = Plan.active
    if plan is None or title not in plan.costs:
        return
    plan.begin(title)
    if not sys.stderr.isatty() and time.monotonic() - plan.spoken >= LOG_SECONDS:
        print(f"{plan.place()}{title}", file=sys.stderr, flush=True)
        plan.spoken = time.monotonic()


def seconds_by_step() -> dict[str, float]:
    """How long each step of the plan took so far, rounded; empty where nothing is planned."""
    if Plan.active is None or Plan.active.title is None:
        return {}
    return {title: round(seconds, 1) for title, seconds in Plan.active.so_far().items()}


def duration(seconds: float) -> str:
    """A time for people: "50 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Progress:
    """Iterate and show how far: a bar in a terminal, a flushed line every half minute in a log. Without a title,
    nothing. A signal waits for the end of a step.

    `start` of `total` steps are done already, in an earlier run. `note` is shown behind the count.
    """

    def __init__(self, steps: Iterable, title: str | None, start: int = 0, total: int | None = None):
        self.steps = steps
        self.title = title
        self.start = start
        self.total = total if total is not None else start + len(steps)
        self.note = ""
        self.plan = None  # if this is one of its steps

    def __iter__(self) -> Iterator:
        # One of the steps of something longer?
        if Plan.active is not None and self.title in Plan.active.costs:
            self.plan = Plan.active
            self.plan.begin(self.title, 1 - self.start / max(self.total, 1))

        # A log file would keep every frame of a moving bar.
        if self.title is None:
            steps = self.steps
        elif sys.stderr.isatty():
            steps = self._bar()
        else:
            steps = self._lines()

        # Whoever wants to stop waits for the end of a step.
        for step in steps:
            with whole():
                yield step
            heed()

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        tqdm.write(text)
        sys.stdout.flush()

    def _bar(self) -> Iterator:
        place = self.plan.place() if self.plan else ""
        bar = tqdm(self.steps, place + self.title, self.total, initial=self.start, mininterval=0.5)
        for count, step in enumerate(bar, 1):
            yield step
            notes = [self.note] if self.note else []
            if self.plan:
                notes.append(f"then about {duration(self.plan.left(self._done(count)))}")
            bar.set_postfix_str(", ".join(notes), refresh=False)

    def _lines(self) -> Iterator:
        began = spoken = time.monotonic()
        for count, step in enumerate(self.steps, 1):
            yield step

            # Half a minute counts from the last line, whichever step of the plan it was of.
            now = time.monotonic()
            if self.plan:
                spoken = self.plan.spoken
            if now - spoken < LOG_SECONDS:
                continue
            spoken = now
            if self.plan:
                self.plan.spoken = now

            # Guess from the mean so far how long the rest takes.
            print(self._line(count, now - began), file=sys.stderr, flush=True)

    def _line(self, count: int, seconds: float) -> str:
        """How it goes after so many steps and seconds of this run."""
        done = self.start + count
        left = seconds / count * (self.total - done)
        place = ""
        later = ""
        if self.plan:
            place = self.plan.place()
            later = f", {duration(left + self.plan.left(self._done(count)))} to the end"
        note = f"; {self.note}" if self.note else ""
        return f"{place}{self.title}: {done} of {self.total}, about {duration(left)} left{later}{note}"

    def _done(self, count: int) -> float:
        """How much of what was left to this run is done after so many steps."""
        return count / max(self.total - self.start, 1)


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


# ---------------------------------------------------------------------------------------------- memory and threads

def spare_the_cpu() -> None:
    """Make this process faster on a CPU: a tenth of an iteration's time. For commands, before they begin.

    Numbers below 1e-38, which a processor handles by far slower routes, become 0. And memory that is freed stays with
    the process: every iteration asks for the same sizes again, and the system would have to empty each page anew.
    """
    torch.set_flush_denormal(True)
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc

    # An older one takes no more than 32 MB, and says so.
    if set_option(M_MMAP_THRESHOLD, 2**30) or set_option(M_MMAP_THRESHOLD, 2**25):
        set_option(M_TRIM_THRESHOLD, 2**30)


def map_threads(function: Callable, jobs: Sequence) -> list:
    """`function(job)` of every job, in their order, in as many threads as torch may use, each with one core.

    So a thread need not wait for the others after every operation of torch. Within a job there are no further threads,
    and autocast is off.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(jobs) == 1:
        return [function(job) for job in jobs]

    # Whether to record gradients is every thread's own business. The number of threads is half so: torch also gives a
    # thread, at its first operation, what another one has set last.
    recording = torch.is_grad_enabled()

    def work(job):
        """One job, with one core, recording gradients or not as the caller does."""
        torch.set_num_threads(1)
        with torch.set_grad_enabled(recording):
            return function(job)

    try:
        return list(_threads(threads).map(work, jobs))
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that are kept from one call to the next."""
    return ThreadPoolExecutor(count)


# ---------------------------------------------------------------------------------------------- the machine

def peak_gb(device: str | torch.device) -> float | None:
    """The most memory used so far, in 10^9 bytes: of the GPU if it is one (torch's cache included), else of this
    process.

    None where the system does not tell (Windows has no `resource`).
    """
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_reserved() / 1e9, 2)
    if resource is None:
        return None

    # Kilobytes, but bytes on a Mac.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def versions(device: str | torch.device) -> dict[str, str]:
    """What the numbers of a run may depend on beside its settings."""
    return {"python": platform.python_version(), "torch": torch.__version__, "device": device_name(device)}


def device_name(device: str | torch.device) -> str:
    """What numbers are made on: the GPU's name, or how many threads of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"
