"""The hash encoding: parity with the released kernel, interpolation by hand, its gradient, which levels are hashed;
the kernels of `hashgrid.cu` against plain torch, and what happens where they cannot be had.
"""
import importlib
import itertools
import json
import math

import pytest
import torch

import hashgrid
from gpu import hashgrid_kernel, kernels
from hashgrid import HashGrid
from tests.support import parity

CONFIGS = ["small_tiled", "small_hash", "official_tiled", "official_hash"]


def tiny(levels=3, features=2, rows=6, base=2, finest=9, hashed=True, bound=1.5, seed=0) -> HashGrid:
    return HashGrid(levels, features, rows, base, finest, hashed, bound, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tag", CONFIGS)
def test_encoding_agrees_with_the_released_kernel(tag):
    f = parity.load("grid")
    c = json.loads(str(f["in_configs"]))[tag]
    encoding = HashGrid(c["L"], c["C"], c["log2"], c["base"], c["desired"], not c["gt"], float(f["in_bound"]))
    levels, offsets = f[f"mid_{tag}_levels"], f[f"out_{tag}_offsets"]
    assert [level.scale for level in encoding.levels] == levels[:, 0].tolist()
    assert [level.rows for level in encoding.levels] == levels[:, 2].tolist()
    if c["gt"]:  # of a hashed level every coordinate enters
        assert [3 - level.stride.count(0) for level in encoding.levels] == levels[:, 3].tolist()
    assert [level.hashed for level in encoding.levels] == levels[:, 4].bool().tolist()
    assert [level.offset for level in encoding.levels] + [len(encoding.table)] == offsets.tolist()
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
    level, = encoding.levels
    assert level.scale == scale and level.hashed and len(encoding.table) == rows
    cell = torch.tensor([37, 2, 81])
    u = cell / scale  # position u * scale + 0.5, half a cell from every side: all weights are 1/8
    found, weights = hashgrid.corners(u[None], level)
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
    fits = [(math.ceil(level.scale) + 2) ** 3 <= level.rows for level in levels]
    assert not fits[2] and fits[3]
    assert [level.hashed for level in levels] == [False, False, True, True, True]
    assert levels[2].stride == levels[3].stride == levels[4].stride


def test_a_hash_is_an_integer_without_a_sign():
    """Where the rows are no power of two, the 32 bits of the hash must not be taken for a negative number."""
    levels = hashgrid.level_table(5, 16, 2, 72, hashed=True)
    level, rows = levels[2], levels[2].rows
    assert rows & (rows - 1) and level.hashed and not levels[1].hashed
    x = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    found = hashgrid.corners(x, level)[0].t() - level.offset
    cells = (x * level.scale + 0.5).floor().long()
    negative = 0
    for cell, row in zip(cells.tolist(), found.tolist()):
        hashes = []
        for i, j, k in itertools.product((0, 1), repeat=3):
            terms = cell[0] + i, (cell[1] + j) * 2654435761, (cell[2] + k) * 805459861
            hashes.append((terms[0] ^ terms[1] ^ terms[2]) % 2**32)
        negative += sum(h >= 2**31 for h in hashes)
        assert row == [h % rows for h in hashes]
    assert negative > 100


def by_definition(x: torch.Tensor, table: torch.Tensor, levels: tuple[hashgrid.Level, ...]) -> torch.Tensor:
    """The encoding of points (N, 3) in the cube, one corner after the other, in 64-bit integers: (N, L * C)."""
    features = []
    for level in levels:
        position = x * level.scale + 0.5
        cell = position.floor()
        fraction = position - cell
        total = torch.zeros(len(x), table.shape[1])
        for step in itertools.product((0, 1), repeat=3):
            step = torch.tensor(step)
            a, b, c = ((cell.long() + step) * (torch.tensor(level.stride) % 2**32)).unbind(-1)
            index = (a ^ b ^ c if level.hashed else a + b + c) % 2**32 % level.rows
            weight = torch.where(step > 0, fraction, 1 - fraction).prod(-1)
            total += weight[:, None] * table[level.offset + index]
        features.append(total)
    return torch.cat(features, -1)


@pytest.mark.parametrize("name", ["nano", "instant_ngp", "one_feature_tiled", "eight_features_tiled",
                                  "a_level_that_is_no_power_of_two_hashed", "eight_rows_a_level"])
def test_encoding_is_that_of_its_definition(name):
    """Dense, tiled and hashed levels; points outside of the cube and on its corners; the gradient as well."""
    encoding = HashGrid(*GRIDS[name], 1.0, torch.Generator().manual_seed(0))
    x = torch.rand(500, 3, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1
    x[:8] = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    x[8:11] = torch.tensor([[0.5, 0.5, 1e30], [float("nan"), 0.5, 0.5], [0.5, float("-inf"), 0.5]])
    found = hashgrid.encode(x, encoding.table, encoding.levels)
    outside = ~((x >= 0) & (x <= 1)).all(-1)
    assert 100 < outside.sum() < 400 and not found[outside].any()
    safe = torch.where(outside[:, None], 0, x)
    expected = by_definition(safe, encoding.table, encoding.levels) * ~outside[:, None]
    parity.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad(features, encoding.table, grad)[0] for features in (found, expected)]
    parity.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_kernels_read_the_same_levels():
    levels = hashgrid.level_table(*GRIDS["nano"][:1], *GRIDS["nano"][2:])
    scale, stride, rows, offset, hashed_from = hashgrid_kernel._grids(levels, torch.device("cpu"))
    assert scale.dtype == torch.float32 and scale.tolist() == [level.scale for level in levels]
    assert stride.dtype == rows.dtype == offset.dtype == torch.int32 and stride.is_contiguous()
    assert (stride[4].long() % 2**32).tolist() == [1, 2654435761, 805459861] and stride[1].tolist() == [1, 18, 324]
    assert rows.tolist() == [736, 5832, 50656, 65536, 65536] and hashed_from == 3
    assert offset.tolist() == [0, 736, 6568, 57224, 122760]


def test_no_points_no_error():
    encoding = tiny()
    features = encoding(torch.zeros(0, 3))
    features.sum().backward()
    assert features.shape == (0, 6) and not encoding.table.grad.any()


# ---------------------------------------------------------------------------------------------- CUDA kernels

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# levels, features_per_level, log2_hashmap_size, base_resolution, finest_resolution, hashed
GRIDS = {
    "released": (16, 2, 16, 16, 8192, False),
    "instant_ngp": (16, 2, 19, 16, 2048, True),
    "nano": (5, 4, 16, 8, 160, True),
    "one_feature": (11, 1, 14, 16, 512, True),
    "one_feature_tiled": (8, 1, 10, 4, 4096, False),
    "eight_features": (3, 8, 15, 16, 200, True),
    "eight_features_tiled": (5, 8, 12, 16, 300, False),
    "a_level_that_is_no_power_of_two_hashed": (5, 2, 16, 2, 72, True),
    "eight_rows_a_level": (4, 2, 1, 2, 100, False),
}


def points(how: str, count: int = 50_001) -> torch.Tensor:
    """Points on the GPU around the unit cube, a fifth outside of it or more; "a corner": many in few cells."""
    generator = torch.Generator().manual_seed(3)
    if how == "random":
        x = torch.rand(count, 3, generator=generator) * 1.1 - 0.05
        x[:8] = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))  # the cube's own corners belong to it
        return x.cuda()

    # Sixty-four samples of each ray, one behind the other.
    rays = -(-count // 64)
    start = torch.rand(rays, 1, 3, generator=generator) * 3 - 1
    end = torch.rand(rays, 1, 3, generator=generator)
    x = start + (end - start) * torch.linspace(0, 1.5, 64)[:, None]
    if how == "a corner":
        x = 1 - x / 30
    return x.reshape(-1, 3)[:count].cuda()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@cuda
@pytest.mark.parametrize("how", ["random", "rays", "a corner"])
@pytest.mark.parametrize("name", GRIDS)
def test_kernels_agree_with_plain_torch(name, how):
    encoding = HashGrid(*GRIDS[name], 1.0, torch.Generator().manual_seed(0)).cuda()
    x = points(how)
    assert hashgrid_kernel.kernels_for(x, encoding.table) is not None
    features = hashgrid.encode(x, encoding.table, encoding.levels)
    grad = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).cuda()
    grad[::3] = 0  # samples without a gradient
    found, = torch.autograd.grad(features, encoding.table, grad)

    expected_features = hashgrid._Encode.apply(x, encoding.table, encoding.levels)
    expected, = torch.autograd.grad(expected_features, encoding.table, grad)
    errors = relative_error(features, expected_features), relative_error(found, expected)
    print(f"{name}, {how}: relative error of features {errors[0]:.1e}, of the gradient {errors[1]:.1e}")
    assert max(errors) <= 1e-5
    outside = ((x < 0) | (x > 1)).any(-1)
    assert outside.float().mean() > 0.2 and not features[outside].any()


@cuda
def test_kernels_take_tensors_as_they_come():
    """Points that lie column by column, rows from an odd address, an expanded gradient."""
    encoding = tiny().cuda()
    x = points("random", 1001)
    with torch.no_grad():
        expected = hashgrid._Encode.apply(x, encoding.table, encoding.levels)
        storage = torch.zeros(encoding.table.numel() + 1, device="cuda")
        table = storage[1:].view_as(encoding.table).copy_(encoding.table)
        assert table.data_ptr() % 16 and table.is_contiguous()
        assert relative_error(hashgrid.encode(x.t().contiguous().t(), table, encoding.levels), expected) <= 1e-5
    hashgrid.encode(x, encoding.table, encoding.levels).sum().backward()
    found, encoding.table.grad = encoding.table.grad, None
    hashgrid._Encode.apply(x, encoding.table, encoding.levels).sum().backward()
    assert relative_error(found, encoding.table.grad) <= 1e-5


@cuda
def test_no_points_no_error_on_a_gpu():
    encoding = tiny().cuda()
    features = encoding(torch.zeros(0, 3, device="cuda"))
    features.sum().backward()
    assert features.shape == (0, 6) and not encoding.table.grad.any()


@cuda
@pytest.mark.parametrize("features,dtype", [(3, torch.float32), (2, torch.float64)])
def test_plain_torch_serves_other_tables(features, dtype, capfd):
    encoding = tiny(features=features).to("cuda", dtype)
    x = points("random", 100).to(dtype)
    assert hashgrid_kernel.kernels_for(x, encoding.table) is None
    expected = tiny(features=features).to(dtype)(x.cpu())
    parity.assert_close(encoding(x).cpu(), expected, atol=1e-4)
    assert capfd.readouterr() == ("", "")  # nothing is wrong


@cuda
def test_kernels_in_a_cuda_graph():
    encoding = tiny().cuda()
    first, second = points("random", 1000).split(500)
    x = first.clone()
    def step():
        features = encoding(x)
        grad, = torch.autograd.grad(features.square().sum(), encoding.table)
        return features.detach(), grad

    # Compile and allocate before the capture, as every capture demands.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()

    x.copy_(second)
    graph.replay()
    found = [tensor.clone() for tensor in captured]
    expected = step()
    for a, b in zip(found, expected):
        assert relative_error(a, b) <= 1e-5


@pytest.fixture
def fresh():
    """No kernels compiled before, nothing said, and nothing kept of what the test does."""
    def clear():
        hashgrid_kernel._compile.cache_clear()
        kernels._say_plain_torch_is_used.cache_clear()
    clear()
    yield
    clear()


@cuda
def test_plain_torch_serves_where_the_compiler_is_missing(fresh, monkeypatch, capfd):
    encoding = tiny().cuda()
    x = points("random", 1000)
    expected = encoding(x)
    hashgrid_kernel._compile.cache_clear()
    monkeypatch.delattr(torch.cuda, "_compile_kernel")
    for _ in range(3):
        features = encoding(x)
    assert relative_error(features, expected) <= 1e-5
    features.sum().backward()
    assert encoding.table.grad.any()
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "plain torch" in said[0] and "_compile_kernel" in said[0]


@pytest.mark.parametrize("fault", ["no compiler", "no source", "no CUDA at all"])
def test_kernels_that_cannot_be_had_are_said_once(fault, fresh, monkeypatch, tmp_path, capfd):
    if fault == "no compiler":
        monkeypatch.delattr(torch.cuda, "_compile_kernel", raising=False)
    elif fault == "no source":
        monkeypatch.setattr(hashgrid_kernel, "SOURCE", tmp_path / "hashgrid.cu")
    elif torch.cuda.is_available():
        pytest.skip("there is CUDA")
    for _ in range(3):
        assert hashgrid_kernel._compile(2, 0) is None
    assert hashgrid_kernel._compile(4, 0) is None
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_no_kernels_are_looked_for_on_a_cpu(fresh, monkeypatch, capfd):
    monkeypatch.setattr(hashgrid_kernel, "_compile", lambda *_: pytest.fail("a kernel for a CPU"))
    tiny()(torch.rand(5, 3)).sum().backward()
    assert capfd.readouterr() == ("", "")


def test_torch_needs_no_toolkit_to_compile(monkeypatch):
    """torch asks for the toolkit's folder; it must not be found missing meanwhile, and unchanged afterwards."""
    extension = importlib.import_module("torch.utils.cpp_extension")
    for home in (None, "/opt/cuda"):
        monkeypatch.setattr(extension, "CUDA_HOME", home)
        with pytest.raises(ZeroDivisionError), kernels.without_toolkit():
            extension.include_paths("cuda")
            raise ZeroDivisionError
        assert extension.CUDA_HOME == home


@cuda
def test_kernels_compile_without_a_toolkit(fresh, monkeypatch):
    extension = importlib.import_module("torch.utils.cpp_extension")
    monkeypatch.setattr(extension, "CUDA_HOME", None)
    assert hashgrid_kernel._compile(2, 0) is not None
    assert extension.CUDA_HOME is None


@pytest.mark.parametrize("capability", ["70", "75", "80", "86", "89", "90", "100", "120"])
def test_kernels_compile_for_any_gpu(capability):
    """From compute capability 7.0 on, as far as this machine's compiler knows it; no GPU is needed."""
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA has no compiler for it")
    compiler = importlib.import_module("torch.cuda._utils")
    source = hashgrid_kernel.SOURCE.read_text()
    for channels, kernel in itertools.product(hashgrid_kernel.CHANNELS, ["encode_forward", "encode_backward"]):
        try:
            with kernels.without_toolkit():
                options = hashgrid_kernel.kernel_options(channels)
                binary, _ = compiler._nvrtc_compile(source, kernel, capability, nvcc_options=options)
        except RuntimeError as error:
            if "invalid value for --gpu-architecture" in str(error):
                pytest.skip(f"CUDA {torch.version.cuda} does not know {capability}")
            raise
        assert len(binary) > 1000
