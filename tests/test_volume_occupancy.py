"""Where space is empty: by masks, by the field; and from where what is left is seen."""
import dataclasses

import pytest
import torch

import ngp
import presets
from cameras import Cameras, pixel_grid
from tests.support.fields import TINY, Analytic, around, ball, centers, images, seeded
from volume import Occupancy


def test_update_empties_cells_slowly_and_keeps_a_thin_field():
    field = ball(occupancy_cells=12, occupancy_decay=0.8)
    occupancy = Occupancy(field.config)
    fractions = []
    for step in range(6):
        occupancy.update(field, seeded(step))
        fractions.append(occupancy.occupied.float().mean().item())
    assert fractions[0] == 1 and 0.05 < fractions[-1] < 0.25  # twice the threshold, times 0.8 a step
    same = Occupancy(field.config)
    for step in range(6):
        same.update(field, seeded(step))
    assert torch.equal(same.occupied, occupancy.occupied)
    thin = Analytic(lambda x: 1e-4 + 4e-4 * (x[:, 0] > 0))
    occupancy = Occupancy(thin.config)
    for step in range(60):
        occupancy.update(thin)
    assert torch.equal(occupancy.occupied, centers(thin.config)[..., 0] > 0)


def test_a_cell_that_was_infinitely_dense_can_be_forgotten():
    dense = Analytic(lambda x: torch.full_like(x[:, 0], torch.inf), occupancy_decay=0.5)
    occupancy = Occupancy(dense.config)
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
    config = presets.NANO_FIELD
    views, size = around(count, focal=1.7, center=(0.6, 0.0), seed=2), 128
    rays_o, rays_d = views.rays(pixel_grid(size, size).expand(count, -1, 2))
    along = (rays_o * torch.nn.functional.normalize(rays_d, dim=-1)).sum(-1)
    masks = (rays_o.square().sum(-1) - along**2 < 1.5**2).float().reshape(count, 1, size, size)
    assert masks[..., 0].any()
    if gap:
        inner = masks[..., gap:-gap, gap:-gap]
        masks = torch.nn.functional.pad(inner, (gap, gap, gap, gap))
    occupancy = Occupancy(config)
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
        occupancy = Occupancy(config)
        occupancy.carve(masks, around(1, focal=1.7), valid)
        shares.append(occupancy.occupied.float().mean())
    assert shares[0] == shares[1] == shares[2] > 1.1 * shares[3]


def test_carving_can_be_switched_off():
    views = around(2)
    masks = torch.zeros(2, 1, 16, 16)
    occupancy = Occupancy(dataclasses.replace(TINY, carve=False))
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
        occupancy = Occupancy(field.config)
        occupancy.carve(masks, around(count))
        assert occupancy.occupied[inner].all() == kept
    more = Occupancy(dataclasses.replace(field.config, forgiven_views=7))
    more.carve(masks, around(6))
    assert not more.occupied[inner].all()


def test_what_no_photograph_shows_is_empty_where_there_are_many():
    """Frames that all cut the ball leave the space beside them open where there are few, not where there are six."""
    field = ball(occupancy_cells=32, samples_per_ray=128, bound=3.0)
    distance = centers(field.config).norm(dim=-1)
    open_cells = []
    for count in (5, 6):
        views = around(count)
        views = dataclasses.replace(views, focal=3 * views.focal)
        masks = images(field, views, 48).opacity.reshape(count, 1, 48, 48)
        assert (masks[:, :, 0] > 0.5).any(2).all()
        occupancy = Occupancy(field.config)
        occupancy.carve(masks, views)
        assert occupancy.occupied[distance < 0.5].all()
        open_cells.append((distance[occupancy.occupied] > 2).sum())
    assert open_cells[1] < 0.1 * open_cells[0]


def test_carving_goes_by_the_mask_threshold():
    config = dataclasses.replace(TINY, occupancy_cells=16)
    masks = torch.zeros(1, 1, 16, 16)
    masks[..., 4:12, 4:8] = 0.3
    masks[..., 4:12, 8:12] = 0.9
    occupied = []
    for threshold in (0.1, 0.5):
        occupancy = Occupancy(dataclasses.replace(config, mask_threshold=threshold))
        occupancy.carve(masks, around(1))
        occupied.append(occupancy.occupied)
    assert (occupied[0] | ~occupied[1]).all() and occupied[1].sum() < 0.7 * occupied[0].sum()


def test_carving_keeps_the_ball_and_little_else():
    field, views = ball(occupancy_cells=32, samples_per_ray=128), around(5)
    masks = images(field, views, 48).opacity.reshape(5, 1, 48, 48)
    occupancy = Occupancy(field.config)
    occupancy.carve(masks, views)
    distance = centers(field.config).norm(dim=-1)
    assert occupancy.occupied[distance < 0.8].all() and not occupancy.occupied[distance > 1.3].any()
    assert occupancy.occupied.sum() < 1.7 * (distance < 0.85).sum()
    assert torch.equal(occupancy.occupied, occupancy.possible) and occupancy.box.abs().max() < 1.3
    occupancy.density.fill_(1e9)
    occupancy.update(field)
    assert torch.equal(occupancy.occupied, occupancy.possible)  # what was carved stays carved
    one = Occupancy(dataclasses.replace(field.config, bound=6.0))
    one.carve(masks[:1], views[:1])  # a cone that ends at the camera
    depth = views[0].to_view(centers(one.config).reshape(-1, 3))[:, 2]
    assert not one.occupied.flatten()[depth < -0.4].any() and one.occupied.flatten()[depth > 6].any()
    with pytest.raises(ValueError, match="masks and cameras"):
        occupancy.carve(torch.zeros_like(masks), views)


@pytest.mark.parametrize("distance", [0.6, 2.5])  # within the cube, and before it
def test_silhouettes_of_cells_miss_nothing(distance):
    """No point of a possible cell is seen outside the silhouette, which from afar is less than twice as large."""
    occupancy = Occupancy(dataclasses.replace(TINY, occupancy_cells=12))
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
    occupancy = Occupancy(dataclasses.replace(TINY, occupancy_cells=4, bound=2.0))  # cells of side 1
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
    occupancy = Occupancy(config)
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


def test_a_field_that_has_died_says_so():
    occupancy = Occupancy(ngp.FieldConfig(occupancy_cells=4))
    with pytest.raises(FloatingPointError, match="empty everywhere"):
        occupancy.set_occupied(torch.zeros(4, 4, 4, dtype=torch.bool))
    assert occupancy.occupied.all()
