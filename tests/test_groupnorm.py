"""Group normalization with what follows it: against the definition, and the kernels against plain torch."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import groupnorm
import kernels
import parity

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_norm(groups, channels):
    """A normalization with gains and biases that say something."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(1 + 0.2 * torch.randn(channels, generator=generator))
    norm.bias.copy_(0.2 * torch.randn(channels, generator=generator))
    return norm


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_definition(noise, silu, modulated, grad):
    norm, x = random_norm(2, 6), noise(3, 6, 4, 5)() * 2 + 1
    modulation = noise(3, 12, seed=1)() if modulated else None
    before = x.clone()
    with torch.set_grad_enabled(grad):
        y = groupnorm.group_norm(x, norm, silu, modulation)
    parts = x.unflatten(1, (2, 3))
    mean, var = parts.mean((2, 3, 4), keepdim=True), parts.var((2, 3, 4), keepdim=True, correction=0)
    expected = ((parts - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    if modulated:
        scale, shift = modulation[:, :6, None, None], modulation[:, 6:, None, None]
        expected = (1 + scale) * expected + shift
    parity.assert_close(y, F.silu(expected) if silu else expected, atol=1e-5)
    assert torch.equal(x, before)


def test_kernels_are_for_half_precision_on_a_gpu(monkeypatch, noise):
    monkeypatch.setattr(groupnorm, "_compile", lambda *_: pytest.fail("a kernel for a CPU"))
    norm = random_norm(2, 8)
    groupnorm.group_norm(noise(1, 8, 2, 2)(), norm)
    groupnorm.group_norm(noise(1, 8, 2, 2)().half(), norm.half())


@pytest.mark.parametrize("groups, channels, vector", [(8, 2048, 8), (32, 128, 4), (8, 96, 4), (8, 24, 1), (4, 8, 2)])
def test_a_thread_has_channels_of_one_group(groups, channels, vector):
    assert groupnorm._vector(nn.GroupNorm(groups, channels)) == vector


def test_what_cannot_be_compiled_is_said_once(monkeypatch, tmp_path, capsys):
    kernels._say_plain_torch_serves.cache_clear()
    source = tmp_path / "none.cu"
    for name in ("f", "g"):
        assert kernels.compile_kernels(source, (name,), [], 0) is None
    line, = capsys.readouterr().err.splitlines()
    assert "none.cu does not compile" in line and "plain torch" in line


SHAPES = [(8, 256, 32, 1), (8, 2048, 4, 3), (32, 128, 64, 2), (32, 512, 7, 3), (8, 96, 16, 2), (8, 24, 33, 2)]


@CUDA
@pytest.mark.parametrize("groups, channels, side, batch", SHAPES)
@pytest.mark.parametrize("silu", [True, False])
def test_kernels_against_plain_torch(noise, groups, channels, side, batch, silu):
    half = random_norm(groups, channels).half().cuda()
    full = nn.GroupNorm(groups, channels, eps=1e-6).cuda().requires_grad_(False)
    full.load_state_dict(half.state_dict())
    x = (2 * noise(batch, channels, side, side)() + 0.7).half().cuda().contiguous(memory_format=torch.channels_last)
    modulation = noise(batch, 2 * channels, seed=1)().half().cuda()
    assert groupnorm._kernels_for(x, half) is not None
    for factors in (None, modulation):
        y = groupnorm.group_norm(x, half, silu, factors)
        exact = groupnorm.group_norm(x.float(), full, silu, None if factors is None else factors.float())
        parity.assert_close(y, exact.cpu(), std=1e-3, rtol=1e-3)
        assert torch.equal(y, groupnorm.group_norm(x, half, silu, factors))
    grad = noise(batch, channels, side, side, seed=2)().cuda()
    x_half, x_full = x.clone().requires_grad_(), x.float().requires_grad_()
    groupnorm.group_norm(x_half, half, silu).backward(grad.half())
    groupnorm.group_norm(x_full, full, silu).backward(grad.half().float())
    parity.assert_close(x_half.grad, x_full.grad.cpu(), std=2e-3, rtol=2e-3)
