"""Networks as they run on a GPU: in half precision, channels last, a CUDA graph for every size of a batch.

At batch 1 a forward pass is about a thousand kernels of microseconds, and launching them one by one takes longer than
they do. A graph launches them all at once; it knows addresses only, so inputs are copied to them and the result from
its own.

float16 rather than bfloat16: the UNet's noise is off by 0.0016 instead of 0.013 of its spread, and its activations
(about 15) are nowhere near the largest number, 65504. That holds for weights that were seen. So half precision proves
itself on those at hand: the first call runs in float32 beside it.
"""
from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Of batches that have a graph; others are filled up to the next one, larger ones divided.
SIZES = (1, 4, 8, 12, 16, 20, 24, 28, 32)

# Root mean square error that half precision may have, of the result's spread: ten times what was measured (0.0014 to
# 0.0025 on an H100). To compare: with the sample's prior five steps of PLMS are off by 0.05 to 0.08 of what denoising
# changes.
TOLERANCE = 0.02


class Capture(NamedTuple):
    """A CUDA graph of one forward pass."""
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]  # what the graph reads, always at these addresses
    output: Tensor        # what it writes, always at this one


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, **where) -> Iterator[None]:
    """Within, operations are captured in a graph; `where` goes to `torch.cuda.graph`.

    Garbage waits: if another graph among it were freed meanwhile, the capture would fail.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **where):
            yield
    finally:
        if collects:
            gc.enable()


def half_copy(network: nn.Module, exact: tuple[str, ...] = ()) -> nn.Module:
    """A frozen copy in half precision and channels last; children whose names begin with `exact` stay in float32.

    Later changes of the network's weights are not seen.
    """
    half = copy.deepcopy(network).eval().requires_grad_(False)
    for name, part in half.named_children():
        if not name.startswith(exact):
            part.to(torch.float16, memory_format=torch.channels_last)
    return half


def half_is_accurate(name: str, half: Tensor, exact: Tensor) -> bool:
    """Whether what a network said in half precision is close to what it says in float32; a line says so if not."""
    exact = exact.float()
    error = float((half.float() - exact).square().mean().sqrt() / exact.std())

    # What is no number is not below the tolerance, either.
    if error < TOLERANCE:
        return True
    print(f"{name} runs in float32: in half precision it is off by {error:.3f} of the result's spread, more than "
          f"{TOLERANCE}", file=sys.stderr)
    return False


class Graphed:
    """A function of batches (B, ...), one or several, without gradients, as CUDA graphs."""

    def __init__(self, name: str, half: Callable[..., Tensor], full: Callable[..., Tensor], most: int = SIZES[-1]):
        """`half` and `full`: the function in half precision and in float32, which decides whether half will do.
        `most`: of a batch goes through a graph at once, for a graph keeps its memory.
        """
        self.name = name
        self.most = min(most, SIZES[-1])
        self.half = half
        self.full = full
        self.half_is_accurate = True
        self.proven = False
        self.captures = {}
        self.pool = None  # the memory of all graphs

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function of inputs (B, ...); the result is float32."""
        if not self.proven:
            self.prove(inputs)
        count = len(inputs[0])
        if count > self.most:
            parts = zip(*(x.split(self.most) for x in inputs))
            return torch.cat([self(*part) for part in parts])

        # The smallest graph that the batch fits in.
        size = next(size for size in SIZES if size >= count)
        key = (size, *(x.shape[1:] for x in inputs))
        if key not in self.captures:
            self.captures[key] = self.capture([_filled(x, size) for x in inputs])
        captured = self.captures[key]

        # What is left of an earlier batch behind this one does not matter.
        for buffer, x in zip(captured.inputs, inputs):
            buffer[:count].copy_(x)
        captured.graph.replay()
        return captured.output[:count].clone()

    def prove(self, inputs: tuple[Tensor, ...]) -> None:
        """Decide for half precision or float32, on the first and the last image."""
        ends = [x[[0, -1]] for x in inputs]
        self.half_is_accurate = half_is_accurate(self.name, self.half(*ends), self.full(*ends))
        self.proven = True

    def capture(self, inputs: list[Tensor]) -> Capture:
        """The graph of one forward pass that reads these tensors."""
        function = self.half if self.half_is_accurate else self.full

        # The first call of a shape loads kernels, which no graph may contain.
        stream = _side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)

        # The capture. All graphs share the memory of the first, as one runs after the other.
        graph = torch.cuda.CUDAGraph()
        with recording(graph, pool=self.pool):
            output = function(*inputs).float()
        self.pool = self.pool or graph.pool()
        return Capture(graph, inputs, output)


def _filled(x: Tensor, size: int) -> Tensor:
    """A batch (size, ...) that begins with x (B, ...), then copies of its last row."""
    rest = x[-1:].expand(size - len(x), *x.shape[1:])
    return torch.cat([x, rest])


@cache
def _side_stream() -> torch.cuda.Stream:
    """Where functions are tried. Always the same one, because no stream gets memory that another has used."""
    return torch.cuda.Stream()
