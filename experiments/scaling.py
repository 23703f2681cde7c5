"""How much faster several GPUs of one machine train a prior. A command, once with one process, then with several:

    torchrun --nproc_per_node=1 -m experiments.scaling --preset nano --out scaling
    torchrun --nproc_per_node=2 -m experiments.scaling --preset nano --out scaling

prints, for a global batch as large as with one process and for one as large per process: sequences per second, memory,
the time that averaging gradients takes, and how far the losses are from those of one process. The data are the six
shipped toys, the weights random.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common import files
from common.machine import device_name, peak_gb, stream_seed
from common.processes import is_first
from presets import MODELS
from sparsefusion import ROOT, SparseFusion
from train import PriorTraining, TrainConfig
from training import ranks
from training.fit import Fit
from training.packed import load_packed

VIEWS = 2     # input views of every sequence
FRAMES = 8    # of every sequence
STEPS = 50    # that are compared
WARM_UP = 10  # that are not timed: algorithms are chosen, graphs are captured
REPEATS = 11  # of averaging gradients


def make_fit(name: str, batch: int, device: str, out: Path) -> Fit:
    """A training of a preset with random weights, the same in all processes."""
    torch.manual_seed(stream_seed(0, "scaling"))
    with torch.device(device):
        model = SparseFusion(MODELS[name])
    model = model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    config = TrainConfig(batch=batch, frames=FRAMES, min_views=VIEWS, max_views=VIEWS, model=model.preset)
    data = load_packed([ROOT / "sample" / "co3d"], ["toys"], FRAMES, model.preset.image_size, workers=1)
    fit = Fit(PriorTraining(data, config, model, device), config.fit, out, 0, device, {}, [], [])
    ranks.join_norms(fit.module)
    return fit


def milliseconds(run: Callable[[], object]) -> float:
    """That a call takes, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def measure(fit: Fit) -> tuple[dict[str, float], list[list[float]]]:
    """Speed, memory and communication of a training, and the losses of its first steps."""
    losses: list[dict[str, Tensor]] = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for step in range(WARM_UP):
            losses.append(fit.step(step))
        tries = peak_gb(fit.device)
        if fit.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        passed = milliseconds(lambda: losses.extend(fit.step(step) for step in range(WARM_UP, STEPS)))
    averaging = [milliseconds(lambda: ranks.average_gradients(fit.parameters)) for _ in range(REPEATS)]
    step_ms = passed / (STEPS - WARM_UP)
    row = {
        "batch": fit.training.config.batch,
        "ms a step": round(step_ms, 1),
        "sequences/s": round(fit.training.config.batch / step_ms * 1e3, 1),
        "GB a GPU": peak_gb(fit.device),
        "GB at first": tries,
        "ms averaging": round(statistics.median(averaging), 2),
    }
    return row, [[float(x) for x in one.values()] for one in losses]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--preset", choices=MODELS, default="nano")
    p.add_argument("--batch", type=int, default=16, help="sequences per step of all processes, and of each")
    p.add_argument("--out", type=Path, required=True, help="folder for what one process measured")
    args = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    with ranks.joined(device):
        world = dist.get_world_size()
        one = args.out / f"{args.preset}.json"
        before, reference = json.loads(one.read_text()) if world > 1 else (None, None)
        print(f"{args.preset}, {world} x {device_name(device)}")
        for batch in sorted({args.batch, args.batch * world}):
            fit = make_fit(args.preset, batch, device, args.out / "x.pt")
            row, losses = measure(fit)
            if before:
                row["times one"] = round(row["sequences/s"] / before["sequences/s"], 2)
            if before and batch == args.batch:
                apart = (torch.tensor(losses) - torch.tensor(reference)).abs()
                row["losses apart"] = f"{apart.mean():.5f}, at most {apart.max():.5f}"
            print(row, flush=True)
            if world == 1 and is_first():
                files.save_bytes(json.dumps([row, losses]).encode(), one)
            fit.graphs.forget()  # or NCCL could not end
            del fit
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
