"""CUDA kernels of this program, compiled at run time by what torch itself carries: no toolkit, no other compiler.

torch has NVIDIA's run-time compiler and a small launcher for it. They are private to it, so that another version may
lack them: each caller has plain torch to fall back on.
"""
from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ORDINARY_BYTES = 48 * 1024  # of shared memory, that a block can have anyway


def compile_kernels(source: Path, names: tuple[str, ...], options: list[str], device: int,
                    shared_bytes: int = 0) -> list[Callable] | None:
    """The kernels of a file with these names, for a GPU; None where they cannot be had; why is said once.

    `shared_bytes`: of a block, the most that calls use; a GPU may have fewer. A kernel is called with `grid`,
    `block`, `args` (tensors become pointers, numbers `int` or `double`) and `shared_mem` bytes. Nothing compares the
    arguments with its signature. It runs on the current stream, and a CUDA graph can capture it.
    """
    try:
        text = source.read_text()
        with torch.cuda.device(device), without_toolkit():
            if shared_bytes >= ORDINARY_BYTES:
                limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
                if shared_bytes > limit:
                    raise MemoryError(f"a block needs {shared_bytes} bytes of shared memory and can have {limit}")
            first = torch.cuda._compile_kernel(text, names[0], nvcc_options=options)

            # What was compiled is the whole file: each of the others would take as long once more.
            module = torch.cuda._utils._CudaModule(first.module)
            compiled = [getattr(module, name) for name in names]

            # More than the default must be requested.
            if shared_bytes >= ORDINARY_BYTES:
                for kernel in compiled:
                    kernel.set_shared_memory_config(shared_bytes)
            return compiled

    # A private function may be missing or fail in any way.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _say_plain_torch_is_used(source.name, reason[:200])
        return None


@cache
def _say_plain_torch_is_used(name: str, reason: str) -> None:
    """Say, once, why a GPU is slow."""
    print(f"{name} cannot be used here; plain torch takes its place and is slower ({reason})", file=sys.stderr)


def readable(tensor: Tensor) -> Tensor:
    """The same numbers as a kernel can read them: one behind the other, from an address for reads of 16 bytes."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Within, kernels are launched on a device, also by a thread of autograd that has launched nothing yet: such a one
    has no context, and torch makes none where the device's number is the current one already.
    """
    with torch.cuda.device(device):
        torch.cuda.set_device(device)
        yield


@contextmanager
def without_toolkit() -> Iterator[None]:
    """Let torch compile kernels on a machine without a CUDA toolkit.

    It looks for the toolkit's folder of headers, which these kernels do not need, and fails without one. For
    now it knows of "".
    """
    # Imported no earlier, since it takes long, fails without setuptools, and is of use to a GPU alone.
    extension = importlib.import_module("torch.utils.cpp_extension")
    home = extension.CUDA_HOME
    extension.CUDA_HOME = home or ""
    try:
        yield
    finally:
        extension.CUDA_HOME = home
