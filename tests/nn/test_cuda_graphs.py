"""A capturable model changes what is in its tensors, never where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.errors import UnsupportedError


def model_of(capturable: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        skd.nn.SparseConv2d(3, 8, 3, stride=2, padding=1, sparsity=0.5, seed=1),
        nn.ReLU(),
        nn.Flatten(),
        skd.nn.SparseLinear(8 * 4 * 4, 10, sparsity=0.8, seed=2),
    )
    return skd.make_capturable(model) if capturable else model


def train(model: nn.Module, steps: int = 12) -> tuple[list[float], list[int]]:
    """Return the losses, and where everything was after each step."""
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dst = skd.dst.RigL(model, opt, drop_fraction=0.5, every=3, until=100)
    generator = torch.Generator().manual_seed(0)
    losses, places = [], []
    for _ in range(steps):
        x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)
        opt.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        due = dst.due
        assert dst.step() == due
        if not due:
            opt.step()
        places.append([tensor.data_ptr() for tensor in tensors(model, opt)])
    return losses, places


def tensors(model: nn.Module, opt: torch.optim.Optimizer) -> list[Tensor]:
    found = [*model.parameters(), *model.buffers()]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    for state in opt.state.values():
        found += [value for value in state.values() if isinstance(value, Tensor)]
    return found


def test_nothing_moves_and_the_training_is_the_same() -> None:
    plain, capturable = model_of(False), model_of(True)
    losses, _ = train(plain)
    same, places = train(capturable)
    assert same == losses
    for ours, theirs in zip(capturable.modules(), plain.modules(), strict=True):
        if isinstance(ours, skd.nn.SparseModule):
            assert ours.topology == theirs.topology
            assert ours.topology.version == theirs.topology.version == 4
            assert torch.equal(ours.values, theirs.values)
    assert all(place == places[0] for place in places)


def test_another_number_of_nonzeros_is_refused_and_nothing_changes() -> None:
    layer = skd.make_capturable(skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0))
    before, known = copy.deepcopy(layer.state_dict()), layer.topology
    with pytest.raises(UnsupportedError, match="keeps its 16 nonzeros, got 32"):
        layer.rewire(torch.ones(4, 8, dtype=torch.bool))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert layer.topology is known
    skd.make_capturable(layer, False)
    assert layer.rewire(torch.ones(4, 8, dtype=torch.bool)).new.nnz == 32


def test_a_graph_of_an_earlier_forward_pass_does_not_run_backward() -> None:
    layer = skd.make_capturable(skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0))
    y = layer(torch.ones(2, 8, requires_grad=True))
    layer.rewire(~layer.topology.mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_stay_capturable_and_do_not_share() -> None:
    layer = skd.make_capturable(skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0))
    twin = copy.deepcopy(layer)
    assert twin.capturable
    twin.rewire(~twin.topology.mask())
    assert not torch.equal(layer.topology.mask(), twin.topology.mask())


def test_a_model_without_sparse_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="expected sparse modules"):
        skd.make_capturable(nn.Linear(2, 2))


def test_an_update_that_one_layer_refuses_changes_no_layer() -> None:
    model = model_of(False)
    skd.make_capturable(model[3])
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dst = skd.dst.GMP(model, opt, sparsity=0.9, until=4, every=1)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    opt.step()
    before = [tensor.clone() for tensor in tensors(model, opt)]
    with pytest.raises(UnsupportedError, match=r"^3: mask: capturable .* keeps its 256 nonzeros"):
        dst.step()
    assert [module.topology.version for _, module in skd.nn.sparse_modules(model)] == [0, 0]
    assert all(map(torch.equal, tensors(model, opt), before))
    skd.make_capturable(model, False)
    dst.step()
    assert [module.topology.version for _, module in skd.nn.sparse_modules(model)] == [1, 1]
