"""Pruning at initialisation: scores against their definitions, exact counts, no trace left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekd import models
from sparsekd.errors import UnsupportedError
from sparsekd.nn import sparse_modules, sparsify
from sparsekd.sparsity import allocate, grasp, snip, synflow, topk_mask
from sparsekd.sparsity.at_init import synaptic_flow

METHODS = pytest.mark.parametrize("method", [snip, grasp, synflow])


def network(bias: bool = True, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=bias), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 5, bias=bias),
    ).double()  # fmt: skip


def batch(n: int = 6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 6, 6, generator=generator).double(), torch.arange(n) % 5


def flat(masks) -> torch.Tensor:
    return torch.cat([mask.reshape(-1) for mask in masks.values()])


LAYERS = ("0", "3", "6")


def test_snip_scores_the_loss_s_sensitivity_to_each_connection():
    """c is one factor per connection; the score is |dL/dc| at c = 1."""
    model, (x, y) = network(), batch()
    twin = copy.deepcopy(model)
    connections = {n: torch.ones_like(twin.get_submodule(n).weight) for n in LAYERS}
    params = dict(twin.named_parameters())
    for name in LAYERS:
        connections[name].requires_grad_()
        params[f"{name}.weight"] = params[f"{name}.weight"].detach() * connections[name]
    F.cross_entropy(torch.func.functional_call(twin, params, (x,)), y).backward()
    scores = torch.cat([c.grad.abs().reshape(-1) for c in connections.values()])
    masks = snip(model, (x, y), sparsity=0.8)
    assert tuple(masks) == LAYERS
    assert torch.equal(flat(masks), topk_mask(scores, round(0.2 * len(scores))))


@pytest.mark.parametrize("method", [snip, grasp])
def test_targets_may_be_probabilities(method):
    model, (x, y) = network(), batch()
    soft = torch.eye(5, dtype=torch.float64)[y]
    hard, mixed = method(model, (x, y), sparsity=0.5), method(model, (x, soft), sparsity=0.5)
    assert torch.equal(flat(hard), flat(mixed))


def test_grasp_removes_the_largest_scores_of_its_definition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 2
    weights = [model[0].weight.detach(), model[2].weight.detach()]

    def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, first, model[0].bias.detach()).tanh()
        return F.cross_entropy(F.linear(hidden, second, model[2].bias.detach()) / 200.0, y)

    blocks = torch.autograd.functional.hessian(loss, tuple(weights))
    gradients = torch.autograd.functional.jacobian(loss, tuple(weights))
    g = torch.cat([part.reshape(-1) for part in gradients])
    hessian = torch.cat(
        [
            torch.cat([b.reshape(weights[i].numel(), -1) for b in row], 1)
            for i, row in enumerate(blocks)
        ]
    )
    scores = -torch.cat([w.reshape(-1) for w in weights]) * (hessian @ g)
    order = scores.argsort()
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[order[: round(0.4 * len(scores))]] = True
    assert torch.equal(flat(grasp(model, (x, y), sparsity=0.6)), expected)


def test_synaptic_flow_is_conserved_from_layer_to_layer():
    model = network(bias=False, norm=False)
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(model.get_submodule(name).weight.shape, generator=generator) < 0.5
        for name in LAYERS
    }
    flow = synaptic_flow(model, batch()[0], masks)
    totals = [score.sum().item() for score in flow.values()]
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-12)
    assert all((score >= 0).all() for score in flow.values())
    assert all((flow[name][~mask] == 0).all() for name, mask in masks.items())


def test_synflow_prunes_in_rounds():
    model = network()
    masks = {n: torch.ones_like(model.get_submodule(n).weight, dtype=torch.bool) for n in LAYERS}
    total = sum(mask.numel() for mask in masks.values())
    for k in range(1, 8):
        flow = synaptic_flow(model, batch()[0], masks)
        scores = torch.cat([flow[n].masked_fill(~masks[n], -1).reshape(-1) for n in LAYERS])
        kept = topk_mask(scores, round(0.05 ** (k / 7) * total))
        assert not (kept & ~flat(masks)).any()
        parts = kept.split([mask.numel() for mask in masks.values()])
        masks = {n: part.view(masks[n].shape) for n, part in zip(LAYERS, parts, strict=True)}
    assert torch.equal(flat(synflow(model, batch(), sparsity=0.95, rounds=7)), flat(masks))


def test_synflow_looks_at_no_data_and_cuts_no_layer_off():
    model = network()
    x, y = batch()
    masks = synflow(model, (x, y), sparsity=0.97)
    assert torch.equal(flat(masks), flat(synflow(model, torch.empty(3, 2, 6, 6), sparsity=0.97)))
    assert all(mask.any() for mask in masks.values())


@METHODS
@settings(max_examples=15, deadline=None)
@given(sparsity=st.floats(0, 1), dead=st.booleans())
@pytest.mark.filterwarnings("ignore:no weight is left")
def test_counts_are_exact(method, sparsity, dead):
    """Also where a dead layer gives every weight the score 0."""
    model = network()
    if dead:
        nn.init.zeros_(model[3].weight)
    options = {"rounds": 5} if method is synflow else {}
    masks = method(model, batch(), sparsity=sparsity, **options)
    kept = flat(masks)
    assert int(kept.sum()) == round((1 - sparsity) * len(kept))


@pytest.mark.parametrize("method", [snip, grasp])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_a_distribution_fixes_every_layer(method, distribution):
    model = network()
    masks = method(model, batch(), sparsity=0.8, distribution=distribution)
    shapes = {n: tuple(model.get_submodule(n).weight.shape) for n in LAYERS}
    assert {n: int(m.sum()) for n, m in masks.items()} == allocate(shapes, 0.8, distribution)


@METHODS
def test_nothing_is_left_behind(method):
    model = network()
    model[3].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():
        method(model, batch(), sparsity=0.5)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[6].weight.grad is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@METHODS
@pytest.mark.filterwarnings("ignore:no weight is left")
def test_masks_fit_sparsify(method):
    model = models.resnet20()
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    options = {"rounds": 3} if method is synflow else {}
    masks = method(model, (x, y), sparsity=0.8, skip=("conv1", "fc"), **options)
    sparsify(model, masks=masks)
    assert {n: m.topology.nnz for n, m in sparse_modules(model)} == {
        n: int(mask.sum()) for n, mask in masks.items()
    }
    assert type(model.conv1) is nn.Conv2d
    assert type(model.fc) is nn.Linear


@METHODS
def test_a_layer_that_loses_everything_is_named(method):
    model = network()
    nn.init.constant_(model[0].weight, 0.0)
    with pytest.warns(RuntimeWarning, match="no weight is left in 0"):
        masks = method(model, batch(), sparsity=0.999)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.001 * 300)


@METHODS
def test_what_cannot_work_is_refused(method):
    with pytest.raises(ValueError, match="sparsity: expected"):
        method(network(), batch(), sparsity=1.5)
    with pytest.raises(ValueError, match=r"model: expected an nn\.Linear or nn\.Conv2d"):
        method(nn.Sequential(nn.ReLU()), batch())
    with pytest.raises(ValueError, match="skip: 'nowhere' matches no layer"):
        method(network(), batch(), skip="nowhere")
    broken = network()
    broken[0].weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        method(broken, batch())


def test_unknown_words_and_numbers_are_refused():
    with pytest.raises(UnsupportedError, match="distribution: expected"):
        snip(network(), batch(), distribution="global magnitude")
    with pytest.raises(ValueError, match="rounds: expected a positive integer, got 0"):
        synflow(network(), batch(), rounds=0)
