"""Times and checks of the training step on one GPU: python gpu_measure.py cuda|cpu. To be dropped before a merge.

083d861 on one H200: 139 ms a step, 115 sequences/s (nano preset, 16 sequences x 12 noisings x 2 views).
"""
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import presets
import sparsefusion
import train
from gpu import layernorm
from gpu.graphs import map_tensors
from training.fit import Fit, update_average
from training.packed import load_packed

DEVICE = sys.argv[1]
REAL = DEVICE == "cuda"
BATCH, STEPS = (16, 40) if REAL else (1, 1)
ROOT = Path(__file__).resolve().parent
OUT = Path(tempfile.mkdtemp()) / "x.pt"
BEGAN = time.time()


def say(*words):
    print(f"[{time.time() - BEGAN:.0f} s]", *words, flush=True)


def sync():
    if REAL:
        torch.cuda.synchronize()


def make(batch=BATCH, preset=None, frames=8):
    torch.manual_seed(0)
    if preset is None:
        model = sparsefusion.load(ROOT / "sample/nano.pt").to(DEVICE)
    else:
        with torch.device(DEVICE):
            model = sparsefusion.SparseFusion(preset)
        model = model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    config = train.TrainConfig(batch=batch, frames=frames, min_views=2, max_views=2, model=model.preset)
    config = replace(config, fit=replace(config.fit, warmup=10))
    data = load_packed([ROOT / "sample/co3d"], ["toys"], frames, model.preset.image_size, workers=1)
    return Fit(train.PriorTraining(data, config, model, DEVICE), config.fit, OUT, 0, DEVICE, {}, [], [])


def rate(fit, name, unit=BATCH, steps=STEPS, warm=6):
    for step in range(warm if REAL else 1):
        fit.step(step)
    sync()
    began = time.perf_counter()
    for step in range(steps):
        fit.step(step)
    sync()
    ms = (time.perf_counter() - began) / steps * 1e3
    say(f"{name}: {ms:.2f} ms a step, {unit / ms * 1e3:.1f} a second")


def profile(fit, rows):
    activities = [torch.profiler.ProfilerActivity.CUDA if REAL else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as p:
        fit.step(0), fit.step(1)
        sync()
    keys = sorted((k for k in p.key_averages() if "CUDA" in str(k.device_type)), key=lambda k: -k.self_device_time_total)
    say(f"kernels: {sum(k.self_device_time_total for k in keys) / 2e3:.2f} ms, {sum(k.count for k in keys) // 2} a step")
    for k in keys[:rows]:
        print(f"{k.self_device_time_total / 2e3:8.3f} ms {k.count // 2:5} x {k.key[:90]}")


def main():
    # The same losses one by one and by a graph.
    losses = []
    for graphs in (False, True):
        fit = make()
        fit.graphs.enabled = graphs and REAL
        if not fit.graphs.enabled:
            fit.draw = lambda step, draw=fit.draw: map_tensors(lambda x: x.to(DEVICE), draw(step))
        began = time.perf_counter()
        shown = [list(fit.step(step).values()) for step in range(STEPS)]
        losses.append(torch.tensor([[float(x) for x in one] for one in shown]))
        say(f"graphs {graphs}: losses {[round(float(x.mean()), 5) for x in losses[-1].sum(1).split(10)]}, "
            f"{(time.perf_counter() - began) / STEPS * 1e3:.1f} ms a step with the first ones")
    say(f"largest difference {(losses[0] - losses[1]).abs().max():.5f}, mean {(losses[0] - losses[1]).mean():.6f}")

    rate(fit, "A graph and layernorm.cu")
    profile(fit, 22)
    began = time.perf_counter()
    fit.draw(0), fit.draw(1)
    say(f"draw {(time.perf_counter() - began) / 2 * 1e3:.1f} ms")
    update_average(fit.average, fit.weights, 0.9)
    sync()
    began = time.perf_counter()
    update_average(fit.average, fit.weights, 0.9)
    sync()
    say(f"average {(time.perf_counter() - began) * 1e3:.2f} ms")

    # Variants.
    real = layernorm._compile
    layernorm._compile = lambda *args: None
    fit.graphs.forget()
    rate(fit, "B without layernorm.cu")
    layernorm._compile = real

    unet = fit.module.vldm.unet
    for m in unet.modules():
        if isinstance(m, torch.nn.GroupNorm):
            def norm(x, m=m):
                with torch.autocast(DEVICE, enabled=False):
                    return F.group_norm(x, m.num_groups, m.weight.to(x.dtype), m.bias.to(x.dtype), m.eps)
            m.forward = norm
    fit.graphs.forget()
    rate(fit, "C group norms in bfloat16")

    pairs = {"vldm.unet." + n: p for n, p in unet.named_parameters() if p.ndim > 1 and not n.startswith(unet.EXACT)}
    halves = {n: torch.empty_like(p, dtype=torch.bfloat16 if REAL else None).requires_grad_() for n, p in pairs.items()}

    def update(batch):
        with torch.no_grad():
            torch._foreach_copy_(list(halves.values()), list(pairs.values()))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=REAL):
            losses = torch.func.functional_call(fit.module, halves, (batch,))
            loss = sum(losses.values())
        fit.optimizer.zero_grad(set_to_none=True)
        for half in halves.values():
            half.grad = None
        loss.backward()
        for p in pairs.values():
            p.grad = torch.empty_like(p)
        torch._foreach_copy_([p.grad for p in pairs.values()], [half.grad for half in halves.values()])
        norm = torch.nn.utils.clip_grad_norm_(fit.parameters, 1.0)
        fit.optimizer.step()
        return torch.cat([torch.stack(list(losses.values())).detach(), norm[None]])

    fit.update = update
    fit.graphs.forget()
    rate(fit, "D and the UNet's weights in bfloat16, all at once")

    # The paper's size.
    del fit, unet, pairs, halves
    if REAL:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        fit = make(2, presets.PAPER, 4)
        rate(fit, "paper, 2 sequences x 12 latents", 24, 8, 4)
        say(f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB")


if __name__ == "__main__":
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        main()
