"""A training step as a CUDA graph: the losses of the steps one by one, with batches of several shapes."""
import pytest
import torch

import train
from gpu.graphs import map_tensors
from sparsefusion import SparseFusion
from tests.support.small import TINY
from tests.support.trainings import SAMPLE
from training.fit import Fit
from training.packed import load_packed

STEPS = 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_trains_as_its_steps_one_by_one(tmp_path, monkeypatch):
    """Within bfloat16; the thread draws meanwhile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = train.TrainConfig(batch=4, frames=5, min_views=1, max_views=3, model=TINY)
    losses = {}
    for graphs in (True, False):
        torch.manual_seed(0)
        model = SparseFusion(TINY).cuda().eval().requires_grad_(False)
        data = load_packed([SAMPLE], ["toys"], 5, TINY.image_size, workers=1)
        prior = train.PriorTraining(data, config, model, "cuda")
        fit = Fit(prior, config.fit, tmp_path / "x.pt", 0, "cuda", {}, [], [])
        fit.graphs.enabled = graphs
        if not graphs:
            fit.draw = lambda step, fit=fit, draw=fit.draw: map_tensors(torch.Tensor.cuda, draw(step))
        steps = [fit.step(step) for step in range(STEPS)]
        losses[graphs] = torch.tensor([[float(x) for x in one.values()] for one in steps])
    assert losses[True].isfinite().all() and len(fit.average) > 100
    assert (losses[True] - losses[False]).abs().max() < 0.05 * losses[False].mean()
    assert losses[True][-5:].mean() < losses[True][:5].mean()
