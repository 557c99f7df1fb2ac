"""A rewire moves every weight to where it belongs, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd.errors import ShapeError, TopologyError
from sparsekd.nn import SparseConv2d, SparseLinear


def random_mask(shape, density: float, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@given(
    densities=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_rewire_equals_masking_the_dense_weight(densities, seed):
    conv = SparseConv2d(4, 6, 3, groups=2, sparsity=0.7, seed=seed)
    parameter = conv.values
    for step, density in enumerate(densities):
        before, old_mask = conv.dense_weight().detach(), conv.topology.mask()
        conv.values.grad = torch.randn_like(conv.values)
        grad = torch.zeros_like(before).masked_scatter_(old_mask, conv.values.grad)
        mask = random_mask(conv.topology.shape, density, seed + step)
        delta = conv.rewire(mask)
        assert conv.values is parameter
        assert torch.equal(conv.topology.mask(), mask)
        assert torch.equal(conv.dense_weight(), before * mask)
        assert torch.equal(conv.values.grad, grad[mask])
        assert torch.equal(delta.grown, ~old_mask[mask])
        assert delta.new is conv.topology
        assert conv.topology.version == step + 1


def test_survivors_are_bit_equal_and_grown_start_at_zero():
    linear = SparseLinear(10, 10, sparsity=0.5)
    old = linear.values.detach().clone()
    delta = linear.rewire(random_mask((10, 10), 0.5, 1))
    survivors = delta.source >= 0
    assert torch.equal(linear.values[survivors], old[delta.source[survivors]])
    assert not linear.values[~survivors].any()
    assert survivors.any()
    assert (~survivors).any()


def test_the_next_forward_uses_the_new_topology():
    conv = SparseConv2d(4, 6, 3, sparsity=0.9).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    conv(x)
    conv.rewire(torch.ones(6, 4, 3, 3, dtype=torch.bool))
    with torch.no_grad():
        conv.values.normal_()
    torch.testing.assert_close(conv(x), conv.to_dense()(x))
    assert conv.col_indices is conv.topology.col_indices
    assert torch.equal(conv.crow_indices, conv.topology.crow_indices)


@pytest.mark.parametrize("hooked", [False, True])
def test_length_may_change_while_an_old_graph_lives(hooked):
    linear = SparseLinear(8, 8, sparsity=0.5)
    calls = []
    if hooked:
        linear.values.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.shape))
    loss = linear(torch.randn(2, 8)).sum()
    loss.backward()
    linear.rewire(random_mask((8, 8), 0.9, 0))
    linear.values.grad = None
    linear(torch.randn(2, 8)).sum().backward()  # `loss` still holds the graph of the old length
    assert linear.values.grad.shape == linear.values.shape
    assert len(calls) == 2 * hooked
    assert loss.isfinite()


@pytest.mark.parametrize("density", [0.5, 0.9])
def test_backward_through_a_rewired_weight_is_refused(density):
    linear = SparseLinear(8, 8, sparsity=0.5)
    mask = linear.topology.mask().flip(0) if density == 0.5 else random_mask((8, 8), density, 0)
    loss = linear(torch.randn(2, 8, requires_grad=True)).sum()
    linear.rewire(mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_bad_mask_changes_nothing():
    linear = SparseLinear(8, 6, sparsity=0.5)
    before, topology = linear.values.detach().clone(), linear.topology
    with pytest.raises(ShapeError, match="mask: expected shape"):
        linear.rewire(torch.ones(8, 6, dtype=torch.bool))
    with pytest.raises(TopologyError, match=r"torch\.bool"):
        linear.rewire(torch.ones(6, 8))
    assert torch.equal(linear.values, before)
    assert linear.topology is topology


def test_an_optimizer_keeps_its_parameter_over_a_change_of_length():
    linear = SparseLinear(8, 8, sparsity=0.5)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    linear.rewire(random_mask((8, 8), 0.9, 0))
    linear(torch.randn(2, 8)).sum().backward()
    before = linear.values.detach().clone()
    optimizer.step()
    torch.testing.assert_close(linear.values, before - 0.1 * linear.values.grad)


def test_requires_grad_survives():
    linear = SparseLinear(8, 8, sparsity=0.5)
    linear.values.requires_grad_(False)
    linear.rewire(random_mask((8, 8), 0.9, 0))
    assert not linear.values.requires_grad
    assert linear.values.is_leaf


def test_rewire_in_inference_mode_leaves_a_usable_module():
    linear = SparseLinear(8, 8, sparsity=0.5)
    with torch.inference_mode():
        linear.rewire(random_mask((8, 8), 0.5, 0))
        linear.rewire(random_mask((8, 8), 0.9, 1))
    linear(torch.randn(2, 8)).sum().backward()
    assert linear.values.grad.shape == linear.values.shape
