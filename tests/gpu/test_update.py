"""Updates: Adam by hand, rates, losses that break; on a GPU the CUDA graph of an update against the update itself."""
import copy
import subprocess
import sys
from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distillation import Distillation
from gpu.update import GraphedAdam, Graphs
from tests.support import parity

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


class Inner(NamedTuple):
    target: Tensor


class Batch(NamedTuple):
    inner: Inner
    factor: Tensor


def batch(i, device="cpu"):
    g = torch.Generator().manual_seed(i)
    return Batch(Inner(torch.randn(5, generator=g).to(device)), torch.rand((), generator=g).to(device))


class Work:
    """Two parameters with rates of their own, drawn to a target as a distillation does it."""
    update, descend, check_losses = Distillation.update, Distillation.descend, Distillation.check_losses

    def __init__(self, device, rates=(0.1, 0.01), betas=(0.9, 0.99)):
        self.a, self.b = (nn.Parameter(torch.zeros(5, device=device)) for _ in range(2))
        self.graphs = Graphs(torch.device(device))
        self.adam = GraphedAdam([([self.a], rates[0]), ([self.b], rates[1])], betas, 1e-8, torch.device(device))
        self.iteration, self.broken = torch.zeros((), dtype=torch.long, device=device), {}
        self.losses, self.completed = defaultdict(lambda: torch.zeros(1, device=device)), 0

    def down(self, loss, batch):
        """An update; the loss before it."""
        self.update(loss, batch)
        return float(self.loss)

    def distance(self, batch):
        return batch.factor * (self.a + 2 * self.b - batch.inner.target).square().sum()


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_that_was_read_is_written_as_it_was(device):
    """Its rates are those of its last step, too: where none is left, resuming changes no bit of a file."""
    work, other = Work(device), Work(device)
    work.adam.set_rates(0.5)
    work.down(work.distance, batch(0, device))
    state = copy.deepcopy(work.adam.state_dict())
    other.adam.load_state_dict(copy.deepcopy(state))
    for group, rate in zip(other.adam.state_dict()["param_groups"], (0.05, 0.005)):
        assert float(group["lr"]) == pytest.approx(rate)


@pytest.mark.parametrize("device", DEVICES)
def test_updates_are_those_of_adam(device):
    """By hand, with rates that change; on a GPU the later updates are replays of a graph."""
    work, a, b = Work(device), torch.zeros(5), torch.zeros(5)
    moments = {name: (torch.zeros(5), torch.zeros(5)) for name in "ab"}
    for i in range(8):
        fraction = 0.9**i
        given = batch(i)
        work.adam.set_rates(fraction)
        work.iteration.fill_(i)
        loss = work.down(work.distance, batch(i, device))
        difference = a + 2 * b - given.inner.target
        parity.assert_close(loss, float(given.factor * difference.square().sum()), rtol=1e-5)
        gradients = {"a": given.factor * 2 * difference, "b": given.factor * 4 * difference}
        for name, p, rate in (("a", a, 0.1), ("b", b, 0.01)):
            m, v = moments[name]
            m.mul_(0.9).add_(gradients[name], alpha=0.1)
            v.mul_(0.99).add_(gradients[name] ** 2, alpha=0.01)
            step = (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.99 ** (i + 1))).sqrt() + 1e-8)
            p -= fraction * rate * step
        parity.assert_close(work.a.detach().cpu(), a, rtol=1e-4, atol=1e-6)
        parity.assert_close(work.b.detach().cpu(), b, rtol=1e-4, atol=1e-6)


def test_an_update_does_not_wait_for_a_compiler():
    """torch's own methods of Adam import it, which takes two seconds."""
    code = ("import sys, tests.gpu.test_update as t; work = t.Work('cpu'); work.down(work.distance, t.batch(0)); "
            "work.adam.load_state_dict(work.adam.state_dict()); sys.exit('torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("broken", [0, 5])
def test_the_first_loss_that_is_no_number_is_named(device, broken):
    work = Work(device)
    for i in range(8):
        given = batch(i, device)
        if i == broken:
            given = given._replace(factor=given.factor * float("nan"))
        work.iteration.fill_(i)
        work.update(work.distance, given)
        if i < broken:
            work.check_losses()
    with pytest.raises(FloatingPointError, match=f"the distance is not .* iteration {broken};"):
        work.check_losses()


@pytest.mark.parametrize("device", DEVICES)
def test_a_loaded_state_goes_on(device):
    """With its moments and with the present rates."""
    whole = Work(device)
    for i in range(6):
        whole.adam.set_rates(0.5)
        whole.update(whole.distance, batch(i, device))
        if i == 2:
            state = whole.adam.state_dict()
            state = {"state": {k: {n: t.clone() for n, t in v.items()} for k, v in state["state"].items()},
                     "param_groups": [dict(group) for group in state["param_groups"]]}
            start = whole.a.detach().clone(), whole.b.detach().clone()
    again = Work(device)
    again.a.data, again.b.data = start
    again.adam.load_state_dict(state)
    for i in range(3, 6):
        again.adam.set_rates(0.5)
        again.update(again.distance, batch(i, device))
    parity.assert_close(again.a.detach().cpu(), whole.a.detach().cpu(), rtol=1e-6)
    parity.assert_close(again.b.detach().cpu(), whole.b.detach().cpu(), rtol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_forgotten_graph_is_made_anew():
    """Replays do what was captured; after `forget` they do what the loss does now."""
    work, scale = Work("cuda"), [1.0]

    def loss(given):
        return scale[0] * work.distance(given)

    work.iteration.fill_(0)
    before = [work.down(loss, batch(0, "cuda")) for i in range(5)]
    scale[0] = 3.0
    work.iteration.fill_(5)
    replayed = work.down(loss, batch(0, "cuda"))
    assert replayed < before[-1]
    work.graphs.forget()
    work.iteration.fill_(6)
    assert work.down(loss, batch(0, "cuda")) > 2 * replayed


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_asked_is_of_the_present_parameters(device):
    """Nothing is updated, no gradient is recorded, and an answer stays when the next one comes."""
    work = Work(device)

    def look(given):
        return given.factor * work.a + given.inner.target

    for i in range(6):
        with torch.no_grad():
            answers = [work.graphs.run("look", look, batch(k, device)) for k in (i, i + 1)]
        for k, answer in zip((i, i + 1), answers):
            given = batch(k, device)
            parity.assert_close(answer, (given.factor * work.a + given.inner.target).detach(), rtol=1e-6)
            assert not answer.requires_grad
        work.iteration.fill_(i)
        work.update(work.distance, batch(i, device))
