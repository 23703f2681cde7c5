"""The flags that `distill.py` and `evaluate.py` share, and what they say.
"""
from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import sparsefusion
from common import cli
from datasets.protocol import PROTOCOLS
from distillation import DistillConfig
from evaluation.instance import Instance
from evaluation.sources import Source
from presets import PRESETS, RELEASED

SAMPLE = sparsefusion.ROOT / "sample" / "co3d"
SHIPPED_FEATURE_NET = sparsefusion.ROOT / "sample" / "perceptual.pt"


def add_instance_flags(p: argparse.ArgumentParser, targets: int) -> None:
    """The flags that `distill.py` and `evaluate.py` share. `targets` is the default of --targets."""
    # What is given.
    p.add_argument("--root", type=Path, default=SAMPLE, help="CO3Dv2 folder (default: the shipped synthetic sample)")
    p.add_argument("--views", type=cli.views, default=2, metavar="N", help="random input views; 0 for all (default: 2)")
    p.add_argument("--protocol", choices=PROTOCOLS, default="paper",
                   help="paper: fewview_dev/test, 32 evenly spaced frames of a sequence; all: every frame there is")
    p.add_argument("--weights", type=Path, default=sparsefusion.SHIPPED,
                   help="the prior (default: the shipped nano weights)")
    p.add_argument("--seed", type=cli.seed, default=0,
                   help="of input views, noise and initial weights, plus the sequence's place in its list (default: 0)")

    # The numbers of the distillation.
    p.add_argument("--preset", choices=PRESETS,
                   help="numbers to start from (default: those of the weights; plain without a prior)")
    p.add_argument("--iterations", type=cli.count, metavar="N", help="default: the preset's")
    p.add_argument("--released", action="store_true", help=f"as the released code does it: --set {' '.join(RELEASED)}")
    cli.add_settings(p, DistillConfig)
    cli.add_device(p)

    # How it is measured.
    p.add_argument("--targets", type=cli.views, default=targets, metavar="N",
                   help=f"held-out views to compare, evenly spaced; 0 for all (default: {targets})")
    p.add_argument("--feature-net", type=Path, default=SHIPPED_FEATURE_NET, metavar="F",
                   help="network of the perceptual metric")
    p.add_argument("--lpips", type=Path, nargs=2, metavar=("VGG16", "LINEAR"),
                   help="vgg16-397923af.pth and LPIPS' vgg.pth: LPIPS as loss, and as metric instead of --feature-net")
    p.add_argument("--overwrite", action="store_true", help="replace results of other settings in --out")


def config_from_flags(args: argparse.Namespace, no_prior: bool = False) -> DistillConfig:
    """Every number of the distillation: those of the weights' preset or another's, then what single settings change."""
    model = None if no_prior else sparsefusion.read_preset(args.weights)
    if model is not None and model.name not in PRESETS:
        raise ValueError(f"{args.weights}: its preset {model.name!r} is none of {', '.join(PRESETS)}")
    config = PRESETS[args.preset or ("plain" if model is None else model.name)]
    if args.iterations:
        config = config.with_iterations(args.iterations)

    # How to sample a model is the model's own.
    if model is not None:
        config = replace(config, sampler=PRESETS[model.name].sampler)

    # What `--released` stands for comes first, so that --set has the last word.
    settings = list(args.settings)
    if args.released:
        print(f"--released stands for --set {' '.join(RELEASED)}")
        settings = [*RELEASED, *settings]
    config = cli.apply_settings(config, settings, fixed=model)

    # A number that is set is not added to.
    if any(setting.partition("=")[0] == "iterations" for setting in settings):
        config = replace(config, iterations_per_view=0)
    return config


def trained_categories(weights: Path) -> list[str]:
    """What a prior knows, as far as its file says."""
    return sorted({x["category"] for x in sparsefusion.read_trained_on(weights) if x.get("what") == "prior"})


def note_new_categories(weights: Path, categories: list[str]) -> None:
    """One line on data of categories that a prior has never seen."""
    known = trained_categories(weights)
    new = sorted(set(categories) - set(known))
    old = ", ".join(known)
    if known and new:
        print(f"note: the prior in {weights.name} was trained on {old}; {', '.join(new)}: new to it, so it will see "
              f"{old} in them (--no-prior fits the photographs alone)")


def instance_from_flags(args: argparse.Namespace, source: Source, config: DistillConfig,
                        input_frames: tuple[str, ...] = (), no_prior: bool = False) -> Instance:
    """What the shared flags say about one source."""
    # The sequences of a list have different inputs and different noise.
    seed = args.seed + source.index
    lpips = tuple(args.lpips) if args.lpips else None
    return Instance(
        source=source,
        config=config,
        weights=None if no_prior else args.weights,
        views=args.views,
        input_frames=input_frames,
        targets=args.targets,
        seed=seed,
        feature_net=args.feature_net,
        lpips=lpips,
        device=args.device,
    )
