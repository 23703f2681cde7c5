"""`index.html` beside a result: the object to turn, its mesh among the cameras, every method's pictures, all numbers.

One file, for any browser: `page.html`, a template with its styles and script, filled with data. Pictures and arrays are
in it as base64, so nothing is loaded from anywhere, and its content security policy forbids to.

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
PLACE = "{{data}}"    # of the data in the template
QUALITY = 90          # of pictures (WebP), of 100
LARGEST = 256         # pixels a side of an input or a target
MOST_INPUTS = 60      # that are shown, evenly spaced
MOST_TARGETS = 24
CURVE_POINTS = 200    # of a loss
FRUSTUM = 0.25        # how deep a camera is drawn, as a share of the orbit's radius


def page_data(scene: Scene, inputs: list[int], targets: list[int], pictures: dict[str, Views], orbit: Orbit,
              turntable: Views, mesh: Mesh, losses: dict[str, Tensor]) -> dict:
    """What a page shows but its numbers, as plain data.

    `turntable`: what the orbit's cameras see, (E * F,) row by row. `losses`: each (iterations,), with NaN where it was
    not used.
    """
    return {
        "labels": {method: LABELS[method] for method in pictures},
        "orbit": {"focal": orbit.focal, "rows": orbit.rows().tolist()},
        "turntable": _turntable(turntable, len(orbit.rows())),
        "mesh": _mesh(mesh, orbit),
        "inputs": _inputs(scene, inputs, orbit),
        "targets": _targets(scene, targets, pictures),
        "losses": {name: _curve(values.cpu()) for name, values in losses.items() if not values.isnan().all()},
    }


def write_page(path: Path, data: dict, result: dict) -> None:
    """Write a page of `page_data` and of what `metrics.json` holds."""
    # No text in the data can end the element that holds it.
    text = json.dumps(data | {"result": result}, allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)
    with files.write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _turntable(views: Views, rows: int) -> dict:
    """All renderings in one picture, and all depths, the nearest white: a row of it is a row of the orbit."""
    # Colors that are not multiplied by the opacity, for any background.
    opacity = views.silhouettes.cpu()
    safe = opacity.clamp(min=1e-3)
    color = (views.images.cpu() / safe).clamp(0, 1)

    # Depths between the nearest and the farthest that are opaque.
    depth = views.depths.cpu() / safe
    seen = depth[opacity > 0.5] if (opacity > 0.5).any() else depth.flatten()
    near, far = seen.min(), seen.max()
    depth = 1 - 0.9 * ((depth - near) / (far - near).clamp(min=1e-6)).clamp(0, 1)

    def sheet(gray_or_color: Tensor) -> str:
        """Pictures (E * F, C, S, S) with their opacity, E of them below each other."""
        pixels = torch.cat([gray_or_color.expand(-1, 3, -1, -1), opacity], 1).unflatten(0, (rows, -1))
        pixels = pixels.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (E S, F S, 4)
        return _picture(Image.fromarray((pixels * 255).round().byte().numpy()))

    return {"frames": len(color) // rows, "size": color.shape[-1], "color": sheet(color), "depth": sheet(depth)}


def _mesh(mesh: Mesh, orbit: Orbit) -> dict:
    """Vertices, in 16 bits a coordinate, normals and colors, in 8, and faces, all in the orbit's own axes."""
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
    """Photographs, and where they were taken from: the center and the corners of what each shows, row by row."""
    chosen = [inputs[i] for i in evenly_spaced(len(inputs), MOST_INPUTS)]
    cameras = scene.user_cameras()[chosen].to("cpu", torch.float64)
    corners = torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]]).double().expand(len(chosen), 4, 2)
    depth = (FRUSTUM * orbit.distance).expand(len(chosen), 4)
    places = torch.cat([cameras.centers()[:, None], cameras.unproject(corners, depth)], 1)  # (V, 5, 3)
    places = orbit.local(places).float().tolist()
    images = _pictures((scene.whole or scene).images[chosen])
    return [{"name": scene.names[view], "image": image, "places": place}
            for view, image, place in zip(chosen, images, places)]


def _targets(scene: Scene, targets: list[int], pictures: dict[str, Views]) -> list[dict]:
    """Unseen views: the photograph's picture and every method's. `index` is the view's place in the numbers."""
    chosen = evenly_spaced(len(targets), MOST_TARGETS)
    truth = _pictures((scene.whole or scene).images[[targets[i] for i in chosen]])
    shown = {method: _pictures(views.images[chosen]) for method, views in pictures.items()}
    return [{"index": i, "truth": truth[n], "methods": {method: images[n] for method, images in shown.items()}}
            for n, i in enumerate(chosen)]


def _curve(values: Tensor) -> list[list[float]]:
    """Iterations and means of a loss (iterations,) over equal spans of them, without those where it was not used."""
    spans = torch.arange(len(values)).float().chunk(CURVE_POINTS)
    points = []
    for middle, span in zip((x.mean().item() for x in spans), values.float().chunk(CURVE_POINTS)):
        mean = span.nanmean().item()
        if mean == mean:
            points.append([middle, mean])
    return points


def _pictures(images: Tensor) -> list[str]:
    """Images (N, 3, S, S) in [0, 1] as addresses."""
    def reduced(x: Tensor) -> str:
        """One of them, at most `LARGEST` pixels a side."""
        image = to_image(x)
        image.thumbnail((LARGEST, LARGEST))
        return _picture(image)

    return map_threads(reduced, list(images.cpu()))


def _picture(image: Image.Image) -> str:
    """A picture as an address that contains it."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _base64(numbers: Tensor) -> str:
    """The bytes of a tensor, which are little-endian on every machine that torch runs on."""
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()
