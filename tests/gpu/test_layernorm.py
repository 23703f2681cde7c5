"""Layer normalization: the precision of its result, and the kernels against plain torch."""
import pytest
import torch
from torch import nn

from gpu import layernorm
from tests.support import parity
from unet import LayerNormNoBias

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_norm(numbers, biased=True):
    """A normalization with gains and biases that say something."""
    norm = nn.LayerNorm(numbers) if biased else LayerNormNoBias(numbers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(numbers, generator=generator))
        if biased:
            norm.bias.copy_(0.2 * torch.randn(numbers, generator=generator))
    return norm


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("biased", [True, False])
def test_definition(dtype, error, biased, noise):
    """In the tokens' own precision, also within autocast."""
    norm, x = random_norm(6, biased), noise(4, 3, 6)() * 2 + 1
    with torch.autocast("cpu", torch.bfloat16):
        y = layernorm.layer_norm(norm, x.to(dtype))
    centered = x - x.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    expected = expected + norm.bias if biased else expected
    assert y.dtype == dtype
    parity.assert_close(y.float(), expected, atol=error)


@CUDA
@pytest.mark.parametrize("numbers", [32, 96, 256])
@pytest.mark.parametrize("tokens", [1, 5, 20000])
@pytest.mark.parametrize("biased", [True, False])
def test_kernels_are_plain_torch(numbers, tokens, biased, noise):
    """The result and all gradients; float32 on the same rounded numbers is the reference."""
    norm = random_norm(numbers, biased).cuda()
    weights = list(norm.parameters())
    x = (noise(tokens, numbers)() * 2 + 1).cuda().bfloat16().requires_grad_()
    grad = noise(tokens, numbers, seed=1)().cuda().bfloat16()
    assert layernorm._compile(numbers, 0) is not None
    y = layernorm.layer_norm(norm, x)
    found = [y, *torch.autograd.grad(y, [x, *weights], grad)]

    exact = x.detach().float().requires_grad_()
    y = layernorm.layer_norm(norm, exact)
    expected = [y, *torch.autograd.grad(y, [exact, *weights], grad.float())]
    for one, other in zip(found, expected):
        assert (one.float() - other).abs().max() <= 8e-3 * other.abs().max()
