"""How fast the parts are on this machine, and how fast its memory and its arithmetic would let them be. A command:

    python tests/bench.py [--json FILE] [--device cpu]

prints a row a part. Its bytes and operations are those of the algorithm, every access counted, as if there were no
cache. The floor is the time that they take at the rates of a large copy and of a large float32 matrix product, both
measured in the same run: the larger of the two times. Reached is the floor's share in the median time; a part that
lives in the caches may come above 100 %. Sizes are smaller on a CPU.

A further part is a function like `encoding`, listed in PARTS.
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import files  # noqa: E402
import hashgrid  # noqa: E402
import runtime  # noqa: E402

SECONDS = 1.0  # that a part is repeated for, about


@dataclass(frozen=True)
class Part:
    """Something to be timed."""
    name: str
    size: str
    run: Callable[[], object]
    bytes: float
    operations: float


@dataclass(frozen=True)
class Row:
    """What became of it."""
    part: str
    size: str
    median_ms: float
    spread_ms: float   # from the 10th to the 90th of 100 runs
    gigabytes: float
    gigaflops: float   # operations, not a rate
    floor_ms: float
    reached: float     # floor / median


@dataclass(frozen=True)
class Machine:
    """What the floors are made of."""
    name: str
    torch: str
    copy_gb_per_s: float          # bytes read plus bytes written
    matrix_gflop_per_s: float     # of a float32 matrix product


# ---------------------------------------------------------------------------------------------- parts

# Tables: with the released numbers, and with Instant NGP's.
ENCODINGS = {
    "tiled 2^16, 16..8192": dict(log2_hashmap_size=16, finest_resolution=8192, hashed=False),
    "hashed 2^19, 16..2048": dict(log2_hashmap_size=19, finest_resolution=2048, hashed=True),
}


def encoding(device: torch.device) -> Iterator[Part]:
    """The hash encoding, 16 levels of 2 features, and its gradient: by kernels and by plain torch.

    Random points are all over the cube. The samples of an image's rays, 64 a ray, are in the middle fifth of it, as in
    a scene most of whose space is empty: many share a cell.
    """
    log2_points = 20 if device.type == "cuda" else 14
    generator = torch.Generator().manual_seed(0)
    places = {
        "random points": torch.rand(2**log2_points, 3, generator=generator).to(device),
        "samples of rays": _samples_of_rays(2**log2_points).to(device),
    }

    for title, numbers in ENCODINGS.items():
        grid = hashgrid.HashGrid(levels=16, features_per_level=2, base_resolution=16, bound=1.0, generator=generator,
                                 **numbers).to(device)
        grad = torch.randn(2**log2_points, 32, generator=generator).to(device)
        for place, x in places.items():
            yield from _encoding_of(x, grid, grad, f"2^{log2_points} {place}, {title}")


def _encoding_of(x: Tensor, grid: hashgrid.HashGrid, grad: Tensor, size: str) -> Iterator[Part]:
    """The parts of one table and set of points (N, 3); grad (N, L * C)."""
    table, levels = grid.table, grid.levels
    row = 4 * table.shape[1]
    pairs = grad.nbytes // row

    # Of a point in a level: eight rows and their weights. A gradient reads and writes the rows.
    forward_bytes = x.nbytes + grad.nbytes + pairs * 8 * row
    backward_bytes = x.nbytes + grad.nbytes + pairs * 8 * row * 2
    operations = pairs * (9 + 16 + 8 * 2 * table.shape[1])

    paths = {"torch": hashgrid._Encode.apply}
    if hashgrid.kernels_for(x, table) is not None:
        paths = {"kernel": hashgrid.encode, **paths}
    for path, encode in paths.items():
        forward = partial(encode, x, table.detach(), levels)
        both = partial(_forward_and_backward, encode, x, table, levels, grad)
        yield Part(f"encoding forward, {path}", size, forward, forward_bytes, operations)
        yield Part(f"encoding both ways, {path}", size, both, forward_bytes + backward_bytes, 2 * operations)


def _samples_of_rays(count: int) -> Tensor:
    """Points (count, 3): 64 of each ray of a square image, ray by ray, through a turned cube of a fifth of the side."""
    side = math.isqrt(count // 64)
    across = torch.linspace(-0.1, 0.1, side)
    along = torch.linspace(-0.1, 0.1, 64)
    points = torch.cartesian_prod(across, across, along)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    return points @ turn + 0.5


def _forward_and_backward(encode: Callable, x: Tensor, table: Tensor, levels: hashgrid.Levels, grad: Tensor) -> None:
    table.grad = None
    encode(x, table, levels).backward(grad)


PARTS = [encoding]


# ---------------------------------------------------------------------------------------------- measuring

def milliseconds(run: Callable[[], object], device: torch.device) -> list[float]:
    """The times of repeated runs, sorted; warmed up first."""
    for _ in range(3):
        run()
    clock = _gpu_times if device.type == "cuda" else _cpu_times
    once = statistics.median(clock(run, 3))
    repeats = min(max(int(1e3 * SECONDS / once), 5), 200)
    return sorted(clock(run, repeats))


def _gpu_times(run: Callable[[], object], repeats: int) -> list[float]:
    """Between events on the stream, all runs queued one behind the other."""
    events = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _cpu_times(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def examine(device: torch.device) -> Machine:
    """The two rates of this machine, from a large copy and a large product."""
    large = device.type == "cuda"
    source = torch.rand(2**28 if large else 2**24, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(milliseconds(lambda: target.copy_(source), device))
    copy_rate = 2 * source.nbytes / copy / 1e6

    side = 8192 if large else 1024
    a, b = torch.rand(2, side, side, device=device)
    product = statistics.median(milliseconds(lambda: a @ b, device))
    return Machine(runtime.device_name(device), torch.__version__, copy_rate, 2 * side**3 / product / 1e6)


def measure(part: Part, machine: Machine, device: torch.device) -> Row:
    """Time one part."""
    times = milliseconds(part.run, device)
    median = statistics.median(times)
    spread = times[round(0.9 * (len(times) - 1))] - times[round(0.1 * (len(times) - 1))]
    memory = part.bytes / machine.copy_gb_per_s / 1e6
    arithmetic = part.operations / machine.matrix_gflop_per_s / 1e6
    floor = max(memory, arithmetic)
    return Row(part.name, part.size, median, spread, part.bytes / 1e9, part.operations / 1e9, floor, floor / median)


# ---------------------------------------------------------------------------------------------- the command

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time the parts on this machine, beside its physical limits")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run (default: the GPU if there is one)")
    args = parser.parse_args(argv)

    machine = examine(args.device)
    print(f"{machine.name}, torch {machine.torch}: copies {machine.copy_gb_per_s:.0f} GB/s, multiplies matrices at "
          f"{machine.matrix_gflop_per_s / 1e3:.1f} TFLOP/s\n")
    print(f"{'part':<28}{'size':<45}{'ms':>9}{'spread':>9}{'GB':>8}{'GFLOP':>8}{'floor ms':>10}{'reached':>9}")

    rows = []
    for parts in PARTS:
        for part in parts(args.device):
            row = measure(part, machine, args.device)
            rows.append(row)
            print(f"{row.part:<28}{row.size:<45}{row.median_ms:>9.3f}{row.spread_ms:>9.3f}{row.gigabytes:>8.3f}"
                  f"{row.gigaflops:>8.3f}{row.floor_ms:>10.3f}{row.reached:>9.1%}", flush=True)

    if args.json:
        files.save_json({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}, args.json)


if __name__ == "__main__":
    main()
