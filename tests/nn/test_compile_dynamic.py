"""A compiled model whose number of nonzeros changes is compiled twice, not at every change."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsekd as skd

DTYPE = torch.float64


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.compiler.config.patch(dynamic_sources=""):
        yield
    torch._dynamo.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False, padding_mode="reflect"), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10),
    ).to(DTYPE)  # fmt: skip


def results(model: nn.Module, call: Callable[[Tensor], Tensor], step: int) -> list[Tensor]:
    """Return loss and gradients, which stay in place."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 6, 6, generator=generator, dtype=DTYPE)
    target = torch.randint(10, (4,), generator=generator)
    model.zero_grad()
    loss = F.cross_entropy(call(x), target)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


METHODS: dict[str, tuple[type, float, dict[str, Any]]] = {
    "GMP": (skd.dst.GMP, 0.0, {"sparsity": 0.6}),
    "GMP by layer": (skd.dst.GMP, 0.0, {"sparsity": 0.9, "scope": "layer"}),
    "GraNet": (skd.dst.GraNet, 0.3, {"sparsity": 0.6}),
}


def train(method: str, compiler: str, until: int) -> int:
    """Train through a schedule, hold every step against eager; return the compilations."""
    updater, sparsity, options = METHODS[method]
    model = skd.sparsify(network(), sparsity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dst = updater(model, optimizer, every=2, until=until, **options)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    lengths = set()
    for step in range(until + 2):
        twin = copy.deepcopy(model)
        assert_equal(results(model, compiled, step), results(twin, twin, step))
        if not dst.step():
            optimizer.step()
        lengths.add(tuple(m.topology.nnz for _, m in skd.nn.sparse_modules(model)))
    assert len(lengths) >= until // 2
    return counter.frame_count


@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_compiles_twice(method: str) -> None:
    assert train(method, "aot_eager", 16) == 2


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="inductor cannot link in a path with a space")
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
def test_a_schedule_compiles_twice_with_inductor() -> None:
    assert train("GMP", "inductor", 6) == 2


def resized(module: skd.nn.SparseLinear, nnz: int) -> None:
    mask = torch.zeros(module.topology.numel, dtype=torch.bool)
    mask[torch.randperm(mask.numel())[:nnz]] = True
    module.rewire(mask.view(module.topology.shape))
    nn.init.normal_(module.values)


def linears() -> tuple[nn.Sequential, CompileCounterWithBackend, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    layers = [skd.nn.SparseLinear(8, 8, sparsity=0.5, seed=i, dtype=DTYPE) for i in range(3)]
    model, counter = nn.Sequential(*layers), CompileCounterWithBackend("aot_eager")
    return model, counter, torch.compile(model, backend=counter, fullgraph=True)


def check(model: nn.Module, compiled: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 8, dtype=DTYPE)
    grads = []
    for call in (compiled, skd.densify(copy.deepcopy(model))):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        grads.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    assert_equal(*grads)


def test_layers_of_equal_length_may_part() -> None:
    model, counter, compiled = linears()
    check(model, compiled)
    for lengths in [(20, 20, 20), (20, 21, 20), (7, 8, 9), (60, 5, 64), (3, 64, 2)]:
        for module, length in zip(model, lengths, strict=True):
            resized(module, length)
        check(model, compiled)
    assert counter.frame_count == 2


def test_an_emptied_layer_is_right_and_compiled_for_each_of_zero_and_one() -> None:
    model, counter, compiled = linears()
    for length in (32, 9, 5, 1, 0, 0, 1, 7):
        resized(model[1], length)
        check(model, compiled)
    assert counter.frame_count == 4  # torch takes the lengths 0 and 1 for constants


def test_a_loaded_topology_of_another_length() -> None:
    model, counter, compiled = linears()
    check(model, compiled)
    for sparsity in (0.7, 0.3, 0.9):
        other = nn.Sequential(*(skd.nn.SparseLinear(8, 8, sparsity=sparsity) for _ in model))
        model.load_state_dict(other.to(DTYPE).state_dict())
        check(model, compiled)
    assert counter.frame_count == 2


def test_a_topology_that_keeps_its_length_stays_a_constant() -> None:
    model, counter, compiled = linears()
    for _ in range(3):
        check(model, compiled)
        for module in model:
            resized(module, module.topology.nnz)
    assert counter.frame_count == 1
    assert torch.compiler.config.dynamic_sources == ""


def test_only_what_changes_is_named() -> None:
    torch.compiler.config.dynamic_sources = "L['mine']"
    model, _, _ = linears()
    for length in (3, 4, 5):
        resized(model[0], length)
    sources = torch.compiler.config.dynamic_sources.split(",")
    assert sources[0] == "L['mine']"
    assert len(sources) == 3  # once each, however often a length changes


def test_penalties_on_the_values_compile_as_before() -> None:
    model, counter, _ = linears()

    def loss(x: Tensor) -> Tensor:
        penalty = sum(m.values.square().mean() + m.values.abs().max() for m in model)
        return model(x).square().mean() + penalty

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for length in (None, 20, 9, 33):
        if length is not None:
            for module in model:
                resized(module, length)
        x = torch.randn(5, 8, dtype=DTYPE)
        got, expected = (torch.autograd.grad(f(x), model.parameters()) for f in (compiled, loss))
        assert_equal(got, expected)
    assert counter.frame_count == 2
