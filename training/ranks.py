"""One training in several processes, a GPU each, on any number of nodes: `torchrun` starts them.

Every process takes its part of each batch. What they compute is what one process would: a sample's random numbers
follow from its place in the whole batch (`Draws`), gradients are means over all processes, and so are the moments of
batch norms. NCCL joins GPUs, gloo CPUs. Without `torchrun` the one process is all of them.

Dropout is the exception: its masks depend on the number of processes.

Shapes: `B` samples of a step, `b` of these in this process, `C H W` channels, rows and columns of a map.
"""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import processes
from common.machine import stream_seed

LOST = ("gloo", "NCCL", "Connection", "peer")  # words of torch's errors where another process has ended


# ---------------------------------------------------------------------------------------------- together

@contextmanager
def joined(device: str) -> Iterator[None]:
    """Within, this process is one of those that `torchrun` has started, if it has; the first one prints for all.

    Where another one ends before its time, so does this one, by a `ConnectionError` of one line.
    """
    if "RANK" not in os.environ:
        yield
        return

    # On a node every process has a GPU of its own.
    if device == "cuda":
        gpu = int(os.environ["LOCAL_RANK"])
        if gpu >= torch.cuda.device_count():
            raise ValueError(f"torchrun: process {gpu} of this machine has no GPU; it has {torch.cuda.device_count()}")
        torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

    try:
        with redirect_stdout(sys.stdout if processes.is_first() else open(os.devnull, "w")):
            yield
    except RuntimeError as e:
        if not any(word in str(e) for word in LOST):
            raise
        raise ConnectionError("another process of this training has ended; the same command resumes from what is "
                              "saved") from None
    finally:
        # A thread of gloo may still have to free its last tensor, for which it needs this one: torch deadlocks where
        # this one goes on to free the group.
        time.sleep(0.3)
    dist.destroy_process_group()


def places(batch: int) -> range:
    """Which of a batch's B samples are this process's. Raises `ValueError` where they cannot be shared equally."""
    if not dist.is_initialized():
        return range(batch)
    count = dist.get_world_size()
    if batch % count:
        raise ValueError(f"batch {batch}: not a multiple of {count} processes")
    share = batch // count
    return range(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def largest(*numbers: float) -> list[float]:
    """Of each number the largest that any process has; all wait for one another."""
    if not dist.is_initialized():
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def check_interrupt() -> None:
    """Raises `Interrupted` in all processes at once if a signal has come to any of them."""
    number, = largest(processes.asked())
    if number:
        raise processes.Interrupted(int(number))


@contextmanager
def agreed() -> Iterator[None]:
    """Bad input that any process finds within is an error of all, which the first one reports."""
    if not dist.is_initialized():
        yield
        return

    errors = [""] * dist.get_world_size()
    error = ""
    try:
        yield
    except (OSError, ValueError) as e:
        error = str(e)
    dist.all_gather_object(errors, error)
    if any(errors):
        fail(ValueError(max(errors, key=bool)))  # the first one


def fail(error: BaseException, code: int = 2) -> None:
    """Raise what all processes raise; those that are not the first end without a word."""
    if processes.is_first():
        raise error
    sys.exit(code)


# ---------------------------------------------------------------------------------------------- the same numbers

class Draws:
    """The random numbers of one step for this process's samples, on the CPU. Every sample has a generator of its own,
    seeded by the training's seed, the step and the sample's place in the whole batch.
    """

    def __init__(self, seed: int, step: int | str, batch: int, places: range):
        self.batch = batch                           # B
        self.places = torch.tensor(places)           # (b,) of the samples in the whole batch
        # For what all samples share, the same in all processes; then one for every sample.
        self.common, *self.generators = (torch.Generator().manual_seed(stream_seed(seed, f"step {step} {name}"))
                                         for name in ("common", *places))

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1): (b, *shape)."""
        return torch.stack([torch.rand(shape, generator=one) for one in self.generators])

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers: (b, *shape)."""
        return torch.stack([torch.randn(shape, generator=one) for one in self.generators])

    def choose(self, count: int) -> Tensor:
        """One of `count` things for every sample: (b,) whole numbers below `count`."""
        return (self.rand() * count).long()


def mean(x: Tensor) -> Tensor:
    """The mean over all processes of a tensor, the same shape; differentiable."""
    return _Mean.apply(x) if dist.is_initialized() else x


class _Mean(torch.autograd.Function):
    """The mean over all processes; so is its gradient, since the losses of all follow from it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """The gradient in `x`: the same shape."""
        return _Mean.forward(ctx, grad)


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch normalization (Ioffe and Szegedy, 2015) of maps (b, C, H, W), its moments those of all processes' maps.

    (torch.nn.SyncBatchNorm is for GPUs only.)
    """
    if not norm.training:
        return nn.BatchNorm2d.forward(norm, x)

    # Mean and variance of every channel, in float32; the square after the mean, or it would lose its last digits.
    average = mean(x.float().mean((0, 2, 3)))
    centered = x.float() - average[:, None, None]
    variance = mean(centered.square().mean((0, 2, 3)))

    # The running ones: of the variance an unbiased estimate.
    with torch.no_grad():
        count = dist.get_world_size() * x.numel() / x.shape[1]
        norm.running_mean.lerp_(average, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        norm.num_batches_tracked += 1

    scale = norm.weight * (variance + norm.eps).rsqrt()
    return (centered * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


def join_norms(module: nn.Module) -> None:
    """From now on the batch norms of a module take the moments of all processes' maps."""
    if not dist.is_initialized():
        return
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.forward = partial(batch_norm, part)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Every gradient becomes its mean over all processes.

    All at once after the backward pass, so that a CUDA graph can capture it. (DistributedDataParallel sends while the
    pass still runs, and is captured after eleven steps at the earliest.)
    """
    if not dist.is_initialized():
        return
    total = mean(torch.cat([p.grad.flatten() for p in parameters]))
    for p, gradient in zip(parameters, total.split([p.numel() for p in parameters])):
        p.grad.copy_(gradient.view_as(p))
