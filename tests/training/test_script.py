"""`sample/train.sh`: from nothing to a prior with a tiny dial, stopped and resumed."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import sparsefusion

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["model.image_size=32", "model.vae.widths=8,8,8", "model.vae.groups=4", "model.eft.stem=8",
            "model.eft.stages=8,8,8", "model.eft.width=16", "model.eft.feedforward=16", "model.eft.depths=4",
            "model.unet.cond_channels=16", "model.unet.cond_unshuffle=1", "model.unet.widths=16,16,16",
            "model.unet.attention=false,true", "model.unet.time_dim=16", "model.unet.token_dim=8"]


def start(folder, kind="toys"):
    command = ["bash", ROOT / "sample" / "train.sh", kind, folder, "0.00001", *SETTINGS]
    environment = os.environ | {"PYTHON": sys.executable, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)


def test_it_is_toys_or_things(tmp_path):
    for words, said in ((["cups", tmp_path / "x"], "error: cups: not toys or things"), (["toys"], "usage: ")):
        found = subprocess.run(["bash", ROOT / "sample" / "train.sh", *words], capture_output=True, text=True)
        assert found.returncode != 0 and said in found.stderr and not (tmp_path / "x").exists()


def test_from_nothing_to_a_prior(tmp_path):
    """The stop comes while the autoencoder is trained and toys are drawn; both end, and nothing is begun anew."""
    log = tmp_path / "train.log"
    script = start(tmp_path)
    while not log.exists() or "] vae:" not in log.read_text():
        assert script.poll() is None, log.read_text()
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(120) == 143 and not (tmp_path / "nano.pt").exists()

    assert start(tmp_path).wait(200) == 0, log.read_text()
    model = sparsefusion.load(tmp_path / "nano.pt")
    assert model.preset.image_size == 32
    trainings = sparsefusion.read_trained_on(tmp_path / "nano.pt")
    assert [x["what"] for x in trainings] == ["vae", "vae", "prior"] and trainings[2]["sequences"] == 2
    lines = log.read_text().splitlines()
    assert [line.split()[-1] == "true" for line in lines if "] toys1:" in line] == [False, True]
    assert lines[-1].endswith(str(tmp_path / "nano.pt"))
