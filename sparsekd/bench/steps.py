"""Races over whole training steps: dense torch in its variants and sparsekd."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekd._torch import COMPILED_PREFIX
from sparsekd.bench import gate
from sparsekd.bench.cases import BASELINES, REFERENCE, AnyCase, ModelCase, dense_ends
from sparsekd.bench.layers import bf16_missing
from sparsekd.bench.race import Competitor, Race, Ready, by_name
from sparsekd.diagnose import flops
from sparsekd.memory import trim
from sparsekd.nn import densify, optimize, sparse_modules, sparsify
from sparsekd.sparsity import generator_for, outputs_first
from sparsekd.train import Row, to_channels_last
from sparsekd.train.step_time import training_step

Tensors = dict[str, Tensor]
MakeSparse = Callable[[nn.Module, float], nn.Module]
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_VALUES = ("weight", "values", "W_val")  # what packages call a layer's trainable weights


@dataclass(frozen=True)
class StepProblem:
    """One network at one sparsity: what every competitor is given.

    Args:
        case: the network.
        model: with sparse layers; competitors work on copies.
        x: a batch of images, or what else can be laid out by `contiguous`.
        y: its labels.
    """

    case: AnyCase
    model: nn.Module
    x: Any
    y: Tensor

    @property
    def masks(self) -> dict[str, Tensor]:
        """Mask of every sparse layer by name."""
        return {name: module.topology.mask() for name, module in sparse_modules(self.model)}


def step_problem(
    case: AnyCase, sparsity: float, make_sparse: MakeSparse | None = None
) -> StepProblem:
    """Build a sparse network and a batch, the same ones every time.

    Args:
        case: the network.
        sparsity: of its sparse layers.
        make_sparse: returns the network made sparse; by default uniformly, with dense ends.

    Example:
        >>> from sparsekd.bench.cases import ModelCase
        >>> len(step_problem(ModelCase("resnet20", batch=2), 0.9).masks)
        20
    """
    model = case.build()
    x, y = case.example(model)
    return StepProblem(case, (make_sparse or _uniform)(model.train(), sparsity), x, y)


def _uniform(model: nn.Module, sparsity: float) -> nn.Module:
    ends = dense_ends(model)
    return sparsify(model, sparsity=sparsity, distribution="uniform", skip=ends, init="sparse")


@torch.no_grad()
def jittered_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model and change its parameters by about 16 rounding units, or one below float32.

    How far the results of a step move tells how much of a difference rounding alone may make:
    where a ReLU or a maximum lies near its kink, rounding flips it, and a single flip can move a
    gradient by 1 %. By a whole step the error of float32 has grown to several units; shifted by
    one, a network in which no kink is that near would be granted no flip at all.
    """
    model = copy.deepcopy(model)
    generator = generator_for(0, "jitter")
    size = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)
    for parameter in model.parameters():
        parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator))
    return model


def jittered(problem: StepProblem, dtype: torch.dtype) -> StepProblem:
    """Return a problem with its model's parameters changed by rounding, see `jittered_model`."""
    return replace(problem, model=jittered_model(problem.model, dtype))


class StepRun(NamedTuple):
    """A competitor that is ready to train: a step over a batch, and the model it trains."""

    step: Callable[[Any, Tensor], Tensor]
    model: nn.Module
    x: Any
    y: Tensor

    def call(self) -> Tensor:
        """Train one step on the problem's batch."""
        return self.step(self.x, self.y)

    def results(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Train one step; return the loss and the gradient of every parameter at the nonzeros."""
        with _without_chance(self.model):
            found = {"loss": self.call()}
        for name, parameter in self.model.named_parameters():
            layer, _, kind = name.replace(COMPILED_PREFIX, "").rpartition(".")
            grad = parameter.grad
            if grad is None:
                continue
            if kind == "weight" and layer in masks:
                module = self.model.get_submodule(name.rpartition(".")[0])
                grad = outputs_first(module, grad)[masks[layer]]
            found[f"{layer}.{'weight' if kind in _VALUES else kind} gradient"] = grad
        return found


StepCompetitor = Competitor[StepProblem, StepRun]


@contextmanager
def _without_chance(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and let functions that draw numbers draw the same every time."""
    active = [module for module in model.modules() if isinstance(module, _DROPOUT)]
    flags = [module.training for module in active]
    try:
        for module in active:
            module.training = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for module, flag in zip(active, flags, strict=True):
            module.training = flag


class _Autocast(nn.Module):
    """A model in bfloat16 autocast, the loss behind it in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model  # as torch.compile's wrapper calls it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = self._orig_mod(*args, **kwargs)
        return output.float() if isinstance(output, Tensor) else output


def _compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()  # graphs of the network before this one only take memory
    return torch.compile(model)  # type: ignore[return-value]


def train(model: nn.Module, problem: StepProblem, layout: torch.memory_format) -> StepRun:
    """Prepare the training steps of a model, with images in a memory format."""
    x = problem.x.contiguous(memory_format=layout)
    model = problem.case.takes_batches(model)
    return StepRun(training_step(model, problem.case.objective), model, x, problem.y)


def _dense(
    layout: torch.memory_format, wrap: Callable[[nn.Module], nn.Module] | None = None
) -> Callable[[StepProblem], StepRun]:
    def build(problem: StepProblem) -> StepRun:
        model = densify(copy.deepcopy(problem.model))
        if layout == _LAST:
            model = to_channels_last(model)
        return train(wrap(model) if wrap else model, problem, layout)

    return build


def _sparsekd(
    layout: torch.memory_format, *, optimized: bool = False
) -> Callable[[StepProblem], StepRun]:
    def build(problem: StepProblem) -> StepRun:
        model = copy.deepcopy(problem.model)
        return train(optimize(model) if optimized else model, problem, layout)

    return build


def _compiler_missing(case: ModelCase) -> str | None:
    if shutil.which("g++") or shutil.which("clang++"):
        return None
    return "torch.compile needs a C++ compiler on the PATH"


SHOWCASE = "resnet18"
"""The network that competitors are timed on of which one network shows enough."""

_LAST, _CONTIGUOUS, _BF16 = torch.channels_last, torch.contiguous_format, torch.bfloat16
DENSE_STEPS = by_name(
    StepCompetitor("dense_contiguous", "dense, contiguous", _dense(_CONTIGUOUS)),
    StepCompetitor("dense_channels_last", "dense, channels_last", _dense(_LAST)),
    StepCompetitor(
        "dense_compiled", "dense, torch.compile", _dense(_LAST, _compiled), _compiler_missing
    ),
    StepCompetitor(
        "dense_bf16", "dense, bfloat16 autocast", _dense(_LAST, _Autocast), bf16_missing,
        dtype=_BF16,
    ),
    StepCompetitor(
        "dense_optimized", "dense, optimize()", _dense(_LAST, optimize), network=SHOWCASE
    ),
)  # fmt: skip
OUR_STEPS = by_name(
    StepCompetitor("sparsekd", "sparsekd, channels_last", _sparsekd(_LAST), sparse=True),
    StepCompetitor(
        "sparsekd_contiguous", "sparsekd, contiguous", _sparsekd(_CONTIGUOUS), sparse=True,
        network=SHOWCASE,
    ),
    StepCompetitor(
        "sparsekd_optimized", "sparsekd, optimize()", _sparsekd(_LAST, optimized=True), sparse=True
    ),
    StepCompetitor(
        "sparsekd_optimized_contiguous", "sparsekd, optimize(), contiguous images",
        _sparsekd(_CONTIGUOUS, optimized=True), sparse=True, network=SHOWCASE,
    ),
)  # fmt: skip
STEP_COMPETITORS = {**DENSE_STEPS, **OUR_STEPS}


# A problem, what dense torch computes in each layout, and by dtype how far rounding moves that.
_Given = tuple[StepProblem, list[Tensors], dict[torch.dtype, dict[str, float]]]


@dataclass(frozen=True)
class StepRace(Race):
    """A race over whole training steps of one network, its first and last layer dense."""

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("step", self.case.title, "step")

    def measure(self) -> list[Row]:
        """Measure the rows."""
        trim()
        return super().measure()

    def problem(self, sparsity: float) -> StepProblem:
        """Build what all competitors are given."""
        return step_problem(self.case, sparsity)

    def _problems(self) -> Iterator[_Given]:
        jitter: dict[torch.dtype, dict[str, float]] = {}
        for sparsity in self.sparsities:
            problem = self.problem(sparsity)
            right = [_results(name, problem) for name in BASELINES]
            jitter = jitter or {
                dtype: _errors(_results(REFERENCE, jittered(problem, dtype)), right[0])
                for dtype in {competitor.dtype for competitor in self.competitors.values()}
            }
            layout = _errors(right[1], right[0])
            noise = {
                dtype: {name: max(error, layout[name]) for name, error in errors.items()}
                for dtype, errors in jitter.items()
            }
            yield problem, right, noise

    def _work(self, competitor: StepCompetitor, given: _Given) -> Row:
        model = copy.deepcopy(given[0].model).to("meta")  # nothing is computed
        return self.count(model if competitor.sparse else densify(model))

    def count(self, model: nn.Module) -> Row:
        """Count the work of a step with a model on the meta device."""
        counted = flops.count(model, (self.case.batch, *self.case.input_shape))
        return {"nnz": counted.nnz, "flops": step_flops(counted)}

    def timed(self, run: StepRun) -> Callable[[], object]:
        """Return the call that is timed."""
        return run.call

    def facts(self, run: StepRun) -> Row:
        """Return what rows say about a competitor besides its time."""
        return {}

    def _ready(self, competitor: StepCompetitor, given: _Given) -> Ready:
        problem, right, noise = given
        run = competitor.build(problem)
        got = run.results(problem.masks)
        bounds = gate.step_bounds(noise[competitor.dtype], competitor.dtype)
        # The closer layout counts: BatchNorm rounds differently in the two, which flips ReLUs.
        errors = [_errors(got, expected) for expected in right]
        least = {name: min(error[name] for error in errors) for name in bounds}
        return Ready(self.timed(run), least, bounds, self.facts(run))


def step_flops(counted: flops.FlopCount) -> int:
    """Count the operations of a step: those of `train`, but no input gradient of the first layer.

    Example:
        >>> step_flops(flops.count(nn.Linear(8, 4), (1, 8)))
        128
    """
    return counted.train - counted.layers[0].flops


def _results(name: str, problem: StepProblem) -> Tensors:
    return DENSE_STEPS[name].build(problem).results(problem.masks)


def _errors(got: Tensors, expected: Tensors) -> dict[str, float]:
    return gate.compare(got, expected, gate.overall_error)
