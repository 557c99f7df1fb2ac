"""What an update does about gradients that are not finite, scaled or clipped."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sparsekd.dst import SET, RigL
from sparsekd.nn import SparseLinear, sparse_modules


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


@pytest.mark.parametrize("method", [SET, RigL])
def test_a_gradient_that_is_not_finite_skips_the_update_and_says_so(method, make_network, backward):
    """T16, and a later update works again."""
    model = make_network()
    opt = sgd(model)
    dst = method(model, opt, every=1, until=100)
    before = {name: m.topology for name, m in sparse_modules(model)}
    backward(model)
    model[3].values.grad[2] = math.inf
    with pytest.warns(RuntimeWarning, match=r"iteration 1: .*skipped.*3\.values"):
        assert dst.step() is False
    assert dst.last_update == {}
    assert all(m.topology is before[name] for name, m in sparse_modules(model))
    opt.zero_grad()
    backward(model)
    assert dst.step()


def test_a_dense_gradient_that_is_not_finite_skips_the_update_of_all_layers():
    """The overflow is at a position without a weight: only the dense gradient shows it."""
    model = nn.Sequential(SparseLinear(8, 6, sparsity=0.5), SparseLinear(6, 1, sparsity=0.5))
    mask = torch.ones(1, 6) > 0
    mask[0, 3] = False
    model[1].rewire(mask)
    model[0].bias.data[3] = 3e38
    opt = sgd(model)
    dst = RigL(model, opt, every=1, until=100, drop_fraction=0.9)
    (model(torch.zeros(1, 8)) * 100.0).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    before = model[0].topology
    with pytest.warns(RuntimeWarning, match="dense gradient of 1 is not finite"):
        assert dst.step() is False
    assert model[0].topology is before


def test_grad_scaling_changes_no_decision_and_an_overflow_skips_the_update(make_network):
    masks = []
    for scale in (1.0, 2.0**12):
        model = make_network(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        opt = sgd(model)
        dst = RigL(model, opt, every=1, until=100)
        x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
        scaler.scale(model(x).square().mean()).backward()
        assert dst.step()
        masks.append([m.topology for _, m in sparse_modules(model)])
    assert masks[0] == masks[1]
    opt.zero_grad()
    scaler.scale(model(x).square().mean() * 1e38).backward()
    weights = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning, match="skipped"):
        assert not dst.step()
    scaler.step(opt)  # sees the overflow too
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_clipping_after_the_step_changes_no_mask(make_network, backward):
    """T17: growth looks at the gradients as they were before any clipping."""
    masks = []
    for norm in (None, 1e-3):
        model = make_network()
        opt = sgd(model)
        dst = RigL(model, opt, every=1, until=100)
        backward(model)
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        assert dst.step()
        masks.append([m.topology for _, m in sparse_modules(model)])
    assert masks[0] == masks[1]
