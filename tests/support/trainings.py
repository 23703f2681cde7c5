"""Whole trainings in processes of their own, with a tiny preset: forked from this one, which has loaded everything.

    python -m tests.support.trainings ranks FOLDER    every part in one process and in two, on the same batches
    python -m tests.support.trainings kills FOLDER N  one training whole, and one that is killed N times and resumed

Twelve sequences, the sample's twice, so that one is held out.

What the processes saw is written to FOLDER, for the tests. (A process that has used several threads cannot be forked,
so the tests start this one.)
"""
import functools
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from PIL import Image

import presets
import train
from sparsefusion import SparseFusion
from tests.support.small import TINY
from training import fit, packed

SAMPLE = Path(__file__).resolve().parents[2] / "sample" / "co3d"


def start(folder: Path, name: str, argv: list, **environment: str) -> int:
    """The id of a new process of `train.py`, whose messages go to FOLDER/NAME.log."""
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= environment
        train.main([str(x) for x in [*argv, "--device", "cpu", "--root", SAMPLE, SAMPLE, "--frames", 5]])
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException as e:
        print(f"{type(e).__name__}: {e}")
        code = 1
    sys.stdout.flush()
    os._exit(code)


def exit_code(pid: int) -> int:
    """That of a process, once it has ended; of a killed one minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def together(folder: Path, name: str, argv: list, count: int) -> list[int]:
    """The ids of the processes of one training, as `torchrun` starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(count):
        pids.append(start(folder, f"{name}.{rank}", argv, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)))
    return pids


def watch(folder: Path) -> None:
    """From now on a training writes its losses, and the gradients of its first step, to OUT.seen.RANK."""
    seen = {"losses": []}

    def clip(parameters, most, real=torch.nn.utils.clip_grad_norm_):
        parameters = list(parameters)
        seen.setdefault("gradients", [p.grad.clone() for p in parameters])
        return real(parameters, most)

    def step(self, number, real=fit.Fit.step):
        losses = real(self, number)
        seen["losses"].append(list(losses.values()))
        torch.save(seen, f"{self.out}.seen.{os.environ.get('RANK', 0)}")
        return losses

    torch.nn.utils.clip_grad_norm_ = clip
    fit.Fit.step = step


def ranks(folder: Path) -> None:
    """Every part, 8 steps, in one process and in two; then one where a signal or death comes to one of two."""
    parts = {"vae": [], "prior": ["--vae", folder / "vae.1.pt"], "perceptual": []}
    real_step = fit.Fit.step
    watch(folder)
    for part, flags in parts.items():
        # In float32 some of this network's ReLUs are so near their kink that gradients depend on the rounding of
        # torch's convolutions, which differs between sizes of a batch.
        if part == "perceptual":
            torch.set_default_dtype(torch.float64)
            real_float, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
        for count in (1, 2):
            name = f"{part}.{count}"
            argv = [part, "--out", folder / f"{name}.pt", "--set", "batch=4", "--steps", 8, *flags]
            pids = together(folder, name, argv, 2) if count == 2 else [start(folder, name, argv)]
            print(name, [exit_code(pid) for pid in pids])

    # A signal to the second, and the end of it.
    torch.set_default_dtype(torch.float32)
    torch.Tensor.float = real_float
    fit.Fit.step = real_step
    for number in (signal.SIGTERM, signal.SIGKILL):
        name = f"stopped.{number}"
        argv = ["perceptual", "--out", folder / f"{name}.pt", "--set", "batch=4", "save_seconds=0.01"]
        pids = together(folder, name, argv, 2)
        while not (folder / f"{name}.pt.state").exists():
            time.sleep(0.05)
        os.kill(pids[1], number)
        print(name, [exit_code(pid) for pid in pids])

    # What is wrong with what all are told.
    for name, flags in {"odd": ["--set", "batch=5"], "none": ["--category", "cars"], "flag": ["--steps", 0]}.items():
        pids = together(folder, name, ["perceptual", "--out", folder / "x.pt", *flags], 2)
        print(name, [exit_code(pid) for pid in pids])


def kills(folder: Path, times: int, seed: int) -> None:
    """The same training whole, and with so many signals at random moments; then both are the same."""
    draw = random.Random(seed)
    argv = ["perceptual", "--set", "batch=2", "save_seconds=0.01", "--steps", 50 * times, "--out"]
    began = time.monotonic()
    assert exit_code(start(folder, "whole", [*argv, folder / "whole.pt"])) == 0
    duration = time.monotonic() - began

    for _ in range(times):
        pid = start(folder, "killed", [*argv, folder / "killed.pt"])
        time.sleep(draw.uniform(0.4, 1.2) * duration / times)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        os.kill(pid, number)
        print(number.name, exit_code(pid))
    print("whole", exit_code(start(folder, "killed", [*argv, folder / "killed.pt"])))


if __name__ == "__main__":
    torch.set_num_threads(1)
    presets.MODELS["nano"] = TINY
    train.load_packed = functools.partial(packed.load_packed, workers=1)  # others would have to import torch

    # What each would load for itself: formats of pictures, and the modules that make tensors without numbers.
    Image.init()
    with torch.device("meta"):
        SparseFusion(TINY)

    fit.LOGGED = 1  # a line whenever a training says how it goes
    what, folder, *numbers = sys.argv[1:]
    if what == "ranks":
        ranks(Path(folder))
    else:
        kills(Path(folder), *map(int, numbers))
