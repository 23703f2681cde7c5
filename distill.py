"""From a few pictures to one neural field: a scene, start to end, and the main command (Sec. 3.2 and 4).

    python distill.py                                  the shipped synthetic sample, two input views
    python distill.py --root DIR --category C --sequence S --weights F

From Python, `reconstruct` is the whole method for one scene. The command also makes what it is compared with,
measures everything on views that were not given, and writes pictures, mesh and numbers. The algorithm itself is in
`distillation.py`.

Letters: `V` input views, `Q` query viewpoints, `T` target views, `S` side of the image.
"""
from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
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
import volume
from cameras import Cameras, circle_path, relative_to
from co3d import choose_views, load_sequence, sequences
from distillation import PRESETS, RELEASED, DistillConfig, Distillation, Prior
from mesh import Mesh, extract_mesh, largest_component, write_ply
from ngp import Field, Occupancy
from report import Views
from runtime import device_name, peak_gb
from scenes import Scene, evenly_spaced
from sparsefusion import SparseFusion

ROOT = Path(__file__).resolve().parent
SAMPLE = ROOT / "sample" / "co3d"
SHIPPED_FEATURE_NET = ROOT / "sample" / "perceptual.pt"

Distance = Callable[[Tensor, Tensor], Tensor]  # images (B, 3, S, S) twice, in [0, 1] -> (B,)


# ---------------------------------------------------------------------------------------------- one scene, from Python

class Reconstruction(NamedTuple):
    """A finished field. It lives in the object frame; its pictures and its mesh are asked for in the scene's world."""
    field: Field
    occupancy: Occupancy
    frame: Cameras           # () the camera whose axes the object frame has; the world's origin is its origin, too
    config: DistillConfig
    seconds: float           # of the optimization

    @torch.no_grad()
    def render(self, cameras: Cameras, size: int) -> Views:
        """What cameras (T,) of the world see: pictures of `size` pixels a side, in [0, 1] on black."""
        cameras = object_frame(cameras, self.frame)
        views = []
        for i in range(len(cameras)):
            views.append(volume.render_image(self.field, cameras[i], size, size, None, self.occupancy))
        images = torch.stack([view.color for view in views])
        silhouettes = torch.stack([view.opacity for view in views])
        return Views(images, silhouettes)

    def turntable(self, cameras: Cameras, size: int) -> Tensor:
        """Once around, on the circle that fits the scene's cameras (V,): pictures (frames, 3, size, size).

        The box around the occupied cells stays in the middle of the picture, since crops of photographs may look past
        the object.
        """
        frames = self.config.turntable_frames
        path = circle_path(cameras.to("cpu"), frames + 1)[:-1].to(cameras.T.device)
        middle = self.occupancy.box.mean(0) @ self.frame.R.T  # of the world
        shift, _ = path.project(middle.expand(frames, 1, 3))
        path = replace(path, principal=path.principal - shift[:, 0])
        return self.render(path, size).images

    def mesh(self) -> Mesh:
        """The largest connected part of the surface, in the scene's world."""
        surface = extract_mesh(self.field, self.config.mesh_resolution, occupancy=self.occupancy)
        surface = largest_component(surface)
        return surface._replace(vertices=surface.vertices @ self.frame.R.T)


def object_frame(cameras: Cameras, frame: Cameras) -> Cameras:
    """Cameras in a world turned to the axes of the camera `frame`, whose origin stays (Sec. 3.2)."""
    return relative_to(cameras, frame.unsqueeze(0), move_origin=False)


def reconstruct(scene: Scene, inputs: list[int], model: SparseFusion | None = None, config: DistillConfig | None = None,
                seed: int = 0, perceptual_loss: Distance | None = None, checkpoint: Path | None = None,
                title: str | None = None) -> Reconstruction:
    """Fit a field to the views of a scene at the positions `inputs`, with a model's help for what they do not show
    (Sec. 3.2).

    Without a `model` the field fits the input views alone. Of the other views only the cameras are used. `config`: by
    default the preset of the model's name, or `plain`. `perceptual_loss`: by default the distance in the VAE
    encoder's features. With a `checkpoint` file an interrupted run of the same settings goes on where it stopped.
    `title` shows progress. The scene's tensors and the model's are on one device. Raises `ValueError` where no part
    of space lies in every mask.
    """
    # The numbers of the model's kind, unless others are given.
    if config is None:
        config = PRESETS["plain" if model is None else model.preset.name]

    # The field lives in the object frame: the axes of the first input camera, the world's origin.
    frame = scene.cameras[inputs[0]]
    turned = replace(scene, cameras=object_frame(scene.cameras, frame))
    wanted = reconstruction_settings(scene, inputs, model, config, seed, perceptual_loss)
    state = read_state(checkpoint, wanted)

    # What the EFT sees from every query viewpoint, unless no iteration is left to ask.
    prior = None
    if model is not None and (state is None or state["completed"] < config.iterations):
        viewpoints = query_viewpoints(turned.cameras, config, seed)
        given = turned[inputs]
        condition = model.condition(given.images, given.cameras, viewpoints, model.depth_range(scene.cameras),
                                    train_mode=config.eft_train_mode, title=title and f"{title}: EFT")
        prior = Prior(model, viewpoints, condition, perceptual_loss or model.feature_distance)

    # Optimize, from where an earlier run of the same settings stopped.
    distillation = Distillation(turned[inputs], config, seed, prior)
    if state is not None:
        distillation.load_state_dict(state)
        print(f"{checkpoint}: going on at iteration {distillation.completed}")

    def save() -> None:
        files.save_tensors(distillation.state_dict() | {"settings": wanted}, checkpoint)

    distillation.run(title, save if checkpoint else None)
    if checkpoint:
        save()
    return Reconstruction(distillation.field, distillation.occupancy, frame, config, distillation.seconds)


def query_viewpoints(cameras: Cameras, config: DistillConfig, seed: int) -> Cameras:
    """Where to imagine: on the circle through a scene's cameras (B,), and at all of them [released:
    distillation.py:73-76]. (Q,)
    """
    generator = torch.Generator().manual_seed(seed)
    circle = circle_path(cameras.to("cpu"), config.viewpoints, config.jitter, generator)
    return Cameras.cat([circle.to(cameras.T.device), cameras])


def reconstruction_settings(scene: Scene, inputs: list[int], model: SparseFusion | None, config: DistillConfig,
                            seed: int, perceptual_loss: Distance | None) -> dict:
    """Everything that decides a reconstruction, as plain data: two runs with equal settings are the same run."""
    # The pictures that are given, by their content; of the other views only the cameras matter.
    given = scene[inputs]
    cameras = scene.cameras
    numbers = [given.images, given.masks, given.valid, cameras.R, cameras.T, cameras.focal, cameras.principal]

    # A perceptual loss is known by its weights, or by its name if it has none.
    loss_name = getattr(perceptual_loss, "__qualname__", type(perceptual_loss).__name__)
    if isinstance(perceptual_loss, torch.nn.Module):
        loss_name = files.digest(*perceptual_loss.state_dict().values())
    return {
        "sequence": scene.sequence,
        "inputs": given.names,
        "given": files.digest(*numbers),
        "seed": seed,
        "weights": None if model is None else model.fingerprint,
        "perceptual_loss": loss_name,
        "config": asdict(config),
    }


def read_state(checkpoint: Path | None, wanted: dict) -> dict | None:
    """The state of an earlier run in a checkpoint file, if there is one and it had the settings that are wanted."""
    if checkpoint is None or not checkpoint.exists():
        return None
    state = files.read_tensors(checkpoint, "field")
    return state if state.get("settings") == wanted else None


# ---------------------------------------------------------------------------------------------- against the baselines

@dataclass(frozen=True)
class Instance:
    """One sequence to reconstruct and to measure: everything that decides the result."""
    root: Path
    category: str
    sequence: str
    config: DistillConfig
    weights: Path | None            # of the prior; None: the field alone
    views: int                      # random input views; 0: all
    input_frames: tuple[str, ...]   # numbers of the input frames instead; (): random ones
    targets: int                    # held-out views to compare, evenly spaced
    seed: int                       # of input views, noise and initial weights
    feature_net: Path               # network of the perceptual metric, without `lpips`
    lpips: tuple[Path, Path] | None  # VGG16 and LPIPS' linear layers, as loss and as metric
    device: str

    def settings(self) -> dict:
        """The same as plain data, files by their content: equal settings give equal results."""
        weights = [path for path in (self.weights, *(self.lpips or (self.feature_net,))) if path is not None]
        numbers = asdict(self) | {
            "root": str(self.root.resolve()),
            "input_frames": list(self.input_frames),
            "weights": [files.fingerprint(path) for path in weights],
        }
        return {name: x for name, x in numbers.items() if name not in ("feature_net", "lpips")}


class Distances(NamedTuple):
    """How far apart pictures look: what the loss asks and what the tables show."""
    loss: Distance | None   # None: the model's own
    metric: Distance
    metric_name: str


def load_distances(instance: Instance) -> Distances:
    """LPIPS for both if its files are given; else the VAE's features for the loss, and the shipped network for the
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
    return [position[frame] for frame in instance.input_frames]


def choose_targets(scene: Scene, inputs: list[int], count: int, on_inputs: bool) -> list[int]:
    """Positions of up to `count` views to measure, evenly spaced: of those that are no inputs, or where there is none
    of all.
    """
    candidates = [i for i in range(len(scene)) if i not in inputs]
    if on_inputs or not candidates:
        candidates = list(range(len(scene)))
    return [candidates[i] for i in evenly_spaced(len(candidates), count)]


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

    # The field alone is the same fit without a prior.
    iterations = max(1, int(config.iterations * config.baseline_fraction))
    config_alone = config.with_iterations(iterations)
    alone = reconstruct(scene, inputs, None, config_alone, instance.seed, title="field without prior")
    pictures["ngp"] = alone.render(cameras, size)

    # The parts of the prior, each for itself.
    train_mode = config.eft_train_mode
    pictures["eft"] = baselines.eft_images(scene, inputs, targets, model, train_mode, "EFT, a ray a pixel")
    pictures["vldm"] = baselines.vldm_samples(scene, inputs, targets, model, config.sampler, instance.seed, train_mode)
    pictures["sparsefusion"] = ours.render(cameras, size)
    return pictures


@torch.no_grad()
def measure(pictures: dict[str, Views], images: Tensor, masks: Tensor,
            distance: Distance) -> dict[str, dict[str, float]]:
    """Every method's metrics against photographs (T, 3, S, S) and masks (T, 1, S, S), means over views.

    The PSNR of equal pictures is 100 dB, for JSON has no infinity.
    """
    rows = {}
    for method, views in pictures.items():
        shown = views.images.clamp(0, 1)
        values = {
            "psnr": metrics.psnr(shown, images).clamp(max=100),
            "ssim": metrics.ssim(shown, images),
            "perceptual": distance(shown, images),
            "iou": metrics.iou(views.silhouettes, masks),
        }
        rows[method] = {name: round(float(value.mean()), 4) for name, value in values.items()}
    return rows


def run_instance(instance: Instance, out: Path) -> dict:
    """Reconstruct, compare, measure, and write everything into the folder `out`; returns what `metrics.json` holds."""
    began = time.monotonic()
    config = instance.config

    # What is given.
    model = None if instance.weights is None else sparsefusion.load(instance.weights, instance.device)
    distances = load_distances(instance)
    size = config.image_size if model is None else model.preset.image_size
    scene = load_sequence(instance.root, instance.category, instance.sequence, size).to(instance.device)
    inputs = choose_inputs(scene, instance)
    targets = choose_targets(scene, inputs, instance.targets, config.metrics_on_inputs)
    if size % config.render_size:
        raise ValueError(f"render_size {config.render_size} does not divide the {size} pixels of a picture's side")

    # The method, and what it is compared with.
    out.mkdir(parents=True, exist_ok=True)
    title = "field fit" if model is None else "distillation"
    ours = reconstruct(scene, inputs, model, config, instance.seed, distances.loss, out / "field.pt", title)
    pictures = show_all(scene, inputs, targets, model, instance, ours)
    rows = measure(pictures, scene.images[targets], scene.masks[targets], distances.metric)

    # Something to look at.
    report.save_picture(report.comparison(scene, inputs, targets, pictures), out / "comparison.png")
    report.save_animation(ours.turntable(scene.cameras, size), out / "turntable.gif")
    write_ply(out / "mesh.ply", ours.mesh())

    result = {
        "sequence": instance.sequence,
        "input_frames": [scene.names[i] for i in inputs],
        "target_frames": [scene.names[i] for i in targets],
        "methods": rows,
        "perceptual_name": distances.metric_name,
        "command": " ".join(sys.argv),
        "settings": instance.settings(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": device_name(instance.device),
        },
        "seconds": round(time.monotonic() - began, 1),
        "distillation_seconds": round(ours.seconds, 1),
        "peak_gb": round(peak_gb(instance.device), 2),
    }
    files.save_json(result, out / "metrics.json")
    return result


# ---------------------------------------------------------------------------------------------- the command

def add_instance_flags(p: argparse.ArgumentParser) -> None:
    """The flags that `distill.py` and `evaluate.py` share."""
    # What is given.
    p.add_argument("--root", type=Path, default=SAMPLE, help="CO3Dv2 folder (default: the shipped synthetic sample)")
    p.add_argument("--category", default="toys", help="category in it (default: toys)")
    p.add_argument("--views", type=cli.views, default=2, metavar="N", help="random input views; 0 for all (default: 2)")
    p.add_argument("--weights", type=Path, default=sparsefusion.SHIPPED,
                   help="the prior (default: the shipped nano weights)")
    p.add_argument("--seed", type=int, default=0, help="of input views, noise and initial weights (default: 0)")

    # The numbers of the distillation.
    p.add_argument("--preset", choices=PRESETS,
                   help="numbers to start from (default: those of the weights; plain without a prior)")
    p.add_argument("--iterations", type=cli.count, metavar="N", help="default: the preset's")
    p.add_argument("--released", action="store_true", help=f"as the released code does it: --set {' '.join(RELEASED)}")
    cli.add_settings(p, DistillConfig)
    cli.add_device(p)

    # How it is measured.
    p.add_argument("--targets", type=cli.count, default=8, metavar="N",
                   help="held-out views to compare, evenly spaced (default: 8)")
    p.add_argument("--feature-net", type=Path, default=SHIPPED_FEATURE_NET, metavar="F",
                   help="network of the perceptual metric")
    p.add_argument("--lpips", type=Path, nargs=2, metavar=("VGG16", "LINEAR"),
                   help="vgg16-397923af.pth and LPIPS' vgg.pth: use LPIPS as loss and as metric")


def instance_from_flags(args: argparse.Namespace, sequence: str, seed: int, input_frames: tuple[str, ...] = (),
                        no_prior: bool = False) -> Instance:
    """What the shared flags say about one sequence."""
    # The preset of the weights, what the flags change in it, and then every single number.
    preset = None if no_prior else sparsefusion.read_preset(args.weights)
    name = args.preset or ("plain" if preset is None else preset.name)
    config = PRESETS[name]
    if args.iterations:
        config = config.with_iterations(args.iterations)
    released_settings = list(RELEASED) if args.released else []
    config = cli.apply_settings(config, released_settings + args.settings, fixed=preset)

    weights = None if no_prior else args.weights
    lpips = tuple(args.lpips) if args.lpips else None
    return Instance(args.root, args.category, sequence, config, weights, args.views, input_frames, args.targets, seed,
                    args.feature_net, lpips, args.device)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__.splitlines()[0],
                   epilog="Run without flags: two views of a synthetic toy, on a CPU in minutes.")
    add_instance_flags(p)
    p.add_argument("--sequence", metavar="S", help="default: the first of the category")
    p.add_argument("--input-frames", type=lambda text: tuple(text.split(",")), default=(), metavar="I,J,...",
                   help="frame numbers of the input views, instead of --views")
    p.add_argument("--no-prior", action="store_true", help="fit the field to the input views alone")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: output/<sequence>")
    return p


def command(args: argparse.Namespace) -> None:
    """The main command."""
    # What is asked for.
    sequence = args.sequence or sequences(args.root, args.category)[0]
    instance = instance_from_flags(args, sequence, args.seed, args.input_frames, args.no_prior)
    out = args.out or Path("output") / sequence
    if args.released:
        print(f"--released stands for --set {' '.join(RELEASED)}")
    if instance.weights and instance.config == PRESETS["paper"] and args.device == "cpu":
        print("note: the paper's size takes minutes an iteration on a CPU; it is meant for --device cuda")

    # What came of it.
    result = run_instance(instance, out)
    inputs = ", ".join(result["input_frames"])
    print(f"\n{sequence}: inputs {inputs}; means over {len(result['target_frames'])} target views; "
          f"perceptual: {result['perceptual_name']}")
    print(report.table(result["methods"]))
    print(f"{result['seconds']:.0f} s; results in {out}")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(command, parser().parse_args(argv))


if __name__ == "__main__":
    main()
