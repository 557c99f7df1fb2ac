"""Optimizer state follows changes of topology that no updater made."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsekd import dst
from sparsekd.errors import OptimizerStateError, UnsupportedError
from sparsekd.nn import SparseLinear, densify, make_capturable, sparse_modules
from sparsekd.optim import follow, remap_

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
}
FRESH = {"step_size": 1e-3, "sum": 0.1}
MOVING = {"every": 3, "until": 100}
METHODS: dict[str, tuple[float, Callable]] = {
    "static": (0.6, lambda m, o: dst.Static(m, o)),
    "set": (0.6, lambda m, o: dst.SET(m, o, drop_fraction=0.5, **MOVING)),
    "rigl": (0.6, lambda m, o: dst.RigL(m, o, drop_fraction=0.5, **MOVING)),
    "gmp": (0.0, lambda m, o: dst.GMP(m, o, sparsity=0.9, every=3, until=18)),
    "granet": (0.3, lambda m, o: dst.GraNet(m, o, sparsity=0.8, prune_until=15, **MOVING)),
}


class Oracle:
    """The dense model that is masked like a sparse one."""

    def __init__(self, model: nn.Module, make: Callable) -> None:
        self.model = densify(copy.deepcopy(model))
        self.optimizer = make(self.model.parameters())
        self.masks = {n: m.topology.mask() for n, m in sparse_modules(model)}

    def step(self, x: Tensor) -> None:
        self.backward(x)
        for name, mask in self.masks.items():
            self.model.get_submodule(name).weight.grad.mul_(mask)
        self.optimizer.step()

    def backward(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()

    def follow(self, sparse: nn.Module) -> None:
        """Mask as `sparse` is; weights outside get the state of new ones."""
        for name, module in sparse_modules(sparse):
            mask = self.masks[name] = module.topology.mask()
            weight = self.model.get_submodule(name).weight
            weight.data.mul_(mask)
            for key, state in self.optimizer.state[weight].items():
                if state is not None and state.shape == mask.shape:
                    state.masked_fill_(~mask, FRESH.get(key, 0))

    def load(self, sparse: nn.Module) -> None:
        """Take over all weights of `sparse`."""
        self.model.load_state_dict(densify(copy.deepcopy(sparse)).state_dict())
        self.follow(sparse)

    def check(self, sparse: nn.Module) -> None:
        mine = densify(copy.deepcopy(sparse)).state_dict()
        for name, tensor in self.model.state_dict().items():
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-9)


class Run:
    def __init__(self, model: nn.Module, make: Callable, method: Callable) -> None:
        self.model, self.optimizer = model, make(model.parameters())
        self.dst = method(model, self.optimizer)
        self.oracle = Oracle(model, make)

    def train(self, batches: list[Tensor]) -> None:
        for x in batches:
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            if self.dst.step():
                self.oracle.backward(x)  # for BatchNorm's statistics
                self.oracle.follow(self.model)
            else:
                self.optimizer.step()
                self.oracle.step(x)
            self.oracle.check(self.model)


def shuffled(model: nn.Module, seed: int = 0) -> None:
    """Rewire every layer by hand, at the same number of weights."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in sparse_modules(model):
        mask = module.topology.mask().reshape(-1)
        mask = mask[torch.randperm(mask.numel(), generator=generator)]
        module.rewire(mask.view(module.topology.shape))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_rolling_back_the_model_alone_equals_a_dense_masked_one(method, make, network, batch):
    sparsity, updater = METHODS[method]
    run = Run(network(sparsity), make, updater)
    run.train([batch(t) for t in range(5)])
    best = copy.deepcopy(run.model.state_dict())
    if method == "static":
        shuffled(run.model)
        run.oracle.follow(run.model)
    run.train([batch(t) for t in range(5, 11)])
    before = run.model[0].topology
    run.model.load_state_dict(best)
    assert run.model[0].topology != before
    run.oracle.load(run.model)
    run.train([batch(t) for t in range(11, 20)])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("how", ["foreign", "remapped", "followed"])
def test_rewiring_by_hand_equals_a_dense_masked_one(how, make, network, batch):
    run = Run(network(), make, METHODS["rigl"][1])
    for round_ in range(3):
        run.train([batch(t) for t in range(4 * round_, 4 * round_ + 4)])
        if how == "foreign":
            shuffled(run.model, round_)
        elif how == "followed":
            with follow(run.optimizer, run.model) as deltas:
                shuffled(run.model, round_)
            assert deltas.keys() == {"0", "6"}
            assert deltas["0"].new == run.model[0].topology
        else:
            for _, module in sparse_modules(run.model):
                mask = module.topology.mask().roll(1, dims=0)
                remap_(run.optimizer, module.values, module.rewire(mask))
        run.oracle.follow(run.model)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_follow_without_an_updater(make, network, batch):
    model, dense_start = network(0.6), network(0.0)
    optimizer, oracle = make(model.parameters()), Oracle(model, make)
    best = copy.deepcopy(model.state_dict())
    for t in range(12):
        optimizer.zero_grad()
        model(batch(t)).square().mean().backward()
        optimizer.step()
        oracle.step(batch(t))
        oracle.check(model)
        if t % 3 == 2:
            with follow(optimizer, model) as deltas:
                model.load_state_dict(dense_start.state_dict() if t == 5 else best)
            assert bool(deltas) == (t in (5, 8))
            oracle.load(model)


@pytest.mark.parametrize("order", list(itertools.permutations(("model", "optimizer", "dst"))))
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_checkpoint_loaded_in_any_order_is_no_foreign_change(make, order, network, batch):
    runs = [Run(network(), make, METHODS["set"][1]) for _ in range(2)]
    runs[0].train([batch(t) for t in range(4)])
    states = {name: copy.deepcopy(getattr(runs[0], name).state_dict()) for name in order}
    runs[1].train([batch(t) for t in range(7, 14)])
    for name in order:
        getattr(runs[1], name).load_state_dict(copy.deepcopy(states[name]))
    runs[1].oracle = runs[0].oracle
    oracle = copy.deepcopy(runs[0].oracle.model.state_dict())
    state = copy.deepcopy(runs[0].oracle.optimizer.state_dict())
    runs[0].train([batch(t) for t in range(4, 10)])
    runs[1].oracle.model.load_state_dict(oracle)
    runs[1].oracle.optimizer.load_state_dict(state)
    runs[1].oracle.masks = {n: m.topology.mask() for n, m in sparse_modules(runs[1].model)}
    runs[1].train([batch(t) for t in range(4, 10)])
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    # and after that a change of the model alone is one
    shuffled(runs[1].model)
    runs[1].oracle.follow(runs[1].model)
    runs[1].train([batch(t) for t in range(10, 13)])


def test_an_update_by_hand_follows_first(network, batch):
    run = Run(network(), OPTIMIZERS["adam"], METHODS["set"][1])
    run.train([batch(t) for t in range(4)])
    shuffled(run.model)
    run.oracle.follow(run.model)
    assert run.dst.update(0.5)
    run.oracle.follow(run.model)
    run.train([batch(t) for t in range(4, 8)])


def test_a_capturable_layer_is_followed(batch):
    model = make_capturable(nn.Sequential(nn.Flatten(), SparseLinear(100, 5).double()))
    run = Run(model, OPTIMIZERS["adam"], METHODS["set"][1])
    for round_ in range(3):
        run.train([batch(t) for t in range(4)])
        shuffled(model, round_)
        run.oracle.follow(model)


def step(layer: nn.Module, optimizer, updater, x: Tensor) -> None:
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    if not updater.step():
        optimizer.step()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_indices_overwritten_in_place_are_refused_where_there_is_state(momentum):
    layer, x = nn.Sequential(SparseLinear(8, 8, sparsity=0.5)), torch.randn(2, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=momentum)
    updater = dst.SET(layer, optimizer, every=2, until=100)
    step(layer, optimizer, updater, x)
    other = SparseLinear(8, 8, sparsity=0.5, seed=1).topology
    layer[0].crow_indices.copy_(other.crow_indices)
    layer[0].col_indices.copy_(other.col_indices)
    if momentum:
        with pytest.raises(OptimizerStateError, match=r"0\.values.*overwritten in place"):
            step(layer, optimizer, updater, x)
    else:
        step(layer, optimizer, updater, x)
        assert layer[0].topology != other  # iteration 2 is an update


def test_loaded_state_that_does_not_fit_is_refused_by_name():
    layer, x = nn.Sequential(SparseLinear(8, 8, sparsity=0.5)), torch.randn(2, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    updater = dst.Static(layer, optimizer)
    step(layer, optimizer, updater, x)
    optimizer.load_state_dict(optimizer.state_dict())
    layer[0].rewire(torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(OptimizerStateError, match=r"SGD.state\['momentum_buffer'\].*\[64\]"):
        step(layer, optimizer, updater, x)


def test_another_parameter_is_refused():
    layer, x = nn.Sequential(SparseLinear(8, 8, sparsity=0.5)), torch.randn(2, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    updater = dst.Static(layer, optimizer)
    step(layer, optimizer, updater, x)
    state = nn.Sequential(SparseLinear(8, 8, sparsity=0.5, seed=1)).state_dict()
    expected = pytest.raises(OptimizerStateError, match=r"0\.values.*assign=True")
    with expected, follow(optimizer, layer):
        layer.load_state_dict(state, assign=True)
    with pytest.raises(OptimizerStateError, match=r"0\.values"):
        step(layer, optimizer, updater, x)


def test_state_follows_also_where_loading_fails_half_way():
    model = nn.Sequential(SparseLinear(8, 8, sparsity=0.5), SparseLinear(8, 8, sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    state = nn.Sequential(SparseLinear(8, 8, sparsity=0.75), nn.Linear(8, 9)).state_dict()
    with pytest.raises(RuntimeError, match=r"1\.weight"), follow(optimizer, model):
        model.load_state_dict(state)
    assert model[0].topology.nnz == 16
    assert optimizer.state[model[0].values]["momentum_buffer"].shape == (16,)


class Wrapped(torch.optim.Optimizer):
    """An optimizer around another, without its own constructor, as accelerate makes them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        self.optimizer.step()

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state)


@pytest.mark.filterwarnings("error")
def test_a_wrapped_optimizer(network, batch):
    run = Run(network(), OPTIMIZERS["rprop"], METHODS["set"][1])
    run.optimizer = Wrapped(run.optimizer)
    run.dst = METHODS["set"][1](run.model, run.optimizer)
    run.train([batch(t) for t in range(4)])
    parts = (run.model, run.optimizer.optimizer, run.dst)
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    oracle = copy.deepcopy(run.oracle)
    run.train([batch(t) for t in range(4, 8)])
    for part, state in zip((run.model, run.optimizer, run.dst), states, strict=True):
        part.load_state_dict(state)
    run.oracle = oracle
    run.train([batch(t) for t in range(4, 8)])
    shuffled(run.model)
    run.oracle.follow(run.model)
    run.train([batch(t) for t in range(8, 12)])


def test_topkast_refuses_a_topology_it_did_not_choose(network, batch):
    model = network(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    updater = dst.TopKAST(model, optimizer, sparsity=0.7, backward_sparsity=0.5, until=100)
    step(model, optimizer, updater, batch(0))
    shuffled(model)
    with pytest.raises(OptimizerStateError, match="0: something else than TopKAST"):
        step(model, optimizer, updater, batch(1))


def test_topkast_gives_new_weights_the_state_of_a_new_parameter(network, batch):
    model = network(0.0)
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)
    updater = dst.TopKAST(model, optimizer, sparsity=0.7, backward_sparsity=0.5, every=1, until=100)
    for t in range(8):
        step(model, optimizer, updater, batch(t))
    for name, module in sparse_modules(model):
        for weights in (module.values, updater.extra[name]):
            assert (optimizer.state[weights]["step_size"] > 0).all()


def test_a_layout_that_does_not_fit_changes_nothing():
    layer = SparseLinear(8, 8, sparsity=0.5, layout="nm")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    before = optimizer.state[layer.values]["momentum_buffer"].clone()
    with pytest.raises(UnsupportedError), follow(optimizer, layer) as deltas:
        layer.rewire(torch.ones(8, 8, dtype=torch.bool))
    assert deltas == {}
    assert torch.equal(optimizer.state[layer.values]["momentum_buffer"], before)
