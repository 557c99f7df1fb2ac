"""Where a training step's time goes, from torch's profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from sparsekd.bench.cases import ModelCase
from sparsekd.bench.race import Key, pairs
from sparsekd.bench.steps import StepCompetitor, step_problem
from sparsekd.train import Row

PARTS = (
    "conv fprop",
    "conv dgrad",
    "conv wgrad",
    "BatchNorm",
    "ReLU, add",
    "pooling",
    "linear",
    "optimizer",
    "rest",
)
# Which part an event belongs to, by what its name contains; the first match counts.
_RULES = (
    ("Optimizer.step", "optimizer"),
    ("linear", "linear"),
    ("addmm", "linear"),
    ("aten::mm", "linear"),
    ("dgrad", "conv dgrad"),
    ("wgrad", "conv wgrad"),
    ("conv2d", "conv fprop"),
    ("convolution", "conv fprop"),
    ("batch_norm", "BatchNorm"),
    ("norm_act", "BatchNorm"),  # our fused BatchNorm, with the ReLU and addition behind it
    ("pool", "pooling"),
    ("aten::mean", "pooling"),
    ("relu", "ReLU, add"),
    ("threshold_backward", "ReLU, add"),
    ("aten::add", "ReLU, add"),
)


@dataclass(frozen=True)
class Waterfall:
    """The profiles of training steps.

    Args:
        case: the network.
        sparsities: that sparse competitors are profiled at.
        competitors: dense ones run once.
        rounds: steps profiled of each.
    """

    case: ModelCase
    sparsities: tuple[float, ...]
    competitors: Mapping[str, StepCompetitor]
    rounds: int

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("waterfall", self.case.title, "step")

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return pairs(self.competitors, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them."""
        rows = []
        for name, sparsity in self.keys():
            competitor = self.competitors[name]
            row: Row = {"arm": name, "sparsity": sparsity, "batch": self.case.batch, "ms": None}
            if reason := competitor.missing(self.case):
                rows.append({**row, "skipped": reason})
                continue
            run = competitor.build(step_problem(self.case, sparsity or self.sparsities[0]))
            split_backward(run.model)
            parts = step_parts(run.call, self.rounds)
            rows.append({**row, "ms": round(sum(parts.values()), 3), "parts": parts})
        return rows


def step_parts(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Profile a call and divide its time among `PARTS`.

    An event belongs to the outermost event around it that a rule knows; what no rule knows, and
    time outside of any event, is the rest.

    Args:
        call: trains a step.
        rounds: calls profiled, after one that is not.

    Returns:
        Milliseconds of one call by part.

    Example:
        >>> step_parts(lambda: torch.relu(torch.ones(1000)), rounds=2)["conv fprop"]
        0.0
    """
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        total = (time.perf_counter() - start) * 1e3 / rounds
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events() or ():
        part = _part_of(event)
        if part is not None:
            found[part] += event.self_cpu_time_total / 1e3 / rounds
    found["rest"] = max(0.0, total - sum(found.values()))
    return {part: round(found[part], 3) for part in PARTS}


def _part_of(event: Any) -> str | None:
    part = None
    while event is not None:
        part = next((name for text, name in _RULES if text in event.name), part)
        event = event.cpu_parent
    return part


def split_backward(model: nn.Module) -> None:
    """Make every dense convolution compute its gradients in two calls that a profile tells apart.

    torch's own backward computes them one after the other under one name.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.forward = _split(module)  # type: ignore[method-assign, assignment]


def _split(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = _SplitConv.apply(x, conv.weight, conv.stride, conv.padding)
        return y if conv.bias is None else y + conv.bias.view(-1, 1, 1)

    return forward


class _SplitConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.window = (list(stride), list(padding), [1, 1], False, [0, 0], 1)
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            with record_function("dgrad"):
                dx = _gradients(grads[0], x, weight, ctx.window, [True, False, False])[0]
        with record_function("wgrad"):
            dw = _gradients(grads[0], x, weight, ctx.window, [False, True, False])[1]
        return dx, dw, None, None


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, window: Any, wanted: list[bool]) -> Any:
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *window, wanted)
