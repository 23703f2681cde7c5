"""What several test modules need and no fixture is."""
import pytest
import torch


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def same(a, b):
    """Whether two modules have the same state, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_line(capsys, main, argv, *words):
    """The command `main` ends with exit code 2 and one line that has all the words."""
    with pytest.raises(SystemExit) as e:
        main([str(x) for x in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(lines) == 1, lines
    assert all(str(word) in lines[0] for word in words), (lines[0], words)
