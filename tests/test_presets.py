"""The numbers of a distillation: what fits, the presets, the released ones, more photographs."""
from dataclasses import replace

import pytest

import distillation
import ngp
import presets
import train
import vldm
from common import cli
from distillation import DistillConfig
from gpu import graphs
from tests.support.small import SHORT


@pytest.mark.parametrize("change, words", [
    ({"iterations": 0}, "iterations 0 is not from 1"), ({"bootstrap": 7}, "bootstrap 7"), ({"blur": 2}, "blur 2"),
    ({"min_noise_level": 1.5}, "min_noise_level"), ({"final_lr_fraction": 0.0}, "final_lr_fraction"),
    ({"render_size": 1}, "render_size"), ({"betas": (0.9, 1.0)}, "betas"), ({"lr_grid": -1.0}, "lr_grid"),
    ({"weight_opacity": -1.0}, "weight_opacity"), ({"denoise_batch": 0}, "denoise_batch"),
    ({"turntable_frames": -1}, "turntable_frames"),
    ({"input_pixels": 2**23}, "8388608 rays of an update have 134217728 samples"),
    ({"input_pixels": 2**21, "pixel_side": 2}, "8388608 rays of an update have 134217728 samples")])
def test_numbers_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SHORT, **change)


@pytest.mark.parametrize("config", [SHORT, train.TrainConfig()])
@pytest.mark.parametrize("most", [10**8 + 1, 10**4000], ids=["9 digits", "4001 digits"])
def test_every_number_of_things_has_an_upper_end(config, most):
    """Told before memory is reserved for it, and before it has taken years."""
    names = [name for name, kind in cli.field_types(type(config)).items() if kind is int]
    assert len(names) > 20
    for name in names:
        with pytest.raises(ValueError, match=f"^--set {name}=10") as e:
            cli.apply_settings(config, [f"{name}={most}"])
        assert name.split(".")[-1] in str(e.value).partition(": ")[2], e.value


def test_fewer_iterations_shorten_the_bootstrap_only_where_they_must():
    paper = presets.PRESETS["paper"]
    assert paper.with_iterations(2000).bootstrap == 1001 and paper.with_iterations(900).bootstrap == 600
    assert paper.with_iterations(1).bootstrap == 0


def test_the_paper_preset_has_the_released_numbers():
    paper = presets.PRESETS["paper"]
    assert (paper.iterations, paper.bootstrap, paper.render_size) == (3000, 1001, 128)
    released = replace(DistillConfig(), denoise_batch=32, field=replace(ngp.FieldConfig(), samples_per_ray=128,
                                                                        importance_samples=0))
    assert paper == released
    assert (paper.betas, paper.eps, paper.final_lr_fraction) == ((0.9, 0.999), 1e-8, 1)
    assert (paper.sampler.denoise_steps, paper.sampler.sample_steps) == (50, 500)
    nano, plain = presets.PRESETS["nano"], presets.PRESETS["plain"]
    assert (nano.sampler.solver, nano.sampler.denoise_steps, nano.denoise_batch) == ("dpmpp", 2, 8)
    assert (plain.blur, plain.field.view_degree, nano.blur, nano.field.view_degree) == (3, 4, 1, 0)
    assert plain.picture_side == nano.picture_side == 2
    assert max(paper.denoise_batch, nano.denoise_batch) <= graphs.SIZES[-1]  # or a GPU would divide a batch
    for name, fraction in (("nano", 0.1), ("plain", 0.05)):
        tuned = presets.PRESETS[name]
        assert (tuned.betas, tuned.eps, tuned.final_lr_fraction) == ((0.9, 0.99), 1e-15, fraction)


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=presets.PRESETS)
def test_the_released_settings_fit_every_preset(preset):
    """Whatever the preset, the same behavior comes out; only sizes, rates and the length of things are its own."""
    config = cli.apply_settings(preset, presets.RELEASED)
    paper = cli.apply_settings(presets.PRESETS["paper"], presets.RELEASED)
    same = ("betas", "eps", "final_lr_fraction", "min_noise_level", "eft_train_mode", "metrics_on_inputs", "blur",
            "lr_exposure", "weight_background", "weight_opacity", "weight_perceptual")
    assert all(getattr(config, name) == getattr(paper, name) for name in same)
    assert not config.field.hashed and not config.field.carve and config.eft_train_mode and config.metrics_on_inputs
    assert config.sampler.ancestral and config.sampler.unnoised_start
    assert (config.sampler.solver, config.sampler.denoise_steps, config.sampler.sample_steps) == ("plms", 50, 500)
    assert vldm.start_time(0.99, config.sampler) == 1
    assert (config.iterations, config.lr_grid) == (preset.iterations, preset.lr_grid)
    assert (config.denoise_batch, config.input_pixels, config.picture_side, config.field.view_degree) == (1, 0, 1, 0)
    assert config.fitted(100) == replace(config, iterations_per_view=0)


def test_more_and_larger_photographs_bear_a_finer_field():
    plain = presets.PRESETS["plain"]
    assert plain.fitted(2) == plain.fitted(12) == replace(plain, reference_views=0, iterations_per_view=0)
    assert replace(plain, image_size=800).fitted(12).field == plain.field
    many = plain.fitted(100)
    assert (many.field.finest_resolution, many.iterations, many.blur) == (800, 6720, 1)
    assert (many.field.samples_per_ray, many.field.bins_per_ray, many.field.occupancy_cells) == (64, 256, 139)
    assert many.input_pixels * many.pixel_side**2 == 2 * plain.input_pixels and many.fitted(100) == many
    assert plain.fitted(1000).iterations == plain.iterations + distillation.MOST_FURTHER
    assert replace(plain, image_size=128).fitted(100).field == many.field
    large = replace(plain, image_size=1024).fitted(100)
    assert (large.field.finest_resolution, large.field.samples_per_ray, large.iterations) == (2048, 128, 12440)
    assert large.field.log2_hashmap_size == many.field.log2_hashmap_size + 2
    short = plain.with_iterations(800).fitted(100)  # what is asked for stays, and costs little
    assert (short.iterations, short.input_pixels, short.pixel_side) == (800, plain.input_pixels, 1)
    assert short.field == replace(many.field, width=32, samples_per_ray=32) and many.field.width == 64
    nano = presets.PRESETS["nano"]
    assert nano.fitted(100) == nano
