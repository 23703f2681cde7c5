"""The field's small network by kernels: against double precision, exactly where numbers need no rounding, and as
bfloat16 rounds elsewhere.
"""
import importlib
import itertools
import math

import pytest
import torch
from torch import nn

import ngp
import presets
from gpu import kernels, mlp

GPU = pytest.mark.skipif(not torch.cuda.is_available() or not mlp._has_bfloat16(0), reason="needs a GPU with bfloat16")


def network(widths, last_relu=False):
    """Layers whose weights are random."""
    torch.manual_seed(0)
    layers = []
    for before, behind in zip(widths, widths[1:]):
        layers += [nn.Linear(before, behind), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


def networks_of(preset):
    """Widths of what the field of a preset runs."""
    field = ngp.Field(presets.PRESETS[preset].field)
    parts = [field.mlp] if field.view_mlp is None else [field.mlp, field.mlp[:-1], field.mlp[-1:], field.view_mlp]
    return [(part[0].in_features, *(layer.out_features for layer in part[::2])) for part in parts]


PRESETS = sorted({widths for preset in presets.PRESETS for widths in networks_of(preset)})
# Odd ones, some beyond a tile, one layer, many, wide ones that need much shared memory.
ODD = [(5, 7, 3), (3, 1), (33, 17, 48, 9, 2), (80, 64, 3), (32, 64, 64, 64, 64, 4), (32, 128, 4)]


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


def test_presets_are_known():
    assert {(32, 64, 64, 4), (20, 32, 4), (24, 32), (32, 4), (48, 32, 3)} <= set(PRESETS)


def test_where_nothing_may_round_and_on_a_cpu_it_is_plain_torch(noise, monkeypatch):
    monkeypatch.setattr(mlp, "_compile", lambda *_: pytest.fail("a kernel for a CPU"))
    layers, x = network((6, 16, 4)), noise(7, 6)()
    assert torch.equal(mlp.run(layers, x), layers(x)) and torch.equal(mlp.run(layers, x, rounded=True), layers(x))
    assert torch.equal(mlp.run(nn.Sequential(), x, rounded=True), x)


def test_what_the_compiler_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(mlp, "_compile", lambda *what: asked.append(what))
    for capability in ((8, 0), (9, 0), (7, 5)):
        mlp._has_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        mlp._network_of(network((6, 16, 4)), torch.empty(3, 6))
        mlp._network_of(network((6, 16), last_relu=True), torch.empty(3, 6))
    mlp._has_bfloat16.cache_clear()
    assert asked == 2 * [((6, 16, 4), False, None), ((6, 16), True, None)]
    assert mlp.kernel_options((6, 16, 4), True) == ["-DCHANNELS=6,16,4", "-DLAST_RELU=1", "-DWARPS=4", "-DSHARED=7808"]


class Many(torch.Tensor):
    """More points than the kernels count."""

    def __len__(self):
        return mlp.MOST_POINTS + 1


@pytest.mark.parametrize("layers,x", [
    (nn.Sequential(), torch.zeros(3, 6)), (nn.Sequential(nn.ReLU()), torch.zeros(3, 6)),
    (nn.Sequential(nn.Linear(6, 4, bias=False)), torch.zeros(3, 6)),
    (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), torch.zeros(3, 6)),
    (nn.Sequential(nn.Linear(6, 4), nn.Sigmoid()), torch.zeros(3, 6)),
    (network((129, 4)), torch.zeros(3, 129)), (network((6, 129, 4)), torch.zeros(3, 6)),
    (network((6, 4)).half(), torch.zeros(3, 6)), (network((6, 4)), torch.zeros(3, 6, dtype=torch.half)),
    (network((6, 4)), torch.zeros(3, 6, device="meta")), (network((6, 4)), torch.zeros(3, 6).as_subclass(Many)),
])
def test_other_networks_are_plain_torchs(layers, x):
    assert not mlp._are_for_kernels(layers, x) and mlp._are_for_kernels(network((6, 4)), torch.empty(3, 6))


@pytest.mark.parametrize("capability,widths", [*itertools.product(["80", "89", "90", "100", "120"], PRESETS[-2:]),
                                               *itertools.product(["80"], PRESETS[:-2] + ODD)])
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
@pytest.mark.parametrize("widths", PRESETS + ODD)
@pytest.mark.parametrize("points", [0, 1, 15, 16, 17, 64, 500, 100_003])
def test_whole_numbers_are_exact(widths, points, last_relu):
    """Whole numbers up to 256 need no rounding. Of many points each block has several."""
    layers = network(widths, last_relu)
    exact = network(widths, last_relu).double()
    for seed, parameter in enumerate(exact.parameters()):
        parameter.data.copy_(whole_numbers(*parameter.shape, seed=seed, share=0.2 if max(widths) > 8 else 0.8))
    layers.load_state_dict(exact.state_dict())
    x = whole_numbers(points, widths[0], seed=100)
    grad = whole_numbers(points, widths[-1], seed=101)
    known = run_and_gradients(exact, x, grad, rounded=False)
    assert all(numbers.numel() == 0 or numbers.abs().max() <= 256 for numbers in known[:2])

    layers.cuda()
    assert mlp._network_of(layers, x.float().cuda()) is not None
    mine = run_and_gradients(layers, x.float().cuda(), grad.float().cuda(), rounded=True)
    for a, b in zip(mine, known, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a.cpu().double(), b)


class Rounded(torch.autograd.Function):
    """Numbers, or their gradients, or both, to the nearest bfloat16."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_too = backward
        return x.bfloat16().to(x) if forward else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.bfloat16().to(grad) if ctx.backward_too else grad, None, None


class RoundedLinear(nn.Linear):
    """A linear layer whose weights are rounded, and the gradient that it gets; but for the last, its result, too."""
    last = False

    def forward(self, x):
        weight = Rounded.apply(self.weight, True, False)
        return Rounded.apply(nn.functional.linear(x, weight, self.bias), not self.last, True)


@GPU
@pytest.mark.parametrize("widths", PRESETS + ODD)
@pytest.mark.parametrize("points", [300, 100_000])
def test_factors_are_rounded(noise, widths, points):
    layers = network(widths)
    known_layers = [RoundedLinear(x.in_features, x.out_features) if isinstance(x, nn.Linear) else x for x in layers]
    known_layers[-1].last = True
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
def test_tensors_as_they_come(noise):
    """Not one behind the other, from an odd address, expanded; points that learn nothing."""
    layers, wide = network((6, 16, 4)).cuda(), noise(50, 9)().cuda()
    known = run_and_gradients(layers, wide[:, 3:].clone(), torch.ones(50, 4).cuda(), rounded=True)
    expanded = run_and_gradients(layers, wide[:, 3:], torch.ones(1, 1).cuda().expand(50, 4), rounded=True)
    assert all(torch.equal(a, b) for a, b in zip(expanded, known, strict=True))
    shifted = torch.cat([wide.new_zeros(1), wide[:, 3:].flatten()])[1:].view(50, 6)
    assert torch.equal(mlp.run(layers, shifted, rounded=True), known[0])
    layers.zero_grad()
    mlp.run(layers, wide[:, 3:], rounded=True).sum().backward()
    assert torch.equal(layers[0].weight.grad, known[2])


@GPU
def test_what_is_no_number_stays_so(noise):
    """As ReLU lets it through: a loss has to tell."""
    layers, x = network((6, 16, 4)).cuda(), noise(50, 6)().cuda()
    x[7, 2] = math.nan
    y, x_grad, weight_grad, *_ = run_and_gradients(layers, x, torch.ones(50, 4).cuda(), rounded=True)
    assert (y.isnan().any(1).nonzero().flatten().tolist(), y[7].isnan().all()) == ([7], True)
    assert weight_grad.isnan().any()


@GPU
def test_in_a_cuda_graph(noise):
    layers, x, grad = network((6, 16, 4)).cuda(), noise(50, 6)().cuda(), noise(50, 4, seed=1)().cuda()
    known = run_and_gradients(layers, x, grad, rounded=True)
    given = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run_and_gradients(layers, given, grad, rounded=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run_and_gradients(layers, given, grad, rounded=True)
    given.copy_(x)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, known, strict=True))


@GPU
def test_kernels_that_cannot_be_had(noise, monkeypatch):
    layers, x = network((6, 16, 4)).cuda(), noise(7, 6)().cuda()
    monkeypatch.setattr(mlp, "_compile", lambda *_: None)
    assert torch.equal(mlp.run(layers, x, rounded=True), layers(x))


@GPU
def test_more_layers_than_a_gpu_has_shared_memory_for(noise, capsys):
    kernels._say_plain_torch_is_used.cache_clear()
    layers, x = network((32, *9 * [128], 4)).cuda(), noise(7, 32)().cuda()
    assert mlp.shared_bytes((32, *9 * [128], 4)) > 2**18
    assert torch.equal(mlp.run(layers, x, rounded=True), layers(x))
    assert "mlp.cu cannot be used here" in capsys.readouterr().err
