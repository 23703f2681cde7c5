"""Muon against the singular value decomposition, against torch's, and by what it remembers; on a GPU by a graph."""
import copy

import pytest
import torch
from torch import nn

from gpu.update import GraphedAdam, Graphs
from tests.support import parity
from training.muon import RMS, Muon, orthogonalized

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def network(device="cpu", seed=0):
    """A convolution, a standing and a lying matrix, and what is no matrix: vectors, three rows."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 48), nn.Tanh(),
                         nn.Linear(48, 3)).to(device)


def train(net, optimizer, steps, device="cpu", first=0, rate=0.02):
    graphs = Graphs(torch.device(device))

    def update(x):
        loss = (net(x[0]) - x[0].mean((2, 3))[:, :3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = []
    for i in range(first, first + steps):
        optimizer.set_rate(rate * 0.95**i)
        x = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
        losses.append(float(graphs.run("update", update, (x,))))
    return losses


@pytest.mark.parametrize("rows, columns", [(8, 8), (8, 40), (40, 300)])
def test_singular_vectors_stay_and_values_come_near_one(rows, columns):
    torch.manual_seed(rows)
    u, _, v = torch.linalg.svd(torch.randn(3, rows, columns), full_matrices=False)
    values = torch.logspace(1, -1.5, rows)
    turned = u.mT @ orthogonalized(u * values @ v) @ v.mT
    diagonal = turned.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25
    parity.assert_close(turned, torch.diag_embed(diagonal), atol=1e-4)
    assert torch.equal(orthogonalized(torch.zeros(1, rows, columns)), torch.zeros(1, rows, columns))


def test_matrices_step_as_torch_has_it_and_the_rest_by_adam():
    """torch's takes matrices only, and computes them in half precision."""
    net = network()
    other = copy.deepcopy(net)
    optimizer = Muon(net.parameters(), (0.9, 0.99), torch.device("cpu"))
    weights = [other[i].weight for i in (2, 4)]
    theirs = torch.optim.Muon(weights, lr=0.02, weight_decay=0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [other[0].bias, *other[2:].parameters()]
    adam = GraphedAdam([([p for p in rest if all(p is not w for w in weights)], 1.0)], (0.9, 0.99), 1e-8,
                       torch.device("cpu"))
    for step in range(3):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            q.data.copy_(p)
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        kernel = net[0].weight.detach().clone()
        optimizer.set_rate(0.02)
        adam.set_rates(0.02)
        optimizer.step(), theirs.step(), adam.step()
        for (name, p), q in zip(net.named_parameters(), other.parameters()):
            if name != "0.weight":
                parity.assert_close(p, q, atol=0.02 * 2e-2 if p.ndim > 1 else 1e-7)
        moved = ((net[0].weight - kernel) / 0.02).flatten(1)  # the kernel as a matrix of a row for every channel
        values = torch.linalg.svdvals(moved) / (RMS * moved.shape[1] ** 0.5)
        assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns_and_resumes(device):
    """On a GPU by replays of a graph, whose rate changes."""
    whole, again = network(device), network(device, seed=1)
    optimizer = Muon(whole.parameters(), (0.9, 0.99), torch.device(device))
    losses = train(whole, optimizer, 20, device)
    state = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(whole.state_dict())
    losses += train(whole, optimizer, 6, device, 20)
    assert losses[-1] < losses[0] / 2
    resumed = Muon(again.parameters(), (0.9, 0.99), torch.device(device))
    resumed.load_state_dict(state)
    train(again, resumed, 6, device, 20)
    for p, q in zip(whole.parameters(), again.parameters()):
        parity.assert_close(p.cpu(), q.cpu(), atol=1e-6 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_rate_of_nothing_moves_nothing(device):
    net = network(device)
    before = [p.detach().clone() for p in net.parameters()]
    train(net, Muon(net.parameters(), (0.9, 0.99), torch.device(device)), 4, device, rate=0.0)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before))


@pytest.mark.parametrize("momentum", [torch.zeros(2, 2), torch.full((8, 4, 3, 3), torch.nan),
                                      torch.zeros(8, 4, 3, 3).int()])
def test_a_momentum_of_something_else(momentum):
    optimizer = Muon(network().parameters(), (0.9, 0.99), torch.device("cpu"))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="momentum"):
        optimizer.load_state_dict(state | {"momenta": [momentum, *state["momenta"][1:]]})
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state | {"momenta": state["momenta"][1:]})
