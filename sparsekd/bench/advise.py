"""Advice for a model: which layers to make sparse, how much and in which layout.

Every layer that can be sparse is timed dense and sparse in each layout (`explain`). What loses by
the aim stays dense. The step of the plan is predicted from one that is measured with every layer
sparse: for each layer that the plan treats differently, the difference of its times is added. So
what surrounds the layers is in the prediction as it was measured. Then the plan's own step is
measured beside dense ones.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor, nn

from sparsekd.bench.cases import BASELINES
from sparsekd.bench.given import Arguments, GivenCase
from sparsekd.bench.layers import bf16_missing
from sparsekd.bench.steps import STEP_COMPETITORS, StepProblem
from sparsekd.bench.tables import Grid, percent
from sparsekd.diagnose import explain
from sparsekd.diagnose.explain import LayerReport
from sparsekd.errors import UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.memory import keep_memory_warm
from sparsekd.nn import sparse_modules, sparsify
from sparsekd.sparsity.rounding import check_sparsity
from sparsekd.timing import interleave

AIMS = ("time", "flops", "memory")
_CLEAR = 0.97  # of the dense time: what sparse must take to be called faster
_OURS = "sparsekd_optimized"
# Words of a weight during training: value, gradient, momentum; beside each nonzero its index.
_DENSE_WORDS, _SPARSE_WORDS = 3, 4


@dataclass(frozen=True)
class LayerAdvice:
    """What to do with a layer.

    Args:
        name: of the module in the model.
        shape: of its weight.
        layout: of its mask; None if it stays dense.
        density: share of the weight that would be stored, or is.
        sparse_ms: of forward and backward in the best layout.
        dense_ms: likewise dense.
    """

    name: str
    shape: tuple[int, ...]
    layout: str | None
    density: float
    sparse_ms: float
    dense_ms: float


@dataclass(frozen=True)
class Advice:
    """Which layers of a model to make sparse; print it for a table, `apply` it to a model.

    Args:
        aim: "time", "flops" or "memory".
        sparsity: asked for over all layers that can be sparse.
        layers: every one of them.
        dense_ms: of a training step of the dense model, in the better layout.
        predicted_ms: of a step of the model with the advice, after `optimize`.
        measured_ms: likewise, measured.
        bf16_ms: of a step of the dense model in bfloat16 autocast; None where the processor has no
            instructions for it.
        masks: of the sparse layers, by name.
    """

    aim: str
    sparsity: float
    layers: tuple[LayerAdvice, ...]
    dense_ms: float
    predicted_ms: float
    measured_ms: float
    bf16_ms: float | None
    masks: Mapping[str, Tensor] = field(repr=False)

    @property
    def dense(self) -> tuple[str, ...]:
        """Names of the layers that stay dense."""
        return tuple(layer.name for layer in self.layers if layer.layout is None)

    @property
    def speedup(self) -> float:
        """Times faster than dense, as measured."""
        return self.dense_ms / self.measured_ms

    def apply(self, model: nn.Module) -> nn.Module:
        """Make a model sparse as advised, in place; the masks are those that were timed.

        Args:
            model: dense, with the layers that the advice is about.

        Returns:
            The model, to be given to `optimize`.
        """
        chosen = {layer.name: layer.layout for layer in self.layers if layer.layout is not None}
        for layout in dict.fromkeys(chosen.values()):
            masks = {name: self.masks[name] for name, its in chosen.items() if its == layout}
            model = sparsify(model, masks=masks, layout=layout)
        return model

    def _grid(self) -> Grid:
        lines = [
            [
                layer.name,
                "x".join(map(str, layer.shape)),
                layer.layout or "dense",
                percent(1 - layer.density) if layer.layout else "-",
                f"{layer.sparse_ms:.3g}",
                f"{layer.dense_ms:.3g}",
            ]
            for layer in self.layers
        ]
        header = ["layer", "weight", "advice", "sparsity", "sparse, ms", "dense, ms"]
        return Grid(f"Advice for {self.aim} at {percent(self.sparsity)}", header, lines, self._note)

    @property
    def _note(self) -> str:
        stays = ", ".join(self.dense)
        bf16 = "" if self.bf16_ms is None else f", in bfloat16 {self.bf16_ms:.4g} ms"
        return (
            f"A training step: predicted {self.predicted_ms:.4g} ms, measured "
            f"{self.measured_ms:.4g} ms; dense {self.dense_ms:.4g} ms ({self.speedup:.2f}x)"
            f"{bf16}. "
            + (f"Dense, as sparse would lose: {stays}." if stays else "Every layer gains.")
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._grid().rich()

    def __str__(self) -> str:
        return self._grid().markdown()


@dataclass(frozen=True)
class _Variant:
    """A model with every layer sparse in one layout."""

    layout: str
    model: nn.Module
    layers: Mapping[str, LayerReport]

    def ms(self, name: str) -> float:
        """Return what the passes of a layer take on the sparse kernels."""
        times = [one.sparse_ms for one in self.layers[name].passes.values()]
        return sum(math.inf if ms is None else ms for ms in times)


def advise(
    model: nn.Module,
    *args: Any,
    aim: str = "time",
    sparsity: float = 0.9,
    layouts: Sequence[str] = ("csr",),
    distribution: str = "erk",
    skip: Iterable[str] = (),
    loss: Callable[[Any], Tensor] | None = None,
    rounds: int = 7,
    **kwargs: Any,
) -> Advice:
    """Advise which layers of a model to make sparse, how much and in which layout.

    The model itself is not changed. The process keeps its memory from then on (`keep_memory_warm`).

    Args:
        model: dense.
        *args: its inputs, the batch included.
        aim: "time": a layer is sparse where that is faster; "flops": where it has zeros; "memory":
            where its nonzeros, with indices, gradient and momentum, take less than the dense
            weight with gradient and momentum.
        sparsity: over all layers that can be sparse, before some stay dense.
        layouts: to choose from, for each layer by itself.
        distribution: "uniform", "er" or "erk".
        skip: names or patterns of layers that stay dense in any case.
        loss: takes the output and returns the loss, as in `bench_model`.
        rounds: turns of each step that is measured.
        **kwargs: inputs by name.

    Returns:
        The layers and the times of a step, predicted and measured.

    Raises:
        UnsupportedError: `aim` or a layout is not known.
        ValueError: the sparsity is outside [0, 1], or not that of a layout.

    Example:
        >>> net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
        >>> advice = advise(net, torch.randn(64, 256), sparsity=0.95, rounds=1)
        >>> sparse = advice.apply(net)
    """
    if aim not in AIMS:
        raise UnsupportedError(f"aim: expected one of {', '.join(AIMS)}, got {aim!r}")
    check_sparsity(sparsity)
    keep_memory_warm()
    case = GivenCase(type(model).__name__, model, Arguments(args, kwargs), loss)
    how = {"sparsity": sparsity, "distribution": distribution, "skip": tuple(skip)}
    variants = [_variant(case, str(Layout.parse(layout)), how) for layout in layouts]
    if not variants:
        raise UnsupportedError("layouts: expected at least one, got none")
    probe, *_ = variants
    chosen = [_layer(name, variants, aim) for name in probe.layers]
    masks = {}
    for layer in chosen:
        variant = next((one for one in variants if one.layout == layer.layout), probe)
        masks[layer.name] = dict(sparse_modules(variant.model))[layer.name].topology.mask()
    advice = Advice(aim, sparsity, tuple(chosen), math.nan, math.nan, math.nan, None, masks)
    times = _race(case, probe.model, advice.apply(case.build()), rounds)
    # As the layers run: where the dispatcher takes dense kernels for one, that is in the probe.
    runs = {
        one.layout: {name: report.ms for name, report in one.layers.items()} for one in variants
    }
    change = sum(
        (runs[layer.layout][layer.name] if layer.layout else layer.dense_ms)
        - runs[probe.layout][layer.name]
        for layer in chosen
    )
    return replace(
        advice,
        dense_ms=min(times[name] for name in BASELINES),
        predicted_ms=times["probe"] + change,
        measured_ms=times["plan"],
        bf16_ms=times.get("dense_bf16"),
    )


def _variant(case: GivenCase, layout: str, how: Mapping[str, Any]) -> _Variant:
    model = sparsify(case.build(), layout=layout, **how)
    inputs = case.inputs.contiguous(torch.channels_last)
    found = explain(copy.deepcopy(model), args=inputs.args, kwargs=dict(inputs.kwargs))
    return _Variant(layout, model, {layer.name: layer for layer in found.layers})


def _layer(name: str, variants: Sequence[_Variant], aim: str) -> LayerAdvice:
    best = min(variants, key=lambda variant: variant.ms(name))
    report, ms = best.layers[name], best.ms(name)
    dense_ms = min(variant.layers[name].dense_ms for variant in variants)
    gains = {
        "time": ms < _CLEAR * dense_ms,
        "flops": report.density < 1,
        "memory": _SPARSE_WORDS * report.density < _DENSE_WORDS,
    }
    layout = best.layout if gains[aim] else None
    return LayerAdvice(name, report.shape, layout, report.density, ms, dense_ms)


def _race(case: GivenCase, probe: nn.Module, plan: nn.Module, rounds: int) -> dict[str, float]:
    """Return the median times of steps, dense, with every layer sparse, and as planned."""
    x, y = case.example(probe)
    problems = {
        name: StepProblem(case, one, x, y) for name, one in (("probe", probe), ("plan", plan))
    }
    dense = [*BASELINES, *(["dense_bf16"] if bf16_missing(case) is None else [])]
    runs = {name: STEP_COMPETITORS[name].build(problems["plan"]) for name in dense}
    runs |= {name: STEP_COMPETITORS[_OURS].build(problem) for name, problem in problems.items()}
    calls = {name: run.call for name, run in runs.items()}
    times = interleave(calls, rounds, settle=True)
    return {name: statistics.median(taken) for name, taken in times.items()}
