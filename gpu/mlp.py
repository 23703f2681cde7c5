"""Small networks of linear layers and ReLU on millions of points, trained fast on a GPU: one kernel for the result and
one for the gradient, in bfloat16.

Plain torch is the reference, and is used wherever the kernels of `mlp.cu` cannot be had. A layer of 64 numbers a
point reads and writes far longer than it computes, so the kernels keep what is between two layers in registers.
bfloat16 rather than float16, for gradients are too small for that. The idea is the fully fused network of Instant NGP
(Mueller et al. 2021, "Real-time neural radiance caching for path tracing", Sec. 4).

Shapes: `N` points, `P` parameters, `C` channels of the first layer's input, `D` of the last one's output.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpu import kernels

SOURCE = Path(__file__).with_name("mlp.cu")
WARPS = 4            # of a block, each with 16 points at once
BLOCKS = 528         # on the whole GPU, at most: twice as many as an H100 holds of the paper's gradient at once
MOST_POINTS = 2**30  # the kernels count them in 32 bits
MOST_WIDTH = 128     # of a layer: the registers of a warp hold no more


def run(layers: nn.Sequential, x: Tensor, rounded: bool = False) -> Tensor:
    """What linear layers make of points (N, C), with a ReLU between two and perhaps one behind the last: (N, D).

    `rounded`: a GPU may round what it multiplies to bfloat16. The first such call compiles; a CUDA graph can capture
    the later ones.
    """
    network = _network_of(layers, x) if rounded and x.is_cuda else None
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
    """The kernels for layers and points on a GPU; None where plain torch is used."""
    if not _are_for_kernels(layers, x) or not _has_bfloat16(x.device.index):
        return None
    widths = (layers[0].in_features, *(layer.out_features for layer in layers[::2]))
    return _compile(widths, isinstance(layers[-1], nn.ReLU), x.device.index)


def _are_for_kernels(layers: nn.Sequential, x: Tensor) -> bool:
    """Whether kernels are written for layers and points: all in float32 on one device, by turns linear and ReLU."""
    if len(layers) == 0 or x.dtype != torch.float32 or len(x) > MOST_POINTS:
        return False
    for layer in layers[::2]:
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            return False
        if max(layer.in_features, layer.out_features) > MOST_WIDTH:
            return False
        if layer.weight.dtype != x.dtype or layer.weight.device != x.device:
            return False
    return all(isinstance(layer, nn.ReLU) for layer in layers[1::2])


@cache
def _has_bfloat16(device: int) -> bool:
    """Whether a GPU multiplies matrices of bfloat16 itself, as from compute capability 8.0 on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _compile(widths: tuple[int, ...], last_relu: bool, device: int) -> Network | None:
    """The kernels for a network on a GPU; None where they cannot be had."""
    names = ("network_forward", "network_backward")
    memory = shared_bytes(widths)
    compiled = kernels.compile_kernels(SOURCE, names, kernel_options(widths, last_relu), device, memory)
    return None if compiled is None else Network(widths, *compiled)


def kernel_options(widths: tuple[int, ...], last_relu: bool) -> list[str]:
    """The compiler's options for a network."""
    channels = ",".join(str(width) for width in widths)
    return [f"-DCHANNELS={channels}", f"-DLAST_RELU={int(last_relu)}", f"-DWARPS={WARPS}",
            f"-DSHARED={shared_bytes(widths)}"]


def shared_bytes(widths: tuple[int, ...]) -> int:
    """Shared memory of a block: the size of `Shared` in `mlp.cu`, which compares."""
    padded = [-(-width // 16) * 16 for width in widths]
    parameters = sum(2 * (before + 8) * behind + 4 * behind for before, behind in zip(padded, padded[1:]))
    return parameters + 2 * 2 * 16 * WARPS * (max(padded) + 8)


class _RunByKernels(torch.autograd.Function):
    """`run` and its gradient by `mlp.cu`. Nothing but points and parameters is kept for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, parameters: Tensor, network: Network) -> Tensor:
        x = kernels.readable(x)
        ctx.save_for_backward(x, parameters)
        ctx.network = network
        y = x.new_empty(len(x), network.widths[-1])
        _launch(network.forward, network.widths, x, parameters, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradient in y (N, D) -> in x (N, C) and in the parameters (P,)."""
        # Every block has a sum of its own.
        x, parameters = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        sums = x.new_empty(_blocks(x), len(parameters))
        _launch(ctx.network.backward, ctx.network.widths, x, parameters, kernels.readable(grad), x_grad, sums)
        return x_grad, sums.sum(0), None


def _blocks(x: Tensor) -> int:
    """How many blocks of threads share the points."""
    return min(BLOCKS, -(-len(x) // (16 * WARPS)))


def _launch(kernel: Callable, widths: tuple[int, ...], x: Tensor, *others: Tensor) -> None:
    """Run a kernel for points x (N, C); nothing compares the arguments with its signature."""
    if len(x) == 0:
        return
    where = {"grid": (_blocks(x), 1, 1), "block": (32 * WARPS, 1, 1), "shared_mem": shared_bytes(widths)}
    with kernels.current_device(x.device):
        kernel(**where, args=[x, *others, len(x)])
