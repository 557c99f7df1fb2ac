"""Optimizer state follows its weight through a rewire, or says that it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsekd.errors import OptimizerStateError, ShapeError
from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparse_modules
from sparsekd.optim import remap_

# Adaptive steps far from a minimum amplify rounding; small rates keep the comparison meaningful.
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "momentum-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "momentum-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.001, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.001, foreach=True, weight_decay=1e-2),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.001, fused=True, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.001, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=0.001, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adagrad-initial": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.3),
    "adagrad-fused": lambda p: torch.optim.Adagrad(
        p, lr=0.05, initial_accumulator_value=0.3, fused=True
    ),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.001),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.001),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.003),
    "rprop-groups": lambda p: torch.optim.Rprop([{"params": list(p), "lr": 0.003}], lr=0.1),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.001)),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.001),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
}


class MaskedOracle:
    """A dense model with masks: at each rewire, weights outside are 0 and their state is new."""

    def __init__(self, model: nn.Module, make: Callable) -> None:
        self.model = densify(copy.deepcopy(model))
        self.optimizer = make(self.model.parameters())
        self.masks = {n: m.topology.mask() for n, m in sparse_modules(model)}

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        for name, mask in self.masks.items():
            self.model.get_submodule(name).weight.grad.mul_(mask)
        self.optimizer.step()

    def rewire(self, name: str, mask: Tensor) -> None:
        self.masks[name] = mask
        weight = self.model.get_submodule(name).weight
        weight.data.mul_(mask)  # what was inactive is 0 already
        group = self.optimizer.param_groups[0]
        fresh = {"step_size": group["lr"], "sum": group.get("initial_accumulator_value", 0)}
        for key, state in self.optimizer.state[weight].items():
            if state is not None and state.shape == mask.shape:
                state.masked_fill_(~mask, fresh.get(key, 0))


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(
        SparseConv2d(4, 6, 3, padding=1, groups=2, sparsity=0.6, seed=1),
        nn.Tanh(),
        nn.Flatten(),
        SparseLinear(6 * 25, 7, sparsity=0.8, seed=2),
    ).to(dtype)


def random_mask(module, generator: torch.Generator, nnz: int | None = None) -> Tensor:
    topology = module.topology
    nnz = topology.nnz if nnz is None else nnz
    mask = torch.zeros(topology.numel, dtype=torch.bool)
    mask[torch.randperm(topology.numel, generator=generator)[:nnz]] = True
    return mask.view(topology.shape)


@pytest.mark.parametrize("resize", [False, True], ids=["equal-nnz", "other-nnz"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_twenty_random_rewires_equal_a_dense_masked_oracle(make, resize):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(5)
    model = network()
    optimizer, oracle = make(model.parameters()), MaskedOracle(model, make)
    for _ in range(20):
        for _ in range(3):
            x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            oracle.step(x)
        for name, module in sparse_modules(model):
            numel = module.topology.numel
            nnz = int(torch.randint(0, numel + 1, (), generator=generator)) if resize else None
            mask = random_mask(module, generator, nnz)
            remap_(optimizer, module.values, module.rewire(mask))
            oracle.rewire(name, mask)
    for name, module in sparse_modules(model):
        dense = oracle.model.get_submodule(name)
        torch.testing.assert_close(module.dense_weight(), dense.weight, rtol=0, atol=1e-9)
        torch.testing.assert_close(module.bias, dense.bias, rtol=0, atol=1e-9)


def test_no_weight_carries_the_momentum_of_another():
    """After one rewire every survivor has its own momentum, and grown weights have none."""
    layer = SparseLinear(9, 5, sparsity=0.4, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 9)).sum().backward()
    optimizer.step()
    marks = torch.arange(1.0, layer.topology.nnz + 1)
    optimizer.state[layer.values]["momentum_buffer"] = marks
    at_position = torch.zeros(45)
    at_position[layer.topology.flat_indices()] = marks
    before = layer.topology.mask()

    delta = layer.rewire(random_mask(layer, torch.Generator().manual_seed(3)))
    remap_(optimizer, layer.values, delta)

    momentum = optimizer.state[layer.values]["momentum_buffer"]
    assert 0 < delta.grown.sum() < layer.topology.nnz
    assert torch.equal(momentum, at_position[layer.topology.flat_indices()])
    assert torch.equal(momentum == 0, ~before.view(-1)[layer.topology.flat_indices()])


@pytest.mark.parametrize("resize", [False, True])
def test_a_delta_that_skips_a_rewire_is_refused(resize):
    layer = SparseLinear(8, 8, sparsity=0.5, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    first = layer.topology
    remap_(optimizer, layer.values, layer.rewire(~first.mask()))
    layer.rewire(torch.rand(8, 8) < 0.2 if resize else first.mask().roll(1, dims=0))
    delta = layer.rewire(first.mask())
    with pytest.raises(OptimizerStateError, match="state"):
        remap_(optimizer, layer.values, delta)


def test_state_of_grown_weights_where_it_cannot_be_told_is_0_and_warns():
    class Needy(torch.optim.SGD):
        def __init__(self, params, *, secret):
            super().__init__(params, lr=0.1, momentum=0.9)

    layer = SparseLinear(9, 5, sparsity=0.4, seed=0)
    optimizer = Needy(layer.parameters(), secret=1)
    layer(torch.randn(2, 9)).sum().backward()
    optimizer.step()
    delta = layer.rewire(~layer.topology.mask())
    with pytest.warns(RuntimeWarning, match="Needy: cannot tell.*secret"):
        remap_(optimizer, layer.values, delta)
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    assert torch.equal(momentum[delta.grown], torch.zeros(int(delta.grown.sum())))


def test_asking_what_a_new_weight_gets_changes_nothing_else():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            torch.rand(3)
            return super().step(closure)

    layer = SparseLinear(9, 5, sparsity=0.4, seed=0)
    optimizer = Noisy(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 9)).sum().backward()
    optimizer.step()
    before, state = layer.values.detach().clone(), torch.get_rng_state()
    delta = layer.rewire(~layer.topology.mask())
    groups = copy.deepcopy(optimizer.param_groups)
    remap_(optimizer, layer.values, delta)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.values.detach(), delta.carry(before))
    assert len(optimizer.state) == 2
    assert groups[0].keys() == optimizer.param_groups[0].keys()


def test_step_counters_and_other_parameters_stay():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        model(torch.randn(2, 4, 5, 5, dtype=torch.float64)).sum().backward()
        optimizer.step()
    rest = {p: copy.deepcopy(s) for p, s in optimizer.state.items() if p is not model[0].values}
    delta = model[0].rewire(random_mask(model[0], torch.Generator()))
    remap_(optimizer, model[0].values, delta)
    assert optimizer.state[model[0].values]["step"].item() == 3
    for parameter, state in rest.items():
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameter][key], value)


def test_state_that_does_not_exist_yet_is_fine():
    layer = SparseLinear(6, 4, sparsity=0.5)
    optimizer = torch.optim.Adam(layer.parameters())
    remap_(optimizer, layer.values, layer.rewire(~layer.topology.mask()))
    assert layer.values not in optimizer.state
    layer(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.values]["exp_avg"].shape == layer.values.shape


def test_a_layer_may_lose_all_its_weights_and_get_some_back():
    layer = SparseLinear(6, 4, sparsity=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for mask in (torch.zeros(4, 6) > 0, torch.ones(4, 6) > 0):
        optimizer.zero_grad()
        layer(torch.randn(2, 6)).sum().backward()
        optimizer.step()
        remap_(optimizer, layer.values, layer.rewire(mask))
    assert optimizer.state[layer.values]["momentum_buffer"].tolist() == [0.0] * 24


def test_a_parameter_of_no_group_is_refused():
    layer = SparseLinear(6, 4, sparsity=0.5)
    optimizer = torch.optim.SGD([layer.bias], lr=0.1)
    delta = layer.rewire(~layer.topology.mask())
    with pytest.raises(OptimizerStateError, match=r"param.*SGD.*does not hold"):
        remap_(optimizer, layer.values, delta)


def test_a_parameter_that_was_not_rewired_is_refused():
    layer = SparseLinear(6, 4, sparsity=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    _, delta = layer.topology.rewire(torch.ones(4, 6) > 0)
    with pytest.raises(ShapeError, match=r"param: expected shape \[24\].*got \[12\]"):
        remap_(optimizer, layer.values, delta)


@pytest.mark.parametrize(
    "alien, described",
    [
        (torch.zeros(3), r"a tensor of shape \[3\]"),
        (torch.zeros(12, 2), r"a tensor of shape \[12, 2\]"),
        ([torch.zeros(12)], "a list"),
        ({"low": torch.zeros(12)}, "a dict"),
    ],
)
def test_state_of_another_shape_is_refused_and_nothing_changes(alien, described):
    layer = SparseLinear(6, 4, sparsity=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.values]
    before = state["momentum_buffer"]
    state["factor"] = alien
    delta = layer.rewire(~layer.topology.mask())
    with pytest.raises(OptimizerStateError, match=rf"SGD.state\['factor'\].*{described}"):
        remap_(optimizer, layer.values, delta)
    assert state["momentum_buffer"] is before


@pytest.mark.parametrize("which", ["values", "bias-first"])
def test_lbfgs_is_refused_once_it_has_a_history(which):
    layer = SparseLinear(6, 4, sparsity=0.5)
    parameters = [layer.values, layer.bias]
    optimizer = torch.optim.LBFGS(parameters[:: 1 if which == "values" else -1])
    x = torch.randn(2, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    delta = layer.rewire(~layer.topology.mask())
    with pytest.raises(OptimizerStateError, match="LBFGS"):
        remap_(optimizer, layer.values, delta)
