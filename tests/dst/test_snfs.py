"""SNFS: the running mean of the dense gradient, and growth by it."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from sparsekd.dst import SNFS
from sparsekd.nn import densify, sparse_modules
from sparsekd.ops import observe


def snfs(model, **options) -> SNFS:
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SNFS(model, opt, **({"every": 4, "until": 9} | options))


def test_the_mean_is_that_of_dense_gradients_and_growth_goes_by_it(make_network, backward):
    model = make_network()
    dst = snfs(model, drop_fraction=0.4, momentum=0.8)
    mean = {name: 0.0 for name, _ in sparse_modules(model)}
    for t in range(1, 5):
        twin = densify(copy.deepcopy(model))
        for net in (model, twin):
            net.zero_grad()
            backward(net, t)
        old = {name: (m.topology.mask(), m.dense_weight().abs()) for name, m in dst.modules.items()}
        for name in mean:
            gradient = twin.get_submodule(name).weight.grad
            mean[name] = 0.8 * mean[name] + 0.2 * gradient
        assert dst.step() == (t == 4)
        if t < 4:
            dst.optimizer.step()
    k_of = dst.schedule(4)
    for name, module in dst.modules.items():
        assert torch.allclose(dst.mean[name].view_as(mean[name]), mean[name], rtol=0, atol=1e-12)
        mask, weight = old[name]
        k = math.floor(k_of * int(mask.sum()))
        kept = mask & (weight >= weight[mask].sort().values[k])
        candidates = mean[name].abs().masked_fill(kept, -1)
        grown = candidates >= candidates.view(-1).sort(descending=True).values[k - 1]
        assert torch.equal(module.topology.mask(), kept | grown)


def test_gradients_are_collected_until_the_last_update_only(make_network, train):
    model = make_network()
    dst = snfs(model)
    collecting = []
    for _ in range(11):
        collecting.append(dst._gradients in observe.listeners)
        train(dst, 1)
    assert collecting == [True] * 8 + [False] * 3


def test_a_gradient_that_is_not_finite_leaves_the_mean(make_network, train, backward):
    model = make_network()
    dst = snfs(model)
    train(dst, 2)
    before = copy.deepcopy(dst.mean)
    backward(model)
    poisoned = (model(torch.full((2, 4, 6, 6), math.inf, dtype=torch.float64)).sum()) * 0
    poisoned.backward()
    dst.step()
    assert all(torch.equal(dst.mean[name], before[name]) for name in before)


def test_momentum_out_of_range_is_refused(make_network):
    with pytest.raises(ValueError, match="momentum: expected 0 to 1"):
        snfs(make_network(), momentum=1.5)
