"""Races over training steps of a user's own model, on inputs of any kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.bench.steps import StepCompetitor, StepProblem, StepRace, StepRun, step_problem
from sparsekd.diagnose import flops
from sparsekd.diagnose.inputs import tensors_in
from sparsekd.nn import densify, sparsify
from sparsekd.nn.stored import parameter_count
from sparsekd.train import Row
from sparsekd.train.objective import Objective
from sparsekd.train.step_memory import held, peak

LEVEL = "model"


@dataclass(frozen=True)
class Arguments:
    """What a model is called with.

    Args:
        args: by position.
        kwargs: by name.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def contiguous(self, memory_format: torch.memory_format) -> Arguments:
        """Return the same with every tensor of four dimensions in a memory format."""

        def laid_out(value: Any) -> Any:
            maps = isinstance(value, Tensor) and value.ndim == 4
            return value.contiguous(memory_format=memory_format) if maps else value

        named = {name: laid_out(value) for name, value in self.kwargs.items()}
        return Arguments(tuple(map(laid_out, self.args)), named)


class _Called(nn.Module):
    """A model that is called with `Arguments`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model  # as torch.compile's wrapper calls it

    def forward(self, x: Arguments) -> Any:
        return self._orig_mod(*x.args, **x.kwargs)


@dataclass(frozen=True)
class GivenCase:
    """A user's model, whose training step on example inputs is timed.

    Args:
        name: of the model.
        model: dense; copies of it are trained.
        inputs: what it is called with.
        loss: takes the output and returns the loss; by default the output's own `loss`, or the mean
            square of everything in the output that has a gradient.

    Example:
        >>> case = GivenCase("mine", nn.Linear(4, 2), Arguments((torch.ones(8, 4),), {}))
        >>> case.title, case.batch
        ('mine 8x4, 10 parameters', 8)
    """

    name: str
    model: nn.Module = field(repr=False)
    inputs: Arguments = field(repr=False)
    loss: Callable[[Any], Tensor] | None = None

    @property
    def title(self) -> str:
        """What rows and tables call it; models of other sizes have another title."""
        shapes = ["x".join(map(str, tensor.shape)) for tensor in self._tensors()]
        return f"{self.name} {', '.join(shapes)}, {parameter_count(self.model):,} parameters"

    @property
    def batch(self) -> int:
        """Size of the first dimension of the first input."""
        return next((len(tensor) for tensor in self._tensors() if tensor.ndim), 1)

    def _tensors(self) -> list[Tensor]:
        return list(tensors_in([self.inputs.args, dict(self.inputs.kwargs)]))

    @property
    def objective(self) -> Objective:
        """The loss that a step minimises."""
        return lambda output, x, y, epoch: (self.loss or mean_square)(output)

    def build(self) -> nn.Module:
        """Copy the dense network."""
        return copy.deepcopy(self.model)

    def example(self, model: nn.Module) -> tuple[Arguments, Tensor]:
        """Return the inputs; there are no labels."""
        return self.inputs, torch.empty(0)

    def takes_batches(self, model: nn.Module) -> nn.Module:
        """Return a module that is called with `Arguments`."""
        return _Called(model)


def mean_square(output: Any) -> Tensor:
    """Return the output's own loss, or the mean square of what in it has a gradient.

    Args:
        output: of a model: tensors in tuples, lists, dictionaries and dataclasses.

    Example:
        >>> mean_square({"a": torch.tensor([1.0, 3.0], requires_grad=True)}).item()
        5.0
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    parts = [t.float().square().mean() for t in tensors_in(output) if t.requires_grad]
    return torch.stack(parts).sum()


@dataclass(frozen=True)
class GivenRace(StepRace):
    """A race over training steps of a user's model at one sparsity.

    Args:
        how: arguments of `sparsify` besides the sparsity; `layout` is part of the name.
    """

    how: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return (LEVEL, self.case.title, f"step {self.how.get('layout', 'csr')}")

    def problem(self, sparsity: float) -> StepProblem:
        """Build what all competitors are given."""
        return step_problem(self.case, sparsity, partial(sparsify, **self.how))

    def _work(self, competitor: StepCompetitor, given: Any) -> Row:
        model = copy.deepcopy(given[0].model)  # on the CPU: not every model runs on meta tensors
        return self.count(model if competitor.sparse else densify(model))

    def count(self, model: nn.Module) -> Row:
        """Count the work of a step."""
        inputs = self.case.inputs
        counted = flops.count(model, args=inputs.args, kwargs=dict(inputs.kwargs))
        return {"nnz": counted.nnz, "flops": counted.train}

    def facts(self, run: StepRun) -> Row:
        """Return the memory of a step: what lives between steps, and the peak of all tensors."""
        kept = held(run.model)
        live = peak(run.model, run.call)
        return {"held_mib": round(kept / 2**20, 4), "live_mib": round(live / 2**20, 4)}
