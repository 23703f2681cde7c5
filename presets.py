"""The numbers side by side: models (`MODELS`), distillations (`PRESETS`), and what `--released` stands for.

The defaults of every config are the paper's, or the released code's where the paper says nothing: `PAPER` changes none
of them. `NANO` has the same classes, small, for the sample categories and for CPUs, and is what the shipped weights
are. `plain` is for photographs without a prior. docs/differences.md says where and why they differ from the released
code.
"""
from __future__ import annotations

from dataclasses import replace

from distillation import DistillConfig
from eft import EFTConfig
from ngp import FieldConfig
from sparsefusion import Preset
from unet import UNetConfig
from vae import VAEConfig
from vldm import DiffusionConfig, SamplerConfig


# ---------------------------------------------------------------------------------------------- models

PAPER = Preset(
    name="paper",
    image_size=256,
    eft=EFTConfig(),
    vae=VAEConfig(),
    unet=UNetConfig(),
    diffusion=DiffusionConfig(),
)
# An EFT that knows no units, a latent of four times the numbers by an autoencoder that takes four pixels as one, a UNet
# of two stages.
NANO = Preset(
    name="nano",
    image_size=128,
    eft=EFTConfig(stem=32, stages=(32, 64, 96), width=96, layers=2, feedforward=96, dropout=0.0, relative=True,
                  depths=10),
    vae=VAEConfig(channels=16, patch=2, widths=(48, 80, 96), groups=8, blocks=1),
    unet=UNetConfig(channels=16, cond_channels=96, cond_unshuffle=2, widths=(96, 96, 96), attention=(True, True),
                    kernels=(3,), heads=4, head_dim=32, time_dim=192, token_dim=96),
    diffusion=DiffusionConfig(prediction="v", snr_gamma=0.0, noisings=24),
)
MODELS = {preset.name: preset for preset in (PAPER, NANO)}


# ---------------------------------------------------------------------------------------------- distillations

# Two calls of DPM-Solver++ do for the nano prior what PLMS does in six (docs/results.md).
NANO_SAMPLER = SamplerConfig(solver="dpmpp", denoise_steps=2, sample_steps=50, clip=5.0, t_start=0.98)

# For the sample category and for CPUs: fewer, wider levels and a smaller network cost less.
NANO_FIELD = FieldConfig(levels=5, features_per_level=4, base_resolution=8, finest_resolution=160, width=32,
                         hidden_layers=1, blob_density=0.0, samples_per_ray=48, importance_samples=0,
                         occupancy_cells=48, occupancy_decay=0.8)

# The learning rates, their decay and the numbers of Adam (Instant NGP's, Sec. 4) in `nano` and `plain` are not the
# released ones: they are what measured best on the tuning toys.
PRESETS = {
    # As many samples as NeRF's two passes, in one: where empty space is skipped it finds as much.
    "paper": DistillConfig(denoise_batch=32, field=FieldConfig(samples_per_ray=128, importance_samples=0)),
    "nano": DistillConfig(
        iterations=300, bootstrap=20, viewpoints=24, image_size=128, render_size=64, picture_side=2,
        lr_grid=5e-2, lr_mlp=1e-2, final_lr_fraction=0.1, betas=(0.9, 0.99), eps=1e-15,
        min_noise_level=0.8, denoise_batch=8, prior_views=3.0, lr_exposure=1e-2, sampler=NANO_SAMPLER,
        field=NANO_FIELD,
    ),
    # Photographs without a prior, a dozen of them or more: highlights move, exposure varies, masks are rough, and
    # resizing without a filter aliases. (The gains of the exposures are NeRF in the Wild's appearance codes,
    # Martin-Brualla et al. 2021, reduced to three numbers per view.)
    "plain": DistillConfig(
        iterations=1000, bootstrap=666, image_size=256, render_size=64, input_pixels=4096, picture_side=2,
        lr_grid=3e-2, lr_mlp=1e-2, final_lr_fraction=0.05, betas=(0.9, 0.99), eps=1e-15,
        lr_exposure=1e-2, blur=3, weight_background=0.3, reference_views=12, iterations_per_view=65,
        field=replace(NANO_FIELD, levels=6, finest_resolution=96, log2_hashmap_size=17, samples_per_ray=64,
                      view_degree=4),
    ),
}

# What `--released` stands for: the released code's behavior, where ours differs in some preset and a field can say so.
# Sizes, learning rates and lengths stay the preset's.
RELEASED = (
    "half_side=0",
    "prior_views=0",
    "field.hashed=false",
    "field.carve=false",
    "denoise_batch=1",
    "input_pixels=0",
    "picture_side=1",
    "reference_views=0",
    "sampler.solver=plms",
    "sampler.denoise_steps=50",
    "sampler.ancestral=true",
    "sampler.unnoised_start=true",
    "sampler.t_start=1",  # or no noise level is high enough for `unnoised_start`
    "sampler.sample_steps=500",
    "min_noise_level=0",
    "betas=0.9,0.999",
    "eps=1e-8",
    "final_lr_fraction=1",
    "lr_exposure=0",
    "blur=1",
    "field.view_degree=0",
    "weight_background=1",
    "eft_train_mode=true",
    "metrics_on_inputs=true",
)
