"""Layers and output channels without a weight are named, by whatever made them so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import sparsekd as skd

CHANNELS = "no weight is left in some output channels"


def named(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [w for w in caught if "no weight is left" in str(w.message)]
    assert all(w.category is RuntimeWarning and w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


def mobile() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 3, groups=64), nn.Flatten(), nn.Linear(64 * 9, 10)
    )


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_depthwise_channels_without_a_weight_are_named(criterion):
    model = mobile()
    (text,) = named(lambda: skd.sparsify(model, 0.9, "uniform", criterion, skip="0"))
    mask = model[1].topology.mask()
    dead = int((~mask.flatten(1).any(1)).sum())
    assert dead > 0
    assert text == f"{CHANNELS}, which give only their bias, if any: 1 ({dead} of 64)"


@pytest.mark.parametrize("layout", ["bcsr", "fanin"])
def test_layouts_are_looked_at_too(layout):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    texts = named(lambda: skd.sparsify(model, 0.95, "uniform", layout=layout, skip="1"))
    dead = int((~model[0].topology.mask().any(1)).sum())
    assert texts == (
        [f"{CHANNELS}, which give only their bias, if any: 0 ({dead} of 64)"] * (dead > 0)
    )
    assert (dead > 0) == (layout == "bcsr")


def test_given_masks_are_looked_at_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    masks = {"0": torch.zeros(4, 4, dtype=torch.bool), "1": torch.eye(2, 4, dtype=torch.bool)}
    assert named(lambda: skd.sparsify(model, masks=masks)) == [
        "no weight is left in 0: nothing passes through"
    ]


def test_nothing_is_said_of_living_layers():
    assert not named(lambda: skd.sparsify(mobile(), 0.3, "erk"))


def pruned(method: str, **options):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = skd.sparsify(model.double(), sparsity=0.0)
    with torch.no_grad():
        model[2].values.mul_(1e-4)  # what magnitude pruning takes first
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    updater = getattr(skd.dst, method)(model, optimizer, every=1, until=6, **options)

    def train() -> None:
        for _ in range(8):
            model(torch.ones(2, 8, dtype=torch.float64)).sum().backward()
            updater.step()

    return model, train


def test_gmp_names_a_layer_it_has_emptied_once():
    model, train = pruned("GMP", sparsity=0.9)
    texts = named(train)
    assert model[2].topology.nnz == 0
    assert [t for t in texts if t == "no weight is left in 2: nothing passes through"]
    assert sum("nothing passes through" in t for t in texts) == 1
    # Each layer once for its channels.
    assert sum(" 0 (" in t for t in texts) <= 1
    assert sum(" 4 (" in t for t in texts) <= 1


def test_granet_names_dead_channels():
    _, train = pruned("GraNet", sparsity=0.9, drop_fraction=0.0)
    assert any(" 2 (" in t or "in 2:" in t for t in named(train))


@pytest.mark.parametrize("method", ["SET", "RigL"])
def test_methods_that_regrow_as_much_are_not_watched(method):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skd.sparsify(model, sparsity=0.95)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = getattr(skd.dst, method)(model, optimizer, drop_fraction=0.5, every=1, until=5)

    def train() -> None:
        for _ in range(4):
            model(torch.randn(8, 16)).square().sum().backward()
            updater.step()

    assert not named(train)


def test_superposing_names_what_pruning_back_has_emptied():
    def ticket(seed: int) -> nn.Sequential:
        return nn.Sequential(
            skd.nn.SparseLinear(8, 8, sparsity=0.5, seed=seed),
            skd.nn.SparseLinear(8, 8, sparsity=0.5, seed=seed),
        )

    tickets = [ticket(0), ticket(1)]
    with torch.no_grad():
        for one in tickets:
            one[1].values.mul_(1e-6)
    (text, *_) = named(lambda: skd.tickets.superpose(tickets, sparsity=0.9))
    assert text == "no weight is left in 1: nothing passes through"


def test_many_names_are_cut_short():
    alive = {str(i): torch.tensor([True, False]) for i in range(20)}
    (text,) = named(lambda: skd.sparsity.warn_of_dead(alive))
    assert "7 (1 of 2) and 12 more" in text
