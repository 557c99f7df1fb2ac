"""Weights of int8: rounded within the stated bound, and computed with as they are then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.errors import UnsupportedError
from sparsekd.frozen.draft import PRODUCT


def dense_weights(frozen: skd.FrozenModule) -> list[Tensor]:
    """Return the weights that a frozen network computes with."""
    found = []
    for node in frozen.islands[0].nodes:
        if node.kind == PRODUCT:
            crow, col, values = (node.lists[name] for name in ("crow", "col", "values"))
            counts = (crow[1:] - crow[:-1]).long()
            if values.dtype == torch.int8:
                values = values * torch.repeat_interleave(node.lists["scale"], counts)
            matrix = torch.zeros(len(counts), int(col.max()) + 1)
            matrix[torch.repeat_interleave(counts), col.long()] = values
            found.append(matrix)
    return found


@pytest.mark.parametrize("batch", [1, 3, 40])  # lists of codes, and lists of floats
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_a_linear_layer(batch: int, sparsity: float) -> None:
    torch.manual_seed(0)
    model = skd.sparsify(nn.Sequential(nn.Linear(300, 70)), sparsity=sparsity).eval()
    x = torch.randn(batch, 300)
    frozen = skd.freeze(model, x, weights="int8")
    (exact,), (rounded,) = dense_weights(skd.freeze(model, x)), dense_weights(frozen)
    bound = exact.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)
    assert ((exact - rounded).abs() <= bound).all()
    assert not torch.equal(exact, rounded)
    assert ((exact != 0) | (rounded == 0)).all()
    right = nn.functional.linear(x.double(), rounded.double(), model[0].bias.detach().double())
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 17])
def test_a_network_with_norms(batch: int) -> None:
    torch.manual_seed(0)
    model = skd.sparsify(skd.models.resnet20(num_classes=10), sparsity=0.9).eval()
    x = torch.randn(batch, 3, 16, 16)
    frozen = skd.freeze(model, x, weights="int8")
    with torch.inference_mode():
        exact = model(x)
        error = (frozen(x) - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 0.02
    assert "weights, int8" in str(frozen)


def test_a_row_of_zeros_stays_zero() -> None:
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    x = torch.randn(2, 5)
    with torch.inference_mode():
        result = skd.freeze(layer, x, weights="int8")(x)
        torch.testing.assert_close(result[:, 1], layer(x)[:, 1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_int8_cannot_hold(value: float) -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[1, 1] = value
    with pytest.raises(UnsupportedError, match="weights: int8 cannot hold infinity or NaN"):
        skd.freeze(layer, torch.zeros(1, 3), weights="int8")


def test_other_names() -> None:
    with pytest.raises(ValueError, match="weights: expected 'float32' or 'int8', got 'int4'"):
        skd.freeze(nn.Linear(2, 2), torch.zeros(1, 2), weights="int4")
