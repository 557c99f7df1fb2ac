"""Initial variance follows the weights a neuron has, not those it could have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.nn import SparseConv2d, SparseLinear
from sparsekd.nn.init import active_fans, kaiming_
from sparsekd.sparsity import generator_for
from sparsekd.topology import Topology


def uneven_topology(rows: int = 64, cols: int = 4096) -> Topology:
    """Return a matrix whose rows have 1, 2, 4, ... weights."""
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for row in range(rows):
        mask[row, : 2 ** (row % 13)] = True
    return Topology.from_mask(mask)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_active_fans_equal_counting_the_mask(groups):
    mask = torch.rand(8, 6, 3, 2, generator=torch.Generator().manual_seed(groups)) < 0.3
    fan_in, fan_out = active_fans(Topology.from_mask(mask), groups)
    by_row = mask.sum((1, 2, 3), keepdim=True).expand_as(mask)
    grouped = mask.view(groups, -1, 6, 3, 2)
    by_channel = grouped.sum((1, 3, 4), keepdim=True).expand_as(grouped).reshape(mask.shape)
    assert torch.equal(fan_in, by_row[mask])
    assert torch.equal(fan_out, by_channel[mask])


@pytest.mark.parametrize("law", ["uniform", "normal"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_values_have_the_promised_variance(mode, law):
    topology = uneven_topology()
    fan_in, fan_out = active_fans(topology)
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    values = torch.empty(topology.nnz, dtype=torch.float64)
    kaiming_(values, topology, mode=mode, law=law, gain=2.0, generator=generator_for(0))
    standard = values * fan.sqrt() / 2.0  # should have mean 0 and variance 1, at every fan
    n = topology.nnz
    assert abs(standard.mean()) < 5 / math.sqrt(n)
    assert abs(standard.var() - 1) < 5 * math.sqrt(2 / n)
    if law == "uniform":
        assert standard.abs().max() <= math.sqrt(3)


def test_preactivations_keep_their_variance_at_any_fan_in():
    topology = uneven_topology(rows=9, cols=256)
    x = torch.randn(256, topology.cols, generator=generator_for(1), dtype=torch.float64)
    second = torch.zeros(topology.rows, dtype=torch.float64)
    draws = 100
    for seed in range(draws):
        values = torch.empty(topology.nnz, dtype=torch.float64)
        kaiming_(values, topology, gain=math.sqrt(2), generator=generator_for(seed))
        weight = torch.zeros(topology.numel, dtype=torch.float64)
        weight[topology.flat_indices()] = values
        second += (x @ weight.view(topology.rows, topology.cols).t()).square().mean(0) / draws
    # A neuron of fan-in 1 is the noisiest: w**2 of a uniform law varies by 0.9 of its mean.
    assert (second - 2).abs().max() < 2 * 5 * 0.9 / math.sqrt(draws)


def test_a_full_mask_gives_the_law_of_the_dense_layer():
    for sparse, dense in (
        (SparseLinear(200, 300, sparsity=0), nn.Linear(200, 300)),
        (SparseConv2d(20, 300, 3, groups=2, sparsity=0), nn.Conv2d(20, 300, 3, groups=2)),
    ):
        bound = 1 / math.sqrt(dense.weight[0].numel())
        for drawn in (sparse.values, sparse.bias):
            assert 0.95 * bound < drawn.abs().max() <= bound * (1 + 1e-6)
        torch.testing.assert_close(sparse.values.std(), dense.weight.std(), rtol=0.02, atol=0)


def test_a_sparse_layer_is_drawn_by_active_fan_in_and_its_bias_is_not():
    linear = SparseLinear(400, 300, sparsity=0.99)
    fan_in, _ = active_fans(linear.topology)
    assert (linear.values.abs() <= 1 / fan_in.sqrt() + 1e-6).all()
    assert linear.values.abs().max() > 1 / math.sqrt(8)
    assert linear.bias.abs().max() <= 1 / math.sqrt(400) + 1e-6


def test_reset_parameters_follows_a_generator_or_the_global_one():
    linear = SparseLinear(20, 10, sparsity=0.5, seed=3)
    first = linear.values.detach().clone()
    torch.manual_seed(0)
    linear.reset_parameters()
    second = linear.values.detach().clone()
    torch.manual_seed(0)
    linear.reset_parameters()
    assert torch.equal(linear.values, second)
    assert not torch.equal(first, second)
    linear.reset_parameters(generator_for(1))
    third = linear.values.detach().clone()
    linear.reset_parameters(generator_for(1))
    assert torch.equal(linear.values, third)
    assert linear.values.is_leaf
    assert linear.values.requires_grad


def test_it_refuses():
    topology = uneven_topology(4, 4096)
    with pytest.raises(ShapeError, match="values: expected shape"):
        kaiming_(torch.empty(3), topology)
    with pytest.raises(UnsupportedError, match="mode: expected one of fan_in, fan_out, fan_avg"):
        kaiming_(torch.empty(topology.nnz), topology, mode="fan")
    with pytest.raises(UnsupportedError, match="law: expected one of uniform, normal"):
        kaiming_(torch.empty(topology.nnz), topology, law="cauchy")


def test_nothing_to_draw():
    assert kaiming_(torch.empty(0), Topology.from_mask(torch.zeros(3, 4) > 0)).numel() == 0
