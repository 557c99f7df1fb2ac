"""Gradients that torch itself stores sparsely: those of embeddings."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from sparsekd import dst
from sparsekd.dst.gradients import is_finite
from sparsekd.nn import SparseLinear

METHODS = {
    "set": lambda m, o: dst.SET(m, o, every=1, until=100),
    "rigl": lambda m, o: dst.RigL(m, o, every=1, until=100),
    "gmp": lambda m, o: dst.GMP(m, o, sparsity=0.9, every=1, until=5),
    "granet": lambda m, o: dst.GraNet(m, o, sparsity=0.9, every=1, until=9, prune_until=5),
}


def build(embedding: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(embedding(10, 6, sparse=True), SparseLinear(6, 5, sparsity=0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("embedding", [nn.Embedding, nn.EmbeddingBag])
def test_a_gradient_that_is_not_finite_skips_the_update(embedding, method, bad):
    model = build(embedding)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = METHODS[method](model, optimizer)
    tokens = torch.tensor([[1, 2, 2], [3, 1, 9]])
    for fault in (False, True, False):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        before = model[1].topology
        assert model[0].weight.grad.layout == torch.sparse_coo
        if fault:
            model[0].weight.grad._values()[0, 0] = bad
            with pytest.warns(RuntimeWarning, match=r"skipped, the gradient of 0\.weight"):
                assert not updater.step()
            assert model[1].topology is before
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "no weight is left")
                assert updater.step()
            assert model[1].topology is not before


@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.to_sparse_coo(),
        lambda x: x.to_sparse(1),
        lambda x: torch.cat([x.to_sparse_coo(), x.to_sparse_coo()]),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_sparse_csc(),
        lambda x: x.to_sparse_bsr((2, 2)),
    ],
    ids=["dense", "coo", "hybrid", "stacked", "csr", "csc", "bsr"],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_every_layout_of_a_gradient(convert, bad):
    x = torch.eye(4)
    x[2, 2] = bad
    assert is_finite(convert(x)) == (bad == 1)


def test_duplicates_and_nothing():
    twice = torch.sparse_coo_tensor([[1, 1]], [3e38, 3e38], (4,))
    assert not is_finite(twice)  # their sum, which the optimizer takes, overflows
    assert is_finite(torch.sparse_coo_tensor([[1, 1]], [3e38, -3e38], (4,)))
    assert is_finite(torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), [], (4,)))
