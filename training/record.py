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

from common import files


def save_log(lines: list[dict], folder: Path) -> None:
    """Write the lines, each with a `step` and, by their names, `losses`; and draw these."""
    files.save_bytes("".join(json.dumps(line) + "\n" for line in lines).encode(), folder / "log.jsonl")
    files.save_bytes(draw_losses(lines).encode(), folder / "losses.svg")


def check_log(lines: list[dict]) -> list[dict]:
    """The lines of a log as they are. Raises nearly anything where they cannot be written and drawn."""
    if lines:
        json.dumps([dict(line) for line in lines], allow_nan=False)
        draw_losses(lines)
    return list(lines)


def draw_losses(lines: list[dict]) -> str:
    """The losses of some lines over their steps, on a logarithmic scale, as an SVG picture."""
    # The scale goes from the least of all losses to the largest.
    end = lines[-1]["step"]
    low, high = (math.log(f(x for line in lines for x in line["losses"].values()) + 1e-9) for f in (min, max))
    drawing = (f'<path d="M45 10V180H395" stroke="#999" fill="none"/>'
               f'<text x="395" y="194" text-anchor="end">{end} steps</text>'
               f'<text x="2" y="18">{math.exp(high):.4f}</text><text x="2" y="180">{math.exp(low):.4f}</text>')

    # The curves, with their last values.
    for i, (name, last) in enumerate(lines[-1]["losses"].items()):
        points = ""
        for line in lines:
            height = (math.log(line["losses"][name] + 1e-9) - low) / max(high - low, 1e-9)
            points += f"{45 + 350 * line['step'] / end:.1f},{180 - 170 * height:.1f} "
        color = f"hsl({210 + 140 * i}, 70%, 45%)"
        drawing += (f'<polyline points="{points}" stroke="{color}" fill="none"/>'
                    f'<text x="{45 + 170 * (i % 2)}" y="{210 + 14 * (i // 2)}" fill="{color}">{name} {last:.4f}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 250" font-size="11" font-family="sans-serif" '
            f'style="background: white">{drawing}</svg>\n')
