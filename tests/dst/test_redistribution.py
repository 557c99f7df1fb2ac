"""Growth shared between layers: exact totals, shares, limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.dst import SNFS, RigLSG, RigLSM
from sparsekd.dst.redistribution import FULLEST, redistribute
from sparsekd.nn import sparse_modules

LAYERS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 50), st.floats(0, 1e3)), min_size=1, max_size=6
)


@given(LAYERS, st.floats(0, 1))
def test_as_many_grow_as_go_and_no_layer_overflows(layers, fraction):
    nnz = {i: stored for i, (stored, _, _) in enumerate(layers)}
    numel = {i: stored + free for i, (stored, free, _) in enumerate(layers)}
    importance = {i: mean for i, (_, _, mean) in enumerate(layers)}
    counts = redistribute(nnz, numel, importance, fraction)
    assert sum(drop for drop, _ in counts.values()) == sum(grow for _, grow in counts.values())
    for i, (drop, grow) in counts.items():
        assert 0 <= drop <= fraction * nnz[i]
        assert 0 <= nnz[i] - drop + grow <= numel[i]


def test_growth_is_proportional_to_importance():
    nnz, numel = dict.fromkeys("abc", 100), dict.fromkeys("abc", 1000)
    counts = redistribute(nnz, numel, {"a": 5.0, "b": 3.0, "c": 2.0}, 0.5)
    assert counts == {"a": (50, 75), "b": (50, 45), "c": (50, 30)}


def test_equal_shares_grow_equally_and_no_importance_gives_back():
    nnz, numel = {"a": 100, "b": 40}, {"a": 1000, "b": 1000}
    assert redistribute(nnz, numel, {"a": 1.0, "b": 1.0}, 0.5) == {"a": (50, 35), "b": (20, 35)}
    assert redistribute(nnz, numel, {"a": 0.0, "b": 0.0}, 0.5) == {"a": (50, 50), "b": (20, 20)}


def test_what_a_layer_cannot_take_is_spread_equally_over_the_others():
    nnz, numel = {"a": 10, "b": 100, "c": 100}, {"a": 20, "b": 1000, "c": 1000}
    counts = redistribute(nnz, numel, {"a": 98.0, "b": 1.0, "c": 1.0}, 0.5)
    room = 20 - 5
    assert counts["a"] == (5, math.floor(FULLEST * room + 0.5))
    assert counts["b"][1] == counts["c"][1] == (105 - counts["a"][1]) // 2


def test_an_important_layer_that_is_nearly_dense_drops_at_most_its_sparsity():
    counts = redistribute({"a": 90, "b": 50}, {"a": 100, "b": 100}, {"a": 9.0, "b": 1.0}, 0.5)
    assert counts["a"][0] == 9
    counts = redistribute({"a": 90, "b": 50}, {"a": 100, "b": 100}, {"a": 1.0, "b": 9.0}, 0.5)
    assert counts["a"][0] == 45


@pytest.mark.parametrize("method", [RigLSG, RigLSM, SNFS])
def test_layers_are_weighed_by_the_mean_over_their_weights(method, make_network, backward, train):
    model = make_network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"redistribute": True} if method is SNFS else {}
    dst = method(model, opt, drop_fraction=0.5, every=4, until=10**6, **options)
    train(dst, 3)
    opt.zero_grad()
    backward(model, 3)
    nnz = {name: m.topology.nnz for name, m in sparse_modules(model)}
    numel = {name: m.topology.numel for name, m in sparse_modules(model)}
    if method is RigLSG:
        weighed = {n: m.values.grad.clone() for n, m in sparse_modules(model)}
    elif method is RigLSM:
        state = opt.state
        weighed = {n: state[m.values]["momentum_buffer"] for n, m in sparse_modules(model)}
    topology = {name: m.topology for name, m in sparse_modules(model)}
    assert dst.step()
    if method is SNFS:  # its mean includes the gradient of this iteration
        weighed = {n: dst.mean[n].view(-1)[t.flat_indices()] for n, t in topology.items()}
    means = {name: weight.abs().mean().item() for name, weight in weighed.items()}
    expected = redistribute(nnz, numel, means, dst.schedule(4))
    assert {n: (u.dropped, u.grown) for n, u in dst.last_update.items()} == expected
    assert {n: m.topology.nnz for n, m in sparse_modules(model)} != nnz
    assert dst.nnz() == sum(nnz.values())


def test_without_momentum_sm_goes_by_the_gradient(make_network, backward):
    results = []
    for method in (RigLSG, RigLSM):
        model = make_network()
        dst = method(model, torch.optim.SGD(model.parameters(), lr=0.1), every=1, until=100)
        backward(model)
        assert dst.step()
        results.append([m.topology for _, m in sparse_modules(model)])
    assert results[0] == results[1]
