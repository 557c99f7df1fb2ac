"""The backend "dense_cuda", on CPU tensors: torch's kernels are there, too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from recorded import plan_tensors
from structures import assert_corrects_what_is_not_finite, assert_padding_meets_nothing

import sparsekd as skd
from sparsekd import Topology, ops
from sparsekd.errors import BackendError, TopologyError
from sparsekd.ops import dense_products
from sparsekd.ops.gpu import structure as gpu_structure
from sparsekd.testing import (
    assert_layer_matches_dense,
    poisoned_memory,
    random_layer,
)

# Halves are multiplied by torch as it likes: rounded once, or in parts.
LIMITS = {torch.float32: 2e-5} | {
    dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)
}


@pytest.fixture
def on_dense(dense_cuda) -> Iterator[None]:
    """Run the test on the backend "dense_cuda"."""
    gpu_structure._known.clear()
    with skd.backend("dense_cuda"):
        yield


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_random_layers_equal_masked_dense(on_dense, seed: int, dtype: torch.dtype) -> None:
    case = dataclasses.replace(random_layer(seed), dtype=dtype)
    with poisoned_memory():
        assert_layer_matches_dense(case, LIMITS[dtype])


def test_a_rewire_moves_no_plan(on_dense) -> None:
    masks = [torch.rand(6, 10, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    first, other = (m >= m.flatten().kthvalue(41).values for m in masks)
    layer = skd.make_capturable(skd.nn.SparseLinear(10, 6, mask=first))
    x = torch.randn(3, 10)
    layer(x)
    before = [plan.data_ptr() for plan in plan_tensors()]
    layer.rewire(other)
    expected = torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    after = plan_tensors()
    assert [plan.data_ptr() for plan in after] == before
    assert any(torch.equal(plan, other.flatten().nonzero().squeeze(1)) for plan in after)


def test_plans_take_24_bytes_a_nonzero(on_dense) -> None:
    layer = skd.nn.SparseLinear(256, 256, sparsity=0.5, seed=0)
    layer(torch.randn(8, 256, requires_grad=True)).sum().backward()
    taken = {plan.data_ptr(): plan.nbytes for plan in plan_tensors()}
    assert 24 <= sum(taken.values()) / layer.values.numel() < 25


def test_crafted_indices_are_refused(on_dense) -> None:
    crow, col = (torch.tensor(i, dtype=torch.int32) for i in ([0, 2, 3, 3], [0, 4, 1]))
    with pytest.raises(TopologyError):
        ops.linear(torch.ones(2, 4), torch.ones(3), crow, col, None, [3, 4])


def test_padding_far_beyond_the_maps_is_not_allocated(on_dense) -> None:
    """Padded, these maps would take 40 GB."""
    structure = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    conv = [1, 1, 1, 1], [50_000, 50_000], [50_000, 50_001] * 2, [1, 1], 1
    x, values = torch.tensor([[[[2.0, 3.0], [4.0, 5.0]]]]), torch.tensor([10.0])
    expected = torch.zeros(1, 1, 3, 3)
    expected[0, 0, 1, 1] = 20.0
    assert torch.equal(ops.conv2d(x, values, *structure, None, *conv), expected)
    dx = ops.conv2d_dgrad(expected, values, *structure, list(x.shape), *conv)
    assert torch.equal(dx, torch.tensor([[[[200.0, 0.0], [0.0, 0.0]]]]))
    assert ops.conv2d_wgrad(expected, x, *structure, *conv).tolist() == [40.0]


def test_large_kernels_are_computed_once(on_dense, monkeypatch) -> None:
    """csrc/cuda has no room for their windows; torch's results could not be corrected."""
    for name in ("conv2d", "conv2d_dgrad", "conv2d_wgrad"):
        monkeypatch.setattr(dense_products, name, lambda *args: pytest.fail("densified"))
    structure = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 41 * 41 - 1]).int()
    conv = [1, 1, 41, 41], [1, 1], [0, 0, 0, 0], [1, 1], 1
    x, values, grad = torch.ones(1, 1, 41, 42), torch.tensor([2.0, 3.0]), torch.ones(1, 1, 1, 2)
    assert ops.conv2d(x, values, *structure, None, *conv).tolist() == [[[[5.0, 5.0]]]]
    dx = torch.zeros(1, 1, 41, 42)
    dx[..., 0, :2], dx[..., -1, -2:] = 2.0, 3.0
    assert torch.equal(ops.conv2d_dgrad(grad, values, *structure, list(x.shape), *conv), dx)
    assert ops.conv2d_wgrad(grad, x, *structure, *conv).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_infinity_reaches_what_has_it_among_its_terms(
    on_cuda, on_dense, batch: int, value: float, dtype: torch.dtype
) -> None:
    options = {"padding": (1, 2), "stride": (1, 2), "groups": 2}
    case = dataclasses.replace(
        random_layer(0), in_features=8, out_features=6, batch=(batch,), density=0.3, dtype=dtype,
        kernel_size=(3, 3), map_size=(5, 6), options=options,
    )  # fmt: skip
    assert_padding_meets_nothing(case, value, 2 * LIMITS[dtype], "dense_cuda")
    assert on_cuda.repeats()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_bad_row_leaves_the_others_alone(on_cuda, on_dense, value: float) -> None:
    topology = Topology.from_mask(torch.eye(6, 10, dtype=torch.bool))
    x, values = torch.ones(4, 10), torch.ones(6, requires_grad=True)
    x[2, 3] = value
    y = skd.functional.linear(topology, values, x)
    expected = torch.ones(4, 6)
    expected[2, 3] = value
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert y[expected.isfinite()].eq(1).all()
    (dvalues,) = torch.autograd.grad(y.sum(), values)
    assert dvalues.isfinite().tolist() == [True, True, True, False, True, True]
    assert on_cuda.repeats()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_pixels_that_no_tap_reaches_have_no_gradient(on_cuda, on_dense, monkeypatch, value) -> None:
    """Also where torch's kernel multiplies a weight that is not finite by zeros between strides."""
    exact = dense_products.conv2d_dgrad
    monkeypatch.setattr(dense_products, "conv2d_dgrad", lambda *args: exact(*args) * math.nan)
    structure = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32)
    conv = [2, 1, 1, 1], [2, 3], [0, 0, 0, 0], [1, 1], 1
    grad, values = torch.ones(2, 2, 2, 2), torch.tensor([1.0, value])
    expected = torch.zeros(2, 1, 3, 4)
    expected[:, :, ::2, ::3] = value
    dx = ops.conv2d_dgrad(grad, values, *structure, list(expected.shape), *conv)
    torch.testing.assert_close(dx, expected, equal_nan=True, rtol=0, atol=0)
    assert on_cuda.repeats()


def test_results_are_corrected_where_one_is_not_finite_and_nowhere_else(on_cuda) -> None:
    assert_corrects_what_is_not_finite()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_it_is_missing_without_a_gpu() -> None:
    with (
        pytest.raises(BackendError, match="'dense_cuda' cannot run here"),
        skd.backend("dense_cuda"),
    ):
        pass
