"""How well an autoencoder brings pictures back, which limits every sample. A command:

    python -m experiments.autoencoder --weights vae.pt --root DIR --category toys
    python -m experiments.autoencoder --weights vae.pt --capture DIR

prints the mean over pictures, on black, of the PSNR of a picture that was encoded and decoded.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sparsefusion
from common import cli
from metrics import psnr
from training.packed import load_packed

AT_ONCE = 32  # pictures


@torch.no_grad()
def command(args: argparse.Namespace) -> None:
    """Print one number for each file of weights."""
    for weights in args.weights:
        model = sparsefusion.load(weights, args.device, stage="vae")
        data = load_packed(args.root, args.category, args.frames, model.preset.image_size, captures=args.capture)
        images = torch.cat([pixels[:, :3] for pixels in data.pixels]) / 255
        values = []
        for part in images.split(AT_ONCE):
            again = model.decode(model.vae.encode(part.to(args.device))).cpu()
            values.append(psnr(again, part))
        print(f"{weights}: {torch.cat(values).mean():.2f} dB, {len(images)} pictures")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    p = cli.Parser(__doc__)
    p.add_argument("--weights", type=Path, nargs="+", required=True, metavar="F")
    p.add_argument("--root", type=Path, nargs="+", default=[], metavar="DIR", help="CO3Dv2 folders")
    p.add_argument("--category", nargs="+", default=["toys"], metavar="C", help="categories in them (default: toys)")
    p.add_argument("--capture", type=Path, nargs="+", default=[], metavar="DIR", help="folders of own photographs")
    p.add_argument("--frames", type=cli.count, default=16, metavar="N", help="most frames of each (default: 16)")
    cli.add_device(p)
    cli.run(command, p.parse_args(argv))


if __name__ == "__main__":
    main()
