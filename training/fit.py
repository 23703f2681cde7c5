"""The training loop: Adam with warm-up, cosine decay, clipped gradients and an average of the weights; it saves
itself and resumes.

The loop knows no model and no data: a training brings the module, the loss of a step, and what to write at the end.
The schedule is not the released one, which is one sequence per step and Adam at 5e-5, halved every 50 k steps
[released: train.py:272-281, 435-439].
"""
from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common import files
from common.processes import Interrupted, uninterruptible
from common.progress import Progress
from common.settings import differences
from gpu.update import check_moments

NEVER = 2**62    # a step that no training reaches
DROPOUT = 2**40  # between the seeds of dropout and of all else
Numbers = dict[str, Tensor]  # what a step shows: name -> scalar


@dataclass(frozen=True)
class FitConfig:
    """The numbers of the loop."""
    steps: int = 10000                # updates in all
    lr: float = 4e-4                  # Adam's peak learning rate
    warmup: int = 200                 # steps of linear warm-up
    final_lr_fraction: float = 0.01   # of the peak rate, at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.99)  # Adam's decay rates
    clip_norm: float = 1.0            # largest norm of the gradient
    ema: float = 0.999                # decay of the average of the weights that is kept
    save_seconds: float = 120.0       # between two saves of a running training

    def __post_init__(self):
        if self.steps < 1 or self.warmup < 1:
            raise ValueError("steps and warmup are at least 1")
        if not (self.lr > 0 and self.clip_norm > 0):
            raise ValueError("lr and clip_norm are above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema} is not at least 0 and below 1")


class Fit:
    """A training in progress: of `training.module`.

    `training.loss(generator)` is what one step minimizes, a scalar, and what it shows, `Numbers`;
    `training.finish(average, out)` writes the weights file from the averaged weights of the module, by name.

    Step k draws from generators seeded by (seed, k), so an interrupted run resumes as if it had not been. Every two
    minutes and at the end the state goes to `<out>.state`, and the training writes `out`. `settings` is plain data
    that decides the result: a state with other settings is an error.
    """

    def __init__(self, training, config: FitConfig, out: Path, seed: int, device: str, settings: dict):
        self.training = training
        self.config = config
        self.out = out
        self.seed = seed
        self.device = device
        self.settings = settings | {"seed": seed, "fit": asdict(config)}
        # What a step changes: weights, the optimizer's moments, the average.
        self.module = training.module.train()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, betas=config.betas, fused=device == "cuda")
        self.average = {}
        for name, x in self.module.state_dict().items():
            self.average[name] = x.detach().clone()

        # Where it goes, how far it is, and the first step whose loss or gradient was not finite.
        self.generator = torch.Generator(device)
        self.broken = torch.full((), NEVER, device=device)
        self.state_file = out.with_name(out.name + ".state")
        self.completed = 0

    def resume(self) -> None:
        """Resume from the state file, if there is one; `ValueError` where it is another training's."""
        # Only a state of the same training will do.
        if not self.state_file.exists():
            return
        state = files.read_tensors(self.state_file, "module")
        other = differences(state.get("settings", {}), self.settings)
        if other:
            raise ValueError(f"{self.state_file}: the state of another training ({other}); delete it or choose "
                             "another --out")

        # All that a step changes.
        try:
            files.check_weights(state["module"], self.module)
            files.check_weights(state["average"], self.module)
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            check_moments(self.optimizer)
            for name, x in self.average.items():
                x.copy_(state["average"][name])
            self.completed = range(self.config.steps + 1)[state["completed"]]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"{self.state_file}: not a whole state ({type(e).__name__}); delete it to start again"
                             ) from None
        print(f"resuming {self.out.name} at step {self.completed}")

    def check(self) -> None:
        """Raises `FloatingPointError` where a loss or gradient so far, and with it all weights, was not finite."""
        if self.broken < NEVER:
            raise FloatingPointError(f"{self.out}: the training broke in step {int(self.broken)}, whose loss or "
                                     "gradient is not a finite number; a smaller lr may help")

    def save(self) -> None:
        """The state, to resume, and the weights, for use."""
        self.check()
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "completed": self.completed,
            "settings": self.settings,
        }
        files.save_tensors(state, self.state_file)
        self.training.finish(self.average, self.out)

    def step(self, step: int) -> Numbers:
        """One update; returns what to show."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)

        # Everything random in a step follows from the seed and its number; the global generator is dropout's, and has
        # numbers of its own.
        self.generator.manual_seed(self.seed * 10_000_019 + step)
        torch.manual_seed(self.seed * 10_000_019 + step + DROPOUT)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss, numbers = self.training.loss(self.generator)

        # Down the clipped gradient; the average follows, faster at first.
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        now = torch.where((loss + norm).detach().isfinite(), NEVER, step)
        self.broken = torch.minimum(self.broken, now)
        self.optimizer.step()
        decay = min(self.config.ema, (step + 1) / (step + 10))
        update_average(self.average, self.module, decay)
        return {name: x.detach() for name, x in numbers.items()}

    def run(self, title: str, minutes: float | None = None) -> None:
        """All steps that are left, or as many as fit into so many minutes. An interrupted run is saved."""
        with uninterruptible():
            try:
                self._run(title, minutes)
            except Interrupted as e:
                e.add_note(f"{self.state_file} has {self.completed} of {self.config.steps} steps")
                self.save()
                raise
            self.save()

    def _run(self, title: str, minutes: float | None) -> None:
        total = self.config.steps
        progress = Progress(range(self.completed, total), title, self.completed, total)
        began = saved = time.monotonic()
        shown = {}
        for step in progress:
            with torch.backends.cudnn.flags(benchmark=True):  # the same shapes in every step
                numbers = self.step(step)
            self.completed = step + 1
            for name, x in numbers.items():
                shown[name] = 0.98 * shown.get(name, x) + 0.02 * x

            # Once in a while: say how it goes, stop in time, save.
            if step % 50 and self.completed < total:
                continue
            self.check()
            now = time.monotonic()
            progress.note = ", ".join(f"{name} {x:.4f}" for name, x in shown.items())
            if minutes and now - began > 60 * minutes:
                print(f"stopped after {minutes} minutes; the same command resumes")
                break
            if now - saved > self.config.save_seconds:
                self.save()
                saved = now
        print(f"step {self.completed} of {total}, {time.monotonic() - began:.0f} s: {progress.note}")


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine from the peak rate down to a fraction of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    decayed = config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine
    return config.lr * min(1, (step + 1) / config.warmup) * decayed


@torch.no_grad()
def update_average(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights; buffers that are not floating point are copied."""
    # Floating point numbers in one call: there are hundreds of tensors.
    weights = module.state_dict()
    names = [name for name, x in weights.items() if x.is_floating_point()]
    averages = [average[name] for name in names]
    torch._foreach_lerp_(averages, [weights[name] for name in names], 1 - decay)
    for name in weights.keys() - set(names):
        average[name].copy_(weights[name])
