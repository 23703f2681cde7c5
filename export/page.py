"""`index.html` beside a result: the object to turn, its mesh among the cameras, every method's pictures, all numbers.

One file for any browser: `page.html`, a template with its styles and its script, filled with data. Pictures and arrays
are in it as base64, so it fetches nothing, and its content security policy forbids to.

Shapes: `E` rows of the orbit, `F` azimuths, `S` pixels a side, `V` input views, `T` target views.
"""
from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cameras import Scene, evenly_spaced
from common import files
from common.machine import map_threads
from export.mesh import Mesh
from export.orbit import Orbit
from export.pictures import LABELS, Views, to_image

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "{{data}}"  # in the template
TURNTABLE = 160     # pixels a side of the pictures from all sides
QUALITY = 90        # of 100, of pictures (WebP)
MOST = 40           # inputs, and targets, that are shown: evenly spaced ones
CURVE_POINTS = 200  # of a loss
FRUSTUM = 0.3       # how deep a camera is drawn, as a share of the orbit's radius


def page_data(scene: Scene, inputs: list[int], targets: list[int], pictures: dict[str, Views], orbit: Orbit,
              turntable: Views, mesh: Mesh, losses: dict[str, Tensor]) -> dict:
    """What a page shows beside numbers, as plain data.

    `pictures`: of the targets (T,), by their method. `turntable`: what the orbit's cameras see, (E * F,) row by row.
    `losses`: each (iterations,), -1 where it was not used.
    """
    return {
        "labels": {method: LABELS[method] for method in pictures},
        "orbit": {"focal": orbit.focal, "rows": orbit.rows().tolist()},
        "turntable": _turntable(turntable, len(orbit.rows())),
        "mesh": _mesh(mesh, orbit),
        "inputs": _inputs(scene, inputs, orbit),
        "targets": _targets(scene, targets, pictures),
        "losses": {name: _curve(values) for name, values in losses.items()},
    }


def write_page(path: Path, data: dict, result: dict) -> None:
    """Write the page of `page_data` and of what `metrics.json` holds."""
    # No text in the data can end the element that holds it.
    text = json.dumps(data | {"result": result}, allow_nan=False).replace("<", "\\u003c")
    files.save_bytes(TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text).encode(), path)


def _turntable(views: Views, rows: int) -> dict:
    """All renderings in one picture, a row of it for a row of the orbit; and so all depths, the nearest white."""
    # Colors that are not multiplied by the opacity suit any background.
    opacity = views.silhouettes.cpu()
    color = views.images.cpu() / opacity.clamp(min=1e-3)

    # Depths between the nearest and the farthest of what is opaque.
    depth = views.depths.cpu() / opacity.clamp(min=1e-3)
    opaque = depth[opacity > 0.5]
    near, far = (opaque if len(opaque) else depth).aminmax()
    nearness = 1 - 0.9 * (depth - near) / (far - near).clamp(min=1e-6)

    def sheet(pixels: Tensor) -> str:
        """Pictures (E * F, C, S, S), with their opacity, in E rows."""
        pixels = torch.cat([pixels.expand(-1, 3, -1, -1), opacity], 1).clamp(0, 1).unflatten(0, (rows, -1))
        pixels = pixels.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (E * S, F * S, 4)
        return _picture(Image.fromarray((pixels * 255).round().byte().numpy()))

    return {"frames": len(color) // rows, "size": color.shape[-1], "color": sheet(color), "depth": sheet(nearness)}


def _mesh(mesh: Mesh, orbit: Orbit) -> dict:
    """In the orbit's own axes: vertices in 16 bits a coordinate, of `reach` at most; normals and colors in 8; faces."""
    vertices = orbit.local(mesh.vertices)
    reach = vertices.abs().max().item() if len(vertices) else 1.0
    normals = mesh.normals.cpu().double() @ orbit.axes.T
    return {
        "reach": reach,
        "vertices": _base64((vertices / reach * 32767).round().short()),
        "normals": _base64((normals * 127).round().char()),
        "colors": _base64((mesh.colors.cpu().clamp(0, 1) * 255).round().byte()),
        "faces": _base64(mesh.faces.cpu().int()),
    }


def _inputs(scene: Scene, inputs: list[int], orbit: Orbit) -> list[dict]:
    """Photographs and their cameras: the center, and four corners of what each shows, row by row."""
    chosen = [inputs[i] for i in evenly_spaced(len(inputs), MOST)]
    cameras = scene.user_cameras()[chosen].to("cpu", torch.float64)
    corners = torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]]).double().expand(len(chosen), 4, 2)
    depth = (FRUSTUM * orbit.distance).expand(len(chosen), 4)
    places = torch.cat([cameras.centers()[:, None], cameras.unproject(corners, depth)], 1)  # (V, 5, 3)
    places = orbit.local(places).tolist()
    images = _pictures((scene.whole or scene).images[chosen])
    names = [scene.names[view] for view in chosen]
    return [{"name": name, "image": image, "places": place} for name, image, place in zip(names, images, places)]


def _targets(scene: Scene, targets: list[int], pictures: dict[str, Views]) -> list[dict]:
    """Unseen views: each one's place among all that are measured, its photograph and every method's picture."""
    chosen = evenly_spaced(len(targets), MOST)
    truth = _pictures((scene.whole or scene).images[[targets[i] for i in chosen]])
    shown = [_pictures(views.images[chosen]) for views in pictures.values()]
    return [{"index": index, "truth": photograph, "methods": dict(zip(pictures, images))}
            for index, photograph, *images in zip(chosen, truth, *shown)]


def _curve(values: Tensor) -> list[list[float]]:
    """Mean iterations and mean losses of (iterations,) in equal spans of those where it was used."""
    used = (values >= 0).nonzero().squeeze(-1)
    spans = zip(used.float().chunk(CURVE_POINTS), values[used].chunk(CURVE_POINTS))
    return [[i.mean().item(), span.mean().item()] for i, span in spans]


def _pictures(images: Tensor) -> list[str]:
    """Images (N, 3, S, S) in [0, 1] as addresses."""
    return map_threads(lambda image: _picture(to_image(image)), list(images.cpu()))


def _picture(image: Image.Image) -> str:
    """A picture as an address that contains it."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _base64(numbers: Tensor) -> str:
    """The bytes of a tensor, which are little-endian where torch runs."""
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()
