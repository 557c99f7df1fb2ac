"""Sizes of zero on the backend "cuda": its kernels, and the host code that divides by sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd import Topology, ops

SIZES = (0, 1, 3)


def half(shape: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[::2] = True
    return mask


def results(y: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y.sum(), inputs)]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "cols"), list(itertools.product(SIZES, SIZES)))
def test_linear_layers(on_cuda, rows: int, cols: int) -> None:
    topology = Topology.from_mask(half((rows, cols)))
    weight = torch.zeros(rows, cols)
    for batch in SIZES:
        x, values = torch.randn(batch, cols).requires_grad_(), torch.randn(topology.nnz)
        values, bias = values.requires_grad_(), torch.randn(rows).requires_grad_()
        indices = topology.crow_indices, topology.col_indices
        y = ops.linear(x, values, *indices, bias, [rows, cols])
        expected = F.linear(x, weight.masked_scatter(topology.mask(), values), bias)
        assert_equal(results(y, (x, values, bias)), results(expected, (x, values, bias)))
        score = torch.rand(rows, cols)
        assert len(ops.grow_topk(score, *indices, topology.numel - topology.nnz)) == (
            topology.numel - topology.nnz
        )


@pytest.mark.parametrize("size", list(itertools.product(SIZES, SIZES)), ids=str)
def test_convolutions(on_cuda, size: tuple[int, int]) -> None:
    topology = Topology.from_mask(half((4, 2, 2, 2)))
    for batch in SIZES:
        x = torch.randn(batch, 4, *size).requires_grad_()
        values, bias = torch.randn(topology.nnz).requires_grad_(), torch.randn(4).requires_grad_()
        geometry = [4, 2, 2, 2], [1, 1], [1] * 4, [1, 1], 2
        indices = topology.crow_indices, topology.col_indices
        y = ops.conv2d(x, values, *indices, bias, *geometry)
        weight = torch.zeros(4, 2, 2, 2).masked_scatter(topology.mask(), values)
        expected = F.conv2d(F.pad(x, [1] * 4), weight, bias, groups=2)
        assert_equal(results(y, (x, values, bias)), results(expected, (x, values, bias)))
