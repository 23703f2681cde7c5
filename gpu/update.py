"""What lets a whole update of an instance be one CUDA graph: its loss, the gradient, the step of Adam.

An update is some thousand small kernels, and to launch them one by one takes several times longer than to run them. A
CUDA graph is launched at once, and does the same with other numbers at the same places: hence a batch is a named tuple
of tensors whose shapes never change, and what is captured waits for nothing. On a CPU functions are simply called.

Different from the released code, which launches one kernel at a time.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpu.graphs import Replay, map_tensors

WARM_UPS = 2  # calls before one is captured: torch picks algorithms and allocates memory in the first ones


class Graphs:
    """Functions of batches of tensors: on a GPU each is a CUDA graph after its first calls."""

    def __init__(self, device: torch.device):
        self.device = device
        self.enabled = device.type == "cuda"
        self.forget()

    def run(self, name: str, function: Callable[[NamedTuple], Tensor], batch: NamedTuple) -> Tensor:
        """`function(batch)`. The graph of a name does for ever what its function did when it was captured."""
        if not self.enabled:
            return function(batch)
        if name not in self.graphs:
            own = map_tensors(lambda x: x.to(self.device), batch)
            self.graphs[name] = Replay(function, own, self.pool, WARM_UPS)
        return self.graphs[name](batch)

    def forget(self) -> None:
        """Free the graphs' memory; new ones are made when they are needed."""
        self.graphs = {}
        self.pool = None  # the memory of all of them, as one runs after the other
        if self.enabled:
            self.pool = torch.cuda.graph_pool_handle()


class GraphedAdam(torch.optim.Adam):
    """Adam for groups of parameters, all on one device; a CUDA graph can capture its steps."""

    # torch keeps its compiler away from these, for which it would import all of it: two seconds.
    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    zero_grad = unwrap(torch.optim.Adam.zero_grad)
    state_dict = unwrap(torch.optim.Adam.state_dict)
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))

    def __init__(self, groups: list[tuple[Iterable[nn.Parameter], float]], betas: tuple[float, float], eps: float,
                 device: torch.device):
        """groups: parameters, and their learning rate at its peak."""
        self.device = device
        self.peak_rates = [rate for _, rate in groups]
        settings = [{"params": list(parameters), "lr": self._rate(rate)} for parameters, rate in groups]
        super().__init__(settings, betas=betas, eps=eps, fused=True, capturable=device.type == "cuda")

    def _rate(self, rate: float) -> float | Tensor:
        """A graph reads a rate where it stood when it was captured, so there it is a tensor."""
        return torch.tensor(float(rate), device=self.device) if self.device.type == "cuda" else rate

    def set_rates(self, fraction: float) -> None:
        """Learning rates at a fraction of their peaks."""
        for group, peak in zip(self.param_groups, self.peak_rates):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * fraction)
            else:
                group["lr"] = peak * fraction

    def load_state_dict(self, state: dict) -> None:
        """Resume from what Adam remembered, maybe on another device. Graphs must be forgotten. See `check_moments`."""
        check_moments(self, state)
        unwrap(torch.optim.Adam.load_state_dict)(self, state)
        for group in self.param_groups:
            group["lr"] = self._rate(group["lr"])
            group["capturable"] = self.device.type == "cuda"


def check_moments(adam: torch.optim.Adam, state: dict) -> None:
    """Raises `ValueError` where what Adam is to remember is of other parameters, or not finite and real."""
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    for i, moments in state["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            x = moments[name]
            if x.shape != parameters[i].shape or not x.is_floating_point() or not x.isfinite().all():
                raise ValueError(f"{name} of an optimizer is not one of its parameter")
