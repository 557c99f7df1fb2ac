"""A small network, and the plain loop that frameworks have to equal."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import sparsekd as skd

OPTIONS = {"drop_fraction": 0.3, "every": 3, "until": 100}
BATCHES = 11


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    return skd.sparsify(layers, sparsity=0.7, distribution="uniform")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def plain(
    batches: Iterable[tuple[Tensor, Tensor]], accumulate: int = 1, clip: float | None = None
) -> nn.Module:
    """Train as the documentation says, without a framework."""
    model = network()
    optimizer = sgd(model)
    method = skd.dst.RigL(model, optimizer, **OPTIONS)
    for count, (x, y) in enumerate(batches, 1):
        (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        if count % accumulate and count != BATCHES:
            continue
        if not method.step():
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        optimizer.zero_grad()
    assert method.iteration > OPTIONS["every"]
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Compare bit for bit, and check that the topology has moved at all."""
    found, state, start = model.state_dict(), expected.state_dict(), network().state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert not torch.equal(state["0.col_indices"], start["0.col_indices"])
