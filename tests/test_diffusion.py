"""The diffusion and its samplers against the released code's numbers, and on Gaussian data, where everything is known exactly."""
import pytest
import torch

import parity
import vldm
from vldm import DiffusionConfig, alpha_sigma, log_snr, plms, posterior, q_sample, x0_from_eps


def released_predictor(z, snr):
    """What stands in for the network in diffusion.npz."""
    return 0.1 * z + 0.05 * snr.sin().reshape(-1, 1, 1, 1)


def replay(draws):
    """A `randn` that hands out recorded draws one after the other; `randn.left` are those not drawn."""
    def randn():
        return randn.left.pop(0)
    randn.left = list(draws)
    return randn


# --- the diffusion, released numbers ---

def test_schedule_parity():
    f = parity.load("diffusion")
    t = f["in_t_grid"]
    snr, early = log_snr(t), t <= 0.999
    alpha, sigma = alpha_sigma(snr)
    parity.assert_close(snr[early], f["out_log_snr"][early], rtol=1e-5, atol=1e-3)
    sure = early & (t >= 0.01)  # below, the float32 cosine is rounded to the last few bits: 5e-4
    parity.assert_close(snr[sure], f["out_log_snr"][sure], rtol=1e-5, atol=1e-5)
    for ours, name in ((alpha, "alpha"), (sigma, "sigma"), (alpha**2, "alpha_cumprod"), (1 - alpha**2, "fusion_weight")):
        parity.assert_close(ours[sure], f["out_" + name][sure], rtol=1e-5, atol=1e-7)
        parity.assert_close(ours[early], f["out_" + name][early], rtol=1e-3)
    assert (snr[t == 1] < -30).all() and (alpha[t == 1] < 1e-6).all()  # a rounding error decides how low, see parity/README.md


def test_forward_process_and_posterior_parity():
    f = parity.load("diffusion")
    x0, noise, t = f["in_x0"], f["in_noise"], f["in_qt"]
    snr = log_snr(t)
    z = q_sample(x0, snr, noise)
    parity.assert_close(snr, f["out_q_log_snr"], rtol=1e-5, atol=1e-5)
    parity.assert_close(z, f["out_q_sample"], rtol=1e-5, atol=1e-6)
    parity.assert_close(q_sample(x0, log_snr(t[1]), noise), f["out_q_sample_scalar_t"], rtol=1e-5, atol=1e-6)
    parity.assert_close(x0_from_eps(f["out_q_sample"], snr, f["in_pred"]), f["out_x0_from_noise"], rtol=1e-5, atol=1e-5)
    for s, name in ((f["in_qt_next"], ""), ((t - 1 / 500).clamp(min=0), "_default_next")):
        mean, var = posterior(x0, f["out_q_sample"], snr, log_snr(s))
        parity.assert_close(mean, f[f"out_post_mean{name}"], rtol=1e-5, atol=1e-5)
        parity.assert_close(var, f[f"out_post_var{name}"], rtol=2e-3 * float((s < 0.01).any()) or 1e-5)  # float32 cosine near t = 0
        if "out_post_logvar" + name in f:
            parity.assert_close(var.clamp(min=1e-20).log(), f[f"out_post_logvar{name}"], rtol=1e-5, atol=1e-3)


def test_sampling_times_parity():
    expected = parity.load("diffusion")["out_sampling_times_500"]
    seen = []
    vldm.ancestral(lambda z, snr: seen.append(snr) or z, lambda: torch.zeros(1, 1, 1, 1), steps=len(expected))
    parity.assert_close(torch.cat(seen), log_snr(expected[:, 0]), rtol=1e-4, atol=1e-3)
    parity.assert_close(expected[1:, 0], expected[:-1, 1], atol=1e-6)


def test_loss_weights_parity():
    f = parity.load("diffusion")
    gamma, k = f["out_p2_gamma_k"].tolist()
    assert k == 1
    snr = log_snr(f["in_p2_t"])
    for i in range(len(snr)):
        loss = vldm.diffusion_loss(f["in_p2_pred"][i:i + 1], f["in_p2_noise"][i:i + 1], snr[i:i + 1], gamma)
        parity.assert_close(loss, f["out_p2_loss"].reshape(-1)[i], rtol=1e-4 if f["in_p2_t"][i] < 0.01 else 1e-5)
        one = vldm.diffusion_loss(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), snr[i:i + 1], gamma)
        parity.assert_close(one, f["out_p2_weight"].reshape(-1)[i], rtol=1e-3 if f["in_p2_t"][i] < 0.01 else 1e-5)


def released_plms(denoise, latents, level, draws):
    """The released sampler: (noised start, latents, clean estimates, predictions, log-SNR of the calls).

    Of the recorded draws it uses number 0 for the start, 2 and 4 in the first step, 4 + 2k in step k. From level 0.99 on it
    starts from the clean latent, and the noised one (draw 0) is computed for nothing.
    """
    calls = []

    def recorded(z, snr):
        calls.append(snr[0])
        return denoise(z, snr)

    start = q_sample(latents, log_snr(torch.tensor(level)), draws[0])
    randn = replay(draws[2 if level >= 0.99 else 0::2])
    steps = list(plms(recorded, latents, level, randn, ancestral=True, unnoised_start=True))
    z, x0, e = (torch.stack(x) for x in zip(*steps)) if steps else (start[None],) * 3
    return start, z, x0, e, torch.stack(calls) if calls else torch.empty(0)


@pytest.mark.parametrize("draw", ["zero", "rec"])
def test_plms_parity(draw):
    f = parity.load("diffusion")
    draws = f["in_plms_draws"] if draw == "rec" else torch.zeros_like(f["in_plms_draws"])
    for i, level in enumerate(f["in_plms_max_thres"].tolist()):
        std = 1e-3 if level >= 0.99 else 1e-4
        start, z, x0, e, calls = released_plms(released_predictor, f["in_plms_latents"], level, draws)
        parity.assert_close(start, f[f"out_plms{i}_{draw}_x_noisy"], std=std)
        parity.assert_close(z[-1], f[f"out_plms{i}_{draw}_final"], std=std)
        times = vldm.plms_times(level)
        taken = f[f"out_plms{i}_t"]
        assert len(times) - 1 == len(taken)
        parity.assert_close(times[:-1], taken, atol=1e-6)
        parity.assert_close(times[1:], f[f"out_plms{i}_t_next"], atol=1e-6)
        parity.assert_close(calls, f[f"out_plms{i}_calls_log_snr"], rtol=1e-5, atol=1e-3)
        assert int(f[f"out_plms{i}_n_draws"]) == 1 + 2 * len(calls)
        parity.assert_close(alpha_sigma(log_snr(torch.tensor([level])))[0] ** 2, f[f"out_plms{i}_alpha_cumprod"], rtol=1e-4)
        traced = level in f["in_plms_traj_thres"].tolist()
        for ours, name in ((z, "img"), (x0, "x0"), (e, "e")) if traced else ():
            parity.assert_close(ours, f[f"out_plms{i}_{draw}_{name}"], std=std)


def test_plms_parity_where_the_estimate_is_clipped():
    f = parity.load("diffusion")
    predictor = lambda z, snr: -3 * z + 0.4 * snr.sin().reshape(-1, 1, 1, 1)
    _, z, x0, _, _ = released_plms(predictor, 6 * f["in_plms_latents"], f["in_plms_max_thres"][4].item(), f["in_plms_draws"])
    parity.assert_close(z[-1], f["out_plms_clip_final"], std=1e-4)
    parity.assert_close(x0, f["out_plms_clip_x0"], std=1e-4)
    assert x0.abs().max() == DiffusionConfig().clip


def test_plms_parity_from_noise():
    """No start latent: draw 0 is the start, draw 1 an unused noising, then as ever."""
    f = parity.load("diffusion")
    draws = f["in_plms_draws"]
    steps = list(plms(released_predictor, None, 0.999, replay([draws[0], *draws[3::2]]), ancestral=True))
    parity.assert_close(steps[-1][0], f["out_plms_noimage_final"], std=1e-3)
    assert int(f["out_plms_noimage_n_draws"]) == 2 + 2 * (len(steps) + 1)


def test_ancestral_parity():
    f = parity.load("diffusion")
    randn = replay(f["in_ddpm_draws"])
    z = vldm.ancestral(released_predictor, randn, steps=len(f["in_ddpm_draws"]) - 1)
    parity.assert_close(z, f["out_ddpm12_final"], std=1e-3)
    assert len(randn.left) == 1  # the released loop draws in its last step too


# --- the diffusion, closed forms ---

def test_log_snr_falls_and_alpha_and_sigma_are_on_the_circle():
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    snr = log_snr(t)
    assert (snr.diff() < 0).all() and snr[0] > 8 and snr[-1] < -30
    alpha, sigma = alpha_sigma(snr)
    parity.assert_close(alpha**2 + sigma**2, torch.ones_like(t), atol=1e-12)
    parity.assert_close(torch.log(alpha**2 / sigma**2), snr, atol=1e-9)


@pytest.mark.parametrize("t, s", [(0.9, 0.6), (0.5, 0.48), (0.2, 0.01)])
def test_posterior_is_bayes_rule(t, s):
    """q(z_s | z_t, x0) as a product of Gaussians: the prior N(alpha_s x0, sigma_s^2) and the likelihood of z_t given z_s."""
    x0, z = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    snr_t, snr_s = (log_snr(torch.tensor(u, dtype=torch.float64)) for u in (t, s))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(snr_t), alpha_sigma(snr_s)
    step = alpha_t / alpha_s                          # z_t = step * z_s + noise
    noise = sigma_t**2 - step**2 * sigma_s**2
    precision = 1 / sigma_s**2 + step**2 / noise
    mean, var = posterior(x0, z, snr_t, snr_s)
    parity.assert_close(var, 1 / precision, rtol=1e-10)
    parity.assert_close(mean, (alpha_s * x0 / sigma_s**2 + step * z / noise) / precision, rtol=1e-9, atol=1e-10)


def test_latent_mask_parity():
    f = parity.load("losses")
    parity.assert_close(vldm.latent_mask(f["in_valid_region"], f["out_train_mask"].shape[-1]), f["out_train_mask"])
    assert vldm.latent_mask(torch.tensor([[[[0.59]]], [[[0.61]]]]), 1).flatten().tolist() == [0, 1]


# --- the samplers on Gaussian data, where the best prediction is known ---

def gaussian(mu, s):
    """E[eps | z] for data N(mu, s^2)."""
    def denoise(z, snr):
        alpha, sigma = alpha_sigma(snr.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1)))
        return sigma * (z - alpha * mu) / (alpha**2 * s**2 + sigma**2)
    return denoise


def noise(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("mu, s", [(0.5, 1.0), (-1.0, 0.4)])
def test_ancestral_samples_the_data(mu, s):
    x = vldm.ancestral(gaussian(mu, s), noise(20000, 1), steps=200)
    assert abs(x.mean() - mu) < 0.03 * s and abs(x.std() / s - 1) < 0.03


@pytest.mark.parametrize("mu, s", [(0.5, 1.0), (-1.0, 0.4)])
def test_plms_from_noise_samples_the_data(mu, s):
    *_, (x, estimate, _) = plms(gaussian(mu, s), None, 0.98, noise(20000, 1))
    assert abs(x.mean() - mu) < 0.03 * s and abs(x.std() / s - 1) < 0.03
    assert abs(estimate.mean() - mu) < 0.03 * s


def first_order(denoise, z, level, steps):
    """DDIM without noise (Song et al. 2021, Eq. 12)."""
    snr = log_snr(vldm.plms_times(level, steps)).double()
    for a, b in zip(snr, snr[1:]):
        eps = denoise(z, a)
        alpha, sigma = alpha_sigma(b)
        z = alpha * x0_from_eps(z, a, eps) + sigma * eps
    return z


@pytest.mark.parametrize("level, steps", [(0.98, 10), (0.9, 10), (0.9, 25), (0.5, 5), (0.5, 10), (0.5, 25)])
def test_plms_follows_the_exact_path_closer_than_first_order_steps(level, steps):
    mu, s = 0.7, 0.6
    alpha, sigma = alpha_sigma(log_snr(torch.tensor(level)).double())
    x0 = mu + s * noise(5000, 1, seed=1, dtype=torch.float64)()
    eps = noise(5000, 1, seed=2, dtype=torch.float64)()
    z = alpha * x0 + sigma * eps
    exact = mu + s * (z - alpha * mu) / (alpha**2 * s**2 + sigma**2).sqrt()  # where the probability flow takes z
    *_, (x, _, _) = plms(gaussian(mu, s), x0, level, lambda: eps, steps)
    error, baseline = (x - exact).pow(2).mean().sqrt() / s, (first_order(gaussian(mu, s), z, level, steps) - exact).pow(2).mean().sqrt() / s
    assert error < 0.25 * baseline and error < (0.03 if steps > 5 else 0.01)


def test_plms_draws_once_and_the_released_one_at_every_step():
    count = []
    randn = lambda: count.append(1) or torch.zeros(1, 1)
    n = len(list(plms(gaussian(0, 1), torch.zeros(1, 1), 0.3, randn, steps=20)))
    assert (n, len(count)) == (12, 1)
    list(plms(gaussian(0, 1), torch.zeros(1, 1), 0.3, randn, steps=20, ancestral=True))
    assert len(count) == 1 + 1 + 12  # start, Euler trial, every step but the last


@pytest.mark.parametrize("level, n", [(0.0, 0), (0.009, 0), (0.011, 1), (0.29, 28), (0.5, 50), (0.989, 50), (1.0, 50)])
def test_number_of_plms_steps(level, n):
    """Double precision, left to right: 0.29 gives 28. One step suffices; below 0.01 there is none."""
    steps = list(plms(gaussian(0, 1), torch.zeros(1, 4, 2, 2), level, noise(1, 4, 2, 2)))
    assert len(steps) == n and all(torch.isfinite(x).all() for step in steps for x in step)


def test_high_levels_start_from_the_noised_latent_unless_told_otherwise():
    x0 = torch.full((1, 4, 2, 2), 3.0)
    assert torch.equal(vldm.start_latent(x0, 0.99, noise(1, 4, 2, 2)), vldm.start_latent(x0, 1.0, noise(1, 4, 2, 2)))  # from t = 1
    parity.assert_close(vldm.start_latent(x0, 1.0, noise(1, 4, 2, 2)), noise(1, 4, 2, 2)(), atol=1e-4)
    assert vldm.start_latent(x0, 0.99, noise(1, 4, 2, 2), unnoised_start=True) is x0
    parity.assert_close(vldm.start_latent(x0, 0.0, noise(1, 4, 2, 2)), x0, atol=0.1)
