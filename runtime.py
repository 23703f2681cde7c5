"""What long work needs, whatever the work is: seeded random numbers, signs of life, more than one process, a look at
the memory.
"""
from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

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


# ---------------------------------------------------------------------------------------------- progress

class Progress:
    """Iterate and show how far: a bar in a terminal, a flushed line every half minute in a log. Without a title,
    nothing.

    `start` of `total` steps are done already, in an earlier run. `note` is shown behind the count.
    """

    def __init__(self, steps: Iterable, title: str | None, start: int = 0, total: int | None = None):
        self.steps = steps
        self.title = title
        self.start = start
        self.total = total if total is not None else start + len(steps)
        self.note = ""

    def __iter__(self) -> Iterator:
        # A log file would keep every frame of a moving bar.
        if self.title is None:
            yield from self.steps
        elif sys.stderr.isatty():
            yield from self._bar()
        else:
            yield from self._lines()

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        tqdm.write(text)
        sys.stdout.flush()

    def _bar(self) -> Iterator:
        bar = tqdm(self.steps, self.title, self.total, initial=self.start, mininterval=0.5)
        for step in bar:
            yield step
            bar.set_postfix_str(self.note, refresh=False)

    def _lines(self) -> Iterator:
        began = spoken = time.monotonic()
        for count, step in enumerate(self.steps, 1):
            yield step

            # Guess from the mean so far how long the rest takes.
            now = time.monotonic()
            if now - spoken >= LOG_SECONDS:
                done = self.start + count
                left = (now - began) / count * (self.total - done)
                note = f"; {self.note}" if self.note else ""
                line = f"{self.title}: {done} of {self.total}, about {left:.0f} s left{note}"
                print(line, file=sys.stderr, flush=True)
                spoken = now


# ---------------------------------------------------------------------------------------------- processes

def map_processes(function: Callable, jobs: list, workers: int) -> Iterator:
    """`function(job)` of every job, in their order, by as many processes as `workers`, which share the cores; 1: by
    this one.

    Processes are spawned, since a fork of one with CUDA or threads can hang; one that dies raises `BrokenProcessPool`.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return

    # Each process takes its share of the cores, or they would get in one another's way.
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        yield from pool.map(function, jobs)


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


def device_name(device: str | torch.device) -> str:
    """What numbers are made on: the GPU's name, or how many threads of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"
