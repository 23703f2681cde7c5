"""The EFT against the released code's numbers, and what must hold for any weights."""
import dataclasses
import re

import pytest
import torch
from torch.nn import functional as F

import presets
from cameras import Cameras, pixel_grid
from checkpoints.released import PARTS
from eft import EFT, EFTConfig, EncoderLayer, SplitLinear, harmonic, hull_maps, sample_maps
from tests.support import parity, small

TINY = dataclasses.replace(presets.NANO.eft, stem=8, stages=(8, 12, 16), blocks=1, width=32, layers=1,
                           feedforward=32, depths=8, harmonics=4, relative=False)


def paper_model():
    model = EFT(EFTConfig())
    model.load_state_dict(parity.rename(parity.weights("eft"), PARTS["eft"]))
    return model


@pytest.fixture(scope="module")
def paper():
    return paper_model().eval()


def fixture_scene(name):
    """Images, input cameras, query camera, near, far and grid size of one set of eft.npz."""
    f = parity.load("eft")
    cameras = Cameras(*(f["in_cam_" + k] for k in "RTfc"))
    index = f["in_views" + name[-1]]
    near, far = f["mid_depth_range"]
    size = f[f"out_{name}_rgb"].shape[1]
    return f, (f["in_images"][index], cameras[index], cameras[int(f["in_query"])], near, far), size


def ring(n, radius=4.0):
    """n cameras on a ring, looking at the world's origin: T = (0, 0, radius)."""
    angle = torch.linspace(0, 1.2, n)
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros(n), torch.ones(n)
    R = torch.stack([torch.stack(row, -1) for row in ((c, zero, -s), (zero, one, zero), (s, zero, c))], -2)
    T = torch.tensor([[0.0, 0.0, radius]]).repeat(n, 1)
    return Cameras(R, T, torch.full((n, 2), 1.8), torch.full((n, 2), 0.05))


def tiny(seed=0):
    torch.manual_seed(seed)
    return EFT(TINY).eval()


# --- the released numbers ---

@pytest.mark.parametrize("name", ["set0", "set1"])
def test_parity_of_the_result(paper, name):
    f, (images, cameras, query, near, far), size = fixture_scene(name)
    with torch.no_grad():
        view = paper.image(paper.encode(images), images, cameras, query, size, near, far)
        trunk = paper.trunk(images)
    assert tuple(trunk.shape) == tuple(f[f"mid_{name}_latent_shape"])
    parity.assert_close(trunk[:, ::16, ::5, ::5], f[f"mid_{name}_latent_sample"], std=1e-4)
    parity.assert_close(view.color.permute(1, 2, 0)[None], f[f"out_{name}_rgb"], std=1e-4)
    parity.assert_close(view.features.permute(1, 2, 0)[None], f[f"out_{name}_features"], std=1e-4)


@pytest.mark.parametrize("name", ["set0", "set1"])
def test_parity_of_the_geometry(paper, name):
    f, (images, cameras, query, near, far), size = fixture_scene(name)
    xy = pixel_grid(size, size, images.shape[-1])
    parity.assert_close(xy, f["mid_ray_xys"].reshape(-1, 2), atol=1e-6)
    geometry = paper.geometry(cameras, query, xy[[0, 5, 21]], near, far)
    parity.assert_close(geometry.query_rays, f[f"mid_{name}_query_plucker"], std=1e-4)
    # float32 rounding of a moment of 13, times frequency 32
    parity.assert_close(geometry.reference_rays, f[f"mid_{name}_ref_plucker"], atol=5e-4)
    parity.assert_close(geometry.depths.expand(1, 3, -1, -1), f[f"mid_{name}_depth_emb"], std=1e-4)
    parity.assert_close(geometry.xy_views, f[f"mid_{name}_ndc"][..., :2], std=1e-4)


def test_parity_in_training_mode_without_dropout():
    """Batch statistics; the running ones after two encodings, as the released loop leaves them."""
    f, (images, cameras, query, near, far), size = fixture_scene("set0")
    model = paper_model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    with torch.no_grad():
        model.encode(images)
        view = model.image(model.encode(images), images, cameras, query, size, near, far)
    parity.assert_close(view.color.permute(1, 2, 0)[None], f["out_batchstat_set0_rgb"], std=1e-4)
    parity.assert_close(view.features.permute(1, 2, 0)[None], f["out_batchstat_set0_features"], std=1e-4)
    parity.assert_close(model.trunk.bn1.running_mean, f["out_batchstat_set0_bn1_running_mean"], std=1e-4)
    parity.assert_close(model.trunk.bn1.running_var, f["out_batchstat_set0_bn1_running_var"], std=1e-4)
    assert int(model.trunk.bn1.num_batches_tracked) == int(f["out_batchstat_set0_bn1_num_batches"])


def test_released_names_cover_the_model_exactly(paper):
    """Every released key is known to be unused, or exactly one rule makes it one of ours."""
    part = PARTS["eft"]
    entries = {name: tuple(shape) for name, shape, _ in parity.manifest("eft")["entries"]}
    for name in entries:
        rules = [pattern for pattern, _ in part.rules if re.search(pattern, name)]
        unused = [pattern for pattern in part.unused if re.search(pattern, name)]
        assert len(unused) == 1 or not unused and len(rules) == 1, f"{name}: {rules}, {unused}"
    assert {name: tuple(x.shape) for name, x in paper.state_dict().items()} == parity.rename(entries, part)


# --- properties ---

def encoder_layer(heads=3, dropout=0.0):
    """A layer of 24 numbers whose biases are not zero."""
    torch.manual_seed(0)
    layer = EncoderLayer(24, heads, 20, dropout, batch_first=True)
    for bias in (layer.self_attn.in_proj_bias, layer.self_attn.out_proj.bias):
        torch.nn.init.normal_(bias)
    return layer


@pytest.mark.parametrize("training", [False, True])
def test_encoder_layer_is_pytorchs(training):
    layer, x = encoder_layer().train(training), torch.randn(2, 7, 5, 24)
    expected = torch.nn.TransformerEncoderLayer.forward(layer, x.flatten(0, 1)).view(x.shape)
    parity.assert_close(layer(x), expected, atol=5e-6)


def test_plain_attention_is_pytorchs():
    layer, x = encoder_layer().eval(), torch.randn(14, 5, 24)
    expected, _ = torch.nn.MultiheadAttention.forward(layer.self_attn, x, x, x)
    parity.assert_close(layer.attend(x), expected, atol=2e-6)


def test_dropout_is_live_in_training():
    layer, x = encoder_layer(dropout=0.1).train(), torch.randn(2, 7, 5, 24)
    assert not torch.allclose(layer(x), layer(x))
    assert not torch.allclose(layer.attend(x), layer.attend(x))  # of the attention's weights, too
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_folded_attention_is_attention(heads, length):
    """The same numbers and the same gradients in tokens and parameters."""
    layer, x = encoder_layer(heads), torch.randn(4, 7, length, 24, requires_grad=True)
    attention = layer.self_attn
    inputs = [x, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias]
    plain, folded = layer.attend(x), layer.attend_folded(x)
    parity.assert_close(folded, plain, atol=5e-6)
    along = torch.randn(plain.shape)
    for a, b in zip(torch.autograd.grad(folded, inputs, along), torch.autograd.grad(plain, inputs, along)):
        parity.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(5, 8), (1, 4), (3, 1)])
def test_samples_of_maps_are_bilinear(height, width):
    """+x is left and +y up, +-1 border pixels; outside the border's values; maps that query views share broadcast."""
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 2, 3, height, width, generator=g)
    xy = torch.randn(4, 2, 6, 7, 2, generator=g) * 1.2
    xy[0, 0, 0, 0] = torch.tensor([1.0, -1.0])
    samples = sample_maps(maps, xy)
    assert samples.shape == (4, 2, 6, 7, 3)

    column, row = ((1 - xy) / 2 * torch.tensor([width - 1, height - 1])).unbind(-1)
    column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    left, top = column.floor().long(), row.floor().long()
    right, below = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    across, down = (column - left)[..., None], (row - top)[..., None]
    for view in range(2):
        pixels = maps[0, view].permute(1, 2, 0)
        def at(rows, columns):
            return pixels[rows[:, view], columns[:, view]]
        upper = torch.lerp(at(top, left), at(top, right), across[:, view])
        lower = torch.lerp(at(below, left), at(below, right), across[:, view])
        parity.assert_close(samples[:, view], torch.lerp(upper, lower, down[:, view]), atol=1e-5)


def test_points_in_the_plane_of_a_camera_have_finite_samples():
    maps = torch.randn(1, 2, 3, 5, 8)
    assert sample_maps(maps, torch.full((1, 2, 1, 1, 2), float("nan"))).isfinite().all()
    beyond = sample_maps(maps, torch.tensor([float("-inf"), 1e30]).expand(1, 2, 1, 1, 2))[0, :, 0, 0]
    assert torch.equal(beyond, maps[0, :, :, 0, -1])  # the upper right corner


def test_split_linear_is_the_linear_layer_of_the_concatenation():
    torch.manual_seed(0)
    layer = SplitLinear(7, a=3, b=1, c=5)
    a, b, c = torch.randn(2, 4, 3), torch.randn(4, 1), torch.randn(2, 1, 5)
    whole = layer(torch.cat([a, b.expand(2, -1, -1), c.expand(-1, 4, -1)], -1))
    parity.assert_close(layer.multiply(a=a, b=b, c=c) + layer.bias, whole, atol=1e-6)
    parity.assert_close(F.linear(b, layer.columns()["b"]) + layer.multiply(c=c, a=a) + layer.bias, whole, atol=1e-6)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {"weight": (7, 9), "bias": (7,)}


def test_harmonic_layout():
    e = harmonic(torch.tensor([0.3, -2.0]), 3)
    parity.assert_close(e[:3], torch.tensor([0.3, 0.6, 1.2]).sin(), atol=1e-7)
    parity.assert_close(e[9:12], torch.tensor([-2.0, -4.0, -8.0]).cos(), atol=1e-6)
    parity.assert_close(e[12:], torch.tensor([0.3, -2.0]), atol=0)


@pytest.mark.parametrize("views", range(1, 7))
def test_any_number_of_views_and_batched_equals_looped(views):
    model, cameras, images = tiny(), ring(2 * views + 2), torch.rand(2, views, 3, 32, 40)
    xy, near, far = torch.rand(2, 5, 2) * 2 - 1, torch.tensor([2.0, 2.5]), torch.tensor([6.0, 5.5])
    inputs = Cameras.stack([cameras[2:2 + views], cameras[2 + views:]])
    with torch.no_grad():
        maps = model.encode(images)
        both = model(maps, images, inputs, cameras[:2], xy, near, far)
        assert maps.shape == (2, views, TINY.width, 16, 20)
        assert both.features.shape == (2, 5, TINY.width) and both.color.shape == (2, 5, 3)
        for b in range(2):
            one = model(model.encode(images[b]), images[b], inputs[b], cameras[b], xy[b], float(near[b]), float(far[b]))
            parity.assert_close(one.features, both.features[b], atol=1e-4)
            parity.assert_close(one.color, both.color[b], atol=1e-5)


def test_order_of_the_views_does_not_matter():
    model, cameras, images = tiny(), ring(5), torch.rand(4, 3, 32, 32)
    xy, order = torch.rand(6, 2) * 2 - 1, torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        a = model(model.encode(images), images, cameras[1:], cameras[0], xy, 2.0, 6.0)
        b = model(model.encode(images[order]), images[order], cameras[1:][order], cameras[0], xy, 2.0, 6.0)
        c = model(model.encode(images[order]), images[order], cameras[1:], cameras[0], xy, 2.0, 6.0)
    parity.assert_close(b.features, a.features, atol=1e-5)
    assert (c.features - a.features).abs().max() > 1e-3  # images that changed places without their cameras do matter


def test_moving_the_world_changes_nothing():
    model, cameras, images = tiny(), ring(4), torch.rand(3, 3, 32, 32)
    g = torch.Generator().manual_seed(1)
    Q, shift = torch.linalg.qr(torch.randn(3, 3, generator=g))[0], torch.tensor([0.7, -0.4, 0.9])
    R = Q.T @ cameras.R
    moved = Cameras(R, cameras.T - shift @ R, cameras.focal, cameras.principal)
    xy = torch.rand(6, 2, generator=g) * 2 - 1
    with torch.no_grad():
        maps = model.encode(images)
        a = model(maps, images, cameras[1:], cameras[0], xy, 2.0, 6.0)
        b = model(maps, images, moved[1:], moved[0], xy, 2.0, 6.0)
    parity.assert_close(b.features, a.features, atol=1e-4)


def test_image_is_its_rays_in_any_chunks():
    model, cameras, images = tiny(), ring(3), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        maps = model.encode(images)
        view = model.image(maps, images, cameras[1:], cameras[0], 4, 2.0, 6.0, chunk=5)
        rays = model(maps, images, cameras[1:], cameras[0], pixel_grid(4, 4, 32), 2.0, 6.0)
    assert view.features.shape == (TINY.width, 4, 4) and view.color.shape == (3, 4, 4)
    parity.assert_close(view.features[:, 1, 2], rays.features[6], atol=1e-5)
    parity.assert_close(view.color[:, 3, 0], rays.color[12], atol=1e-5)


@pytest.mark.parametrize("rays", [(1, 3, 5, 6, 12), (9,), ()])
def test_image_of_some_of_its_rays(rays):
    model, cameras, images = tiny(), ring(3), torch.rand(2, 3, 32, 32)
    where = torch.zeros(16, dtype=torch.bool)
    where[list(rays)] = True
    where = where.view(4, 4)
    with torch.no_grad():
        maps = model.encode(images)
        whole = model.image(maps, images, cameras[1:], cameras[0], 4, 2.0, 6.0)
        some = model.image(maps, images, cameras[1:], cameras[0], 4, 2.0, 6.0, chunk=2, where=where)
    for part, all_of_it in zip(some, whole):
        assert part.shape == all_of_it.shape and part.dtype == all_of_it.dtype
        parity.assert_close(part, all_of_it * where, atol=1e-5)


# --- the relative form ---

def test_points_of_the_relative_form_lie_in_the_unit_sphere():
    """From where a ray enters it to where it leaves it; rays beside it have a short piece at their nearest point."""
    cameras, xy = ring(3), pixel_grid(9, 9)
    geometry = EFT(dataclasses.replace(TINY, relative=True)).geometry(cameras[1:], cameras[0], xy, -1.0, 1.0)

    # In the world: the middle of the piece of a ray, half its length, its ends.
    rays_o, rays_d = cameras[0].rays(xy)
    rays_d = F.normalize(rays_d, dim=-1)
    middle = rays_o - (rays_o * rays_d).sum(-1, keepdim=True) * rays_d
    half = (1 - middle.square().sum(-1)).clamp(min=0).sqrt()
    beside = half < 0.1
    half[beside] = 0.1
    assert 5 < beside.sum() < 76
    for n, sign in ((0, -1), (-1, 1)):
        end, _ = cameras[1:].project(middle + sign * half[:, None] * rays_d)
        parity.assert_close(geometry.xy_views[:, :, n], end, atol=1e-4)
        parity.assert_close(geometry.depths[:, n, -1], sign * half, atol=1e-4)


def ball_rays(query, side=32):
    """How near to the origin the rays of a camera pass, (side * side,)."""
    rays_o, rays_d = query.rays(pixel_grid(side, side))
    rays_d = F.normalize(rays_d, dim=-1)
    return (rays_o - (rays_o * rays_d).sum(-1, keepdim=True) * rays_d).norm(dim=-1)


@pytest.mark.parametrize("views, most", [(24, 0.96), (4, 1.1)])
def test_rays_that_see_the_hull(views, most):
    """Of masks of a ball of radius .8: all that hit the ball, none that pass it by far. Four cones hold more."""
    scene, query = small.ball(views, 64), small.ring(24, height=2.5)[3]
    model = EFT(dataclasses.replace(TINY, relative=True))
    possible, grid = hull_maps(scene.masks, scene.valid), pixel_grid(32, 32)
    near, far, sees = model.see_hull(possible, scene.cameras, query, grid)
    passes = ball_rays(query)
    assert sees[passes < 0.8].all() and not sees[passes > most].any()
    assert 150 < (passes < 0.8).sum() < sees.sum() < 700

    # Points lie about the ball, from one end of it to the other, and in the sphere round it.
    ball, sphere = (0.64 - passes**2).clamp(min=0).sqrt(), (1 - passes**2).clamp(min=0.01).sqrt()
    assert (near[passes < 0.8] <= -ball[passes < 0.8]).all() and (far[passes < 0.8] >= ball[passes < 0.8]).all()
    parity.assert_close(torch.stack([near, far])[:, ~sees], torch.stack([-sphere, sphere])[:, ~sees], atol=1e-5)
    if views == 24:
        assert (far - near)[passes < 0.6].max() < 2.2
    geometry = model.geometry(scene.cameras, query, grid, near, far)
    ends = torch.stack([near.maximum(-sphere), far.minimum(sphere)], -1)
    parity.assert_close(geometry.depths[:, [0, -1], -1], ends, atol=1e-5)

    # A batch of queries is each of them.
    _, _, two = model.see_hull(possible.expand(2, -1, -1, -1, -1), Cameras.stack([scene.cameras] * 2),
                               Cameras.stack([query, scene.cameras[0]]), grid)
    assert torch.equal(two[0], sees) and not torch.equal(two[1], sees)


@pytest.mark.parametrize("views, forgiven", [(5, False), (6, True)])
def test_one_mask_of_six_may_be_wrong(views, forgiven):
    scene = small.ball(views, 64)
    scene.masks[1] = 0
    model = EFT(dataclasses.replace(TINY, relative=True))
    _, _, sees = model.see_hull(hull_maps(scene.masks, scene.valid), scene.cameras, small.ring(24)[3],
                                pixel_grid(32, 32))
    assert bool(sees.any()) == bool(sees[ball_rays(small.ring(24)[3]) < 0.8].all()) == forgiven


@pytest.mark.parametrize("shown, cut_off", [(1.0, False), (0.45, True)])
def test_an_object_may_continue_where_an_image_shows_nothing(shown, cut_off):
    """If its mask ends there, and only then."""
    scene = small.ball(2, 64)
    scene.valid[..., round(64 * shown):] = 0
    scene.masks.mul_(scene.valid)
    possible = hull_maps(scene.masks, scene.valid)
    assert possible.shape == (2, 1, 32, 32) and (possible * 2).unique().tolist() == [0, 2]
    assert bool(possible[..., 30:].all()) == cut_off and not possible[..., :4].any()
    assert (possible >= F.max_pool2d(scene.masks, 2)).all()


# --- training and precision ---

@pytest.mark.parametrize("relative", [True, False])
def test_gradients_reach_every_parameter(relative):
    config = dataclasses.replace(presets.NANO.eft, relative=relative)
    model, cameras, images = EFT(config).train(), ring(3), torch.rand(1, 2, 3, 64, 64)
    maps = model.encode(images)
    color = model(maps, images, Cameras.stack([cameras[1:]]), cameras[:1], pixel_grid(3, 3, 64), 2.0, 6.0).color
    color.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if not name.endswith("_logit.bias"):  # a softmax does not feel a constant
            assert p.grad.abs().max() > 0, name


def test_bfloat16_autocast_keeps_the_geometry_in_float32():
    model, cameras, images = tiny(), ring(3), torch.rand(2, 3, 32, 32)
    xy = pixel_grid(4, 4, 32)
    exact = model.geometry(cameras[1:], cameras[0], xy, 2.0, 6.0)
    seen, geometry = [], model.geometry
    model.geometry = lambda *a: seen.append(geometry(*a)) or seen[-1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(model.encode(images), images, cameras[1:], cameras[0], xy, 2.0, 6.0)
    assert half.features.dtype == half.color.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(seen[0], exact))
    with torch.no_grad():
        full = model(model.encode(images), images, cameras[1:], cameras[0], xy, 2.0, 6.0)
    parity.assert_close(half.features, full.features, std=0.1)


def plane(cameras, xy):
    """Colors (n, R, 3) that cameras (n,) see along xy (R, 2) on the textured plane Z = 0 of the world."""
    o, d = cameras.rays(xy.expand(len(cameras), -1, 2))
    p = (o - o[..., 2:] / d[..., 2:] * d)[..., :2]
    x, y = p.unbind(-1)
    return torch.stack([0.5 + 0.5 * (2 * x).sin(), 0.5 + 0.5 * (3 * y).cos(), torch.sigmoid(2 * p.sum(-1))], -1)


def test_learns_the_colors_of_a_textured_plane():
    """From two views of the plane, rays of a third that training never saw."""
    model, cameras, size = tiny().train(), ring(13), 32
    inputs, unseen = cameras[[0, 12]], cameras[6]
    images = plane(inputs, pixel_grid(size, size)).transpose(-1, -2).unflatten(-1, (size, size))
    batch = images.expand(2, -1, -1, -1, -1), Cameras.stack([inputs, inputs])
    g, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(120):
        xy = torch.rand(64, 2, generator=g) * 1.2 - 0.6  # what both inputs see
        queries = cameras[[int(torch.randint(1, 6, (), generator=g)), int(torch.randint(7, 12, (), generator=g))]]
        color = model(model.encode(batch[0]), *batch, queries, xy, 2.5, 5.5).color
        loss = F.mse_loss(color, plane(queries, xy))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        color = model(model.encode(images), images, inputs, unseen, 0.6 * pixel_grid(12, 12), 2.5, 5.5).color
    truth = plane(unseen.unsqueeze(0), 0.6 * pixel_grid(12, 12))[0]
    assert F.mse_loss(color, truth) < 0.1 * truth.var(0).mean()
