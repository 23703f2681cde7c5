"""Presets of the tests."""
from dataclasses import replace

import eft
import sparsefusion
import unet
import vae
import vldm

# The released structure (every released key exists), thinner.
SMALL = sparsefusion.Preset(
    name="paper",
    image_size=256,
    eft=replace(eft.EFTConfig(), stem=8, stages=(8, 16, 24), width=32, feedforward=32),
    vae=vae.VAEConfig(widths=(32, 64, 96, 96)),
    unet=unet.UNetConfig(cond_channels=32, widths=(16, 16, 32, 64, 64), heads=2, head_dim=8, time_dim=32, token_dim=16),
    diffusion=vldm.DiffusionConfig(),
)
