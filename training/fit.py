"""The training loop: Muon with warm-up, cosine decay, clipped gradients and an average of the weights; it saves
itself and resumes.

The loop knows no model and no data: a training brings the module whose forward pass gives the losses, the batch of a
step, and what to write at the end.
The schedule is not the released one, which is one sequence per step and Adam at 5e-5, halved every 50 k steps
[released: train.py:272-281, 435-439].
"""
from __future__ import annotations

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common import files
from common.machine import peak_gb, stream_seed
from common.processes import Interrupted, is_first, uninterruptible
from common.progress import Progress
from common.settings import check_ranges, differences
from export.pictures import save_picture
from gpu.graphs import map_tensors, tensors
from gpu.update import Graphs
from training import ranks
from training.muon import Muon
from training.record import check_log, save_log

NEVER = 2**62  # a step that no training reaches
LOGGED = 100   # steps from one line of the log to the next
HELD_OUT = 16  # samples that its held-out losses are means over
Losses = dict[str, Tensor]  # name -> scalar
UNIMPORTANT = ("config.fit.save_seconds",)  # settings that do not decide the result


@dataclass(frozen=True)
class FitConfig:
    """The numbers of the loop."""
    steps: int = 10000                # updates in all
    lr: float = 2e-3                  # peak learning rate
    warmup: int = 200                 # steps of linear warm-up
    final_lr_fraction: float = 0.01   # of the peak rate, at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.99)  # Adam's decay rates, for what is no matrix
    clip_norm: float = 1.0            # largest norm of the gradient
    ema: float = 0.999                # decay of the average of the weights that is kept
    save_seconds: float = 120.0       # between two saves of a running training

    def __post_init__(self):
        check_ranges(self, {"steps": (1, 10**8), "warmup": (1, 10**8), "save_seconds": (0, math.inf),
                            "ema": (0, 0.9999999), "lr": (1e-12, 1e6), "clip_norm": (1e-12, math.inf)})


class Fit:
    """A training in progress: of `training.module`, in one process or in several (`training/ranks.py`).

    `training.module(batch)` gives the losses, `Losses`, of which a step minimizes the sum; `training.batch(draws)` is
    the batch of a step on the CPU, drawn by another thread, of `training.config.batch` samples in all processes, from
    `training.data`, of which `held_out()` is never trained on;
    `training.finish(average, out, trained_on)` writes the weights file from the averaged weights of the module, by
    name, and what they were trained on; it returns a picture of what they can do, or None.

    What is random follows from the seed, the step and a sample's place, so an interrupted run resumes as if it had not
    been. Every two minutes and at the end the state goes to `<out>.state`, the training writes `out`, and the picture
    goes to the folder of `record.py`. `settings` is plain data that decides the result: a state with other settings is
    an error.
    """

    def __init__(self, training, config: FitConfig, out: Path, seed: int, device: str, settings: dict,
                 history: list[dict], trained: list[dict]):
        """`history`, `trained`: what the weights file says about the trainings before this one, and about this one."""
        self.training = training
        self.config = config
        self.out = out
        self.seed = seed
        self.device = device
        self.settings = settings | {"seed": seed}
        self.history = history
        self.trained = trained

        # What a step changes: weights, the optimizer's moments, the average.
        self.places = ranks.places(training.config.batch)
        self.module = training.module.train()
        self.weights = self.module.state_dict()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = Muon(self.parameters, config.betas, torch.device(device))
        self.average = {name: x.clone() for name, x in self.weights.items()}

        # How it is done: a graph for every shape of a batch; a thread that draws batches, by step.
        self.graphs = Graphs(torch.device(device))
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}

        # Where it goes, how far it is, and the first step whose loss or gradient was not finite.
        self.broken = torch.full((), NEVER, device=device)
        self.state_file = out.with_name(out.name + ".state")
        self.folder = out.with_name(out.name + ".run")
        self.completed = 0

        # How it goes: running means of the losses, a line of the log every hundred steps.
        self.shown: Losses = {}
        self.log = []

    def resume(self, fork: bool = False) -> None:
        """Resume from the state file, if there is one; a longer training may resume a shorter one. `ValueError` where
        it is another training's; with `fork` this one then starts from its averaged weights.
        """
        if not self.state_file.exists():
            return
        state = files.read_tensors(self.state_file, "module")
        other = differences(state.get("settings", {}), self.settings, UNIMPORTANT, extend=True)
        if other and not fork:
            raise ValueError(f"{self.state_file}: the state of another training ({other}); choose another --out, or "
                             "--fork to start anew from its weights")

        # All that a step changes, or what a fork starts from.
        try:
            for weights in (state["module"], state["average"]):
                files.check_weights(weights, self.module)
            self.module.load_state_dict(state["average" if other else "module"])
            for name, x in self.average.items():
                x.copy_(state["average"][name])
            if other:
                others = [dict(one) for one in state["history"] + state["trained"]]
                self.history = self.history + [one for one in others if one not in self.history]
            else:
                self.history = [dict(one) for one in state["history"]]
                self.optimizer.load_state_dict(state["optimizer"])
                self.completed = range(self.config.steps + 1)[state["completed"]]
                log, shown = state["record"]
                self.log = check_log(log)
                self.shown = {name: x.reshape(()).float() for name, x in shown.items()}
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"{self.state_file}: not a whole state of a `train.py {self.settings['what']}` "
                             f"({type(e).__name__}); delete it to start again") from None
        print(f"starting {self.out.name} from the weights of another training ({other})" if other else
              self.resumed(state["settings"]["config"]["fit"]["steps"]))

    def resumed(self, steps: int) -> str:
        """What to say where a training of so many steps resumes: a longer one follows its own schedule from here."""
        line = f"resuming {self.out.name} at step {self.completed}"
        if steps == self.config.steps:
            return line
        before = learning_rate(self.completed, replace(self.config, steps=steps))
        return (f"{line}; it was to be {steps} steps: from here the learning rate is that of {self.config.steps}, now "
                f"{learning_rate(self.completed, self.config):.2g} instead of {before:.2g}")

    def check(self) -> None:
        """Raises `FloatingPointError` where a loss or gradient so far, and with it all weights, was not finite."""
        if self.broken < NEVER:
            ranks.fail(FloatingPointError(f"{self.out}: the training broke in step {int(self.broken)}, whose loss or "
                                          "gradient is not a finite number; a smaller lr may help"))

    def save(self) -> None:
        """The state, to resume, and the weights, for use. The first process writes, the others wait."""
        self.check()
        if is_first():
            state = {
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average,
                "completed": self.completed,
                "record": [self.log, self.shown],
                "settings": self.settings,
                "history": self.history,
                "trained": self.trained,
            }
            files.save_tensors(state, self.state_file)
            picture = self.training.finish(self.average, self.out, self.history + self.trained)
            if picture:
                save_picture(picture, self.folder / f"{self.completed:08}.jpg")
        ranks.largest(0)

    def step(self, step: int) -> Losses:
        """One update; returns the losses, means over all processes."""
        batch = self.ahead.pop(step, None) or self.thread.submit(self.draw, step)
        batch = batch.result()

        # The global generator is dropout's, and has numbers of its own in every process.
        torch.manual_seed(stream_seed(self.seed, f"dropout {step} {self.places[0]}"))
        self.optimizer.set_rate(learning_rate(step, self.config))
        shapes = [tuple(x.shape) for x in tensors(batch)]
        *losses, norm = self.graphs.run(str(shapes), self.update, batch)

        # The next batch is drawn while the graph runs, but not while it is captured.
        if step + 1 < self.config.steps:
            self.ahead[step + 1] = self.thread.submit(self.draw, step + 1)

        # The average follows, faster at first.
        now = torch.where((sum(losses) + norm).isfinite(), NEVER, step)
        self.broken = torch.minimum(self.broken, now)
        decay = min(self.config.ema, (step + 1) / (step + 10))
        update_average(self.average, self.weights, decay)
        return dict(zip(self.names, losses))

    def draw(self, step: int) -> tuple:
        """The batch of a step, on the CPU. Everything random in it follows from the seed and its number."""
        draws = ranks.Draws(self.seed, step, self.training.config.batch, self.places)
        batch = self.training.batch(draws)
        return map_tensors(Tensor.pin_memory, batch) if self.device == "cuda" else batch

    def update(self, batch: tuple) -> Tensor:
        """Down the clipped gradient of a batch's losses: these, means over all processes, and the gradient's norm."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            losses = self.module(batch)
            loss = sum(losses.values())
        self.names = list(losses)

        self.optimizer.zero_grad()
        loss.backward()
        ranks.average_gradients(self.parameters)
        shown = ranks.mean(torch.stack(list(losses.values())).detach())
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        return torch.cat([shown, norm[None]])

    def on_device(self, batch: tuple) -> tuple:
        """The batch where the training computes."""
        return map_tensors(lambda x: x.to(self.device, non_blocking=True), batch)

    def run(self, title: str, minutes: float | None = None) -> None:
        """All steps that are left, or as many as fit into so many minutes. An interrupted run is saved."""
        # All processes of a training begin with the same.
        most, least = ranks.largest(self.completed, -self.completed)
        if most != -least:
            ranks.fail(ValueError(f"{self.state_file}: not the same for all processes; nodes need a common folder"))
        ranks.join_norms(self.module)

        with uninterruptible():
            try:
                self._run(title, minutes)
            except Interrupted as e:
                e.add_note(f"{self.state_file} has {self.completed} of {self.config.steps} steps")
                self.save()
                ranks.fail(e, 128 + e.args[0])
            finally:
                self.graphs.forget()  # NCCL cannot end while one has its calls
            self.save()

    def _run(self, title: str, minutes: float | None) -> None:
        total = self.config.steps
        progress = Progress(range(self.completed, total), title, self.completed, total, ranks.check_interrupt)
        began = saved = logged = time.monotonic()
        for step in progress:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # the same shapes in every step
                losses = self.step(step)
            self.completed = step + 1
            for name, x in losses.items():
                self.shown[name] = 0.98 * self.shown.get(name, x) + 0.02 * x

            # Once in a while: say how it goes, stop in time, save. The slowest clock counts.
            if self.completed % 50 > 1 and self.completed < total:
                continue
            self.check()
            progress.note = ", ".join(f"{name} {x:.4f}" for name, x in self.shown.items())
            now = time.monotonic()
            if self.completed % LOGGED == 0 and is_first():
                self.add_line(min(LOGGED, self.completed - progress.start) / (now - logged), now - began)
                logged = now
            passed, unsaved = ranks.largest(now - began, now - saved)
            if minutes and passed > 60 * minutes:
                print(f"stopped after {minutes} minutes; the same command resumes")
                break
            if unsaved > self.config.save_seconds:
                self.save()
                saved = now
        print(f"step {self.completed} of {total}, {time.monotonic() - began:.0f} s: {progress.note}")

    def add_line(self, rate: float, seconds: float) -> None:
        """Write a line of the log; this run takes `rate` steps a second now, and has taken so many seconds. The memory
        is what was needed since the last line: in the first steps cuDNN tries its algorithms, which takes more.
        """
        self.log.append({
            "step": self.completed,
            "losses": {name: float(x) for name, x in (self.shown | self.held_out_losses()).items()},
            "per_second": round(rate * self.training.config.batch, 2),
            "memory_gb": peak_gb(self.device),
            "seconds": round(seconds, 1),
            "seconds_left": round((self.config.steps - self.completed) / rate),
        })
        save_log(self.log, self.folder)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @torch.no_grad()
    def held_out_losses(self) -> Losses:
        """Of the same `HELD_OUT` samples every time, by the weights of this moment; none where nothing is held out."""
        training = copy.copy(self.training)
        training.data = self.training.data.held_out()
        if training.data is None:
            return {}
        batch = training.batch(ranks.Draws(self.seed, "held out", HELD_OUT, range(HELD_OUT)))
        self.module.eval()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            losses = self.module(self.on_device(batch))
        self.module.train()
        return {f"held-out {name}": x for name, x in losses.items()}


def learning_rate(step: int, config: FitConfig) -> float:
    """Linear warm-up, then a cosine from the peak rate down to a fraction of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    decayed = config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine
    return config.lr * min(1, (step + 1) / config.warmup) * decayed


@torch.no_grad()
def update_average(average: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights; buffers that are not floating point are copied."""
    # Floating point numbers in one call: there are hundreds of tensors.
    names = [name for name, x in weights.items() if x.is_floating_point()]
    averages = [average[name] for name in names]
    torch._foreach_lerp_(averages, [weights[name] for name in names], 1 - decay)
    for name in weights.keys() - set(names):
        average[name].copy_(weights[name])
