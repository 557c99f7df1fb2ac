"""What holds for every method: exact counts, values and state that follow, bit-equal resuming."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsekd.dst import (
    ACDC,
    GMP,
    ITOP,
    MEST,
    SET,
    SNFS,
    GraNet,
    RigL,
    RigLSG,
    RigLSM,
    SRigL,
    Static,
    Updater,
)
from sparsekd.errors import CheckpointError
from sparsekd.nn import SparseLinear, sparse_modules

Make = Callable[..., Updater]
STEPS = 40


def constant_layers(dst: Updater, start: dict[str, int]) -> None:
    assert {name: m.topology.nnz for name, m in dst.modules.items()} == start


def constant_total(dst: Updater, start: dict[str, int]) -> None:
    assert dst.nnz() == sum(start.values())


def on_schedule(dst: Any, start: dict[str, int]) -> None:
    assert dst.nnz() == dst.target(dst.iteration)


def at_final(dst: Any, start: dict[str, int]) -> None:
    assert dst.nnz() == round((1 - dst.sparsity) * dst.numel())


def constant_fan_in(dst: Any, start: dict[str, int]) -> None:
    for name, module in dst.modules.items():
        fans = module.topology.crow_indices.diff()
        if name in dst.last_update:
            assert len(fans[fans > 0].unique()) == 1
            assert 0 <= start[name] - module.topology.nnz < int((fans > 0).sum())


@dataclass(frozen=True)
class Entry:
    make: Make
    check: Callable[[Any, dict[str, int]], None]


def moving(method: type[Updater], **options: Any) -> Make:
    """Build a method that moves weights, at the sparsity the model has."""

    def make(model: nn.Module, opt: torch.optim.Optimizer, every: int, until: int, **rest: Any):
        rest.pop("sparsity")
        return method(model, opt, drop_fraction=0.6, every=every, until=until, **options, **rest)

    return make


def pruning(method: type[Updater], **options: Any) -> Make:
    return lambda model, opt, **rest: method(model, opt, **options, **rest)


def alternating(model: nn.Module, opt: torch.optim.Optimizer, every: int, **rest: Any) -> ACDC:
    del rest["until"]
    turns = range(every, 1000, every)
    return ACDC(model, opt, compress=turns[::2], decompress=turns[1::2], **rest)


def documented_example() -> type[Updater]:
    """Return the method that the worked example of the documentation defines."""
    page = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
    block, _ = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(block, page.name, "exec"), scope)
    return scope["HalfAndHalf"]


FAMILY = {
    "static": Entry(moving(Static), constant_layers),
    "set": Entry(moving(SET), constant_layers),
    "itop": Entry(moving(ITOP), constant_layers),
    "rigl": Entry(moving(RigL), constant_layers),
    "rigl-sg": Entry(moving(RigLSG), constant_total),
    "rigl-sm": Entry(moving(RigLSM), constant_total),
    "snfs": Entry(moving(SNFS), constant_layers),
    "snfs-redistribute": Entry(moving(SNFS, redistribute=True), constant_total),
    "srigl": Entry(moving(SRigL), constant_fan_in),
    "mest": Entry(pruning(MEST, mutation=0.05, gradient_weight=1.0), at_final),
    "gmp": Entry(pruning(GMP), on_schedule),
    "gmp-layer": Entry(pruning(GMP, scope="layer"), on_schedule),
    "granet": Entry(pruning(GraNet), on_schedule),
    "acdc": Entry(alternating, on_schedule),
    "documented": Entry(moving(documented_example()), constant_layers),
}
ENTRIES = pytest.mark.parametrize("entry", FAMILY.values(), ids=FAMILY.keys())
OPTIMIZERS = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
}


def spread(module: Any, per_weight: Tensor) -> Tensor:
    """Place one number per nonzero in the flat dense weight."""
    flat = torch.zeros(module.topology.numel, dtype=per_weight.dtype)
    return flat.index_copy(0, module.topology.flat_indices(), per_weight.detach())


def dense_view(dst: Updater) -> list[Tensor]:
    """Return values and momentum of every layer at their positions."""
    state = dst.optimizer.state
    return [
        spread(module, tensor)
        for module in dst.modules.values()
        for tensor in (module.values, state[module.values]["momentum_buffer"])
    ]


@ENTRIES
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    sparsities=st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.0]), min_size=2, max_size=2),
    harder=st.floats(0, 1),
    kind=st.sampled_from(["plain", "dead", "ties"]),
    seed=st.integers(0, 1000),
)
def test_a_thousand_random_updates(entry, sizes, sparsities, harder, kind, seed):
    """40 iterations on each of 25 networks, with empty, full, dead, tied and one-weight layers."""
    layers = [
        SparseLinear(before, after, sparsity=sparsity, seed=seed)
        for (before, after), sparsity in zip(itertools.pairwise(sizes), sparsities, strict=False)
    ]
    model = nn.Sequential(*layers).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
    start = {name: m.topology.nnz for name, m in sparse_modules(model)}
    numel = sum(m.topology.numel for _, m in sparse_modules(model))
    sparsity = 1 - (1 - harder) * sum(start.values()) / numel
    dst = entry.make(model, opt, sparsity=sparsity, every=1, until=STEPS + 1, seed=seed)
    values = [layer.values for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        if kind == "ties":
            for layer in layers:
                layer.values.data.round_()
        opt.zero_grad()
        x = torch.randn(2, sizes[0], generator=generator, dtype=torch.float64)
        (model(x).tanh().sum() * (kind != "dead")).backward()
        opt.step()  # before the update, so that what it changes can be told
        before = dense_view(dst)
        dst.step()
        entry.check(dst, start)
        assert all(layer.values is value for layer, value in zip(layers, values, strict=True))
        for old, new, mask in zip(before, dense_view(dst), masks(layers), strict=True):
            assert torch.equal(new, old * mask)
        assert all(layer.values.shape == layer.values.grad.shape for layer in layers)


@ENTRIES
def test_the_updates_ahead_are_those_that_come(entry, make_network, train):
    model = make_network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dst = entry.make(model, opt, sparsity=0.9, every=3, until=60, seed=0)
    ahead, rewired = [], []
    for _ in range(16):
        ahead.append(dst.updates_ahead(16))
        rewired += train(dst, 1)
    assert ahead == [sum(rewired[t:]) for t in range(16)]


def masks(layers: list[SparseLinear]) -> list[Tensor]:
    return [layer.topology.mask().view(-1) for layer in layers for _ in range(2)]


class Run:
    def __init__(self, model: nn.Module, make_optimizer: Callable, make: Make, seed: int) -> None:
        self.model = model
        self.optimizer = make_optimizer(model.parameters())
        self.dst = make(model, self.optimizer, sparsity=0.9, every=3, until=13, seed=seed)

    def train(self, first: int, last: int) -> None:
        for t in range(first, last):
            x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(t))
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            if not self.dst.step():
                self.optimizer.step()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.dst, self.model, self.optimizer)], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        states = torch.load(file, weights_only=True)
        for part, state in zip((self.dst, self.model, self.optimizer), states, strict=True):
            part.load_state_dict(state)


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@ENTRIES
def test_resuming_at_any_step_is_bit_equal(entry, make_optimizer, make_network):
    straight = Run(make_network(dtype=torch.float32), make_optimizer, entry.make, seed=1)
    files = []
    for t in range(15):
        files.append(straight.save())
        straight.train(t, t + 1)
    expected = torch.load(straight.save(), weights_only=True)
    for t, file in enumerate(files):
        # another seed everywhere: all that matters has to come from the file
        resumed = Run(make_network(9, dtype=torch.float32), make_optimizer, entry.make, seed=2)
        resumed.train(0, t % 3)
        resumed.load(file)
        resumed.train(t, 15)
        assert_equal(torch.load(resumed.save(), weights_only=True), expected)


@ENTRIES
def test_a_state_taken_earlier_does_not_change_later(entry, make_network):
    run = Run(make_network(dtype=torch.float32), OPTIMIZERS["adam"], entry.make, seed=1)
    run.train(0, 4)
    state = run.dst.state_dict()
    copy = torch.load(run.save(), weights_only=True)[0]
    run.train(4, 10)
    assert_equal(state, copy)


@pytest.mark.parametrize("name", sorted(FAMILY.keys() - {"static"}))
def test_the_topology_does_move_in_these_runs(name, make_network):
    run = Run(make_network(dtype=torch.float32), OPTIMIZERS["adam"], FAMILY[name].make, seed=1)
    before = [m.topology for _, m in sparse_modules(run.model)]
    run.train(0, 4)
    after = [m.topology for _, m in sparse_modules(run.model)]
    assert all(new != old for new, old in zip(after, before, strict=True))


def test_state_of_another_method_or_incomplete_state_is_refused(make_network):
    model = make_network()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    rigl = RigL(model, optimizer, every=4, until=100)
    state = SET(model, optimizer, every=4, until=100).state_dict()
    with pytest.raises(CheckpointError, match="expected that of RigL, got that of SET"):
        rigl.load_state_dict(state)
    state = rigl.state_dict()
    del state["generator"]
    with pytest.raises(CheckpointError, match="generator"):
        rigl.load_state_dict(state)
