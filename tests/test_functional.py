"""The functional interface: shapes it takes, paddings it resolves, examples that run."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekd as skd
from sparsekd import Topology, functional
from sparsekd.testing import (
    assert_matches_dense,
    poisoned_memory,
    relative_error,
    tolerance,
)

pytestmark = pytest.mark.usefixtures("backend")


def masked(*shape: int, density: float = 0.3) -> tuple[Topology, torch.Tensor, torch.Tensor]:
    weight = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape) < density
    return Topology.from_mask(mask), weight[mask], weight * mask


@pytest.mark.parametrize("columns", [0, 1, 7, 64])
@pytest.mark.parametrize("shape", [(9, 14), (9, 2, 7), (4, 3, 3, 2)])
def test_spmm_is_the_masked_product(shape: tuple[int, ...], columns: int) -> None:
    topology, values, weight = masked(*shape)
    x = torch.randn(topology.cols, columns, dtype=torch.float64)
    y = functional.spmm(topology, values, x)
    assert relative_error(y, weight.flatten(1) @ x) < tolerance(torch.float64, topology.cols)


@pytest.mark.parametrize("inner", [0, 1, 7, 64])
def test_sddmm_samples_the_product(inner: int) -> None:
    topology, _, _ = masked(9, 14)
    a = torch.randn(9, inner, dtype=torch.float64)
    b = torch.randn(inner, 14, dtype=torch.float64)
    sampled = functional.sddmm(topology, a, b)
    assert relative_error(sampled, (a @ b)[topology.mask()]) < tolerance(torch.float64, inner)


@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_linear_takes_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    topology, values, weight = masked(9, 14)
    x, bias = torch.randn(*lead, 14).double(), torch.randn(9).double()
    y = functional.linear(topology, values, x, bias)
    assert y.shape == (*lead, 9)
    assert relative_error(y, F.linear(x, weight, bias)) < tolerance(torch.float64, 14)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_linear_without_inputs_or_outputs(shape: tuple[int, int]) -> None:
    topology, values, weight = masked(*shape)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    y = functional.linear(topology, values, x)
    assert torch.equal(y, F.linear(x, weight))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("mode", functional.PADDING_MODES)
@pytest.mark.parametrize("padding", [0, 2, (1, 2), "same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1)])
@pytest.mark.parametrize("batched", [True, False])
def test_padding_means_what_it_means_to_torch(kernel, padding, mode, batched) -> None:
    topology, values, weight = masked(6, 2, *kernel)
    dense = nn.Conv2d(
        4, 6, kernel, padding=padding, groups=2, padding_mode=mode, dtype=torch.float64
    )
    with torch.no_grad():
        dense.weight.copy_(weight)
    x = torch.randn(3, 4, 8, 9, dtype=torch.float64)
    x = x if batched else x[0]
    options = {"padding": padding, "groups": 2, "padding_mode": mode}
    y = functional.conv2d(topology, values, x, dense.bias, **options)
    assert relative_error(y, dense(x)) < tolerance(torch.float64, topology.cols)


def test_four_sided_padding_is_top_bottom_left_right() -> None:
    topology, values, weight = masked(2, 1, 3, 3, density=1.0)
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    y = functional.conv2d(topology, values, x, padding=(0, 1, 2, 3))
    assert relative_error(y, F.conv2d(F.pad(x, (2, 3, 0, 1)), weight)) < 1e-12


def test_bias_alone_remains_without_nonzeros() -> None:
    topology = Topology.from_mask(torch.zeros(3, 2, 3, 3, dtype=torch.bool))
    values, bias = torch.empty(0, requires_grad=True), torch.randn(3)
    with poisoned_memory():
        y = functional.conv2d(topology, values, torch.randn(2, 2, 5, 5), bias, padding=1)
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand(2, 3, 5, 5))
    y.sum().backward()
    assert values.grad.shape == (0,)


def test_a_dense_twin_that_differs_is_noticed() -> None:
    layer = skd.nn.SparseLinear(12, 7, sparsity=0.5, seed=0)
    x = torch.randn(5, 12)
    assert_matches_dense(layer, x)
    honest = layer.to_dense

    def shifted() -> nn.Module:
        dense = honest()
        with torch.no_grad():
            dense.weight += 1e-3
        return dense

    layer.to_dense = shifted
    with pytest.raises(AssertionError, match="relative error"):
        assert_matches_dense(layer, x)


def test_not_finite_counts_as_an_error() -> None:
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == float("inf")
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0


@pytest.mark.parametrize(
    "name", ["topology", "functional", "testing", "ops.dispatch.context", "nn.linear", "nn.conv"]
)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"sparsekd.{name}")
    outcome = doctest.testmod(module, extraglobs={"torch": torch})
    assert outcome.failed == 0
    assert outcome.attempted > 0
