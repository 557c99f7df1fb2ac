"""What a CUDA graph records: calls with addresses, which a rewire must leave valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded import plan_tensors
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.ops.gpu import structure as gpu_structure


class Recorder:
    """Keep the library calls of a stretch of code, to call them again with the same arguments."""

    def __init__(self, library: Any, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[Callable[[], int]] = []
        queue = library._queue

        def record(function: Any, device: torch.device, args: tuple[Any, ...]) -> int:
            self.calls.append(lambda: queue(function, device, args))
            return queue(function, device, args)

        patch.setattr(library, "_queue", record)

    def replay(self) -> None:
        assert not any(call() for call in list(self.calls))


def layer() -> nn.Module:
    return skd.make_capturable(
        skd.nn.SparseConv2d(6, 8, 3, stride=2, padding=1, groups=2, sparsity=0.6, seed=0)
    )


def test_a_recorded_forward_pass_follows_a_rewire(on_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv, x = layer(), torch.randn(5, 6, 7, 7)
    with torch.no_grad():
        conv(x)  # plans are made before anything is recorded
        recorder = Recorder(on_cuda, monkeypatch)
        held: list[Tensor] = []  # a graph's memory is its own: nothing else may take its place
        new_empty = Tensor.new_empty
        monkeypatch.setattr(
            Tensor, "new_empty", lambda *a, **k: held.append(new_empty(*a, **k)) or held[-1]
        )
        y = conv(x)
        monkeypatch.undo()
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            mask = torch.zeros(conv.topology.numel, dtype=torch.bool)
            mask[torch.randperm(mask.numel(), generator=generator)[: conv.topology.nnz]] = True
            conv.rewire(mask.view(conv.topology.shape))
            conv.values.normal_(generator=generator)
            y.fill_(float("nan"))
            recorder.replay()
            with skd.backend("reference"):
                torch.testing.assert_close(y, conv(x), rtol=1e-4, atol=1e-5)


def test_plans_stay_where_they_are_and_say_what_fresh_ones_do(on_cuda) -> None:
    torch.manual_seed(0)
    conv, x = layer(), torch.randn(5, 6, 7, 7, requires_grad=True)
    gpu_structure._known.clear()
    conv(x).sum().backward()
    before = [(tensor.data_ptr(), tensor.shape) for tensor in plan_tensors()]
    mask = conv.topology.mask().flatten()
    conv.rewire(mask[torch.randperm(mask.numel())].view(conv.topology.shape))
    assert [(tensor.data_ptr(), tensor.shape) for tensor in plan_tensors()] == before
    renewed = [tensor.clone() for tensor in plan_tensors()]
    gpu_structure._known.clear()
    conv(x).sum().backward()
    assert all(map(torch.equal, plan_tensors(), renewed))


def test_gradients_after_a_rewire_in_place(on_cuda) -> None:
    torch.manual_seed(0)
    conv, x = layer(), torch.randn(5, 6, 7, 7, requires_grad=True)
    conv(x).sum().backward()
    mask = conv.topology.mask().flatten()
    conv.rewire(mask[torch.randperm(mask.numel())].view(conv.topology.shape))
    gradients = []
    for backend in ("cuda", "reference"):
        with skd.backend(backend):
            gradients.append(torch.autograd.grad(conv(x).square().sum(), (x, conv.values)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
