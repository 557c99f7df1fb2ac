"""Infinity and NaN reach the results that have them among their terms, and no others.

The terms are those of the stored weights whose input, or output gradient, lies inside its map.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekd as skd
from sparsekd import Topology, functional, ops
from sparsekd.ops.dispatch import backends
from sparsekd.ops.gradient_tiles import Tile

BACKENDS = ("reference", "cpp", "dense", "auto")
BATCHES = (1, 2, 3, 8, 15, 16, 17, 33)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPOILT = (math.inf, -math.inf, math.nan)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution: what its ops are called with."""

    weight_shape: tuple[int, int, int, int] = (8, 4, 3, 3)
    size: tuple[int, int] = (6, 6)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    density: float = 0.4

    @property
    def geometry(self) -> tuple[object, ...]:
        stride, padding, dilation = map(list, (self.stride, self.padding, self.dilation))
        return list(self.weight_shape), stride, padding, dilation, self.groups

    def topology(self) -> Topology:
        generator = torch.Generator().manual_seed(3)
        mask = torch.rand(self.weight_shape, generator=generator) < self.density
        mask[0, 0, 0, 0] = True  # a corner tap meets padding at two borders
        return Topology.from_mask(mask)

    def output_size(self) -> tuple[int, int]:
        top, bottom, left, right = self.padding
        kernel, padded = (
            self.weight_shape[2:],
            (self.size[0] + top + bottom, self.size[1] + left + right),
        )
        down, across = (
            (padded[d] - self.dilation[d] * (kernel[d] - 1) - 1) // self.stride[d] + 1
            for d in (0, 1)
        )
        return down, across


CASES = {
    "same": Case(),
    "without zeros": Case(density=1.0),
    "strided": Case(size=(7, 9), stride=(2, 3), padding=(1, 2, 0, 3)),
    "dilated, in groups": Case(size=(8, 5), dilation=(2, 1), padding=(2, 2, 1, 1), groups=2),
    "even kernel, padded to the same size": Case((8, 4, 4, 2), padding=(1, 2, 0, 1)),
    "depthwise": Case((6, 1, 3, 3), groups=6, density=0.7),
    "wide padding": Case(size=(3, 2), padding=(3, 3, 4, 4)),
    "pointwise": Case((8, 16, 1, 1), padding=(0, 0, 0, 0)),
    "no overlap": Case((8, 4, 2, 2), size=(9, 10), stride=(4, 3), padding=(0, 0, 1, 1)),
}


def tensors(case: Case, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": random(batch, case.weight_shape[1] * case.groups, *case.size),
        "values": random(case.topology().nnz),
        "grad": random(batch, case.weight_shape[0], *case.output_size()),
    }


def expected(case: Case, x: Tensor, values: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Sum up in float64, nonzero by nonzero, what lies inside the maps."""
    topology, (top, _, left, _) = case.topology(), case.padding
    rows, channels, high, wide = case.weight_shape
    x, values, grad = x.double(), values.double(), grad.double()
    y, dx, dvalues = torch.zeros_like(grad), torch.zeros_like(x), torch.zeros_like(values)
    for slot, position in enumerate(topology.flat_indices().tolist()):
        row, rest = divmod(position, channels * high * wide)
        channel, tap = divmod(rest, high * wide)
        channel += row // (rows // case.groups) * channels
        a = torch.arange(grad.shape[2]) * case.stride[0] + tap // wide * case.dilation[0] - top
        b = torch.arange(grad.shape[3]) * case.stride[1] + tap % wide * case.dilation[1] - left
        h = ((a >= 0) & (a < x.shape[2])).nonzero()
        w = ((b >= 0) & (b < x.shape[3])).nonzero().squeeze(1)
        a, b = a[h], b[w]
        y[:, row, h, w] += x[:, channel, a, b] * values[slot]
        dx[:, channel, a, b] += grad[:, row, h, w] * values[slot]
        dvalues[slot] = (grad[:, row, h, w] * x[:, channel, a, b]).sum()
    return {"y": y, "dx": dx, "dvalues": dvalues}


def results(case: Case, x: Tensor, values: Tensor, grad: Tensor) -> dict[str, Tensor]:
    topology = case.topology()
    structure = topology.crow_indices, topology.col_indices
    return {
        "y": ops.conv2d(x, values, *structure, None, *case.geometry),
        "dx": ops.conv2d_dgrad(grad, values, *structure, list(x.shape), *case.geometry),
        "dvalues": ops.conv2d_wgrad(grad, x, *structure, *case.geometry),
    }


def assert_alike(found: Tensor, wanted: Tensor, name: str) -> None:
    """Compare numbers, infinities with their signs, and where there are NaN."""
    eps = torch.finfo(found.dtype).eps
    scale = wanted[wanted.isfinite()].abs().max().item() if wanted.isfinite().any() else 1.0
    torch.testing.assert_close(
        found.double(),
        wanted,
        rtol=0,
        atol=max(100 * eps * scale, 1e-12),
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def spoil(tensor: Tensor, value: float) -> Tensor:
    """Return a tensor with a number that is not finite, at a border of maps."""
    tensor = tensor.clone(memory_format=torch.preserve_format)
    if tensor.ndim == 1:
        tensor[0] = value
    else:
        tensor[-1, 0, tensor.shape[2] // 2, -1] = value
    return tensor


@pytest.mark.parametrize("name", ["x", "values", "grad"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_geometry(backend: str, case: Case, name: str) -> None:
    for batch, value in zip((1, 3, 17), SPOILT, strict=True):
        given = tensors(case, batch, torch.float64)
        given[name] = spoil(given[name], value)
        wanted = expected(case, **given)
        with skd.backend(backend):
            for key, found in results(case, **given).items():
                assert_alike(found, wanted[key], f"{key}, batch {batch}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_batch_layout_and_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    case = Case(density=0.2)
    for batch in BATCHES if dtype == torch.float32 else (1, 3, 16):
        name = ("x", "values", "grad")[(batch + threads) % 3]
        given = tensors(case, batch, dtype)
        given[name] = spoil(given[name], SPOILT[batch % 2])
        wanted = expected(case, **given)
        for layout in LAYOUTS:
            laid_out = {
                key: t.contiguous(memory_format=layout) if t.ndim == 4 else t
                for key, t in given.items()
            }
            for backend in BACKENDS:
                with skd.backend(backend):
                    for key, found in results(case, **laid_out).items():
                        assert_alike(found, wanted[key], f"{key}, {backend}, {batch}, {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_as_dense_torch_has(backend: str) -> None:
    """oneDNN leaves padding out: of 36 outputs an infinite corner tap reaches 25."""
    dense = torch.nn.Conv2d(16, 16, 3, padding=1, bias=False)
    x = torch.randn(16, 16, 6, 6)
    layer = skd.nn.SparseConv2d.from_dense(
        dense, mask=torch.ones_like(dense.weight, dtype=torch.bool)
    )
    with torch.no_grad():
        dense.weight[0, 0, 0, 0] = layer.values[0] = math.inf
    with skd.backend(backend), torch.no_grad():
        found, wanted = layer(x).isfinite(), dense(x).isfinite()
    assert (~found).sum() == 16 * 25
    if torch.backends.mkldnn.is_available():
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_a_layer_large_enough_to_run_dense(backend: str, density: float) -> None:
    """A weight without zeros goes to torch's own layer, whose derivative is torch's as well."""
    case = Case((40, 40, 3, 3), size=(8, 8), padding=(1, 1, 1, 1), density=density)
    uneven = dataclasses.replace(case, padding=(0, 2, 1, 1))
    for layer in (case, uneven):
        for dtype in (torch.float32, torch.float64):
            for name in ("x", "values", "grad"):
                given = tensors(layer, 5, dtype)
                given[name] = spoil(given[name], math.inf)
                with skd.backend("cpp"):
                    wanted = results(layer, **given)
                x, values = given["x"].requires_grad_(), given["values"].requires_grad_()
                with skd.backend(backend):
                    y = functional.conv2d(layer.topology(), values, x, padding=layer.padding)
                    y.backward(given["grad"])
                for key, found in {"y": y.detach(), "dx": x.grad, "dvalues": values.grad}.items():
                    assert torch.equal(found.isnan(), wanted[key].isnan()), (key, name)
                    assert torch.equal(found.isinf(), wanted[key].isinf()), (key, name)


def _linear(x: Tensor, values: Tensor, grad: Tensor, topology: Topology) -> dict[str, Tensor]:
    structure, shape = (topology.crow_indices, topology.col_indices), list(topology.shape)
    return {
        "y": ops.linear(x, values, *structure, None, shape),
        "dx": ops.linear_dgrad(grad, values, *structure, shape),
        "dvalues": ops.linear_wgrad(grad, x, *structure, shape),
    }


@pytest.mark.parametrize("pattern", ["csr", "rows in panels", "without zeros"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_layers(backend: str, pattern: str, threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(24, 40, generator=generator) < 0.3
    if pattern == "rows in panels":  # whose input gradient goes by the rows of the weight
        mask = mask[::8].repeat_interleave(8, 0)
    mask = mask | (pattern == "without zeros")
    topology = Topology.from_mask(mask)
    rows, cols = mask.nonzero().T
    for batch in (1, 3, 16, 17, 70):
        for name in ("x", "values", "grad"):
            given = {
                "x": torch.randn(batch, 40, dtype=torch.float64),
                "values": torch.randn(topology.nnz, dtype=torch.float64),
                "grad": torch.randn(batch, 24, dtype=torch.float64),
            }
            given[name].view(-1)[-1] = SPOILT[batch % 3]
            x, values, grad = given.values()
            wanted = {
                "y": grad.new_zeros(batch, 24).index_add_(1, rows, x[:, cols] * values),
                "dx": grad.new_zeros(batch, 40).index_add_(1, cols, grad[:, rows] * values),
                "dvalues": (grad[:, rows] * x[:, cols]).sum(0),
            }
            with skd.backend(backend):
                for key, found in _linear(x, values, grad, topology).items():
                    assert_alike(found, wanted[key], f"{key}, batch {batch}, {name}")


def _tile_sums(op: Callable[..., None], case: Case, given: dict[str, Tensor]) -> Tensor:
    shape = case.weight_shape
    out = given["x"].new_zeros(shape[0], math.prod(shape[1:]))
    op(given["grad"], given["x"], out, Tile(0, shape[0], 0, shape[1]), *case.geometry)
    return out.view(shape)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_dense_gradient_that_growth_ranks(backend: str, case: Case) -> None:
    case = dataclasses.replace(case, density=1.0)
    for batch, value in zip((1, 3, 17), SPOILT, strict=True):
        for name in ("x", "grad"):
            given = tensors(case, batch, torch.float64)
            given[name] = spoil(given[name], value)
            wanted = expected(case, **given)["dvalues"].view(case.weight_shape)
            found = _tile_sums(backends.module(backend).conv2d_wgrad_tile, case, given)
            assert_alike(found, wanted, f"{name}, batch {batch}")


def test_numbers_that_are_all_nan_take_no_longer_than_a_few_terms_each() -> None:
    """A run that has diverged still ends: every sum stops at its first NaN."""
    case = Case((64, 64, 3, 3), size=(16, 16), density=0.5)
    given = {key: torch.full_like(t, math.nan) for key, t in tensors(case, 8).items()}
    with skd.backend("cpp"):
        assert all(found.isnan().all() for found in results(case, **given).values())


def test_overflow_of_a_sum_alone_is_no_infinity() -> None:
    """What is not finite is summed up in double: terms that cancel leave the rest."""
    topology = Topology.from_mask(torch.ones(1, 3, 1, 1, dtype=torch.bool))
    x = torch.tensor([3e38, 3e38, -3e38])[None, :, None, None].repeat(3, 1, 2, 2)
    y = functional.conv2d(topology, torch.ones(3), x)
    assert torch.equal(y, torch.full_like(y, 3e38))
    assert not F.conv2d(x, torch.ones(1, 3, 1, 1)).isnan().any()
