"""Gradual pruning and AC/DC: which weights go, when, and that none is missed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsekd.dst import ACDC, GMP, GraNet, RigL, scores
from sparsekd.nn import SparseLinear, sparse_modules


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def sizes(model: nn.Module) -> list[int]:
    return [m.topology.nnz for _, m in sparse_modules(model)]


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=5), st.data())
def test_the_smallest_of_all_layers_are_counted_where_they_are(magnitudes, data):
    flat = [(m, i) for i, layer in enumerate(magnitudes) for m in layer]
    k = data.draw(st.integers(0, len(flat)))
    counts = [0] * len(magnitudes)
    for _, layer in sorted(flat, key=lambda entry: entry[0])[:k]:  # stable: earlier layers first
        counts[layer] += 1
    tensors = {str(i): torch.tensor(m, dtype=torch.float32) for i, m in enumerate(magnitudes)}
    assert list(scores.smallest_overall(tensors, k).values()) == counts


@pytest.mark.parametrize("begin", [0, 4])
def test_the_sparsity_follows_the_cubic_and_ends_exactly(begin, make_dense_network, train):
    model = make_dense_network()
    dst = GMP(model, sgd(model), sparsity=0.9, every=2, begin=begin, until=21)
    total, found = dst.numel(), []
    for t in range(1, 31):
        train(dst, 1)
        found.append(dst.nnz())
        tick = min(t // 2 * 2, 20)  # 21 is rounded down to a multiple of every
        left = min(1.0, 1 - (tick - begin) / (20 - begin)) if tick > begin else 1.0
        assert found[-1] == round((1 - (0.9 - 0.9 * left**3)) * total)
    assert found == sorted(found, reverse=True)
    assert found[19] == found[-1] == round(0.1 * total)


def test_global_pruning_keeps_the_largest_of_all_layers(make_dense_network):
    model = make_dense_network()
    weights = torch.cat([m.values.detach().abs() for _, m in sparse_modules(model)])
    largest = weights.sort(descending=True).values[: round(0.3 * len(weights))]
    dst = GMP(model, sgd(model), sparsity=0.7, every=1, until=1)
    assert dst.step()
    kept = torch.cat([m.values.detach().abs() for _, m in sparse_modules(model)])
    assert torch.equal(kept.sort(descending=True).values, largest)


def test_pruning_by_layer_gives_every_layer_the_same_sparsity(make_dense_network):
    model = make_dense_network()
    dst = GMP(model, sgd(model), sparsity=0.7, every=1, until=1, scope="layer")
    before = {name: m.values.detach().abs() for name, m in sparse_modules(model)}
    assert dst.step()
    for name, module in sparse_modules(model):
        nnz = module.topology.nnz
        assert abs(nnz - 0.3 * module.topology.numel) < 1
        assert torch.equal(
            module.values.detach().abs().sort(descending=True).values,
            before[name].sort(descending=True).values[:nnz],
        )


def test_mean_density_of_the_schedule_of_rigl_s_comparison():
    """ResNet-50 of Gale et al.: prune from 10k to 25k of 32k steps, every 1k."""
    for sparsity, published in ((0.8, 0.546), (0.9, 0.489)):
        layer = SparseLinear(100, 1000, sparsity=0.0)
        dst = GMP(layer, sgd(layer), sparsity=sparsity, every=1000, begin=10_000, until=25_000)
        kept = [dst.target(t) / 100_000 for t in range(0, 33_000, 1000)]
        assert sum(kept) / len(kept) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize("method", [GMP, GraNet])
def test_a_skipped_update_is_made_up_for(method, make_dense_network, backward):
    model = make_dense_network()
    opt = sgd(model)
    dst = method(model, opt, sparsity=0.8, every=1, until=5)
    goal = round(0.2 * dst.numel())
    for t in range(1, 7 if method is GMP else 5):
        opt.zero_grad()
        backward(model, t)
        if t in (1, 2, 3, 5):
            model[3].values.grad[0] = math.inf
            if dst.schedule(t) is not None:
                with pytest.warns(RuntimeWarning, match="skipped"):
                    assert not dst.step()
            continue
        dst.step()
    assert dst.nnz() == goal


def test_pruned_weights_are_neither_stored_nor_computed(make_dense_network, train):
    model = make_dense_network()
    dst = GMP(model, sgd(model), sparsity=0.9, every=1, until=2)
    train(dst, 4)
    for _, module in sparse_modules(model):
        state = dst.optimizer.state[module.values]["momentum_buffer"]
        assert len(module.values) == len(module.values.grad) == len(state) == module.topology.nnz
    assert sum(sizes(model)) == round(0.1 * dst.numel())


def test_granet_keeps_layers_equal_between_pruning_and_regrowth(make_dense_network, train):
    """Regeneration is per layer: it leaves them as large as pruning alone would."""
    model = make_dense_network()
    plain = copy.deepcopy(model)
    train(GraNet(model, sgd(model), sparsity=0.9, every=1, until=2), 1)
    train(GMP(plain, sgd(plain), sparsity=0.9, every=1, until=1), 1)
    assert sizes(model) == sizes(plain)
    assert any(a != b for a, b in zip(_topologies(model), _topologies(plain), strict=True))


def test_granet_that_moves_nothing_is_gmp(make_dense_network, train):
    models = [make_dense_network(), make_dense_network()]
    options = {"sparsity": 0.8, "every": 3}
    train(GMP(models[0], sgd(models[0]), until=12, **options), 15)
    moves = {"drop_fraction": 0.0, "final_drop_fraction": 0.0}
    train(GraNet(models[1], sgd(models[1]), until=13, **moves, **options), 15)
    for (name, a), (_, b) in zip(*map(sparse_modules, models), strict=True):
        assert a.topology == b.topology, name
        assert torch.equal(a.values, b.values)


def test_granet_without_pruning_is_rigl(make_network, train):
    models = [make_network(), make_network()]
    train(RigL(models[0], sgd(models[0]), drop_fraction=0.5, every=3, until=100), 12)
    nnz = sum(sizes(models[1]))
    sparsity = 1 - nnz / sum(m.topology.numel for _, m in sparse_modules(models[1]))
    options = {"every": 3, "until": 100, "final_drop_fraction": 0.0, "drop_fraction": 0.5}
    train(GraNet(models[1], sgd(models[1]), sparsity=sparsity, **options), 12)
    for (_, a), (_, b) in zip(*map(sparse_modules, models), strict=True):
        assert a.topology == b.topology
        assert torch.equal(a.values, b.values)


def test_granet_prunes_in_its_window_and_regrows_beyond(make_dense_network, train):
    model = make_dense_network()
    options = {"prune_until": 7, "until": 15, "final_drop_fraction": 0.4}
    dst = GraNet(model, sgd(model), sparsity=0.9, every=2, **options)
    found, moved = [], []
    for _ in range(16):
        before = _topologies(model)
        train(dst, 1)
        found.append(dst.nnz())
        moved.append(before != _topologies(model))
    assert [t for t, m in enumerate(moved, 1) if m] == [2, 4, 6, 8, 10, 12, 14]
    assert found[4] > found[5] == found[-1] == round(0.1 * dst.numel())


def test_acdc_alternates_between_everything_and_the_target(make_dense_network, train):
    model = make_dense_network()
    dst = ACDC(model, sgd(model), sparsity=0.8, compress=(3, 7), decompress=(5,))
    full, sparse = dst.numel(), round(0.2 * dst.numel())
    found = []
    for _ in range(9):
        train(dst, 1)
        found.append(dst.nnz())
    assert found == [full] * 2 + [sparse] * 2 + [full] * 2 + [sparse] * 3


def test_acdc_decompresses_with_zeros(make_dense_network, train):
    model = make_dense_network().eval()
    dst = ACDC(model, sgd(model), sparsity=0.8, compress=(1,), decompress=(2,))
    train(dst, 1)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    before = model(x)
    train(dst, 1)
    assert dst.nnz() == dst.numel()
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-14)


def test_a_skipped_compression_happens_in_the_next_iteration(make_dense_network, backward):
    model = make_dense_network()
    dst = ACDC(model, sgd(model), sparsity=0.8, compress=(1,))
    backward(model)
    model[3].values.grad[0] = math.inf
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert not dst.step()
    dst.optimizer.zero_grad()
    backward(model)
    assert dst.step()
    assert dst.nnz() == dst.target(2) == round(0.2 * dst.numel())


@pytest.mark.parametrize(
    "method, wrong, named",
    [
        (GMP, {"sparsity": 1.5, "until": 9}, "sparsity: expected"),
        (GMP, {"sparsity": 0.1, "until": 9}, "sparsity: expected at least the model's"),
        (GMP, {"sparsity": 0.9, "until": 9, "every": 0}, "every: expected"),
        (GMP, {"sparsity": 0.9, "until": 9, "every": 2, "begin": 8}, "begin"),
        (GMP, {"sparsity": 0.9, "until": 9, "scope": "row"}, "scope: expected"),
        (GraNet, {"sparsity": 0.9, "until": 9, "every": 2, "drop_fraction": 2}, "drop_fraction"),
        (GraNet, {"sparsity": 0.9, "until": 9, "final_drop_fraction": -1}, "final_drop_fraction"),
        (ACDC, {"sparsity": 2.0, "compress": (1,)}, "sparsity: expected"),
        (ACDC, {"sparsity": 0.9, "compress": (0,)}, "compress, decompress: expected a positive"),
        (ACDC, {"sparsity": 0.9, "compress": (3,), "decompress": (3,)}, "no common number, got 3"),
    ],
)
def test_arguments_out_of_range_are_refused(method, wrong, named, make_network):
    model = make_network()
    with pytest.raises(ValueError, match=named):
        method(model, sgd(model), **wrong)


def _topologies(model: nn.Module) -> list:
    return [m.topology for _, m in sparse_modules(model)]


def test_frozen_layers_count_for_nothing(make_dense_network, train):
    model = make_dense_network()
    model[0].values.requires_grad_(False)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    dst = GMP(model, opt, sparsity=0.9, every=1, until=1)
    train(dst, 1)
    assert model[0].topology.density == 1
    assert sum(sizes(model)[1:]) == round(0.1 * sum(m.topology.numel for m in (model[3], model[6])))
