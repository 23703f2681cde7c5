"""The released files -> one weights file of this program. A command:

    python -m checkpoints.convert --eft F --vldm F --vae F --out F
"""
from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints.released import load_part
from common import cli
from presets import MODELS
from sparsefusion import SparseFusion, blank, ready, save


def from_released(eft_file: Path, vldm_file: Path, vae_file: Path, device: str = "cpu") -> SparseFusion:
    """The released model: EFT and VLDM checkpoints, and the VAE of a Stable Diffusion v1 file, of its own file, or of
    Diffusers.

    Prints the numbers of parameters. Raises `ValueError` with one line for a file that is not exactly that; runs
    nothing in it.
    """
    # Three files of three authors, each matched key by key.
    model = blank(MODELS["paper"], device)
    load_part(model.eft, "eft", eft_file)
    load_part(model.vldm, "vldm", vldm_file)
    load_part(model.vae, "vae", vae_file)
    return ready(model, device)


def convert(args: argparse.Namespace) -> None:
    """Read, match, write."""
    model = from_released(args.eft, args.vldm, args.vae)
    trained_on = [{"what": "prior", "category": args.category}] if args.category else []
    save(model, args.out, half=args.half, trained_on=trained_on)
    size = args.out.stat().st_size / 1e9
    print(f"{args.out}: {size:.2f} GB in {'half' if args.half else 'full'} precision, for --weights")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(prog="python -m checkpoints.convert", description=__doc__.splitlines()[0],
                   epilog="Nothing in the files is run. `python distill.py --weights F` uses the result.")
    p.add_argument("--eft", type=Path, required=True, metavar="F", help="the released EFT checkpoint of a category")
    p.add_argument("--vldm", type=Path, required=True, metavar="F",
                   help="the released VLDM checkpoint of the same category")
    p.add_argument("--vae", type=Path, required=True, metavar="F",
                   help="Stable Diffusion v1, or its VAE alone: .ckpt, .safetensors or Diffusers' .bin")
    p.add_argument("--out", type=Path, required=True, metavar="F", help="weights file to write")
    p.add_argument("--category", metavar="C", help="what the prior was trained on, so that other data get a warning")
    p.add_argument("--half", action="store_true", help="half precision: 1 GB instead of 2, and rounded")
    return p


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(convert, parser().parse_args(argv))


if __name__ == "__main__":
    main()
