"""The autoencoder against the released code's numbers, and what must hold for any weights."""
import pytest
import torch

import vae
from checkpoints import released
from tests.support import parity
from vae import VAE, VAEConfig


@pytest.fixture(scope="module")
def stable_diffusion():
    """The autoencoder with the rule-made weights of `manifest_vae.json`."""
    m = parity.manifest("vae")
    c = m["config"]
    widths = tuple(c["ch"] * k for k in c["ch_mult"])
    config = VAEConfig(widths, c["num_res_blocks"], 32, c["z_channels"], scale=m["latent_scale"])
    with torch.device("meta"):
        model = VAE(config)
    model.load_state_dict(parity.rename(parity.weights("vae"), released.PARTS["vae"]), assign=True)
    return model.eval().requires_grad_(False)


# --- released numbers ---

def test_parity_encode(stable_diffusion):
    f, model = parity.load("vae"), stable_diffusion
    encoded = model.encoder(f["in_image"])
    parity.assert_close(encoded, f["mid_encoder"], std=1e-4)
    parity.assert_close(model.quant_conv(encoded), f["out_moments"], std=1e-4)
    mean, log_var = model.moments((f["in_image"] + 1) / 2)
    parity.assert_close(mean, f["out_mode"], std=1e-4)
    parity.assert_close(log_var, f["out_logvar_clamped"], std=1e-4)
    faint = model.quant_conv(model.encoder(f["in_image"] * f["in_faint_scale"])).chunk(2, 1)[0]
    parity.assert_close(faint, f["out_mode_faint"], std=1e-4)


def test_parity_decode(stable_diffusion):
    f, model = parity.load("vae"), stable_diffusion
    parity.assert_close(model.decoder(model.post_quant_conv(f["in_z"])), f["out_decode"], std=1e-4)
    parity.assert_close(model.decode(f["in_z"] * model.config.scale), (f["out_decode"] + 1) / 2, std=1e-4)
    faint = model.decoder(model.post_quant_conv(f["in_z"] * f["in_faint_scale"]))
    parity.assert_close(faint, f["out_decode_faint"], std=1e-4)


def test_parity_round_trip(stable_diffusion):
    f, model = parity.load("vae"), stable_diffusion
    latents = model.encode((f["in_image"] + 1) / 2)
    parity.assert_close(latents, f["out_latents_scaled"], std=1e-4)
    parity.assert_close(model.decode(latents).clamp(0, 1), f["out_roundtrip01"], std=1e-4)


def test_ranges_are_the_released_ones():
    """[0, 1] -> [-1, 1], clipped, on the way in; back on the way out, where the caller clips."""
    f = parity.load("vae")
    seen = {}
    part = VAE(VAEConfig(widths=(8, 8), groups=4, blocks=1))
    part.encoder.register_forward_pre_hook(lambda module, args: seen.update(image=args[0]))
    part.decoder.register_forward_hook(lambda module, args, out: f["in_sym"].reshape(1, 1, 1, -1))
    part.encode(f["in_unit"][:, None, None, None].expand(-1, 3, 4, 4))
    parity.assert_close(seen["image"][:, 0, 0, 0], f["out_normalize"], atol=1e-6)
    parity.assert_close(part.decode(torch.zeros(1, 4, 2, 2)).clamp(0, 1).flatten(), f["out_unnormalize"], atol=1e-6)


def test_released_names_cover_the_model_exactly():
    with torch.device("meta"):
        model = VAE(vae.VAEConfig())
    parity.assert_names(model, "vae", released.PARTS["vae"])


# --- any weights ---

def test_any_size_goes_and_is_reduced_eightfold():
    torch.manual_seed(0)
    model = VAE(VAEConfig(widths=(8, 8, 16, 16), groups=4, blocks=1))
    image = torch.rand(2, 3, 48, 32, requires_grad=True)
    latents = model.encode(image)
    assert latents.shape == (2, 4, 6, 4) and model.decode(latents).shape == image.shape
    assert [f.shape[1:] for f in model.encoder.features(image)] == [(8, 48, 32), (8, 24, 16), (16, 12, 8), (16, 6, 4)]
    model.decode(latents).sum().backward()
    assert image.grad.abs().sum() > 0


def test_patches_are_the_channels_of_a_pixel():
    """Squares of pixels go in and come out in rows; all maps are smaller by a patch's side."""
    torch.manual_seed(0)
    model = VAE(VAEConfig(widths=(8, 16), groups=4, blocks=1, patch=2))
    image, seen = torch.rand(2, 3, 8, 12), []
    model.encoder.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    latents = model.encode(image)
    assert latents.shape == (2, 4, 2, 3) and model.decode(latents).shape == image.shape and model.config.factor == 4
    assert [f.shape[1:] for f in model.features(image)] == [(8, 4, 6), (16, 2, 3)]
    green = [image[:, 1, 0::2, 0::2], image[:, 1, 0::2, 1::2], image[:, 1, 1::2, 0::2], image[:, 1, 1::2, 1::2]]
    parity.assert_close(seen[0][:, 4:8], 2 * torch.stack(green, dim=1) - 1, atol=1e-6)

    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    model.decoder.conv_out.bias.data = torch.arange(12.0)
    red = 2 * model.decode(latents)[:, 0] - 1
    parity.assert_close(red, torch.tensor([[0.0, 1], [2, 3]]).repeat(2, 4, 6), atol=1e-6)


def test_posteriors_begin_narrow():
    """With a deviation of about e^-2, in every channel and at every place."""
    torch.manual_seed(0)
    model = VAE(VAEConfig(widths=(8, 8, 16, 16), groups=4, blocks=1, channels=8))
    _, log_var = model.moments(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert 0.1 < (log_var / 2).exp().amin() and (log_var / 2).exp().amax() < 0.25


def test_downsampling_pads_right_and_bottom():
    """Output cell (y, x) sees input rows 2y..2y+2: the top left one no padding, the bottom right one does."""
    down = vae.Downsample(1)
    torch.nn.init.ones_(down.conv.weight), torch.nn.init.zeros_(down.conv.bias)
    out = down(torch.ones(1, 1, 6, 6))[0, 0]
    assert out.tolist() == [[9, 9, 6], [9, 9, 6], [6, 6, 4]]


@pytest.mark.parametrize("numbers, words", [
    ({"widths": (128, 200)}, "widths"), ({"widths": ()}, "widths"), ({"blocks": 0}, "blocks 0"),
    ({"patch": 0}, "patch 0"), ({"scale": 0.0}, "scale 0.0")])
def test_numbers_that_do_not_fit(numbers, words):
    with pytest.raises(ValueError, match=words):
        VAEConfig(**numbers)
