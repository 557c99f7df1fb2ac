"""Who competes in a whole training step: dense torch in its variants, SparseProp, sparsekd."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd._torch import COMPILED_PREFIX
from sparsekd.bench import rivals
from sparsekd.bench.arms import bf16_missing
from sparsekd.bench.cases import ModelCase, dense_ends
from sparsekd.nn import densify, sparse_modules, sparsify
from sparsekd.sparsity import generator_for
from sparsekd.train import CrossEntropy, to_channels_last
from sparsekd.train.step_time import training_step

_optimize: Any = getattr(skd, "optimize", None)
_OBJECTIVE = CrossEntropy()
_VALUES = ("weight", "values", "W_val")  # what packages call a layer's trainable weights


@dataclass(frozen=True)
class Contest:
    """Hold one network at one sparsity: what every arm is given.

    Args:
        case: the network.
        model: with sparse layers; arms work on copies.
        x: a batch of images.
        y: its labels.
    """

    case: ModelCase
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def masks(self) -> dict[str, Tensor]:
        """Mask of every sparse layer by name."""
        return {name: module.topology.mask() for name, module in sparse_modules(self.model)}


def contest(case: ModelCase, sparsity: float) -> Contest:
    """Build a network with uniform sparsity and dense ends, and a batch, the same ones every time.

    Example:
        >>> from sparsekd.bench.cases import ModelCase
        >>> len(contest(ModelCase("resnet20", batch=2), 0.9).masks)
        20
    """
    model = case.build()
    ends = dense_ends(model)
    sparsify(model, sparsity=sparsity, distribution="uniform", skip=ends, init="sparse")
    generator = generator_for(0, case.name)
    x = torch.randn(case.batch, *case.input_shape, generator=generator)
    return Contest(case, model, x, torch.randint(0, 10, (case.batch,), generator=generator))


@torch.no_grad()
def jittered(given: Contest, dtype: torch.dtype) -> Contest:
    """Change every parameter by about a rounding unit of `dtype`.

    How far the results of a step move tells how much of a difference rounding alone may make:
    where a ReLU or a maximum lies near its kink, a rounding unit flips it.
    """
    model = copy.deepcopy(given.model)
    generator = generator_for(0, "jitter")
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + torch.finfo(dtype).eps * noise)
    return replace(given, model=model)


class StepRun(NamedTuple):
    """Hold what an arm made of a contest: a step over a batch, and the model it trains."""

    step: Callable[[Tensor, Tensor], Tensor]
    model: nn.Module
    x: Tensor
    y: Tensor

    def call(self) -> Tensor:
        """Train one step on the contest's batch."""
        return self.step(self.x, self.y)

    def results(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Train one step; return the loss and the gradient of every parameter at the nonzeros."""
        found = {"loss": self.call()}
        for name, parameter in self.model.named_parameters():
            layer, _, kind = name.removeprefix(COMPILED_PREFIX).rpartition(".")
            grad = parameter.grad
            if grad is None:
                continue
            if kind == "weight" and layer in masks:
                grad = grad[masks[layer]]
            found[f"{layer}.{'weight' if kind in _VALUES else kind} gradient"] = grad
        return found


@dataclass(frozen=True)
class StepArm:
    """Describe one competitor.

    Args:
        name: in rows and options.
        label: in tables and figures.
        build: prepares its run.
        missing: says why it cannot run here, None if it can.
        sparse: whether its time depends on the sparsity; a dense arm is timed once for all.
        dtype: in which convolutions multiply.
        least: lowest sparsity that it is tried at.
    """

    name: str
    label: str
    build: Callable[[Contest], StepRun]
    missing: Callable[[], str | None]
    sparse: bool
    dtype: torch.dtype = torch.float32
    least: float = 0.0


def _run(model: nn.Module, x: Tensor, y: Tensor) -> StepRun:
    return StepRun(training_step(model, _OBJECTIVE), model, x, y)


def _dense_model(contest: Contest) -> nn.Module:
    return densify(copy.deepcopy(contest.model))


def _dense_contiguous(contest: Contest) -> StepRun:
    return _run(_dense_model(contest), contest.x, contest.y)


def _channels_last(contest: Contest) -> tuple[nn.Module, Tensor]:
    x = contest.x.to(memory_format=torch.channels_last)
    return to_channels_last(_dense_model(contest)), x


def _dense_channels_last(contest: Contest) -> StepRun:
    return _run(*_channels_last(contest), contest.y)


def _dense_optimized(contest: Contest) -> StepRun:
    model, x = _channels_last(contest)
    return _run(_optimize(model), x, contest.y)


def _dense_compiled(contest: Contest) -> StepRun:
    model, x = _channels_last(contest)
    torch.compiler.reset()  # graphs of the network before this one only take memory
    compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return _run(compiled, x, contest.y)


class _Autocast(nn.Module):
    """Run a model in bfloat16 autocast, the loss behind it in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model  # as torch.compile's wrapper calls it

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self._orig_mod(x).float()


def _dense_bf16(contest: Contest) -> StepRun:
    model, x = _channels_last(contest)
    return _run(_Autocast(model), x, contest.y)


def _sparseprop(contest: Contest) -> StepRun:
    model = rivals.sparseprop_model(copy.deepcopy(contest.model), contest.x)
    return _run(model, contest.x, contest.y)


def _sparsekd(
    layout: torch.memory_format, *, optimized: bool = False
) -> Callable[[Contest], StepRun]:
    def build(contest: Contest) -> StepRun:
        model = copy.deepcopy(contest.model)
        if optimized:
            model = _optimize(model)
        return _run(model, contest.x.contiguous(memory_format=layout), contest.y)

    return build


def _compiler_missing() -> str | None:
    if shutil.which("g++") or shutil.which("clang++"):
        return None
    return "torch.compile needs a C++ compiler on the PATH"


def _optimize_missing() -> str | None:
    return None if _optimize else "this version has no skd.optimize"


def _here() -> str | None:
    return None


_LAST, _CONTIGUOUS = torch.channels_last, torch.contiguous_format
STEP_ARMS = {
    arm.name: arm
    for arm in (
        StepArm("dense_contiguous", "dense, contiguous", _dense_contiguous, _here, False),
        StepArm("dense_channels_last", "dense, channels_last", _dense_channels_last, _here, False),
        StepArm(
            "dense_compiled", "dense, torch.compile", _dense_compiled, _compiler_missing, False
        ),
        StepArm(
            "dense_bf16",
            "dense, bfloat16 autocast",
            _dense_bf16,
            bf16_missing,
            False,
            torch.bfloat16,
        ),
        StepArm("dense_optimized", "dense, optimize()", _dense_optimized, _optimize_missing, False),
        StepArm("sparseprop", "SparseProp", _sparseprop, rivals.sparseprop_absent, True, least=0.8),
        StepArm("sparsekd", "sparsekd, channels_last", _sparsekd(_LAST), _here, True),
        StepArm("sparsekd_contiguous", "sparsekd, contiguous", _sparsekd(_CONTIGUOUS), _here, True),
        StepArm(
            "sparsekd_optimized",
            "sparsekd, optimize()",
            _sparsekd(_LAST, optimized=True),
            _optimize_missing,
            True,
        ),
        StepArm(
            "sparsekd_optimized_contiguous",
            "sparsekd, optimize(), contiguous images",
            _sparsekd(_CONTIGUOUS, optimized=True),
            _optimize_missing,
            True,
        ),
    )
}
