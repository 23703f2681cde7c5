"""VAE, UNet and the two together against the released code's numbers, and what must hold for any weights."""
import copy
import math
import re
from dataclasses import replace

import pytest
import torch

import parity
import released
import vldm
from test_diffusion import gaussian, noise, released_plms, replay
from vldm import NANO, DiffusionConfig, UNet, UNetConfig, VAE, VAEConfig, VLDM, alpha_sigma, log_snr, plms, q_sample, x0_from_eps

TINY = UNetConfig(cond_channels=6, widths=(16, 16, 32), attention=(False, True), kernels=(3, 5), groups=4, heads=2, head_dim=8,
                  frequencies=4, time_dim=32, token_dim=16)


def rename(state, rules, unused=()):
    """Released names -> ours: every rule in turn on every name; names on the unused list go."""
    out = {}
    for name, value in state.items():
        if not any(re.match(p, name) for p in unused):
            for rule in rules:
                name = re.sub(*rule, name)
            assert name not in out, name
            out[name] = value
    return out


def unet_config(name):
    """The UNet that a manifest describes; what it does not say is the same for every released UNet."""
    m = parity.manifest(name)
    c, rest = m["unet_constructor"], m.get("unet_effective_settings", {})
    blocks = c["num_resnet_blocks"]
    assert set(blocks if isinstance(blocks, list) else [blocks]) == {2}
    return UNetConfig(
        channels=c["channels"], cond_channels=c["cond_images_channels"], widths=(c["dim"], *(c["dim"] * k for k in c["dim_mults"])),
        attention=tuple(c["layer_attns"]), kernels=tuple(rest.get("init_cross_embed_kernel_sizes", (3, 7, 15))),
        groups=rest.get("resnet_groups", 8), heads=rest.get("attn_heads", 8), head_dim=rest.get("attn_dim_head", 64),
        frequencies=rest.get("learned_sinu_pos_emb_dim", 16) // 2, time_dim=4 * c["dim"], token_dim=c["dim"],
        tokens=rest.get("num_time_tokens", 2))


def released_vldm(name, **diffusion):
    """A VLDM with the rule-made weights of `manifest_<name>.json`, held once in memory."""
    with torch.device("meta"):
        model = VLDM(unet_config(name), DiffusionConfig(**diffusion))
    model.load_state_dict(rename(parity.weights(name), released.RELEASED_VLDM_KEYS, released.RELEASED_VLDM_UNUSED), assign=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    return released_vldm("unet_small")


@pytest.fixture(scope="module")
def vae():
    m = parity.manifest("vae")
    c = m["config"]
    config = VAEConfig(tuple(c["ch"] * k for k in c["ch_mult"]), c["num_res_blocks"], 32, c["z_channels"], m["latent_scale"])
    with torch.device("meta"):
        model = VAE(config)
    model.load_state_dict(rename(parity.weights("vae"), released.RELEASED_VAE_KEYS), assign=True)
    return model.eval().requires_grad_(False)


# --- the autoencoder, released numbers ---

def test_vae_parity_encode(vae):
    f = parity.load("vae")
    encoded = vae.encoder(f["in_image"])
    parity.assert_close(encoded, f["mid_encoder"], std=1e-4)
    parity.assert_close(vae.quant_conv(encoded), f["out_moments"], std=1e-4)
    mean, log_var = vae.moments((f["in_image"] + 1) / 2)
    parity.assert_close(mean, f["out_mode"], std=1e-4)
    parity.assert_close(log_var, f["out_logvar_clamped"], std=1e-4)
    faint = vae.quant_conv(vae.encoder(f["in_image"] * f["in_faint_scale"])).chunk(2, 1)[0]
    parity.assert_close(faint, f["out_mode_faint"], std=1e-4)


def test_vae_parity_decode(vae):
    f = parity.load("vae")
    parity.assert_close(vae.decoder(vae.post_quant_conv(f["in_z"])), f["out_decode"], std=1e-4)
    parity.assert_close(vae.decode(f["in_z"] * vae.config.scale), (f["out_decode"] + 1) / 2, std=1e-4)
    faint = vae.decoder(vae.post_quant_conv(f["in_z"] * f["in_faint_scale"]))
    parity.assert_close(faint, f["out_decode_faint"], std=1e-4)


def test_vae_parity_round_trip(vae):
    f = parity.load("vae")
    latents = vae.encode((f["in_image"] + 1) / 2)
    parity.assert_close(latents, f["out_latents_scaled"], std=1e-4)
    parity.assert_close(vae.decode(latents).clamp(0, 1), f["out_roundtrip01"], std=1e-4)


def test_vae_ranges_are_the_released_ones(vae):
    """[0, 1] -> [-1, 1], clipped, on the way in; back on the way out, where the caller clips."""
    f = parity.load("vae")
    seen = {}
    part = VAE(VAEConfig(widths=(8, 8), groups=4, blocks=1))
    part.encoder.register_forward_pre_hook(lambda module, args: seen.update(image=args[0]))
    part.decoder.register_forward_hook(lambda module, args, out: f["in_sym"].reshape(1, 1, 1, -1))
    part.encode(f["in_unit"][:, None, None, None].expand(-1, 3, 4, 4))
    parity.assert_close(seen["image"][:, 0, 0, 0], f["out_normalize"], atol=1e-6)
    parity.assert_close(part.decode(torch.zeros(1, 4, 2, 2)).clamp(0, 1).flatten(), f["out_unnormalize"], atol=1e-6)


# --- the UNet, released numbers ---

# released sub-module -> ours, and whether its output or our module's input is the same tensor
TAPS = {"to_time_hiddens": ("time_embed", "in"), "to_time_cond": ("time_embed", "out"), "norm_cond": ("token_norm", "out"),
        "mid_block1": ("mid1", "out"), "mid_attn": ("mid2", "in"), "mid_block2": ("mid2", "out"), "final_res_block": ("final_block", "out"),
        r"downs\.(\d)\.3": (r"down.\1.attention", "out"), r"downs\.(\d)\.4": (r"down.\1.resize", "out"),
        r"ups\.(\d)\.2": (r"up.\1.resize", "in"), r"ups\.(\d)\.3": (r"up.\1.resize", "out")}


def test_unet_parity_taps(small):
    f, seen = parity.load("unet_small"), {}
    hooks = [m.register_forward_hook(lambda m, args, out, n=n: seen.update({(n, "in"): args[0], (n, "out"): out}))
             for n, m in small.unet.named_modules() if n]
    small.unet(f["in_x"], f["mid_log_snr"], f["in_cond"])
    for hook in hooks:
        hook.remove()
    seen["init_conv"] = torch.cat([seen[f"init_convs.{i}", "out"] for i in range(len(small.unet.init_convs))], 1)
    names = [k.removeprefix("mid_tap_") for k in f if k.startswith("mid_tap_")]
    assert len(names) >= 20
    for name in names:
        where = next(((re.sub(p, ours, name), side) for p, (ours, side) in TAPS.items() if re.fullmatch(p, name)), name)
        parity.assert_close(seen[where][:1], f["mid_tap_" + name], std=1e-4)


def test_unet_parity_outputs(small):
    f = parity.load("unet_small")
    x, cond, snr = f["in_x"], f["in_cond"], log_snr(f["in_t"])
    parity.assert_close(snr, f["mid_log_snr"], rtol=1e-5, atol=1e-5)
    keep = (~f["in_drop_mask"]).float()[:, None, None, None]
    parity.assert_close(small.unet(x, snr, cond), f["out_eps"], std=1e-4)
    parity.assert_close(small.unet(x, snr, 0 * cond), f["out_eps_null"], std=1e-4)
    parity.assert_close(small.unet(x, snr, keep * cond), f["out_eps_dropped"], std=1e-4)
    parity.assert_close(small.unet(f["in_faint_scale"] * x, snr, f["in_faint_scale"] * cond), f["out_eps_faint"], std=1e-4)
    parity.assert_close(small.denoiser(cond, float(f["in_cond_scale"]))(x, snr), f["out_eps_cfg"], std=1e-4)
    parity.assert_close(small.denoiser(cond)(x, snr), f["out_eps"], std=1e-4)


@pytest.mark.parametrize("name, gamma, masked", [("plain", 0.0, False), ("p2", 0.5, False), ("p2_masked", 0.5, True)])
def test_unet_parity_losses(small, name, gamma, masked):
    f = parity.load("unet_small")
    model = copy.copy(small)
    model.config = replace(small.config, snr_gamma=gamma)
    loss = model.loss(f["in_x0"], f["in_cond"], f["in_t"], f["in_noise"], f["in_loss_mask"] if masked else None)
    parity.assert_close(loss.reshape(1), f["out_loss_" + name].reshape(1), rtol=1e-4)


def test_unet_parity_at_full_size():
    """The released architecture, 400 M weights: at three times, without conditioning, guided."""
    f = parity.load("unet_full")
    model = released_vldm("vldm")
    assert model.unet.config == vldm.PAPER[1]
    x, cond, snr = f["in_x"], f["in_cond"], log_snr(f["in_t"])
    parity.assert_close(snr, f["mid_log_snr"], rtol=1e-5, atol=1e-5)
    out = [model.unet(x, s.expand(len(x)), cond) for s in snr]
    parity.assert_close(torch.stack(out), f["out_eps"], std=1e-4)
    null = model.unet(x, snr[1].expand(len(x)), 0 * cond)
    parity.assert_close(null, f["out_eps_null"], std=1e-4)
    parity.assert_close(null + f["in_cond_scale"] * (out[1] - null), f["out_eps_cfg"], std=1e-4)


@pytest.mark.parametrize("name", ["vldm", "unet_small", "vae"])
def test_released_names_cover_the_model_exactly(name):
    m = parity.manifest(name)
    entries = {k: tuple(shape) for k, shape, _ in m["entries"]}
    with torch.device("meta"):
        model = VAE() if name == "vae" else VLDM(unet_config(name))
    rules = (released.RELEASED_VAE_KEYS,) if name == "vae" else (released.RELEASED_VLDM_KEYS, released.RELEASED_VLDM_UNUSED)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == rename(entries, *rules)
    assert sum(math.prod(shape) for shape in entries.values()) == m["parameter_count"]


# --- the samplers with the network, released numbers ---

@pytest.mark.parametrize("name", ["cs1", "cfg"])
def test_plms_parity_with_the_network(small, name):
    f = parity.load("plms_net")
    denoise = small.denoiser(f["in_cond"], float(f["in_cond_scale"]) if name == "cfg" else 1.0)
    start, z, _, e, calls = released_plms(denoise, f["in_latents"], f["in_max_thres"].item(), f["in_draws"])
    assert len(z) == len(f["out_t"]) and int(f["out_n_draws"]) == 1 + 2 * len(calls)
    for ours, what in ((start, "x_noisy"), (z[-1], "final"), (z, "img"), (e, "e")):
        parity.assert_close(ours, f[f"out_{name}_{what}"], std=1e-4)


# --- the VLDM ---

class Exact(torch.nn.Module):
    """Stands in for the UNet: the exact answer for Gaussian data, as eps or as v."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction, self.calls = prediction, 0

    def forward(self, z, snr, cond):
        self.calls += 1
        eps = gaussian(0.3, 0.8)(z, snr) + cond.mean()
        alpha, sigma = alpha_sigma(snr.reshape(-1, 1, 1, 1))
        return eps if self.prediction == "eps" else alpha * eps - sigma * (z - sigma * eps) / alpha


def exact_vldm(prediction, **config):
    model = VLDM(TINY, DiffusionConfig(prediction=prediction, **config))
    model.unet = Exact(prediction)
    return model


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_predictions_of_eps_and_v_agree(guidance):
    z, snr = noise(3, 4, 2, 2)(), log_snr(torch.tensor([0.1, 0.6, 0.97]))
    cond = torch.full((3, 6, 2, 2), 0.2)
    eps, v = (exact_vldm(p).denoiser(cond, guidance)(z, snr) for p in ("eps", "v"))
    parity.assert_close(v, eps, atol=1e-5)
    parity.assert_close(eps, gaussian(0.3, 0.8)(z, snr) + guidance * 0.2, atol=1e-5)
    alpha, sigma = alpha_sigma(snr[:, None, None, None])
    parity.assert_close(q_sample(x0_from_eps(z, snr, eps), snr, eps), z, atol=1e-5)


def test_perfect_predictions_have_no_loss_and_v_has_its_own_weight():
    """On a single data point (s -> 0) both losses vanish; an error d of eps is an error d / alpha of v."""
    x0, eps, t = torch.full((2, 4, 2, 2), 0.3), noise(2, 4, 2, 2)(), torch.tensor([0.4, 0.4])
    snr = log_snr(t)
    alpha, sigma = alpha_sigma(snr[0])
    for prediction, expected in (("eps", 0.01), ("v", 0.01 / alpha**2)):
        model = exact_vldm(prediction, snr_gamma=0.0)
        z = q_sample(x0, snr, eps)
        target = eps if prediction == "eps" else alpha * eps - sigma * x0
        model.unet.forward = lambda *args: target
        assert model.loss(x0, torch.zeros(2, 6, 2, 2), t, eps) < 1e-10
        wrong = x0_from_eps(z, snr, eps + 0.1)
        model.unet.forward = lambda *args: eps + 0.1 if prediction == "eps" else alpha * (eps + 0.1) - sigma * wrong
        parity.assert_close(model.loss(x0, torch.zeros(2, 6, 2, 2), t, eps), expected, rtol=1e-4)


def test_guidance_one_calls_the_network_once():
    model = exact_vldm("eps")
    denoise = [model.denoiser(torch.zeros(1, 6, 2, 2), g) for g in (1.0, 3.0)]
    z, snr = torch.zeros(1, 4, 2, 2), torch.zeros(1)
    denoise[0](z, snr)
    assert model.unet.calls == 1
    denoise[1](z, snr)
    assert model.unet.calls == 3


def tiny(seed=0, **diffusion):
    torch.manual_seed(seed)
    model = VLDM(TINY, DiffusionConfig(**diffusion))
    torch.nn.init.normal_(model.unet.final_conv.weight, std=0.05)  # starts at zero, which would hide everything
    return model


@torch.no_grad()
def test_same_generator_same_latent():
    model, cond = tiny().eval(), noise(1, 6, 8, 8)()
    sample = lambda seed: vldm.ancestral(model.denoiser(cond), noise(1, 4, 8, 8, seed=seed), steps=4)
    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_samples_of_a_batch_do_not_mix():
    model, z, cond, snr = tiny(), noise(3, 4, 8, 8)(), noise(3, 6, 8, 8)(), torch.tensor([2.0, 0.0, -3.0])
    together = model.unet(z, snr, cond)
    parity.assert_close(together[1:2], model.unet(z[1:2], snr[1:2], cond[1:2]), atol=1e-5)


def test_gradients_reach_the_conditioning_and_every_weight():
    model, cond = tiny(), noise(2, 6, 8, 8)().requires_grad_()
    model.loss(noise(2, 4, 8, 8)(), cond, torch.tensor([0.2, 0.7]), noise(2, 4, 8, 8, seed=1)()).backward()
    assert (cond.grad.abs().amax(1) > 0).all()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_masked_out_cells_cost_nothing():
    model, cond, t, eps = tiny(), noise(1, 6, 8, 8)(), torch.tensor([0.5]), noise(1, 4, 8, 8, seed=1)()
    x0, mask = noise(1, 4, 8, 8)(), torch.ones(1, 1, 8, 8)
    full = model.loss(x0, cond, t, eps, mask)
    parity.assert_close(full, model.loss(x0, cond, t, eps), rtol=1e-6)
    assert model.loss(x0, cond, t, eps, 0 * mask) == 0


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_overfits_one_latent(prediction):
    """From a loss of about 1 (the network starts at zero) down to a tenth, with fresh noise at every step."""
    torch.manual_seed(0)
    model = VLDM(TINY, DiffusionConfig(prediction=prediction, snr_gamma=0.0))
    x0, cond = noise(1, 4, 8, 8, seed=7)().expand(32, -1, -1, -1), torch.ones(32, 6, 8, 8)
    optimizer, randn = torch.optim.Adam(model.parameters(), 4e-3), noise(32, 4, 8, 8)
    t = (torch.arange(32) + 0.5) / 32
    losses = []
    for _ in range(120):
        losses.append(model.loss(x0, cond, t, randn()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.8 and sum(losses[-5:]) / 5 < 0.25


def test_nano_shapes():
    vae, unet, diffusion = NANO
    autoencoder, model = VAE(vae).eval(), VLDM(unet, diffusion).eval()
    with torch.no_grad():
        latents = autoencoder.encode(torch.rand(1, 3, 128, 128))
        assert latents.shape == (1, 4, 16, 16) and autoencoder.decode(latents).shape == (1, 3, 128, 128)
        cond = torch.randn(1, unet.cond_channels, 32, 32)
        *_, (z, _, _) = plms(model.denoiser(cond), latents, 0.2, noise(1, 4, 16, 16), diffusion.steps, diffusion.clip)
    assert z.shape == latents.shape and z.abs().max() <= diffusion.clip


def test_features_of_two_cells_a_latent_cell_are_folded_into_channels():
    """A feature cell must land on the latent cell that covers it: (2y + i, 2x + j) -> (y, x)."""
    torch.manual_seed(0)
    unet = UNet(replace(TINY, cond_unshuffle=2))
    seen = []
    unet.init_convs[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cond = torch.arange(16.0 * 16).reshape(1, 1, 16, 16).expand(-1, 6, -1, -1)
    unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond)
    assert torch.equal(seen[0][0, :4], torch.stack([cond[0, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)]))
    assert (seen[0][0, -4:] == 0).all()  # the latent comes last


# --- the autoencoder, any weights ---

def test_vae_takes_any_size_and_reduces_it_eightfold():
    torch.manual_seed(0)
    model = VAE(VAEConfig(widths=(8, 8, 16, 16), groups=4, blocks=1))
    image = torch.rand(2, 3, 48, 32, requires_grad=True)
    latents = model.encode(image)
    assert latents.shape == (2, 4, 6, 4) and model.decode(latents).shape == image.shape
    assert [f.shape[1:] for f in model.encoder.features(image)] == [(8, 48, 32), (8, 24, 16), (16, 12, 8), (16, 6, 4)]
    model.decode(latents).sum().backward()
    assert image.grad.abs().sum() > 0


def test_downsampling_pads_right_and_bottom():
    """Output cell (y, x) sees input rows 2y..2y+2: the top left one no padding, the bottom right one does."""
    down = vldm.Downsample(1)
    torch.nn.init.ones_(down.conv.weight), torch.nn.init.zeros_(down.conv.bias)
    out = down(torch.ones(1, 1, 6, 6))[0, 0]
    assert out.tolist() == [[9, 9, 6], [9, 9, 6], [6, 6, 4]]


# --- half precision and CUDA graphs ---

@torch.no_grad()
def test_half_precision_copy_is_close_and_leaves_the_network_alone(small):
    f = parity.load("unet_small")
    half = vldm.GraphedUNet(small.unet).unet
    assert half.time_frequencies.dtype == half.time_hidden.weight.dtype == half.token_norm.weight.dtype == torch.float32
    assert half.final_conv.weight.dtype == torch.float16 and small.unet.final_conv.weight.dtype == torch.float32
    out = half(f["in_x"], log_snr(f["in_t"]), f["in_cond"])
    parity.assert_close(out, f["out_eps"], std=0.02)
    assert (out - f["out_eps"]).pow(2).mean().sqrt() < 0.003 * f["out_eps"].std()


def test_graphed_unet_captures_once_a_shape_and_returns_its_own_tensor(monkeypatch):
    """With a stand-in for the capture that, as a graph does, reads and writes the same memory at every call."""
    captured = []

    class Graph:
        def __init__(self, unet, buffers):
            self.unet, self.buffers, self.result = unet, buffers, unet(*buffers).float()

        def replay(self):
            self.result.copy_(self.unet(*self.buffers))

    def capture(self, buffers):
        captured.append(tuple(b.shape for b in buffers))
        graph = Graph(self.unet, buffers)
        return graph, graph.buffers, graph.result

    monkeypatch.setattr(vldm.GraphedUNet, "capture", capture)
    model = tiny().eval()
    model.graphed = vldm.GraphedUNet(model.unet)
    z, cond, snr = noise(2, 4, 8, 8)(), noise(2, 6, 8, 8)(), torch.tensor(0.5)
    denoise = model.denoiser(cond, guidance=2.0)
    exact = denoise(z, snr.expand(2))                   # gradients are on: the network itself
    assert not captured and exact.requires_grad
    with torch.no_grad():
        fast, again = denoise(z, snr.expand(2)), denoise(-z, snr.expand(2))
        one = model.denoiser(cond[:1])(z[:1], snr.expand(1))
    assert len(captured) == 2 and captured[0][0][0] == 2 and captured[1][0][0] == 1
    assert fast.dtype == torch.float32 and not torch.equal(fast, again)
    parity.assert_close(fast, exact, std=0.03)
    parity.assert_close(one, model.unet(z[:1], snr.expand(1), cond[:1]), std=0.03)


def test_acceleration_is_for_cuda():
    model = tiny()
    assert model.accelerate() is model and model.graphed is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphed_unet_on_cuda():
    model = tiny().eval().cuda().accelerate()
    z, cond = noise(1, 4, 8, 8)().cuda(), noise(1, 6, 8, 8)().cuda()
    denoise = model.denoiser(cond)
    for snr in (5.0, 0.0, -8.0):
        snr = torch.tensor(snr, device="cuda").expand(1)
        with torch.no_grad():
            fast = denoise(z, snr)
        parity.assert_close(fast, denoise(z, snr), std=0.03)
    state = model.state_dict()
    assert not [k for k in state if "graphed" in k] and all(v.dtype == torch.float32 for v in state.values())
