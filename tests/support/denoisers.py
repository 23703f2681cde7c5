"""Denoisers that need no network, and what `vldm.denoise` did step by step."""
from typing import NamedTuple
from unittest.mock import patch

from torch import Tensor

import vldm
from vldm import Denoiser, SamplerConfig


class Analytic(Denoiser):
    """The denoiser of a function (z, log_snr) -> noise; `calls` are what it was called with and what it said."""

    def __init__(self, predict_noise, clip=10.0):
        self.predict_noise, self.prediction, self.clip, self.calls = predict_noise, "eps", clip, []

    def predict(self, z, log_snr, views):
        eps = self.predict_noise(z, log_snr)
        self.calls.append((z, log_snr, eps))
        return eps


class Step(NamedTuple):
    """A step of `vldm.denoise`, of the images that took it."""
    latent: Tensor  # where it led
    x0: Tensor      # the clean latent that led there
    eps: Tensor     # what the network had predicted before


def trajectory(denoiser, x0, noise_level, randn, **numbers):
    """Every step of `vldm.denoise`, all images from one noise level; from a draw where there is no x0."""
    sampler = SamplerConfig(**numbers)
    moves, predictions = [], []
    step, estimate = vldm.step, denoiser.estimate

    def recorded_step(*given):
        moves.append((step(*given), given[-1]))
        return moves[-1][0]

    def recorded_estimate(*arguments):
        predictions.append(estimate(*arguments))
        return predictions[-1]

    with patch.object(vldm, "step", recorded_step), patch.object(denoiser, "estimate", recorded_estimate):
        if x0 is None:
            x0 = randn()
            with patch.object(vldm, "noised", lambda x0, *_: x0):
                vldm.denoise(denoiser, x0, [noise_level] * len(x0), randn, sampler)
        else:
            vldm.denoise(denoiser, x0, [noise_level] * len(x0), randn, sampler)

    # The first step of PLMS was tried once before, and predicted from there.
    if sampler.solver == "plms":
        del moves[:1], predictions[1:2]
    return [Step(*move, eps) for move, (_, eps) in zip(moves, predictions, strict=True)]
