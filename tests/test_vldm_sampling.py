"""The samplers against the released code's numbers, and on Gaussian data, where all is known exactly."""
import math

import pytest
import torch

import vldm
from checkpoints import released
from tests.support import parity
from tests.support.denoisers import Analytic, trajectory
from unet import UNetConfig
from vldm import VLDM, SamplerConfig, alpha_sigma, as_factor, cosine_log_snr, q_sample, x0_from_eps


# --- released numbers ---

def released_predictor(z, log_snr):
    """What stands in for the network in diffusion.npz."""
    return 0.1 * z + 0.05 * log_snr.sin().reshape(-1, 1, 1, 1)


def replay(draws):
    """A `randn` that hands out recorded draws one after the other; `randn.left` are those not drawn."""
    def randn():
        return randn.left.pop(0)
    randn.left = list(draws)
    return randn


def test_sampling_times_parity():
    expected = parity.load("diffusion")["out_sampling_times_500"]
    denoiser = Analytic(lambda z, log_snr: z)
    vldm.ancestral_sampling(denoiser, lambda: torch.zeros(1, 1, 1, 1), SamplerConfig(sample_steps=len(expected)))
    log_snrs = torch.cat([log_snr for _, log_snr, _ in denoiser.calls])
    parity.assert_close(log_snrs, cosine_log_snr(expected[:, 0]), rtol=1e-4, atol=1e-3)
    parity.assert_close(expected[1:, 0], expected[:-1, 1], atol=1e-6)


def released_plms(denoiser, latents, level, draws):
    """The released sampler: (noised start, latents, clean estimates, predictions, log-SNR of the calls).

    Of the recorded draws it uses number 0 for the start, 2 and 4 in the first step, 4 + 2k in step k. From level 0.99
    on it starts from the clean latent, and the noised one (draw 0) is computed for nothing.
    """
    calls, predict = [], denoiser.predict

    def recorded(z, log_snr, views):
        calls.append(log_snr[0])
        return predict(z, log_snr, views)

    denoiser.predict = recorded
    start = q_sample(latents, cosine_log_snr(torch.tensor(level)), draws[0])
    randn = replay(draws[2 if level >= 0.99 else 0::2])
    steps = trajectory(denoiser, latents, level, randn, ancestral=True, unnoised_start=True)
    z, x0, e = (torch.stack(x) for x in zip(*steps)) if steps else (start[None],) * 3
    return start, z, x0, e, torch.stack(calls) if calls else torch.empty(0)


@pytest.mark.parametrize("draw", ["zero", "rec"])
def test_plms_parity(draw):
    f = parity.load("diffusion")
    draws = f["in_plms_draws"] if draw == "rec" else torch.zeros_like(f["in_plms_draws"])
    for i, level in enumerate(f["in_plms_max_thres"].tolist()):
        std = 1e-3 if level >= 0.99 else 1e-4
        start, z, x0, e, calls = released_plms(Analytic(released_predictor), f["in_plms_latents"], level, draws)
        parity.assert_close(start, f[f"out_plms{i}_{draw}_x_noisy"], std=std)
        parity.assert_close(z[-1], f[f"out_plms{i}_{draw}_final"], std=std)
        log_snrs, steps = vldm.schedule([level], SamplerConfig())
        taken = f[f"out_plms{i}_t"]
        assert steps == [len(taken)]
        if steps != [0]:
            parity.assert_close(log_snrs[:-1, 0], cosine_log_snr(taken), rtol=1e-5, atol=1e-3)
            parity.assert_close(log_snrs[1:, 0], cosine_log_snr(f[f"out_plms{i}_t_next"]), rtol=1e-5, atol=1e-3)
            parity.assert_close(log_snrs[:-1, 0].sigmoid(), cosine_log_snr(taken).sigmoid(), atol=2e-6)
        parity.assert_close(calls, f[f"out_plms{i}_calls_log_snr"], rtol=1e-5, atol=1e-3)
        assert int(f[f"out_plms{i}_n_draws"]) == 1 + 2 * len(calls)
        alpha, _ = alpha_sigma(cosine_log_snr(torch.tensor([level])))
        parity.assert_close(alpha**2, f[f"out_plms{i}_alpha_cumprod"], rtol=1e-4)
        traced = level in f["in_plms_traj_thres"].tolist()
        for ours, name in ((z, "img"), (x0, "x0"), (e, "e")) if traced else ():
            parity.assert_close(ours, f[f"out_plms{i}_{draw}_{name}"], std=std)


def test_plms_parity_where_the_estimate_is_clipped():
    f = parity.load("diffusion")
    denoiser = Analytic(lambda z, log_snr: -3 * z + 0.4 * log_snr.sin().reshape(-1, 1, 1, 1))
    level = f["in_plms_max_thres"][4].item()
    _, z, x0, _, _ = released_plms(denoiser, 6 * f["in_plms_latents"], level, f["in_plms_draws"])
    parity.assert_close(z[-1], f["out_plms_clip_final"], std=1e-4)
    parity.assert_close(x0, f["out_plms_clip_x0"], std=1e-4)
    assert x0.abs().max() == SamplerConfig().clip


def test_plms_parity_from_noise():
    """No start latent: draw 0 is the start, draw 1 an unused noising, then as ever."""
    f = parity.load("diffusion")
    draws = f["in_plms_draws"]
    steps = trajectory(Analytic(released_predictor), None, 0.999, replay([draws[0], *draws[3::2]]), ancestral=True)
    parity.assert_close(steps[-1].latent, f["out_plms_noimage_final"], std=1e-3)
    assert int(f["out_plms_noimage_n_draws"]) == 2 + 2 * (len(steps) + 1)


@pytest.mark.parametrize("name", ["cs1", "cfg"])
def test_plms_parity_with_the_network(name):
    f = parity.load("plms_net")
    model = VLDM(UNetConfig(**parity.unet_settings("unet_small")))
    model.load_state_dict(parity.rename(parity.weights("unet_small"), released.PARTS["vldm"]))
    model.eval().requires_grad_(False)
    guidance = float(f["in_cond_scale"]) if name == "cfg" else 1.0
    denoiser = model.denoiser(f["in_cond"], SamplerConfig(guidance=guidance))
    start, z, _, e, calls = released_plms(denoiser, f["in_latents"], f["in_max_thres"].item(), f["in_draws"])
    assert len(z) == len(f["out_t"]) and int(f["out_n_draws"]) == 1 + 2 * len(calls)
    for ours, what in ((start, "x_noisy"), (z[-1], "final"), (z, "img"), (e, "e")):
        parity.assert_close(ours, f[f"out_{name}_{what}"], std=1e-4)


def test_ancestral_parity():
    f = parity.load("diffusion")
    randn = replay(f["in_ddpm_draws"])
    sampler = SamplerConfig(sample_steps=len(f["in_ddpm_draws"]) - 1)
    z = vldm.ancestral_sampling(Analytic(released_predictor), randn, sampler)
    parity.assert_close(z, f["out_ddpm12_final"], std=1e-3)
    assert len(randn.left) == 1  # the released loop draws in its last step too


# --- Gaussian data, where the best prediction is known ---

@pytest.mark.parametrize("mu, s", [(0.5, 1.0), (-1.0, 0.4)])
def test_ancestral_samples_the_data(gaussian, noise, mu, s):
    x = vldm.ancestral_sampling(gaussian(mu, s), noise(2, 10000), SamplerConfig(sample_steps=200))
    assert abs(x.mean() - mu) < 0.03 * s and abs(x.std() / s - 1) < 0.03


@pytest.mark.parametrize("mu, s", [(0.5, 1.0), (-1.0, 0.4)])
def test_plms_from_noise_samples_the_data(gaussian, noise, mu, s):
    *_, (x, estimate, _) = trajectory(gaussian(mu, s), None, 0.98, noise(2, 10000))
    assert abs(x.mean() - mu) < 0.03 * s and abs(x.std() / s - 1) < 0.03
    assert abs(estimate.mean() - mu) < 0.03 * s


def first_order(denoiser, z, level, steps):
    """DDIM without noise (Song et al. 2021, Eq. 12)."""
    log_snrs = vldm.schedule([level], SamplerConfig(denoise_steps=steps))[0][:, 0].double()
    for a, b in zip(log_snrs, log_snrs[1:]):
        eps = denoiser.predict_noise(z, a)
        alpha, sigma = alpha_sigma(b)
        z = alpha * x0_from_eps(z, a, eps) + sigma * eps
    return z


@pytest.mark.parametrize("level, steps", [(0.98, 10), (0.9, 10), (0.9, 25), (0.5, 5), (0.5, 10), (0.5, 25)])
def test_plms_follows_the_exact_path_closer_than_first_order_steps(gaussian, noise, level, steps):
    mu, s = 0.7, 0.6
    alpha, sigma = alpha_sigma(cosine_log_snr(torch.tensor(level)).double())
    x0 = mu + s * noise(5000, 1, seed=1, dtype=torch.float64)()
    eps = noise(5000, 1, seed=2, dtype=torch.float64)()
    z = alpha * x0 + sigma * eps
    exact = mu + s * (z - alpha * mu) / (alpha**2 * s**2 + sigma**2).sqrt()  # where the probability flow takes z
    x = vldm.denoise(gaussian(mu, s), x0, [level] * 5000, lambda: eps, SamplerConfig(denoise_steps=steps))
    simple = first_order(gaussian(mu, s), z, level, steps)
    error, baseline = ((result - exact).pow(2).mean().sqrt() / s for result in (x, simple))
    assert error < 0.25 * baseline and error < (0.03 if steps > 5 else 0.01)


def test_plms_draws_once_and_the_released_one_at_every_step(gaussian):
    count = []
    randn = lambda: count.append(1) or torch.zeros(1, 1)
    n = len(trajectory(gaussian(0, 1), torch.zeros(1, 1), 0.3, randn, denoise_steps=20))
    assert (n, len(count)) == (12, 1)
    trajectory(gaussian(0, 1), torch.zeros(1, 1), 0.3, randn, denoise_steps=20, ancestral=True)
    assert len(count) == 1 + 1 + 12  # start, Euler trial, every step but the last


@pytest.mark.parametrize("level, n", [(0.0, 0), (0.009, 0), (0.011, 1), (0.29, 28), (0.5, 50), (0.989, 50), (1.0, 50)])
def test_number_of_denoise_steps(gaussian, noise, level, n):
    """Double precision, left to right: 0.29 gives 28. One step suffices; below 0.01 the start is the result."""
    x0, randn = torch.zeros(1, 4, 2, 2), noise(1, 4, 2, 2)
    steps = trajectory(gaussian(0, 1), x0, level, randn)
    assert len(steps) == n and all(torch.isfinite(x).all() for step in steps for x in step)
    start = q_sample(x0, cosine_log_snr(torch.tensor(level)), noise(1, 4, 2, 2)())
    last = steps[-1].latent if steps else start
    assert torch.equal(vldm.denoise(gaussian(0, 1), x0, [level], noise(1, 4, 2, 2), SamplerConfig()), last)


@pytest.mark.parametrize("level", [0.0, 0.005, 0.2, 0.49, 0.5, 0.97, 0.98, 1.0])
@pytest.mark.parametrize("ancestral", [False, True])
def test_one_step_is_one_call_and_its_clean_estimate(gaussian, noise, level, ancestral):
    sampler = SamplerConfig(denoise_steps=1, t_start=0.98, ancestral=ancestral)
    best = gaussian(0.3, 0.7)
    best.clip = 5.0
    x0 = 0.3 + 0.7 * noise(3, 4, 2, 2, seed=1)()
    draws = replay([noise(3, 4, 2, 2)()])
    result = vldm.denoise(best, x0, [level] * 3, draws, sampler)
    log_snr = cosine_log_snr(torch.tensor(min(level, 0.98)))
    z = q_sample(x0, log_snr, noise(3, 4, 2, 2)())
    (seen_z, seen_log_snr, eps), = best.calls
    assert torch.equal(seen_z, z) and torch.equal(seen_log_snr, log_snr.expand(3))
    assert torch.equal(result, x0_from_eps(z, log_snr, eps).clamp(-5, 5)) and not draws.left
    # Which is the mean of what is possible, and near t = 0 the latent itself.
    alpha, sigma = alpha_sigma(log_snr)
    mean = 0.3 + alpha * 0.7**2 / (alpha**2 * 0.7**2 + sigma**2) * (z - alpha * 0.3)
    parity.assert_close(result, mean, atol=1e-4)
    if level < 0.01:
        parity.assert_close(result, x0, atol=0.1)


def test_higher_levels_are_lowered_to_where_sampling_starts(gaussian, noise):
    x0, sampler = torch.full((1, 4, 2, 2), 0.5), SamplerConfig(denoise_steps=10, t_start=0.98)
    below, at, above, highest = (vldm.denoise(gaussian(0, 1), x0, [level], noise(1, 4, 2, 2), sampler)
                                 for level in (0.97, 0.98, 0.995, 1.0))
    assert torch.equal(at, above) and torch.equal(at, highest) and not torch.equal(at, below)


def test_high_levels_start_from_the_noised_latent_unless_told_otherwise(noise):
    x0 = torch.full((1, 4, 2, 2), 3.0)

    def start(level, **numbers):
        sampler = SamplerConfig(**numbers)
        return vldm.noised(x0, vldm.schedule([level], sampler)[0][0], [level], noise(1, 4, 2, 2), sampler)

    assert torch.equal(start(0.99), start(1.0))  # from t = 1
    parity.assert_close(start(1.0), noise(1, 4, 2, 2)(), atol=1e-4)
    assert start(0.99, unnoised_start=True) is x0
    parity.assert_close(start(0.0), x0, atol=0.1)


# --- solvers of fewer calls ---

def error_of(solver, steps, gaussian, noise, level=0.9):
    """Root mean square distance from where the probability flow takes noised Gaussian data, in their spread."""
    mu, s = 0.7, 0.6
    alpha, sigma = alpha_sigma(cosine_log_snr(torch.tensor(level)).double())
    x0 = mu + s * noise(2000, 1, seed=1, dtype=torch.float64)()
    eps = noise(2000, 1, seed=2, dtype=torch.float64)()
    z = alpha * x0 + sigma * eps
    end_alpha, end_sigma = alpha_sigma(cosine_log_snr(torch.zeros(())).double())
    spread = ((end_alpha**2 * s**2 + end_sigma**2) / (alpha**2 * s**2 + sigma**2)).sqrt()
    exact = end_alpha * mu + spread * (z - alpha * mu)
    sampler = SamplerConfig(solver=solver, denoise_steps=steps)
    x = vldm.denoise(gaussian(mu, s), x0, [level] * 2000, lambda: eps, sampler)
    return float((x - exact).pow(2).mean().sqrt() / s)


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpmpp", 2)])
def test_order_of_convergence(gaussian, noise, solver, order):
    """Twice the steps, an error of a half or of a quarter."""
    errors = [error_of(solver, steps, gaussian, noise) for steps in (10, 20, 40, 80)]
    rates = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert all(abs(rate - order) < 0.35 for rate in rates), (errors, rates)


def test_second_order_is_closer_than_first(gaussian, noise):
    for steps in (5, 10, 20):
        assert error_of("dpmpp", steps, gaussian, noise) < 0.5 * error_of("ddim", steps, gaussian, noise)


@pytest.mark.parametrize("solver, steps", [("ddim", 80), ("dpmpp", 20)])
@pytest.mark.parametrize("mu, s", [(0.5, 1.0), (-1.0, 0.4)])
def test_solvers_sample_the_data_from_noise(gaussian, noise, solver, steps, mu, s):
    x = trajectory(gaussian(mu, s), None, 0.98, noise(2, 10000), solver=solver, denoise_steps=steps)[-1].latent
    assert abs(x.mean() - mu) < 0.03 * s and abs(x.std() / s - 1) < 0.03


@pytest.mark.parametrize("solver, calls", [("plms", 11), ("ddim", 10), ("dpmpp", 10)])
def test_calls_of_a_solver(gaussian, noise, solver, calls):
    best = gaussian(0, 1)
    sampler = SamplerConfig(solver=solver, denoise_steps=10)
    vldm.denoise(best, torch.zeros(2, 4, 2, 2), [0.9, 0.9], noise(2, 4, 2, 2), sampler)
    assert [len(z) for z, _, _ in best.calls] == [2] * calls


@pytest.mark.parametrize("level, plms, others", [(0.0, 0, 0), (0.04, 0, 1), (0.06, 1, 2), (0.3, 6, 6), (0.5, 10, 10)])
def test_plms_rounds_its_steps_down_and_the_others_up(level, plms, others):
    for solver, steps in (("plms", plms), ("ddim", others), ("dpmpp", others)):
        assert vldm.schedule([level], SamplerConfig(solver=solver, denoise_steps=10))[1] == [steps]


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_solvers_in_log_snr_start_where_it_ends(gaussian, noise, solver):
    x0, sampler = torch.full((1, 4, 2, 2), 0.5), SamplerConfig(solver=solver, denoise_steps=4)
    below, at, highest = (vldm.denoise(gaussian(0, 1), x0, [level], noise(1, 4, 2, 2), sampler)
                          for level in (0.98, 0.99, 1.0))
    assert torch.equal(at, highest) and not torch.equal(at, below)
    log_snrs = vldm.schedule([1.0], sampler)[0][:, 0]
    parity.assert_close(log_snrs.diff(), log_snrs.diff()[:1].expand(4), rtol=1e-5)


def test_dpmpp_extrapolates_linearly_in_log_snr():
    x0, before = torch.full((2, 4, 1, 1), 3.0), torch.full((2, 4, 1, 1), 1.0)
    log_snrs = torch.tensor([[-4.0, 0.0], [-2.0, 1.0], [2.0, 1.5]])
    ahead = vldm.dpmpp_estimate([x0, before], log_snrs)
    assert torch.equal(vldm.dpmpp_estimate([x0], log_snrs), x0)
    assert torch.equal(ahead[:, 0, 0, 0], torch.tensor([3 + 2 / 2 * 2, 3 + 2 / 1 * 0.25]))


@pytest.mark.parametrize("solver", ["plms", "ddim", "dpmpp"])
def test_clean_latents_stay_within_the_clip(noise, solver):
    """Extrapolated ones, too."""
    denoiser = Analytic(lambda z, log_snr: -4 * z * log_snr.sin().reshape(-1, 1, 1, 1), clip=2.0)
    numbers = {"solver": solver, "denoise_steps": 7, "clip": 2.0}
    steps = trajectory(denoiser, 3 * noise(2, 4, 2, 2)(), 0.9, noise(2, 4, 2, 2), **numbers)
    assert all(step.x0.abs().max() <= 2 for step in steps) and any(step.x0.abs().max() == 2 for step in steps)


# --- images of a batch ---

LEVELS = [1.0, 0.7, 0.31, 0.12, 0.02]  # 10, 10, 6, 2 and 0 steps of PLMS


@pytest.mark.parametrize("numbers", [{"solver": "plms"}, {"solver": "ddim"}, {"solver": "dpmpp"}, {"ancestral": True},
                                     {"unnoised_start": True}, {"denoise_steps": 1}], ids=str)
def test_images_of_a_batch_do_not_mix(gaussian, noise, numbers):
    """Each image as if it were alone, whatever the others' levels."""
    sampler = SamplerConfig(**{"denoise_steps": 10} | numbers)
    x0, draws = noise(5, 4, 2, 2, seed=1)(), [noise(5, 4, 2, 2, seed=2 + i)() for i in range(12)]
    together = vldm.denoise(gaussian(0.2, 0.7), x0, LEVELS, replay(draws), sampler)
    for i, level in enumerate(LEVELS):
        one = slice(i, i + 1)
        alone = vldm.denoise(gaussian(0.2, 0.7), x0[one], [level], replay([x[one] for x in draws]), sampler)
        parity.assert_close(together[one], alone, atol=1e-5)


def test_an_image_that_is_done_leaves_the_batch(gaussian, noise):
    best = gaussian(0, 1)
    vldm.denoise(best, noise(5, 4, 2, 2)(), LEVELS, noise(5, 4, 2, 2), SamplerConfig(denoise_steps=10))
    assert [len(z) for z, _, _ in best.calls] == [4, 4, 4] + [3] * 4 + [2] * 4


@pytest.mark.parametrize("solver", ["plms", "ddim", "dpmpp"])
def test_images_come_in_any_order(gaussian, noise, solver):
    """The network is told whose latents it sees."""
    sampler = SamplerConfig(solver=solver, denoise_steps=10)
    x0, draw, order = noise(5, 4, 2, 2, seed=1)(), noise(5, 4, 2, 2)(), [3, 0, 4, 2, 1]
    shift = torch.arange(5.0)

    def denoiser(of):
        best = gaussian(0.2, 0.7)
        best.predict = lambda z, log_snr, views: best.predict_noise(z, log_snr) + 0.1 * as_factor(of[views], z)
        return best

    result = vldm.denoise(denoiser(shift), x0, LEVELS, lambda: draw, sampler)
    levels = [LEVELS[i] for i in order]
    other = vldm.denoise(denoiser(shift[order]), x0[order], levels, lambda: draw[order], sampler)
    parity.assert_close(other, result[order], atol=1e-5)
