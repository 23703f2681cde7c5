"""Files of weights as others write them, made by a rule: the released model, Stable Diffusion, Diffusers, LPIPS."""
import functools
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from checkpoints import released
from tests.support import parity

# VGG16's convolutions: their numbers in torchvision, channels in and out.
CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
         17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}


def released_state(part, module):
    """The manifest's names with the shapes that `module` has for them; entries that nothing uses are small."""
    source = released.PARTS[part]
    prefix, wanted = "first_stage_model." * (part == "vae"), module.state_dict()
    state = {}
    for name, shape, _ in parity.manifest(part)["entries"]:
        if any(re.search(p, prefix + name) for p in source.unused):
            state[prefix + name] = parity.weight(name, shape[:1] if shape else [])
        else:
            state[prefix + name] = parity.weight(name, wanted[released.our_name(prefix + name, source.rules)].shape)
    return state


def optimizer_state():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward(), optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])  # its state holds a collections.Counter
    return {"optimizer_state_dict": optimizer.state_dict(), "scheduler_state_dict": scheduler.state_dict(), "epoch": 3}


def foreign_module(marker):
    """A training framework that is there when the file is saved and gone when it is loaded."""
    module = types.ModuleType("foreign_framework")

    class ModelCheckpoint:
        def __init__(self):
            self.best_model_score, self.dirpath = torch.tensor(0.25), Path("logs")

    class Timer(dict):
        pass

    def touch(path):
        Path(path).touch()
        return {}

    class Reduced:
        def __reduce__(self):
            return touch, (str(marker),)

    for x in (ModelCheckpoint, Timer, touch, Reduced):
        x.__module__, x.__qualname__ = module.__name__, x.__name__
        setattr(module, x.__name__, x)
    return module


def write_sd(path, state, **options):
    """A Stable Diffusion checkpoint: VAE, other networks, training state, instances of classes that nobody has here."""
    marker = path.with_suffix(".marker")
    foreign = foreign_module(marker)
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, foreign.__name__, foreign)
        state = {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2), "betas": torch.zeros(3),
            **state,
            "cond_stage_model.transformer.weight": torch.zeros(2).half(), "model_ema.decay": torch.tensor(0.5)}
        callback = {"best": np.float64(0.1), "array": np.arange(3), "which": {1, 2}}
        data = {"epoch": 6, "pytorch-lightning_version": "1.4.2", "state_dict": state,
                "optimizer_states": [optimizer_state()], "callbacks": {foreign.ModelCheckpoint: callback},
                "objects": [foreign.ModelCheckpoint(), foreign.Timer(a=1), foreign.Reduced(), foreign.touch]}
        torch.save(data, path, **options)
    assert not marker.exists()
    return marker


def write_safetensors(path, tensors, metadata=None):
    """Eight bytes with the header's length, the header, the numbers."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, data = {"__metadata__": {"format": "pt"}} if metadata is None else metadata, b""
    for key, x in tensors.items():
        raw = x.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def diffusers_name(key, new):
    """A first-stage key of Stable Diffusion -> the Diffusers library's, before and after it renamed its attention."""
    key = key.removeprefix("first_stage_model.")
    if m := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d)\.(.*)", key):
        side, way, i, rest = m.groups()
        i = int(i) if side == "encoder" else 3 - int(i)
        rest = rest.replace("block.", "resnets.").replace("downsample.", "downsamplers.0.")
        rest = rest.replace("upsample.", "upsamplers.0.")
        key = f"{side}.{way}_blocks.{i}.{rest}"
    key = key.replace("nin_shortcut", "conv_shortcut").replace("mid.block_1", "mid_block.resnets.0").replace(
        "mid.block_2", "mid_block.resnets.1").replace("coder.norm_out", "coder.conv_norm_out")
    if m := re.fullmatch(r"(.*)\.mid\.attn_1\.(\w+)\.(.*)", key):
        older = ("group_norm", "query", "key", "value", "proj_attn")
        newer = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
        names = dict(zip(("norm", "q", "k", "v", "proj_out"), newer if new else older))
        key = f"{m[1]}.mid_block.attentions.0.{names[m[2]]}.{m[3]}"
    return key


def diffusers_state(state, new, matrices, dtype=torch.float32):
    """First-stage state dict of Stable Diffusion -> that of Diffusers, attention as matrices or as 1x1 convolutions."""
    state = {k: x[..., 0, 0] if matrices and ".attn_1." in k and x.ndim == 4 else x for k, x in state.items()}
    return {diffusers_name(k, new): x.to(dtype) for k, x in state.items()}


def lpips_states():
    """Pseudo-random weights in the layout of LPIPS' two public files (the classifier's sizes are not the real ones)."""
    return tuple({key: x.clone() for key, x in state.items()} for state in _draw_lpips_states())


@functools.cache
def _draw_lpips_states():
    g = torch.Generator().manual_seed(5)
    vgg = {}
    for i, (n_in, n_out) in CONVS.items():
        vgg[f"features.{i}.weight"] = torch.randn(n_out, n_in, 3, 3, generator=g) * (2 / (9 * n_in)) ** 0.5
        vgg[f"features.{i}.bias"] = 0.1 * torch.randn(n_out, generator=g)
    for i in (0, 3, 6):
        vgg[f"classifier.{i}.weight"], vgg[f"classifier.{i}.bias"] = torch.zeros(4, 4), torch.zeros(4)
    channels = (64, 128, 256, 512, 512)
    lin = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=g) for i, c in enumerate(channels)}
    return vgg, lin
