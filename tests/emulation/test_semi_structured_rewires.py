"""Rewires of weights that are 2:4: plans of the backend "semi_structured" are written in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import Tape, plan_tensors
from semi_structured_kernels import mask_2to4, moved, operands, transposable_mask
from torch import Tensor

import sparsekd as skd
from sparsekd import Topology
from sparsekd.errors import UnsupportedError
from sparsekd.ops import reference
from sparsekd.ops.dispatch import backends
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.ops.gpu import structure as gpu_structure
from sparsekd.testing import relative_error

FIRST_TWO = torch.tensor([True, True, False, False]).repeat(64, 16)


@pytest.fixture(autouse=True)
def no_structures() -> None:
    gpu_structure._known.clear()


def capturable(mask: Tensor) -> skd.nn.SparseLinear:
    layer = skd.nn.SparseLinear(*mask.shape[::-1], mask=mask, layout="nm")
    return skd.make_capturable(layer.half())


def test_plans_stay_where_they_are_and_say_what_fresh_ones_do(on_semi_structured) -> None:
    layer, x = capturable(transposable_mask(64, 64)), torch.randn(8, 64).half().requires_grad_()
    layer(x).sum().backward()
    before = [(tensor.data_ptr(), tensor.shape) for tensor in plan_tensors()]
    old = [tensor.clone() for tensor in plan_tensors()]
    layer.rewire(transposable_mask(64, 64, seed=3))
    assert [(tensor.data_ptr(), tensor.shape) for tensor in plan_tensors()] == before
    renewed = [tensor.clone() for tensor in plan_tensors()]
    assert not any(map(torch.equal, old, renewed))
    gpu_structure._known.clear()
    layer(x).sum().backward()
    assert all(map(torch.equal, plan_tensors(), renewed))
    assert on_semi_structured.total() == 4


def test_recorded_products_follow_a_rewire(on_semi_structured) -> None:
    """Of torch's calls, which a CUDA graph replays with the tensors that they had."""
    layer, ours = capturable(transposable_mask(64, 64)), backends.module("semi_structured")
    x, grad = torch.randn(8, 64).half(), torch.randn(8, 64).half()

    def products(module: Any) -> tuple[Tensor, Tensor]:
        weight = layer.values, layer.crow_indices, layer.col_indices
        y = module.linear(x, *weight, layer.bias, [64, 64])
        return y, module.linear_dgrad(grad, *weight, [64, 64])

    with torch.no_grad():
        products(ours)
        with Tape(pytest.MonkeyPatch()) as tape:
            recorded = products(ours)
        for seed in (4, 5):
            layer.rewire(transposable_mask(64, 64, seed))
            layer.values.normal_()
            for result in recorded:
                result.fill_(float("nan"))
            tape.replay()
            for result, expected in zip(recorded, products(reference), strict=True):
                assert relative_error(result, expected) < 2e-3


def test_a_rewire_that_ends_2to4_is_refused(on_semi_structured) -> None:
    """Of the transpose, which the layout does not keep; as long as it was never multiplied, not."""
    other = mask_2to4(64, 64, seed=7)
    layer, x = capturable(transposable_mask(64, 64)), torch.randn(8, 64).half()
    layer(x)
    layer.rewire(other)
    layer = capturable(transposable_mask(64, 64))
    layer(x.requires_grad_()).sum().backward()
    before = layer.topology.mask()
    with pytest.raises(UnsupportedError, match="semi-structured metadata"):
        layer.rewire(other)
    assert torch.equal(layer.topology.mask(), before)


def test_indices_written_in_place_change_what_runs(on_semi_structured) -> None:
    """As a checkpoint writes them; other 2:4 ones go on with new metadata."""
    args, miss = operands(FIRST_TWO), moved(FIRST_TWO, (9, 61), (9, 14))
    for mask, takes in (
        (FIRST_TWO, True),
        (mask_2to4(64, 64), True),
        (miss, False),
        (FIRST_TWO, True),
    ):
        written = Topology.from_mask(mask)
        args[2].copy_(written.crow_indices)
        args[3].copy_(written.col_indices)
        assert (decide("linear", args).backend == "semi_structured") == takes
        dense = torch.zeros(64, 64).double()
        dense[mask] = args[1].double()
        assert relative_error(skd.ops.linear(*args), args[0].double() @ dense.t()) < 2e-3


def test_a_rewire_of_any_other_layer_changes_what_runs(on_semi_structured) -> None:
    layer = skd.nn.SparseLinear(64, 64, mask=transposable_mask(64, 64), bias=False).half()
    x = torch.randn(8, 64).half().requires_grad_()
    layer(x).sum().backward()
    assert on_semi_structured.total() == 2
    layer.rewire(moved(FIRST_TWO, (9, 61), (9, 14)))
    on_semi_structured.clear()
    y = layer(x)
    y.sum().backward()
    assert not on_semi_structured
    with skd.backend("reference"):
        assert torch.equal(layer(x), y)
