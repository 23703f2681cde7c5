"""The march by kernels: it agrees with plain torch, and plain torch serves where no kernel can be had."""
import re

import pytest
import torch

from gpu import kernels
from sample import things, toy_render, toys, tracing
from sample.thing_design import make_thing
from sample.tree import generator_of

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TYPES = {"const float*": torch.Tensor, "int": int, "double": float}


def a_toy(index, device):
    """A toy, its surface, and two cameras around it."""
    generator = generator_of(4000, index)
    toy = toys.make_toy(generator, device)
    return toy, toy_render.surface(toy), toys.turntable(generator, 2)


def a_thing(index, device):
    """A thing, its surface, and two cameras around it."""
    generator = generator_of(4000, index)
    thing = make_thing(generator, device)
    return thing, thing.shape.surface(), things.hand_held(thing, generator, 2)


@pytest.mark.parametrize("make", [a_toy, a_thing])
def test_surfaces_fit_their_kernels(make):
    """Nothing else compares the arguments with the signature."""
    _, surface, _ = make(0, "cpu")
    text = tracing.SOURCE.read_text()
    signature = re.search(rf"void {surface.kernel}\((.*?)const float3\* origins", text, re.DOTALL)[1]
    wanted = [TYPES[parameter.strip().rsplit(" ", 1)[0]] for parameter in signature.split(",")[:-1]]
    assert len(wanted) == len(surface.numbers)
    for number, kind in zip(surface.numbers, wanted):
        assert isinstance(number, kind)
        assert kind is not torch.Tensor or number.is_contiguous() and number.dtype == torch.float32


def marches(monkeypatch, body, surface, cameras):
    """What a kernel and plain torch find of the coarse and the fine rays of a picture: pairs of `march`'s results."""
    choose = tracing.marcher
    found = []

    def both(surface, device):
        def march(*args):
            found.append((choose(surface, device)(*args), tracing.march(surface.distance, *args)))
            return found[-1][1]
        return march

    with monkeypatch.context() as patch:
        patch.setattr(tracing, "marcher", both)
        tracing.render(body, surface, lambda points, directions: points, cameras, 96, 72)
    return found


@cuda
@pytest.mark.parametrize("make", [a_toy, a_thing])
def test_kernels_agree_with_plain_torch(make, monkeypatch):
    """Blended and not, rippled and not, cut and not: the same hits but for a handful of rays, and the same lengths."""
    assert tracing._compile(0) is not None
    for index in range(8):
        for (length, hit), (plain_length, plain_hit) in marches(monkeypatch, *make(index, "cuda")):
            both = hit & plain_hit
            assert (hit != plain_hit).sum() <= 3 and both.sum() > 100 and not both.all()
            apart = (length - plain_length).abs()
            print(make.__name__, index, len(hit), (hit != plain_hit).sum().item(), apart[both].max().item())
            assert (apart[both] > 1e-3).sum() <= 3 and apart[both].median() < 1e-5


@cuda
def test_plain_torch_serves_where_the_compiler_is_missing(monkeypatch, capfd):
    tracing._compile.cache_clear()
    kernels._say_plain_torch_is_used.cache_clear()
    monkeypatch.delattr(torch.cuda, "_compile_kernel")
    toy, surface, cameras = a_toy(0, "cuda")
    _, mask = toy_render.render(toy, cameras, 32, 32)
    tracing._compile.cache_clear()
    assert mask.max() == 1 and "plain torch" in capfd.readouterr().err


def test_no_kernels_are_looked_for_on_a_cpu(monkeypatch):
    monkeypatch.setattr(tracing, "_compile", lambda *_: pytest.fail("a kernel for a CPU"))
    toy, surface, cameras = a_toy(0, "cpu")
    _, mask = toy_render.render(toy, cameras, 32, 32)
    assert mask.max() == 1
