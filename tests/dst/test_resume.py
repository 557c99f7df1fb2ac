"""A run resumed from its state_dicts is bit-equal to one that was never interrupted."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from sparsekd.dst import SET, RigL, Static, Updater
from sparsekd.errors import CheckpointError
from sparsekd.nn import sparse_modules

STEPS = 12
OPTIMIZERS = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
}


class Run:
    def __init__(self, model: nn.Module, make_optimizer, method: type[Updater], seed: int) -> None:
        self.model = model
        self.optimizer = make_optimizer(model.parameters())
        self.dst = method(model, self.optimizer, drop_fraction=0.4, every=4, until=100, seed=seed)

    def train(self, first: int, last: int) -> None:
        for t in range(first, last):
            x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(t))
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            if not self.dst.step():
                self.optimizer.step()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.dst)], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        states = torch.load(file, weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.dst), states, strict=True):
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
@pytest.mark.parametrize("method", [Static, SET, RigL])
def test_resuming_at_any_step_is_bit_equal(method, make_optimizer, make_network):
    straight = Run(make_network(dtype=torch.float32), make_optimizer, method, seed=1)
    files = []
    for t in range(STEPS):
        files.append(straight.save())
        straight.train(t, t + 1)
    expected = torch.load(straight.save(), weights_only=True)
    for t, file in enumerate(files):
        # another seed everywhere: all that matters has to come from the file
        resumed = Run(make_network(seed=9, dtype=torch.float32), make_optimizer, method, seed=2)
        resumed.train(0, t % 3)
        resumed.load(file)
        resumed.train(t, STEPS)
        assert_equal(torch.load(resumed.save(), weights_only=True), expected)


def test_the_topology_does_move_in_these_runs(make_network):
    run = Run(make_network(dtype=torch.float32), OPTIMIZERS["adam"], RigL, seed=1)
    before = [m.topology for _, m in sparse_modules(run.model)]
    run.train(0, STEPS)
    assert all(
        m.topology != old for (_, m), old in zip(sparse_modules(run.model), before, strict=True)
    )


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
