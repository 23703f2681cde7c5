"""Layer normalization (Ba et al. 2016) of a million short tokens: on a GPU and in bfloat16, as in training, by the
kernels of `layernorm.cu`.

Shapes: `N` numbers of a token.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpu import kernels

SOURCE = Path(__file__).with_name("layernorm.cu")
WARPS = 8           # of a block
BLOCKS = 528        # on the whole GPU, at most: four for each of an H100's processors
MOST_NUMBERS = 512  # of a token: what the registers of a warp hold


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """`norm`, which may have no bias, of tokens (..., N) in their own precision, the statistics in float32: like x.

    Autocast would return float32, and every later addition would read and write twice the bytes, which is what a layer
    on a million short tokens spends its time on.
    """
    numbers = x.shape[-1]
    if x.is_cuda and x.dtype == torch.bfloat16 and numbers % 32 == 0 and numbers <= MOST_NUMBERS:
        compiled = _compile(numbers, x.device.index)
        if compiled is not None:
            weight = norm.weight.float()
            bias = torch.zeros_like(weight) if norm.bias is None else norm.bias.float()
            return _NormByKernels.apply(x, weight, bias, norm.eps, compiled)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        return F.layer_norm(x, norm.weight.shape, norm.weight.to(x.dtype), bias, norm.eps)


@cache
def _compile(numbers: int, device: int) -> list[Callable] | None:
    """The kernels, forward and backward, for tokens of so many numbers on a GPU; None where they cannot be had."""
    return kernels.compile_kernels(SOURCE, ("norm_forward", "norm_backward"), [f"-DNUMBERS={numbers}"], device)


class _NormByKernels(torch.autograd.Function):
    """`layer_norm` and its gradient by `layernorm.cu`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, compiled: list[Callable]) -> Tensor:
        x = x.contiguous()
        moments = x.new_empty(x.numel() // x.shape[-1], 2, dtype=torch.float32)
        y = torch.empty_like(x)
        ctx.save_for_backward(x, weight, moments)
        ctx.backward_kernel = compiled[1]
        _launch(compiled[0], [x, weight, bias, y, moments, len(moments), eps])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """The gradient in y (..., N) -> in x, the same shape, and in weight and bias (N,)."""
        x, weight, moments = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        sums = x.new_empty(BLOCKS * WARPS, 2, x.shape[-1], dtype=torch.float32)
        _launch(ctx.backward_kernel, [x, weight, moments, grad.contiguous(), grad_x, sums, len(moments)])
        return grad_x, *sums.sum(0), None, None


def _launch(kernel: Callable, args: list) -> None:
    """Run a kernel; nothing compares the arguments with its signature. The first one says on which GPU."""
    with kernels.current_device(args[0].device):
        kernel(grid=(BLOCKS, 1, 1), block=(32, WARPS, 1), args=args)
