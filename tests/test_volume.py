"""Volume rendering: released numbers, absorption laws, gradients, and empty space that changes nothing."""
import math

import pytest
import torch

import cameras
import ngp
import volume
from tests.support import parity
from tests.support.fields import TINY, Analytic, around, ball, centers, random_rays, released_field, seeded
from volume import Occupancy


@pytest.mark.parametrize("mode", ["eval_noperturb", "eval_perturb", "train_perturb"])
def test_renderer_agrees_with_the_released_one(mode):
    field, f = released_field()
    rays_o, rays_d, near, far = f["mid_rays_o"][0], f["mid_rays_d"][0], f["mid_near"], f["mid_far"]
    rays = len(rays_o)
    box = torch.tensor([[-field.config.bound], [field.config.bound]]).expand(2, 3)
    our_near, our_far = volume.ray_box_intersection(rays_o, rays_d, box, field.config.near)
    hit = near < 1e30  # the released code marks a miss with the largest float
    assert torch.equal(our_far > our_near, hit) and not hit.all()
    parity.assert_close(our_near[hit], near[hit], std=1e-3)
    parity.assert_close(our_far[hit], far[hit], std=1e-3)

    middle = volume.uniform_draws(field.config, rays, None, rays_o)
    draws = {"eval_noperturb": middle, "eval_perturb": (f["in_rand_z"], middle[1]),
             "train_perturb": (f["in_rand_z"], f["in_rand_pdf"])}
    seen = volume.render(field, rays_o, rays_d, draws=draws[mode])
    depth = (seen.depth - near * seen.opacity) / (far - near)  # as a fraction of the ray's interval, as released
    parity.assert_close(seen.color[hit], f[f"out_{mode}_image"][hit], std=1e-3)
    parity.assert_close(seen.opacity[hit], f[f"out_{mode}_weights_sum"][hit], std=1e-3)
    parity.assert_close(depth[hit], f[f"out_{mode}_depth"][hit], std=1e-3)
    assert not torch.cat([seen.color[~hit].flatten(), seen.opacity[~hit], seen.depth[~hit]]).any()
    if mode == "eval_noperturb":
        assert all(torch.equal(a, b) for a, b in zip(seen, volume.render(field, rays_o, rays_d)))


def test_saved_state_renders_the_same():
    field, occupancy = ngp.Field(TINY, seeded(3)), Occupancy(TINY)
    occupancy.update(field, seeded(4))
    occupancy.set_occupied(occupancy.occupied & (torch.rand(occupancy.occupied.shape, generator=seeded(5)) < 0.3))
    field2, occupancy2 = ngp.Field(TINY, seeded(6)), Occupancy(TINY)
    field2.load_state_dict(field.state_dict())
    occupancy2.load_state_dict(occupancy.state_dict())
    rays = random_rays(20)
    first = volume.render(field, *rays, seeded(7), occupancy)
    again = volume.render(field2, *rays, seeded(7), occupancy2)
    for a, b in zip(first, again):
        assert torch.equal(a, b)


def test_slab_absorbs_as_the_law_says():
    slab = Analytic(lambda x: 1.7 * (x[:, 2].abs() < 0.4), samples_per_ray=2000)
    rays_o = torch.tensor([0.1, -0.2, 4.0]).expand(3, 3)
    rays_d = torch.tensor([[0.0, 0, -1], [0, 0, -2], [0.1, 0.1, -1]])
    seen = volume.render(slab, rays_o, rays_d)
    length = torch.tensor([0.8, 0.4, 0.8])  # in t: a direction twice as long has half of it
    opacity = 1 - torch.exp(-1.7 * length)
    parity.assert_close(seen.opacity, opacity, atol=3e-3)
    parity.assert_close(seen.color, 0.5 * opacity[:, None].expand(3, 3), atol=3e-3)
    transparent = torch.exp(torch.tensor(-1.7 * 0.8))
    # The integral of t * sigma * exp(-sigma (t - 3.6)).
    depth = 3.6 * opacity[0] + (1 / 1.7 - (0.8 + 1 / 1.7) * transparent)
    parity.assert_close(seen.depth[0], depth, atol=2e-2)


@pytest.mark.parametrize("importance", [0, 64])
def test_ball_has_its_silhouette_and_depth(importance):
    field = Analytic(lambda x: 1e5 * (x.norm(dim=-1) < 0.8), samples_per_ray=64, importance_samples=importance)
    rays_o, rays_d = random_rays(500)
    seen = volume.render(field, rays_o, rays_d, seeded())
    a, b, c = rays_d.square().sum(-1), (rays_o * rays_d).sum(-1), rays_o.square().sum(-1)
    miss = (c - b.square() / a).sqrt()  # distance of the ray from the origin
    assert (seen.opacity[miss < 0.75] > 1 - 1e-5).all() and (seen.opacity[miss > 0.8] == 0).all()
    front = (-b - (b.square() - a * (c - 0.8**2)).sqrt()) / a
    error = ((seen.depth - front) * a.sqrt())[miss < 0.75].abs().mean()
    assert error < (0.01 if importance else 0.04)  # a stratum is up to 5.2 / 64 = 0.08 long


def test_rays_that_miss_are_black():
    field = ngp.Field(TINY, seeded())
    rays_o = torch.tensor([[0.0, 0, 5], [0, 0, 5], [1.6, 0, 5], [0, 0, 0]])
    rays_d = torch.tensor([[0.0, 0, 1], [1, 1, 0], [0, 0, -1], [0, 0, 1]])
    seen = volume.render(field, rays_o, rays_d, seeded())
    assert [o.item() > 0 for o in seen.opacity] == [False, False, False, True]
    assert all(torch.isfinite(part).all() and not part[:3].any() for part in seen)
    missed = volume.render(field, rays_o[:3], rays_d[:3])
    assert not missed.color.any()
    missed.color.sum().backward()


def test_gradient_of_the_integral_is_that_of_finite_differences():
    g = seeded()
    t = torch.rand(4, 6, generator=g, dtype=torch.float64).sort(-1).values
    density = (3 * torch.rand(4, 6, generator=g, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: volume.compositing_weights(s, t, t[:, :1]), density, rtol=1e-6)
    weights, s = volume.compositing_weights(density, t, t[:, :1]), density * torch.cat([t.diff(), t[:, :1]], -1)
    by_hand = [(1 - torch.exp(-s[:, i])) * torch.exp(-s[:, :i].sum(-1)) for i in range(6)]
    parity.assert_close(weights, torch.stack(by_hand, -1).detach(), atol=1e-12)


@pytest.mark.parametrize("skip", [False, True])
def test_gradient_of_the_renderer_is_that_of_finite_differences(skip):
    field = ngp.Field(TINY, seeded()).double()
    field.encoding.table.data = torch.randn(field.encoding.table.shape, generator=seeded(1), dtype=torch.float64)
    occupancy = None
    if skip:
        occupancy = Occupancy(TINY)
        occupancy.set_occupied(torch.rand(occupancy.occupied.shape, generator=seeded(2)) < 0.5)
    rays_o, rays_d = (x.double() for x in random_rays(3))
    names = [name for name, _ in field.named_parameters()]
    def f(*parameters):
        def seen(x):
            return torch.func.functional_call(field, dict(zip(names, parameters)), (x,))
        proxy = Analytic(lambda x: seen(x)[0], lambda x: seen(x)[1]).double()
        return tuple(volume.render(proxy, rays_o, rays_d, seeded(3), occupancy))
    parameters = tuple(p.detach().clone().requires_grad_() for p in field.parameters())
    assert torch.autograd.gradcheck(f, parameters, rtol=1e-5, fast_mode=True)  # along random directions


@pytest.mark.parametrize("huge", [1e30, 3e38, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_survive_huge_densities(huge, dtype):
    """The first such sample hides all others, also where it has no length; no value and no gradient is lost."""
    density = torch.tensor([[0.5, huge, 1.0, huge, 2.0], [huge] * 5, [0, 0, 0, 0, huge], [0.5, 1, huge, 0, 2]],
                           dtype=dtype, requires_grad=True)
    t = torch.tensor([[1.0, 2, 3, 4, 5]] * 3 + [[1.0, 2, 3, 3, 4]], dtype=dtype, requires_grad=True)
    weights = volume.compositing_weights(density, t, torch.ones(4, 1, dtype=dtype))
    a, b = 1 - math.exp(-0.5), math.exp(-0.5)
    c = math.exp(-1.5)  # of the last ray: its infinite sample has no length
    expected = [[a, b, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [a, b - c, 0, 0, c * (1 - math.exp(-2))]]
    parity.assert_close(weights, torch.tensor(expected, dtype=dtype), atol=1e-6)
    weights.square().sum().backward()
    assert density.grad.isfinite().all() and density.grad[:, 0].any() and t.grad.isfinite().all()


def test_a_dense_sample_keeps_the_digits_of_what_is_before_it():
    """Nothing is subtracted from a sum with a large term in it."""
    density = torch.tensor([[0.1, 0.2, 4e5, 1.0]])
    weights = volume.compositing_weights(density, torch.tensor([[0.0, 1, 2, 3]]), torch.ones(1, 1))
    parity.assert_close(weights[0, 2], math.exp(-0.3), rtol=1e-6)


def test_a_field_of_infinite_density_can_still_learn():
    field = ngp.Field(TINY, seeded())
    field.mlp[-1].bias.data[0] = 200.0  # a logit whose exponential is infinite
    rendering = volume.render(field, *random_rays(20), seeded())
    assert all(part.isfinite().all() for part in rendering) and (rendering.opacity > 0.999).any()
    (rendering.color.sum() + rendering.opacity.sum() + rendering.depth.sum()).backward()
    assert all(p.grad.isfinite().all() for p in field.parameters()) and field.encoding.table.grad.any()


def test_importance_samples_follow_the_weights():
    middle = torch.linspace(0, 1, 11).expand(2, -1)
    weights = torch.zeros(2, 10)
    weights[0, 3], weights[1, 2], weights[1, 7] = 5.0, 1.0, 3.0
    u = (torch.arange(400) + 0.5).expand(2, -1) / 400
    t = volume.sample_pdf(middle, weights, u)
    assert ((t[0] >= 0.3) & (t[0] <= 0.4)).float().mean() > 0.99
    for start, share in ((0.2, 0.25), (0.7, 0.75)):
        assert abs(((t[1] > start) & (t[1] < start + 0.1)).float().mean() - share) < 0.01
    assert (t.diff() >= 0).all()


@pytest.mark.parametrize("jitter", [False, True])
def test_an_image_is_its_rays(jitter):
    field, size, full = ball(occupancy_cells=16), 6, 12
    occupancy = Occupancy(field.config)
    view = around(1)[0]
    generator = seeded() if jitter else None
    image = volume.render_image(field, view, size, full, generator, occupancy)
    rays = view.rays(cameras.pixel_grid(size, size, full))
    rendering = volume.render(field, *rays, seeded() if jitter else None, occupancy)
    assert image.color.shape == (3, size, size) and image.opacity.shape == (1, size, size)
    for row, column in ((0, 0), (2, 3), (5, 1)):
        assert torch.equal(image.color[:, row, column], rendering.color[row * size + column])
        assert torch.equal(image.opacity[0, row, column], rendering.opacity[row * size + column])
    if not jitter:  # how many rays are followed at once changes nothing
        for a, b in zip(image, volume.render_image(field, view, size, full, None, occupancy, chunk=7)):
            parity.assert_close(b, a, atol=1e-6)


def test_an_occupancy_that_is_full_changes_nothing():
    field = ball(samples_per_ray=32, importance_samples=16, occupancy_cells=24)
    plain = volume.render(field, *random_rays(50), seeded(), None)
    skipping = volume.render(field, *random_rays(50), seeded(), Occupancy(field.config))
    for a, b in zip(plain, skipping):
        parity.assert_close(a, b, atol=1e-6)


def test_skipping_empty_space_changes_nothing():
    evaluated = []
    def density(x):
        evaluated.append(x)
        return torch.where(x.norm(dim=-1) < 0.8, 20.0, 0.0)
    field = Analytic(density, lambda x: (x / 3 + 0.5).clamp(0, 1), samples_per_ray=32, importance_samples=16,
                     occupancy_cells=24)
    occupancy = Occupancy(field.config)
    occupancy.density.zero_()
    occupancy.update(field)
    assert 0.05 < occupancy.occupied.float().mean() < 0.12
    assert torch.equal(occupancy.occupied, occupancy(centers(field.config)))
    occupancy.occupied |= torch.nn.functional.max_pool3d(occupancy.occupied[None].float(), 3, 1, 1)[0] > 0
    occupancy.box.copy_(torch.tensor([[-1.5] * 3, [1.5] * 3]))  # the same samples with and without
    dense = volume.render(field, *random_rays(50), seeded())
    evaluated.clear()
    sparse = volume.render(field, *random_rays(50), seeded(), occupancy)
    for a, b in zip(sparse, dense):
        parity.assert_close(a, b, atol=1e-6)
    assert sum(len(x) for x in evaluated) < 0.5 * 50 * (32 + 48)  # and most were not evaluated


def test_samples_lie_in_the_box_of_occupied_cells():
    field = Analytic(lambda x: 1e5 * (x.norm(dim=-1) < 0.8), occupancy_cells=30, samples_per_ray=24)
    occupancy = Occupancy(field.config)
    occupancy.density.zero_()
    occupancy.update(field, seeded())
    assert torch.allclose(occupancy.box, torch.tensor([[-0.9] * 3, [0.9] * 3]), atol=0.11)
    evaluated = []
    field.functions = (lambda x: evaluated.append(x) or torch.ones_like(x[:, 0])), field.functions[1]
    for skip in (None, occupancy):
        volume.render(field, *random_rays(500), seeded(), skip)
    in_ball = [(x.norm(dim=-1) < 0.8).sum().item() for x in evaluated]
    assert in_ball[1] > 1.5 * in_ball[0], in_ball  # the same number of samples, more of them where it matters
    assert (evaluated[1].abs() <= occupancy.box[1] + 1e-5).all()


def shells(**config) -> tuple[Analytic, Occupancy]:
    """A hollow ball with a solid one in it, and cells that leave out what is empty between and around them."""
    def solid(x):
        r = x.norm(dim=-1)
        return ((r > 0.9) & (r < 1.1)) | (r < 0.3)
    field = Analytic(lambda x: 2.0 * solid(x), lambda x: (x / 3 + 0.5).clamp(0, 1), occupancy_cells=48, **config)
    occupancy = Occupancy(field.config)
    r = centers(field.config).norm(dim=-1)
    occupancy.set_occupied(((r > 0.8) & (r < 1.2)) | (r < 0.4))
    return field, occupancy


def test_all_samples_are_in_occupied_cells():
    """Up to the width of a bin; as many in each stratum, in order, and together as long as the occupied part is."""
    field, occupancy = shells(samples_per_ray=40, bins_per_ray=256)
    rays_o, rays_d = random_rays(300)
    near, far = (x[:, None] for x in volume.ray_box_intersection(rays_o, rays_d, occupancy.box, 0.1))
    far = torch.maximum(near, far)
    u = torch.rand(300, 40, generator=seeded())
    t, length = volume.occupied_strata(rays_o, rays_d, near, far, u, occupancy)
    met = length[:, 0] > 0
    assert 100 < met.sum() < 300
    rays_o, rays_d, near, far, t, length = (x[met] for x in (rays_o, rays_d, near, far, t, length))
    assert (t.diff() > 0).all() and (t >= near).all() and (t <= far + 1e-5).all()

    # The occupied part of each ray, by many points.
    fine = near + (far - near) * (torch.arange(20_000) + 0.5) / 20_000
    inside = occupancy(volume.points_along(rays_o, rays_d, fine)).view(fine.shape)
    part = inside.float().mean(-1, keepdim=True) * (far - near)
    bin_length = (far - near) / 256
    assert ((40 * length - part).abs() < 8 * bin_length).all()
    nearest = torch.where(inside, fine, torch.inf)
    distance = torch.stack([(nearest - x[:, None]).abs().amin(-1) for x in t.t()], -1)
    assert (distance <= bin_length).all() and (distance < 1e-3).float().mean() > 0.95


@pytest.mark.parametrize("skip_buffer", [True, False])
def test_samples_in_occupied_cells_give_the_same_integral(skip_buffer):
    """As many samples in the whole box do, of rays that cross empty space twice: color, opacity and depth."""
    field, occupancy = shells(samples_per_ray=128, bins_per_ray=256)
    rays_o, rays_d = random_rays(200)
    rays_o[:20] *= -1  # behind
    draws = volume.uniform_draws(field.config, 200, seeded(), rays_o)
    buffer = None if skip_buffer else volume.SampleBuffer(200 * 128, "cpu")
    seen = volume.render(field, rays_o, rays_d, None, occupancy, draws, buffer)
    exact, box = shells(samples_per_ray=4000)
    expected = volume.render(exact, rays_o, rays_d, None, box)
    assert 0.3 < expected.opacity.max() and (expected.opacity == 0).any()
    assert torch.equal(seen.opacity == 0, expected.opacity == 0)
    for a, b, most in zip(seen, expected, (0.004, 0.008, 0.03)):
        assert (a - b).abs().mean() < most


def test_scattered_values_are_zero_elsewhere():
    index = torch.tensor([3, 0, 4, 4])  # 4: what fills a buffer up
    values = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]], requires_grad=True)
    rows = volume.scatter(values, index, 4)
    assert rows.tolist() == [[3, 4], [0, 0], [0, 0], [1, 2]]
    assert volume.scatter(values[:, 0], index, 4).tolist() == [3, 0, 0, 1]
    rows.sum().backward()
    assert values.grad.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("importance", [0, 16])
def test_a_buffer_changes_nothing_but_the_shapes(importance):
    """Colors and gradients are those without, on rays that hit and rays that miss; the need is counted."""
    field = ball(samples_per_ray=32, importance_samples=importance, occupancy_cells=24)
    occupancy = Occupancy(field.config)
    occupancy.density.zero_()
    occupancy.update(field)
    rays_o, rays_d = random_rays(200)
    rays_o[:20] *= -1  # behind
    draws = volume.uniform_draws(field.config, 200, seeded(), rays_o)
    learned = ngp.Field(TINY, seeded())
    field.functions = learned.density, lambda x: learned(x)[1]
    results = []
    for buffer in (None, volume.SampleBuffer(200 * 48, "cpu")):
        learned.zero_grad()
        seen = volume.render(field, rays_o, rays_d, None, occupancy, draws, buffer)
        (seen.color.sum() + seen.opacity.sum() + seen.depth.sum()).backward()
        results.append([*seen, *(p.grad.clone() for p in learned.parameters())])
    assert 0 < buffer.most < 200 * (32 + importance) and results[0][1].any()
    for a, b in zip(*results):
        parity.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_a_buffer_counts_samples_beyond_its_capacity():
    field = ball(samples_per_ray=32, occupancy_cells=24)
    occupancy = Occupancy(field.config)
    rays = random_rays(50)
    small = volume.SampleBuffer(100, "cpu")
    volume.render(field, *rays, None, occupancy, None, small)
    enough = volume.SampleBuffer(int(small.most), "cpu")
    seen = volume.render(field, *rays, None, occupancy, None, enough)
    assert small.most == enough.most == enough.size > 100
    parity.assert_close(seen.color, volume.render(field, *rays, None, occupancy).color, atol=1e-6)
    volume.render(field, rays[0][:3], rays[1][:3], None, occupancy, None, enough)
    assert enough.most == enough.size  # the most of all renderings
