"""Sparse models from what was saved: dense checkpoints with zeros, and states of sparse layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekd as skd
from sparsekd.errors import CheckpointError, TopologyError, UnsupportedError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Linear(16, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), head)


def pruned() -> nn.Sequential:
    """Return a dense network with zeros in its first two layers."""
    model = network()
    with torch.no_grad():
        for name in ("0", "2"):
            weight = model.get_submodule(name).weight
            weight[weight.abs() < weight.abs().quantile(0.7)] = 0
    return model


def test_zeros_of_a_dense_checkpoint_become_a_topology() -> None:
    dense, model = pruned(), network()
    model.load_state_dict(dense.state_dict())
    assert skd.sparsify(model, masks="nonzero") is model
    layers = dict(skd.nn.sparse_modules(model))
    assert list(layers) == ["0", "2"]
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight
        assert torch.equal(layer.topology.mask(), weight != 0)
        assert torch.equal(layer.dense_weight(), weight)
    x = torch.randn(2, 3, 3, 3)
    torch.testing.assert_close(model(x), dense(x))


def test_skip_and_words_that_are_none() -> None:
    assert list(dict(skd.nn.sparse_modules(skd.sparsify(pruned(), masks="nonzero", skip="0")))) == [
        "2"
    ]
    with pytest.raises(ValueError, match="none of 3 layers has a weight that is zero"):
        skd.sparsify(network(), masks="nonzero")
    with pytest.raises(UnsupportedError, match="masks: expected one of nonzero, got 'zero'"):
        skd.sparsify(pruned(), masks="zero")


def test_a_sparse_state_gives_a_dense_model_its_layers_back() -> None:
    saved = skd.sparsify(network(), sparsity=0.8, skip="4")
    model = network()
    state = saved.state_dict()
    skd.sparsify(model, masks=skd.nn.stored_masks(state, model))
    assert [name for name, _ in skd.nn.sparse_modules(model)] == ["0", "2"]
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_model_that_is_the_layer() -> None:
    layer = skd.nn.SparseLinear(8, 4, sparsity=0.75)
    masks = skd.nn.stored_masks(layer.state_dict(), nn.Linear(8, 4))
    assert masks.keys() == {""}
    assert torch.equal(masks[""], layer.topology.mask())


def test_a_state_of_another_model_is_refused() -> None:
    state = skd.sparsify(network(), sparsity=0.8).state_dict()
    with pytest.raises(CheckpointError, match="4: sparse in the checkpoint"):
        skd.nn.stored_masks(state, network()[:4])
    with pytest.raises(TopologyError):
        skd.nn.stored_masks(state, nn.Sequential(nn.Conv2d(3, 2, 2), *network()[1:]))
