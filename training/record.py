"""What a training shows of itself while it runs, in the folder `<out>.run` beside its weights:

    log.jsonl     a line every hundred steps: losses, those of held-out sequences, speed, memory, time left
    losses.svg    the same losses, drawn
    00001500.jpg  what the averaged weights make of held-out sequences, after so many steps

The lines are in the training's state, too, so a resumed one repeats none.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

from cameras import evenly_spaced
from common import files

POINTS = 300             # of a curve, at most
WIDTH, HEIGHT = 340, 90  # of a loss's panel, in units of the drawing
LEFT, GAP = 50, 45       # left of a panel, and from one to the next
KINDS = {"losses": ("trained on", "#3b8de0"), "held_out": ("held out", "#e07b00")}  # of a line: what it is, its color


def save_log(lines: list[dict], folder: Path) -> None:
    """Write the lines, each with a `step` and by their names the `losses` and those of `held_out` sequences, if any;
    and draw them.
    """
    files.save_text("".join(json.dumps(line) + "\n" for line in lines), folder / "log.jsonl")
    files.save_text(draw_losses([lines[i] for i in evenly_spaced(len(lines), POINTS)]), folder / "losses.svg")


def draw_losses(lines: list[dict]) -> str:
    """The losses of some lines over their steps, each on a logarithmic scale of its own: an SVG picture."""
    panels = [_panel(lines, name, 20 + i * (HEIGHT + GAP)) for i, name in enumerate(lines[-1]["losses"])]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {len(panels) * (HEIGHT + GAP)}" '
            f'font-size="11" font-family="sans-serif" style="background: white">{"".join(panels)}</svg>\n')


def _panel(lines: list[dict], name: str, top: int) -> str:
    """The drawing of one loss, from `top` on."""
    # The scale goes from the least value of all curves to the largest.
    curves = {kind: [(line["step"], max(line[kind][name], 1e-9)) for line in lines if line[kind]] for kind in KINDS}
    values = [math.log(y) for curve in curves.values() for _, y in curve]
    low, high = min(values), max(values)
    end = lines[-1]["step"]
    drawing = (f'<text x="{LEFT}" y="{top - 6}">{name}</text>'
               f'<path d="M{LEFT} {top}v{HEIGHT}h{WIDTH}" stroke="#999" fill="none"/>'
               f'<text x="{LEFT - 4}" y="{top + 8}" text-anchor="end">{math.exp(high):.3g}</text>'
               f'<text x="{LEFT - 4}" y="{top + HEIGHT}" text-anchor="end">{math.exp(low):.3g}</text>'
               f'<text x="{LEFT + WIDTH}" y="{top + HEIGHT + 14}" text-anchor="end">{end} steps</text>')

    # The curves, with their last values.
    for i, (kind, curve) in enumerate((kind, curve) for kind, curve in curves.items() if curve):
        label, color = KINDS[kind]
        heights = [top + HEIGHT * (high - math.log(y)) / max(high - low, 1e-9) for _, y in curve]
        points = " ".join(f"{LEFT + WIDTH * x / end:.1f},{y:.1f}" for (x, _), y in zip(curve, heights))
        drawing += (f'<polyline points="{points}" stroke="{color}" fill="none"/>'
                    f'<text x="{LEFT + 90 + 130 * i}" y="{top - 6}" fill="{color}">{label} {curve[-1][1]:.4f}</text>')
    return drawing
