"""The machine: where random numbers are drawn, how to get the most out of a CPU, what the memory holds.
"""
from __future__ import annotations

import ctypes
import functools
import platform
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3): freed bytes to keep, bytes that bypass the heap


# ---------------------------------------------------------------------------------------------- random numbers

def stream_seed(seed: int, stream: str) -> int:
    """The seed of a stream of random numbers, in [0, 2^32): a generator on the CPU looks at no further bits.

    Everything random of a run has a name of its own here, so that no two draw the same numbers.
    """
    return zlib.crc32(f"{seed} {stream}".encode(errors="surrogatepass"))


def rand(*shape: int, generator: torch.Generator | None, device) -> Tensor:
    """Uniform numbers in [0, 1) of a shape, drawn where the generator lives and moved to `device`.

    A generator on the CPU gives the same numbers whatever device they are for.
    """
    return torch.rand(shape, generator=generator, device=_home(generator)).to(device)


def randn(*shape: int, generator: torch.Generator | None, device) -> Tensor:
    """Standard normal numbers of a shape, drawn where the generator lives and moved to `device`."""
    return torch.randn(shape, generator=generator, device=_home(generator)).to(device)


def _home(generator: torch.Generator | None) -> torch.device:
    # Without a generator torch's own draws, on the CPU.
    return torch.device("cpu") if generator is None else generator.device


# ---------------------------------------------------------------------------------------------- memory and threads

def spare_the_cpu() -> None:
    """Make this process faster on a CPU: a tenth of an iteration's time. For commands, before they begin.

    Numbers below 1e-38, which a processor handles by far slower routes, become 0. And memory that is freed stays with
    the process: every iteration asks for the same sizes again, and the system would have to empty each page anew.
    """
    torch.set_flush_denormal(True)
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc

    # An older one takes no more than 32 MB, and says so.
    if set_option(M_MMAP_THRESHOLD, 2**30) or set_option(M_MMAP_THRESHOLD, 2**25):
        set_option(M_TRIM_THRESHOLD, 2**30)


def map_threads(function: Callable, jobs: Sequence) -> list:
    """`function(job)` of every job, in their order, in as many threads as torch may use, each with one core.

    So a thread need not wait for the others after every operation of torch. Within a job there are no further threads,
    and autocast is off.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(jobs) == 1:
        return [function(job) for job in jobs]

    # Whether to record gradients is every thread's own business. The number of threads is half so: torch also gives a
    # thread, at its first operation, what another one has set last.
    recording = torch.is_grad_enabled()

    def work(job):
        """One job, with one core, recording gradients or not as the caller does."""
        torch.set_num_threads(1)
        with torch.set_grad_enabled(recording):
            return function(job)

    try:
        return list(_threads(threads).map(work, jobs))
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that are kept from one call to the next."""
    return ThreadPoolExecutor(count)


# ---------------------------------------------------------------------------------------------- what it is

def peak_gb(device: str | torch.device) -> float | None:
    """The most memory used so far, in 10^9 bytes: of the GPU if it is one (torch's cache included), else of this
    process.

    None where the system does not tell (Windows has no `resource`).
    """
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_reserved() / 1e9, 2)
    if resource is None:
        return None

    # Kilobytes, but bytes on a Mac.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def versions(device: str | torch.device) -> dict[str, str]:
    """What the numbers of a run may depend on beside its settings."""
    return {"python": platform.python_version(), "torch": torch.__version__, "device": device_name(device)}


def device_name(device: str | torch.device) -> str:
    """What numbers are made on: the GPU's name, or how many threads of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"
