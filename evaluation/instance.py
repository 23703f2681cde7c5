"""One object to reconstruct and to measure (`Instance`), against the baselines (Sec. 4): `run_instance`.

Shapes: `T` target views, `S` side of the image.
"""
from __future__ import annotations

import sys
import time
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
from common import files
from common.machine import peak_gb, versions
from distillation import DistillConfig
from evaluation import baselines, results
from evaluation.sources import Source, choose_targets, find_views, random_views
from evaluation.tables import Rows
from export.mesh import write_glb, write_ply
from export.page import TURNTABLE, page_data, write_page
from export.pictures import Views, comparison, save_animation, save_picture, save_views
from reconstruction import Checkpoint, Distance, Reconstruction, reconstruct
from sparsefusion import SparseFusion


@dataclass(frozen=True)
class Instance:
    """One object to reconstruct and to measure: everything that decides the result."""
    source: Source
    config: DistillConfig
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
            "config": asdict(self.fitted_config()),
        }

    def fitted_config(self) -> DistillConfig:
        """Its numbers, for as many input views as it has."""
        return self.config.fitted(len(self.input_frames) or self.views or len(self.source.possible_inputs))

    def note_more_iterations(self) -> None:
        """One line where so many input views take longer than a preset's iterations."""
        iterations = self.fitted_config().iterations
        if iterations > self.config.iterations:
            print(f"{iterations} iterations instead of {self.config.iterations}, for there are many input views "
                  "(--iterations N decides)")

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
        config = self.fitted_config()
        targets = self.targets or count
        seconds = 5 + 0.03 * count + 0.2 * targets + 0.3 * config.turntable_frames

        # The field alone; or the EFT's views, two fields, and the EFT and the VLDM to compare with.
        if self.weights is None:
            rays = (config.input_pixels or config.render_size**2) * config.pixel_side**2
            return seconds + 3e-5 * rays * config.iterations
        return seconds + 0.17 * (config.viewpoints + count) + 0.19 * config.iterations + 2.2 * targets


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
    network = metrics.load_attribute_net(instance.feature_net).to(instance.device)
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


def mean_rows(per_view: dict[str, dict[str, list[float]]]) -> Rows:
    """Method -> metric -> mean over views."""
    rows = {}
    for method, values in per_view.items():
        rows[method] = {name: round(fmean(numbers), 4) for name, numbers in values.items()}
    return rows


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
    world = scene.world and {"R": scene.world.R.tolist(), "scale": scene.world.scale,
                             "shift": scene.world.shift.tolist()}
    instance.note_more_iterations()
    results.claim(out, settings, extend)

    # The method, and what it is compared with.
    title = "step 1 of 2, field fit" if model is None else "step 1 of 5, distillation"
    checkpoint = Checkpoint(out / "field.pt", extend, out / "previews.png")
    ours = reconstruct(scene, inputs, model, instance.config, instance.seed, loss_distance, title, checkpoint)
    pictures = show_all(scene, inputs, targets, model, instance, ours, out)
    truth = (scene.whole or scene)[targets]
    per_view = {method: measure(views, truth.images, truth.masks, distance) for method, views in pictures.items()}

    # Pictures, mesh, numbers.
    shown = write_outputs(scene, inputs, targets, pictures, ours, out)
    result = {
        "sequence": instance.source.name,
        "input_frames": [scene.names[i] for i in inputs],
        "target_frames": [scene.names[i] for i in targets],
        "methods": mean_rows(per_view),
        "per_view": per_view,
        "perceptual_name": distance_name,
        "world": world,
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
