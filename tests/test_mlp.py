"""The field's small network by kernels: against double precision, exactly where numbers need no rounding, and as bfloat16
rounds elsewhere.
"""
import importlib

import pytest
import torch
from torch import nn

import kernels
import mlp

GPU = pytest.mark.skipif(not torch.cuda.is_available() or not mlp._has_bfloat16(0), reason="needs a GPU with bfloat16")
# Widths of networks: the presets' and their parts, odd ones, some beyond a tile, one layer, many.
WIDTHS = [(32, 64, 64, 4), (20, 32, 4), (24, 32), (64, 4), (80, 64, 3), (5, 7, 3), (3, 1), (33, 17, 48, 9, 2)]


def network(widths, last_relu=False):
    """Layers whose weights are random."""
    torch.manual_seed(0)
    layers = []
    for before, behind in zip(widths, widths[1:]):
        layers += [nn.Linear(before, behind), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


def whole_numbers(*shape, seed, share=1.0):
    """-1, 0 or 1; `share` of them, about, are not 0 for that alone."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-1, 2, shape, generator=generator)
    return (numbers * (torch.rand(shape, generator=generator) < share)).double()


def run_and_gradients(layers, x, grad, rounded):
    """What layers make of points, and its gradients: in the points and all parameters."""
    x = x.clone().requires_grad_()
    layers.zero_grad()
    y = mlp.run(layers, x, rounded)
    y.backward(grad)
    return [y.detach(), x.grad, *(parameter.grad for parameter in layers.parameters())]


def test_where_nothing_may_round_and_on_a_cpu_it_is_plain_torch(noise, monkeypatch):
    monkeypatch.setattr(mlp, "_compile", lambda *_: pytest.fail("a kernel for a CPU"))
    layers, x = network((6, 16, 4)), noise(7, 6)()
    assert torch.equal(mlp.run(layers, x), layers(x)) and torch.equal(mlp.run(layers, x, rounded=True), layers(x))
    assert torch.equal(mlp.run(nn.Sequential(), x, rounded=True), x)


def test_what_a_network_asks_the_compiler_for(monkeypatch):
    """Only of float32 on a GPU that has bfloat16."""
    class OnGPU:
        is_cuda = True
        dtype = torch.float32
        device = torch.device("cuda", 0)
    monkeypatch.setattr(mlp, "_compile", lambda *asked: asked)
    monkeypatch.setattr(mlp, "_has_bfloat16", lambda device: True)
    assert mlp._network_of(network((6, 16, 4)), OnGPU) == ((6, 16, 4), False, 0)
    assert mlp._network_of(network((6, 16), last_relu=True), OnGPU) == ((6, 16), True, 0)
    assert mlp._network_of(nn.Sequential(), OnGPU) is None
    monkeypatch.setattr(OnGPU, "dtype", torch.float16)
    assert mlp._network_of(network((6, 4)), OnGPU) is None
    monkeypatch.setattr(OnGPU, "dtype", torch.float32)
    monkeypatch.setattr(mlp, "_has_bfloat16", lambda device: False)
    assert mlp._network_of(network((6, 4)), OnGPU) is None
    assert mlp.kernel_options((6, 16, 4), True)[:2] == ["-DCHANNELS=6,16,4", "-DLAST_RELU=1"]


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_kernels_compile_for_any_gpu_that_has_bfloat16(capability, widths):
    """As far as this machine's compiler knows it; no GPU is needed."""
    if not torch.version.cuda:
        pytest.skip("torch without CUDA has no compiler for it")
    compiler = importlib.import_module("torch.cuda._utils")
    with kernels.without_toolkit():
        binary, _ = compiler._nvrtc_compile(mlp.SOURCE.read_text(), "network_backward", capability,
                                            nvcc_options=mlp.kernel_options(widths, False))
    assert binary


@GPU
@pytest.mark.parametrize("last_relu", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("points", [0, 1, 15, 16, 17, 64, 500])
def test_whole_numbers_are_exact(widths, points, last_relu):
    """Whole numbers up to 256 need no rounding."""
    layers = network(widths, last_relu)
    exact = network(widths, last_relu).double()
    for seed, parameter in enumerate(exact.parameters()):
        parameter.data.copy_(whole_numbers(*parameter.shape, seed=seed, share=0.3))
    layers.load_state_dict(exact.state_dict())
    x = whole_numbers(points, widths[0], seed=100)
    grad = whole_numbers(points, widths[-1], seed=101)

    known = run_and_gradients(exact, x, grad, rounded=False)
    assert all(numbers.numel() == 0 or numbers.abs().max() <= 256 for numbers in known[:2])
    mine = run_and_gradients(layers.cuda(), x.float().cuda(), grad.float().cuda(), rounded=True)
    for a, b in zip(mine, known, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a.cpu().double(), b)


class Rounded(torch.autograd.Function):
    """Numbers and their gradients to the nearest bfloat16."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().to(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.bfloat16().to(grad)


class RoundedLinear(nn.Linear):
    """A linear layer whose result and weights are rounded, but not the weights' gradients."""

    def forward(self, x):
        weight = self.weight + (Rounded.apply(self.weight) - self.weight).detach()
        return Rounded.apply(nn.functional.linear(x, weight, self.bias))


@GPU
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("points", [300, 100_000])  # a few for some blocks, many for each
def test_numbers_are_rounded_between_layers(noise, widths, points):
    layers = network(widths)
    known_layers = [RoundedLinear(x.in_features, x.out_features) if isinstance(x, nn.Linear) else x for x in layers]
    known_layers = nn.Sequential(*known_layers).double()
    known_layers.load_state_dict(layers.state_dict())
    x, grad = noise(points, widths[0])().bfloat16().float(), noise(points, widths[-1], seed=1)()
    known = run_and_gradients(known_layers, x.double(), grad.double(), rounded=False)

    # A sum in another order is rounded otherwise, here and there.
    layers.cuda()
    mine = run_and_gradients(layers, x.cuda(), grad.cuda(), rounded=True)
    for a, b in zip(mine, known, strict=True):
        assert (a.double().cpu() - b).norm() <= 0.005 * b.norm()
    for a, b in zip(run_and_gradients(layers, x.cuda(), grad.cuda(), rounded=True), mine, strict=True):
        assert torch.equal(a, b)  # bit by bit


@GPU
def test_points_as_they_come(noise):
    """Not one behind the other, and from an odd address."""
    layers, wide = network((6, 16, 4)).cuda(), noise(50, 9)().cuda()
    known = mlp.run(layers, wide[:, 3:].clone(), rounded=True)
    assert torch.equal(mlp.run(layers, wide[:, 3:], rounded=True), known)
    shifted = torch.cat([wide.new_zeros(1), wide[:, 3:].flatten()])[1:].view(50, 6)
    assert torch.equal(mlp.run(layers, shifted, rounded=True), known)


@GPU
def test_kernels_that_cannot_be_had(noise, monkeypatch):
    layers, x = network((6, 16, 4)).cuda(), noise(7, 6)().cuda()
    monkeypatch.setattr(mlp, "_compile", lambda *_: None)
    assert torch.equal(mlp.run(layers, x, rounded=True), layers(x))
