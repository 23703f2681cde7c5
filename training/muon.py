"""Muon (Jordan et al. 2024): matrices step along their orthogonalized momentum, all else by Adam.

A step of Adam moves a few directions of a matrix a lot, since gradients are nearly of low rank; an orthogonal one moves
all of them alike. In trainings of the sizes here Adam needs two to three times as many steps (docs/training.md).

torch has it for matrices alone and with rates that a CUDA graph cannot change; this one takes convolutions as well.
[idea and coefficients: github.com/KellerJordan/Muon]

Shapes: `n` matrices of `r` rows and `c` columns.
"""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gpu.update import GraphedAdam

MOMENTUM = 0.95
RMS = 0.2  # of a step, in learning rates: as large as Adam's (Liu et al. 2025, Sec. 2.2)
SMALLEST = 8  # rows and columns of what counts as a matrix
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that brings singular values from anywhere in (0, 1] near 1
ITERATIONS = 5


class Muon:
    """The optimizer of a training, all of whose parameters are on one device; a CUDA graph can capture its steps."""

    def __init__(self, parameters: Iterable[nn.Parameter], betas: tuple[float, float], device: torch.device):
        """betas: Adam's, for vectors and for matrices with fewer than 8 rows or columns."""
        self.matrices = []
        others = []
        for p in parameters:
            (self.matrices if p.ndim > 1 and min(len(p), p[0].numel()) >= SMALLEST else others).append(p)
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adam = GraphedAdam([(others, 1.0)], betas, 1e-8, device)

        # Those of the same shape, lying or standing, are orthogonalized together.
        self.alike = {}
        for i, p in enumerate(self.matrices):
            self.alike.setdefault(tuple(sorted((len(p), p[0].numel()))), []).append(i)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps from here on."""
        self.adam.set_rates(rate)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)
        for p in self.matrices:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Down the gradients."""
        # The momentum, and where it will lead (Nesterov).
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.matrices]
        torch._foreach_lerp_(self.momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, self.momenta, MOMENTUM)

        rate = self.adam.param_groups[0]["lr"]
        for (rows, columns), places in self.alike.items():
            lying = [ahead[i].flatten(1) for i in places]
            lying = torch.stack([x if x.shape == (rows, columns) else x.T for x in lying])
            steps = orthogonalized(lying.bfloat16() if lying.is_cuda else lying) * (RMS * math.sqrt(columns) * rate)
            for i, x in zip(places, steps):
                p = self.matrices[i]
                p.sub_((x if len(p) == rows else x.T).reshape(p.shape))
        self.adam.step()

    def state_dict(self) -> dict:
        """What it remembers."""
        return {"adam": self.adam.state_dict(), "momenta": self.momenta}

    def load_state_dict(self, state: dict) -> None:
        """Resume from that, maybe on another device. Graphs must be forgotten. Raises `ValueError` where it is of other
        parameters, or not finite.
        """
        self.adam.load_state_dict(state["adam"])
        for momentum, x in zip(self.momenta, state["momenta"], strict=True):
            if x.shape != momentum.shape or not x.is_floating_point() or not x.isfinite().all():
                raise ValueError("a momentum is not one of its parameter")
            momentum.copy_(x)


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices (n, r, c), r <= c, with the same singular vectors, and singular values from .65 to 1.2 but where they
    were less than two thousandths of the norm.
    """
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
