"""The numbers of a distillation (Sec. 3.2 and supplement): one dataclass, three presets, and what `--released` stands
for.

`paper` has the released sizes, rates and lengths, `nano` those for the sample categories and for CPUs, `plain` those
for photographs without a prior. docs/differences.md says where and why they differ from the released code.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import ngp
import vldm
from ngp import FieldConfig

MOST_FURTHER = 20_000  # iterations that many input views may add
LONG = 4000  # iterations from which on a field without a prior learns more from several rays a pixel than from one


@dataclass(frozen=True)
class DistillConfig:
    """The numbers of one distillation. The defaults are the released ones; `RELEASED` adds what the released code does
    otherwise.
    """
    iterations: int = 3000               # updates of each kind [released: demo.py:101]
    bootstrap: int = 1001                # first iterations, fit to the EFT images [released: distillation.py:156, 294]
    viewpoints: int = 50                 # query viewpoints on the circle path [released: distillation.py:73]
    jitter: float = 0.17                 # radians; random swing of each of them [released: distillation.py:73]
    image_size: int = 256                # S of the pictures where there is no prior to say
    render_size: int = 128               # s of a rendering, upsampled to S [released: distillation.py:85]
    input_pixels: int = 0                # random pixels of all input views an update; 0: a lattice of one view's
    pixel_side: int = 1                  # rays a side of the square of each of these, whose mean is its color
    picture_side: int = 1                # the same for the pixels of pictures of the finished field
    lr_grid: float = 5e-3                # Adam's rate for the encoding's table [released: network_grid.py:223-228]
    lr_mlp: float = 5e-4                 # Adam's rate for the network, from the same lines
    # The rates fall exponentially to this fraction by the end; 1: constant [released: distillation.py:166, 247, 352].
    final_lr_fraction: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's decay rates [released: distillation.py:165]
    eps: float = 1e-8                    # Adam's smallest denominator [released: distillation.py:165]
    lr_exposure: float = 0.0             # Adam's rate for the gains of the input views; 0: all were exposed alike
    weight_exposure: float = 0.3         # of the gains' spread; at 0 the colors of two sides become gains
    blur: int = 1                        # pixels a side, odd, of the squares over which input views are blurred
    weight_background: float = 1.0       # of pixels outside an input's mask; below 1 where masks are rough
    weight_opacity: float = 1e-3         # of the opacity term [released: distillation.py:150-151]
    weight_perceptual: float = 0.1       # of the perceptual term of distillation [released: distillation.py:312-314]
    min_noise_level: float = 0.0         # noise levels are drawn from U(this, 1)
    # Query views denoised at once, each the target of one of as many iterations; a GPU divides those above 32.
    denoise_batch: int = 1
    # Input views that these numbers are for; more of them bear a finer field (`fitted`). 0: the numbers stay.
    reference_views: int = 0
    iterations_per_view: int = 0         # that each input view beyond those adds
    occupancy_every: int = 16            # iterations between two looks at where space is empty
    mesh_resolution: int = 160           # cells along the longest side of the meshed box
    turntable_frames: int = 36           # pictures of the turntable
    eft_train_mode: bool = False         # dropout and batch statistics on [released: load_model.py:33-45, 179]
    metrics_on_inputs: bool = False      # measure input views, too [released: distillation.py:395-443]
    sampler: vldm.SamplerConfig = vldm.PAPER_SAMPLER
    field: FieldConfig = ngp.PAPER

    def __post_init__(self):
        # Each number for itself.
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        if max(self.betas) >= 1 or min(self.betas) < 0:
            raise ValueError(f"betas {self.betas} must be at least 0 and below 1")

        # Numbers that must fit each other, and those with an upper end.
        if not 0 <= self.bootstrap <= self.iterations:
            raise ValueError(f"bootstrap {self.bootstrap} is not between 0 and the {self.iterations} iterations")
        if self.blur < 1 or self.blur % 2 == 0:
            raise ValueError(f"blur {self.blur} is not an odd number of pixels")
        if not 0 <= self.min_noise_level <= 1:
            raise ValueError(f"min_noise_level {self.min_noise_level} is not in [0, 1]")
        if not 0 < self.final_lr_fraction:
            raise ValueError(f"final_lr_fraction {self.final_lr_fraction} is not above 0")

    def with_iterations(self, iterations: int) -> DistillConfig:
        """The same for another number of iterations: the bootstrap keeps its length, but takes at most two thirds of
        them.
        """
        return replace(self, iterations=iterations, bootstrap=min(self.bootstrap, iterations * 2 // 3),
                       iterations_per_view=0)

    def fitted(self, views: int) -> DistillConfig:
        """The same for a number of input views: each further one sees details that a finer grid can hold, with fewer
        pixels blurred into its cells, more samples to find them and more iterations to learn them.
        """
        # How many times as many views as these numbers are for.
        growth = views / self.reference_views if self.reference_views else 1.0
        if growth <= 1:
            return replace(self, reference_views=0, iterations_per_view=0)

        # More views determine finer cells, and more samples find them.
        field = replace(
            self.field,
            levels=self.field.levels + round(min(math.log2(growth), 4)),
            finest_resolution=min(round(self.field.finest_resolution * growth), 1024),
            log2_hashmap_size=self.field.log2_hashmap_size + round(min(math.log2(growth), 4) / 2),
            samples_per_ray=min(round(self.field.samples_per_ray * growth**0.5), 192),
            occupancy_cells=min(round(self.field.occupancy_cells * growth**0.5), 128),
        )

        # That is more to learn, of colors less blurred.
        further = min(self.iterations_per_view * (views - self.reference_views), MOST_FURTHER)
        iterations = self.iterations + further
        blur = max(round(self.blur / growth / 2 - 0.5), 0) * 2 + 1  # odd
        fitted = replace(self, field=field, iterations=iterations, blur=blur, reference_views=0, iterations_per_view=0)

        # Where there is time for it, what a pixel sees beside its center.
        if iterations < LONG:
            return fitted
        return replace(fitted, pixel_side=2 * self.pixel_side, input_pixels=math.ceil(self.input_pixels / 2))


_LEAST = {"iterations": 1, "viewpoints": 1, "jitter": 0, "image_size": 1, "render_size": 2, "lr_grid": 0, "lr_mlp": 0,
          "eps": 0, "lr_exposure": 0, "weight_exposure": 0, "weight_background": 0, "weight_opacity": 0,
          "weight_perceptual": 0, "input_pixels": 0, "pixel_side": 1, "picture_side": 1, "reference_views": 0,
          "iterations_per_view": 0, "denoise_batch": 1, "occupancy_every": 1, "mesh_resolution": 1,
          "turntable_frames": 1}

# The learning rates, their decay and the numbers of Adam (Instant NGP's, Sec. 4) in `nano` and `plain` are not the
# released ones: they are what measured best on the tuning toys.
PRESETS = {
    # As many samples as NeRF's two passes, in one: where empty space is skipped it finds as much.
    "paper": DistillConfig(denoise_batch=32, field=replace(ngp.PAPER, samples_per_ray=128, importance_samples=0)),
    "nano": DistillConfig(
        iterations=300, bootstrap=20, viewpoints=24, image_size=128, render_size=64,
        lr_grid=5e-2, lr_mlp=1e-2, final_lr_fraction=0.1, betas=(0.9, 0.99), eps=1e-15,
        min_noise_level=0.2, denoise_batch=8, sampler=vldm.NANO_SAMPLER, field=ngp.NANO,
    ),
    # Photographs without a prior, a dozen of them or more: highlights move, exposure varies, masks are rough, and
    # resizing without a filter aliases. (The gains of the exposures are NeRF in the Wild's appearance codes,
    # Martin-Brualla et al. 2021, reduced to three numbers a view.)
    "plain": DistillConfig(
        iterations=1000, bootstrap=666, image_size=256, render_size=64, input_pixels=4096, picture_side=2,
        lr_grid=3e-2, lr_mlp=1e-2, final_lr_fraction=0.05, betas=(0.9, 0.99), eps=1e-15,
        lr_exposure=1e-2, blur=3, weight_background=0.3, reference_views=12, iterations_per_view=160,
        field=replace(ngp.NANO, levels=6, finest_resolution=96, log2_hashmap_size=17, samples_per_ray=64,
                      view_degree=4),
    ),
}

# What `--released` stands for: the released code's behavior, where ours differs in some preset and a field can say so.
# Sizes, learning rates and lengths stay the preset's.
RELEASED = (
    "field.hashed=false",
    "field.carve=false",
    "denoise_batch=1",
    "input_pixels=0",
    "picture_side=1",
    "reference_views=0",
    "sampler.solver=plms",
    "sampler.plms_steps=50",
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


