"""One update of what an instance learns: a loss, its gradient, a step of Adam. On a GPU all of it is one CUDA graph.

An update is some thousand small kernels, a question about the parameters hundreds, and to launch them one by one
takes several times longer than to run them. A CUDA graph is launched at once, and does the same with other numbers at
the same places: hence a batch is a named tuple of tensors whose shapes never change, and a loss is a function of a
batch that waits for nothing.

Different from the released code, which launches one kernel at a time.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpu.graphs import Replay

NEVER = 2**62     # an iteration that no run reaches
WARM_UPS = 2      # updates before one is captured: torch picks algorithms and allocates memory in the first ones

Function = Callable[[NamedTuple], Tensor]  # of a batch of tensors, such as a loss, a scalar


class Group(NamedTuple):
    """Parameters with a learning rate of their own."""
    parameters: Iterable[nn.Parameter]
    rate: float  # at its peak


class Optimization:
    """Adam for groups of parameters, all on one device, that takes one update a call."""

    def __init__(self, groups: list[Group], betas: tuple[float, float], eps: float, device: torch.device):
        self.peak_rates = [group.rate for group in groups]
        self.graphed = device.type == "cuda"
        self.forget_graphs()

        # A graph reads the rates where they stood when it was made, so there they are tensors.
        settings = []
        for group in groups:
            rate = torch.tensor(group.rate, device=device) if self.graphed else group.rate
            settings.append({"params": list(group.parameters), "lr": rate})
        self.adam = torch.optim.Adam(settings, betas=betas, eps=eps, fused=True, capturable=self.graphed)

        # The iteration, and the first one in which a loss was not finite, by the loss's name.
        self.iteration = torch.zeros((), dtype=torch.long, device=device)
        self.broken = {}

    def set_rates(self, fraction: float) -> None:
        """Learning rates at a fraction of their peaks."""
        for group, peak in zip(self.adam.param_groups, self.peak_rates):
            if self.graphed:
                group["lr"].fill_(peak * fraction)
            else:
                group["lr"] = peak * fraction

    def begin(self, iteration: int) -> None:
        """Name the iteration that the next updates belong to."""
        self.iteration.fill_(iteration)

    def update(self, loss: Function, batch: NamedTuple) -> Tensor:
        """One step down a loss of a batch; returns the loss, a scalar."""
        self.broken.setdefault(loss.__name__, torch.full_like(self.iteration, NEVER))
        if not self.graphed:
            return self._descend(loss, batch)
        return self._replay(loss.__name__, lambda given: self._descend(loss, given), batch)

    @torch.no_grad()
    def evaluate(self, function: Function, batch: NamedTuple) -> Tensor:
        """A function of a batch where nothing is updated, by a graph, too."""
        if not self.graphed:
            return function(batch)
        return self._replay(function.__name__, function, batch)

    def _replay(self, name: str, function: Function, batch: NamedTuple) -> Tensor:
        """A function of a batch, by the graph of that name, which is made if there is none."""
        if name not in self.graphs:
            self.graphs[name] = Replay(function, batch, self.pool, WARM_UPS)
        return self.graphs[name](batch)

    def _descend(self, loss: Function, batch: NamedTuple) -> Tensor:
        """The update itself, every operation of it on the device."""
        self.adam.zero_grad(set_to_none=True)
        value = loss(batch)
        value.backward()
        self.adam.step()

        # Remember when it broke, without reading it.
        value = value.detach()
        now = torch.where(value.isfinite(), NEVER, self.iteration)
        broken = self.broken[loss.__name__]
        torch.minimum(broken, now, out=broken)
        return value

    def forget_graphs(self) -> None:
        """Free their memory; new ones are made when they are needed."""
        self.graphs = {}  # by the names of their functions
        self.pool = None  # the memory of all of them, as one runs after the other
        if self.graphed:
            self.pool = torch.cuda.graph_pool_handle()

    def check_losses(self) -> None:
        """Raise `FloatingPointError` if a loss was not finite so far, naming it and the first such iteration."""
        for name, iteration in sorted(self.broken.items(), key=lambda item: int(item[1])):
            if iteration < NEVER:
                raise FloatingPointError(f"the {name.replace('_', ' ')} is not a finite number in iteration "
                                         f"{int(iteration)}; the field cannot recover from that")

    def state_dict(self) -> dict:
        """What Adam remembers."""
        return self.adam.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Resume from what Adam remembered, which may come from another device. See `load_adam`."""
        load_adam(self.adam, state)
        for group, peak in zip(self.adam.param_groups, self.peak_rates):
            group["lr"] = torch.tensor(peak, device=self.iteration.device) if self.graphed else peak
            group["capturable"] = self.graphed
        self.forget_graphs()


def load_adam(adam: torch.optim.Adam, state: dict) -> None:
    """Resume from what Adam remembered. Raises `ValueError` where that is of other parameters, or not finite."""
    adam.load_state_dict(state)
    for parameter, moments in adam.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != parameter.shape or not moments[name].isfinite().all():
                raise ValueError(f"{name} of an optimizer is not one of its parameter")
