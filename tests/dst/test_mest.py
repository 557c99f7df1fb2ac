"""MEST: exact sparsities before and after regrowth, steps of elasticity, the combined score."""

from __future__ import annotations

import pytest
import torch

from sparsekd.dst import MEST
from sparsekd.nn import SparseLinear, sparse_modules


def mest(model, **options) -> MEST:
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return MEST(model, opt, **({"sparsity": 0.7, "every": 1, "until": 17} | options))


def test_mutation_prunes_below_the_target_regrows_and_freezes(make_network, train):
    model = make_network()
    dst = mest(model, mutation=0.1)
    for t in range(1, 17):
        before = [m.topology for _, m in sparse_modules(model)]
        nnz = dst.nnz()
        train(dst, 1)
        e = 1.0 if t / 17 < 9 / 16 else 0.5 if t / 17 < 3 / 4 else 0.0
        assert dst.nnz() == round(0.3 * dst.numel())
        dropped = sum(update.dropped for update in dst.last_update.values())
        assert nnz - dropped == round((0.3 - 0.1 * e) * dst.numel())
        if e == 0:
            assert before == [m.topology for _, m in sparse_modules(model)]


def test_extra_weights_train_and_go(make_network, train):
    model = make_network()
    dst = mest(model, mutation=0.0, extra=0.2)
    found = []
    for _ in range(16):
        train(dst, 1)
        found.append(dst.nnz())
    n = dst.numel()
    assert found == [round(0.5 * n)] * 9 + [round(0.4 * n)] * 3 + [round(0.3 * n)] * 4


def test_layers_keep_their_proportions():
    model = torch.nn.Sequential(
        SparseLinear(20, 20, sparsity=0.5, seed=0), SparseLinear(20, 20, sparsity=0.9, seed=1)
    )
    dst = mest(model, sparsity=0.8, mutation=0.0, extra=0.1)
    assert dst.step()
    assert [m.topology.nnz for _, m in sparse_modules(model)] == [200, 40]


def test_the_gradient_counts_in_the_score():
    layer = SparseLinear(4, 1, sparsity=0.0, bias=False)
    with torch.no_grad():
        layer.values.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    dst = mest(layer, sparsity=0.5, mutation=0.0, gradient_weight=1.0)
    layer(torch.tensor([[9.0, 0.0, 0.0, 0.0]])).sum().backward()  # scores 10, 2, 3, 4
    assert dst.step()
    kept = layer.dense_weight().detach().view(-1) != 0
    assert kept.tolist() == [True, False, False, True]


@pytest.mark.parametrize("wrong", [{"sparsity": 2}, {"mutation": -1}, {"extra": 2}, {"every": 0}])
def test_arguments_out_of_range_are_refused(wrong, make_network):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        mest(make_network(), **wrong)
