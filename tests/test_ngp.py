"""The instance field: configurations, released numbers, empty space, carving."""
import dataclasses
import math

import numpy as np
import pytest
import torch

import ngp
import parity
import volume
from cameras import Cameras, pixel_grid
from fields import TINY, Analytic, around, ball, centers, images, random_rays, released_field, seeded


# ---------------------------------------------------------------------------------------------- configurations

@pytest.mark.parametrize("change, words", [
    ({"levels": 0}, "levels must be at least 1, not 0"),
    ({"hidden_layers": -1}, "hidden_layers must be at least 0"),
    ({"bound": 0.0}, "bound must be positive"),
    ({"bound": float("nan")}, "bound must be positive"),
    ({"near": float("nan")}, "near must be at least 0"),
    ({"occupancy_alpha": 1.0}, "occupancy_alpha must be between 0 and 1"),
    ({"occupancy_decay": 1.5}, "occupancy_decay must be at most 1"),
    ({"mask_threshold": 1.0}, "mask_threshold must be below 1"),
    ({"forgiven_views": 0}, "forgiven_views must be at least 1"),
    ({"base_resolution": 200}, "base_resolution 200 is above finest_resolution 160"),
    ({"log2_hashmap_size": 29}, "5 levels of 2\\^29 rows"),
    ({"samples_per_ray": 2, "importance_samples": 4}, "samples_per_ray of at least 3, not 2"),
])
def test_numbers_that_do_not_fit_are_refused_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as e:
        dataclasses.replace(ngp.NANO, **change)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("change", [{"levels": 1}, {"hidden_layers": 0}, {"samples_per_ray": 1}, {"base_resolution": 1},
                                    {"samples_per_ray": 3, "importance_samples": 4}, {"finest_resolution": 8}])
def test_numbers_that_just_fit(change):
    field = ngp.Field(dataclasses.replace(ngp.NANO, **change), seeded())
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
    nano = ngp.Field(ngp.NANO, seeded())
    assert nano.density(torch.rand(100, 3) - 0.5).log().abs().max() < 0.5  # it starts as a thin fog


# ---------------------------------------------------------------------------------------------- empty space


def test_update_empties_cells_slowly_and_keeps_a_thin_field():
    field = ball(occupancy_cells=12, occupancy_decay=0.8)
    occupancy = ngp.Occupancy(field.config)
    fractions = []
    for step in range(6):
        occupancy.update(field, seeded(step))
        fractions.append(occupancy.occupied.float().mean().item())
    assert fractions[0] == 1 and 0.05 < fractions[-1] < 0.25  # twice the threshold, times 0.8 a step
    same = ngp.Occupancy(field.config)
    for step in range(6):
        same.update(field, seeded(step))
    assert torch.equal(same.occupied, occupancy.occupied)
    thin = Analytic(lambda x: 1e-4 + 4e-4 * (x[:, 0] > 0))
    occupancy = ngp.Occupancy(thin.config)
    for step in range(60):
        occupancy.update(thin)
    assert torch.equal(occupancy.occupied, centers(thin.config)[..., 0] > 0)


def test_a_cell_that_was_infinitely_dense_can_be_forgotten():
    dense = Analytic(lambda x: torch.full_like(x[:, 0], torch.inf), occupancy_decay=0.5)
    occupancy = ngp.Occupancy(dense.config)
    occupancy.update(dense)
    assert occupancy.occupied.all() and occupancy.density.isfinite().all()
    half = Analytic(lambda x: 1.0 * (x[:, 0] > 0))
    for _ in range(40):
        occupancy.update(half)
    assert torch.equal(occupancy.occupied, centers(half.config)[..., 0] > 0)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("gap, kept", [(0, True), (1, True), (2, True), (3, False)])
def test_a_mask_may_end_two_pixels_before_the_border(count, gap, kept):
    """A ball of radius 1.5, cut by the border of every picture: no cell of it is lost, unless the mask ends earlier.

    Then the views claim that they show the whole ball.
    """
    config = ngp.NANO
    views, size = around(count, focal=1.7, center=(0.6, 0.0), seed=2), 128
    rays_o, rays_d = views.rays(pixel_grid(size, size).expand(count, -1, 2))
    along = (rays_o * torch.nn.functional.normalize(rays_d, dim=-1)).sum(-1)
    masks = (rays_o.square().sum(-1) - along**2 < 1.5**2).float().reshape(count, 1, size, size)
    assert masks[..., 0].any()
    if gap:
        inner = masks[..., gap:-gap, gap:-gap]
        masks = torch.nn.functional.pad(inner, (gap, gap, gap, gap))
    occupancy = ngp.Occupancy(config)
    occupancy.carve(masks, views)
    share = occupancy.occupied[centers(config).norm(dim=-1) < 1.5].float().mean()
    assert share == 1 if kept else share < 0.95


def test_a_mask_may_end_two_pixels_before_the_valid_region():
    """What is outside of it is unknown, like what is outside of the picture."""
    config = dataclasses.replace(TINY, occupancy_cells=16)
    shares = []
    for last in (27, 26, 25, 24):  # the valid region's last column, and up to three before it
        masks, valid = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
        valid[..., :28] = 1
        masks[..., 10:22, 10:last + 1] = 1
        occupancy = ngp.Occupancy(config)
        occupancy.carve(masks, around(1, focal=1.7), valid)
        shares.append(occupancy.occupied.float().mean())
    assert shares[0] == shares[1] == shares[2] > 1.1 * shares[3]


def test_carving_can_be_switched_off():
    views = around(2)
    masks = torch.zeros(2, 1, 16, 16)
    occupancy = ngp.Occupancy(dataclasses.replace(TINY, carve=False))
    occupancy.carve(masks, views)  # not even empty masks matter
    assert occupancy.possible.all() and occupancy.occupied.all()
    assert torch.equal(occupancy.box, ngp.cube(TINY))


def test_carving_forgives_one_view_of_six():
    """A mask that misses half of the ball takes it away when there are five views; six outvote it."""
    field = ball(occupancy_cells=32, samples_per_ray=128)
    inner = centers(field.config).norm(dim=-1) < 0.8
    for count, kept in ((5, False), (6, True)):
        masks = images(field, around(count), 48).opacity.reshape(count, 1, 48, 48)
        masks[0, :, :, :24] = 0
        occupancy = ngp.Occupancy(field.config)
        occupancy.carve(masks, around(count))
        assert occupancy.occupied[inner].all() == kept
    more = ngp.Occupancy(dataclasses.replace(field.config, forgiven_views=7))
    more.carve(masks, around(6))
    assert not more.occupied[inner].all()


def test_carving_goes_by_the_mask_threshold():
    config = dataclasses.replace(TINY, occupancy_cells=16)
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., 4:12, 4:8] = 0.3
    masks[..., 4:12, 8:12] = 0.9
    occupied = []
    for threshold in (0.1, 0.5):
        occupancy = ngp.Occupancy(dataclasses.replace(config, mask_threshold=threshold))
        occupancy.carve(masks, around(1))
        occupied.append(occupancy.occupied)
    assert (occupied[0] | ~occupied[1]).all() and occupied[1].sum() < 0.7 * occupied[0].sum()


def test_carving_keeps_the_ball_and_little_else():
    field, views = ball(occupancy_cells=32, samples_per_ray=128), around(5)
    masks = images(field, views, 48).opacity.reshape(5, 1, 48, 48)
    occupancy = ngp.Occupancy(field.config)
    occupancy.carve(masks, views)
    distance = centers(field.config).norm(dim=-1)
    assert occupancy.occupied[distance < 0.8].all() and not occupancy.occupied[distance > 1.3].any()
    assert occupancy.occupied.sum() < 1.7 * (distance < 0.85).sum()
    assert torch.equal(occupancy.occupied, occupancy.possible) and occupancy.box.abs().max() < 1.3
    occupancy.density.fill_(1e9)
    occupancy.update(field)
    assert torch.equal(occupancy.occupied, occupancy.possible)  # what was carved stays carved
    one = ngp.Occupancy(dataclasses.replace(field.config, bound=6.0))
    one.carve(masks[:1], views[:1])  # a cone that ends at the camera
    depth = views[0].to_view(centers(one.config).reshape(-1, 3))[:, 2]
    assert not one.occupied.flatten()[depth < -0.4].any() and one.occupied.flatten()[depth > 6].any()
    with pytest.raises(ValueError, match="masks and cameras"):
        occupancy.carve(torch.zeros_like(masks), views)


@pytest.mark.parametrize("distance", [0.6, 2.5])  # within the cube, and before it
def test_silhouettes_of_cells_miss_nothing(distance):
    """No point of a possible cell is seen outside the silhouette, which ends within a pixel of where they end."""
    occupancy = ngp.Occupancy(dataclasses.replace(TINY, occupancy_cells=12))
    occupancy.possible &= torch.rand(12, 12, 12, generator=seeded()) < 0.01
    cells = occupancy.possible.nonzero()
    inner = torch.rand(4000, 1, 3, generator=seeded(1)).round(decimals=1)  # many on faces, edges and corners
    x = (cells + inner).reshape(-1, 3) * occupancy.cell - TINY.bound
    for camera in around(4, distance=distance, center=(0.1, -0.05), seed=3):
        xy, depth = camera.project(x)
        pixel = ((1 - xy) / 2 * 40).floor()
        inside = (pixel >= 0).all(-1) & (pixel < 40).all(-1) & (depth > 0)
        column, row = pixel[inside].long().unbind(-1)
        seen = torch.zeros(40, 40, dtype=torch.bool)
        seen[row, column] = True
        silhouette = occupancy.silhouette(camera, 40)
        assert seen.any() and not (seen & ~silhouette).any()
        if distance > 1:
            assert silhouette.sum() < 2 * seen.sum()


def test_silhouette_of_one_cell():
    """Of a camera that looks along an axis, by hand: the square of its near face; from behind, nothing."""
    occupancy = ngp.Occupancy(dataclasses.replace(TINY, occupancy_cells=4, bound=2.0))  # cells of side 1
    occupancy.possible[:] = False
    occupancy.possible[2, 3, 1] = True  # x in [0, 1], y in [1, 2], z in [-1, 0]
    camera = Cameras(torch.eye(3), torch.tensor([0.0, 0.0, 3.0]), torch.tensor([1.0, 1.0]), torch.zeros(2))
    silhouette = occupancy.silhouette(camera, 100)  # Z in [2, 3], X / Z in [0, 1/2], Y / Z in [1/3, 1]
    rows, columns = silhouette.nonzero().T
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (25, 50, 0, 33) and silhouette.sum() == 26 * 34
    behind = Cameras(torch.eye(3), torch.tensor([0.0, 0.0, -0.5]), torch.tensor([1.0, 1.0]), torch.zeros(2))
    assert not occupancy.silhouette(behind, 100).any()


@pytest.mark.parametrize("touching", [False, True])
def test_carving_is_conservative(touching):
    """No point that every view sees in its mask, or cannot see and does not see all, is ever in an empty cell."""
    config = dataclasses.replace(TINY, occupancy_cells=40, bound=4.0)  # the cameras are inside the cube
    views, size = around(3, distance=2.5, center=(0.1, -0.05), seed=3), 40
    masks = (torch.rand(3, 1, 5, 5, generator=seeded()) < 0.5).float()
    masks = torch.nn.functional.pad(masks.repeat_interleave(6, -1).repeat_interleave(6, -2), (5, 5, 5, 5))
    valid = torch.ones_like(masks)
    valid[..., 38:, :] = 0
    masks[..., 38, 10] = 1  # says nothing: it is outside the valid region
    if touching:
        masks[..., 37, 20] = 1  # at the edge of the valid region
    occupancy = ngp.Occupancy(config)
    occupancy.carve(masks, views, valid)
    x = torch.rand(200_000, 3, generator=seeded(1)) * 8 - 4
    possible = torch.ones(len(x), dtype=torch.bool)
    for mask, shown, view in zip(masks[:, 0], valid[:, 0], views):
        xy, depth = view.project(x)
        pixel = ((1 - xy) / 2 * size).floor().nan_to_num(-1).clamp(-1, size).long()
        seen = (depth > 0) & ((pixel >= 0) & (pixel < size)).all(-1)
        column, row = pixel.clamp(0, size - 1).unbind(-1)
        seen &= shown[row, column] > 0
        possible &= torch.where(seen, mask[row, column] > 0, torch.tensor(touching))
    assert occupancy(x[possible]).all() and possible.any()
    cells = torch.zeros(40, 40, 40)
    cells[((x[possible] + 4) / 0.2).long().unbind(-1)] = 1
    near = torch.nn.functional.max_pool3d(cells[None], 3, 1, 1)[0] > 0
    # And hardly any cell beyond the next one is kept.
    assert (near & occupancy.occupied).sum() > 0.95 * occupancy.occupied.sum()


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


def test_a_rendering_tells_the_field_its_directions():
    field, occupancy = ngp.Field(dataclasses.replace(TINY, view_degree=2), seeded()), ngp.Occupancy(TINY)
    field.view_mlp[-1].weight.data.normal_(generator=seeded(3))
    rays_o, rays_d = random_rays(5)
    asked = []
    forward = field.forward
    field.forward = lambda x, directions=None: asked.append((x, directions)) or forward(x, directions)
    for skip in (None, occupancy):
        volume.render(field, rays_o, rays_d, None, skip)
        x, directions = asked[-1]
        along = torch.linalg.cross(x - rays_o[0], rays_d[0].expand_as(x)).norm(dim=-1) < 1e-4
        assert along.sum() >= 5 and (directions[along] == rays_d[0]).all()


def test_wrong_degrees_of_the_viewing_direction():
    for change in ({"view_degree": 5}, {"view_degree": 1, "hidden_layers": 0}):
        with pytest.raises(ValueError, match="view_degree"):
            dataclasses.replace(TINY, **change)
