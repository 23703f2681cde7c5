"""The released files -> one weights file of this program. Nothing in them is run.

    python -m checkpoints.convert --eft eft.pt --vldm vldm.pt --vae sd-v1-4.ckpt --category hydrant --out hydrant.pt
    python -m checkpoints.convert --vae sd-v1-4.ckpt --out vae.pt     # a prior to train: `train.py prior --vae vae.pt`
    python -m checkpoints.convert --eft eft.pt     # without --out: what a file, or several, hold
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from cameras import Cameras, look_at
from checkpoints.released import describe, load_part, our_name, read_part
from common import cli, files
from common.machine import stream_seed
from presets import MODELS
from sparsefusion import SparseFusion, blank, ready, save


def from_released(eft_file: Path | None, vldm_file: Path | None, vae_file: Path, device: str = "cpu") -> SparseFusion:
    """The released model: EFT and VLDM checkpoints, and the VAE of a Stable Diffusion v1 file, of its own file, or of
    Diffusers. Without the first two, an untrained EFT and UNet on that VAE.

    Prints the numbers of parameters. Raises `ValueError` with one line for a file that is not exactly that; runs
    nothing in it.
    """
    # Three files of three authors, each matched key by key; what has none is random, the same every time.
    torch.manual_seed(stream_seed(0, "untrained weights"))
    model = blank(MODELS["paper"], device) if eft_file else SparseFusion(MODELS["paper"])
    for part, file in {"eft": eft_file, "vldm": vldm_file, "vae": vae_file}.items():
        if file:
            load_part(getattr(model, part), part, file)
    return ready(model, device)


def list_file(part: str, path: Path) -> None:
    """Print every key that a released file has of a part ("eft", "vldm" or "vae"), its shape and our name for it, and
    what one forward pass gives, so that reports from different machines can be compared.

    Raises `ValueError` for a file that does not fit, but not before all of its keys are printed.
    """
    # Every key.
    model = blank(MODELS["paper"])
    module = getattr(model, part)
    wanted = module.state_dict()
    state, source, _ = read_part(part, path)
    for key, value in state.items():
        name = our_name(key, source.rules)
        print(f"{ascii(key)[1:-1]}  {describe(value)}  {f'-> {part}.{name}' if name in wanted else 'not used'}")

    # All numbers that are used, and what comes of them.
    load_part(module, part, path)
    with torch.no_grad():
        out = forward_pass(ready(model, "cpu"), part)
    print(f"{path}: weights {files.digest(*module.state_dict().values())}; a forward pass: mean {out.mean():.4g}, "
          f"deviation {out.std():.4g}")


def forward_pass(model: SparseFusion, part: str) -> Tensor:
    """What a part of a model makes of waves, which are the same on every machine: features, noise or latents."""
    def wave(*shape: int) -> Tensor:
        """Numbers in [0, 1] of a shape."""
        return torch.linspace(0, 99, torch.Size(shape).numel()).sin().reshape(shape) / 2 + 0.5

    preset = model.preset
    images = wave(2, 3, preset.image_size, preset.image_size)
    if part == "vae":
        return model.vae.encode(images)
    if part == "vldm":
        latent = wave(1, preset.vae.channels, preset.latent_size, preset.latent_size)
        return model.vldm.unet(latent, torch.zeros(1), wave(1, preset.eft.width, preset.map_size, preset.map_size))

    # Two inputs and a query view, ten units from the origin.
    R, T = look_at(torch.tensor([[0, 0, -10.0], [6, 0, -8], [-6, 0, -8]]), torch.zeros(3), torch.tensor([0, 1.0, 0]))
    cameras = Cameras(R, T, torch.full((3, 2), 2.0), torch.zeros(3, 2))
    return model.condition(images, cameras[:2], cameras[2:], cameras).features


def convert(args: argparse.Namespace) -> None:
    """Read, match, write; without --out, list."""
    parts = {"eft": args.eft, "vldm": args.vldm, "vae": args.vae}
    alone = parts == {"eft": None, "vldm": None, "vae": args.vae}
    if not any(parts.values()) or args.out and not alone and not all(parts.values()):
        raise ValueError("--eft, --vldm, --vae and --out are needed, or --vae and --out for a prior to train; without "
                         "--out any of the three is listed")
    if args.out is None:
        for part in filter(parts.get, parts):
            list_file(part, parts[part])
        return
    files.require_writable(args.out)
    model = from_released(args.eft, args.vldm, args.vae)
    trained_on = [{"what": "prior", "category": args.category}] if args.category and not alone else []
    save(model, args.out, half=args.half, stage="vae" if alone else "prior", trained_on=trained_on)
    size = args.out.stat().st_size / 1e9
    print(f"{args.out}: {size:.2f} GB in {'half' if args.half else 'full'} precision")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(__doc__, prog="python -m checkpoints.convert")
    p.add_argument("--eft", type=Path, metavar="F", help="the released EFT checkpoint of a category")
    p.add_argument("--vldm", type=Path, metavar="F",
                   help="the released VLDM checkpoint of the same category")
    p.add_argument("--vae", type=Path, metavar="F",
                   help="Stable Diffusion v1, or its VAE alone: .ckpt, .safetensors or Diffusers' .bin")
    p.add_argument("--out", type=Path, metavar="F",
                   help="weights file to write; without it the keys of the files are listed, and what a pass gives")
    p.add_argument("--category", metavar="C", help="what the prior was trained on, so that other data get a warning")
    p.add_argument("--half", action="store_true", help="half precision: 1 GB instead of 2, and rounded")
    return p


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    cli.run(convert, parser().parse_args(argv))


if __name__ == "__main__":
    main()
