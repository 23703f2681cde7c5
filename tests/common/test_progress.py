"""Signs of life."""
import sys

from common import progress
from common.progress import Plan, Progress, begin, duration, planned, seconds_by_step


def test_silent(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    assert list(Progress(range(3), None)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_lines_in_a_log(capsys, monkeypatch):
    """A clock that advances ten seconds a look: half a minute is three steps."""
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    shown = Progress(range(100, 108), "fitting", start=100)
    steps = []
    for step in shown:
        shown.note = f"loss {step}"
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
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_lines_of_a_plan(capsys, monkeypatch):
    """Three steps of 10, 100 and 50 s as planned; all take twice as long. The first is over before it says anything."""
    clock = Clock(monkeypatch)
    with planned({"loading": 10, "fitting": 100, "meshing": 50}):
        begin("loading")
        clock.now += 20
        for _ in Progress(range(10), "fitting"):
            clock.now += 20
        for _ in Progress(range(2), "not planned"):
            pass
        begin("meshing")
        clock.now += 100
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["step 2 of 3, fitting: 1 of 10, about 3 min left, 5 min to the end",
                         "step 2 of 3, fitting: 3 of 10, about 2 min left, 4 min to the end"]
    assert lines[-1] == "step 2 of 3, fitting: 9 of 10, about 20 s left, 2 min to the end" and len(lines) == 5


def test_a_plan_of_which_an_earlier_run_has_done_a_part(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with planned({"fitting": 100, "meshing": 50}):
        for _ in Progress(range(8, 10), "fitting", start=8, total=10):
            clock.now += 40
    line = capsys.readouterr().err.splitlines()[0]
    assert line == "step 1 of 2, fitting: 9 of 10, about 40 s left, 4 min to the end"  # 40 s for 10, so 200 s for 50
    assert Plan.active is None


def test_seconds_by_step(monkeypatch):
    """Of steps with progress and without, in several parts, and of the one that runs."""
    clock = Clock(monkeypatch)
    assert seconds_by_step() == {}
    with planned({"loading": 1, "fitting": 1, "meshing": 1}):
        begin("loading")
        clock.now += 2
        for _ in Progress(range(4), "fitting"):
            clock.now += 1.26
        begin("loading")
        clock.now += 1
        assert seconds_by_step() == {"loading": 3.0, "fitting": 5.0}
        begin("meshing")
        assert seconds_by_step() == {"loading": 3.0, "fitting": 5.0, "meshing": 0.0}


def test_a_step_without_progress_says_so_after_a_silence(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with planned({"a": 1, "b": 1, "c": 1}):
        for title in "abc":
            begin(title)
            clock.now += 20
        begin("not planned")
    assert capsys.readouterr().err.splitlines() == ["step 3 of 3, c"]


def test_times_for_people():
    assert [duration(x) for x in (0, 119.4, 120, 5400, 9000)] == ["0 s", "119 s", "2 min", "90 min", "2.5 h"]


def test_a_quick_thing_says_nothing_in_a_log(capsys):
    assert len(list(Progress([7] * 5, "quick"))) == 5
    assert capsys.readouterr() == ("", "")


def test_a_total_for_steps_without_a_length(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    assert list(Progress(iter("ab"), "letters", total=2)) == ["a", "b"]
    err = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in err] == ["letters: 1 of 2", "letters: 2 of 2"]


def test_a_bar_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = Progress(range(10, 13), "fitting", start=10)
    for step in shown:
        shown.note = f"loss {step}"
    err = capsys.readouterr().err
    assert "fitting" in err and "10/13" in err
