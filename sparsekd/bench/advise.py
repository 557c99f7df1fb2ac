"""Advice for a model: which layers to make sparse, how much and in which layout.

Layers are timed dense and sparse, and two plans and the dense model as whole steps; from these the
step of any plan is predicted (`prediction`). With an aim such as half the dense time, the least
sparsity on a ladder whose prediction meets it is taken. Then the plan's own step is measured beside
the dense one; where it misses the aim, what was measured mends the prediction for the rungs above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor, nn

from sparsekd.bench.given import Arguments, GivenCase
from sparsekd.bench.planned import Steps, make_sparse
from sparsekd.bench.prediction import Aim, LayerAdvice, Plan, Planner, Step, planner
from sparsekd.bench.tables import Grid, percent
from sparsekd.errors import UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.memory import keep_memory_warm
from sparsekd.sparsity import NAMED_FROM
from sparsekd.sparsity.rounding import check_sparsity

LADDER = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98)
_PROBES = (0.68, 0.94)  # measured whatever the aim; beside the rungs, so that those are predicted
_SPARSITY = 0.9
_MOST_GAIN = 5


@dataclass(frozen=True)
class Trial:
    """A plan whose step was predicted and then measured, in turns with dense ones."""

    plan: Plan
    before: Step
    predicted: Step
    measured: Step

    def share(self, kind: str) -> float:
        """Return what the measured step takes of the dense one."""
        return self.measured.of(kind) / max(self.before.of(kind), 1e-9)


@dataclass(frozen=True)
class Advice:
    """Which layers of a model to make sparse; print it for tables, `apply` it to a model.

    Args:
        aim: what it is for.
        sparsity: asked for over all layers that can be sparse, before some stay dense.
        layers: every one of them.
        before: the step of the dense model, in the layout that is faster, or needs less.
        predicted: the step of the model with the advice, after `optimize`.
        measured: likewise, measured.
        bf16_ms: of a step of the dense model in bfloat16 autocast; None where the processor has no
            instructions for it.
        masks: of the sparse layers, by name.
        left: parameters that cannot be sparse or are skipped, with their share of all.
        trials: the plans that were measured, in that order; all but the last missed the aim.
    """

    aim: Aim
    sparsity: float
    layers: tuple[LayerAdvice, ...]
    before: Step
    predicted: Step
    measured: Step
    bf16_ms: float | None
    masks: Mapping[str, Tensor] = field(repr=False)
    left: Mapping[str, float] = field(default_factory=dict, repr=False)
    trials: tuple[Trial, ...] = field(default=(), repr=False)

    @property
    def dense(self) -> tuple[str, ...]:
        """Names of the layers that stay dense."""
        return tuple(layer.name for layer in self.layers if layer.layout is None)

    @property
    def dense_ms(self) -> float:
        """Time of a step of the dense model."""
        return self.before.ms

    @property
    def predicted_ms(self) -> float:
        """Time of a step with the advice, predicted."""
        return self.predicted.ms

    @property
    def measured_ms(self) -> float:
        """Time of a step with the advice, measured."""
        return self.measured.ms

    @property
    def speedup(self) -> float:
        """Times faster than dense, as measured."""
        return self.dense_ms / self.measured_ms

    @property
    def met(self) -> bool:
        """Whether the measured step reaches the aim."""
        return self.aim.met(self.measured, self.before)

    def apply(self, model: nn.Module) -> nn.Module:
        """Make a model sparse as advised, in place; the masks are those that were timed.

        Args:
            model: dense, with the layers that the advice is about.

        Returns:
            The model, to be given to `optimize`.
        """
        return make_sparse(model, self.layers, self.masks)

    def _grids(self) -> list[Grid]:
        lines = [
            [
                layer.name or "the model",
                "x".join(map(str, layer.shape)),
                layer.layout or "dense",
                percent(1 - layer.density) if layer.layout else "-",
                f"{layer.sparse_ms:.3g}",
                f"{layer.dense_ms:.3g}",
            ]
            for layer in self.layers
        ]
        header = ["layer", "weight", "advice", "sparsity", "sparse, ms", "dense, ms"]
        title = f"Advice for {self.aim} at {percent(self.sparsity)}"
        return [Grid(title, header, lines, self._note), self._steps()]

    def _steps(self) -> Grid:
        steps = (self.before, self.predicted, self.measured)
        lines = [
            ["time, ms", *(f"{step.ms:.4g}" for step in steps), *self._shares("time")],
            ["GFLOP", *(f"{step.flops / 1e9:.4g}" for step in steps), *self._shares("flops")],
            [
                "peak memory, MiB",
                *(f"{step.bytes / 2**20:.4g}" for step in steps),
                *self._shares("memory"),
            ],
        ]
        header = ["a training step", "dense", "predicted", "measured", "of dense"]
        return Grid("Forward, loss, backward and SGD", header, lines, self._outcome)

    def _shares(self, kind: str) -> list[str]:
        return [f"{self.measured.of(kind) / max(self.before.of(kind), 1e-9):.3f}"]

    @property
    def _outcome(self) -> str:
        text = f"{self.speedup:.2f}x as fast as dense"
        if self.bf16_ms is not None:
            text += f"; dense in bfloat16 autocast takes {self.bf16_ms:.4g} ms"
        if self.aim.share is None:
            return f"{text}."
        if self.met:
            return f"{text}. The aim {self.aim} is met."
        predicted, measured = (
            step.of(self.aim.kind) / self.before.of(self.aim.kind)
            for step in (self.predicted, self.measured)
        )
        return (
            f"{text}. The aim {self.aim} cannot be met: {percent(self.sparsity)} comes nearest, "
            f"with {predicted:.3f} of the dense step predicted and {measured:.3f} measured."
        )

    @property
    def _note(self) -> str:
        gains = sorted(
            (layer for layer in self.layers if layer.layout and layer.sparse_ms < layer.dense_ms),
            key=lambda layer: layer.sparse_ms - layer.dense_ms,
        )[:_MOST_GAIN]
        parts = []
        if gains:
            most = [f"{one.name} ({one.dense_ms - one.sparse_ms:.3g} ms)" for one in gains]
            parts.append(f"Most is gained by {', '.join(most)}.")
        parts.append(
            f"Dense, as sparse would lose: {', '.join(self.dense)}."
            if self.dense
            else "Every layer gains."
        )
        named = [
            f"{name} ({share:.1%})" for name, share in self.left.items() if share >= NAMED_FROM
        ]
        if named:
            parts.append(f"Cannot be sparse, or skipped: {', '.join(named)} of the parameters.")
        return " ".join(parts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for grid in self._grids():
            yield grid.rich()

    def __str__(self) -> str:
        return "\n".join(grid.markdown() for grid in self._grids())


def advise(
    model: nn.Module,
    *args: Any,
    aim: str = "time",
    sparsity: float | None = None,
    layouts: Sequence[str] = ("csr",),
    distribution: str = "erk",
    skip: Iterable[str] = (),
    loss: Callable[[Any], Tensor] | None = None,
    rounds: int = 9,
    **kwargs: Any,
) -> Advice:
    """Advise which layers of a model to make sparse, how much and in which layout.

    The model itself is not changed. The process keeps its memory from then on (`keep_memory_warm`).

    Args:
        model: dense.
        *args: its inputs, the batch included.
        aim: "time": a layer is sparse where that is faster; "flops": where it has zeros; "memory":
            where its nonzeros, with indices, gradient and momentum, take less than the dense
            weight with gradient and momentum. With a share of the dense step, as "time=0.5" or
            "memory=0.7", the least sparsity from 50 to 98 % that reaches it is chosen.
        sparsity: over all layers that can be sparse, before some stay dense; by default 0.9. Not
            together with a share.
        layouts: to choose from, for each layer by itself.
        distribution: "uniform", "er" or "erk".
        skip: names or patterns of layers that stay dense in any case.
        loss: takes the output and returns the loss, as in `bench_model`.
        rounds: turns of each step that is measured.
        **kwargs: inputs by name.

    Returns:
        The layers, and what a step takes: dense, predicted and measured. If no sparsity reaches
        the aim it is the one that comes nearest, and `met` is False.

    Raises:
        UnsupportedError: `aim` or a layout is not known, or a sparsity is given besides a share.
        ValueError: the sparsity is outside [0, 1], or not that of a layout.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
        >>> advice = advise(net, torch.randn(64, 256), aim="flops=0.3", rounds=1)
        >>> advice.sparsity, advice.met
        (0.7, True)
        >>> sparse = advice.apply(net)
    """
    goal = Aim.parse(aim)
    if goal.share is not None and sparsity is not None:
        raise UnsupportedError(f"sparsity: the aim {goal} chooses it, got {sparsity} besides")
    asked = _SPARSITY if sparsity is None else check_sparsity(sparsity)
    parsed = list(dict.fromkeys(map(Layout.parse, layouts)))
    if not parsed:
        raise UnsupportedError("layouts: expected at least one, got none")
    keep_memory_warm()
    case = GivenCase(type(model).__name__, model, Arguments(args, kwargs), loss)
    plans = planner(case, goal.kind, parsed, distribution, tuple(skip))
    rungs = _rungs(plans, goal, asked)
    steps = Steps(case, plans, rounds)
    for probe in () if plans.fixed else _PROBES:
        steps.add(plans.plan(probe))
    plans.measured = steps.measure()
    trials: list[Trial] = []
    while rungs:
        plan, guess = _choose(plans, rungs, goal)
        hopeless = not goal.met(guess, plans.measured[0][1])
        steps.add(plan)
        *plans.measured, (_, measured) = steps.measure()
        before = plans.measured[0][1]
        trials.append(Trial(plan, before, plans.predict(plan), measured))
        if hopeless or goal.met(measured, before):
            break
        plans.measured.append((plan, measured))
        rungs = [rung for rung in rungs if rung > plan.sparsity]
    best = min(trials, key=lambda trial: trial.share(goal.kind))
    return Advice(
        goal,
        best.plan.sparsity,
        best.plan.layers,
        before=best.before,
        predicted=best.predicted,
        measured=best.measured,
        bf16_ms=steps.bf16_ms,
        masks=plans.masks(best.plan, model),
        left=plans.left,
        trials=tuple(trials),
    )


def _rungs(plans: Planner, goal: Aim, asked: float) -> list[float]:
    """Return the sparsities to choose from."""
    if goal.share is not None:
        return plans.fixed or [rung for rung in LADDER if plans.fits(rung)]
    if not plans.fits(asked):
        raise ValueError(
            f"sparsity: the layouts allow {', '.join(map(percent, plans.fixed))} only, got {asked}"
        )
    return [asked]


def _choose(plans: Planner, rungs: Sequence[float], goal: Aim) -> tuple[Plan, Step]:
    """Return the first plan that meets the aim by its prediction, or else comes nearest."""
    found = []
    for rung in rungs:
        plan = plans.plan(rung)
        found.append((plan, plans.predict(plan)))
        if goal.met(found[-1][1], plans.measured[0][1]):
            return found[-1]
    return min(found, key=lambda pair: pair[1].of(goal.kind))
