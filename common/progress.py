"""Progress of long work: a bar in a terminal, a line every half minute in a log.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from common.processes import check_interrupt, is_first, uninterruptible

LOG_SECONDS = 30  # between two lines of progress where the output is no terminal


class Progress:
    """Iterate and show how far: a bar in a terminal, a flushed line every half minute in a log. Without a title,
    nothing. A signal waits for the end of a step.

    `start` of `total` steps are done already, in an earlier run. `check` raises where a signal has come, after a step.
    `note` is shown behind the count.
    """

    def __init__(self, steps: Iterable, title: str | None, start: int = 0, total: int | None = None,
                 check: Callable[[], None] = check_interrupt):
        self.steps = steps
        self.title = title if is_first() else None
        self.check = check
        self.start = start
        self.total = total if total is not None else start + len(steps)
        self.note = ""

    def __iter__(self) -> Iterator:
        # A log file would keep every frame of a moving bar.
        in_log = not sys.stderr.isatty()
        hidden = self.title is None or in_log
        bar = tqdm(self.steps, self.title, self.total, initial=self.start, mininterval=0.5, disable=hidden)
        began = logged = time.monotonic()
        for count, step in enumerate(bar, 1):
            with uninterruptible():
                yield step
            self.check()

            # How far it is, and from the mean so far, how long the rest takes.
            bar.set_postfix_str(self.note, refresh=False)
            now = time.monotonic()
            if in_log and self.title and now - logged >= LOG_SECONDS:
                done = self.start + count
                left = duration((now - began) / count * (self.total - done))
                note = f"; {self.note}" if self.note else ""
                print(f"{self.title}: {done} of {self.total}, about {left} left{note}", file=sys.stderr, flush=True)
                logged = now


def duration(seconds: float) -> str:
    """A time for people: "50 s", "12 min", "3.5 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
