"""The released weights, matched key by key: which file holds what, and what its layers are called here.

A table of rules turns the released names into ours. What is missing, left over or of another shape ends in
one line that names it; nothing is dropped silently.

What differs from the released code: there only the VLDM's file must fit; of the EFT's and the VAE's it takes what it
knows, whatever else is there or missing [released: load_model.py:37-40, 94, 153]. Here every file must fit.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from checkpoints.reading import read
from metrics import VGG16LPIPS

FIRST_LAYER = re.compile(r"(.*?)encoder\.conv_in\.weight$")  # of the VAE, and what stands before its names
TRAINING = ("loss.", "model_ema.")                            # what a VAE was trained with

Rules = list[tuple[str, str]]  # patterns and replacements of `re.sub`, in order


# ---------------------------------------------------------------------------------------------- names and shapes

class Part(NamedTuple):
    """A released file that has a part of the model."""
    entry: str | None             # where in the file the state dict is; None: the file is the state dict
    rules: Rules                  # from its names to ours
    unused: tuple[str, ...] = ()  # patterns of names whose weights nothing uses, here or there


def our_name(key: str, rules: Rules) -> str:
    """Our name of a released key."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def describe(value) -> str:
    """A weight's shape, and its type unless floating point."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    shape = str(tuple(value.shape))
    return shape if value.is_floating_point() else f"{shape} {value.dtype}"


def fits(value, wanted: Tensor) -> bool:
    """Whether shape and type are right. A matrix may stand for a 1x1 convolution: Diffusers has linear layers there."""
    if wanted.shape[2:] == (1, 1) and describe(value) == describe(wanted[..., 0, 0]):
        return True
    return describe(value) == describe(wanted)


def fill(module: nn.Module, state: dict, part: Part, path: str | Path) -> dict[str, Tensor]:
    """Copy the released `state` of the file `path` into a module; returns what of it is known to be unused.

    Raises `ValueError` with the first key that does not fit: a released one, or ours for one that is missing.
    """
    wanted = module.state_dict()
    found = {}
    unused = {}

    # Every released key is unused, or one of ours.
    for key, value in state.items():
        name = our_name(key, part.rules)
        if isinstance(value, Tensor) and any(re.search(pattern, key) for pattern in part.unused):
            unused[key] = value
            continue
        if name not in wanted or name in found:
            raise ValueError(f"{path}: key {key!r}: expected no such key, found {describe(value)}")
        if not fits(value, wanted[name]) or value.is_sparse:
            raise ValueError(f"{path}: key {key!r}: expected {describe(wanted[name])}, found {describe(value)}")
        found[name] = value.reshape(wanted[name].shape)

    # Every weight of ours must be among them.
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{path}: our {missing[0]!r}: expected {describe(wanted[missing[0]])}, found no key for it "
                         f"({len(missing)} missing)")
    module.load_state_dict(found)
    return unused


# ---------------------------------------------------------------------------------------------- files to networks

def read_part(part: str, path: str | Path) -> tuple[dict, Part, list[str]]:
    """What the released file of a `part` ("eft", "vldm" or "vae") has of it, how it is named there, and what stands
    beside it.

    The VAE is in a Stable Diffusion checkpoint, or alone in a file, in the names of Stable Diffusion or of Diffusers.
    Raises `FileNotFoundError` or `ValueError`.
    """
    source = PARTS[part]
    state, beside = read(path, source.entry)

    # The VAE may be one of several networks, beside what it was trained with, and be named in two ways.
    if part == "vae":
        prefixes = {match[1] for match in map(FIRST_LAYER.match, state) if match}
        prefix = min(prefixes - {""}, default="")
        own = {key: x for key, x in state.items() if key.startswith(prefix) and not key.startswith(TRAINING)}
        if len(own) < len(state):
            beside.append(f"{len(state) - len(own):,} keys of other networks")
        state = own
        if not any(".mid.block_1." in key for key in state):
            source = PARTS["diffusers"]
    return state, source, beside


def load_part(module: nn.Module, part: str, path: str | Path) -> None:
    """Fill a part of a model from its released file; prints what the file has. Raises as `read_part` and `fill`."""
    state, source, beside = read_part(part, path)
    unused = fill(module, state, source, path)

    # Say what was used, and what was not.
    report = f"{path}: {part.upper()} with {count_parameters(state):,} parameters"
    if unused:
        report += f", of them {count_parameters(unused):,} known to be unused"
    if beside:
        report += f"; left alone: {', '.join(beside)}"
    print(report)


def count_parameters(state: dict[str, Tensor]) -> int:
    """How many numbers of a state dict are parameters, not statistics of batch norms."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(x.numel() for key, x in state.items() if not key.endswith(statistics))


def load_lpips(vgg_file: str | Path, lpips_file: str | Path) -> VGG16LPIPS:
    """LPIPS, from torchvision's VGG16 (`vgg16-397923af.pth`) and the LPIPS package's channel weights (`vgg.pth`).

    Raises `FileNotFoundError` or `ValueError` with one line.
    """
    lpips = VGG16LPIPS()

    # Either file has one part of the network, which keeps its name.
    state, _ = read(vgg_file, PARTS["vgg16"].entry)
    fill(nn.ModuleDict({"features": lpips.features}), state, PARTS["vgg16"], vgg_file)
    state, _ = read(lpips_file, PARTS["lpips"].entry)
    fill(nn.ModuleDict({"channel_weights": lpips.channel_weights}), state, PARTS["lpips"], lpips_file)

    # With a negative weight, it would be no distance.
    for key, weight in state.items():
        if weight.min() < 0:
            raise ValueError(f"{lpips_file}: key {key!r} has negative weights, LPIPS' are non-negative")
    return lpips


# ---------------------------------------------------------------------------------------------- the tables of names

def parse_rules(table: str) -> Rules:
    """The rules of a table: a piece of a released name, an arrow, what stands there in ours; `#` is a digit."""
    words = table.replace("->", "").split()
    patterns = [re.escape(word).replace(r"\#", r"(\d)") for word in words[::2]]
    replacements = [word.replace("#", r"\1") for word in words[1::2]]
    return list(zip(patterns, replacements, strict=True))


# The attributes of the released modules [released: eft.py:99-140].
EFT_RULES = parse_rules("""
    encoder_model.  -> trunk.            t1.pre.0.  -> visual.input.      t1.encoder.layers.  -> visual.encoder.
    t2_attn.        -> depth_logit.      t2.pre.0.  -> epipolar.input.    t2.encoder.layers.  -> epipolar.encoder.
    t3_attn.        -> view_logit.       t3.pre.0.  -> views.input.       t3.encoder.layers.  -> views.encoder.
    color_layer.0.  -> color.
""")

# The same of the UNet [released: imagen_pytorch.py:1160-1386; vldm.py:156-173].
VLDM_RULES = parse_rules("""
    unets.0.                    -> unet.                  .init_conv.convs.   -> .init_convs.
    .to_time_hiddens.0.weights  -> .time_frequencies      .to_time_hiddens.1. -> .time_hidden.
    .to_time_cond.0.            -> .time_embed.           .to_time_tokens.0.  -> .time_tokens.
    .norm_cond.                 -> .token_norm.           .final_res_block.   -> .final_block.
    .downs.#.1.                 -> .down.#.blocks.0.      .ups.#.0.           -> .up.#.blocks.0.
    .downs.#.2.0.               -> .down.#.blocks.1.      .ups.#.1.0.         -> .up.#.blocks.1.
    .downs.#.2.1.               -> .down.#.blocks.2.      .ups.#.1.1.         -> .up.#.blocks.2.
    .downs.#.3.                 -> .down.#.attention.     .ups.#.2.           -> .up.#.attention.
    .downs.#.4.                 -> .down.#.resize.        .ups.#.3.net.       -> .up.#.resize.
    .resize.fns.0.              -> .resize.conv3.         .mid_block#.        -> .mid#.
    .resize.fns.1.              -> .resize.conv1.         .mid_attn.fn.fn.    -> .mid_attention.
    .block#.groupnorm.          -> .norm#.                .block#.project.    -> .conv#.
    .time_mlp.1.                -> .time.                 .cross_attn.fn.     -> .cross_attention.
    .gca.to_k.                  -> .gate.key.             .gca.net.           -> .gate.net.
    .res_conv.                  -> .shortcut.             .layers.0.0.fn.     -> .attention.
    .layers.0.1.                -> .feed_forward.         .to_context.        -> .context.
    .to_q.                      -> .q.                    .to_out.0.          -> .out.
    .to_kv.                     -> .kv.                   .to_out.1.          -> .norm_out.
""")

# What stands before the VAE's names among other networks.
BEFORE_VAE = (r"^.*?\b(?=((en|de)coder|(post_)?quant_conv)\.)", "")

# Stable Diffusion v1 [released: load_model.py:142-151]; it counts the decoder's stages from the finest.
VAE_RULES = parse_rules("""
    encoder.down.#.block.       -> encoder.levels.#.    encoder.down.#.downsample.          -> encoder.levels.#.2.
    decoder.up.0.block.         -> decoder.levels.3.    decoder.up.0.upsample.conv.         -> decoder.levels.3.3.1.
    decoder.up.1.block.         -> decoder.levels.2.    decoder.up.1.upsample.conv.         -> decoder.levels.2.3.1.
    decoder.up.2.block.         -> decoder.levels.1.    decoder.up.2.upsample.conv.         -> decoder.levels.1.3.1.
    decoder.up.3.block.         -> decoder.levels.0.    decoder.up.3.upsample.conv.         -> decoder.levels.0.3.1.
    .mid.block_1.               -> .mid.0.              .nin_shortcut.                      -> .shortcut.
    .mid.attn_1.                -> .mid.1.              .proj_out.                          -> .out.
    .mid.block_2.               -> .mid.2.
""")

# The same network in the Diffusers library, whose attention has an older and a newer set of names.
DIFFUSERS_RULES = parse_rules("""
    encoder.down_blocks.#.downsamplers.0.   -> encoder.levels.#.2.      .down_blocks.#.resnets.  -> .levels.#.
    decoder.up_blocks.#.upsamplers.0.conv.  -> decoder.levels.#.3.1.    .up_blocks.#.resnets.    -> .levels.#.
    .mid_block.resnets.0.                   -> .mid.0.                  .conv_norm_out.          -> .norm_out.
    .mid_block.attentions.0.                -> .mid.1.                  .group_norm.             -> .norm.
    .mid_block.resnets.1.                   -> .mid.2.                  .conv_shortcut.          -> .shortcut.
    .query.  -> .q.         .key.   -> .k.         .value.  -> .v.         .proj_attn.  -> .out.
    .to_q.   -> .q.         .to_k.  -> .k.         .to_v.   -> .v.         .to_out.0.   -> .out.
""")

# The files, and where in them the weights are [released: train.py:466-480; load_model.py:38, 94, 142-151]. Of no use
# are the end of the ResNet [released: eft.py:96-106, 175-193], what conditioned the UNet on text
# [released: vldm.py:165-171; imagen_pytorch.py:1236, 1392-1416], and the layers with which VGG16 names what it sees.
PARTS = {
    "eft": Part("model_state_dict", EFT_RULES, unused=(r"^encoder_model\.layer4\.", r"^encoder_model\.fc\.")),
    "vldm": Part("model_state_dict", VLDM_RULES, unused=(r"^unets\.0\.null_conditional_(embed|hidden)$",)),
    "vae": Part("state_dict", [BEFORE_VAE, *VAE_RULES]),
    "diffusers": Part("state_dict", [BEFORE_VAE, *DIFFUSERS_RULES]),
    "vgg16": Part(None, rules=[], unused=(r"^classifier\.\d+\.(weight|bias)$",)),
    "lpips": Part(None, parse_rules("lin#.model.1.weight -> channel_weights.#")),
}
