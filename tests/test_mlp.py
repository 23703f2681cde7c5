"""The field's small network in bfloat16: against double precision, and against `nn.Sequential`."""
import pytest
import torch
from torch import nn

import mlp
import parity


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


@pytest.mark.parametrize("relu", [True, False])
def test_gradients_by_finite_differences(relu):
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 3), (8, 3), (8,)
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.double, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(mlp._Linear.apply, (x, weight, bias, relu))


def test_without_layers_points_are_only_rounded(noise):
    x = noise(7, 6)()
    assert torch.equal(mlp.run(nn.Sequential(), x), x)
    assert torch.equal(mlp.run(nn.Sequential(), x, rounded=True), x.bfloat16())


def test_a_torch_without_the_private_product(noise, monkeypatch):
    layers, x = network(), noise(7, 6)()
    known = mlp.run(layers, x, rounded=True)
    monkeypatch.delattr(torch, "_addmm_activation")
    assert torch.equal(mlp.run(layers, x, rounded=True), known)


def test_a_relu_behind_the_last_layer(noise):
    layers, x = network()[:4], noise(7, 6)()
    y = mlp.run(layers, x, rounded=True)
    parity.assert_close(y.float(), layers(x), atol=0.02)
    assert y.min() == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))])
@pytest.mark.parametrize("points", [0, 1, 500])
def test_rounded_it_is_near(noise, device, points):
    layers, exact = network().bfloat16().float().to(device), network(torch.double)
    exact.load_state_dict(layers.state_dict())
    x = noise(points, 6)().bfloat16()
    given = x.to(device).float().requires_grad_()
    known = x.double().requires_grad_()
    y, y_exact = mlp.run(layers, given, rounded=True), exact(known)
    assert y.dtype == torch.bfloat16
    parity.assert_close(y, y_exact, atol=0.01, rtol=0.01)

    # ReLU and the last layer, whose width is no multiple of eight, have the right gradients, too.
    grad = noise(points, 4, seed=1)()
    y.float().backward(grad.to(device))
    y_exact.backward(grad.double())
    pairs = [(given.grad, known.grad), *((a.grad, b.grad) for a, b in zip(layers.parameters(), exact.parameters()))]
    for mine, theirs in pairs:
        assert (mine.double().cpu() - theirs).norm() <= 0.01 * theirs.norm() + 1e-12
