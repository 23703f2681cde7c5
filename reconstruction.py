"""One scene, from Python: `reconstruct` fits a field to a few views of it (Sec. 3.2), with a model's help or without.

    user's world    cameras that pictures are asked from, meshes; `Scene.world` leads there (None: the scene's)
    scene's world   CO3D as annotated, own photographs normalized; the object is at the origin
    object frame    the axes of the first camera, the same origin, lengths divided by `unit`: the field is in it
    EFT's units     cameras as far away as in training, only within `SparseFusion.condition`

The algorithm is in `distillation.py`. Here a scene is turned to the object frame, a run is interrupted and resumed
without a trace, and the finished field is rendered and meshed in the user's own world.

Shapes: `V` input views, `Q` query viewpoints, `T` cameras to look from, `B` cameras.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import volume
from cameras import Cameras, Scene, Similarity, circle_path, object_half_side, relative_to, upright_axis
from common import files
from common.machine import stream_seed
from common.processes import Interrupted, uninterruptible
from common.progress import Progress
from common.settings import differences
from distillation import Distillation, DistillConfig, Prior
from eft import hull_maps
from export.mesh import Mesh, extract_mesh, largest_component
from export.orbit import Orbit, orbit_around
from export.pictures import Views, add_preview
from ngp import Field, FieldConfig
from presets import PRESETS
from sparsefusion import SparseFusion
from vldm import SamplerConfig
from volume import Occupancy

# Settings that change nothing in the field, only what is shown of it and measured.
OUTPUT_SETTINGS = ("config.mesh_resolution", "config.mesh_faces", "config.picture_side", "config.turntable_frames",
                   "config.metrics_on_inputs")

PREVIEW = 96  # pixels a side
COARSE = 48   # pixels a side of a first look at where the object is
TURNTABLE_FILL = 0.9  # of the half side of a picture
MOST_UNITS = 1e12     # of the numbers of a camera that is opened again

Distance = Callable[[Tensor, Tensor], Tensor]  # images (B, 3, S, S) twice, in [0, 1] -> (B,)


class Reconstruction(NamedTuple):
    """A finished field. It lives in the object frame; its pictures and its mesh are of the user's world."""
    field: Field
    occupancy: Occupancy
    frame: Cameras           # () the camera whose axes the object frame has; the world's origin is its origin, too
    unit: float              # of the field, in the scene's
    world: Similarity | None  # from the scene's world to the user's; None: the same one
    cameras: Cameras         # (V,) of the whole views, in the user's world
    config: DistillConfig
    seconds: float           # of the optimization, earlier processes included
    earlier_seconds: float   # of them, in earlier processes
    resumed_from: list[int]  # totals of the shorter runs that came before, if any

    @staticmethod
    def load(folder: str | Path, device: str = "cpu") -> Reconstruction:
        """The field that a run of `distill.py` left in its folder, or `reconstruct` with a checkpoint `field.pt` there.

        Raises `FileNotFoundError` or `ValueError` with one line.
        """
        path = Path(folder) / "field.pt"
        state = files.read_tensors(path, "field")
        try:
            # The numbers that it was made with, and a field and an occupancy of that size.
            config = state["settings"]["config"]
            sampler = SamplerConfig(**config["sampler"])
            config = DistillConfig(**config | {"sampler": sampler, "field": FieldConfig(**config["field"])})
            parts = {"field": Field(config.field), "occupancy": Occupancy(config.field)}
            for name, part in parts.items():
                files.check_weights(state[name], part)
                part.load_state_dict(state[name])
                part.to(device).eval()

            # Where it is; a first look shows whether all of that fits together.
            for name, x in [*state["frame"].items(), *state["cameras"].items()]:
                if not (x.abs() < MOST_UNITS).all() or name == "focal" and not (x > 0).all():
                    raise ValueError(f"{name} of a camera is not a sane number")
            frame = Cameras(**state["frame"]).to(device)
            world = state["world"] and Similarity(**state["world"])
            unit = float(state["unit"])
            if not all(0 < x < math.inf for x in (unit, world.scale if world else 1)):
                raise ValueError("the scale of its world is no positive number")
            opened = Reconstruction(parts["field"], parts["occupancy"], frame, unit, world,
                                    Cameras(**state["cameras"]), config, state["seconds"], state["seconds"],
                                    state["resumed_from"])
            opened.render(opened.cameras[:1], 1)
            return opened
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            reason = " ".join(str(e).split())[:160]
            raise ValueError(f"{path}: no field that can be opened ({reason})") from None

    @torch.no_grad()
    def render(self, cameras: Cameras, size: int, title: str | None = None, pixel_side: int | None = None) -> Views:
        """What cameras (T,) of the user's world see: pictures of `size` pixels a side, in [0, 1] on black.

        A pixel is the mean of `pixel_side` rays a side of its square (default: `config.picture_side`). `title` shows
        progress.
        """
        cameras = self.turned(cameras)
        side = pixel_side or self.config.picture_side
        unit = self.unit * (1.0 if self.world is None else self.world.scale)
        images = []
        silhouettes = []
        depths = []
        for i in Progress(range(len(cameras)), title):
            # Several rays per pixel are a larger picture, reduced.
            view = volume.render_image(self.field, cameras[i], side * size, side * size, None, self.occupancy)
            images.append(F.avg_pool2d(view.color, side))
            silhouettes.append(F.avg_pool2d(view.opacity, side))
            depths.append(F.avg_pool2d(view.depth, side) * unit)
        return Views(torch.stack(images), torch.stack(silhouettes), torch.stack(depths))

    def turned(self, cameras: Cameras) -> Cameras:
        """Cameras (T,) of the user's world in the object frame."""
        if self.world is not None:
            cameras = self.world.normalized(cameras)
        cameras = cameras.to(self.frame.T)
        return object_frame(cameras, self.frame, self.unit)

    def hull(self, cameras: Cameras, size: int) -> Tensor:
        """From which pixels cameras (T,) of the user's world see the visual hull of the input masks, (T, size, size)
        boolean; wrong only by saying yes.
        """
        return self.occupancy.silhouettes(self.turned(cameras), size)

    def orbit(self, elevation: float | None = None) -> Orbit:
        """Where to look from, all round the object: as far away and as high as the scene's cameras, or at another
        `elevation` (radians).

        The middle of the box around the occupied cells is that of the picture, and what is opaque fills it, whatever
        the photographs show beside the object.
        """
        # The corners of the box in the world, and how far from its middle a picture shows them at most.
        corners = self.in_world(torch.cartesian_prod(*self.occupancy.box.T).cpu().double())
        orbit = orbit_around(self.cameras, corners.mean(0))
        if elevation is not None:
            orbit = orbit._replace(elevation=torch.tensor(elevation).double())
        path = orbit.cameras(8, orbit.rows())
        xy, _ = path.project(corners.expand(len(path), -1, -1))
        orbit = orbit._replace(focal=1 / xy.abs().max().item())

        # Of that box, how much is opaque in a few small pictures.
        coarse = self.render(orbit.cameras(8, orbit.rows()), COARSE, pixel_side=1).silhouettes[:, 0] > 0.5
        seen = coarse.any(0) | coarse.any(0).T
        pixels = seen.any(0).nonzero() + 0.5
        if len(pixels):
            reach = (pixels / COARSE * 2 - 1).abs().max().item() + 1 / COARSE
            orbit = orbit._replace(focal=orbit.focal * TURNTABLE_FILL / reach)
        return orbit

    def mesh(self) -> Mesh:
        """The largest connected part of the surface, in the user's world."""
        surface = extract_mesh(self.field, self.config.mesh_resolution, occupancy=self.occupancy,
                               most_faces=self.config.mesh_faces)
        surface = largest_component(surface)
        normals = surface.normals @ self.frame.R.T
        if self.world is not None:
            normals = normals @ self.world.R.T.to(normals)
        up = upright_axis(self.cameras.to("cpu", torch.float64)).float()
        return surface._replace(vertices=self.in_world(surface.vertices), normals=normals, up=up)

    def in_world(self, points: Tensor) -> Tensor:
        """Points (P, 3) of the object frame in the user's world."""
        points = self.unit * points @ self.frame.R.T.to(points)
        return points if self.world is None else self.world.points(points)


def object_frame(cameras: Cameras, frame: Cameras, unit: float) -> Cameras:
    """Cameras in a world turned to the axes of the camera `frame`, whose origin stays (Sec. 3.2), and whose `unit` is
    given in theirs.
    """
    return relative_to(cameras, frame.unsqueeze(0), move_origin=False).scaled(1 / unit)


def field_unit(cameras: Cameras, config: DistillConfig, model: SparseFusion | None) -> float:
    """The field's unit in that of a scene with cameras (B,): the object is as large in every field.

    A model with the released weights takes CO3D's units as they are.
    """
    if not config.half_side or (model is not None and model.trained_distance is None):
        return 1.0
    return object_half_side(cameras) / config.half_side


def reconstruct(scene: Scene, inputs: list[int], model: SparseFusion | None = None, config: DistillConfig | None = None,
                seed: int = 0, perceptual_loss: Distance | None = None, title: str | None = None,
                checkpoint: Checkpoint | None = None) -> Reconstruction:
    """Fit a field to the views of a scene at positions `inputs`, a model helping with what they do not show (Sec. 3.2).

    Without a `model` the field fits the input views alone. Of the other views only the cameras are used. `config`: by
    default the preset of the model's name, or `plain`. `perceptual_loss`: by default the distance in the VAE
    encoder's features. `title` shows progress. With a `checkpoint` an interrupted run of the same settings resumes
    where it stopped. The scene's tensors and the model's are on one device. Raises `ValueError` where no part of space
    lies in every mask.
    """
    config = (config or default_config(model)).fitted(len(inputs))

    # The scene in the object frame, in the field's unit.
    unit = field_unit(scene.cameras, config, model)
    turned = turn(scene, unit)

    # What an earlier run of these settings has done, if there was one.
    state = None
    if checkpoint is not None:
        settings = reconstruction_settings(scene, inputs, model, config, seed, perceptual_loss)
        state = checkpoint.read(settings)

    # What the EFT sees from the query viewpoints, unless no iteration is left that would use it.
    prior = None
    if model is not None and (state is None or state["completed"] < config.iterations):
        prior = condition_prior(model, turned, inputs, config, seed, perceptual_loss, title)

    # The optimization.
    distillation = Distillation(turned[inputs], config, seed, prior)
    earlier, resumed_from = 0.0, []
    if checkpoint is None:
        distillation.run(title)
    else:
        world = scene.world and scene.world._asdict()
        beside = {"settings": settings, "frame": vars(scene.cameras[0]), "unit": unit, "world": world,
                  "cameras": vars(scene.user_cameras())}
        look = partial(preview, distillation, turned, inputs)
        earlier, resumed_from = checkpoint.run(distillation, state, beside, title, look)

    # From here on nothing is rounded, and graphs and their memory are not needed.
    distillation.field.eval()
    distillation.graphs.forget()
    return Reconstruction(distillation.field, distillation.occupancy, scene.cameras[0], unit, scene.world,
                          scene.user_cameras(), config, distillation.seconds, earlier, resumed_from)


def default_config(model: SparseFusion | None) -> DistillConfig:
    """The preset of the model's name, or `plain`. Raises `ValueError` for a name of none."""
    name = "plain" if model is None else model.preset.name
    if name not in PRESETS:
        raise ValueError(f"{name!r} is no preset of a distillation, so a config must be given")
    return PRESETS[name]


def turn(scene: Scene, unit: float) -> Scene:
    """A scene in its object frame: the axes of its first camera, the world's origin (Sec. 3.2) [released:
    camera_utils.py:116-118; distillation.py:66-76].
    """
    frame = scene.cameras[0]
    return scene.with_cameras(lambda cameras: object_frame(cameras, frame, unit))


def condition_prior(model: SparseFusion, turned: Scene, inputs: list[int], config: DistillConfig, seed: int,
                    perceptual_loss: Distance | None, title: str | None) -> Prior:
    """The model, and what its EFT sees from every query viewpoint."""
    input_views = turned[inputs]
    viewpoints = query_viewpoints(turned.cameras, config, seed)
    possible = hull_maps(input_views.masks, input_views.valid)
    condition = model.condition(config.exposed_alike(input_views), input_views.cameras, viewpoints, turned.cameras,
                                possible, dropout_seed=seed if config.eft_train_mode else None,
                                title=title and f"{title}: EFT")
    return Prior(model, viewpoints, condition, perceptual_loss or model.feature_distance)


def query_viewpoints(cameras: Cameras, config: DistillConfig, seed: int) -> Cameras:
    """The query viewpoints: on the circle through a scene's cameras (B,), and at all of them [released:
    distillation.py:73-76]. (Q,)
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "path"))
    circle = circle_path(cameras.to("cpu"), config.viewpoints, config.jitter, generator)
    return Cameras.cat([circle.to(cameras.T.device), cameras])


# ---------------------------------------------------------------------------------------------- interrupted and resumed

class Checkpoint(NamedTuple):
    """A file from which an interrupted run resumes. It is written about once a minute, at the end, and when the process
    is asked to stop.
    """
    path: Path
    # A run of fewer iterations resumes, too. Then the rates are from there on those of the longer run, and the field is
    # not the one of a long run from the start.
    extend: bool = False
    previews: Path | None = None  # a picture file that gets one rendering more of an unseen view with every checkpoint

    def read(self, wanted: dict) -> dict | None:
        """The state of an earlier run, if there is one. Raises `ValueError` where that run had other settings than
        those `wanted`: its field would be lost.
        """
        if not self.path.exists():
            return None
        state = files.read_tensors(self.path, "field")
        other = differences(state.get("settings", {}), wanted, OUTPUT_SETTINGS, self.extend)
        if other:
            raise ValueError(f"{self.path}: a field of other settings ({other}); choose another --out, or --overwrite")
        completed = state.get("completed")
        if type(completed) is not int or not 0 <= completed <= wanted["config"]["iterations"]:
            raise ValueError(f"{self.path}: not a whole state of a field ({completed!r} iterations); delete it to start"
                             " again")
        return state

    def run(self, distillation: Distillation, state: dict | None, beside: dict, title: str | None,
            look: Callable[[], Tensor]) -> tuple[float, list[int]]:
        """All iterations that are left after an earlier run's `state`, saved with what is `beside` the field.

        Returns the seconds of earlier runs, and the totals of those that were shorter.
        """
        resumed_from = [] if state is None else self.resume(distillation, state)
        earlier = distillation.seconds
        done = distillation.completed
        beside = beside | {"resumed_from": resumed_from}

        def save() -> None:
            """Write the checkpoint, and one preview more."""
            files.save_tensors(distillation.state_dict() | beside, self.path)
            if self.previews is not None:
                add_preview(self.previews, look())

        with uninterruptible():
            try:
                distillation.run(title, save)
            except Interrupted as e:
                # Between two iterations, so the state is one that a rerun resumes from without a trace.
                distillation.check_losses()
                save()
                e.add_note(f"{self.path} has {distillation.completed} of {distillation.config.iterations} iterations")
                raise
            if distillation.completed > done:
                save()
        return earlier, resumed_from

    def resume(self, distillation: Distillation, state: dict) -> list[int]:
        """Load the state of an earlier run. Returns the totals of the shorter runs that came before, if any."""
        try:
            distillation.load_state_dict(state)
            total = state["settings"]["config"]["iterations"]
            resumed_from = [int(x) for x in state["resumed_from"]]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(f"{self.path}: not a whole state of a field ({type(e).__name__}); delete it to start again"
                             ) from None

        print(f"{self.path}: resumed at iteration {distillation.completed}")
        longer = distillation.config.iterations
        if total == longer:
            return resumed_from
        print(f"{self.path}: of a run of {total}; a run of {longer} from the start would come out otherwise")
        return [*resumed_from, total]


@torch.no_grad()
def preview(distillation: Distillation, turned: Scene, inputs: list[int]) -> Tensor:
    """A small rendering (3, S, S) of the first view of a scene in the object frame that was not given, if any."""
    unseen = [view for view in range(len(turned)) if view not in inputs] or inputs
    camera = turned.cameras[unseen[0]]
    return volume.render_image(distillation.field, camera, PREVIEW, PREVIEW, None, distillation.occupancy).color


def reconstruction_settings(scene: Scene, inputs: list[int], model: SparseFusion | None, config: DistillConfig,
                            seed: int, perceptual_loss: Distance | None) -> dict:
    """Everything that decides a reconstruction, as plain data: two runs with equal settings are the same run."""
    # The input views by their content; of the others only the cameras matter.
    views = scene[inputs]
    cameras = scene.cameras
    numbers = [views.images, views.masks, views.valid, cameras.R, cameras.T, cameras.focal, cameras.principal]
    if views.whole is not None:
        numbers += [views.whole.masks, views.whole.valid, views.whole.cameras.focal, views.whole.cameras.principal]

    # A model is known by its file, or by its weights if it has none.
    weights = None
    if model is not None:
        weights = model.fingerprint or files.digest(*model.state_dict().values())
    return {
        "sequence": scene.sequence,
        "inputs": views.names,
        "given": files.digest(*numbers),
        "seed": seed,
        "weights": weights,
        "perceptual_loss": _identity(perceptual_loss),
        "device": views.images.device.type,
        "config": asdict(config),
    }


def _identity(function: Distance | None) -> str | None:
    """What tells a loss from others: a module's class and weights, or a function's name.

    Raises `ValueError` for one without: two lambdas cannot be compared.
    """
    if function is None:
        return None
    if isinstance(function, torch.nn.Module):
        return f"{type(function).__qualname__} {files.digest(*function.state_dict().values())}"
    name = getattr(function, "__qualname__", "<lambda>")
    if "<lambda>" in name:
        raise ValueError("perceptual_loss: a checkpoint needs a module or a named function, to tell it from others")
    return f"{function.__module__}.{name}"
