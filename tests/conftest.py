"""What several test modules share, as fixtures."""
import functools
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from tests.support.denoisers import Analytic
from unet import UNetConfig
from vldm import alpha_sigma


def pytest_runtestloop(session):
    """Among several processes (`__main__.py`) each file of tests is run by the first that comes to it."""
    if "TAKEN_TESTS" not in os.environ or session.testsfailed or session.config.option.collectonly:
        return None
    mine = (item for item in session.items if taken(item.path))
    item = next(mine, None)
    while item is not None:
        following = next(mine, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail or session.shouldstop:
            raise session.Interrupted(session.shouldfail or session.shouldstop)
        item = following
    return True


@functools.cache
def taken(file: Path) -> bool:
    """Whether this process runs the tests of a file: where no other has said so before."""
    name = str(file.relative_to(Path(__file__).parent)).replace(os.sep, " ")
    try:
        (Path(os.environ["TAKEN_TESTS"]) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@pytest.fixture
def forked(monkeypatch):
    """Other processes are forked from one that has imported torch; a spawned one would import it for two seconds."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.fixture
def noise():
    """`noise(*shape, seed, dtype)` is a `randn`: a function whose every call is another draw of that shape."""
    def noise(*shape, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return lambda: torch.randn(shape, generator=generator, dtype=dtype)
    return noise


@pytest.fixture
def gaussian():
    """`gaussian(mu, s)` is the best denoiser of data N(mu, s^2): E[x0 | z], by the noise E[eps | z]."""
    def gaussian(mu, s):
        def predict_noise(z, log_snr):
            alpha, sigma = alpha_sigma(log_snr.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1)))
            return sigma * (z - alpha * mu) / (alpha**2 * s**2 + sigma**2)
        return Analytic(predict_noise)
    return gaussian


@pytest.fixture
def tiny_unet():
    """The smallest UNet that has every part."""
    return UNetConfig(cond_channels=6, widths=(16, 16, 32), attention=(False, True), kernels=(3, 5), groups=4,
                      heads=2, head_dim=8, frequencies=4, time_dim=32, token_dim=16)
