"""Lattices of pixels, and back to full size."""
import random

import pytest
import torch

from cameras import pixel_grid
from distillation import Lattice, random_lattice, upsample
from tests.support import parity


@pytest.mark.parametrize("size, full", [(4, 12), (8, 8), (5, 10)])
def test_lattices_cover_every_pixel_once(size, full):
    step, seen, grid = full // size, torch.zeros(full * full), pixel_grid(full, full)
    for row in range(step):
        for column in range(step):
            xy = Lattice(full, step, row, column).centers("cpu")
            assert xy.shape == (size * size, 2)
            pixel = ((1 - xy) * full / 2 - 0.5).round().long()  # (column, row): +x is left, +y is up
            assert pixel[0].tolist() == [column, row]
            index = pixel[:, 1] * full + pixel[:, 0]
            parity.assert_close(xy, grid[index], atol=1e-6)
            seen[index] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("size, full", [(4, 12), (8, 8)])
def test_picked_pixels_are_those_whose_rays_are_cast(size, full):
    """An image of its own pixels' NDC, picked, is the lattice's NDC."""
    lattice = random_lattice(size, full, random.Random(5))
    image = pixel_grid(full, full).t().reshape(1, 2, full, full)
    picked = lattice.pick(image)
    assert picked.shape == (1, 2, size, size)
    assert torch.equal(picked.flatten(2)[0].t(), lattice.centers("cpu"))


def test_lattice_draws_are_uniform():
    rng = random.Random(0)
    firsts = [random_lattice(4, 12, rng)[2:] for _ in range(900)]
    counts = [firsts.count((r, c)) for r in range(3) for c in range(3)]
    assert sum(counts) == 900 and min(counts) > 60 and max(counts) < 140


def test_a_rendering_divides_the_image():
    with pytest.raises(ValueError, match="5 pixels a side does not divide an image of 12"):
        random_lattice(5, 12, random.Random(0))


def affine(rows, columns):
    """Three affine functions of pixel positions: (1, 3, rows, columns)."""
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([0.3 + 0.01 * y, 0.9 - 0.02 * x, 0.2 + 0.01 * x - 0.015 * y])[None]


@pytest.mark.parametrize("size, full, first", [(4, 12, (0, 2)), (4, 12, (2, 1)), (8, 8, (0, 0)), (16, 32, (1, 0))])
def test_upsample_of_a_lattice(size, full, first):
    """Exact between the outer samples; outside, the outermost value goes on."""
    step = full // size
    rows, columns = (f + step * torch.arange(size).float() for f in first)
    y, x = (torch.arange(full).float().clamp(f, f + step * (size - 1)) for f in first)
    lattice = Lattice(full, step, *first)
    parity.assert_close(upsample(affine(rows, columns), lattice.grid("cpu")), affine(y, x), atol=2e-6)


def test_upsample_agrees_with_the_rays():
    """An image of its own rays' NDC, upsampled, is the NDC of the full image's pixels."""
    full, as_image = 24, lambda xy, n: xy.t().reshape(1, 2, n, n)
    everywhere = as_image(pixel_grid(full, full), full)
    lattice = Lattice(full, 3, 2, 1)
    inner = (slice(None), slice(None), slice(2, 24 - 0), slice(1, 24 - 1))
    fine = upsample(as_image(lattice.centers("cpu"), 8), lattice.grid("cpu"))
    parity.assert_close(fine[inner], everywhere[inner], atol=1e-6)
