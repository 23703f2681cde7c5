"""One object to reconstruct and to measure (`Instance`), as flags say it, against the baselines (Sec. 4):
`run_instance`.

Shapes: `T` target views, `S` side of the image.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import metrics
import sparsefusion
from cameras import Scene
from checkpoints import released
from common import cli, files
from common.machine import peak_gb, versions
from datasets.protocol import PROTOCOLS
from distillation import DistillConfig
from evaluation import baselines, results
from evaluation.attributes import load_attribute_net
from evaluation.views import Source, choose_targets, find_views, possible_inputs, random_views
from export.mesh import write_glb, write_ply
from export.page import TURNTABLE, page_data, write_page
from export.pictures import Views, comparison, save_animation, save_picture, save_views
from presets import PRESETS, RELEASED
from reconstruction import Checkpoint, Distance, Reconstruction, reconstruct
from sparsefusion import SparseFusion

SAMPLE = sparsefusion.ROOT / "sample" / "co3d"
SHIPPED_FEATURE_NET = sparsefusion.ROOT / "sample" / "perceptual.pt"

ANYTHING = "things"  # a category of objects of any kind: to a prior that knows it, none is new


@dataclass(frozen=True)
class Instance:
    """One object to reconstruct and to measure: everything that decides the result."""
    source: Source
    config: DistillConfig            # `fitted` to the number of input views
    weights: Path | None             # of the prior; None: the field alone
    views: int                       # random input views; 0: all
    input_frames: tuple[str, ...]    # names of the input views instead; (): random ones
    targets: int                     # views to compare, evenly spaced among the others; 0: all of them
    seed: int                        # of input views, noise and initial weights
    feature_net: Path                # network of the perceptual metric, without `lpips`
    lpips: tuple[Path, Path] | None  # VGG16 and LPIPS' linear layers, as loss and as metric
    device: str

    def settings(self) -> dict:
        """The same as plain data, files by their content, pictures by their dates: equal settings give equal
        results.
        """
        # Networks that judge.
        lpips = [files.fingerprint(path) for path in self.lpips or ()]
        feature_net = None if lpips else files.fingerprint(self.feature_net)

        return {
            **self.source.settings(),
            "weights": files.fingerprint(self.weights) if self.weights else None,
            "lpips": lpips,
            "feature_net": feature_net,
            "views": None if self.input_frames else self.views,
            "input_frames": self.input_frames,
            "targets": self.targets,
            "seed": self.seed,
            "device": self.device,
            "config": asdict(self.config),
        }

    def inputs(self) -> list[int]:
        """Positions of the input views."""
        # Those that were asked for, or random ones.
        if self.input_frames:
            return find_views(self.source, self.input_frames)
        return random_views(self.source, self.views, self.seed)

    def expected_seconds(self) -> float:
        """About how long a run takes on two CPU cores, at the shipped sample's size."""
        # Reading; pictures, turntable and mesh.
        count = len(self.source.names)
        config = self.config
        targets = self.targets or count
        seconds = 5 + 0.03 * count + 0.2 * targets + 0.3 * config.turntable_frames

        # The field alone; or the EFT's views, two fields, and the EFT and the VLDM to compare with.
        if self.weights is None:
            rays = config.input_pixels or config.render_size**2
            return seconds + 3e-5 * rays * config.iterations
        return seconds + 0.17 * (config.viewpoints + count) + 0.19 * config.iterations + 2.2 * targets


# ---------------------------------------------------------------------------------------------- the flags

def add_instance_flags(parser: argparse.ArgumentParser, targets: int) -> tuple[argparse._ArgumentGroup, ...]:
    """The flags that `distill.py` and `evaluate.py` share, in three groups, for more flags: what is given, how the
    field is optimized, what comes of it. `targets` is the default of --targets.
    """
    given = parser.add_argument_group("what is given")
    given.add_argument("--root", type=Path, default=SAMPLE, metavar="DIR",
                       help="CO3Dv2 folder (default: the shipped synthetic sample)")
    given.add_argument("--views", type=cli.views, default=2, metavar="N",
                       help="random input views; 0 for all (default: 2)")
    given.add_argument("--protocol", choices=PROTOCOLS, default="paper",
                       help="paper: fewview_dev/test, 32 evenly spaced frames of a sequence; all: every frame there is")

    # The numbers of the distillation.
    how = parser.add_argument_group("how the field is optimized")
    how.add_argument("--weights", type=Path, metavar="F",
                     help="the prior (default: of toys sample/nano.pt, of anything else sample/things.pt)")
    how.add_argument("--preset", choices=PRESETS,
                     help="numbers to start from (default: those of the weights; plain without a prior)")
    how.add_argument("--iterations", type=cli.count, metavar="N", help="default: the preset's")
    how.add_argument("--released", action="store_true",
                     help="as the released code does it, where a setting can (docs/differences.md)")
    how.add_argument("--seed", type=cli.seed, default=0, metavar="N", help="of input views, noise and initial weights, "
                     "plus the sequence's place in its list (default: 0)")
    cli.add_settings(how, DistillConfig)
    cli.add_device(how)

    # How it is measured.
    measured = parser.add_argument_group("what comes of it")
    measured.add_argument("--targets", type=cli.views, default=targets, metavar="N",
                          help=f"held-out views to compare, evenly spaced; 0 for all (default: {targets})")
    measured.add_argument("--feature-net", type=Path, default=SHIPPED_FEATURE_NET, metavar="F",
                          help="network of the perceptual metric")
    measured.add_argument("--lpips", type=Path, nargs=2, metavar=("VGG16", "LINEAR"), help="vgg16-397923af.pth and "
                          "LPIPS' vgg.pth: LPIPS as loss, and as metric instead of --feature-net")
    measured.add_argument("--overwrite", action="store_true", help="replace results of other settings in --out")
    return given, how, measured


def config_from_flags(args: argparse.Namespace) -> DistillConfig:
    """Every number of the distillation: those of the weights' preset or another's, then what single settings change.

    `args.weights` is None without a prior.
    """
    model = None if args.weights is None else sparsefusion.read_preset(args.weights)
    if model is not None and model.name not in PRESETS:
        raise ValueError(f"{args.weights}: its preset {model.name!r} is none of {', '.join(PRESETS)}")
    config = PRESETS[args.preset or ("plain" if model is None else model.name)]
    if args.iterations:
        config = config.with_iterations(args.iterations)

    # How to sample a model is the model's own.
    if model is not None:
        config = replace(config, sampler=PRESETS[model.name].sampler)

    # What `--released` stands for comes first, so that --set has the last word.
    settings = list(args.settings)
    if args.released:
        print(f"--released stands for --set {' '.join(RELEASED)}")
        settings = [*RELEASED, *settings]
    config = cli.apply_settings(config, settings, fixed=model)

    # A number that is set is not added to.
    if any(setting.partition("=")[0] == "iterations" for setting in settings):
        config = replace(config, iterations_per_view=0)
    return config


def choose_weights(args: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Without `--weights`: the shipped prior of toys, if all sources are toys, or that of things."""
    if args.weights is None:
        toys = all(getattr(source, "category", None) == "toys" for source in sources)
        args.weights = sparsefusion.SHIPPED if toys else sparsefusion.THINGS


def trained_categories(weights: Path) -> list[str]:
    """What a prior knows, as far as its file says."""
    return sorted({x["category"] for x in sparsefusion.read_trained_on(weights) if x.get("what") == "prior"})


def note_new_categories(weights: Path, categories: list[str]) -> None:
    """One line on data of categories that a prior has never seen."""
    known = trained_categories(weights)
    new = sorted(set(categories) - set(known))
    old = ", ".join(known)
    if new and known and ANYTHING not in known:
        print(f"note: the prior in {weights.name} was trained on {old}; {', '.join(new)}: new to it, so it will see "
              f"{old} in them (--no-prior fits the photographs alone)")


def instance_from_flags(args: argparse.Namespace, source: Source, config: DistillConfig,
                        input_frames: tuple[str, ...] = ()) -> Instance:
    """What the shared flags say about one source. One line where many input views take longer than a preset's
    iterations.
    """
    count = len(input_frames) or args.views or len(possible_inputs(source))
    fitted = config.fitted(count)
    if fitted.iterations > config.iterations:
        print(f"{fitted.iterations} iterations instead of {config.iterations}, for there are many input views "
              "(--iterations N decides)")
    return Instance(
        source=source,
        config=fitted,
        weights=args.weights,
        views=args.views,
        input_frames=input_frames,
        targets=args.targets,
        seed=args.seed + source.index,  # the sequences of a list have different inputs and different noise
        feature_net=args.feature_net,
        lpips=tuple(args.lpips) if args.lpips else None,
        device=args.device,
    )


# ---------------------------------------------------------------------------------------------- against the baselines

def load_distances(instance: Instance) -> tuple[Distance | None, Distance, str]:
    """How far apart pictures look: for the loss (None: the model's own) and for the tables, and the latter's name.

    LPIPS for both if its files are given; else the VAE's features for the loss, the shipped network for the tables.
    """
    if instance.lpips:
        lpips = released.load_lpips(*instance.lpips).to(instance.device)
        return lpips, lpips, "LPIPS (VGG16, v0.1)"
    if instance.weights:
        print("perceptual term: the VAE encoder's features (no --lpips files given; this is not LPIPS)")
    network = load_attribute_net(instance.feature_net).to(instance.device)
    return None, partial(metrics.perceptual_distance, network.layers), "attribute network (not LPIPS)"


def load_views(instance: Instance, model: SparseFusion | None) -> Scene:
    """All views of an instance in the model's size, or without one in the config's. Raises `ValueError` where
    renderings of the config do not fit that size.
    """
    size = instance.config.image_size if model is None else model.preset.image_size
    scene = instance.source.load(size, instance.config.cut)
    side = instance.config.render_size
    if size % side and not (model is None and instance.config.input_pixels):
        raise ValueError(f"render_size {side} does not divide the {size} pixels of a picture's side")
    return scene.to(instance.device)


def show_all(scene: Scene, inputs: list[int], targets: list[int], model: SparseFusion | None, instance: Instance,
             ours: Reconstruction, out: Path) -> dict[str, Views]:
    """What every method shows from the target cameras, in the order of the tables (Sec. 4)."""
    cameras = scene.user_cameras()[targets]
    size = scene.images.shape[-1]
    pictures = {"nearest": baselines.nearest_input(scene, inputs, targets)}
    if model is None:
        pictures["ngp"] = ours.render(cameras, size, "step 2 of 2, pictures")
        return pictures

    # The field alone is the same fit without a prior, in the same units: as many updates from input views.
    config = instance.config
    alike = config if model.trained_distance is not None else replace(config, half_side=0.0)
    checkpoint = Checkpoint(out / "field_alone.pt", extend=bool(ours.resumed_from))
    alone = reconstruct(scene, inputs, None, alike, instance.seed, title="step 2 of 5, field without prior",
                        checkpoint=checkpoint)
    pictures["ngp"] = alone.render(cameras, size)

    # The parts of the prior, each for itself.
    pictures["eft"] = baselines.eft_images(scene, inputs, targets, model, config, instance.seed,
                                           ours.hull(cameras, size), "step 3 of 5, EFT, a ray per pixel")
    pictures["vldm"] = baselines.vldm_samples(scene, inputs, targets, model, config, instance.seed,
                                              "step 4 of 5, VLDM samples")
    pictures["sparsefusion"] = ours.render(cameras, size, "step 5 of 5, pictures")
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


def measure_all(scene: Scene, targets: list[int], pictures: dict[str, Views], distance: Distance) -> dict:
    """The target views, and every method's metrics there: view by view, and their means. As plain data."""
    truth = (scene.whole or scene)[targets]
    per_view = {method: measure(views, truth.images, truth.masks, distance) for method, views in pictures.items()}
    means = {}
    for method, values in per_view.items():
        means[method] = {name: round(fmean(numbers), 4) for name, numbers in values.items()}
    return {"target_frames": truth.names, "methods": means, "per_view": per_view, "world": scene.world_numbers()}


def write_outputs(scene: Scene, inputs: list[int], targets: list[int], pictures: dict[str, Views],
                  ours: Reconstruction, out: Path) -> dict | None:
    """Something to look at: the sheet that compares methods, every picture in it, the mesh, the turntable. Returns what
    the page shows, None where it is not asked for.
    """
    shown = scene.whole or scene
    names = [scene.names[i] for i in targets]
    save_picture(comparison(shown, inputs, targets, pictures), out / "comparison.png")
    save_views(pictures, shown.images[targets], names, out / "views")
    mesh = ours.mesh()
    write_ply(out / "mesh.ply", mesh)
    write_glb(out / "mesh.glb", mesh)

    # From all sides, once: the middle row of these pictures is the turntable.
    for name in results.TURNING:
        (out / name).unlink(missing_ok=True)
    frames = ours.config.turntable_frames
    if not frames:
        return None
    orbit = ours.orbit()
    views = ours.render(orbit.cameras(frames, orbit.rows()), TURNTABLE, "last step, turntable", pixel_side=1)
    save_animation(views.images[frames:2 * frames], out / "turntable.gif")
    losses = files.read_tensors(out / "field.pt", "losses")["losses"]
    return page_data(scene, inputs, targets, pictures, orbit, views, mesh, losses)


def run_instance(instance: Instance, out: Path, overwrite: bool = False, extend: bool = False) -> dict:
    """Reconstruct, compare, measure, and write everything into the folder `out`; returns what `metrics.json` holds.

    An earlier run of the same settings is resumed; with `extend` one of fewer iterations, too. Raises `ValueError`
    for one of other settings, unless told to `overwrite` it, and for input that is missing or broken.
    """
    began = time.monotonic()
    settings = instance.settings()
    if not overwrite:
        results.require_free(out, settings, extend)

    # What is given.
    inputs = instance.inputs()
    targets = choose_targets(instance.source, inputs, instance.targets, instance.config.metrics_on_inputs)
    model = None if instance.weights is None else sparsefusion.load(instance.weights, instance.device)
    loss_distance, distance, distance_name = load_distances(instance)
    scene = load_views(instance, model)
    results.claim(out, settings, extend)

    # The method, and what it is compared with.
    title = "step 1 of 2, field fit" if model is None else "step 1 of 5, distillation"
    checkpoint = Checkpoint(out / "field.pt", extend, out / "previews.png")
    ours = reconstruct(scene, inputs, model, instance.config, instance.seed, loss_distance, title, checkpoint)
    pictures = show_all(scene, inputs, targets, model, instance, ours, out)
    shown = write_outputs(scene, inputs, targets, pictures, ours, out)

    # The numbers.
    result = measure_all(scene, targets, pictures, distance) | {
        "sequence": instance.source.sequence,
        "input_frames": [scene.names[i] for i in inputs],
        "perceptual_name": distance_name,
        "settings": settings,
        "command": " ".join(sys.argv),
        "resumed_from": ours.resumed_from,
        "versions": versions(instance.device),
        "seconds": round(time.monotonic() - began + ours.earlier_seconds, 1),
        "distillation_seconds": round(ours.seconds, 1),
        "peak_gb": peak_gb(instance.device),
    }
    if shown is not None:
        write_page(out / "index.html", shown, result)
    files.save_json(result, out / "metrics.json")
    (out / "field_alone.pt").unlink(missing_ok=True)
    return result
