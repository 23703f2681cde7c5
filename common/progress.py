"""Signs of life of long work: a bar in a terminal, a line every half minute in a log.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from common.processes import heed, whole

LOG_SECONDS = 30  # between two lines of progress where the output is no terminal


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
