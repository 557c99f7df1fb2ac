"""Maps that are read from what they are computed from: which are stored, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.models.resnet import BasicBlock, Bottleneck
from sparsekd.models.wide_resnet import PreActivationBlock
from sparsekd.nn.blocked import call_blocked
from sparsekd.ops.cpu.blocked_map import Blocked, enter


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(13, 4, 6, 5, dtype=torch.float64, generator=generator)


def unit(inside: int, out: int, *, relu: bool = True) -> list[nn.Module]:
    rest = [nn.ReLU()] if relu else []
    return [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), *rest]


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "units": lambda: [*unit(4, 6), *unit(6, 5), *unit(5, 4)],
    "without a ReLU": lambda: [*unit(4, 6, relu=False), *unit(6, 5), *unit(5, 4, relu=False)],
    "identity": lambda: [BasicBlock(4, 4) for _ in range(5)],
    "identity behind a unit": lambda: [*unit(4, 4), *(BasicBlock(4, 4) for _ in range(4))],
    "identity without a ReLU": lambda: [
        *unit(4, 4, relu=False),
        BasicBlock(4, 4),
        Bottleneck(4, 1),
    ],
    "projections": lambda: [BasicBlock(4, 6), Bottleneck(6, 2, 2), BasicBlock(8, 4)],
    "both": lambda: [BasicBlock(4, 6), BasicBlock(6, 6), BasicBlock(6, 6), BasicBlock(6, 8, 2)],
    "maximum": lambda: [*unit(4, 6), nn.MaxPool2d(2), BasicBlock(6, 6)],
    "average": lambda: [BasicBlock(4, 4), nn.AvgPool2d(2), BasicBlock(4, 6)],
    "pre-activation": lambda: [*unit(4, 6), PreActivationBlock(6, 6), PreActivationBlock(6, 8)],
    "another module": lambda: [*unit(4, 6), nn.Dropout2d(0.0), *unit(6, 4), nn.Tanh()],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, x, blocks, sparse_twins, one_step, assert_near) -> None:
    fast, plain = sparse_twins(lambda: nn.Sequential(*CHAINS[name]()))
    for training in (True, True, False):
        blocks.clear()
        found = one_step(fast.train(training), x)
        assert len(blocks) >= (2 if name != "pre-activation" or not training else 1)
        assert_near(found, one_step(plain.train(training), x), 1e-9)


@pytest.mark.parametrize("name", ["units", "both", "maximum", "pre-activation"])
def test_second_derivatives(name: str, x, blocks, sparse_twins, assert_near) -> None:
    fast, plain = sparse_twins(lambda: nn.Sequential(*CHAINS[name]()))
    sides = []
    for model in (fast, plain):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).sin().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        sides.append([leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert blocks
    assert_near(*sides, 1e-7)


def _stored(model: nn.Module, x: Tensor) -> list[bool]:
    """Return of each block in turn whether it stores its result."""
    maps: Tensor | Blocked = enter(x)
    found = []
    for module in model:
        maps = call_blocked(module, maps)
        assert isinstance(maps, Blocked)
        found.append(maps.parts is None)
    return found


def test_every_other_identity_stores_its_result(x, sparse_twins) -> None:
    model = sparse_twins(lambda: nn.Sequential(*(BasicBlock(4, 4) for _ in range(5))))[0]
    # A sum of two maps is read instead of its result, one of three is not.
    assert _stored(model, x) == [False, True, False, True, False]


def test_projections_store_nothing(x, sparse_twins) -> None:
    model = sparse_twins(lambda: nn.Sequential(*CHAINS["projections"]()))[0]
    assert _stored(model, x) == [False, False, False]


def test_stored_maps_are_what_the_modules_return(x, sparse_twins, assert_near) -> None:
    fast, plain = sparse_twins(lambda: nn.Sequential(*CHAINS["both"]()))
    maps: Tensor | Blocked = enter(x)
    for module, other in zip(fast, plain, strict=True):
        maps, x = call_blocked(module, maps), other(x)
        assert isinstance(maps, Blocked)
        assert_near([skd.ops.cpu.blocked_map.leave(maps)], [x], 1e-10)
