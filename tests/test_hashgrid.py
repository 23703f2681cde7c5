"""The hash encoding: parity with the released kernel, interpolation by hand, its gradient, which levels are hashed."""
import itertools
import json

import pytest
import torch

import hashgrid
import parity
from hashgrid import HashGrid

CONFIGS = ["small_tiled", "small_hash", "official_tiled", "official_hash"]


def tiny(levels=3, features=2, rows=6, base=2, finest=9, hashed=True, bound=1.5, seed=0) -> HashGrid:
    return HashGrid(levels, features, rows, base, finest, hashed, bound, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tag", CONFIGS)
def test_encoding_agrees_with_the_released_kernel(tag):
    f = parity.load("grid")
    c = json.loads(str(f["in_configs"]))[tag]
    encoding = HashGrid(c["L"], c["C"], c["log2"], c["base"], c["desired"], not c["gt"], float(f["in_bound"]))
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


def test_encoding_interpolates_a_dense_level_by_hand():
    encoding = tiny(levels=1, features=1, rows=7, base=4, bound=1.0)  # position u * 3 + 0.5, 5 corners a side
    encoding.table.data = torch.arange(len(encoding.table)).float()[:, None]  # row of corner (i, j, k): i + 5 j + 25 k
    u = torch.tensor([[0.5, 0.5, 0.5], [0.0, 1.0, 0.1], [0.2, 0.7, 0.9]])
    x = torch.cat([2 * u - 1, torch.tensor([[1.1, 0, 0], [0, 0, -1.01]])])
    expected = (u * 3 + 0.5) @ torch.tensor([1.0, 5, 25])  # trilinear interpolation of a linear function is exact
    parity.assert_close(encoding(x)[:, 0], torch.cat([expected, torch.zeros(2)]), atol=1e-4)


def test_a_hashed_level_by_hand():
    """The eight rows of Instant NGP's Eq. 4, in integers without a width, and the features of a point as their mean."""
    encoding = tiny(levels=1, features=1, rows=6, base=100)
    scale, rows = 99, 64
    assert encoding.scale.tolist() == [[scale]] and encoding.hashed_from == 0 and len(encoding.table) == rows
    cell = torch.tensor([37, 2, 81])
    u = cell / scale  # position u * scale + 0.5, half a cell from every side: all weights are 1/8
    found, weights = hashgrid.corners(u[None], encoding.levels)
    expected = []
    for step in itertools.product((0, 1), repeat=3):
        x, y, z = (cell + torch.tensor(step)).tolist()
        expected.append((x ^ y * 2654435761 ^ z * 805459861) % rows)
    assert found.flatten().tolist() == expected
    parity.assert_close(weights.flatten(), torch.full((8,), 1 / 8), atol=1e-4)
    encoding.table.data = torch.rand(rows, 1, generator=torch.Generator().manual_seed(1))
    features = hashgrid.encode(u[None], encoding.table, encoding.levels)
    parity.assert_close(features[0], encoding.table[expected].mean(0), atol=1e-4)


@pytest.mark.parametrize("hashed", [True, False])
def test_encoding_gradient_is_that_of_finite_differences(hashed):
    encoding = tiny(hashed=hashed).double()
    x = torch.rand(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3.2 - 1.6  # some outside
    def f(table):
        return torch.func.functional_call(encoding, {"table": table}, (x,))
    table = torch.rand(encoding.table.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(f, table.requires_grad_(), rtol=1e-6)


def test_no_level_behind_a_hashed_one_is_dense():
    """Growth by a whole number: rounding makes a middle level one corner larger than its rows, but not the next one."""
    levels = hashgrid.level_table(5, 16, 2, 72, hashed=True)
    side = levels.scale[:, 0].ceil().long() + 2
    fits = side**3 <= levels.rows[:, 0]
    assert not fits[2] and fits[3]
    assert levels.hashed_from == 2
    assert levels.stride[2].tolist() == levels.stride[3].tolist() == levels.stride[4].tolist()


def test_no_points_no_error():
    encoding = tiny()
    features = encoding(torch.zeros(0, 3))
    features.sum().backward()
    assert features.shape == (0, 6) and not encoding.table.grad.any()
