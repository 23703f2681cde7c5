"""Group normalization with what follows it: against the definition, and the kernels against plain torch."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unet
import vae
from gpu import groupnorm, kernels
from tests.support import parity

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


@pytest.mark.parametrize("gated", [True, False])
def test_sum_of_a_residual_block(noise, gated):
    shortcut, layer = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
    x, gate = noise(2, 3, 5, 5)(), noise(2, 4, seed=1)() if gated else None
    y = groupnorm.add(groupnorm.convolve(x, shortcut), groupnorm.convolve(x, layer), gate)
    factor = 1 if gate is None else gate[..., None, None]
    parity.assert_close(y, shortcut(x) + layer(x) * factor, atol=1e-6)
    assert torch.equal(groupnorm.convolve(x, nn.Identity()).complete(), x)


@pytest.mark.parametrize("kind", ["UNet", "encoder", "decoder"])
@pytest.mark.parametrize("waits", [False, True])
def test_fused_networks_are_the_plain_ones(kind, waits, monkeypatch, noise):
    """Also where every bias waits for whoever reads the map, and plain torch adds it there."""
    torch.manual_seed(0)
    if kind == "UNet":
        network = unet.UNet(unet.UNetConfig(cond_channels=4, widths=(16, 16, 32), attention=(False, True), groups=4,
                                            heads=2, head_dim=8, time_dim=16, token_dim=8))
        torch.nn.init.normal_(network.final_conv.weight)
        given = noise(2, 4, 8, 8)(), torch.tensor([0.3, -2.0]), noise(2, 4, 8, 8, seed=1)()
        run = network
    else:
        network = vae.VAE(vae.VAEConfig(widths=(16, 32), groups=4))
        run = network.encode if kind == "encoder" else network.decode
        given = (noise(2, 3 if kind == "encoder" else 4, 8, 8)(),)
    for name, weight in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    network.requires_grad_(False)
    known = run(*given)

    groupnorm.fuse(network, {unet.ResBlock: groupnorm.fused_unet_block, vae.VAEBlock: groupnorm.fused_vae_block})
    waited = []
    if waits:
        monkeypatch.setattr(groupnorm, "_waits", lambda x, bias: waited.append(bias) or bias is not None)
    parity.assert_close(run(*given), known, std=1e-5)
    assert len(waited) > 10 or not waits


@pytest.mark.parametrize("how", [dict(stride=2, padding=1), dict(dilation=2), dict(groups=2), {}])
def test_a_convolution_whose_bias_waits_is_the_same(how, monkeypatch, noise):
    layer, x = nn.Conv2d(4, 6, 3, **how), noise(2, 4, 9, 9)()
    monkeypatch.setattr(groupnorm, "_waits", lambda *_: True)
    convolved = groupnorm.convolve(x, layer)
    assert convolved.bias is layer.bias
    parity.assert_close(convolved.complete(), layer(x), atol=1e-6)


def test_kernels_are_for_half_precision_on_a_gpu(monkeypatch, noise):
    monkeypatch.setattr(groupnorm, "_compile", lambda *_: pytest.fail("a kernel for a CPU"))
    norm = random_norm(2, 8)
    groupnorm.group_norm(noise(1, 8, 2, 2)(), norm)
    groupnorm.group_norm(noise(1, 8, 2, 2)().half(), norm.half())
    layer, x = nn.Conv2d(8, 8, 3).half(), noise(1, 8, 4, 4)().half()
    convolved = groupnorm.convolve(x, layer)
    assert convolved.bias is None
    groupnorm.add(convolved, convolved)


@pytest.mark.parametrize("groups, channels, vector", [(8, 2048, 8), (32, 128, 4), (8, 96, 4), (8, 24, 1), (4, 8, 2)])
def test_a_thread_has_channels_of_one_group(groups, channels, vector):
    assert groupnorm._vector(nn.GroupNorm(groups, channels)) == vector


def test_kernels_have_limits(monkeypatch):
    """A block has no more columns, and a launch is no launch without a block."""
    monkeypatch.setattr(groupnorm, "_compile", lambda vector, bfloat, device: "kernels")
    for images, channels, vector, found in ((1, 8192, 8, "kernels"), (1, 8200, 8, None), (2, 1024, 1, "kernels"),
                                            (2, 1025, 1, None), (0, 64, 8, None)):
        x = SimpleNamespace(is_cuda=True, shape=(images, channels, 1, 1), dtype=torch.float16,
                            device=torch.device("cuda", 0))
        assert groupnorm._kernels_for(x, vector) == found


def test_what_cannot_be_compiled_is_said_once(monkeypatch, tmp_path, capsys):
    kernels._say_plain_torch_is_used.cache_clear()
    source = tmp_path / "none.cu"
    for name in ("f", "g"):
        assert kernels.compile_kernels(source, (name,), [], 0) is None
    line, = capsys.readouterr().err.splitlines()
    assert "none.cu cannot be used" in line and "plain torch" in line


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
    assert groupnorm._kernels_for(x, groupnorm._vector(half)) is not None
    offset = noise(channels, seed=3)().half().cuda()
    for factors in (None, modulation):
        for bias in (None, offset):
            given = groupnorm.Convolved(x, bias)
            y = groupnorm.group_norm(given, half, silu, factors)
            given = groupnorm.Convolved(x.float(), None if bias is None else bias.float())
            exact = groupnorm.group_norm(given, full, silu, None if factors is None else factors.float())
            parity.assert_close(y, exact.cpu(), std=1e-3, rtol=1e-3)
            assert torch.equal(y, groupnorm.group_norm(groupnorm.Convolved(x, bias), half, silu, factors))

    # The gradient, of a map that lacks its bias.
    grad = noise(batch, channels, side, side, seed=2)().cuda()
    x_half, x_full = x.clone().requires_grad_(), x.float().requires_grad_()
    groupnorm.group_norm(groupnorm.Convolved(x_half, offset), half, silu).backward(grad.half())
    groupnorm.group_norm(groupnorm.Convolved(x_full, offset.float()), full, silu).backward(grad.half().float())
    parity.assert_close(x_half.grad, x_full.grad.cpu(), std=2e-3, rtol=2e-3)


@CUDA
@pytest.mark.parametrize("groups, channels, side, batch", SHAPES)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_gradients_of_kernels_against_plain_torch(noise, groups, channels, side, batch, silu, modulated, dtype, error):
    """As in training: maps in bfloat16, what belongs to channels in float32; or all in half precision."""
    own = torch.float32 if dtype == torch.bfloat16 else dtype
    rounded = (2 * noise(batch, channels, side, side)() + 0.7).to(dtype).cuda()
    modulation = (0.5 * noise(batch, 2 * channels, seed=1)()).to(dtype).cuda()
    grad = noise(batch, channels, side, side, seed=2)().to(dtype).cuda()
    found = []
    for exact in (False, True):
        norm = random_norm(groups, channels).to(own).cuda().to(torch.float32 if exact else own).requires_grad_()
        x = (rounded.float() if exact else rounded.contiguous(memory_format=torch.channels_last)).requires_grad_()
        factors = (modulation.float() if exact else modulation.clone()).requires_grad_()
        assert exact or groupnorm._kernels_for(x, groupnorm._vector(norm)) is not None
        y = groupnorm.group_norm(x, norm, silu, factors if modulated else None)
        inputs = [x, norm.weight, norm.bias, *([factors] if modulated else [])]
        found.append([y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))])
    for one, other in zip(*found):
        assert one.dtype in (dtype, own)
        assert (one.float() - other).std() < error * other.std()
        assert (one.float() - other).abs().max() < 2 * error * other.abs().max()


@CUDA
@pytest.mark.parametrize("kind", ["UNet", "VAE"])
def test_fused_networks_learn_the_same(kind, noise):
    """Every gradient of a network in training, within what bfloat16 does to the plain network's."""
    torch.manual_seed(0)
    if kind == "UNet":
        network = unet.UNet(unet.UNetConfig(cond_channels=4, widths=(32, 32, 64), attention=(True, True), groups=4,
                                            heads=2, head_dim=16, time_dim=16, token_dim=32)).cuda()
        torch.nn.init.normal_(network.final_conv.weight)
        given = noise(8, 4, 8, 8)().cuda(), torch.linspace(-2, 2, 8).cuda(), noise(8, 4, 8, 8, seed=1)().cuda()
    else:
        network = vae.VAE(vae.VAEConfig(widths=(32, 64), groups=4, patch=2)).cuda()
        network.forward = lambda x: network.decode(network.encode(x))
        given = (noise(8, 3, 16, 16)().cuda(),)
    network.to(memory_format=torch.channels_last)
    found = {}
    for form in ("exact", "plain", "fused"):
        if form == "fused":
            groupnorm.fuse(network, {unet.ResBlock: groupnorm.fused_unet_block,
                                     vae.VAEBlock: groupnorm.fused_vae_block})
        with torch.autocast("cuda", torch.bfloat16, enabled=form != "exact"):
            y = network(*given)
        names, parameters = zip(*network.named_parameters())
        gradients = torch.autograd.grad(y.float().square().mean(), parameters, allow_unused=True)
        found[form] = {name: x.flatten() for name, x in zip(names, gradients) if x is not None}

    # One number for all: the norm of what is wrong in them.
    wrong = {form: (torch.cat([*found[form].values()]) - torch.cat([*found["exact"].values()])).norm()
             for form in ("plain", "fused")}
    assert wrong["fused"] < 1.2 * wrong["plain"]
    assert wrong["fused"] < 0.1 * torch.cat([*found["exact"].values()]).norm()


@CUDA
@pytest.mark.parametrize("channels, side, batch", [
    (256, 32, 1), (2048, 4, 3), (128, 64, 2), (24, 33, 2), (4, 5, 3), (6, 5, 2), (5, 5, 2)])
@pytest.mark.parametrize("gated", [True, False])
def test_sum_by_kernel(noise, channels, side, batch, gated):
    draws = [noise(batch, channels, side, side, seed=seed)().half().cuda() for seed in (0, 1, 2)]
    a, b, grad = (x.contiguous(memory_format=torch.channels_last) for x in draws)
    a_bias, b_bias = (noise(channels, seed=seed)().half().cuda() for seed in (3, 4))
    gate = noise(batch, channels, seed=5)().half().cuda() if gated else None
    for bias in (None, a_bias):
        factor = gate[..., None, None].float() if gated else 1
        exact = a.float() + (b.float() + b_bias.float()[:, None, None]) * factor
        exact = exact if bias is None else exact + bias.float()[:, None, None]
        y = groupnorm.add(groupnorm.Convolved(a, bias), groupnorm.Convolved(b, b_bias), gate)
        parity.assert_close(y, exact.cpu(), std=1e-3, rtol=1e-3)
        assert y.is_contiguous(memory_format=torch.channels_last)

    # Its gradient is that of both maps.
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = groupnorm.add(groupnorm.Convolved(a), groupnorm.Convolved(b, b_bias), gate)
    if gated:
        with pytest.raises(NotImplementedError):
            y.backward(grad)
        return
    y.backward(grad)
    assert torch.equal(a.grad, grad) and torch.equal(b.grad, grad)


@CUDA
def test_the_bias_of_a_convolution_waits(noise):
    layer = nn.Conv2d(8, 16, 3, stride=2, padding=1).half().cuda().requires_grad_(False)
    x = noise(2, 8, 9, 9)().half().cuda()
    convolved = groupnorm.convolve(x, layer)
    assert convolved.bias is layer.bias
    parity.assert_close(convolved.complete(), layer(x).cpu().float(), std=2e-3, rtol=2e-3)
