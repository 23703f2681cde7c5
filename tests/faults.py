"""What no test can wait for: kills, full disks, and a long evaluation of broken sequences.

    python tests/faults.py kill --times 20       SIGKILL at random moments of distill.py, evaluate.py and train.py, then
                                                 the same command: the same tensors to the bit, the same files
    python tests/faults.py full --times 10       a full disk likewise, which has to end in one line that names a file
    python tests/faults.py long --sequences 50   evaluate.py, two of three sequences broken in some way: memory,
                                                 descriptors, a line for each of them

Every run is a fork of this process, in small sizes. A disk is a tmpfs where this user may mount one, else a limit on
the size of a file. A failure is printed; the exit code is 1 if there was any.
"""
import argparse
import contextlib
import gzip
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import distillation
import evaluate
import sparsefusion
from presets import PRESETS
from tests import test_fuzz as fuzz
from tests.support import small, trees

SETTINGS = ["--set", "iterations=10", "bootstrap=4", "viewpoints=2", "denoise_batch=4", *fuzz.QUICK[4:]]
SHARED = [*fuzz.DISTILL[:fuzz.DISTILL.index("--set")], *SETTINGS]
COMMANDS = {
    "distill": ["distill", *SHARED],
    "evaluate": ["evaluate", *SHARED, "--instances", "0"],
    "train": ["train", *fuzz.TRAIN, "steps=102", "fit.save_seconds=0"],
    # Nearly all of it is the packing of many sequences, by two processes.
    "pack": ["train", *fuzz.TRAIN, "--root", "tree/many", "--frames", "8"],
}
ROOM = 2**28  # bytes of a disk that is large enough
SECONDS = 120  # of a run, at most
VARYING = {"seconds", "distillation_seconds", "peak_gb", "command",  # of results: what no two runs have in common
           "per_second", "seconds_left", "memory_gb"}


# ---------------------------------------------------------------------------------------------- a run

def start(home: Path, command: list[str], prepare=lambda: None) -> int:
    """A process that runs a command within a folder; what it says goes to `said`, outside of it."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with open(home.parents[1] / "said", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        os.chdir(home)
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        prepare()
        fuzz.COMMANDS[command[0]](command[1:])
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(child: int) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


def content(file: Path):
    """What a file of results holds, less times."""
    if file.suffix in (".pt", ".state"):
        return plain(torch.load(file, "cpu", weights_only=True))
    if file.suffix == ".jsonl":
        return [plain(json.loads(line)) for line in file.read_text().splitlines()]
    if file.suffix == ".json":
        return plain(json.loads(file.read_text()))
    # A preview is added with every checkpoint, and a picture of how far a training is; a page says how long it took.
    return None if file.name in ("previews.png", "index.html") else file.read_bytes()


def plain(data):
    """Tensors by type, shape and bytes, so that == compares bits."""
    if isinstance(data, torch.Tensor):
        return str(data.dtype), tuple(data.shape), data.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(data, dict):
        return {key: plain(x) for key, x in data.items() if key not in VARYING}
    return [plain(x) for x in data] if isinstance(data, (list, tuple)) else data


def results(home: Path) -> dict:
    """All files below a folder but the pictures of the tree, with their content."""
    found = {}
    for file in sorted(home.rglob("*")):
        name = str(file.relative_to(home))
        # The cache of annotations is an archive with dates in it; how often a training is saved is chance.
        if file.is_file() and not name.startswith("tree"):
            found[name] = None if file.suffix == ".zip" else content(file)
    return {name: x for name, x in found.items() if not name.endswith(".jpg")}


def difference(found: dict, expected: dict) -> str:
    """In words; "" for none."""
    words = [f"{name} is there" for name in sorted(found.keys() - expected.keys())]
    words += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    words += [f"{name} differs" for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    return ", ".join(words)


def said(home: Path) -> str:
    """All that the last run has said."""
    return (home.parents[1] / "said").read_text(errors="replace")


def copy(originals: Path, home: Path) -> None:
    """A folder with what the commands read, and nothing else."""
    home.mkdir(exist_ok=True)
    for file in home.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    shutil.copytree(originals, home, dirs_exist_ok=True)


def originals_in(folder: Path) -> Path:
    """A CO3D tree of three sequences, one of them to train on, and networks; a tree of many sequences."""
    trees.write(folder / "tree", {"a": 11, "b": 11, "c": 11}, training=("c",))
    many = {f"s{i:03d}": 8 for i in range(100)}
    trees.write(folder / "tree" / "many", many, training=many)
    sparsefusion.save(small.tiny_model(), folder / "tiny.pt")
    shutil.copy(sparsefusion.ROOT / "sample" / "perceptual.pt", folder / "net.pt")
    return folder


# ---------------------------------------------------------------------------------------------- kills

def kill(args: argparse.Namespace, folder: Path) -> int:
    """SIGKILL at random moments, then the same command."""
    originals, failures = originals_in(folder / "originals"), 0
    for name in args.command:
        command = COMMANDS[name]
        home = folder / name / "home"
        home.parent.mkdir()
        copy(originals, home)
        began = time.monotonic()
        assert finish(start(home, command)) == 0, said(home)
        whole = time.monotonic() - began
        expected = results(home)

        # Every run is killed once or twice. What comes after shows that something was there.
        rng = random.Random(f"{args.seed} {name}")
        killed, left, bad = 0, 0, 0
        for turn in range(args.times):
            copy(originals, home)
            moments = [rng.random() * whole for _ in range(rng.choice([1, 1, 2]))]
            for moment in moments:
                child = start(home, command)
                time.sleep(moment)
                # Every other one while it writes.
                end = time.monotonic() + (rng.random() < 0.5) * whole
                while time.monotonic() < end and not writing(home):
                    time.sleep(0.003)
                os.kill(child, signal.SIGKILL)
                killed += finish(child) == -signal.SIGKILL
            left += writing(home)
            code = finish(start(home, command))
            wrong = difference(results(home), expected) if code == 0 else f"exit code {code}: {said(home)[-300:]}"
            bad += bool(wrong)
            if wrong:
                print(f"{name}, seed {args.seed}, turn {turn}, killed after {moments} s: {wrong}", flush=True)
        failures += bad
        print(f"{name}: {whole:.1f} s undisturbed; {killed} kills of {args.times} runs, {left} temporary files left by "
              f"them; {bad} failures", flush=True)
    return failures


def writing(home: Path) -> int:
    """How many temporary files there are."""
    with contextlib.suppress(FileNotFoundError):
        return sum(name.startswith(".") for folder in ("out", "cache") for *_, names in os.walk(home / folder)
                   for name in names)
    return 0


# ---------------------------------------------------------------------------------------------- full disks

@contextlib.contextmanager
def disk(folder: Path, size: int):
    """A file system of so many bytes; yields its folder, and whether it is one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full(args: argparse.Namespace, folder: Path) -> int:
    """A disk that is full at random sizes, then room, and the same command."""
    originals, failures = originals_in(folder / "originals"), 0
    for name in args.command:
        command = COMMANDS[name]
        home = folder / name / "disk" / "home"
        with disk(home.parent, ROOM) as mounted:
            # What an undisturbed run needs.
            copy(originals, home)
            before = used(home)
            assert finish(start(home, command)) == 0, said(home)
            expected = results(home)
            most = max(file.stat().st_size for file in (home / "out").rglob("*") if file.is_file())
            needed = used(home) - before + most if mounted else most

            # Less than that; then room, for the same bits.
            rng = random.Random(f"{args.seed} {name}")
            ended, bad = 0, 0
            for turn in range(args.times):
                copy(originals, home)
                size = int(rng.random() * needed)
                if mounted:
                    resize(home.parent, used(home) + size)
                code = finish(start(home, command, (lambda: None) if mounted else (lambda: limit(size))))
                wrong, line = judge_full(code, home)
                if code == 0:
                    wrong = wrong or difference(results(home), expected)
                ended += code == 2
                if mounted:
                    resize(home.parent, ROOM)
                code = finish(start(home, command))
                if not wrong:
                    wrong = difference(results(home), expected) if code == 0 else f"then {code}: {said(home)[-300:]}"
                bad += bool(wrong)
                if args.verbose or wrong:
                    print(f"{name}, seed {args.seed}, turn {turn}, {size} bytes: {line} {wrong}", flush=True)
            failures += bad
            kind = "a tmpfs" if mounted else "a limit on the size of a file"
            print(f"{name}: {ended} of {args.times} runs met {kind} that was full, of 0 to {needed} bytes; {bad} "
                  "failures", flush=True)
    return failures


def judge_full(code: int, home: Path) -> tuple[str, str]:
    """What is wrong with the end of a run on a full disk ("" for nothing), and its last line."""
    text = said(home)
    line = (text.splitlines() or [""])[-1]
    left = writing(home)
    if left:
        return f"{left} temporary files left", line
    if code == 0:
        return "", "there was room"
    names = [str(path.relative_to(home)) for path in home.rglob("*")] + ["out/", "cache/"]
    well = code == 2 and text.count("error:") == 1 and "Traceback" not in text and line.startswith("error:")
    return ("" if well and any(name in line for name in names) else f"exit code {code}: {text[-500:]!r}"), line


def used(folder: Path) -> int:
    """Bytes in use of a folder's file system."""
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def limit(size: int) -> None:
    """No file of this process grows beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def resize(folder: Path, size: int) -> None:
    """Give a tmpfs another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


# ---------------------------------------------------------------------------------------------- a long evaluation

FAULTS = {
    "no picture": lambda records, folder: (folder / "images" / "4.png").unlink(),
    "no mask": lambda records, folder: (folder / "masks" / "4.png").unlink(),
    "a cut picture": lambda records, folder: os.truncate(folder / "images" / "4.png", 90),
    "a cut mask": lambda records, folder: os.truncate(folder / "masks" / "4.png", 60),
    "an empty file": lambda records, folder: (folder / "images" / "4.png").write_bytes(b""),
    "noise": lambda records, folder: (folder / "masks" / "4.png").write_bytes(random.Random(0).randbytes(500)),
    "a folder": lambda records, folder: [(folder / "images" / "4.png").unlink(), (folder / "images" / "4.png").mkdir()],
    "a dangling link": lambda records, folder: [(folder / "images" / "4.png").unlink(),
                                                (folder / "images" / "4.png").symlink_to("nowhere")],
    "an empty mask": lambda records, folder: fuzz.Image.new("L", (24, 24)).save(folder / "masks" / "4.png"),
    "a mask of another size": lambda records, folder: fuzz.Image.new("L", (9, 24)).save(folder / "masks" / "4.png"),
    "a camera of NaN": lambda records, folder: records[3]["viewpoint"].update(T=[math.nan, 0, 10]),
    "no rotation": lambda records, folder: records[3]["viewpoint"].update(R=[[1, 0, 0], [0, 2, 0], [0, 0, 1]]),
    "a focal length of 0": lambda records, folder: records[3]["viewpoint"].update(focal_length=[0, 0]),
    "a focal length of words": lambda records, folder: records[3]["viewpoint"].update(focal_length=["x", 2.2]),
    "a pipe": lambda records, folder: [(folder / "masks" / "4.png").unlink(), os.mkfifo(folder / "masks" / "4.png")],
    "a path that leads out": lambda records, folder: records[3]["image"].update(path="../../../etc/passwd"),
}


def long(args: argparse.Namespace, folder: Path) -> int:
    """An evaluation of many sequences, of which two of three have one fault each."""
    home = folder / "long" / "home"
    names = [f"s{i:03d}" for i in range(args.sequences)]
    trees.write(home / "tree", {name: 11 for name in names})
    sparsefusion.save(small.tiny_model(), home / "tiny.pt")
    shutil.copy(sparsefusion.ROOT / "sample" / "perceptual.pt", home / "net.pt")

    # The faults, one after the other; a third of the sequences stays whole.
    file = home / "tree" / "things" / "frame_annotations.jgz"
    records = json.loads(gzip.decompress(file.read_bytes()))
    kinds, broken = list(FAULTS), {}
    for i, name in enumerate(names):
        if i % 3:
            broken[name] = kinds[len(broken) % len(kinds)]
            own = [record for record in records if record["sequence_name"] == name]
            FAULTS[broken[name]](own, home / "tree" / "things" / name)
    file.write_bytes(gzip.compress(json.dumps(records).encode()))

    # What the process has after each of them.
    measured = home.parent / "measured"

    def watch():
        evaluate_one = evaluate.evaluate_one

        def watched(*job, **options):
            problem = evaluate_one(*job, **options)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open(measured, "a") as log:
                log.write(f"{pages * resource.getpagesize() / 1e6} {len(os.listdir('/proc/self/fd')) - 1}\n")
            return problem
        evaluate.evaluate_one = watched

    child = start(home, ["evaluate", *SHARED, "--instances", "0"], watch)
    code = finish(child)
    text = said(home)
    rows = [[float(x) for x in line.split()] for line in measured.read_text().splitlines()]
    failures = []
    if code != 0:
        failures.append(f"exit code {code}: {text[-500:]}")
    lines = [line for line in text.splitlines() if line.startswith("left out: ")]
    for name, kind in broken.items():
        mine = [line for line in lines if line.startswith(f"left out: {name}: ")]
        print(f"{kind}: {mine[0] if mine else 'not left out'}")
        if len(mine) != 1:
            failures.append(f"{name}, {kind}: {len(mine)} lines")
    made = json.loads((home / "out" / "evaluation.json").read_text()) if code == 0 else {"sequences": {}}
    if sorted(made["sequences"]) != sorted(set(names) - broken.keys()):
        failures.append(f"in the table are {sorted(made['sequences'])}")

    # The first third is warming up.
    third = len(rows) // 3
    memory, descriptors = zip(*rows)
    growth = max(memory[-third:]) - max(memory[third:2 * third])
    if growth > 20:
        failures.append(f"memory grows: {memory}")
    if len(set(descriptors[1:])) > 1:
        failures.append(f"descriptors: {descriptors}")
    print(f"{len(names)} sequences, {len(broken)} broken: {memory[0]:.0f} MB after the first, {memory[third]:.0f} "
          f"after a third, {memory[-1]:.0f} at the end; {descriptors[1]:.0f} to {descriptors[-1]:.0f} descriptors; "
          f"{len(failures)} failures")
    print("\n".join(failures))
    return len(failures)


# ---------------------------------------------------------------------------------------------- the command

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.partition("\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "full", "long"])
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="kill, full: these only")
    parser.add_argument("--times", type=int, default=20, help="kill, full: so many of each command")
    parser.add_argument("--sequences", type=int, default=50, help="long: so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="full: the last line of every run")
    args = parser.parse_args()

    # Every run saves after each iteration, so that kills and full disks come while it writes.
    PRESETS["nano"] = small.SHORT
    distillation.SAVE_SECONDS = 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        failures = {"kill": kill, "full": full, "long": long}[args.what](args, Path(folder).resolve())
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
