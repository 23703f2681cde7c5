"""The diffusion against the released code's numbers and in closed form; the VLDM with its network."""
import copy
from dataclasses import replace

import pytest
import torch

import presets
import sparsefusion
import vldm
from checkpoints import released
from tests.support import parity
from unet import UNetConfig
from vae import VAE, VAEConfig
from vldm import VLDM, DiffusionConfig, SamplerConfig, alpha_sigma, cosine_log_snr, posterior, q_sample, x0_from_eps


@pytest.fixture(scope="module")
def small():
    """A VLDM with the rule-made weights of `manifest_unet_small.json`."""
    model = VLDM(UNetConfig(**parity.unet_settings("unet_small")))
    model.load_state_dict(parity.rename(parity.weights("unet_small"), released.PARTS["vldm"]))
    return model.eval().requires_grad_(False)


# --- the diffusion, released numbers ---

def test_schedule_parity():
    f = parity.load("diffusion")
    t = f["in_t_grid"]
    log_snr, early = cosine_log_snr(t), t <= 0.999
    alpha, sigma = alpha_sigma(log_snr)
    parity.assert_close(log_snr[early], f["out_log_snr"][early], rtol=1e-5, atol=1e-3)
    sure = early & (t >= 0.01)  # below, the float32 cosine is rounded to the last few bits: 5e-4
    parity.assert_close(log_snr[sure], f["out_log_snr"][sure], rtol=1e-5, atol=1e-5)
    squares = ((alpha**2, "alpha_cumprod"), (1 - alpha**2, "fusion_weight"))
    for ours, name in ((alpha, "alpha"), (sigma, "sigma"), *squares):
        parity.assert_close(ours[sure], f["out_" + name][sure], rtol=1e-5, atol=1e-7)
        parity.assert_close(ours[early], f["out_" + name][early], rtol=1e-3)
    assert (log_snr[t == 1] < -30).all() and (alpha[t == 1] < 1e-6).all()  # a rounding error decides how low


def test_forward_process_and_posterior_parity():
    f = parity.load("diffusion")
    x0, noise, t = f["in_x0"], f["in_noise"], f["in_qt"]
    log_snr = cosine_log_snr(t)
    z = q_sample(x0, log_snr, noise)
    parity.assert_close(log_snr, f["out_q_log_snr"], rtol=1e-5, atol=1e-5)
    parity.assert_close(z, f["out_q_sample"], rtol=1e-5, atol=1e-6)
    parity.assert_close(q_sample(x0, cosine_log_snr(t[1]), noise), f["out_q_sample_scalar_t"], rtol=1e-5, atol=1e-6)
    implied = x0_from_eps(f["out_q_sample"], log_snr, f["in_pred"])
    parity.assert_close(implied, f["out_x0_from_noise"], rtol=1e-5, atol=1e-5)
    for s, name in ((f["in_qt_next"], ""), ((t - 1 / 500).clamp(min=0), "_default_next")):
        mean, var = posterior(x0, f["out_q_sample"], log_snr, cosine_log_snr(s))
        parity.assert_close(mean, f[f"out_post_mean{name}"], rtol=1e-5, atol=1e-5)
        rtol = 2e-3 if (s < 0.01).any() else 1e-5  # the float32 cosine near t = 0
        parity.assert_close(var, f[f"out_post_var{name}"], rtol=rtol)
        if "out_post_logvar" + name in f:
            parity.assert_close(var.clamp(min=1e-20).log(), f[f"out_post_logvar{name}"], rtol=1e-5, atol=1e-3)


def test_loss_weights_parity():
    f = parity.load("diffusion")
    gamma, k = f["out_p2_gamma_k"].tolist()
    assert k == 1
    log_snr = cosine_log_snr(f["in_p2_t"])
    for i in range(len(log_snr)):
        loss = vldm.diffusion_loss(f["in_p2_pred"][i:i + 1], f["in_p2_noise"][i:i + 1], log_snr[i:i + 1], gamma)
        parity.assert_close(loss, f["out_p2_loss"].reshape(-1)[i], rtol=1e-4 if f["in_p2_t"][i] < 0.01 else 1e-5)
        one = vldm.diffusion_loss(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), log_snr[i:i + 1], gamma)
        parity.assert_close(one, f["out_p2_weight"].reshape(-1)[i], rtol=1e-3 if f["in_p2_t"][i] < 0.01 else 1e-5)


def test_latent_mask_parity():
    f = parity.load("losses")
    parity.assert_close(vldm.latent_mask(f["in_valid_region"], f["out_train_mask"].shape[-1]), f["out_train_mask"])
    assert vldm.latent_mask(torch.tensor([[[[0.59]]], [[[0.61]]]]), 1).flatten().tolist() == [0, 1]


# --- the diffusion, closed forms ---

def test_log_snr_falls_and_alpha_and_sigma_are_on_the_circle():
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    log_snr = cosine_log_snr(t)
    assert (log_snr.diff() < 0).all() and log_snr[0] > 8 and log_snr[-1] < -30
    alpha, sigma = alpha_sigma(log_snr)
    parity.assert_close(alpha**2 + sigma**2, torch.ones_like(t), atol=1e-12)
    parity.assert_close(torch.log(alpha**2 / sigma**2), log_snr, atol=1e-9)


@pytest.mark.parametrize("t, s", [(0.9, 0.6), (0.5, 0.48), (0.2, 0.01)])
def test_posterior_is_bayes_rule(t, s):
    """q(z_s | z_t, x0) is a product: the prior N(alpha_s x0, sigma_s^2), the likelihood of z_t given z_s."""
    x0, z = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_snr_t, log_snr_s = (cosine_log_snr(torch.tensor(u, dtype=torch.float64)) for u in (t, s))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    step = alpha_t / alpha_s                          # z_t = step * z_s + noise
    noise = sigma_t**2 - step**2 * sigma_s**2
    precision = 1 / sigma_s**2 + step**2 / noise
    mean, var = posterior(x0, z, log_snr_t, log_snr_s)
    parity.assert_close(var, 1 / precision, rtol=1e-10)
    parity.assert_close(mean, (alpha_s * x0 / sigma_s**2 + step * z / noise) / precision, rtol=1e-9, atol=1e-10)


def test_noise_and_clean_latent_imply_each_other(noise):
    z, eps, log_snr = noise(3, 4, 2, 2)(), noise(3, 4, 2, 2, seed=1)(), cosine_log_snr(torch.tensor([0.1, 0.5, 0.9]))
    parity.assert_close(q_sample(x0_from_eps(z, log_snr, eps), log_snr, eps), z, atol=1e-5)


@pytest.mark.parametrize("config, numbers, words", [
    (DiffusionConfig, {"prediction": "x0"}, "'x0'"), (DiffusionConfig, {"drop": 1.5}, "drop 1.5"),
    (DiffusionConfig, {"t_max": 0.0}, "t_max 0.0"), (DiffusionConfig, {"noisings": 0}, "noisings 0"),
    (SamplerConfig, {"denoise_steps": 0}, "denoise_steps 0"), (SamplerConfig, {"solver": "euler"}, "solver 'euler'"),
    (SamplerConfig, {"sample_steps": 0}, "sample_steps 0"), (SamplerConfig, {"clip": 0.0}, "clip 0.0"),
    (SamplerConfig, {"t_start": 1.2}, "t_start 1.2")])
def test_numbers_that_do_not_fit(config, numbers, words):
    with pytest.raises(ValueError, match=words):
        config(**numbers)


# --- with the network, released numbers ---

def test_predictor_parity(small):
    f = parity.load("unet_small")
    log_snr = cosine_log_snr(f["in_t"])
    for guidance, name in ((float(f["in_cond_scale"]), "out_eps_cfg"), (1.0, "out_eps")):
        denoiser = small.denoiser(f["in_cond"], SamplerConfig(guidance=guidance))
        x0, eps = denoiser.estimate(f["in_x"], log_snr)
        parity.assert_close(eps, f[name], std=1e-4)
        parity.assert_close(x0, x0_from_eps(f["in_x"], log_snr, eps).clamp(-10, 10), atol=1e-5)


@pytest.mark.parametrize("name, gamma, masked", [("plain", 0.0, False), ("p2", 0.5, False), ("p2_masked", 0.5, True)])
def test_losses_parity(small, name, gamma, masked):
    f = parity.load("unet_small")
    model = copy.copy(small)
    model.config = replace(small.config, snr_gamma=gamma)
    loss = model.loss(f["in_x0"], f["in_cond"], f["in_t"], f["in_noise"], f["in_loss_mask"] if masked else None)
    parity.assert_close(loss.reshape(1), f["out_loss_" + name].reshape(1), rtol=1e-4)


# --- with a perfect network ---

class Exact(torch.nn.Module):
    """Stands in for the UNet: the exact answer for Gaussian data, as eps or as v."""

    def __init__(self, prediction, predict_noise):
        super().__init__()
        self.prediction, self.predict_noise, self.calls = prediction, predict_noise, 0

    def embed_features(self, cond):
        return cond

    def predict(self, z, log_snr, cond):
        self.calls += 1
        eps = self.predict_noise(z, log_snr) + cond.mean()
        alpha, sigma = alpha_sigma(log_snr.reshape(-1, 1, 1, 1))
        return eps if self.prediction == "eps" else alpha * eps - sigma * (z - sigma * eps) / alpha


@pytest.fixture
def exact_vldm(tiny_unet, gaussian):
    def exact_vldm(prediction, **config):
        model = VLDM(tiny_unet, DiffusionConfig(prediction=prediction, **config))
        model.unet = Exact(prediction, gaussian(0.3, 0.8).predict_noise)
        return model
    return exact_vldm


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_predictions_of_eps_and_v_agree(exact_vldm, gaussian, noise, guidance):
    z, log_snr = noise(3, 4, 2, 2)(), cosine_log_snr(torch.tensor([0.1, 0.6, 0.97]))
    cond = torch.full((3, 6, 2, 2), 0.2)
    sampler = SamplerConfig(guidance=guidance, clip=100.0)
    for prediction in ("eps", "v"):
        x0, eps = exact_vldm(prediction).denoiser(cond, sampler).estimate(z, log_snr)
        parity.assert_close(eps, gaussian(0.3, 0.8).predict_noise(z, log_snr) + guidance * 0.2, atol=1e-5)
        parity.assert_close(x0, x0_from_eps(z, log_snr, eps), rtol=1e-4, atol=1e-4)
        parity.assert_close(q_sample(x0, log_snr, eps), z, atol=1e-5)


def test_perfect_predictions_have_no_loss_and_v_has_its_own_weight(exact_vldm, noise):
    """On a single data point (s -> 0) both losses vanish; an error d of eps is an error d / alpha of v."""
    x0, eps, t = torch.full((2, 4, 2, 2), 0.3), noise(2, 4, 2, 2)(), torch.tensor([0.4, 0.4])
    log_snr = cosine_log_snr(t)
    alpha, sigma = alpha_sigma(log_snr[0])
    for prediction, expected in (("eps", 0.01), ("v", 0.01 / alpha**2)):
        model = exact_vldm(prediction, snr_gamma=0.0)
        z = q_sample(x0, log_snr, eps)
        target = eps if prediction == "eps" else alpha * eps - sigma * x0
        model.unet.forward = lambda *args: target
        assert model.loss(x0, torch.zeros(2, 6, 2, 2), t, eps) < 1e-10
        wrong = x0_from_eps(z, log_snr, eps + 0.1)
        model.unet.forward = lambda *args: eps + 0.1 if prediction == "eps" else alpha * (eps + 0.1) - sigma * wrong
        parity.assert_close(model.loss(x0, torch.zeros(2, 6, 2, 2), t, eps), expected, rtol=1e-4)


def test_guidance_one_calls_the_network_once(exact_vldm):
    model = exact_vldm("eps")
    plain, guided = (model.denoiser(torch.zeros(1, 6, 2, 2), SamplerConfig(guidance=g)) for g in (1.0, 3.0))
    z, log_snr = torch.zeros(1, 4, 2, 2), torch.zeros(1)
    plain(z, log_snr)
    assert model.unet.calls == 1
    guided(z, log_snr)
    assert model.unet.calls == 3


# --- with a random network ---

@pytest.fixture
def tiny(tiny_unet):
    torch.manual_seed(0)
    model = VLDM(tiny_unet)
    torch.nn.init.normal_(model.unet.final_conv.weight, std=0.05)  # starts at zero, which would hide everything
    return model


@torch.no_grad()
def test_same_generator_same_latent(tiny, noise):
    cond, sampler = noise(1, 6, 8, 8)(), SamplerConfig(sample_steps=4)
    denoiser = tiny.eval().denoiser(cond, sampler)
    sample = lambda seed: vldm.ancestral_sampling(denoiser, noise(1, 4, 8, 8, seed=seed), sampler)
    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))


def test_gradients_reach_the_conditioning_and_every_weight(tiny, noise):
    cond = noise(2, 6, 8, 8)().requires_grad_()
    tiny.loss(noise(2, 4, 8, 8)(), cond, torch.tensor([0.2, 0.7]), noise(2, 4, 8, 8, seed=1)()).backward()
    assert (cond.grad.abs().amax(1) > 0).all()
    assert not [n for n, p in tiny.named_parameters() if p.grad is None]

    # But what is added to all keys of a gate does not change its softmax.
    learns = {n: p for n, p in tiny.named_parameters() if not n.endswith("gate.key.bias")}
    assert not [n for n, p in learns.items() if not p.grad.abs().sum() > 0]


def test_masked_out_cells_cost_nothing(tiny, noise):
    cond, t, eps = noise(1, 6, 8, 8)(), torch.tensor([0.5]), noise(1, 4, 8, 8, seed=1)()
    x0, mask = noise(1, 4, 8, 8)(), torch.ones(1, 1, 8, 8)
    full = tiny.loss(x0, cond, t, eps, mask)
    parity.assert_close(full, tiny.loss(x0, cond, t, eps), rtol=1e-6)
    assert tiny.loss(x0, cond, t, eps, 0 * mask) == 0


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_overfits_one_latent(tiny_unet, noise, prediction):
    """From a loss of about 1 (the network starts at zero) down to a tenth, with fresh noise at every step."""
    torch.manual_seed(0)
    model = VLDM(tiny_unet, DiffusionConfig(prediction=prediction, snr_gamma=0.0))
    x0, cond = noise(1, 4, 8, 8, seed=7)().expand(16, -1, -1, -1), torch.ones(16, 6, 8, 8)
    optimizer, randn = torch.optim.Adam(model.parameters(), 4e-3), noise(16, 4, 8, 8)
    t = (torch.arange(16) + 0.5) / 16
    losses = []
    for _ in range(80):
        losses.append(model.loss(x0, cond, t, randn()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.8 and sum(losses[-5:]) / 5 < 0.25


def test_nano_shapes(noise):
    autoencoder, model = VAE(presets.NANO.vae).eval(), VLDM(presets.NANO.unet, presets.NANO.diffusion).eval()
    sampler = replace(presets.NANO_SAMPLER, denoise_steps=10)
    with torch.no_grad():
        latents = autoencoder.encode(torch.rand(1, 3, 128, 128))
        assert latents.shape == (1, 16, 16, 16) and autoencoder.decode(latents).shape == (1, 3, 128, 128)
        cond = torch.randn(1, presets.NANO.unet.cond_channels, 32, 32)
        z = vldm.denoise(model.denoiser(cond, sampler), latents, [0.2], noise(1, 16, 16, 16), sampler)
    assert z.shape == latents.shape and z.abs().max() <= sampler.clip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_acceleration_on_cuda(tiny, noise):
    model = tiny.eval().cuda()
    names = model.state_dict().keys()
    sparsefusion.run_in_half(VAE(VAEConfig(widths=(8, 8), groups=4)).cuda(), model.unet)
    z, cond = noise(1, 4, 8, 8)().cuda(), noise(1, 6, 8, 8)().cuda()
    denoiser = model.denoiser(cond, SamplerConfig())
    for log_snr in (5.0, 0.0, -8.0):
        log_snr = torch.tensor(log_snr, device="cuda").expand(1)
        with torch.no_grad():
            _, of_half = denoiser.estimate(z, log_snr)
        parity.assert_close(of_half, denoiser.estimate(z, log_snr)[1].detach().cpu(), std=0.03)
    assert model.unet.predict.half_is_accurate and len(model.unet.predict.replays) == 1
    state = model.state_dict()
    assert state.keys() == names and all(v.dtype == torch.float32 for v in state.values())
