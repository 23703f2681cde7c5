"""The folder of a run: what may not be replaced, which folder is free, names that are none."""
import json

import pytest

from common import files
from evaluation import results

SETTINGS = {"seed": 0, "targets": 8, "feature_net": "a", "entry": {"sequence": "s", "frames": [1, 2]},
            "config": {"iterations": 6, "bootstrap": 3, "input_pixels": 0, "mesh_resolution": 8,
                       "turntable_frames": 2, "field": {"levels": 3}}}


def changed(**values):
    """The settings with other values; those of the config by their names there."""
    config = {name: values.pop(name) for name in list(values) if name in SETTINGS["config"]}
    return SETTINGS | values | {"config": SETTINGS["config"] | config}


@pytest.fixture
def folder(tmp_path):
    """A folder that a run of the settings has begun."""
    files.save_json(SETTINGS, tmp_path / "out" / "settings.json")
    return tmp_path / "out"


# --- what would be lost ---

def test_nothing_is_in_the_way(folder, tmp_path):
    assert results.conflict(folder, SETTINGS, False) == ""
    assert results.conflict(tmp_path / "nowhere", changed(seed=1), False) == ""


@pytest.mark.parametrize("change, words", [
    (dict(seed=1), "seed differ: seed is 0 there, 1 here"),
    (dict(iterations=7), "config differ: config.iterations is 6 there, 7 here"),
    (dict(field={"levels": 4}), "config.field.levels is 3 there, 4 here"),
    (dict(entry={"sequence": "t", "frames": [1, 2]}), 'entry.sequence is "s" there, "t" here')])
def test_what_differs_is_said(change, words, folder):
    assert words in results.conflict(folder, changed(**change), False)


def test_what_only_shows_may_differ(folder):
    assert results.conflict(folder, changed(targets=1, feature_net="b", mesh_resolution=9), False) == ""


def test_more_iterations_go_on(folder):
    assert results.conflict(folder, changed(iterations=9, bootstrap=6), True) == ""
    assert results.conflict(folder, changed(iterations=9), True) == ""
    for other in (dict(iterations=5), dict(iterations=9, seed=1), dict(bootstrap=4), dict(input_pixels=4)):
        assert results.conflict(folder, changed(**other), True)


def test_numbers_without_settings_are_another_runs(tmp_path):
    files.save_json({"settings": SETTINGS}, tmp_path / "metrics.json")
    assert "seed is null there, 0 here" in results.conflict(tmp_path, {"seed": 0}, False)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100000, "\x80"])
def test_settings_that_cannot_be_read(text, tmp_path):
    (tmp_path / "settings.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="settings.json: not a JSON"):
        results.conflict(tmp_path, SETTINGS, False)


def test_only_a_runs_own_files_go(folder):
    for name in (*results.LEFT_BESIDE, *results.PICTURES, *results.TURNING, "mine.txt"):
        (folder / name).write_text("")
    files.save_json(SETTINGS, folder / "settings.json")
    results.claim(folder, {"seed": 7})
    assert {path.name for path in folder.iterdir()} == {"mine.txt", "settings.json"}
    assert json.loads((folder / "settings.json").read_text()) == {"seed": 7}
    (folder / "field.pt").write_text("kept")
    results.claim(folder, {"seed": 7, "targets": 3})
    assert (folder / "field.pt").read_text() == "kept"


# --- what is there already ---

RESULT = {"settings": SETTINGS, "methods": {"ngp": {"psnr": 20.0}}, "sequence": "s", "perceptual_name": "none",
          "input_frames": ["1"], "target_frames": ["2"], "seconds": 3}


@pytest.mark.parametrize("change", [
    {"methods": None}, {"methods": {}}, {"methods": {"magic": {"psnr": 20.0}}}, {"methods": {"ngp": None}},
    {"methods": {"ngp": {"psnr": "20"}}}, {"methods": {"ngp": {"psnr": True}}}, {"input_frames": [1]},
    {"target_frames": "2"}, {"seconds": None}, {"seconds": "3"}, {"perceptual_name": 1}, {"sequence": None},
], ids=str)
def test_numbers_that_were_edited_are_not_finished(change, folder):
    for name in ("field.pt", *results.PICTURES, *results.TURNING):
        (folder / name).write_text("")
    files.save_json(RESULT | change, folder / "metrics.json")
    assert results.finished(folder, SETTINGS) is None


def test_finished_is_whole_and_of_the_same_settings(folder):
    result = RESULT
    files.save_json(result, folder / "metrics.json")
    for name in ("field.pt", *results.PICTURES, *results.TURNING):
        assert results.finished(folder, SETTINGS) is None
        (folder / name).write_text("")
    assert results.finished(folder, SETTINGS) == result
    assert results.finished(folder, changed(targets=1)) is None
    still = changed(turntable_frames=0)
    files.save_json(result | {"settings": still}, folder / "metrics.json")
    for name in results.TURNING:
        (folder / name).unlink()
    assert results.finished(folder, still) and results.finished(folder, SETTINGS) is None
    assert results.finished(folder, json.loads(json.dumps(changed(seed=1)))) is None


# --- which folder ---

def test_a_new_folder_beside_results_of_other_settings(tmp_path, capsys):
    chosen = []
    for seed in (0, 1, 0, 2, 1):
        folder = results.choose_folder(tmp_path, "s", changed(seed=seed), False)
        files.save_json(changed(seed=seed), folder / "settings.json")
        chosen.append(folder.name)
    assert chosen == ["s", "s_2", "s", "s_3", "s_2"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "seed differ" in lines[0] and str(tmp_path / "s_2") in lines[0]
    assert results.choose_folder(tmp_path, "s", changed(seed=7), True).name == "s"


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "/abs", "a/b", "a\\b", "C:x", "CON", "nul.txt", "com1", "x.",
                                  " x", "a\nb", "\udc80", "x" * 300, "a:b", "a?"])
def test_names_in_data_are_names_of_folders_and_no_paths(name, tmp_path, capsys):
    folder = results.choose_folder(tmp_path, name, SETTINGS, False)
    assert folder.parent == tmp_path and folder.resolve().parent == tmp_path.resolve()
    files.save_json(SETTINGS, folder / "settings.json")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name] and len(folder.name) < 100
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "no name for a folder" in lines[0]


def test_safe_names_stay_and_others_stay_different():
    for name in ("toy_1000_00000", "110_13051_23361", "apple (2)", "été", "a-b+c=d", "7"):
        assert files.safe_name(name) == name
    names = ["a/b", "a:b", "a_b", "", "..", "a b ", "CON", "con"]
    assert len({files.safe_name(name).lower() for name in names}) == len(names)
