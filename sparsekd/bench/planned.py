"""The steps of a model by several plans, measured in turns with dense ones."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsekd.bench.cases import BASELINES
from sparsekd.bench.given import GivenCase
from sparsekd.bench.layers import bf16_missing
from sparsekd.bench.prediction import LayerAdvice, Plan, Planner, Step
from sparsekd.bench.steps import STEP_COMPETITORS, StepProblem, StepRun
from sparsekd.diagnose import flops
from sparsekd.nn import sparsify
from sparsekd.timing import interleave
from sparsekd.train.step_memory import peak

_OURS, _BF16 = "sparsekd_optimized", "dense_bf16"


class Steps:
    """Measures the steps of a model, dense and by several plans, all in turns.

    A prediction and what it is compared with so come from the same minutes of the machine.

    Args:
        case: the dense model.
        plans: counts its operations, draws the masks.
        rounds: turns of each step.
    """

    def __init__(self, case: GivenCase, plans: Planner, rounds: int) -> None:
        self.bf16_ms: float | None = None
        self._bf16: float | None = None
        self._dense: tuple[int, int] | None = None
        self._case, self._plans, self._rounds = case, plans, rounds
        self._chosen: list[Plan] = []
        self._work: dict[str | int, tuple[int, int]] = {}
        self._runs: dict[str | int, StepRun] = {
            name: self._ready(name, case.model)
            for name in (*BASELINES, _BF16)
            if name != _BF16 or bf16_missing(case) is None
        }

    def add(self, plan: Plan) -> None:
        """Let a plan take part from now on, after `optimize`."""
        masks = self._plans.masks(plan, self._case.model)
        with warnings.catch_warnings():  # of channels without a weight: told by `apply`
            warnings.simplefilter("ignore")
            model = make_sparse(self._case.build(), plan.layers, masks)
        self._runs[len(self._chosen)] = self._ready(_OURS, model)
        self._chosen.append(plan)

    def measure(self) -> list[tuple[Plan, Step]]:
        """Return what steps take: the dense one in its better layout, then those of the plans."""
        calls = {name: run.call for name, run in self._runs.items()}
        ms = levelled(interleave(calls, self._rounds, settle=True))
        for name, run in self._runs.items():
            if name not in self._work:
                self._work[name] = self._count(run)
        dense_ms = min(ms[name] for name in BASELINES if name in ms)
        if not self._dense:
            self._bf16 = ms[_BF16] / dense_ms if _BF16 in ms else None
            self._dense = self._work[BASELINES[0]][0], min(self._work[n][1] for n in BASELINES)
            for name in (_BF16, max(BASELINES, key=ms.__getitem__)):
                self._runs.pop(name, None)  # the better dense step is what to compare with
        self.bf16_ms = None if self._bf16 is None else self._bf16 * dense_ms
        return [
            (self._plans.dense(), Step(dense_ms, *self._dense)),
            *((plan, Step(ms[n], *self._work[n])) for n, plan in enumerate(self._chosen)),
        ]

    def _ready(self, competitor: str, model: nn.Module) -> StepRun:
        x, y = self._case.example(model)
        return STEP_COMPETITORS[competitor].build(StepProblem(self._case, model, x, y))

    def _count(self, run: StepRun) -> tuple[int, int]:
        """Count the operations of a step, and its memory at the most."""
        counted = flops.count(run.model, run.x)
        return counted.train, peak(run.model, run.call)


def levelled(times: Mapping[Any, Sequence[float]]) -> dict[Any, float]:
    """Return the median time of each call, less what the machine did to all calls of a round.

    Each time is divided by the geometric mean of its round; so a processor that others take half
    of for some rounds does not fall on the calls whose median it meets.

    Args:
        times: of calls that took turns, one entry a round.

    Example:
        >>> {n: round(ms, 6) for n, ms in levelled({"a": [1, 2, 1.1], "b": [2, 4, 2.0]}).items()}
        {'a': 1.048809, 'b': 2.097618}
    """
    rounds = [statistics.geometric_mean(turn) for turn in zip(*times.values(), strict=True)]
    usual = statistics.median(rounds)
    return {
        name: usual * statistics.median(t / mean for t, mean in zip(taken, rounds, strict=True))
        for name, taken in times.items()
    }


def make_sparse(
    model: nn.Module, layers: Sequence[LayerAdvice], masks: Mapping[str, Tensor]
) -> nn.Module:
    """Make the layers of a plan sparse, in place; the others stay dense without a warning."""
    chosen = {layer.name: layer.layout for layer in layers if layer.layout is not None}
    for layout in dict.fromkeys(chosen.values()):
        given = {name: masks[name] for name, its in chosen.items() if its == layout}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "sparsify leaves these layers dense")
            model = sparsify(model, masks=given, layout=layout or "csr")
    return model
