"""SRigL: one fan-in a layer, ablation of neurons that few salient weights reach."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsekd.dst import SRigL
from sparsekd.nn import SparseLinear, densify, sparse_modules
from sparsekd.sparsity import fan_in_masks


def srigl(model: nn.Module, **options) -> SRigL:
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return SRigL(model, opt, **({"every": 1, "until": 10**9, "drop_fraction": 0.4} | options))


def two_layers(rows: int, cols: int, nnz: int, seed: int) -> nn.Sequential:
    masks = fan_in_masks({"0": (rows, cols)}, {"0": nnz}, seed=seed)
    first = SparseLinear(cols, rows, mask=masks["0"], seed=seed)
    return nn.Sequential(first, SparseLinear(rows, 3, sparsity=0.5, seed=seed)).double()


def naive(weight: Tensor, gradient: Tensor, target: int, k: int, share: float) -> Tensor:
    """Follow the paper's steps by sorting tuples, row by row."""
    rows, cols = weight.shape
    active = [(abs(weight[r, c].item()), r, c) for r, c in (weight != 0).nonzero().tolist()]
    kept = sorted(active)[k:]
    kept_at = {(r, c): w for w, r, c in kept}
    free = [
        (-abs(gradient[r, c].item()), r, c)
        for r in range(rows)
        for c in range(cols)
        if (r, c) not in kept_at
    ]
    salient = [0] * rows
    for _, r, _ in kept + sorted(free)[:k]:
        salient[r] += 1
    fan_in = target / len({r for _, r, _ in active})
    best = sorted(range(rows), key=lambda r: -salient[r])
    number = sum(s >= max(1.0, share * fan_in) for s in salient)
    best = best[: max(number, -(-target // cols))]
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for r in best:
        order = sorted(
            range(cols),
            key=lambda c: (-kept_at.get((r, c), -1.0), -abs(gradient[r, c].item())),
        )
        mask[r, order[: target // len(best)]] = True
    return mask


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 8),
    cols=st.integers(2, 9),
    density=st.floats(0.1, 0.8),
    fraction=st.floats(0, 1),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
def test_an_update_follows_the_paper(rows, cols, density, fraction, share, seed):
    model = two_layers(rows, cols, max(rows, round(density * rows * cols)), seed)
    dst = srigl(model, min_salient=share)
    dst.schedule = lambda iteration: fraction
    twin = densify(copy.deepcopy(model))
    x = torch.randn(5, cols, generator=torch.Generator().manual_seed(seed)).double()
    for net in (model, twin):
        net(x).tanh().square().sum().backward()
    first = model[0]
    target = first.topology.nnz
    if target == rows * cols:
        return
    weight = first.dense_weight().detach()
    expected = naive(weight, twin[0].weight.grad, target, int(fraction * target), share)
    dst.step()
    assert torch.equal(first.topology.mask(), expected)


def test_weak_neurons_are_ablated_and_the_others_take_their_weights():
    model = two_layers(10, 40, 80, seed=0)
    with torch.no_grad():
        model[0].values[:32] *= 1e-6  # the first four neurons
        model[1].values.mul_(model[1].topology.col_indices >= 4)  # and nobody listens to them
    dst = srigl(model)
    dst.schedule = lambda iteration: 0.4
    model(torch.randn(6, 40).double()).square().sum().backward()
    assert dst.step()
    fans = model[0].topology.crow_indices.diff()
    assert fans.tolist() == [0] * 4 + [13] * 6
    assert (model[0].dense_weight()[:4] == 0).all()


def test_the_last_layer_loses_no_neuron():
    layer = SparseLinear(40, 10, mask=fan_in_masks({"": (10, 40)}, {"": 80})[""])
    with torch.no_grad():
        layer.values[:32] *= 1e-6
    dst = srigl(layer)
    dst.schedule = lambda iteration: 0.4
    x = torch.randn(6, 40)
    (layer(x) * torch.tensor([0.0] * 4 + [1.0] * 6)).sum().backward()
    assert dst.step()
    assert layer.topology.crow_indices.diff().tolist() == [8] * 10


def test_no_ablation_at_zero_share_keeps_the_fan_in(make_network, train):
    model = make_network()
    dst = srigl(model, min_salient=0.0)
    train(dst, 6)
    for name, module in sparse_modules(model):
        fans = module.topology.crow_indices.diff()
        assert len(fans[fans > 0].unique()) == 1, name


def test_a_share_out_of_range_is_refused(make_network):
    with pytest.raises(ValueError, match="min_salient: expected 0 to 1, got 3"):
        srigl(make_network(), min_salient=3)
