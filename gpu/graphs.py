"""Networks as they run on a GPU: in half precision, channels last, a CUDA graph for every size of a batch.

At batch 1 a forward pass is about a thousand kernels of microseconds, and launching them one by one takes longer than
they do. A graph launches them all at once; it knows addresses only, so inputs are copied to them and the result from
its own.

float16 rather than bfloat16: the UNet's noise is off by 0.0016 instead of 0.013 of its spread, and its activations
(about 15) are nowhere near the largest number, 65504. That holds for weights that were seen. So half precision proves
itself on those at hand: some calls, the first one and ever fewer later, run in float32 beside it.
"""
from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

# Of batches that have a graph; others are filled up to the next one, larger ones divided.
SIZES = (1, 4, 8, 12, 16, 20, 24, 28, 32)

# Root mean square error that half precision may have, of the result's spread: ten times what was measured (0.0014 to
# 0.0025 on an H100). To compare: with the sample's prior five steps of PLMS are off by 0.05 to 0.08 of what denoising
# changes.
TOLERANCE = 0.02


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, **where) -> Iterator[None]:
    """Within, operations are captured in a graph; `where` goes to `torch.cuda.graph`.

    Garbage waits: if another graph among it were freed meanwhile, the capture would fail. Other threads, NCCL's among
    them, may use the GPU.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **where):
            yield
    finally:
        if collects:
            gc.enable()


class Replay:
    """A function of a batch as a CUDA graph: the first calls run as usual, then one is captured and replayed.

    A batch is a tuple of tensors whose shapes never change, or of such tuples; later ones may be on the CPU.
    """

    def __init__(self, function: Callable[[tuple], Tensor], batch: tuple, pool: tuple[int, int], warm_ups: int):
        """`pool`: the memory of all graphs that run one after the other; `warm_ups` calls run as usual."""
        self.function = function
        self.pool = pool
        self.warm_ups = warm_ups
        self.batch = map_tensors(torch.clone, batch)
        self.graph = None
        self.result = None
        self.calls = 0

    def __call__(self, batch: tuple) -> Tensor:
        # The graph's own batch takes the new numbers.
        for own, given in zip(tensors(self.batch), tensors(batch), strict=True):
            own.copy_(given, non_blocking=True)
        self.calls += 1
        if self.calls <= self.warm_ups:
            return self.run_on_stream()
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return self.result.clone()  # where other graphs do not write

    def run_on_stream(self) -> Tensor:
        """As usual, but on the stream of the capture, as torch requires. Kernels are loaded, which no graph may do."""
        stream = _side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.function(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def capture(self) -> None:
        """Record what one call does; nothing is done yet."""
        self.graph = torch.cuda.CUDAGraph()
        with recording(self.graph, pool=self.pool, stream=_side_stream()):
            self.result = self.function(self.batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch):
    """`function` of every tensor of a batch: of a tensor, of a tuple of such, of what has a `map` of its own (cameras).
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if not isinstance(batch, tuple):
        return batch.map(function)
    mapped = [map_tensors(function, x) for x in batch]
    return type(batch)(*mapped) if hasattr(batch, "_fields") else tuple(mapped)


def tensors(batch) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    found = []
    map_tensors(found.append, batch)
    return found


@cache
def _side_stream() -> torch.cuda.Stream:
    """Where functions run as usual and are captured. Always the same one, because no stream gets memory that another
    has used.
    """
    return torch.cuda.Stream()


def half_copy(network: nn.Module, exact: tuple[str, ...] = ()) -> nn.Module:
    """A frozen copy in half precision and channels last; children whose names begin with `exact` stay in float32.

    Later changes of the network's weights are not seen.
    """
    half = copy.deepcopy(network).eval().requires_grad_(False)
    for name, part in half.named_children():
        if not name.startswith(exact):
            part.to(torch.float16, memory_format=torch.channels_last)
    return half


def accelerate(module: nn.Module, half: nn.Module, methods: dict[str, str], most: int = SIZES[-1]) -> None:
    """From now on these methods of a network run as CUDA graphs of its `half_copy` where no gradients are needed.

    `methods`: what each is called in a message. `most`: of a batch at once, see `Graphed`.
    """
    for method, name in methods.items():
        setattr(module, method, Graphed(name, getattr(half, method), getattr(module, method), most))


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
    """A function of batches (B, ...), one or several, as CUDA graphs where no gradients are needed."""

    def __init__(self, name: str, half: Callable[..., Tensor], full: Callable[..., Tensor], most: int = SIZES[-1]):
        """`half` and `full`: the function in half precision and in float32, which decides whether half will do.
        `most`: of a batch goes through a graph at once, for a graph keeps its memory.
        """
        self.name = name
        self.most = min(most, SIZES[-1])
        self.half = half
        self.full = full
        self.half_is_accurate = True
        self.calls = 0
        self.replays = {}
        self.pool = None  # the memory of all graphs

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function of inputs (B, ...); the result is float32."""
        if torch.is_grad_enabled():
            return self.full(*inputs)

        # Other views and noise levels come later, so the second, fourth, eighth, ... call is a proof again.
        self.calls += 1
        if self.half_is_accurate and self.calls & (self.calls - 1) == 0:
            self.prove(inputs)

        count = len(inputs[0])
        if count > self.most:
            parts = zip(*(x.split(self.most) for x in inputs))
            return torch.cat([self(*part) for part in parts])

        # The smallest graph that the batch fits in.
        size = next(size for size in SIZES if size >= count)
        batch = tuple(_filled(x, size) for x in inputs)
        shapes = tuple(x.shape for x in batch)
        if shapes not in self.replays:
            self.replays[shapes] = self.replay(batch)
        return self.replays[shapes](batch)[:count]

    def prove(self, inputs: tuple[Tensor, ...]) -> None:
        """Decide for half precision or float32, on the first and the last image."""
        ends = [x[[0, -1]] for x in inputs]
        self.half_is_accurate = half_is_accurate(self.name, self.half(*ends), self.full(*ends))
        if not self.half_is_accurate:
            self.replays = {}

    def replay(self, batch: tuple[Tensor, ...]) -> Replay:
        """The graph of one forward pass. All graphs share memory, as one runs after the other."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        function = self.half if self.half_is_accurate else self.full
        return Replay(lambda inputs: function(*inputs).float(), batch, self.pool, warm_ups=1)


def _filled(x: Tensor, size: int) -> Tensor:
    """A batch (size, ...) that begins with x (B, ...), then copies of its last row."""
    rest = x[-1:].expand(size - len(x), *x.shape[1:])
    return torch.cat([x, rest])


# ---------------------------------------------------------------------------------------------- with gradients

class HalfFeatures:
    """Maps that a network makes of an image, in half precision and differentiable in the image. A CUDA graph can
    capture it after a first call.
    """

    def __init__(self, half: Callable[[Tensor], list[Tensor]], full: Callable[[Tensor], list[Tensor]], judge: Graphed):
        """`half` and `full`: the function in half precision and in float32. `judge` knows whether half will do."""
        self.half = half
        self.full = full
        self.judge = judge

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Maps of images (B, C, H, W), float32."""
        if not self.judge.half_is_accurate:
            return self.full(x)

        # The gradient of a mean over pixels is too small a number for half precision, but not times the pixels.
        pixels = x.shape[-2] * x.shape[-1]
        maps = self.half(_ScaledGradient.apply(x, 1 / pixels).half())
        return [_ScaledGradient.apply(one.float(), pixels) for one in maps]


class _ScaledGradient(torch.autograd.Function):
    """The same numbers, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient in the numbers, times the factor: the same shape."""
        return grad * ctx.factor, None
