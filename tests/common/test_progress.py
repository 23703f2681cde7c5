"""Signs of life."""
import sys

from common import progress
from common.progress import Progress, duration


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
