"""Networks as they run on a GPU: without one the graphs are stand-ins, and the rest is what it is."""
import gc
from contextlib import nullcontext

import pytest
import torch

import sparsefusion
from gpu import graphs
from gpu.graphs import Graphed, half_copy
from tests.support import parity
from tests.support.small import SHORT, tiny_model


class StandIn(graphs.Replay):
    """Stands in for a CUDA graph: reads and writes the same memory at every call."""

    def run_on_stream(self):
        return self.function(self.batch)

    def capture(self):
        self.graph, self.result = self, self.function(self.batch)

    def replay(self):
        self.result.copy_(self.function(self.batch))


@pytest.fixture
def captured(monkeypatch):
    """The shapes of the inputs of every graph so far. Graphs are made where no gradients are needed."""
    captured = []

    def replay(function, batch, pool, warm_ups):
        captured.append([tuple(x.shape) for x in batch])
        return StandIn(function, batch, pool, warm_ups)

    monkeypatch.setattr(graphs, "Replay", replay)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    with torch.no_grad():
        yield captured


def scaled(x, factor):
    return x * factor


def test_a_graph_for_every_size_that_fits_its_batches(captured, noise):
    function = Graphed("scaling", scaled, scaled)
    for count, size in ((1, 1), (5, 8), (8, 8), (11, 12)):
        x, factor = noise(count, 4, 2)(), noise(count, 1, 1, seed=1)()
        first, again, later = function(x, factor), function(2 * x, factor), function(3 * x, factor)
        assert torch.equal(first, x * factor) and torch.equal(again, 2 * first) and torch.equal(later, (3 * x) * factor)
        assert captured[-1] == [(size, 4, 2), (size, 1, 1)]
    assert len(captured) == 3


@pytest.mark.parametrize("most, count, sizes", [(16, 35, [16, 4]), (4, 9, [4, 1])])
def test_a_large_batch_goes_in_parts(captured, noise, most, count, sizes):
    function, x, factor = Graphed("scaling", scaled, scaled, most), noise(count, 4)(), noise(count, 1, seed=1)()
    assert torch.equal(function(x, factor), x * factor)
    assert [shapes[0][0] for shapes in captured] == sizes


@pytest.mark.parametrize("wrong", [lambda x: x + 0.1, lambda x: x * float("nan"), lambda x: x / 0])
def test_half_precision_that_is_too_wrong_is_not_taken(captured, noise, capsys, wrong):
    function, x = Graphed("the network", wrong, lambda x: 3 * x), noise(2, 4)()
    assert torch.equal(function(x), 3 * x) and torch.equal(function(-x), -3 * x) and not function.half_is_accurate
    line, = capsys.readouterr().err.splitlines()
    assert "the network runs in float32" in line


@pytest.mark.parametrize("bad, last", [(4, 4), (5, 8), (8, 8)])
def test_half_precision_that_turns_wrong_later_is_taken_no_longer(captured, noise, capsys, bad, last):
    """Every call that is a power of two is a proof: of a network that is wrong from one on, it is the last in half."""
    calls = 0

    def half(x):
        return x + (calls >= bad)

    function, x = Graphed("the network", half, lambda x: x), noise(2, 4)()
    wrong = []
    for calls in range(1, 17):
        if not torch.equal(function(x), x):
            wrong.append(calls)
    assert wrong == list(range(bad, last)) and not function.half_is_accurate
    line, = capsys.readouterr().err.splitlines()
    assert "the network runs in float32" in line


def test_half_precision_that_is_close_is_taken_without_a_word(captured, noise, capsys):
    function, x = Graphed("the network", lambda x: x.half(), lambda x: x), noise(2, 4)()
    with torch.enable_grad():
        assert function(x) is x and not captured
    assert torch.equal(function(x), x.half().float()) and function(x).dtype == torch.float32
    assert function.half_is_accurate
    assert not capsys.readouterr().err


@torch.no_grad()
def test_the_half_of_an_autoencoder():
    model, x = tiny_model().vae, torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    half = half_copy(model)
    latents = half.encode(x)
    parity.assert_close(latents.float(), model.encode(x), std=0.02)
    assert half.decode(latents).dtype == torch.float32
    parity.assert_close(half.decode(latents), model.decode(model.encode(x)), std=0.05)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_garbage_is_not_collected_while_a_graph_is_recorded(monkeypatch):
    """And is again afterwards, whatever happens, where it was before."""
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **where: nullcontext())
    with graphs.recording(None, pool=1):
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), graphs.recording(None):
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with graphs.recording(None):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_autoencoder_takes_a_few_pictures_at_once(monkeypatch):
    """For its largest maps take much memory."""
    model = tiny_model()
    taken = []
    monkeypatch.setattr(graphs, "Graphed", lambda *given: taken.append(given[3]))
    sparsefusion.run_in_half(model.vae, model.vldm.unet)
    assert taken == [sparsefusion.VAE_AT_ONCE] * 2 + [max(graphs.SIZES)] * 2
    assert sparsefusion.VAE_AT_ONCE < max(graphs.SIZES)


def test_a_model_in_half_precision_is_the_model(captured):
    """With stand-ins for the graphs: what needs no gradients runs by them, and the feature distance in half, too."""
    exact, model = tiny_model(), tiny_model()
    sparsefusion.run_in_half(model.vae, model.vldm.unet)
    g = torch.Generator().manual_seed(0)
    x, features = torch.rand(3, 3, 32, 32, generator=g), torch.rand(3, 16, 8, 8, generator=g)
    shown, expected = (one.denoise(x, features, [0.3, 0.9, 0.6], torch.Generator().manual_seed(0), SHORT.sampler)
                       for one in (model, exact))
    parity.assert_close(shown, expected, atol=0.02)
    assert len(captured) >= 4 and not torch.equal(shown, expected)
    assert model.vae.encode.half_is_accurate and model.vldm.unet.predict.half_is_accurate
    assert model.state_dict().keys() == exact.state_dict().keys()

    a = x[:1].requires_grad_()
    with torch.enable_grad():
        half, known = (torch.autograd.grad(one.feature_distance(a, x[1:2]).sum(), a)[0] for one in (model, exact))
        assert torch.equal(model.vae.encode(x), exact.vae.encode(x))
    parity.assert_close(half, known, std=0.1)
    assert not torch.equal(half, known)


# --- on a GPU ---

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@CUDA
@torch.no_grad()
def test_graphs_of_several_sizes_share_memory_and_do_not_mix(noise):
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64)).cuda()
    function = Graphed("the network", half_copy_of(network), network)
    inputs = [noise(count, 64, seed=count)().cuda() for count in (1, 3, 8, 2, 16, 1)]
    first = [function(x) for x in inputs]
    for x, y in zip(inputs, first):
        assert torch.equal(function(x), y) and y.dtype == torch.float32
        parity.assert_close(y, network(x).cpu(), std=0.02)


@CUDA
def test_garbage_waits_for_the_end_of_a_capture():
    """A graph in a cycle that nothing holds any more would be freed in the middle of the capture of another."""
    def record(function):
        graph = torch.cuda.CUDAGraph()
        with graphs.recording(graph):
            function()
        return graph

    y = torch.ones(4, device="cuda")
    held = [record(lambda: y * 2)]

    def makes_garbage():
        cycle = [held.pop()]
        cycle.append(cycle)
        del cycle
        assert len([[] for _ in range(100)]) == 100
        y.add_(1)

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        record(makes_garbage).replay()
    finally:
        gc.set_threshold(*thresholds)
    assert y.tolist() == [2] * 4


def half_copy_of(network):
    half = half_copy(network)
    return lambda x: half(x.half())


@CUDA
def test_a_model_on_a_gpu_is_the_model():
    """Denoised images and the gradient of the feature distance, which a graph captures, in half precision."""
    exact, model = tiny_model(), sparsefusion.ready(tiny_model(), "cuda")
    g = torch.Generator().manual_seed(0)
    x, features = torch.rand(3, 3, 32, 32, generator=g), torch.rand(3, 16, 8, 8, generator=g)
    levels = [0.3, 0.9, 0.6]
    shown = model.denoise(x.cuda(), features.cuda(), levels, torch.Generator().manual_seed(0), SHORT.sampler)
    expected = exact.denoise(x, features, levels, torch.Generator().manual_seed(0), SHORT.sampler)
    parity.assert_close(shown, expected, atol=0.02)
    assert model.vae.encode.half_is_accurate and model.vldm.unet.predict.half_is_accurate

    def gradient(model, a, b):
        return torch.autograd.grad(model.feature_distance(a, b).sum(), a)[0]

    a, b = x[:1].clone().requires_grad_(), x[1:2]
    fast_a, fast_b = a.detach().cuda().requires_grad_(), b.cuda()
    warm = gradient(model, fast_a, fast_b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient(model, fast_a, fast_b)
    graph.replay()
    assert torch.equal(captured, warm)
    parity.assert_close(warm, gradient(exact, a, b), std=0.1)
