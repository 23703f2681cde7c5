"""How fast the parts are on this machine, and how fast its memory and its arithmetic would let them be. A command:

    python -m experiments.bench [--json FILE] [--device cpu]

prints a row per part. Its bytes and operations are those of the algorithm, every access counted, as if there were no
cache. The floor is the time that they take at the rates of a large copy and of a large float32 matrix product, both
measured in the same run: the larger of the two times. Reached is the floor's share in the median time; a part that
lives in the caches may come above 100 %. Sizes are smaller on a CPU.

A further part is a function like `encoding`, listed in PARTS.
"""
from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cameras
import distillation
import hashgrid
import ngp
import presets
import sparsefusion
import vldm
from common import files
from common.machine import device_name
from datasets import co3d
from distillation import Lattice
from gpu import hashgrid_kernel, mlp

SAMPLE = Path(__file__).resolve().parent.parent / "sample" / "co3d"
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
    reserved_gb: float | None  # of a GPU's memory, after a run with an empty cache; graphs keep theirs


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
    if hashgrid_kernel.kernels_for(x, table) is not None:
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


def _forward_and_backward(encode: Callable, x: Tensor, table: Tensor, levels: tuple[hashgrid.Level, ...],
                          grad: Tensor) -> None:
    table.grad = None
    encode(x, table, levels).backward(grad)


def field_network(device: torch.device) -> Iterator[Part]:
    """The paper's field network, 32 numbers per point to 4, and its gradient: by kernels and by plain torch in float32.

    Bytes are those of the points, the results and their gradients, as if nothing else passed through the memory. The
    kernels multiply in bfloat16 and may reach more than the float32 floor.
    """
    log2_points = 20 if device.type == "cuda" else 14
    field = ngp.Field(presets.PRESETS["paper"].field).to(device)
    widths = [field.mlp[0].in_features, *[layer.out_features for layer in field.mlp[::2]]]
    products = sum(a * b for a, b in zip(widths, widths[1:]))
    x = torch.randn(2**log2_points, widths[0], device=device, requires_grad=True)
    grad = torch.randn(2**log2_points, widths[-1], device=device)

    def both_ways(rounded: bool) -> None:
        """The result and all gradients."""
        x.grad = None
        field.zero_grad()
        mlp.run(field.mlp, x, rounded).backward(grad)

    by_kernel = device.type == "cuda" and mlp._network_of(field.mlp, x) is not None
    for path in ("kernel", "torch") if by_kernel else ("torch",):
        rounded = path == "kernel"
        forward = _as_graph(partial(torch.no_grad()(mlp.run), field.mlp, x, rounded), device)
        both = _as_graph(partial(both_ways, rounded), device)
        moved, operations = x.nbytes + grad.nbytes, 2 * len(x) * products
        size = f"2^{log2_points} points, {' to '.join(str(width) for width in widths)}"
        yield Part(f"network forward, {path}", size, forward, moved, operations)
        yield Part(f"network both ways, {path}", size, both, 2 * moved + x.nbytes, 3 * operations)


def denoiser(device: torch.device) -> Iterator[Part]:
    """The networks of multi-step denoising with random weights, and whole denoisings from levels all over.

    The paper's networks on a GPU, where they run in half precision and may reach more than the float32 floor; those of
    the sample categories on a CPU. Bytes are the weights', once.
    """
    # The last layer starts at zero, which would be a result without a spread to compare with.
    name = "paper" if device.type == "cuda" else "nano"
    with device:
        model = sparsefusion.SparseFusion(presets.MODELS[name])
    torch.nn.init.normal_(model.vldm.unet.final_conv.weight, std=0.02)
    exact = copy.deepcopy(model).eval()
    model = sparsefusion.ready(model, device)
    for batch in (1, 8, 16, 32) if device.type == "cuda" else (1, 4):
        runs = _denoiser_runs(model, batch, device)
        counted = _denoiser_runs(exact, batch, device)  # without graphs, in which operations do not show
        for name, run in runs.items():
            weights = model.vae if "VAE" in name or "distance" in name else model.vldm.unet
            size = sum(weight.nbytes for weight in weights.parameters())
            yield Part(name, f"{model.preset.name}, batch {batch}", run, size, _operations(counted[name]))


@torch.no_grad()
def _denoiser_runs(model: sparsefusion.SparseFusion, batch: int, device: torch.device) -> dict[str, Callable]:
    """The parts for a batch of images, by name."""
    # What the networks are given.
    preset = model.preset
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, preset.image_size, preset.image_size, generator=generator).to(device)
    latents = torch.randn(batch, 4, preset.latent_size, preset.latent_size, generator=generator).to(device)
    features = torch.randn(batch, preset.unet.cond_channels, preset.map_size, preset.map_size, generator=generator)
    features = features.to(device)
    levels = torch.linspace(0, 1, batch + 1)[1:].tolist()

    # A call of each network. What the UNet makes of the features is no part of a call.
    network = model.vldm.unet
    predict = torch.no_grad()(network.predict)
    runs = {
        "UNet": partial(predict, latents, torch.zeros(batch, device=device), network.embed_features(features)),
        "VAE encode": partial(torch.no_grad()(model.vae.encode), images),
        "VAE decode": partial(torch.no_grad()(model.vae.decode), latents),
        "feature distance both ways": partial(_distance_both_ways, model, images),
    }

    # Whole denoisings.
    for solver, steps in (("plms", 50), ("dpmpp", 10)):
        sampler = replace(vldm.SamplerConfig(), solver=solver, denoise_steps=steps)
        runs[f"denoise, {solver} {steps}"] = partial(model.denoise, images, features, levels, generator, sampler)
    return runs


def _operations(run: Callable) -> int:
    """How many operations the matrix products and convolutions of a run have."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@torch.enable_grad()
def _distance_both_ways(model: sparsefusion.SparseFusion, images: Tensor) -> Tensor:
    x = images.detach().requires_grad_()
    return torch.autograd.grad(model.feature_distance(x, images.flip(-1)).sum(), x)[0]


def epipolar_transformer(device: torch.device) -> Iterator[Part]:
    """What the EFT says of whole views, from more and from larger input views: encoded once, then every viewpoint.

    Operations are those of the linear layers and of attention as the paper draws them. Bytes are those of a token, read
    and written once a layer, by each of the two sublayers. On a GPU it runs in half precision.
    """
    large = device.type == "cuda"
    model = sparsefusion.SparseFusion(presets.MODELS["paper" if large else "nano"]).to(device).eval()
    preset, viewpoints = model.preset, 82 if large else 1
    for views, side in ((2, 256), (6, 256), (24, 256), (2, 128), (2, 512)) if large else ((2, 128), (6, 128)):
        around = _cameras_around(views + viewpoints).to(device)
        images = torch.rand(views, 3, side, side, device=device)
        map_size = replace(preset, image_size=side).map_size
        run = partial(_condition_of, model, replace(preset, image_size=side), images, around)

        # Tokens of T1 and of T2 are as many; those of T3 are few.
        config = preset.eft
        tokens = 2 * viewpoints * map_size**2 * views * config.depths
        linear = 4 * config.width**2 + 2 * config.width * config.feedforward
        attention = config.width * (views + config.depths)
        operations = tokens * config.layers * 2 * (linear + attention)
        moved = tokens * config.layers * 2 * 2 * config.width * (2 if large else 4)
        yield Part("EFT", f"{viewpoints} viewpoints, {views} inputs of {side}^2, {preset.name}", run, moved, operations)


def _condition_of(model: sparsefusion.SparseFusion, preset: sparsefusion.Preset, images: Tensor,
                  around: cameras.Cameras) -> sparsefusion.Condition:
    """What the EFT says of all cameras but the first ones, those of images (V, 3, S, S), by a preset's sizes."""
    model.preset = preset
    return model.condition(images, around[:len(images)], around[len(images):], around)


def _cameras_around(count: int) -> cameras.Cameras:
    """Cameras on a circle round the origin, at a distance of 8."""
    angle = torch.linspace(0, 6, count)
    eye = 8 * torch.stack([angle.sin(), torch.full_like(angle, 0.3), angle.cos()], -1)
    R, T = cameras.look_at(eye, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    return cameras.Cameras(R, T, torch.full((count, 2), 2.0), torch.zeros(count, 2))


def rendering(device: torch.device) -> Iterator[Part]:
    """Renderings of a field of the paper's size with gradients, and whole iterations of the bootstrap.

    The object is the shipped toy, of whose space six views' masks leave what they cannot rule out. Bytes are the rows
    of the encoding and the activations of the network, operations the network's, of the samples in occupied cells. (On
    a GPU activations stay in registers, which the floor does not know.)
    """
    size = 256 if device.type == "cuda" else 64
    scene = co3d.load_sequence(SAMPLE, "toys", "toy_1000_00000", size).to(device)
    inputs = scene[cameras.evenly_spaced(len(scene), 6)]
    paper = replace(presets.PRESETS["paper"], image_size=size, render_size=size // 2, bootstrap=1000)

    # As many samples as the paper's two passes, and what replaces them.
    for samples, importance in ((64, 64), (128, 0)):
        field = replace(paper.field, samples_per_ray=samples, importance_samples=importance)
        work = distillation.Distillation(inputs, replace(paper, field=field), 0)
        rays = work.cast(inputs.cameras[0], Lattice(size, 2, 0, 0))
        run = _as_graph(partial(_render_both_ways, work, rays), device)
        title = f"{size // 2}^2 rays, {samples} + {importance} samples"
        yield _rendering_part("rendering, carved, both ways", title, run, work, 1)

    # Two renderings and two updates; no diffusion model yet.
    stub = SimpleNamespace(preset=SimpleNamespace(image_size=size))
    images = torch.rand(len(inputs), 3, 32, 32, device=device)
    prior = distillation.Prior(stub, inputs.cameras, sparsefusion.Condition(None, images), None)
    work = distillation.Distillation(inputs, paper, 0, prior)
    yield _rendering_part("iteration of the bootstrap", title, partial(_next_step, work), work, 2)


def _rendering_part(name: str, title: str, run: Callable, work: distillation.Distillation, renderings: int) -> Part:
    """What is counted of some renderings of rays, each with its gradient."""
    config = work.config.field
    counter = work.new_buffer()
    samples = counter.size / 1.1 * renderings
    rows = config.levels * 8 * config.features_per_level * 4 * 3
    widths = [config.levels * config.features_per_level, *[config.width] * config.hidden_layers, 4]
    products = sum(a * b for a, b in zip(widths, widths[1:]))
    size = f"{title}, {samples / renderings / 1e6:.2f} M in occupied cells"
    return Part(name, size, run, samples * (rows + 4 * 4 * sum(widths)), samples * 6 * products)


def _render_both_ways(work: distillation.Distillation, rays: distillation.Rays) -> None:
    """A rendering and its gradient in the field."""
    for parameter in work.field.parameters():
        parameter.grad = None
    seen = work.render(rays)
    (seen.color.mean() + seen.opacity.mean()).backward()


def _next_step(work: distillation.Distillation) -> None:
    """The next iteration."""
    work.step(work.completed)
    work.completed += 1


def _as_graph(run: Callable, device: torch.device) -> Callable:
    """The same as a CUDA graph on a GPU, as distillation runs it."""
    if device.type != "cuda":
        return run
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


PARTS = [encoding, field_network, rendering, denoiser, epipolar_transformer]


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
    return Machine(device_name(device), torch.__version__, copy_rate, 2 * side**3 / product / 1e6)


def measure(part: Part, machine: Machine, device: torch.device) -> Row:
    """Time one part."""
    times = milliseconds(part.run, device)
    median = statistics.median(times)
    spread = times[round(0.9 * (len(times) - 1))] - times[round(0.1 * (len(times) - 1))]
    floor = max(part.bytes / machine.copy_gb_per_s, part.operations / machine.matrix_gflop_per_s) / 1e6

    # How much memory it takes.
    reserved = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        part.run()
        reserved = torch.cuda.memory_reserved() / 1e9
    return Row(part.name, part.size, median, spread, part.bytes / 1e9, part.operations / 1e9, floor, floor / median,
               reserved)


# ---------------------------------------------------------------------------------------------- the command

def main(argv: list[str] | None = None) -> None:
    """Entry point: a row per part, and the same as JSON if asked for."""
    parser = argparse.ArgumentParser(description="time the parts on this machine, beside its physical limits")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], help="only these")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run (default: the GPU if there is one)")
    args = parser.parse_args(argv)

    machine = examine(args.device)
    print(f"{machine.name}, torch {machine.torch}: copies {machine.copy_gb_per_s:.0f} GB/s, multiplies matrices at "
          f"{machine.matrix_gflop_per_s / 1e3:.1f} TFLOP/s\n")
    print(f"{'part':<28}{'size':<45}{'ms':>9}{'spread':>9}{'GB':>8}{'GFLOP':>8}{'floor ms':>10}{'reached':>9}"
          f"{'GB room':>9}")

    rows = []
    for parts in PARTS:
        wanted = not args.parts or parts.__name__ in args.parts
        for part in parts(args.device) if wanted else ():
            row = measure(part, machine, args.device)
            rows.append(row)
            room = "" if row.reserved_gb is None else f"{row.reserved_gb:>9.2f}"
            print(f"{row.part:<28}{row.size:<45}{row.median_ms:>9.3f}{row.spread_ms:>9.3f}{row.gigabytes:>8.3f}"
                  f"{row.gigaflops:>8.3f}{row.floor_ms:>10.3f}{row.reached:>9.1%}{room}", flush=True)

    if args.json:
        files.save_json({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}, args.json)


if __name__ == "__main__":
    main()
