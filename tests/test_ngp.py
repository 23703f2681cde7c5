"""The instance field: configurations, released numbers, the viewing direction."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import ngp
import presets
import volume
from tests.support import parity
from tests.support.fields import TINY, random_rays, released_field, seeded
from volume import Occupancy


# ---------------------------------------------------------------------------------------------- configurations

@pytest.mark.parametrize("change, words", [
    ({"levels": 0}, "levels 0 is not from 1 to 64"),
    ({"hidden_layers": -1}, "hidden_layers -1 is not from 0"),
    ({"bound": 0.0}, "bound 0.0 is not from 0.001"),
    ({"bound": float("nan")}, "bound nan is not from 0.001"),
    ({"near": float("nan")}, "near nan is not from 0 to inf"),
    ({"occupancy_alpha": 1.0}, "occupancy_alpha 1.0 is not from"),
    ({"occupancy_decay": 1.5}, "occupancy_decay 1.5 is not from 0 to 1"),
    ({"mask_threshold": 1.0}, "mask_threshold 1.0 is not from 0 to 0.999"),
    ({"forgiven_views": 0}, "forgiven_views 0 is not from 1"),
    ({"base_resolution": 200}, "base_resolution 200 is above finest_resolution 160"),
    ({"log2_hashmap_size": 27}, "5 levels of 2\\^27 rows"),
    ({"samples_per_ray": 2, "importance_samples": 4}, "samples_per_ray of at least 3, not 2"),
])
def test_numbers_that_do_not_fit_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as e:
        dataclasses.replace(presets.NANO_FIELD, **change)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("change", [{"levels": 1}, {"hidden_layers": 0}, {"samples_per_ray": 1}, {"base_resolution": 1},
                                    {"samples_per_ray": 3, "importance_samples": 4}, {"finest_resolution": 8}])
def test_numbers_that_just_fit(change):
    field = ngp.Field(dataclasses.replace(presets.NANO_FIELD, **change), seeded())
    rendering = volume.render(field, *random_rays(5), seeded())
    assert all(torch.isfinite(part).all() for part in rendering)


# ---------------------------------------------------------------------------------------------- parity

def test_field_agrees_with_the_released_one():
    field, f = released_field()
    density, color = field(f["in_x"])
    parity.assert_close(field.encoding(f["in_x"]), f["mid_encoding"], std=1e-3)
    parity.assert_close(field.blob(f["in_x"]), f["out_blob"], std=1e-3)
    parity.assert_close(density, f["out_sigma"], std=1e-3)
    parity.assert_close(field.density(f["in_x"]), f["out_sigma"], std=1e-3)
    parity.assert_close(color, f["out_albedo"], std=1e-3)


# ---------------------------------------------------------------------------------------------- field, by hand

def test_density_is_an_exponential_with_a_bounded_gradient():
    x = torch.tensor([-30.0, -15.0, 0.0, 3.0, 15.0, 20.0, 100.0], requires_grad=True)
    y = ngp._TruncatedExp.apply(x)
    y.sum().backward()
    assert torch.equal(y, x.exp()) and y[-1].isinf()
    assert torch.equal(x.grad, torch.tensor([-15.0, -15, 0, 3, 15, 15, 15]).exp())


def test_field_depends_on_its_generator_only():
    state = torch.get_rng_state()
    a, b, c = (ngp.Field(TINY, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]) and not torch.equal(value, c.state_dict()[key]), key
    assert a.encoding.table.abs().max() <= 1e-4
    density, color = a(torch.zeros(0, 3))
    (density.sum() + color.sum()).backward()  # no points, no error
    assert density.shape == (0,) and color.shape == (0, 3) and not a.encoding.table.grad.any()
    nano = ngp.Field(presets.NANO_FIELD, seeded())
    assert nano.density(torch.rand(100, 3) - 0.5).log().abs().max() < 0.5  # it starts as a thin fog


# --- the viewing direction ---

def test_spherical_harmonics_are_orthonormal():
    """Over the sphere, by a product rule that is exact for polynomials up to degree 6; of any length of the vectors."""
    z, weights = np.polynomial.legendre.leggauss(8)
    angle = torch.arange(16) * (2 * math.pi / 16)
    z = torch.tensor(z, dtype=torch.float64)[:, None].expand(8, 16)
    radius = (1 - z**2).sqrt()
    directions = torch.stack([radius * angle.cos(), radius * angle.sin(), z], -1).reshape(-1, 3)
    weights = torch.tensor(weights)[:, None].expand(8, 16).reshape(-1) * (2 * math.pi / 16)
    values = ngp.spherical_harmonics(2.5 * directions, 4)
    parity.assert_close(values.T @ (weights[:, None] * values), torch.eye(16, dtype=torch.float64), atol=1e-6)
    assert torch.equal(ngp.spherical_harmonics(directions, 2), ngp.spherical_harmonics(directions, 4)[:, :4])


def test_the_viewing_direction_colors_and_nothing_else():
    field = ngp.Field(dataclasses.replace(TINY, view_degree=3), seeded())
    x, directions = torch.rand(20, 3, generator=seeded(1)), torch.randn(20, 3, generator=seeded(2))
    density, color = field(x)
    for given in (directions, -directions):  # at first it adds nothing
        parity.assert_close(field(x, given)[1], color, atol=1e-6)
    field.view_mlp[-1].weight.data.normal_(generator=seeded(3))
    seen = field(x, directions)
    assert torch.equal(seen[0], density) and not torch.equal(seen[1], color)
    assert not torch.allclose(seen[1], field(x, -directions)[1]) and torch.equal(field(x)[1], color)
    parity.assert_close(field(x, 3 * directions)[1], seen[1], atol=1e-6)
    without = ngp.Field(TINY, seeded())
    assert without.view_mlp is None and torch.equal(without(x, directions)[1], without(x)[1])


def test_a_direction_teaches_the_layers_below():
    """Its network's gradient in the hidden layer and in the table, by finite differences."""
    config = dataclasses.replace(TINY, view_degree=2)
    field = ngp.Field(config, seeded()).double()
    field.view_mlp[-1].weight.data.normal_(generator=seeded(3))
    field.encoding.table.data.normal_(generator=seeded(4))
    x, directions = torch.rand(20, 3, generator=seeded(1)).double(), torch.randn(20, 3, generator=seeded(2)).double()

    def total():
        return field(x, directions)[1].square().sum()

    weight = field.mlp[0].weight
    total().backward()
    step = torch.randn(weight.shape, generator=seeded(5)).double()
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            weight += sign * 1e-5 * step
            ends.append(total())
    parity.assert_close((weight.grad * step).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_field_that_learns_on_a_gpu_rounds_a_little():
    """To 8 bits of the network's numbers, and so of its gradients; a finished field rounds nothing."""
    config = dataclasses.replace(TINY, view_degree=2)
    x, directions = torch.rand(500, 3, generator=seeded(1)).cuda(), torch.randn(500, 3, generator=seeded(2)).cuda()
    table = torch.randn(ngp.Field(config).encoding.table.shape, generator=seeded(3))
    outputs, gradients = {}, {}
    for learning in (True, False):
        field = ngp.Field(config, seeded()).cuda().train(learning)
        field.encoding.table.data.copy_(table)
        density, color = outputs[learning] = field(x, directions)
        (density.log().sum() + color.sum()).backward()
        gradients[learning] = [parameter.grad for parameter in field.parameters()]
        assert density.dtype == color.dtype == torch.float32
    assert not torch.equal(outputs[True][1], outputs[False][1])
    parity.assert_close(outputs[True][1], outputs[False][1], atol=0.01)
    for rounded, exact in zip(gradients[True], gradients[False]):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() <= 0.02 * exact.norm()
    on_cpu = ngp.Field(config, seeded()).eval()
    on_cpu.encoding.table.data.copy_(table)
    parity.assert_close(outputs[False][1].cpu(), on_cpu(x.cpu(), directions.cpu())[1], atol=1e-4)


def test_a_rendering_gives_the_field_its_directions():
    field, occupancy = ngp.Field(dataclasses.replace(TINY, view_degree=2), seeded()), Occupancy(TINY)
    field.view_mlp[-1].weight.data.normal_(generator=seeded(3))
    rays_o, rays_d = random_rays(5)
    evaluated = []
    forward = field.forward
    field.forward = lambda x, directions=None: evaluated.append((x, directions)) or forward(x, directions)
    for skip in (None, occupancy):
        volume.render(field, rays_o, rays_d, None, skip)
        x, directions = evaluated[-1]
        along = torch.linalg.cross(x - rays_o[0], rays_d[0].expand_as(x)).norm(dim=-1) < 1e-4
        assert along.sum() >= 5 and (directions[along] == rays_d[0]).all()


def test_wrong_degrees_of_the_viewing_direction():
    for change in ({"view_degree": 5}, {"view_degree": 1, "hidden_layers": 0}):
        with pytest.raises(ValueError, match="view_degree"):
            dataclasses.replace(TINY, **change)
