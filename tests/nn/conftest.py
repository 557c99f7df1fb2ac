"""What the tests of modules share."""

from __future__ import annotations

import copy
import gc
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekd as skd
from sparsekd.ops import observe
from sparsekd.ops.cpu import blocked as cpu_blocked
from sparsekd.ops.cpu import preactivation as cpu_preactivation

fused_norms = importlib.import_module("sparsekd.nn.norm_act")  # a function has the name, too


@pytest.fixture(autouse=True, scope="module")
def nobody_listens() -> None:
    """Drop updaters that other tests have left to the garbage collector.

    While one of them listens for gradients, no model runs in the blocked layout.
    """
    gc.collect()
    assert not observe.listeners


@pytest.fixture(autouse=True)
def small_maps_are_fused(monkeypatch) -> None:
    """Run the fused norm where it does not pay too, since tests have small maps."""
    monkeypatch.setattr(fused_norms, "LEAST", 0)


@pytest.fixture
def no_unexpected_warnings() -> Iterator[None]:
    """Errors in place of all warnings but the one that small random layers give."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no weight is left in some output channels")
        yield


class Calls(TorchDispatchMode):
    """Count the fused and the plain BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.plain = self.relus = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name
        self.fused += name == "sparsekd::norm_act"
        self.plain += name == "aten::native_batch_norm"
        self.relus += name.startswith(("aten::relu", "aten::clamp_min"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count() -> Callable[[nn.Module, Tensor], tuple[int, int, int]]:
    """Return the numbers of fused and plain norms, and of ReLUs by themselves, of a call."""

    def count(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
        with Calls() as calls:
            model(x)
        return calls.fused, calls.plain, calls.relus

    return count


@pytest.fixture
def twins() -> Callable[[Callable[[], nn.Module]], tuple[nn.Module, nn.Module]]:
    """Return a model that is optimized and an equal one that is not, in float64."""

    def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        return skd.optimize(copy.deepcopy(model)), model

    return twins


@pytest.fixture
def assert_equal_steps() -> Callable[[nn.Module, nn.Module, Tensor], None]:
    def assert_equal_steps(fast: nn.Module, plain: nn.Module, x: Tensor) -> None:
        for _ in range(2):
            sides = []
            for model in (fast, plain):
                model.zero_grad()
                leaf = x.clone().requires_grad_()
                y = model(leaf)
                y.square().sum().backward()
                grads = [p.grad for p in model.parameters()]
                sides.append([y.detach(), leaf.grad, *grads, *model.buffers()])
            torch.testing.assert_close(sides[0], sides[1])

    return assert_equal_steps


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def blocks(monkeypatch) -> list[str]:
    """Return a list that grows by one entry for each block that runs in the blocked layout."""
    ran: list[str] = []
    for module in (cpu_blocked, cpu_preactivation):

        def run(*args: Any, _run: Callable = module.run, **options: Any) -> Any:
            result = _run(*args, **options)
            if result is not None:
                ran.append("block")
            return result

        monkeypatch.setattr(module, "run", run)
    return ran


@pytest.fixture
def sparse_twins() -> Callable[..., tuple[nn.Module, nn.Module]]:
    """Return a sparse model that is optimized and an equal one that is not, in float64."""

    def sparse_twins(
        make: Callable[[], nn.Module], sparsity: float = 0.7
    ) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        model = make().double()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no weight is left in some output channels")
            skd.sparsify(model, sparsity=sparsity, seed=0, distribution="uniform")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        return skd.optimize(copy.deepcopy(model)), model

    return sparse_twins


@pytest.fixture
def one_step() -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """Return the result, all gradients and the buffers after forward and backward of a step."""

    def one_step(model: nn.Module, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        leaf = x.detach().requires_grad_()  # of the strides of x
        y = model(leaf)
        y.sin().sum().backward()
        grads = [p.grad for p in model.parameters()]
        return [y.detach(), leaf.grad, *grads, *(b.clone() for b in model.buffers())]

    return one_step


@pytest.fixture
def assert_near() -> Callable[..., None]:
    """Compare tensors, each to `tol` times its largest entry or 1."""

    def assert_near(found: list[Any], expected: list[Any], tol: float = 1e-10) -> None:
        for a, b in zip(found, expected, strict=True):
            if b is None:
                assert a is None
                continue
            scale = max([1.0, *b.detach().double().abs().nan_to_num(0, 0, 0).flatten().tolist()])
            torch.testing.assert_close(a, b, rtol=0, atol=tol * scale, equal_nan=True)

    return assert_near
