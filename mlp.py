"""Small networks of linear layers and ReLU on millions of points, trained fast on a GPU: in bfloat16.

There, reading and writing what is between two layers takes longer than the products. So the bias and ReLU are part of
the product before them, the gradient of a bias is a product, too, and a layer's result has as many numbers a row as
make 16 bytes. bfloat16 rather than float16, for gradients are too small for that. Elsewhere it is what `nn.Sequential`
does.

Letters: `N` points, `C` channels of a layer's input, `D` of its output.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IN_16_BYTES = 8  # numbers of bfloat16


def run(layers: nn.Sequential, x: Tensor, rounded: bool = False) -> Tensor:
    """What linear layers make of points (N, C), with a ReLU between two and perhaps one behind the last: (N, D).

    `rounded`: in bfloat16, and so is the result.
    """
    if not rounded:
        return layers(x)
    x = x.bfloat16()
    for i in range(0, len(layers), 2):
        x = rounded_linear(x, layers[i], relu=i + 1 < len(layers))
    return x


def rounded_linear(x: Tensor, layer: nn.Linear, relu: bool) -> Tensor:
    """A linear layer of points (N, C) in bfloat16, then ReLU if there is one: (N, D)."""
    # A result whose rows are no multiples of 16 bytes takes four times as long.
    missing = -layer.out_features % IN_16_BYTES
    weight = F.pad(layer.weight.bfloat16(), (0, 0, 0, missing))
    bias = F.pad(layer.bias.bfloat16(), (0, missing))
    return _Linear.apply(x, weight, bias, relu)[:, :layer.out_features]


def _addmm_relu(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """What torch can do in one pass over memory, in two."""
    return torch.addmm(bias, x, weight).relu_()


class _Linear(torch.autograd.Function):
    """x W^T + b and perhaps ReLU, for x (N, C), W (D, C), b (D,), in the precision of all three."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        multiply = torch.addmm
        if relu:
            multiply = getattr(torch, "_addmm_activation", _addmm_relu)  # private to torch, so it may go
        y = multiply(bias, x, weight.t())
        ctx.relu = relu
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """The gradient in y (N, D) -> in x (N, C), W (D, C) and b (D,)."""
        x, weight, y = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)

        # The sum over all points as a product, which is faster; its columns are all the same.
        ones = grad.new_ones(len(grad), IN_16_BYTES)
        bias_grad = (grad.t() @ ones)[:, 0]
        x_grad = grad @ weight if ctx.needs_input_grad[0] else None
        return x_grad, grad.t() @ x, bias_grad, None
