"""The paper's protocol: exactly the sequences, frames and inputs of its rules; lists in files."""
import json
from pathlib import Path

import pytest
import torch

from datasets import protocol
from tests.support import trees

SAMPLE = Path(__file__).resolve().parents[2] / "sample" / "co3d"


@pytest.fixture
def tree(tmp_path):
    """Sequences with 40, 32, 8 and 40 frames in the test split, and one that is only trained on."""
    counts = {"b_forty": 40, "a_thirtytwo": 32, "c_eight": 8, "d_forty": 40, "e_training": 40}
    return trees.write(tmp_path / "co3d", counts, training=["e_training"])


def test_sequences_and_frames(tree):
    entries = protocol.paper_list(tree, "things")
    assert [(entry.sequence, entry.index) for entry in entries] == [("a_thirtytwo", 0), ("b_forty", 1), ("d_forty", 2)]
    assert entries[0].frames == tuple(range(1, 33))
    # 32 evenly spaced of 40, first and last included; by hand: 1 + floor(39 k / 31).
    assert entries[1].frames == tuple(1 + 39 * k // 31 for k in range(32))
    assert len(set(entries[1].frames)) == 32 and entries[1].frames[-1] == 40


def test_every_sequence(tree):
    entries = protocol.whole_list(tree, "things")
    assert [entry.sequence for entry in entries] == ["a_thirtytwo", "b_forty", "c_eight", "d_forty", "e_training"]
    assert entries[1].frames == tuple(range(1, 41)) and [entry.index for entry in entries] == [0, 1, 2, 3, 4]


def test_views_are_the_first_of_a_permutation():
    order = torch.randperm(32, generator=torch.Generator().manual_seed(5)).tolist()
    assert protocol.choose_views(32, 2, 5) == order[:2] and protocol.choose_views(32, 5, 5) == order[:5]
    assert protocol.choose_views(32, 5, 6) != order[:5] and sorted(protocol.choose_views(3, 5, 0)) == [0, 1, 2]


def test_a_tree_without_the_list_says_so(tree, capsys):
    for file in (tree / "things" / "set_lists").iterdir():
        file.unlink()
    names = [entry.sequence for entry in protocol.paper_list(tree, "things")]
    assert names == ["a_thirtytwo", "b_forty", "d_forty", "e_training"]
    assert "no set list with fewview_dev/test" in capsys.readouterr().out


def test_nothing_left(tmp_path):
    tree = trees.write(tmp_path / "co3d", {"c_eight": 8})
    with pytest.raises(ValueError, match="no sequence has more than 10 frames"):
        protocol.paper_list(tree, "things")


def test_lists_survive_a_file(tree, tmp_path):
    entries = protocol.paper_list(tree, "things")
    protocol.save_list(entries, tmp_path / "list.json")
    assert protocol.read_list(tmp_path / "list.json", tree) == entries
    long = json.dumps([entries[0].row() | {"category": "x" * 5000}])
    for content in ("{}", "[]", "[1]", "x", json.dumps([{"category": "things"}]), long):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json"):
            protocol.read_list(tmp_path / "bad.json", tree)


def test_the_shipped_sample_follows_it():
    entries = protocol.paper_list(SAMPLE, "toys")
    assert [entry.index for entry in entries] == list(range(6)) and len(entries[0].frames) == 24
    assert protocol.choose_views(24, 2, 0) == [20, 5]
