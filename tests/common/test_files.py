"""Files: the old one or the new one, never half of one; and weights in which nothing runs."""
import contextlib
import json
import os
import pickle
import warnings

import pytest
import torch

from common import files
from tests.support.helpers import Evil


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing ---

def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "er" / "picture.png"
    with files.write_atomically(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".png" and not path.exists()
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and names(path.parent) == ["picture.png"]


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path):
    """In the same folder, from this machine; not what somebody is writing, nor what has another name."""
    killed = os.fork()
    if not killed:
        os._exit(0)
    os.waitpid(killed, 0)
    kept = [f".x.{files.MACHINE}-{os.getppid()}.part.png", f".x.elsewhere-{killed}.part.png", f".{killed}.png"]
    for name in [f".x.{files.MACHINE}-{killed}.part.png", f".a.b.{files.MACHINE}-{killed}.part", *kept]:
        (tmp_path / name).touch()
    files.save_json({}, tmp_path / "y.json")
    assert names(tmp_path) == sorted([*kept, "y.json"])


def test_whether_a_file_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("old")
    files.require_writable(tmp_path / "file")
    files.require_writable(tmp_path / "deep" / "x.pt")
    assert names(tmp_path) == ["deep", "file"] and not names(tmp_path / "deep")
    for path in (tmp_path, tmp_path / "file" / "x"):
        with pytest.raises(OSError, match=str(path)):
            files.require_writable(path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_alone(error, tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(error), files.write_atomically(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["x"]


def test_tensors_that_cannot_be_saved_leave_the_old_file_alone(tmp_path):
    path = tmp_path / "x.pt"
    files.save_tensors({"weights": {}}, path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        files.save_tensors({"weights": {"a": torch.zeros(1000), "b": lambda: 0}}, path)
    assert files.read_tensors(path) == {"weights": {}} and names(tmp_path) == ["x.pt"]


def test_a_folder_that_is_none_is_an_oserror(tmp_path):
    """The commands make one line of it."""
    (tmp_path / "file").write_text("")
    for save in (files.save_tensors, files.save_json):
        with pytest.raises(OSError):
            save({}, tmp_path / "file" / "x")
        with pytest.raises(OSError):
            save({}, tmp_path)
    assert names(tmp_path) == ["file"]


@pytest.fixture
def full_disk():
    """`full_disk(size)`: no file may be longer, for a while, which is like a disk without more space."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")

    @contextlib.contextmanager
    def full_disk(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores the signal that comes with it
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full_disk


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 15_000])
@pytest.mark.parametrize("name", ["a.pt", "a.json"])
def test_a_full_disk_names_the_file_and_leaves_nothing(name, size, full_disk, tmp_path, capfd):
    """Wherever the writing ends."""
    (tmp_path / name).write_text("old")
    save = files.save_tensors if name == "a.pt" else files.save_json
    numbers = torch.rand(5000)
    with pytest.raises(OSError) as e, full_disk(size):
        save({"weights": {}, "x": numbers if name == "a.pt" else numbers.tolist()}, tmp_path / name)
    assert str(tmp_path / name) in str(e.value) and len(str(e.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="no regular file"):
            files.save_json({}, path)
    assert (tmp_path / "pipe").is_fifo()


def test_json(tmp_path):
    files.save_json({"a": [1, 2.5, None]}, tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [1, 2.5, None]} and text.endswith("}\n") and len(text.splitlines()) > 1


# --- reading ---

def test_tensors_come_back(tmp_path):
    weights = {"a": torch.arange(3.0), "b": torch.tensor(2)}
    data = {"weights": weights, "preset": {"widths": (1, 2)}, "state": {"step": 7}}
    files.save_tensors(data, tmp_path / "x.pt")
    again = files.read_tensors(tmp_path / "x.pt")
    assert again["preset"] == data["preset"] and again["weights"].keys() == data["weights"].keys()
    assert all(torch.equal(again["weights"][name], x) for name, x in data["weights"].items())
    assert files.read_tensors(str(tmp_path / "x.pt"), entry="state")["state"] == {"step": 7}


def test_a_file_may_be_replaced_while_it_is_read(tmp_path):
    """Tensors are mapped, and the new file is another one."""
    files.save_tensors({"weights": {"a": torch.ones(10000)}}, tmp_path / "x")
    data = files.read_tensors(tmp_path / "x")
    files.save_tensors({"weights": {"a": torch.zeros(10000)}}, tmp_path / "x")
    assert data["weights"]["a"].sum() == 10000 and files.read_tensors(tmp_path / "x")["weights"]["a"].sum() == 0


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    path, marker = tmp_path / "x", tmp_path / "marker"
    files.save_tensors({"weights": {"a": torch.zeros(100)}}, path)
    contents = [path.read_bytes()[:-100], b"", b"text", pickle.dumps(Evil(os.system, f"touch {marker}"))]
    evil = {"weights": {"a": Evil(os.system, f"touch {marker}")}}
    repeated = {"weights": {}, "more": [{"a": torch.zeros(1).expand(2**20, 2**20)}]}  # four terabytes
    for data in ([], {}, {"weights": 3}, {"weights": torch.zeros(2)}, {"model_state_dict": {}}, evil, repeated,
                 {"weights": {}, "losses": torch.zeros(2, dtype=torch.complex64)}):
        torch.save(data, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError) as e:
            files.read_tensors(path)
        assert len(str(e.value).splitlines()) == 1 and str(path) in str(e.value)
    assert not marker.exists()


def test_containers_that_hold_themselves_end(tmp_path):
    """And ones that hold one another 2^60 times in a few bytes."""
    own = []
    own.append(own)
    doubled = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    torch.save({"weights": {}, "own": own, "doubled": doubled}, tmp_path / "x")
    assert files.read_tensors(tmp_path / "x")["weights"] == {}


def test_the_missing_entry_is_named(tmp_path):
    files.save_tensors({"weights": {}}, tmp_path / "x")
    with pytest.raises(ValueError, match="'field'"):
        files.read_tensors(tmp_path / "x", entry="field")


def test_no_file_is_another_error(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            files.read_tensors(path)


def test_fingerprints_tell_files_apart(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abd")
    assert files.fingerprint(tmp_path / "a") == "ba7816bf8f01cfea"  # SHA-256 of "abc", as everywhere
    assert files.fingerprint(tmp_path / "b") != files.fingerprint(tmp_path / "a")
    (tmp_path / "empty").touch()
    assert files.fingerprint(tmp_path / "empty") == "e3b0c44298fc1c14"


def test_reading_says_nothing(tmp_path, monkeypatch):
    """Some versions of torch warn of sparse tensors in a file, which an error of one line follows anyway."""
    path = tmp_path / "a.pt"
    torch.save({"weights": {}}, path)
    load = torch.load

    def warn(*args, **kwargs):
        warnings.warn("Sparse invariant checks are implicitly disabled.", stacklevel=2)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", warn)
    with warnings.catch_warnings(action="error"):
        assert files.read_tensors(path) == {"weights": {}}
