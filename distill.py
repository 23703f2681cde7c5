"""From a few pictures to one neural field, and how good it is: the main command (Sec. 4).

    python distill.py                                  the shipped synthetic sample, two input views
    python distill.py --root DIR --category C --sequence S --weights F

The command makes a field (`reconstruction.py`; the algorithm is in `distillation.py`), makes what it is compared with,
measures everything on views that were not given, and writes pictures, mesh and numbers.

Letters: `T` target views, `S` side of the image.
"""
from __future__ import annotations

import argparse
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

import baselines
import cli
import files
import metrics
import released
import report
import sparsefusion
from co3d import load_sequence, stamp
from distillation import PRESETS, RELEASED, DistillConfig
from mesh import write_ply
from protocol import PROTOCOLS, Entry, choose_views
from reconstruction import Distance, Reconstruction, reconstruct
from report import Views
from runtime import device_name, peak_gb
from scenes import Scene, evenly_spaced
from sparsefusion import SparseFusion

ROOT = Path(__file__).resolve().parent
SAMPLE = ROOT / "sample" / "co3d"
SHIPPED_FEATURE_NET = ROOT / "sample" / "perceptual.pt"


# ---------------------------------------------------------------------------------------------- against the baselines

@dataclass(frozen=True)
class Instance:
    """One sequence to reconstruct and to measure: everything that decides the result."""
    root: Path
    entry: Entry                     # the sequence and its frames
    config: DistillConfig
    weights: Path | None             # of the prior; None: the field alone
    views: int                       # random input views; 0: all
    input_frames: tuple[str, ...]    # numbers of the input frames instead; (): random ones
    targets: int                     # views to compare, evenly spaced among the others; 0: all of them
    seed: int                        # of input views, noise and initial weights
    feature_net: Path                # network of the perceptual metric, without `lpips`
    lpips: tuple[Path, Path] | None  # VGG16 and LPIPS' linear layers, as loss and as metric
    device: str

    def settings(self) -> dict:
        """The same as plain data, files by their content, pictures by their dates: equal settings give equal
        results.
        """
        # Networks by what is in their files, pictures by dates and sizes: there may be gigabytes of them.
        networks = {}
        if self.weights is not None:
            networks["prior"] = files.fingerprint(self.weights)
        for path in self.lpips or (self.feature_net,):
            networks[path.name] = files.fingerprint(path)
        return {
            "entry": asdict(self.entry),
            "pictures": stamp(self.root, self.entry.category, self.entry.sequence, self.entry.frames),
            "networks": networks,
            "views": self.views,
            "input_frames": self.input_frames,
            "targets": self.targets,
            "seed": self.seed,
            "device": self.device,
            "config": asdict(self.config),
        }


class Distances(NamedTuple):
    """How far apart pictures look: what the loss asks and what the tables show."""
    loss: Distance | None   # None: the model's own
    metric: Distance
    metric_name: str


def load_distances(instance: Instance) -> Distances:
    """LPIPS for both if its files are given; else the VAE's features for the loss, the shipped network for the
    tables.
    """
    if instance.lpips:
        lpips = released.load_lpips(*instance.lpips).to(instance.device)
        return Distances(lpips, lpips, "LPIPS (VGG16, v0.1)")
    if instance.weights:
        print("perceptual term: the VAE encoder's features (no --lpips files given; this is not LPIPS)")
    network = metrics.load_attribute_net(instance.feature_net).to(instance.device)
    return Distances(None, partial(metrics.perceptual_distance, network.layers), "attribute network (not LPIPS)")


def choose_inputs(scene: Scene, instance: Instance) -> list[int]:
    """Positions of the input views: the frames that were asked for, or random ones."""
    # The first of a random permutation, all of them for 0.
    if not instance.input_frames:
        count = instance.views or len(scene)
        if count > len(scene):
            raise ValueError(f"--views {count}: {scene.sequence} has {len(scene)} frames")
        return choose_views(len(scene), count, instance.seed)

    # By the numbers that the dataset gives to frames.
    position = {name: i for i, name in enumerate(scene.names)}
    for frame in instance.input_frames:
        if frame not in position:
            some = ", ".join(scene.names[:8])
            raise ValueError(f"--input-frames: {scene.sequence} has no frame {frame}; it has {some}, ...")
        if instance.input_frames.count(frame) > 1:
            raise ValueError(f"--input-frames: frame {frame} stands there twice")
    return [position[frame] for frame in instance.input_frames]


def choose_targets(scene: Scene, inputs: list[int], count: int, on_inputs: bool) -> list[int]:
    """Positions of `count` views to measure, evenly spaced, or of all for 0: of those that are no inputs, if any."""
    # What was given is not predicted.
    candidates = [i for i in range(len(scene)) if i not in inputs]
    if not candidates:
        print(f"{scene.sequence}: all views are inputs, so the inputs themselves are measured")
    if on_inputs or not candidates:
        candidates = list(range(len(scene)))
    return [candidates[i] for i in evenly_spaced(len(candidates), count or len(candidates))]


def show_all(scene: Scene, inputs: list[int], targets: list[int], model: SparseFusion | None, instance: Instance,
             ours: Reconstruction) -> dict[str, Views]:
    """What every method shows from the target cameras, in the order of the tables (Sec. 4)."""
    config = instance.config
    cameras = scene.cameras[targets]
    size = scene.images.shape[-1]
    pictures = {"nearest": baselines.nearest_input(scene, inputs, targets)}
    if model is None:
        pictures["ngp"] = ours.render(cameras, size)
        return pictures

    # The field alone is the same fit without a prior: as many updates from input views.
    alone = reconstruct(scene, inputs, None, config, instance.seed, title="field without prior")
    pictures["ngp"] = alone.render(cameras, size)

    # The parts of the prior, each for itself.
    pictures["eft"] = baselines.eft_images(scene, inputs, targets, model, config, instance.seed,
                                           "EFT, a ray a pixel")
    pictures["vldm"] = baselines.vldm_samples(scene, inputs, targets, model, config, instance.seed)
    pictures["sparsefusion"] = ours.render(cameras, size)
    return pictures


@torch.no_grad()
def measure(views: Views, images: Tensor, masks: Tensor, distance: Distance) -> dict[str, list[float]]:
    """A method's metrics, view by view, against photographs (T, 3, S, S) and masks (T, 1, S, S).

    The PSNR of equal pictures is 100 dB, for JSON has no infinity.
    """
    # Of the picture.
    shown = views.images.clamp(0, 1)
    values = {
        "psnr": metrics.psnr(shown, images).clamp(max=100),
        "ssim": metrics.ssim(shown, images),
        "perceptual": distance(shown, images),
    }

    # Of the silhouette, if the method has one.
    if views.silhouettes is not None:
        values["iou"] = metrics.iou(views.silhouettes, masks)
    return {name: [round(x, 5) for x in value.tolist()] for name, value in values.items()}


def mean_rows(per_view: dict[str, dict[str, list[float]]]) -> report.Rows:
    """Method -> metric -> mean over views."""
    rows = {}
    for method, values in per_view.items():
        rows[method] = {name: round(fmean(numbers), 4) for name, numbers in values.items()}
    return rows


def write_outputs(scene: Scene, inputs: list[int], targets: list[int], pictures: dict[str, Views],
                  ours: Reconstruction, out: Path) -> None:
    """Something to look at: the sheet that compares methods, every picture in it, the turntable, the mesh."""
    names = [scene.names[i] for i in targets]
    report.save_picture(report.comparison(scene, inputs, targets, pictures), out / "comparison.png")
    report.save_views(pictures, scene.images[targets], names, out / "views")
    report.save_animation(ours.turntable(scene.cameras, scene.images.shape[-1]), out / "turntable.gif")
    write_ply(out / "mesh.ply", ours.mesh())


def run_instance(instance: Instance, out: Path, overwrite: bool = False) -> dict:
    """Reconstruct, compare, measure, and write everything into the folder `out`; returns what `metrics.json` holds.

    An earlier run of the same settings is taken up. Raises `ValueError` for one of other settings, unless told to
    `overwrite` it, and for input that is missing or broken.
    """
    began = time.monotonic()
    config = instance.config
    entry = instance.entry

    # What is given.
    model = None if instance.weights is None else sparsefusion.load(instance.weights, instance.device)
    distances = load_distances(instance)
    size = config.image_size if model is None else model.preset.image_size
    scene = load_sequence(instance.root, entry.category, entry.sequence, size, entry.frames).to(instance.device)
    inputs = choose_inputs(scene, instance)
    targets = choose_targets(scene, inputs, instance.targets, config.metrics_on_inputs)
    if size % config.render_size:
        raise ValueError(f"render_size {config.render_size} does not divide the {size} pixels of a picture's side")

    # The method, and what it is compared with.
    checkpoint = out / "field.pt"
    if overwrite:
        checkpoint.unlink(missing_ok=True)
    title = "field fit" if model is None else "distillation"
    ours = reconstruct(scene, inputs, model, config, instance.seed, distances.loss, checkpoint, title)
    pictures = show_all(scene, inputs, targets, model, instance, ours)
    per_view = {}
    for method, views in pictures.items():
        per_view[method] = measure(views, scene.images[targets], scene.masks[targets], distances.metric)

    write_outputs(scene, inputs, targets, pictures, ours, out)
    result = {
        "sequence": entry.sequence,
        "input_frames": [scene.names[i] for i in inputs],
        "target_frames": [scene.names[i] for i in targets],
        "methods": mean_rows(per_view),
        "per_view": per_view,
        "perceptual_name": distances.metric_name,
        "command": " ".join(sys.argv),
        "settings": instance.settings(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": device_name(instance.device),
        },
        "seconds": round(time.monotonic() - began + ours.earlier_seconds, 1),
        "distillation_seconds": round(ours.seconds, 1),
        "peak_gb": peak_gb(instance.device),
    }
    files.save_json(result, out / "metrics.json")
    return result


# ---------------------------------------------------------------------------------------------- the command

def add_instance_flags(p: argparse.ArgumentParser, targets: int) -> None:
    """The flags that `distill.py` and `evaluate.py` share. `targets` is the default of --targets."""
    # What is given.
    p.add_argument("--root", type=Path, default=SAMPLE, help="CO3Dv2 folder (default: the shipped synthetic sample)")
    p.add_argument("--views", type=cli.views, default=2, metavar="N", help="random input views; 0 for all (default: 2)")
    p.add_argument("--protocol", choices=PROTOCOLS, default="paper",
                   help="paper: fewview_dev/test, 32 evenly spaced frames of a sequence; all: every frame there is")
    p.add_argument("--weights", type=Path, default=sparsefusion.SHIPPED,
                   help="the prior (default: the shipped nano weights)")
    p.add_argument("--seed", type=int, default=0,
                   help="of input views, noise and initial weights, plus the sequence's place in its list (default: 0)")

    # The numbers of the distillation.
    p.add_argument("--preset", choices=PRESETS,
                   help="numbers to start from (default: those of the weights; plain without a prior)")
    p.add_argument("--iterations", type=cli.count, metavar="N", help="default: the preset's")
    p.add_argument("--released", action="store_true", help=f"as the released code does it: --set {' '.join(RELEASED)}")
    cli.add_settings(p, DistillConfig)
    cli.add_device(p)

    # How it is measured.
    p.add_argument("--targets", type=cli.views, default=targets, metavar="N",
                   help=f"held-out views to compare, evenly spaced; 0 for all (default: {targets})")
    p.add_argument("--feature-net", type=Path, default=SHIPPED_FEATURE_NET, metavar="F",
                   help="network of the perceptual metric")
    p.add_argument("--lpips", type=Path, nargs=2, metavar=("VGG16", "LINEAR"),
                   help="vgg16-397923af.pth and LPIPS' vgg.pth: use LPIPS as loss and as metric")
    p.add_argument("--overwrite", action="store_true", help="replace results of other settings in --out")


def config_from_flags(args: argparse.Namespace, no_prior: bool = False) -> DistillConfig:
    """Every number of the distillation: those of the weights' preset or another's, then what single settings change."""
    model = None if no_prior else sparsefusion.read_preset(args.weights)
    if model is not None and model.name not in PRESETS:
        raise ValueError(f"{args.weights}: its preset {model.name!r} is none of {', '.join(PRESETS)}")
    config = PRESETS[args.preset or ("plain" if model is None else model.name)]
    config = config.with_iterations(args.iterations or config.iterations)

    # How to sample a model is the model's own.
    if model is not None:
        config = replace(config, sampler=PRESETS[model.name].sampler)

    # What `--released` stands for comes first, so that --set has the last word.
    settings = list(args.settings)
    if args.released:
        print(f"--released stands for --set {' '.join(RELEASED)}")
        settings = [*RELEASED, *settings]
    return cli.apply_settings(config, settings, fixed=model)


def instance_from_flags(args: argparse.Namespace, entry: Entry, config: DistillConfig,
                        input_frames: tuple[str, ...] = (), no_prior: bool = False) -> Instance:
    """What the shared flags say about one sequence of a list."""
    return Instance(
        root=args.root,
        entry=entry,
        config=config,
        weights=None if no_prior else args.weights,
        views=args.views,
        input_frames=input_frames,
        targets=args.targets,
        seed=args.seed + entry.index,
        feature_net=args.feature_net,
        lpips=tuple(args.lpips) if args.lpips else None,
        device=args.device,
    )


def find_entry(args: argparse.Namespace) -> Entry:
    """The sequence that --sequence names, or the first of the protocol's list."""
    # In the protocol's list a sequence has its place, which seeds it.
    entries = PROTOCOLS[args.protocol](args.root, args.category)
    if args.sequence is None:
        return entries[0]
    for entry in entries:
        if entry.sequence == args.sequence:
            return entry
    names = ", ".join(entry.sequence for entry in entries[:5])
    raise ValueError(f"--sequence {args.sequence}: not in the list of --protocol {args.protocol}, which begins "
                     f"{names}; --protocol all lists every sequence")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__.splitlines()[0],
                   epilog="Run without flags: two views of a synthetic toy, on a CPU in minutes.")
    add_instance_flags(p, targets=8)
    p.add_argument("--category", default="toys", help="category in the root folder (default: toys)")
    p.add_argument("--sequence", metavar="S", help="default: the first of the category's list")
    p.add_argument("--input-frames", type=cli.words, default=(), metavar="I,J,...",
                   help="frame numbers of the input views, instead of --views")
    p.add_argument("--no-prior", action="store_true", help="fit the field to the input views alone")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: output/<sequence>")
    return p


def command(args: argparse.Namespace) -> None:
    """The main command."""
    # What is asked for.
    config = config_from_flags(args, args.no_prior)
    entry = find_entry(args)
    instance = instance_from_flags(args, entry, config, args.input_frames, args.no_prior)
    out = args.out or Path("output") / entry.sequence
    if instance.weights and args.device == "cpu" and sparsefusion.read_preset(args.weights).name == "paper":
        print("note: the paper's size takes minutes an iteration on a CPU; it is meant for --device cuda")

    # What came of it.
    result = run_instance(instance, out, args.overwrite)
    inputs = ", ".join(result["input_frames"])
    print(f"\n{entry.sequence}: inputs {inputs}; means over {len(result['target_frames'])} target views; "
          f"perceptual: {result['perceptual_name']}")
    print(report.table(result["methods"]))
    print(f"{result['seconds']:.0f} s; results in {out}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
