"""What the commands of `experiments/` say of results that are known."""
import json

import pytest

import sparsefusion
from experiments import autoencoder, compare
from tests.support.small import tiny_model
from tests.support.trainings import SAMPLE
from vae import VAE


def test_two_evaluations_are_compared_sequence_by_sequence(tmp_path, capsys):
    """Only what is in both counts; a smaller perceptual distance is better."""
    old, new = {"a": (20, 0.5), "b": (10, 0.5), "c": (0, 9)}, {"a": (23, 0.4), "b": (11, 0.6)}
    for folder, numbers in (("old", old), ("new", new)):
        for name, (psnr, distance) in numbers.items():
            (tmp_path / folder / "toys" / name).mkdir(parents=True)
            rows = {"eft": {"psnr": psnr, "perceptual": distance}}
            (tmp_path / folder / "toys" / name / "metrics.json").write_text(json.dumps({"methods": rows}))
    compare.main([str(tmp_path / "old"), str(tmp_path / "new")])
    count, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert count == ["2", "sequences"]
    assert lines[0] == "EFT PSNR 15.000 -> 17.000 +2.000 ± 1.000, better on 2".split()
    assert lines[1] == "EFT perceptual 0.500 -> 0.500 +0.000 ± 0.100, better on 1".split()

    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "old"), str(tmp_path)])
    assert "no sequence is in both" in capsys.readouterr().err


def test_an_autoencoder_is_measured_picture_by_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sparsefusion.save(tiny_model(), tmp_path / "x.pt")
    monkeypatch.setattr(VAE, "encode", lambda vae, images: images)
    monkeypatch.setattr(sparsefusion.SparseFusion, "decode", lambda model, images: images + 0.1)
    autoencoder.main(["--weights", str(tmp_path / "x.pt"), "--root", str(SAMPLE), "--frames", "2", "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/x.pt: 20.00 dB, 12 pictures"
