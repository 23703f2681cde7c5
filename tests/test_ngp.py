"""The instance field: parity of encoding, field and renderer; gradients; analytic renderings; carving; surfaces; one scene overfitted."""
import dataclasses
import json

import numpy as np
import pytest
import torch

import cameras
import ngp
import parity

CONFIGS = ["small_tiled", "small_hash", "official_tiled", "official_hash"]


@pytest.mark.parametrize("tag", CONFIGS)
def test_grid_encoding_agrees_with_the_released_kernel(tag):
    f = parity.load("grid")
    c = json.loads(str(f["in_configs"]))[tag]
    config = dataclasses.replace(ngp.PAPER, levels=c["L"], features=c["C"], base_resolution=c["base"], log2_table=c["log2"],
                                 finest_resolution=c["desired"], hashed=not c["gt"], bound=float(f["in_bound"]))
    encoding = ngp.GridEncoding(config)
    levels, offsets = f[f"mid_{tag}_levels"], f[f"out_{tag}_offsets"]
    assert encoding.scale[:, 0].tolist() == levels[:, 0].tolist()
    assert encoding.rows[:, 0].tolist() == levels[:, 2].tolist()
    if c["gt"]:  # of a hashed level every coordinate enters
        assert [(row != 0).sum().item() for row in encoding.stride] == levels[:, 3].tolist()
    assert encoding.hashed_from == c["L"] - int(levels[:, 4].sum())
    assert encoding.offset[:, 0].tolist() + [len(encoding.table)] == offsets.tolist()
    encoding.table.data = parity.weight(f"gridencoder.{tag}.embeddings", encoding.table.shape)
    parity.assert_close(encoding.table[:4], f[f"mid_{tag}_emb_head"])
    parity.assert_close(encoding(f["in_x"]), f[f"out_{tag}"], atol=5e-5 if tag.startswith("small") else 2e-3)


def released_field() -> tuple[ngp.Field, dict]:
    """The released field with rule-made weights, under its own names, and the fixture."""
    f = parity.load("ngp")
    field = ngp.Field(dataclasses.replace(ngp.PAPER, hashed=False, samples=f["in_rand_z"].shape[1],
                                          importance=f["in_rand_pdf"].shape[1]))
    released = parity.weights("ngp")
    field.load_state_dict({"encoding.table": released["encoder.embeddings"]} | {
        f"mlp.{2 * layer}.{leaf}": released[f"sigma_net.net.{layer}.{leaf}"] for layer in range(3) for leaf in ("weight", "bias")})
    return field, f


def test_field_agrees_with_the_released_one():
    field, f = released_field()
    density, colour = field(f["in_x"])
    parity.assert_close(field.encoding(f["in_x"]), f["mid_encoding"], std=1e-3)
    parity.assert_close(field.blob(f["in_x"]), f["out_blob"], std=1e-3)
    parity.assert_close(density, f["out_sigma"], std=1e-3)
    parity.assert_close(field.density(f["in_x"]), f["out_sigma"], std=1e-3)
    parity.assert_close(colour, f["out_albedo"], std=1e-3)


@pytest.mark.parametrize("mode", ["eval_noperturb", "eval_perturb", "train_perturb"])
def test_renderer_agrees_with_the_released_one(mode):
    field, f = released_field()
    rays_o, rays_d, near, far = f["mid_rays_o"][0], f["mid_rays_d"][0], f["mid_near"], f["mid_far"]
    rays = len(rays_o)
    box = torch.tensor([[-field.config.bound], [field.config.bound]]).expand(2, 3)
    our_near, our_far = ngp.ray_interval(rays_o, rays_d, box, field.config.near)
    hit = near < 1e30  # the released code marks a miss with the largest float
    assert torch.equal(our_far > our_near, hit) and not hit.all()
    parity.assert_close(our_near[hit], near[hit], std=1e-3)
    parity.assert_close(our_far[hit], far[hit], std=1e-3)

    middle = ngp.uniform_draws(field.config, rays, None, rays_o)
    draws = {"eval_noperturb": middle, "eval_perturb": (f["in_rand_z"], middle[1]), "train_perturb": (f["in_rand_z"], f["in_rand_pdf"])}
    seen = ngp.render(field, rays_o, rays_d, draws=draws[mode])
    depth = (seen.depth - near * seen.opacity) / (far - near)  # as a fraction of the ray's interval, as released
    parity.assert_close(seen.colour[hit], f[f"out_{mode}_image"][hit], std=1e-3)
    parity.assert_close(seen.opacity[hit], f[f"out_{mode}_weights_sum"][hit], std=1e-3)
    parity.assert_close(depth[hit], f[f"out_{mode}_depth"][hit], std=1e-3)
    assert not torch.cat([seen.colour[~hit].flatten(), seen.opacity[~hit], seen.depth[~hit]]).any()
    if mode == "eval_noperturb":
        assert all(torch.equal(a, b) for a, b in zip(seen, ngp.render(field, rays_o, rays_d)))


# ---------------------------------------------------------------------------------------------------- encoding and field, by hand

TINY = dataclasses.replace(ngp.NANO, levels=3, features=2, log2_table=6, base_resolution=2, finest_resolution=9, bound=1.5, width=5,
                           samples=6, occupancy_cells=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_encoding_interpolates_a_dense_level_by_hand():
    config = dataclasses.replace(TINY, levels=1, features=1, base_resolution=4, log2_table=7, bound=1.0)
    encoding = ngp.GridEncoding(config)  # position u * 3 + 0.5, 5 corners a side
    encoding.table.data = torch.arange(len(encoding.table)).float()[:, None]  # row of corner (i, j, k): i + 5 j + 25 k
    u = torch.tensor([[0.5, 0.5, 0.5], [0.0, 1.0, 0.1], [0.2, 0.7, 0.9]])
    x = torch.cat([2 * u - 1, torch.tensor([[1.1, 0, 0], [0, 0, -1.01]])])
    expected = (u * 3 + 0.5) @ torch.tensor([1.0, 5, 25])  # trilinear interpolation of a linear function is exact
    parity.assert_close(encoding(x)[:, 0], torch.cat([expected, torch.zeros(2)]), atol=1e-4)


@pytest.mark.parametrize("hashed", [True, False])
def test_encoding_gradient_is_that_of_finite_differences(hashed):
    encoding = ngp.GridEncoding(dataclasses.replace(TINY, hashed=hashed), seeded()).double()
    x = torch.rand(7, 3, generator=seeded(1), dtype=torch.float64) * 3.2 - 1.6  # some outside
    def f(table):
        return torch.func.functional_call(encoding, {"table": table}, (x,))
    table = torch.rand(encoding.table.shape, generator=seeded(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(f, table.requires_grad_(), rtol=1e-6)


def test_density_stops_growing_and_keeps_a_finite_gradient():
    x = torch.tensor([-30.0, 0.0, 3.0, 15.0, 100.0], requires_grad=True)
    y = ngp._TruncatedExp.apply(x)
    y.sum().backward()
    expected = torch.tensor([-30.0, 0, 3, 15, 15]).exp()
    assert torch.equal(y, expected) and torch.equal(x.grad, expected)


def test_field_depends_on_its_generator_only():
    state = torch.get_rng_state()
    a, b, c = (ngp.Field(TINY, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]) and not torch.equal(value, c.state_dict()[key]), key
    assert a.encoding.table.abs().max() <= 1e-4
    density, colour = a(torch.zeros(0, 3))
    (density.sum() + colour.sum()).backward()  # no points, no error
    assert density.shape == (0,) and colour.shape == (0, 3) and not a.encoding.table.grad.any()
    assert ngp.Field(ngp.NANO, seeded()).density(torch.rand(100, 3) - 0.5).log().abs().max() < 0.5  # it starts as a thin fog


def test_saved_state_renders_the_same():
    field, occupancy = ngp.Field(TINY, seeded(3)), ngp.Occupancy(TINY)
    occupancy.update(field, seeded(4))
    occupancy._set(occupancy.occupied & (torch.rand(occupancy.occupied.shape, generator=seeded(5)) < 0.3))
    field2, occupancy2 = ngp.Field(TINY, seeded(6)), ngp.Occupancy(TINY)
    field2.load_state_dict(field.state_dict())
    occupancy2.load_state_dict(occupancy.state_dict())
    rays = random_rays(20)
    for a, b in zip(ngp.render(field, *rays, seeded(7), occupancy), ngp.render(field2, *rays, seeded(7), occupancy2)):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------ renderer, analytically

class Analytic(ngp.Field):
    """A field whose density and colour are given functions of (N, 3) points."""

    def __init__(self, density, colour=lambda x: torch.full_like(x, 0.5), **config):
        super().__init__(dataclasses.replace(TINY, **config))
        self.functions = density, colour

    def forward(self, x):
        return tuple(f(x) for f in self.functions)


def ball(radius: float = 0.8, **config) -> Analytic:
    """A solid ball at the origin whose colour is its position; log density is linear across its surface, where density is 10."""
    def density(x):
        return 10 * torch.exp(60 * (radius - x.norm(dim=-1)).clamp(-0.5, 0.2))
    return Analytic(density, lambda x: (x / 3 + 0.5).clamp(0, 1), **config)


def random_rays(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays from a sphere of radius 4 to points near the origin, of any length."""
    g = seeded(seed)
    o = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1) * 4
    return o, (torch.rand(n, 3, generator=g) * 2 - 1 - o) * (0.2 + torch.rand(n, 1, generator=g))


def around(n: int, focal: float = 2.4, distance: float = 4.0, centre=(0.0, 0.0), seed: int = 0) -> cameras.Cameras:
    """n cameras in random directions, looking at the origin."""
    eye = torch.nn.functional.normalize(torch.randn(n, 3, generator=seeded(seed)), dim=-1) * distance
    R, T = cameras.look_at(eye, torch.zeros(3), torch.tensor([0.0, 1, 0]))
    return cameras.Cameras(R, T, torch.full((n, 2), focal), torch.tensor(centre).expand(n, 2))


def images(field: ngp.Field, views: cameras.Cameras, size: int) -> ngp.Rendering:
    """Pictures of the field: (V, size * size, ...)."""
    seen = [ngp.render(field, *view.rays(cameras.pixel_grid(size, size))) for view in views]
    return ngp.Rendering(*(torch.stack(part).detach() for part in zip(*seen)))


def test_slab_absorbs_as_the_law_says():
    slab = Analytic(lambda x: 1.7 * (x[:, 2].abs() < 0.4), samples=2000)
    rays_o = torch.tensor([0.1, -0.2, 4.0]).expand(3, 3)
    rays_d = torch.tensor([[0.0, 0, -1], [0, 0, -2], [0.1, 0.1, -1]])
    seen = ngp.render(slab, rays_o, rays_d)
    opacity = 1 - torch.exp(-1.7 * torch.tensor([0.8, 0.4, 0.8]))  # lengths are in t: a direction twice as long has half of it
    parity.assert_close(seen.opacity, opacity, atol=3e-3)
    parity.assert_close(seen.colour, 0.5 * opacity[:, None].expand(3, 3), atol=3e-3)
    transparent = torch.exp(torch.tensor(-1.7 * 0.8))
    depth = 3.6 * opacity[0] + (1 / 1.7 - (0.8 + 1 / 1.7) * transparent)  # integral of t * sigma * exp(-sigma (t - 3.6))
    parity.assert_close(seen.depth[0], depth, atol=2e-2)


@pytest.mark.parametrize("importance", [0, 64])
def test_ball_has_its_silhouette_and_depth(importance):
    field = Analytic(lambda x: 1e5 * (x.norm(dim=-1) < 0.8), samples=64, importance=importance)
    rays_o, rays_d = random_rays(500)
    seen = ngp.render(field, rays_o, rays_d, seeded())
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
    seen = ngp.render(field, rays_o, rays_d, seeded())
    assert [o.item() > 0 for o in seen.opacity] == [False, False, False, True]
    assert all(torch.isfinite(part).all() and not part[:3].any() for part in seen)
    missed = ngp.render(field, rays_o[:3], rays_d[:3])
    assert not missed.colour.any()
    missed.colour.sum().backward()


def test_gradient_of_the_integral_is_that_of_finite_differences():
    g = seeded()
    t = torch.rand(4, 6, generator=g, dtype=torch.float64).sort(-1).values
    density = (3 * torch.rand(4, 6, generator=g, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ngp.absorption(s, t, t[:, :1]), density, rtol=1e-6)
    weights, s = ngp.absorption(density, t, t[:, :1]), density * torch.cat([t.diff(), t[:, :1]], -1)
    by_hand = [(1 - torch.exp(-s[:, i])) * torch.exp(-s[:, :i].sum(-1)) for i in range(6)]
    parity.assert_close(weights, torch.stack(by_hand, -1).detach(), atol=1e-12)


@pytest.mark.parametrize("skip", [False, True])
def test_gradient_of_the_renderer_is_that_of_finite_differences(skip):
    field = ngp.Field(TINY, seeded()).double()
    field.encoding.table.data = torch.randn(field.encoding.table.shape, generator=seeded(1), dtype=torch.float64)
    occupancy = None
    if skip:
        occupancy = ngp.Occupancy(TINY)
        occupancy._set(torch.rand(occupancy.occupied.shape, generator=seeded(2)) < 0.5)
    rays_o, rays_d = (x.double() for x in random_rays(3))
    names = [name for name, _ in field.named_parameters()]
    def f(*parameters):
        def seen(x):
            return torch.func.functional_call(field, dict(zip(names, parameters)), (x,))
        proxy = Analytic(lambda x: seen(x)[0], lambda x: seen(x)[1]).double()
        return tuple(ngp.render(proxy, rays_o, rays_d, seeded(3), occupancy))
    assert torch.autograd.gradcheck(f, tuple(p.detach().clone().requires_grad_() for p in field.parameters()), rtol=1e-5)


def test_importance_samples_follow_the_weights():
    middle = torch.linspace(0, 1, 11).expand(2, -1)
    weights = torch.zeros(2, 10)
    weights[0, 3], weights[1, 2], weights[1, 7] = 5.0, 1.0, 3.0
    u = (torch.arange(400) + 0.5).expand(2, -1) / 400
    t = ngp.place_importance(middle, weights, u)
    assert ((t[0] >= 0.3) & (t[0] <= 0.4)).float().mean() > 0.99
    for start, share in ((0.2, 0.25), (0.7, 0.75)):
        assert abs(((t[1] > start) & (t[1] < start + 0.1)).float().mean() - share) < 0.01
    assert (t.diff() >= 0).all()


# --------------------------------------------------------------------------------------------------------------------- empty space

def test_an_occupancy_that_is_full_changes_nothing():
    field = ball(samples=32, importance=16, occupancy_cells=24)
    plain, skipping = (ngp.render(field, *random_rays(50), seeded(), skip) for skip in (None, ngp.Occupancy(field.config)))
    for a, b in zip(plain, skipping):
        parity.assert_close(a, b, atol=1e-6)


def test_skipping_empty_space_changes_nothing():
    asked = []
    field = Analytic(lambda x: asked.append(x) or torch.where(x.norm(dim=-1) < 0.8, 20.0, 0.0), lambda x: (x / 3 + 0.5).clamp(0, 1),
                     samples=32, importance=16, occupancy_cells=24)
    occupancy = ngp.Occupancy(field.config)
    occupancy.density.zero_()
    occupancy.update(field)
    assert 0.05 < occupancy.occupied.float().mean() < 0.12 and torch.equal(occupancy.occupied, occupancy(_centres(field.config)))
    occupancy.occupied |= torch.nn.functional.max_pool3d(occupancy.occupied[None].float(), 3, 1, 1)[0] > 0
    occupancy.box.copy_(torch.tensor([[-1.5] * 3, [1.5] * 3]))  # the same samples with and without
    dense = ngp.render(field, *random_rays(50), seeded())
    asked.clear()
    sparse = ngp.render(field, *random_rays(50), seeded(), occupancy)
    for a, b in zip(sparse, dense):
        parity.assert_close(a, b, atol=1e-6)
    assert sum(len(x) for x in asked) < 0.5 * 50 * (32 + 48)  # and most were not asked for


def _centres(config: ngp.FieldConfig) -> torch.Tensor:
    """Centres of the occupancy cells, (G, G, G, 3)."""
    axis = (torch.arange(config.occupancy_cells) + 0.5) * 2 * config.bound / config.occupancy_cells - config.bound
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def test_samples_lie_in_the_box_of_occupied_cells():
    field = Analytic(lambda x: 1e5 * (x.norm(dim=-1) < 0.8), occupancy_cells=30, samples=24)
    occupancy = ngp.Occupancy(field.config)
    occupancy.density.zero_()
    occupancy.update(field, seeded())
    assert torch.allclose(occupancy.box, torch.tensor([[-0.9] * 3, [0.9] * 3]), atol=0.11)
    asked = []
    field.functions = (lambda x: asked.append(x) or torch.ones_like(x[:, 0])), field.functions[1]
    for skip in (None, occupancy):
        ngp.render(field, *random_rays(500), seeded(), skip)
    in_ball = [(x.norm(dim=-1) < 0.8).sum().item() for x in asked]
    assert in_ball[1] > 1.5 * in_ball[0], in_ball  # the same number of samples, more of them where it matters
    assert (asked[1].abs() <= occupancy.box[1] + 1e-5).all()


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
    assert torch.equal(occupancy.occupied, _centres(thin.config)[..., 0] > 0)


def test_carving_forgives_one_view_of_six():
    """A mask that misses half of the ball takes it away when there are five views, and is outvoted when there are six."""
    field = ball(occupancy_cells=32, samples=128)
    inner = _centres(field.config).norm(dim=-1) < 0.8
    for count, kept in ((5, False), (6, True)):
        masks = images(field, around(count), 48).opacity.reshape(count, 1, 48, 48)
        masks[0, :, :, :24] = 0
        occupancy = ngp.Occupancy(field.config)
        occupancy.carve(masks, around(count))
        assert occupancy.occupied[inner].all() == kept


def test_carving_keeps_the_ball_and_little_else():
    field, views = ball(occupancy_cells=32, samples=128), around(5)
    masks = images(field, views, 48).opacity.reshape(5, 1, 48, 48)
    occupancy = ngp.Occupancy(field.config)
    occupancy.carve(masks, views)
    distance = _centres(field.config).norm(dim=-1)
    assert occupancy.occupied[distance < 0.8].all() and not occupancy.occupied[distance > 1.3].any()
    assert occupancy.occupied.sum() < 1.7 * (distance < 0.85).sum()
    assert torch.equal(occupancy.occupied, occupancy.possible) and occupancy.box.abs().max() < 1.3
    occupancy.density.fill_(1e9)
    occupancy.update(field)
    assert torch.equal(occupancy.occupied, occupancy.possible)  # what was carved stays carved
    one = ngp.Occupancy(dataclasses.replace(field.config, bound=6.0))
    one.carve(masks[:1], views[:1])  # a cone that ends at the camera
    depth = views[0].to_view(_centres(one.config).reshape(-1, 3))[:, 2]
    assert not one.occupied.flatten()[depth < -0.4].any() and one.occupied.flatten()[depth > 6].any()
    with pytest.raises(ValueError, match="masks and cameras"):
        occupancy.carve(torch.zeros_like(masks), views)


@pytest.mark.parametrize("touching", [False, True])
def test_carving_is_conservative(touching):
    """No point that every view sees in its mask, or cannot see where it does not see everything, is ever in an empty cell."""
    config = dataclasses.replace(TINY, occupancy_cells=40, bound=4.0)  # the cameras are inside the cube
    views, size = around(3, distance=2.5, centre=(0.1, -0.05), seed=3), 40
    masks = (torch.rand(3, 1, 5, 5, generator=seeded()) < 0.5).float()
    masks = torch.nn.functional.pad(masks.repeat_interleave(6, -1).repeat_interleave(6, -2), (5, 5, 5, 5))
    valid = torch.ones_like(masks)
    valid[..., 36:, :] = 0
    masks[..., 38, 10] = 1  # says nothing: it is outside the valid region
    if touching:
        masks[..., 35, 20] = 1  # at the edge of the valid region
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
    assert (near & occupancy.occupied).sum() > 0.95 * occupancy.occupied.sum()  # and hardly any cell beyond the next one is kept


# ------------------------------------------------------------------------------------------------------------------------ surface

def edges_of(mesh: ngp.Mesh) -> torch.Tensor:
    return mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)


def assert_closed_and_oriented(mesh: ngp.Mesh):
    edges = edges_of(mesh)
    assert len(edges.unique(dim=0)) == len(edges)  # no direction twice ...
    assert torch.equal(edges.unique(dim=0), edges.flip(-1).unique(dim=0))  # ... and each with its opposite: two faces an edge
    assert len(mesh.faces.unique()) == len(mesh.vertices) == len(mesh.colours)


def volume_and_area(mesh: ngp.Mesh) -> tuple[float, float]:
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    return (a * normal).sum().item() / 6, normal.norm(dim=-1).sum().item() / 2


@pytest.mark.parametrize("with_occupancy", [False, True])
def test_surface_of_a_ball(with_occupancy):
    field, occupancy = ball(occupancy_cells=15), None
    if with_occupancy:
        occupancy = ngp.Occupancy(field.config)
        occupancy._set(_centres(field.config).norm(dim=-1) < 1.1)
    mesh = ngp.extract_mesh(field, 40, 10.0, occupancy=occupancy)
    assert_closed_and_oriented(mesh)
    volume, area = volume_and_area(mesh)  # positive: the faces look outwards
    assert abs(volume / (4 / 3 * np.pi * 0.8**3) - 1) < 0.02 and abs(area / (4 * np.pi * 0.8**2) - 1) < 0.02
    assert len(mesh.vertices) - len(edges_of(mesh)) / 2 + len(mesh.faces) == 2  # Euler: a sphere
    assert (mesh.vertices.norm(dim=-1) - 0.8).abs().max() < 0.01
    below = (mesh.colours - 0.5) * 3 / mesh.vertices  # a colour is a position: the vertex's own, moved straight inwards by some steps
    parity.assert_close(below[mesh.vertices.abs() > 0.2], torch.ones(()).expand(int((mesh.vertices.abs() > 0.2).sum())) * 0.92, atol=0.07)


def test_colours_of_a_surface_are_those_below_a_faint_skin():
    """Three shells: a thin faint one of green, a dense one of red, emptiness of blue; a surface between the first two is red."""
    shells = torch.tensor([0.6, 0.78, 0.8])
    def layer(x):
        return torch.bucketize(x.norm(dim=-1), shells)
    field = Analytic(lambda x: torch.tensor([0.0, 2000, 12, 0])[layer(x)],
                     lambda x: torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]])[layer(x)])
    colours = ngp.extract_mesh(field, 100, 10.0).colours
    assert colours[:, 0].mean() > 0.9 and colours[:, 1].mean() < 0.1 and colours[:, 2].max() < 1e-3


def test_surface_is_closed_at_the_cube_and_for_any_field():
    noise = torch.randn(1, 1, 9, 9, 9, generator=seeded())
    def density(x):  # random blobs that cross the sides of the cube
        return 10 * torch.exp(3 * torch.nn.functional.grid_sample(noise, x[None, None, None] / 1.5, align_corners=True).flatten())
    mesh = ngp.extract_mesh(Analytic(density), 48, 10.0)
    assert_closed_and_oriented(mesh)
    inside = (density(torch.rand(100_000, 3, generator=seeded(1)) * 3 - 1.5) > 10).float().mean().item()
    assert abs(volume_and_area(mesh)[0] / 3**3 / inside - 1) < 0.05
    full = ngp.extract_mesh(Analytic(lambda x: torch.full_like(x[:, 0], 1e4)), 8)
    assert_closed_and_oriented(full)
    assert 3**3 < volume_and_area(full)[0] < (3 + 3 / 8) ** 3


def test_empty_field_has_an_empty_surface(tmp_path):
    mesh = ngp.extract_mesh(Analytic(lambda x: torch.zeros_like(x[:, 0])), 8)
    assert mesh.vertices.shape == mesh.faces.shape == mesh.colours.shape == (0, 3)
    assert len(ngp.largest_component(mesh).faces) == 0
    ngp.write_ply(tmp_path / "empty.ply", mesh)
    assert b"element vertex 0" in (tmp_path / "empty.ply").read_bytes()


def test_largest_component_drops_floaters():
    def density(x):
        floater = (x - torch.tensor([1.1, 1.1, 1.1])).norm(dim=-1)
        return 10 * torch.exp(60 * torch.maximum(0.6 - x.norm(dim=-1), 0.2 - floater).clamp(-0.5, 0.2))
    both, one = ngp.extract_mesh(Analytic(density), 40, 10.0), ngp.extract_mesh(ball(0.6), 40, 10.0)
    kept = ngp.largest_component(both)
    assert len(both.faces) > len(kept.faces) and len(kept.faces) == len(one.faces)
    assert_closed_and_oriented(kept)
    assert abs(volume_and_area(kept)[0] - volume_and_area(one)[0]) < 1e-4
    parity.assert_close(kept.colours, kept.vertices / 3 * 0 + 0.5, atol=1e-6)


def test_ply_reads_back(tmp_path):
    mesh = ngp.extract_mesh(ball(), 12)
    ngp.write_ply(tmp_path / "ball.ply", mesh)
    assert [p.name for p in tmp_path.iterdir()] == ["ball.ply"]
    header, body = (tmp_path / "ball.ply").read_bytes().split(b"end_header\n", 1)
    assert header.decode().split("\n")[:3] == ["ply", "format binary_little_endian 1.0", f"element vertex {len(mesh.vertices)}"]
    vertices = np.frombuffer(body, dtype="<f4,<f4,<f4,u1,u1,u1", count=len(mesh.vertices))
    faces = np.frombuffer(body, dtype="u1,<i4,<i4,<i4", offset=vertices.nbytes)
    assert len(faces) == len(mesh.faces) and (faces["f0"] == 3).all()
    columns = [torch.from_numpy(np.stack([array[f"f{i}"] for i in axes], 1).copy()) for array, axes in
               ((vertices, (0, 1, 2)), (faces, (1, 2, 3)), (vertices, (3, 4, 5)))]
    assert torch.equal(columns[0], mesh.vertices) and torch.equal(columns[1], mesh.faces.int())
    parity.assert_close(columns[2] / 255, mesh.colours, atol=0.5 / 255 + 1e-6)


# ------------------------------------------------------------------------------------------------------------------------- a scene

def test_one_scene_is_learned():
    """A coloured ball, from 8 pictures of 32 x 32 to a new one: more than 25 dB, a surface in the right place, the same twice."""
    truth, size = ball(0.8, samples=128), 32
    views, new = around(8, seed=1), around(2, seed=2)
    target, target_new = images(truth, views, size), images(truth, new, size)
    rays = [view.rays(cameras.pixel_grid(size, size)) for view in views]
    def learn(iterations):
        field, g = ngp.Field(dataclasses.replace(ngp.NANO, bound=1.5, finest_resolution=96), seeded()), seeded(1)
        occupancy = ngp.Occupancy(field.config)
        occupancy.carve(target.opacity.reshape(8, 1, size, size), views)
        adam = torch.optim.Adam([{"params": field.encoding.parameters(), "lr": 2e-2}, {"params": field.mlp.parameters(), "lr": 5e-3}])
        for i in range(iterations):
            v = i % 8
            seen = ngp.render(field, *rays[v], g, occupancy)
            loss = (seen.colour - target.colour[v]).square().mean() + (seen.opacity - target.opacity[v]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if i % 16 == 15:
                occupancy.update(field, g)
        return field, occupancy, loss.item()
    field, occupancy, _ = learn(240)
    with torch.no_grad():
        seen = torch.stack([ngp.render(field, *view.rays(cameras.pixel_grid(size, size)), None, occupancy).colour for view in new])
    psnr = -10 * (seen - target_new.colour).square().mean().log10()
    assert psnr > 25.5, f"{psnr:.1f} dB"
    assert occupancy.occupied.float().mean() < 0.15
    assert abs(volume_and_area(ngp.extract_mesh(field, 32, occupancy=occupancy))[0] / (4 / 3 * np.pi * 0.8**3) - 1) < 0.15
    assert learn(8)[2] == learn(8)[2]
