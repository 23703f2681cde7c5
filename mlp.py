"""Small networks of linear layers and ReLU on millions of points, trained fast on a GPU: one kernel and bfloat16.

Plain torch is the reference, and what serves wherever the kernels of `mlp.cu` cannot be had. A layer of 64 numbers a
point reads and writes far longer than it computes, so they keep what is between two layers in registers (Mueller et al.
2021, "Real-time neural radiance caching for path tracing", Sec. 5.2). bfloat16 rather than float16, for gradients are
too small for that.

Letters: `N` points, `P` parameters, `C` channels of the first layer's input, `D` of the last one's output.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kernels

SOURCE = Path(__file__).with_name("mlp.cu")
WARPS = 4     # of a block, each with 16 points at once
BLOCKS = 528  # on the whole GPU, at most: two waves of what an H100 holds at once


def run(layers: nn.Sequential, x: Tensor, rounded: bool = False) -> Tensor:
    """What linear layers make of points (N, C), with a ReLU between two and perhaps one behind the last: (N, D).

    `rounded`: a GPU may round what goes into and comes out of a layer to bfloat16.
    """
    network = _network_of(layers, x) if rounded else None
    if network is None:
        return layers(x)
    parameters = torch.cat([parameter.flatten() for parameter in layers.parameters()])
    return _RunByKernels.apply(x, parameters, network)


class Network(NamedTuple):
    """The kernels of `mlp.cu` for one network."""
    widths: tuple[int, ...]  # C, those of the layers between, D
    forward: Callable
    backward: Callable


def _network_of(layers: nn.Sequential, x: Tensor) -> Network | None:
    """The kernels for layers and points; None where plain torch serves."""
    if len(layers) == 0 or x.dtype != torch.float32 or not x.is_cuda or not _has_bfloat16(x.device.index):
        return None
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    widths = (linear[0].in_features, *(layer.out_features for layer in linear))
    return _compile(widths, isinstance(layers[-1], nn.ReLU), x.device.index)


@cache
def _has_bfloat16(device: int) -> bool:
    """Whether a GPU multiplies matrices of bfloat16 itself, as from compute capability 8.0 on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _compile(widths: tuple[int, ...], last_relu: bool, device: int) -> Network | None:
    """The kernels for a network on a GPU; None where they cannot be had."""
    compiled = kernels.compile_kernels(SOURCE, ("network_forward", "network_backward"),
                                       kernel_options(widths, last_relu), device)
    return None if compiled is None else Network(widths, *compiled)


def kernel_options(widths: tuple[int, ...], last_relu: bool) -> list[str]:
    """What the compiler is told about a network."""
    channels = ",".join(str(width) for width in widths)
    return [f"-DCHANNELS={channels}", f"-DLAST_RELU={int(last_relu)}", f"-DWARPS={WARPS}"]


class _RunByKernels(torch.autograd.Function):
    """`run` and its gradient by `mlp.cu`. Nothing but the points is kept for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, parameters: Tensor, network: Network) -> Tensor:
        x = kernels.readable(x)
        ctx.save_for_backward(x, parameters)
        ctx.network = network
        y = x.new_empty(len(x), network.widths[-1])
        _launch(network.forward, x, parameters, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradient in y (N, D) -> in x (N, C) and in the parameters (P,)."""
        # Every block has a sum of its own.
        x, parameters = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        sums = x.new_empty(_blocks(x), len(parameters))
        _launch(ctx.network.backward, x, parameters, kernels.readable(grad), x_grad, sums)
        return x_grad, sums.sum(0), None


def _blocks(x: Tensor) -> int:
    """How many blocks of threads share the points."""
    return min(BLOCKS, -(-len(x) // (16 * WARPS)))


def _launch(kernel: Callable, x: Tensor, *others: Tensor) -> None:
    """Run a kernel for points x (N, C); nothing compares the arguments with its signature."""
    if len(x) == 0:
        return
    with torch.cuda.device(x.device):
        kernel(grid=(_blocks(x), 1, 1), block=(32 * WARPS, 1, 1), args=[x, *others, len(x)])
