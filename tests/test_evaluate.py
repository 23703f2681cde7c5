"""Evaluation over sequences: means, wins, and what is taken up from an earlier run."""
import json
from pathlib import Path

import pytest

import distill
import evaluate
import sparsefusion
from distillation import PRESETS
from small import SHORT, tiny_model

SAMPLE = Path(__file__).resolve().parent.parent / "sample" / "co3d"
NAMES = ["toy_1000_00000", "toy_1000_00001"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that evaluates two sequences: the summary, and the (sequence, seed) of what was made anew."""
    monkeypatch.setitem(PRESETS, "nano", SHORT)
    sparsefusion.save(tiny_model(), tmp_path / "tiny.pt")
    made, make = [], distill.run_instance

    def noted(instance, out):
        made.append((instance.sequence, instance.seed))
        return make(instance, out)

    monkeypatch.setattr(distill, "run_instance", noted)

    def evaluation(*flags):
        argv = ["--root", SAMPLE, "--instances", 2, "--targets", 1, "--weights", tmp_path / "tiny.pt",
                "--device", "cpu", "--out", tmp_path / "out", *flags]
        made.clear()
        evaluate.main([str(x) for x in argv])
        return json.loads((tmp_path / "out" / "evaluation.json").read_text()), list(made)
    return evaluation


def test_means_and_wins(run, tmp_path, capsys):
    summary, made = run()
    assert made == [(NAMES[0], 0), (NAMES[1], 1)] and summary["instances"] == 2
    assert f"perceptual distance {summary['perceptual_ratio']:.2f}" in capsys.readouterr().out
    each = [json.loads((tmp_path / "out" / name / "metrics.json").read_text())["methods"] for name in NAMES]
    assert set(summary["mean"]) == {"nearest", "ngp", "eft", "vldm", "sparsefusion"}
    for method, row in summary["mean"].items():
        for metric, value in row.items():
            assert value == pytest.approx(sum(e[method][metric] for e in each) / 2)
    wins = summary["sparsefusion_beats_eft"]
    assert wins["psnr"] == sum(e["sparsefusion"]["psnr"] > e["eft"]["psnr"] for e in each)
    assert wins["perceptual"] == sum(e["sparsefusion"]["perceptual"] < e["eft"]["perceptual"] for e in each)


def test_only_results_of_the_same_settings_are_taken_up(run, tmp_path):
    fresh, _ = run()
    again, made = run()
    assert again == fresh and not made
    assert run("--seed", 1)[1] == [(NAMES[0], 1), (NAMES[1], 2)]
    assert len(run("--seed", 1, "--set", "weight_opacity=0.01")[1]) == 2
    assert not run("--seed", 1, "--set", "weight_opacity=0.01")[1]
    (tmp_path / "tiny.pt").touch()
    assert not run("--seed", 1, "--set", "weight_opacity=0.01")[1]  # the same weights
    sparsefusion.save(tiny_model(seed=5), tmp_path / "tiny.pt")
    assert len(run("--seed", 1, "--set", "weight_opacity=0.01")[1]) == 2


def test_an_edited_preset_is_another_setting(run, monkeypatch):
    run()
    monkeypatch.setitem(PRESETS, "nano", SHORT.with_iterations(5))
    assert len(run()[1]) == 2
