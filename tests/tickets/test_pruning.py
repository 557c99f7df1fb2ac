"""Exact counts, ties, nesting and collapse of global magnitude pruning."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekd import Layout, models
from sparsekd.errors import UnsupportedError
from sparsekd.tickets import collapsed_layers, make_ticket, prune, prune_further
from sparsekd.train import state_hash


def total(masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, (1, 3)), nn.Linear(5, 3))


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.36, 0.488, 0.9, 0.95, 0.97])
def test_exactly_floor_of_p_n_weights_are_pruned(net, sparsity):
    numel = net[0].weight.numel() + net[1].weight.numel()
    assert total(prune(net, sparsity)) == numel - math.floor(sparsity * numel)


def test_a_product_that_is_a_whole_number_is_not_rounded_down():
    conv = nn.Conv2d(1, 100, 1)  # 0.29 * 100 is 28.999999999999996 in floating point
    assert total(prune(nn.Sequential(conv), 0.29, allow_collapse=True)) == 71


def test_the_smallest_over_all_convolutions_go(net):
    masks = prune(net, 0.8)
    weights = {"0": net[0].weight, "1": net[1].weight}
    kept = torch.cat([weights[name][mask].abs() for name, mask in masks.items()])
    gone = torch.cat([weights[name][~mask].abs() for name, mask in masks.items()])
    assert kept.min() >= gone.max()


def test_ties_keep_the_lower_position():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1))
    for conv in model:
        nn.init.constant_(conv.weight, 0.5)
    masks = prune(model, 0.5, allow_collapse=True)
    assert masks["0"].flatten().tolist() == [True, True, True]
    assert not masks["1"].any()


def test_only_convolutions_are_pruned_and_the_model_is_only_read():
    model = models.resnet20(num_classes=10)
    before = state_hash(copy.deepcopy(model.state_dict()))
    masks = prune(model, 0.9)
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert masks.keys() == convolutions
    assert state_hash(model.state_dict()) == before
    ticket = make_ticket(model, masks)
    assert type(ticket.fc) is nn.Linear  # density 1


@settings(max_examples=30, deadline=None)
@given(rates=st.lists(st.sampled_from([0.1, 0.2, 0.35]), min_size=1, max_size=5))
def test_rounds_are_nested_and_exact(rates):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 9, 3), nn.Conv2d(9, 7, 3))
    masks, remaining = None, 18 * 9 + 63 * 9
    for rate in rates:
        for conv in model:  # training in between moves the weights
            nn.init.normal_(conv.weight)
        new = prune_further(model, rate, masks=masks)
        remaining -= math.ceil(round(rate * remaining, 6))
        assert total(new) == remaining
        if masks is not None:
            assert all(bool((masks[name] | ~new[name]).all()) for name in new)
        masks = new


def test_a_sparse_model_carries_its_own_masks(net):
    first = prune(net, 0.5)
    ticket = make_ticket(net, first)
    with torch.no_grad():
        ticket[0].values.zero_()  # a stored zero is still a weight, and outranks a pruned one
    again = prune_further(ticket, 0.2)
    assert total(again) == total(first) - math.ceil(0.2 * total(first))
    assert all(bool((first[name] | ~again[name]).all()) for name in first)


def test_collapse_is_detected(net):
    nn.init.constant_(net[1].weight, 1e-9)
    with pytest.raises(ValueError, match="every weight of 1 would be pruned"):
        prune(net, 0.9)
    assert collapsed_layers(prune(net, 0.9, allow_collapse=True)) == ["1"]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_out_of_range_raises(net, sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        prune(net, sparsity)


def test_models_that_cannot_be_pruned_raise(net):
    with pytest.raises(ValueError, match="convolution"):
        prune(nn.Linear(3, 3), 0.5)
    with pytest.raises(ValueError, match="masks"):
        prune_further(net, 0.2, masks={"2": torch.ones(3, 5, dtype=torch.bool)})
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        prune(net, 0.5)


@pytest.mark.parametrize("layout", ["bcsr:2", "fanin", "fanin:3x2"])
def test_tickets_of_a_layout_are_pruned_in_tiles_and_nested(net, layout):
    layout = Layout.parse(layout)
    numel = net[0].weight.numel() + net[1].weight.numel()
    outer = prune(net, 0.4, layout=layout)
    ticket = make_ticket(net, outer, layout=layout)
    assert abs(total(outer) - 0.6 * numel) <= 6 * layout.tile[1]
    inner = prune_further(ticket, 0.3, layout=layout)
    assert abs(total(inner) - 0.7 * total(outer)) <= 6 * layout.tile[1]
    for name, mask in inner.items():
        layout.check(outer[name])
        layout.check(mask)
        assert ticket.get_submodule(name).layout == layout
        assert bool((outer[name] | ~mask).all())


def test_n_of_m_is_pruned_once_at_its_own_density(net):
    masks = prune(net, 0.5, layout="nm:1:2")
    for name, mask in masks.items():
        Layout.parse("nm:1:2").check(mask)
        kept, gone = net.get_submodule(name).weight.abs()[mask], ~mask
        assert len(kept) * 2 == mask.numel() or int(gone.sum()) < len(kept)
    with pytest.raises(ValueError, match=r"sparsity: layout 'nm:1:2' keeps 1 of 2 .* got 0\.9"):
        prune(net, 0.9, layout="nm:1:2")
    with pytest.raises(
        UnsupportedError, match="pruning in rounds does not support layout 'nm:1:2'"
    ):
        prune_further(net, 0.2, layout="nm:1:2")
