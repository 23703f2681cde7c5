"""The UNet against the released code's numbers, and what must hold for any weights."""
import re
from dataclasses import replace

import pytest
import torch

import unet
from checkpoints import released
from gpu import groupnorm
from gpu.graphs import half_copy
from tests.support import parity
from unet import UNet, UNetConfig
from vldm import VLDM, cosine_log_snr


def released_unet(name):
    """A UNet with the rule-made weights of `manifest_<name>.json`, held once in memory."""
    with torch.device("meta"):
        model = UNet(UNetConfig(**parity.unet_settings(name)))
    weights = parity.rename(parity.weights(name), released.PARTS["vldm"])
    model.load_state_dict({key.removeprefix("unet."): value for key, value in weights.items()}, assign=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    return released_unet("unet_small")


# --- released numbers ---

# released sub-module -> ours, and whether its output or our module's input is the same tensor
TAPS = {"to_time_hiddens": ("time_embed", "in"), "to_time_cond": ("time_embed", "out"),
        "norm_cond": ("token_norm", "out"), "mid_block1": ("mid1", "out"), "mid_attn": ("mid2", "in"),
        "mid_block2": ("mid2", "out"), "final_res_block": ("final_block", "out"),
        r"downs\.(\d)\.3": (r"down.\1.attention", "out"), r"downs\.(\d)\.4": (r"down.\1.resize", "out"),
        r"ups\.(\d)\.2": (r"up.\1.resize", "in"), r"ups\.(\d)\.3": (r"up.\1.resize", "out")}


def test_parity_taps(small):
    f, seen = parity.load("unet_small"), {}
    hooks = [m.register_forward_hook(lambda m, args, out, n=n: seen.update({(n, "in"): args[0], (n, "out"): out}))
             for n, m in small.named_modules() if n]
    small(f["in_x"], f["mid_log_snr"], f["in_cond"])
    for hook in hooks:
        hook.remove()
    seen["init_conv"] = torch.cat([seen[f"init_convs.{i}", "out"] for i in range(len(small.init_convs))], 1)
    names = [k.removeprefix("mid_tap_") for k in f if k.startswith("mid_tap_")]
    assert len(names) >= 20
    for name in names:
        where = next(((re.sub(p, ours, name), side) for p, (ours, side) in TAPS.items() if re.fullmatch(p, name)), name)
        parity.assert_close(seen[where][:1], f["mid_tap_" + name], std=1e-4)


def test_parity_outputs(small):
    f = parity.load("unet_small")
    x, cond, log_snr = f["in_x"], f["in_cond"], cosine_log_snr(f["in_t"])
    parity.assert_close(log_snr, f["mid_log_snr"], rtol=1e-5, atol=1e-5)
    keep = (~f["in_drop_mask"]).float()[:, None, None, None]
    parity.assert_close(small(x, log_snr, cond), f["out_eps"], std=1e-4)
    parity.assert_close(small(x, log_snr, 0 * cond), f["out_eps_null"], std=1e-4)
    parity.assert_close(small(x, log_snr, keep * cond), f["out_eps_dropped"], std=1e-4)
    faint = f["in_faint_scale"]
    parity.assert_close(small(faint * x, log_snr, faint * cond), f["out_eps_faint"], std=1e-4)


@pytest.mark.parametrize("name", ["vldm", "unet_small"])
def test_released_names_cover_the_model_exactly(name):
    with torch.device("meta"):
        model = VLDM(UNetConfig(**parity.unet_settings(name)))
    parity.assert_names(model, name, released.PARTS["vldm"])


# --- any weights ---

def tiny(config):
    """A random UNet that is not silent: its last layer starts at zero, which would hide everything."""
    torch.manual_seed(0)
    model = UNet(config)
    torch.nn.init.normal_(model.final_conv.weight, std=0.05)
    return model


def test_samples_of_a_batch_do_not_mix(tiny_unet, noise):
    model, z, cond, log_snr = tiny(tiny_unet), noise(3, 4, 8, 8)(), noise(3, 6, 8, 8)(), torch.tensor([2.0, 0.0, -3.0])
    together = model(z, log_snr, cond)
    parity.assert_close(together[1:2], model(z[1:2], log_snr[1:2], cond[1:2]), atol=1e-5)


def test_features_of_two_cells_a_latent_cell_are_folded_into_channels(tiny_unet):
    """A feature cell must land on the latent cell that covers it: (2y + i, 2x + j) -> (y, x)."""
    torch.manual_seed(0)
    model = UNet(replace(tiny_unet, cond_unshuffle=2))
    seen = []
    model.init_convs[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cond = torch.arange(16.0 * 16).reshape(1, 1, 16, 16).expand(-1, 6, -1, -1)
    model(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond)
    assert torch.equal(seen[0][0, :4], torch.stack([cond[0, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)]))
    assert (seen[0][0, -4:] == 0).all()  # the latent comes last


def test_first_convolutions_share_the_channels():
    assert unet.split_channels(256, 3) == [128, 64, 64] and unet.split_channels(96, 1) == [96]
    assert unet.split_channels(10, 3) == [5, 2, 3]


@pytest.mark.parametrize("numbers, words", [
    ({"attention": (True,)}, "attention"), ({"groups": 7}, "7 groups"), ({"kernels": (3, 4)}, "kernels"),
    ({"kernels": ()}, "kernels")])
def test_numbers_that_do_not_fit(numbers, words):
    with pytest.raises(ValueError, match=words):
        UNetConfig(**numbers)


def test_features_embedded_once_give_the_same_noise(tiny_unet, noise):
    model = tiny(replace(tiny_unet, cond_unshuffle=2))
    z, cond, log_snr = noise(3, 4, 8, 8)(), noise(3, 6, 16, 16)(), torch.tensor([2.0, 0.0, -3.0])
    embedded = model.embed_features(cond)
    assert embedded.shape == (3, 16, 8, 8)
    parity.assert_close(model.predict(z, log_snr, embedded), model(z, log_snr, cond), atol=1e-5)


# --- half precision ---

@torch.no_grad()
def test_half_precision_copy_is_close_and_leaves_the_network_alone(small):
    f = parity.load("unet_small")
    half = half_copy(small, UNet.EXACT)
    assert half.time_frequencies.dtype == half.time_hidden.weight.dtype == half.token_norm.weight.dtype == torch.float32
    assert half.final_conv.weight.dtype == torch.float16 and small.final_conv.weight.dtype == torch.float32
    out = half.predict(f["in_x"], cosine_log_snr(f["in_t"]), half.embed_features(f["in_cond"])).float()
    parity.assert_close(out, f["out_eps"], std=0.02)
    assert (out - f["out_eps"]).pow(2).mean().sqrt() < 0.003 * f["out_eps"].std()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_shuffle_is_torchs_with_channels_last(noise, layout):
    x = noise(2, 12, 3, 5)().contiguous(memory_format=layout)
    y = groupnorm.shuffle(x, 2)
    assert torch.equal(y, torch.nn.PixelShuffle(2)(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
