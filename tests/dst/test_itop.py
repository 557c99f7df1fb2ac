"""What has been explored, and growth that prefers what has not."""

from __future__ import annotations

import pytest
import torch

from sparsekd.dst import ITOP, SET, Exploration, RigL, Static
from sparsekd.nn import SparseLinear, sparse_modules


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("method", [SET, RigL, ITOP])
def test_the_rate_starts_at_the_density_rises_and_counts_what_was_there(
    method, make_network, train
):
    model = make_network()
    dst = method(model, sgd(model), drop_fraction=0.4, every=1, until=100)
    explored = Exploration(model)
    seen = {name: m.topology.mask() for name, m in sparse_modules(model)}
    assert explored.rate == dst.nnz() / dst.numel()
    rates, bound = [explored.rate], explored.rate
    for t in range(1, 20):
        train(dst, 1)
        explored.record()
        rates.append(explored.rate)
        bound += dst.schedule(t) * dst.nnz() / dst.numel()
        for name, module in sparse_modules(model):
            seen[name] |= module.topology.mask()
        assert rates[-1] >= dst.nnz() / dst.numel()
        assert rates[-2] <= rates[-1] <= min(1.0, bound + 1e-12)
        assert sum(int(m.sum()) for m in seen.values()) == round(rates[-1] * dst.numel())
    assert rates[-1] > rates[0]


def test_static_explores_nothing(make_network, train):
    model = make_network()
    explored = Exploration(model)
    before = explored.rate
    train(Static(model, sgd(model)), 5)
    explored.record()
    assert explored.rate == before


def test_exploration_continues_from_its_state(make_network, train):
    model = make_network()
    dst = SET(model, sgd(model), every=1, until=100)
    explored = Exploration(model)
    train(dst, 3)
    explored.record()
    resumed = Exploration(model)
    assert resumed.rate < explored.rate
    resumed.load_state_dict(explored.state_dict())
    for one in (explored, resumed):
        one.record()
    assert resumed.rate == explored.rate


@pytest.mark.parametrize("seed", range(5))
def test_itop_grows_what_never_was_as_long_as_there_is_any(seed):
    layer = SparseLinear(10, 10, sparsity=0.7, seed=seed)
    dst = ITOP(layer, sgd(layer), drop_fraction=0.5, every=1, until=10**9, seed=seed)
    fired = layer.topology.mask()
    for _ in range(8):
        before = layer.topology.mask()
        unfired = int((~fired).sum())
        assert dst.step()
        grown = layer.topology.mask() & ~before
        k = dst.last_update[""].grown
        assert int((grown & ~fired).sum()) == min(k, unfired)
        fired |= layer.topology.mask()
        assert dst.explored.rate == int(fired.sum()) / 100
    assert fired.all()


def test_itop_explores_faster_than_set(make_network, train):
    rates = []
    for method in (SET, ITOP):
        model = make_network()
        explored = Exploration(model)
        dst = method(model, sgd(model), drop_fraction=0.5, every=1, until=10**9)
        for _ in range(3):
            train(dst, 1)
            explored.record()
        rates.append(explored.rate)
    assert rates[0] < rates[1]
