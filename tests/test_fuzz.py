"""Bad input of every kind: a valid file or command line is changed by a random rule, and what reads it must succeed or
end in one line that names the file or the flag (exit code 2), leave no partial file and write nowhere else.

    python -m pytest tests/test_fuzz.py
    python tests/test_fuzz.py --seed 7 --cases 5000            a long run; failures are printed, and counted by kind
    python tests/test_fuzz.py --seed 7 --case 123              one case again

A case is a function of the seed and its number alone.
"""
import argparse
import contextlib
import gzip
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
import torch
from PIL import Image

import check
import distill
import evaluate
import metrics
import render
import sparsefusion
import train
from cameras import Scene
from checkpoints import convert
from common import cli
from common.progress import Progress
from datasets import annotations, co3d, protocol
from distillation import DistillConfig
from evaluation.attributes import load_attribute_net
from photographs.arrays import scene_from_arrays
from photographs.reading import read_capture
from presets import MODELS, PRESETS
from reconstruction import reconstruct
from tests.support import captures, small, thin, trees
from tests.support.released_files import released_state
from vldm import SamplerConfig

CASES = 150  # of the test; the command takes more
LONGEST = {"command": 640, "loader": 320}  # characters of a message, the names of folders apart
SECONDS = 20    # of a case, at most
QUICK = ["--set", "iterations=1", "bootstrap=1", "viewpoints=1", "render_size=16", "mesh_resolution=8",
         "turntable_frames=1", "denoise_steps=1", "sample_steps=1", "field.levels=2", "samples_per_ray=8",
         "occupancy_cells=8", "log2_hashmap_size=8"]
DISTILL = ["--root", "tree", "--category", "things", "--protocol", "all", "--weights", "tiny.pt", "--device", "cpu",
           "--feature-net", "net.pt", "--targets", "1", "--out", "out", *QUICK]
TRAIN = ["vae", "--root", "tree", "--category", "things", "--out", "out/vae.pt", "--steps", "1", "--frames", "2",
         "--device", "cpu", "--set", "batch=1", "image_size=16", "vae.widths=8,8", "vae.groups=4", "vae.blocks=1"]
RENDER = ["out", "--size", "8", "--frames", "1", "--show", "depth", "--out", "out/render"]
LITTLE = replace(PRESETS["plain"], iterations=1, bootstrap=0, image_size=16, input_pixels=16,
                 turntable_frames=2,
                 field=replace(small.FIELD, levels=1, log2_hashmap_size=8, samples_per_ray=8, occupancy_cells=16))
FLAGS = sorted({flag for command in (render, distill, evaluate, train, convert)
                for flag in command.parser()._option_string_actions} - {"--help", "-h"})
COMMANDS = {"distill": distill.main, "evaluate": evaluate.main, "train": train.main, "check": check.main,
            "convert": convert.main, "render": render.main}

# What stands for itself in JSON that Python cannot write: placeholders, and the text that replaces them.
TEXTS = {"@deep": "[" * 200_000 + "]" * 200_000, "@nested": "[" * 900 + "]" * 900,
         "@objects": '{"a":' * 200_000 + "1" + "}" * 200_000,
         "@digits": "9" * 5000, "@huge": "9" * 400, "@exponent": "1e999"}
ODD = [None, True, False, 0, 1, -1, 0.5, 1e308, -1e30, 1e-320, 2**31, 2**63, -(2**70), math.nan, math.inf, "", "x",
       "..", "../../up", "/absolute", "a\nb", "nul\0", "\u00e9" * 400, "\ud800", " ", "e\u0301", "\u200b",
       "images/\u00e91.png", [], {}, [[]], [[1], [2, 3]], {"a": {}}, [1, 2, 3], ["a", "b"], [None], "9" * 5000, *TEXTS]
NUMBERS = ["3", "7", "1e-30", "1e30", "1,1", "0.9,0.9", "8,16,16", "1000000", "16777217", "999999999", "-5", "0x10",
           "1e5", "4096", "9" * 30, "99999999,99999999", "1.", "+1", "Infinity", "none", "0,0"]
WORDS = ["", " ", "-1", "0", "1", "2", "0.5", "1e400", "nan", "-inf", "9" * 5000, "x", "a\nb", "..", "/dev/null", "a=b",
         "true", "1,2", ",", "1,,2", "\u00e9", "--", "\ud800", "x" * 5000, "1_0", "\u0661"]


class Hang(BaseException):
    """A case took too long."""


# ---------------------------------------------------------------------------------------------- what is valid

def make_originals(home: Path) -> None:
    """One of every kind of input, in a folder each."""
    # A CO3D tree, with attributes; a list of its sequences; a toy file.
    tree = trees.write(home / "co3d" / "tree", {"a": 12, "b": 11}, training=("b",))
    records = [{"sequence_name": name, "attributes": [0.1, 0.2, 0.3]} for name in "ab"]
    (tree / "things" / "sequence_annotations.jgz").write_bytes(gzip.compress(json.dumps(records).encode()))
    shutil.copytree(tree, home / "list" / "tree")
    protocol.save_list(protocol.whole_list(tree, "things"), home / "list" / "list.json")
    scene = small.ball(4, 16)
    item = {"images": scene.images, "R": scene.cameras.R, "T": scene.cameras.T, "f": scene.cameras.focal,
            "c": scene.cameras.principal, "masks": scene.masks, "valid_region": scene.valid}
    (home / "toy" / "tree" / "things").mkdir(parents=True)
    torch.save({"things": [item]}, home / "toy" / "tree" / "things" / "things_toy.pt")

    # Own photographs in every layout.
    shoot = captures.balls(4, 32, 24, focal=(40.0, 40.0))
    names = [f"images/00{i}.png" for i in range(4)]
    captures.write_transforms(_folder(home / "transforms"), shoot, "masks/{1}.png", aabb_scale=4,
                              train_filenames=names[:3], test_filenames=names[3:])
    captures.write_transforms(_folder(home / "synthetic"), shoot.at([0, 1, 2]), each=True, name="transforms_train.json")
    points = [(0.1, 0.2, 0.3), (0.0, -0.1, 0.2)]
    for kind in ("text", "binary"):
        captures.write_colmap(_folder(home / kind), shoot, "OPENCV", kind == "binary", points, "masks/{1}.png")

    # Weights.
    sparsefusion.save(small.tiny_model(), home / "weights" / "tiny.pt")
    shutil.copy(sparsefusion.ROOT / "sample" / "perceptual.pt", _folder(home / "perceptual") / "net.pt")
    model = sparsefusion.SparseFusion(thin.SMALL)
    for part, entry in (("eft", "model_state_dict"), ("vldm", "vldm_model_state_dict"), ("vae", "state_dict")):
        module = getattr(model, part)
        state = released_state(part, module)
        torch.save({entry: state}, _folder(home / "released") / f"{part}.pt")

    # A finished run, an interrupted one, and a training.
    folder = _folder(home / "run")
    shutil.copytree(tree, folder / "tree")
    shutil.copy(home / "weights" / "tiny.pt", folder)
    shutil.copy(home / "perceptual" / "net.pt", folder)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        distill.main(DISTILL)
        train.main(TRAIN)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


# ---------------------------------------------------------------------------------------------- how it is changed

def mutate_data(rng: random.Random, data, odd: list):
    """Plain data with one thing in it changed, and what was done."""
    # A place, any depth being as likely as another.
    path = []
    parent, key, here = None, None, data
    while isinstance(here, (dict, list)) and here and rng.random() < 0.75:
        parent = here
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        here = parent[key]
        path.append(str(key)[:20])
    if parent is None:
        value = rng.choice(odd)
        return value, f"all of it is {str(value)[:30]!r}"

    where = ".".join(path)
    number = type(here) in (int, float) and rng.random() < 0.5
    rules = ["replace", "replace", "replace", "delete", "wrap", "swap", "rename", "twice"]
    rule = "times" if number else rng.choice(rules)
    if rule == "delete":
        del parent[key]
    elif rule == "times":
        factor = rng.choice([-1, 0, 0.5, 1.1, 1e3, 1e-3, 1e12, 1e30, -1e150, 1e290])
        parent[key] = here * factor
        where += f" {factor}"
    elif rule == "wrap":
        parent[key] = [here]
    elif rule == "swap":
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], here
        where += f" and {str(other)[:20]}"
    elif rule == "rename" and isinstance(parent, dict):
        parent[rng.choice(["x", "", "a\nb", "R", str(key).upper()])] = parent.pop(key)
    elif rule == "twice" and isinstance(parent, list):
        parent.append(here)
    else:
        rule = "replace"
        parent[key] = rng.choice(odd)
        where += f" by {str(parent[key])[:30]!r}"
    return data, f"{rule} {where}"


def to_json(data) -> bytes:
    """JSON with what Python cannot write in the place of its placeholders."""
    text = json.dumps(data)
    for name, value in TEXTS.items():
        text = text.replace(f'"{name}"', value)
    return text.encode()


def mutate_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """The bytes of any file, damaged."""
    at = rng.randrange(len(content) + 1)
    rule = rng.choice(["truncate", "flip", "insert", "remove", "noise", "empty", "zeros", "append"])
    some = rng.randbytes(rng.choice([1, 2, 8, 100]))
    if rule == "flip":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 4, 40]) if content else 0):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed), "flip bits"
    made = {"truncate": content[:at], "insert": content[:at] + some + content[at:],
            "remove": content[:at] + content[at + len(some):], "noise": some, "empty": b"",
            "zeros": content[:at] + b"\0" * len(content[at:]), "append": content + some}
    return made[rule], f"{rule} at {at} of {len(content)}"


def mutate_text(rng: random.Random, text: str) -> tuple[str, str]:
    """Lines of words, with one word or one line changed."""
    lines = text.split("\n")
    i = rng.randrange(len(lines))
    words = lines[i].split(" ")
    j = rng.randrange(len(words))
    rule = rng.choice(["word", "word", "word", "no word", "no line", "line twice", "swap"])
    if rule == "word":
        words[j] = rng.choice(WORDS).replace("\ud800", "?")
    elif rule == "no word":
        del words[j]
    elif rule == "swap":
        words[j], words[0] = words[0], words[j]
    lines[i] = " ".join(words)
    if rule == "no line":
        del lines[i]
    elif rule == "line twice":
        lines.insert(i, lines[i])
    return "\n".join(lines), f"{rule} {j} of line {i}: {words[:j + 1][-1:]!r:.40}"


def mutate_picture(rng: random.Random, file: Path) -> str:
    """A picture of another size, kind or content."""
    rule = rng.choice(["size", "mode", "black", "white", "gray", "bomb", "EXIF", "format", "pixel"])
    with Image.open(file) as picture:
        picture = picture.copy()
    if rule == "size":
        picture = picture.resize(rng.choice([(1, 1), (1, 24), (24, 1), (23, 24), (48, 48), (300, 2)]))
    elif rule == "mode":
        picture = picture.convert("L").convert(rng.choice(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]))
    elif rule in ("black", "white", "gray", "pixel"):
        color = {"black": 0, "white": 255, "gray": 128, "pixel": 0}[rule]
        picture = Image.new("L", picture.size, color)
        if rule == "pixel":
            picture.putpixel((3, 3), 255)
    if rule == "bomb":
        content = bytearray(file.read_bytes())
        content[16:24] = rng.choice([10_000, 14_000, 2**31 - 1]).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        file.write_bytes(content)
    elif rule == "EXIF":
        exif = picture.getexif()
        exif[0x0112] = rng.choice([0, 3, 6, 9, 70_000 % 65_536])
        picture.save(file, "PNG", exif=exif)
    else:
        picture.save(file, rng.choice(["GIF", "JPEG", "WEBP", "TIFF"]) if rule == "format" and picture.mode == "RGB"
                     else "PNG")
    return rule


def mutate_tensors(rng: random.Random, file: Path) -> str:
    """A file of tensors and plain data with one thing changed."""
    data = torch.load(file, map_location="cpu", weights_only=True)
    words = []

    def odd_tensor(x):
        kinds = [lambda: x.double(), lambda: x.bool(), lambda: x.to(torch.complex64), lambda: x[None],
                 lambda: x.flatten()[:1], lambda: x[:0] if x.ndim else x, lambda: x.float() * math.nan,
                 lambda: x.float() + math.inf, lambda: x.float() * 1e30, lambda: x.long(), lambda: torch.zeros(()),
                 lambda: x.to_sparse(), lambda: x.float().to(torch.float8_e5m2), lambda: x.tolist(),
                 lambda: x.flatten()[0].expand(2**20, 2**20), lambda: -x.float(), lambda: x.float() * 0]
        return rng.choice(kinds)()

    # Tensors as odd tensors, the rest as plain data.
    here, path = data, []
    while isinstance(here, (dict, list)) and here and rng.random() < 0.9:
        key = rng.choice(list(here)) if isinstance(here, dict) else rng.randrange(len(here))
        path.append(str(key)[:30])
        if isinstance(here[key], torch.Tensor) and rng.random() < 0.7:
            with contextlib.suppress(RuntimeError, NotImplementedError):
                here[key] = odd_tensor(here[key])
            words = [f"tensor {'.'.join(path)}"]
            break
        if isinstance(here[key], torch.Tensor) and rng.random() < 0.5:
            names = here if isinstance(here, dict) else range(len(here))
            other = rng.choice([name for name in names if isinstance(here[name], torch.Tensor)])
            here[key], here[other] = here[other], here[key]
            words = [f"{key} and {other} swapped"]
            break
        here = here[key]
    if not words:
        data, what = mutate_data(rng, data, [x for x in ODD if not str(x).startswith("@")] + [10**400, (1, "a")])
        words = [what]
    torch.save(data, file)
    return words[0]


def replace_file(rng: random.Random, file: Path) -> str:
    """Something else at a file's place, or the file under another name."""
    rule = rng.choice(["gone", "folder", "folder", "link", "loop", "pipe", "device", "renamed", "twice", "forbidden"])
    other = file.with_name(rng.choice([f" {file.name}", f"{file.name} ", file.name.upper(), f"e\u0301{file.name}",
                                       f"{file.stem}.x{file.suffix}", f"a\nb{file.suffix}", f".{file.name}",
                                       f"{file.name}.bak", file.stem, f"\u3000{file.name}"]))
    if rule == "twice":
        shutil.copy(file, other)
    elif rule == "forbidden":
        file.chmod(0)
    elif rule == "renamed":
        file.rename(other)
    else:
        file.unlink()
    if rule == "folder":
        file.mkdir()
    elif rule == "pipe":
        os.mkfifo(file)
    elif rule in ("link", "loop", "device"):
        file.symlink_to({"link": "nowhere", "loop": file.name, "device": "/dev/null"}[rule])
    return f"{rule}, {other.name!r}" if rule in ("twice", "renamed") else rule


def mutate_file(rng: random.Random, file: Path) -> str:
    """A file of any kind, in place; what was done to it."""
    # A case has links to the originals, which stay as they are.
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)

    # Any file may be gone, no file, elsewhere, or broken.
    rule = rng.random()
    if rule < 0.08:
        return f"{file.name}: {replace_file(rng, file)}"
    if rule < 0.25:
        content, what = mutate_bytes(rng, content)
        file.write_bytes(content)
        return f"{file.name}: {what}"

    # Or what is in it has something odd.
    if file.suffix in (".pt", ".state"):
        return f"{file.name}: {mutate_tensors(rng, file)}"
    if file.suffix == ".png":
        return f"{file.name}: {mutate_picture(rng, file)}"
    if file.suffix == ".txt":
        text, what = mutate_text(rng, file.read_text())
        file.write_text(text)
        return f"{file.name}: {what}"
    if file.suffix in (".json", ".jgz"):
        content = gzip.decompress(content) if file.suffix == ".jgz" else content
        data, what = mutate_data(rng, json.loads(content), ODD)
        content = to_json(data)
        file.write_bytes(gzip.compress(content, 1) if file.suffix == ".jgz" else content)
        return f"{file.name}: {what}"
    content, what = mutate_bytes(rng, content)
    file.write_bytes(content)
    return f"{file.name}: {what}"


def some_file(rng: random.Random, folder: Path) -> Path:
    """A file below a folder; a kind of file is as likely as another."""
    kinds = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            kinds.setdefault((file.parent.name.strip("ab"), file.suffix), []).append(file)
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def mutate_flags(rng: random.Random, argv: list[str], config: type | None) -> tuple[list[str], str]:
    """A command line with one word changed, or with a setting more."""
    argv = list(argv)
    i = rng.randrange(len(argv))
    rule = rng.choice(["word", "word", "delete", "insert", "twice", "flag", "flag", "set", "set", "set"])
    if config is None and rule == "set":
        rule = "flag"
    if rule == "flag":
        argv[i:i] = [rng.choice(FLAGS), rng.choice(WORDS + NUMBERS)][:rng.choice([1, 2, 2, 2])]
    elif rule == "word":
        argv[i] = rng.choice(WORDS)
    elif rule == "delete":
        del argv[i]
    elif rule == "insert":
        argv.insert(i, rng.choice(WORDS))
    elif rule == "twice":
        argv.insert(i, argv[i])
    else:
        name = rng.choice(sorted(cli.field_types(config)))
        argv += ["--set", f"{name}={rng.choice(WORDS + NUMBERS)}"]
    return argv, f"{rule}: {argv[min(i, len(argv) - 1)]!r:.40}, last {argv[-1]!r:.60}"


# ---------------------------------------------------------------------------------------------- what is called

def look(scene: Scene) -> None:
    """What was read is good for a reconstruction, or an error says why not."""
    numbers = [scene.images, scene.masks, *vars(scene.cameras).values()]
    assert all(x.isfinite().all() for x in numbers), "a scene has numbers that are not finite"
    with contextlib.suppress(ValueError, FloatingPointError):
        ours = reconstruct(scene, [0, 1], None, LITTLE)
        orbit = ours.orbit()
        ours.render(orbit.cameras(2, orbit.rows()), 8)
        ours.render(scene.user_cameras()[:1], 8)


def read_co3d(rng, home):
    file = some_file(rng, home / "tree")
    what = mutate_file(rng, file)
    often = rng.random() < 0.3

    def call():
        for category in co3d.categories(home / "tree"):
            co3d.splits(home / "tree", category)
            for name in co3d.sequences(home / "tree", category)[:2]:
                numbers = co3d.frame_numbers(home / "tree", category, name)
                co3d.stamp(home / "tree", category, name, numbers)
                sequence = co3d.load_sequence(home / "tree", category, name, 16)
                if often and len(numbers) > 1:
                    look(sequence)
            protocol.whole_list(home / "tree", category)
    return what, call


def read_cache(rng, home):
    """The cached annotations, damaged after the first reading."""
    co3d.sequences(home / "tree", "things")
    file, = (home / "cache" / "sparsefusion").glob("*.zip")
    content, what = mutate_bytes(rng, file.read_bytes())
    file.write_bytes(content)
    # A process of its own would open it again.
    annotations._open_archive.cache_clear()

    def call():
        assert co3d.sequences(home / "tree", "things") == ["a", "b"]
        assert len(co3d.frame_numbers(home / "tree", "things", "a")) == 12
    return f"{file.suffix}: {what}", call


def read_photographs(rng, home):
    what = mutate_file(rng, some_file(rng, home))
    often = rng.random() < 0.3

    def call():
        scene = read_capture(home).load(24)
        if often:
            look(scene)
    return what, call


def read_weights(rng, home):
    what = mutate_file(rng, home / "tiny.pt")

    def call():
        model = sparsefusion.load(home / "tiny.pt")
        sparsefusion.read_trained_on(home / "tiny.pt")
        scene = small.ball(3, model.preset.image_size)
        condition = model.condition(scene.images[:2], scene.cameras[:2], scene.cameras[2:], scene.cameras)
        model.sample_view(condition.features, [torch.Generator().manual_seed(0)], SamplerConfig(sample_steps=1))
    return what, call


def read_perceptual(rng, home):
    what = mutate_file(rng, home / "net.pt")

    def call():
        network = load_attribute_net(home / "net.pt")
        metrics.perceptual_distance(network.layers, torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
    return what, call


def read_list(rng, home):
    what = mutate_file(rng, home / "list.json")

    def call():
        for sequence in protocol.read_list(home / "list.json", home / "tree")[:2]:
            sequence.load(16)
    return what, call


def read_arrays(rng, home):
    g = torch.Generator().manual_seed(rng.randrange(1000))
    scene = small.ball(3, 16)
    K = [[18.0, 0, 8], [0, 18.0, 8], [0, 0, 1]]
    given = {"images": list(scene.images.permute(0, 2, 3, 1).numpy()), "masks": list(scene.masks[:, 0].numpy()),
             "R": scene.cameras.R.tolist(), "T": scene.cameras.T.tolist(), "K": K}
    given, what = mutate_data(rng, given, [x for x in ODD if not str(x).startswith("@")] + [
        torch.randn(16, 16, generator=g), np.zeros((16, 16, 3), np.uint8), np.zeros((0, 4)), np.array(["x"]), 10**400])

    def call():
        known = given if isinstance(given, dict) else {"images": given}
        known = {"images": [], "masks": [], "R": [], "T": [], "K": []} | known
        known = {name: x for name, x in known.items() if name in ("images", "masks", "R", "T", "K")}
        lists = (list, np.ndarray, str)  # what is no list and no word is a mistake in a program, not in data
        if all(isinstance(known[name], lists) and np.ndim(known[name][:1]) for name in ("images", "masks")):
            scene_from_arrays(**known, axes="pytorch3d", size=16)
    return what, call


def command(name, argv):
    return lambda: COMMANDS[name](argv)


def run_convert(rng, home):
    part = rng.choice(["eft", "vldm", "vae"])
    what = mutate_file(rng, home / f"{part}.pt")
    argv = [word for name in ("eft", "vldm", "vae") for word in (f"--{name}", f"{name}.pt")]
    return what, command("convert", [*argv, "--out", "out/w.pt"])


def run_distill(rng, home):
    """A finished or an interrupted run, again, after something happened to its folder."""
    names = ["settings.json", "field.pt"]
    if rng.random() < 0.5:
        (home / "out" / "metrics.json").unlink()
    else:
        names.append("metrics.json")
    what = mutate_file(rng, home / "out" / rng.choice(names))
    return what, command("distill", DISTILL)


def run_render(rng, home):
    what = mutate_file(rng, home / "out" / "field.pt")
    return what, command("render", RENDER)


def run_train(rng, home):
    what = mutate_file(rng, home / "out" / "vae.pt.state")
    return what, command("train", TRAIN)


def run_check(rng, home):
    what = mutate_file(rng, some_file(rng, home))
    return what, command("check", [".", "--out", "out/check.png"])


def flags_distill(rng, home):
    argv, what = mutate_flags(rng, DISTILL, DistillConfig)
    return what, command("distill", argv)


def flags_evaluate(rng, home):
    argv, what = mutate_flags(rng, [*DISTILL, "--instances", "1"], DistillConfig)
    return what, command("evaluate", argv)


def flags_train(rng, home):
    argv, what = mutate_flags(rng, TRAIN, train.TrainConfig)
    return what, command("train", argv)


def flags_render(rng, home):
    argv, what = mutate_flags(rng, RENDER, None)
    return what, command("render", argv)


def flags_check(rng, home):
    argv = ["tree", "--category", "things", "--sequence", "a", "--views", "2", "--out", "out/check.png"]
    argv, what = mutate_flags(rng, argv, None)
    return what, command("check", argv)


def flags_convert(rng, home):
    argv = ["--eft", "eft.pt", "--vldm", "vldm.pt", "--vae", "vae.pt", "--out", "out/w.pt"]
    argv, what = mutate_flags(rng, argv, None)
    return what, command("convert", argv)


# Entry point: the folder that it needs, and how often it is called.
ENTRIES = {read_co3d: ("co3d", 16), read_cache: ("co3d", 3), read_list: ("list", 6), read_arrays: ("toy", 6),
           read_weights: ("weights", 10), read_perceptual: ("perceptual", 4), run_convert: ("released", 4),
           run_distill: ("run", 4), run_train: ("run", 4), run_check: ("transforms", 3), flags_distill: ("run", 8),
           flags_evaluate: ("run", 4), flags_train: ("run", 5), flags_check: ("co3d", 3),
           run_render: ("run", 4), flags_render: ("run", 3),
           flags_convert: ("released", 1)}
CHOICES = [(entry, place, often) for entry, (place, often) in ENTRIES.items()]
CHOICES += [(read_co3d, "toy", 5)]
CHOICES += [(read_photographs, place, 6) for place in ("transforms", "synthetic", "text", "binary")]


# ---------------------------------------------------------------------------------------------- a case

def seen(folder: Path) -> dict:
    """Every file below a folder, with its date and size."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def judge_message(text: str, home: Path, kind: str, what: str, flagged: bool = False) -> str:
    """What is wrong with a message; "" for nothing."""
    short = text.replace(str(home), "").replace("\u00e9" * 400, "a long name")
    if len(text.splitlines()) != 1:
        return f"{len(text.splitlines())} lines: {text[:600]!r}"
    if len(short) > LONGEST[kind]:
        return f"{len(short)} characters: {text[:200]!r}"
    names = [path.name for path in home.rglob("*")] + [what.partition(":")[0], f"{home}:", "--"]
    return "" if flagged or any(name in text for name in names) else f"names no file: {text!r}"


def run_case(originals: Path, seed: int, case: int) -> tuple[str, str, str]:
    """Entry point, what was changed, and what is wrong with the outcome ("" for nothing)."""
    rng = random.Random(f"{seed}.{case}")
    entry, place, _ = rng.choices(CHOICES, [often for *_, often in CHOICES])[0]
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder, pytest.MonkeyPatch.context() as patch:
        home = Path(folder).resolve() / "work"
        shutil.copytree(originals / place, home, copy_function=os.link)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.chdir(home)
        what, call = entry(rng, home)
        before = seen(Path(folder))

        # With the time limited, and everything said caught.
        out, err = io.StringIO(), io.StringIO()
        wrong = ""
        asked = []

        def stop(*_):
            """Many iterations are no fault: long work obeys Ctrl-C, and what does not hangs."""
            if asked or not entry.__name__.startswith(("run", "flags")):
                raise Hang(f"no end after {SECONDS} s")
            asked.append(signal.SIGINT)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            os.kill(os.getpid(), signal.SIGINT)

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.filterwarnings("ignore", module="PIL")  # as datasets/pictures.py does
                warnings.showwarning = lambda message, kind, *_, **__: print(f"{kind.__name__}: {message}", file=err)
                call()
            if err.getvalue():
                wrong = f"on stderr: {err.getvalue()[:500]!r}"
        except SystemExit as e:
            text = err.getvalue()
            if asked and e.code == 130 or entry in (run_check, flags_check) and e.code == 1:
                wrong = ""
            elif e.code != 2 or not text.startswith("error:"):
                wrong = f"exit code {e.code}, {text[:500]!r}"
            else:
                wrong = judge_message(text, home, "command", what, "flags" in entry.__name__)
        except (ValueError, OSError, FloatingPointError) as e:
            inner = traceback.extract_tb(e.__traceback__)[-1]
            if entry.__name__.startswith(("run", "flags")) or isinstance(e, UnicodeError):
                wrong = f"{type(e).__name__} at {Path(inner.filename).name}:{inner.lineno}: {str(e)[:200]}"
            else:
                wrong = judge_message(str(e) + err.getvalue(), home, "loader", what, entry is read_arrays)
        except (Exception, Hang) as e:
            frames = [x for x in traceback.extract_tb(e.__traceback__) if str(sparsefusion.ROOT) in x.filename]
            at = " < ".join(f"{Path(x.filename).name}:{x.lineno}" for x in frames[:-4:-1])
            wrong = f"{type(e).__name__} at {at}: {str(e)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

        # What it left.
        after = seen(Path(folder))
        strange = []
        for path, stamp in after.items():
            if before.get(path) == stamp:
                continue
            inside = any(home / name in path.parents for name in ("out", "cache", "output"))
            if path.name.startswith(".") or not inside and not entry.__name__.startswith("flags"):
                strange.append(path.name)
        gone = [path.name for path in before.keys() - after.keys() if path.parent.name != "out"]
        if not wrong and (strange or gone):
            wrong = f"left {strange}, removed {gone}"
    return f"{entry.__name__} {place}", what, wrong


@contextlib.contextmanager
def prepared():
    """The folder of all originals, with small presets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(Path(folder) / "cache"))
        patch.setitem(PRESETS, "nano", small.SHORT)
        patch.setitem(MODELS, "nano", small.TINY)
        patch.setitem(MODELS, "paper", thin.SMALL)
        make_originals(Path(folder))
        yield Path(folder)
    torch.set_num_threads(threads)


def test_bad_input_ends_in_one_line():
    failures = []
    with prepared() as originals:
        for case in range(CASES):
            entry, what, wrong = run_case(originals, 0, case)
            if wrong:
                failures.append(f"python tests/test_fuzz.py --seed 0 --case {case}: {entry}: {what}: {wrong}")
    assert not failures, "\n".join(failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--case", type=int, help="this one only")
    args = parser.parse_args()
    cases = range(args.cases) if args.case is None else [args.case]
    counts, seconds, failures = Counter(), Counter(), 0
    with prepared() as originals:
        for case in Progress(cases, "fuzz"):
            began = time.monotonic()
            entry, what, wrong = run_case(originals, args.seed, case)
            counts[entry] += 1
            seconds[entry] += time.monotonic() - began
            if wrong or args.case is not None:
                failures += bool(wrong)
                print(f"--seed {args.seed} --case {case}: {entry}: {what}: {wrong or 'well'}", flush=True)
    for entry, count in sorted(counts.items()):
        print(f"{entry:30s}{count:6d} cases{seconds[entry]:8.1f} s")
    print(f"{sum(counts.values())} cases, {sum(seconds.values()):.1f} s, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
