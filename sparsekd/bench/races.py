"""What is raced: layers and whole training steps, over all competitors and sparsities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparsekd.bench import gate
from sparsekd.bench.cases import BASELINES, LayerCase, ModelCase
from sparsekd.bench.competitor import Key, pairs
from sparsekd.bench.layers import RESULTS, LayerCompetitor, LayerProblem, Maps, layer_problem
from sparsekd.bench.race import Entry, Ready, race
from sparsekd.bench.steps import (
    DENSE_STEPS,
    StepCompetitor,
    StepProblem,
    StepRun,
    jittered,
    step_problem,
)
from sparsekd.diagnose import flops
from sparsekd.memory import trim
from sparsekd.nn import densify
from sparsekd.train import Row

Tensors = dict[str, Tensor]
_REFERENCE = "dense_contiguous"
_SLOW_LAYER, _SLOW_STEP = 0.06, 1.5  # seconds; slower competitors take fewer turns


@dataclass(frozen=True)
class LayerRace:
    """A race over one layer.

    Args:
        case: the layer.
        sparsities: of its weight.
        competitors: by name.
        rounds: turns of each.
        op: "layer" for forward and backward, or the one pass that the competitors compute.
    """

    case: LayerCase
    sparsities: tuple[float, ...]
    competitors: Mapping[str, LayerCompetitor]
    rounds: int
    op: str = "layer"

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("layer" if self.op == "layer" else "op", self.case.name, self.op)

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return pairs(self.competitors, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them."""
        return race(self._entries(), rounds=self.rounds, slow=_SLOW_LAYER)

    def _entries(self) -> Iterator[Entry]:
        maps = Maps(self.case)
        for number, sparsity in enumerate(self.sparsities):
            problem = layer_problem(self.case, sparsity, maps)
            expected = self.competitors[_REFERENCE].build(problem).results()
            for competitor in self.competitors.values():
                if competitor.sparse or number == 0:
                    yield Entry(
                        self._row(competitor, problem, sparsity),
                        competitor.obstacle(self.case, sparsity),
                        partial(self._ready, competitor, problem, expected),
                    )

    def _row(self, competitor: LayerCompetitor, problem: LayerProblem, sparsity: float) -> Row:
        nnz = problem.nnz if competitor.sparse else problem.mask.numel()
        passes = 3 if self.op == "layer" else 1
        return {
            "arm": competitor.name,
            "sparsity": sparsity if competitor.sparse else None,
            "batch": self.case.batch,
            "nnz": nnz,
            "flops": passes * self.case.flops(nnz),
            "layer": asdict(self.case),
        }

    def _ready(
        self, competitor: LayerCompetitor, problem: LayerProblem, expected: Mapping[str, Tensor]
    ) -> Ready:
        run = competitor.build(problem)
        bounds = layer_bounds(self.case, competitor.dtype)
        return Ready(run.call, gate.compare(run.results(), expected), bounds)


def layer_bounds(case: LayerCase, dtype: torch.dtype) -> dict[str, float]:
    """Return how far each result of a layer may be off, by the terms of its sums."""
    terms = (case.fan_in, case.outs * case.kernel**2, case.positions)
    return {name: gate.tolerance(n, dtype) for name, n in zip(RESULTS, terms, strict=True)}


@dataclass(frozen=True)
class StepRace:
    """A race over whole training steps of one network.

    Args:
        case: the network.
        sparsities: uniform, first convolution and last linear layer dense.
        competitors: by name.
        rounds: turns of each.
    """

    case: ModelCase
    sparsities: tuple[float, ...]
    competitors: Mapping[str, StepCompetitor]
    rounds: int

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("step", self.case.title, "step")

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return pairs(self.competitors, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them."""
        trim()
        return race(self._entries(), rounds=self.rounds, slow=_SLOW_STEP)

    def work(self, model: nn.Module) -> Row:
        """Return the fields of a row about the work of a step.

        Args:
            model: on the meta device: nothing is computed.
        """
        counted = flops.count(model, (self.case.batch, *self.case.input_shape))
        return {"nnz": counted.nnz, "flops": step_flops(counted)}

    def timed(self, run: StepRun) -> Callable[[], object]:
        """Return the call that is timed."""
        return run.call

    def _entries(self) -> Iterator[Entry]:
        for number, sparsity in enumerate(self.sparsities):
            problem = step_problem(self.case, sparsity)
            right = [_results(name, problem) for name in BASELINES]
            field = [entry for entry in self.competitors.values() if entry.sparse or number == 0]
            if number == 0:
                jitter = {one.dtype: _jitter(problem, right[0], one.dtype) for one in field}
            layout = gate.compare(right[1], right[0], gate.overall_error)
            for competitor in field:
                noise = _larger(layout, jitter[competitor.dtype])
                yield Entry(
                    self._row(competitor, problem, sparsity),
                    competitor.obstacle(self.case, sparsity),
                    partial(self._ready, competitor, problem, right, noise),
                )

    def _row(self, competitor: StepCompetitor, problem: StepProblem, sparsity: float) -> Row:
        model = copy.deepcopy(problem.model).to("meta")
        return {
            "arm": competitor.name,
            "sparsity": sparsity if competitor.sparse else None,
            "batch": self.case.batch,
            **self.work(model if competitor.sparse else densify(model)),
        }

    def _ready(
        self,
        competitor: StepCompetitor,
        problem: StepProblem,
        right: Sequence[Tensors],
        noise: Mapping[str, float],
    ) -> Ready:
        run = competitor.build(problem)
        bounds = gate.step_bounds(noise, competitor.dtype)
        errors = _nearest(run.results(problem.masks), right)
        return Ready(self.timed(run), {name: errors[name] for name in bounds}, bounds)


def step_flops(counted: flops.FlopCount) -> int:
    """Count the operations of a training step at the stored weights.

    No step computes the input gradient of the first layer, so unlike `FlopCount.train` this leaves
    it out.

    Example:
        >>> step_flops(flops.count(nn.Linear(8, 4), (1, 8)))
        128
    """
    return counted.train - counted.layers[0].flops


def _results(name: str, problem: StepProblem) -> Tensors:
    return DENSE_STEPS[name].build(problem).results(problem.masks)


def _nearest(got: Tensors, right: Sequence[Tensors]) -> dict[str, float]:
    """Compare with dense torch in the memory format that the results are closest to.

    Torch's BatchNorm rounds differently in the two, which flips ReLUs.
    """
    errors = [gate.compare(got, expected, gate.overall_error) for expected in right]
    return {name: min(error[name] for error in errors) for name in errors[0]}


def _jitter(problem: StepProblem, expected: Tensors, dtype: torch.dtype) -> dict[str, float]:
    """Measure what rounding alone does, by parameters that differ by a rounding unit."""
    shaken = _results(_REFERENCE, jittered(problem, dtype))
    return gate.compare(shaken, expected, gate.overall_error)


def _larger(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: max(a[name], b[name]) for name in a}
