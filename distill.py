"""From a few pictures to one neural field, and how good it is: the main command (Sec. 4).

    python distill.py                                  the shipped synthetic sample, two input views
    python distill.py --root DIR --category C --sequence S --weights F
    python distill.py --capture DIR                    own photographs (docs/photographs.md)

The command asks whether masks and cameras fit (`check.py`), makes a field (`reconstruction.py`; the algorithm is in
`distillation.py`), makes what it is compared with, measures everything on views that were not given, and writes
pictures, mesh and numbers.

Letters: `T` target views, `S` side of the image.
"""
from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

import metrics
import sparsefusion
from checkpoints import released
from common import cli, files
from common.runtime import begin, planned
from datasets.crop import Scene
from datasets.protocol import PROTOCOLS
from evaluation import baselines, results
from evaluation.instance import (CO3DSequence, Instance, Loaded, OwnPhotographs, Source, check_inputs, choose_targets,
                                 find_sequence, find_views, random_views)
from export.mesh import write_ply
from export.pictures import Rows, Views, comparison, save_animation, save_picture, save_views, table
from photographs.capture import Similarity
from photographs.reading import read_capture
from reconstruction import Distance, Reconstruction, reconstruct
from settings import PRESETS, RELEASED, DistillConfig
from sparsefusion import SparseFusion

ROOT = Path(__file__).resolve().parent
SAMPLE = ROOT / "sample" / "co3d"
SHIPPED_FEATURE_NET = ROOT / "sample" / "perceptual.pt"

ENOUGH = 8   # own photographs as inputs, from which on the field alone is the default
LISTED = 12  # input views that are named one by one

# Fields of the config that mean nothing without a prior.
PRIORS_OWN = ("viewpoints", "jitter", "bootstrap", "min_noise_level", "weight_perceptual", "eft_train_mode", "sampler")


# ---------------------------------------------------------------------------------------------- against the baselines

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


def load_views(instance: Instance, model: SparseFusion | None) -> Loaded:
    """All views of an instance in the model's size, or without one in the config's. Raises `ValueError` where
    renderings of the config do not fit that size.
    """
    size = instance.config.image_size if model is None else model.preset.image_size
    loaded = instance.source.load(size)
    side = instance.config.render_size
    if size % side and not (model is None and instance.config.input_pixels):
        raise ValueError(f"render_size {side} does not divide the {size} pixels of a picture's side")
    return loaded._replace(scene=loaded.scene.to(instance.device))


def show_all(scene: Scene, inputs: list[int], targets: list[int], model: SparseFusion | None, instance: Instance,
             ours: Reconstruction, out: Path) -> dict[str, Views]:
    """What every method shows from the target cameras, in the order of the tables (Sec. 4)."""
    config = instance.config
    cameras = scene.cameras[targets]
    size = scene.images.shape[-1]
    pictures = {"nearest": baselines.nearest_input(scene, inputs, targets)}
    if model is None:
        begin("pictures")
        pictures["ngp"] = ours.render(cameras, size)
        return pictures

    # The field alone is the same fit without a prior: as many updates from input views.
    alone = reconstruct(scene, inputs, None, config, instance.seed, checkpoint=out / "field_alone.pt",
                        title="field without prior", extend=bool(ours.gone_on_from))
    pictures["ngp"] = alone.render(cameras, size)

    # The parts of the prior, each for itself.
    pictures["eft"] = baselines.eft_images(scene, inputs, targets, model, config, instance.seed,
                                           ours.hull(cameras, size), "EFT, a ray a pixel")
    begin("VLDM samples")
    pictures["vldm"] = baselines.vldm_samples(scene, inputs, targets, model, config, instance.seed)
    begin("pictures")
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


def mean_rows(per_view: dict[str, dict[str, list[float]]]) -> Rows:
    """Method -> metric -> mean over views."""
    rows = {}
    for method, values in per_view.items():
        rows[method] = {name: round(fmean(numbers), 4) for name, numbers in values.items()}
    return rows


def write_outputs(scene: Scene, inputs: list[int], targets: list[int], pictures: dict[str, Views],
                  ours: Reconstruction, world: Similarity | None, out: Path) -> None:
    """Something to look at: the sheet that compares methods, every picture in it, the turntable, the mesh. `world`
    leads to the coordinates that the mesh gets.
    """
    names = [scene.names[i] for i in targets]
    save_picture(comparison(scene, inputs, targets, pictures), out / "comparison.png")
    save_views(pictures, scene.images[targets], names, out / "views")
    turntable = ours.turntable(scene.cameras, scene.images.shape[-1], "turntable")
    save_animation(turntable, out / "turntable.gif")

    begin("mesh")
    mesh = ours.mesh()
    if world is not None:
        mesh = mesh._replace(vertices=world.points(mesh.vertices))
    write_ply(out / "mesh.ply", mesh)


def run_instance(instance: Instance, out: Path, overwrite: bool = False, extend: bool = False) -> dict:
    """Reconstruct, compare, measure, and write everything into the folder `out`; returns what `metrics.json` holds.

    An earlier run of the same settings is taken up; with `extend` one of fewer iterations, too. Raises `ValueError`
    for one of other settings, unless told to `overwrite` it, and for input that is missing or broken.
    """
    with planned(instance.expected_costs()):
        return _run_instance(instance, out, overwrite, extend)


def _run_instance(instance: Instance, out: Path, overwrite: bool, extend: bool) -> dict:
    began = time.monotonic()
    begin("loading")
    settings = instance.settings()
    other = results.conflict(out, settings, extend)
    if other and not overwrite:
        raise ValueError(f"{out}: results of other settings ({other}); choose another --out, or --overwrite")

    # What is given.
    inputs = instance.inputs()
    targets = choose_targets(instance.source, inputs, instance.targets, instance.config.metrics_on_inputs)
    model = None if instance.weights is None else sparsefusion.load(instance.weights, instance.device)
    distances = load_distances(instance)
    loaded = load_views(instance, model)
    scene = loaded.scene
    world = loaded.world_as_data()
    instance.note_more_iterations()
    results.claim(out, settings, clear=bool(other))

    # The method, and what it is compared with.
    title = "field fit" if model is None else "distillation"
    ours = reconstruct(scene, inputs, model, instance.config, instance.seed, distances.loss, out / "field.pt", title,
                       out / "previews.png", extend, {"world": world})
    pictures = show_all(scene, inputs, targets, model, instance, ours, out)
    truth = scene[targets]
    per_view = {method: measure(views, truth.images, truth.masks, distances.metric)
                for method, views in pictures.items()}

    # Pictures, mesh, numbers.
    write_outputs(scene, inputs, targets, pictures, ours, loaded.world, out)
    result = {
        "sequence": instance.source.name,
        "input_frames": [scene.names[i] for i in inputs],
        "target_frames": [scene.names[i] for i in targets],
        "methods": mean_rows(per_view),
        "per_view": per_view,
        "perceptual_name": distances.metric_name,
        "world": world,
        "settings": settings,
    } | results.account(ours, instance.device, began)
    files.save_json(result, out / "metrics.json")
    (out / "field_alone.pt").unlink(missing_ok=True)
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
    p.add_argument("--seed", type=cli.seed, default=0,
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
    useless = PRIORS_OWN if model is None else ("image_size",)
    cli.note_useless_settings(config, args.settings, useless, "without a prior" if model is None else "with a prior")
    config = cli.apply_settings(config, settings, fixed=model)

    # A number that somebody asks for is not added to.
    if any(setting.partition("=")[0] == "iterations" for setting in settings):
        config = replace(config, iterations_per_view=0)
    return config


def note_useless_flags(args: argparse.Namespace) -> None:
    """One line on flags that have no effect beside others."""
    if args.lpips:
        cli.note_useless(args, ["--feature-net"], "with --lpips")
    if getattr(args, "input_frames", ()):
        cli.note_useless(args, ["--views"], "with --input-frames")
    if getattr(args, "no_prior", False):
        cli.note_useless(args, ["--weights"], "with --no-prior")


def trained_categories(weights: Path) -> list[str]:
    """What a prior knows, as far as its file says."""
    return sorted({x["category"] for x in sparsefusion.read_trained_on(weights) if x.get("what") == "prior"})


def note_new_categories(weights: Path, categories: list[str]) -> None:
    """One line on data of categories that a prior has never seen."""
    known = trained_categories(weights)
    new = sorted(set(categories) - set(known))
    old = ", ".join(known)
    if known and new:
        print(f"note: the prior in {weights.name} was trained on {old}; {', '.join(new)}: new to it, so it will see "
              f"{old} in them (--no-prior fits the photographs alone)")


def instance_from_flags(args: argparse.Namespace, source: Source, config: DistillConfig,
                        input_frames: tuple[str, ...] = (), no_prior: bool = False) -> Instance:
    """What the shared flags say about one source."""
    # The sequences of a list have different inputs and different noise.
    seed = args.seed + source.index
    lpips = tuple(args.lpips) if args.lpips else None
    return Instance(
        source=source,
        config=config,
        weights=None if no_prior else args.weights,
        views=args.views,
        input_frames=input_frames,
        targets=args.targets,
        seed=seed,
        feature_net=args.feature_net,
        lpips=lpips,
        device=args.device,
    )


def find_source(args: argparse.Namespace) -> Source:
    """The folder of --capture, or the sequence of a CO3D tree."""
    if args.capture is None:
        return find_sequence(args.root, args.protocol, args.category, args.sequence)

    # One or the other.
    others = [flag for flag in ("--root", "--category", "--sequence", "--protocol") if flag in args.given]
    if others:
        raise ValueError(f"--capture: own photographs are no CO3D tree and have no {', '.join(others)}")
    source = OwnPhotographs(read_capture(args.capture))
    print(f"{args.capture}: {source.photographs.source}")
    return source


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__.splitlines()[0],
                   epilog="Run without flags: two views of a synthetic toy, on a CPU in minutes.")
    add_instance_flags(p, targets=8)

    # One source, and what is to be done with it.
    p.add_argument("--capture", type=Path, metavar="DIR",
                   help="a folder of own photographs with masks and poses, instead of --root, --category, --sequence")
    p.add_argument("--category", default="toys", help="category in the root folder (default: toys)")
    p.add_argument("--sequence", metavar="S", help="default: the first of the category's list")
    p.add_argument("--input-frames", type=cli.words, default=(), metavar="I,J,...",
                   help="frame numbers, or file names of own photographs, of the input views, instead of --views")
    p.add_argument("--no-prior", action="store_true", help="fit the field to the input views alone")
    p.add_argument("--force", action="store_true", help="go on where masks and cameras do not fit")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: output/<sequence>; if taken, a folder beside it")
    return p


def choose_photographs(source: OwnPhotographs, args: argparse.Namespace) -> tuple[str, ...]:
    """Names of the input photographs: those asked for, so many random ones, or all that are not held out."""
    # Whatever somebody asks for goes first.
    if args.input_frames:
        chosen = find_views(source, args.input_frames)
    elif "--views" in args.given:
        chosen = random_views(source, args.views, args.seed)
    else:
        targets = args.targets if "--targets" in args.given else None
        chosen = source.default_inputs(targets)
    return tuple(source.names[i] for i in chosen)


def without_prior(args: argparse.Namespace, photographs: int) -> bool:
    """Whether so many own photographs do without a prior. One line says which and why."""
    # Somebody's choice, or by their number.
    if args.no_prior:
        return True
    if photographs >= ENOUGH and "--weights" not in args.given:
        print(f"{photographs} input photographs are enough for a field alone, without a prior (--weights F takes one)")
        return True

    # What a prior has learned, it sees in everything.
    known = ", ".join(trained_categories(args.weights))
    limit = f", which knows {known} and sees them in everything" if known else ""
    print(f"{photographs} input photographs, with the prior {args.weights.name}{limit} (--no-prior fits them alone)")
    return False


def instance_of_command(args: argparse.Namespace) -> Instance:
    """What all flags say."""
    # Of own photographs their number decides about a prior.
    source = find_source(args)
    if isinstance(source, CO3DSequence):
        config = config_from_flags(args, args.no_prior)
        instance = instance_from_flags(args, source, config, args.input_frames, args.no_prior)
        if instance.weights:
            note_new_categories(args.weights, [source.entry.category])
    else:
        input_frames = choose_photographs(source, args)
        no_prior = without_prior(args, len(input_frames))
        config = config_from_flags(args, no_prior)
        instance = instance_from_flags(args, source, config, input_frames, no_prior)

    # What will not do what somebody may hope.
    note_useless_flags(args)
    if instance.weights and args.device == "cpu" and sparsefusion.read_preset(args.weights).name == "paper":
        print("note: the paper's size takes minutes an iteration on a CPU; it is meant for --device cuda")
    return instance


def command(args: argparse.Namespace) -> None:
    """The main command."""
    # What is asked for, and where it goes.
    instance = instance_of_command(args)
    name = instance.source.name
    settings = instance.settings()
    out = args.out or results.choose_folder(Path("output"), name, settings, args.overwrite)

    # What came of it, now or earlier.
    result = results.finished(out, settings)
    if result is None:
        check_inputs(instance.source, instance.inputs(), args.force)
        result = run_instance(instance, out, args.overwrite, extend=not args.overwrite)
    else:
        print(f"{out} has the results of these settings already; delete it to make them anew")

    # In a table.
    inputs = result["input_frames"]
    shown = ", ".join(inputs) if len(inputs) <= LISTED else f"{inputs[0]}, {inputs[1]}, ... ({len(inputs)} views)"
    print(f"\n{name}: inputs {shown}; means over {len(result['target_frames'])} target views; "
          f"perceptual: {result['perceptual_name']}")
    print(table(result["methods"]))
    print(f"{result['seconds']:.0f} s; results in {out}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
