"""Which gradient growth ranks: the dense one whose entries at the nonzeros are `values.grad`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.utils.checkpoint
from gradient_loops import LOOPS, METHODS, assert_gradients, batch, loss, network, pgd, run
from torch import Tensor, nn

from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparse_modules


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("loop", LOOPS)
def test_the_gradient_is_the_dense_one(loop):
    _, twin, updater = run(loop)
    updater._gradients.settle()
    updater._gradients.warn_of_foreign(type(updater).__name__)
    assert_gradients(updater, twin)


def grown_as_dense(fraction: float, grad: Tensor, values: Tensor, old: Tensor) -> Tensor:
    """Return the mask that RigL leaves, from a dense gradient."""
    k = math.floor(fraction * int(old.sum()))
    weight = torch.zeros(old.shape, dtype=values.dtype).masked_scatter(old, values)
    kept = old & (weight.abs() >= weight[old].abs().sort().values[k])
    score = grad.abs().masked_fill(kept, -1.0)
    return kept | (score >= score.view(-1).sort(descending=True).values[k - 1])


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("loop", LOOPS)
def test_the_grown_positions_are_those_of_the_dense_gradient(loop):
    _, twin, updater = run(loop)
    old = {n: (m.topology.mask(), m.values.detach().clone()) for n, m in updater.modules.items()}
    fraction = updater.schedule(1)
    assert updater.step()
    for name, module in updater.modules.items():
        mask, values = old[name]
        grad = twin.get_submodule(name).weight.grad.detach()
        assert torch.equal(module.topology.mask(), grown_as_dense(fraction, grad, values, mask))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_extra_backward_changes_nothing_that_is_zeroed_in_place(method, optimizer):
    """Every method ends in the same network as without what was zeroed or never written."""
    found = []
    for extra in (False, True):
        model = network()
        opt = OPTIMIZERS[optimizer](model.parameters())
        updater = METHODS[method](model, opt)
        for step in range(4):
            opt.zero_grad(set_to_none=False)
            if extra:
                loss(model, 10 + step).backward()
                opt.zero_grad(set_to_none=False)
            loss(model, step).backward()
            if extra:
                x = batch(20 + step).requires_grad_()
                torch.autograd.grad(model(x).square().sum(), x)
            loss(model, 30 + step).backward()
            if not updater.step():
                opt.step()
        found.append({n: t.clone() for n, t in model.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("error::RuntimeWarning", "ignore:no weight is left")
@pytest.mark.parametrize("layout", ["bcsr:2", "fanin", "nm:2:4"])
def test_layouts_with_tiles_follow_as_well(layout):
    masks = []
    for loop in (pgd, last_of_pgd):
        model, _, updater = run(loop, layout)
        assert updater.step()
        masks.append({name: m.topology.mask() for name, m in sparse_modules(model)})
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])


def last_of_pgd(model, opt, stored):
    other = copy.deepcopy(model)
    x = batch(0)
    for _ in range(3):
        x = x.detach().requires_grad_()
        other(x).square().sum().backward()
        x = x + 0.01 * x.grad.sign()
    model(x.detach()).square().sum().backward()


class ReadsWeight(nn.Module):
    """Compute with the dense weight of its layer besides calling it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight = layer.dense_weight() if isinstance(layer, SparseLinear) else layer.weight
        return layer(x) + nn.functional.linear(x.tanh(), weight)


@pytest.mark.parametrize("method", ["RigL", "TopKAST"])
def test_what_is_computed_with_the_dense_weight_counts(method):
    model = ReadsWeight(SparseLinear(8, 6, sparsity=0.5, seed=0).double())
    twin = densify(copy.deepcopy(model))
    updater = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=0.1))
    if method == "TopKAST":
        twin.layer.weight.data.copy_(model.layer.dense_weight())
    for seed in range(2):
        x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for net in (model, twin):
            net(x).square().sum().backward()
    if method == "RigL":
        torch.testing.assert_close(updater.gradient("layer"), twin.layer.weight.grad)
    else:
        outer = updater._outside.topologies["layer"].mask()
        torch.testing.assert_close(updater.extra["layer"].grad, twin.layer.weight.grad[outer])


def test_the_extra_weights_of_topkast_follow_a_factor():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = METHODS["TopKAST"](model, opt)
    loss(model, 0).backward()
    before = {name: p.grad.clone() for name, p in updater.extra.items()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # which does not know them
    updater._outside.settle()
    (unclipped,) = torch.autograd.grad(loss(model, 0), model[5].values)
    factor = model[5].values.grad.norm() / unclipped.norm()
    for name, p in updater.extra.items():
        torch.testing.assert_close(p.grad, factor * before[name])


def test_nothing_of_a_pass_that_wrote_nothing_is_kept():
    model = network()
    updater = METHODS["RigL"](model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = batch(0).requires_grad_()
    for _ in range(3):
        torch.autograd.grad(model(x).square().sum(), x)
    assert all(not record.passes._pending for record in updater._gradients._records.values())
    assert len(updater._gradients) == 0


def test_other_values_at_the_same_positions_do_not_count():
    model = nn.Sequential(
        SparseLinear(8, 6, sparsity=0.5, seed=0), SparseLinear(6, 4, sparsity=0.5)
    )
    model[1].values.requires_grad_(False)
    updater = METHODS["RigL"](model, torch.optim.SGD([model[0].values], lr=0.1))
    others = {n: torch.ones_like(p).requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, others, torch.ones(2, 8)).sum().backward()
    assert len(updater._gradients) == 0
    twin = densify(copy.deepcopy(model))
    for net in (model, twin):
        net(torch.ones(2, 8)).sum().backward()
    torch.testing.assert_close(updater.gradient("0"), twin[0].weight.grad)


def test_a_convolution_that_runs_twice_and_is_zeroed_between():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SparseConv2d(4, 4, 3, padding=1, sparsity=0.5, seed=0).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    model = Twice()
    twin = densify(copy.deepcopy(model))
    updater = METHODS["RigL"](model, torch.optim.SGD(model.parameters(), lr=0.1))
    for net in (model, twin):
        for seed in range(3):
            net.zero_grad(set_to_none=False)
            net(batch(seed)).square().sum().backward()
        net(batch(7)).square().sum().backward()
    assert_gradients(updater, twin)
