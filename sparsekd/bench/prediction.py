"""Prediction of a model's training step when some of its layers are sparse.

Every layer that can be sparse is timed dense and, in each layout, on the sparse kernels at several
densities (`explain`): a line through these says what it takes at any number of nonzeros. A `Plan`
says which layers are sparse, and adds up what all of them take. What surrounds the layers, and how
far they run faster inside an optimized network than by themselves, comes from whole steps that were
measured with other plans.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sparsekd.bench.given import GivenCase
from sparsekd.diagnose import coverage, explain, flops
from sparsekd.diagnose.explain import LayerReport
from sparsekd.errors import UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.nn import sparse_modules, sparsify
from sparsekd.sparsity import allocate, layout_masks, outputs_first, random_masks

AIMS = ("time", "flops", "memory")
_WITHIN = 1.001  # of an aim: masks have whole weights
_TIMED = 0.9  # every layer alike, so that none is timed full of weights that kernels see as tiles
_CLEAR = 0.97  # of the dense time: what sparse must take to be called faster
# Words of a weight during training: value, gradient, momentum; beside each nonzero its index.
_DENSE_WORDS, _SPARSE_WORDS = 3, 4


@dataclass(frozen=True)
class Step:
    """What a training step takes.

    Args:
        ms: time.
        flops: floating-point operations of forward and backward, the latter counted as two forward.
        bytes: parameters, indices, gradients, momentum and all tensors of the step, at the most
            that there are at a time.
    """

    ms: float
    flops: int
    bytes: float

    def of(self, aim: str) -> float:
        """Return the number that an aim, "time", "flops" or "memory", is about."""
        return {"time": self.ms, "flops": self.flops, "memory": self.bytes}[aim]


@dataclass(frozen=True)
class Aim:
    """What advice is for.

    Args:
        kind: "time", "flops" or "memory".
        share: of the dense step that the sparse one may take; None without a goal.
    """

    kind: str
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Aim:
        """Read "time", or "time=0.5" for half the time of the dense step.

        Raises:
            UnsupportedError: the text is none of these; the message says what is.

        Example:
            >>> Aim.parse("flops=0.25")
            Aim(kind='flops', share=0.25)
        """
        kind, equals, number = (part.strip() for part in text.partition("="))
        if kind not in AIMS:
            raise UnsupportedError(
                f"aim: expected one of {', '.join(AIMS)}, with a share of the dense step behind it "
                f"as time=0.5 or without, got {text!r}"
            )
        if not equals:
            return cls(kind)
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not 0 < share < 1:
            raise UnsupportedError(
                f"aim: expected a share of the dense step between 0 and 1, as {kind}=0.5, got "
                f"{text!r}"
            )
        return cls(kind, share)

    def met(self, step: Step, dense: Step) -> bool:
        """Return whether a step reaches the goal; without one every step does."""
        return self.share is None or step.of(self.kind) <= _WITHIN * self.share * dense.of(
            self.kind
        )

    def __str__(self) -> str:
        return self.kind if self.share is None else f"{self.kind}={self.share:g}"


@dataclass(frozen=True)
class LayerAdvice:
    """What to do with a layer.

    Args:
        name: of the module in the model.
        shape: of its weight.
        layout: of its mask; None if it stays dense.
        density: share of the weight that would be stored if it was sparse.
        sparse_ms: of forward and backward in the best layout.
        dense_ms: likewise dense.
    """

    name: str
    shape: tuple[int, ...]
    layout: str | None
    density: float
    sparse_ms: float
    dense_ms: float

    @property
    def ms(self) -> float:
        """Time of forward and backward as advised."""
        return self.sparse_ms if self.layout else self.dense_ms

    @property
    def nnz(self) -> int:
        """Weights stored as advised."""
        return round(math.prod(self.shape) * (self.density if self.layout else 1.0))

    @property
    def bytes(self) -> int:
        """Memory of weight, gradient and momentum as advised, and of the indices, in float32."""
        if self.layout is None:
            return 4 * _DENSE_WORDS * self.nnz
        return 4 * (_SPARSE_WORDS * self.nnz + self.shape[0] + 1)


@dataclass(frozen=True)
class Plan:
    """Which layers of a model are sparse when all that can be were asked for a sparsity."""

    sparsity: float
    layers: tuple[LayerAdvice, ...]

    @property
    def ms(self) -> float:
        """Time of forward and backward of all layers."""
        return sum(layer.ms for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Memory of all layers' weights with what training keeps beside them."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def nnz(self) -> dict[str, int]:
        """Weights stored, by layer."""
        return {layer.name: layer.nnz for layer in self.layers}


@dataclass(frozen=True)
class _Candidate:
    """A layout, and the times of every layer in it."""

    layout: Layout
    layers: Mapping[str, LayerReport]

    def fits(self, sparsity: float) -> bool:
        """Return whether masks of this layout have that sparsity."""
        fixed = self.layout.fixed_density
        return fixed is None or math.isclose(1 - fixed, sparsity)

    def sparse_ms(self, name: str, nnz: int) -> float:
        """Return what a layer takes, each pass dense where that is faster, as the dispatcher does.

        Without sparse kernels it is the time of what runs instead.
        """
        density = nnz / max(math.prod(self.layers[name].shape), 1)
        passes = self.layers[name].passes.values()
        if any(one.sparse_ms is None for one in passes):
            return sum(one.ms for one in passes)
        return sum(min(one.sparse_ms_at(density), one.dense_ms) for one in passes)


@dataclass
class Planner:
    """Makes plans for a model and an aim, and predicts their steps.

    Args:
        aim: "time", "flops" or "memory": by which a layer is sparse or stays dense.
        distribution: of the nonzeros over the layers.
        candidates: layouts with the times of all layers.
        shapes: of the weights of all layers that are made sparse, called or not.
        counted: operations of the dense model.
        left: parameters that are not made sparse, with their share of all.
        measured: plans whose steps were measured; the first is that of the dense model.
    """

    aim: str
    distribution: str
    candidates: Sequence[_Candidate]
    shapes: Mapping[str, tuple[int, ...]]
    counted: flops.FlopCount
    left: Mapping[str, float]
    measured: list[tuple[Plan, Step]] = field(default_factory=list)

    def fits(self, sparsity: float) -> bool:
        """Return whether a layout allows this sparsity."""
        return any(candidate.fits(sparsity) for candidate in self.candidates)

    @property
    def fixed(self) -> list[float]:
        """The only sparsities there are, if every layout prescribes its own."""
        densities = [candidate.layout.fixed_density for candidate in self.candidates]
        return [] if None in densities else sorted({1 - (d or 0.0) for d in densities})

    def dense(self) -> Plan:
        """Return the plan that leaves every layer dense."""
        return Plan(0.0, tuple(self._layer(name, {}) for name in self._names))

    def plan(self, sparsity: float) -> Plan:
        """Return the best plan at a sparsity: each layer in its fastest layout, or dense."""
        nnz = {
            candidate.layout: self._nnz(candidate.layout, sparsity)
            for candidate in self.candidates
            if candidate.fits(sparsity)
        }
        return Plan(sparsity, tuple(self._layer(name, nnz) for name in self._names))

    def masks(self, plan: Plan, model: nn.Module) -> dict[str, Tensor]:
        """Draw the masks of a plan's sparse layers, in the shapes of a dense model's weights."""
        masks: dict[str, Tensor] = {}
        for candidate in self.candidates:
            layout = str(candidate.layout)
            names = [layer.name for layer in plan.layers if layer.layout == layout]
            if names:
                drawn = self._drawn(candidate.layout, plan.sparsity)
                masks |= {n: outputs_first(model.get_submodule(n), drawn[n]) for n in names}
        return masks

    def predict(self, plan: Plan) -> Step:
        """Predict the step of a plan from those that were measured.

        Time changes with the time of the layers, memory with that of their weights; how much of the
        change arrives in the step is what it was between the sparse plans measured.
        """
        return Step(
            _along([(one.ms, step.ms) for one, step in self.measured], plan.ms),
            self.counted.at(plan.nnz).train,
            _along([(one.bytes, step.bytes) for one, step in self.measured], plan.bytes),
        )

    @property
    def _names(self) -> list[str]:
        return list(self.candidates[0].layers)

    def _nnz(self, layout: Layout, sparsity: float) -> dict[str, int]:
        if layout.unstructured:
            return allocate(self.shapes, sparsity, self.distribution)
        return {name: int(mask.sum()) for name, mask in self._drawn(layout, sparsity).items()}

    def _drawn(self, layout: Layout, sparsity: float) -> dict[str, Tensor]:
        """Draw the masks that `sparsify` would draw."""
        if layout.unstructured:
            return random_masks(self.shapes, self._nnz(layout, sparsity))
        return layout_masks(self.shapes, sparsity, self.distribution, layout)

    def _layer(self, name: str, nnz: Mapping[Layout, Mapping[str, int]]) -> LayerAdvice:
        """Advise on a layer; without numbers of nonzeros it stays dense."""
        shape = self.candidates[0].layers[name].shape
        dense_ms = min(candidate.layers[name].dense_ms for candidate in self.candidates)
        numel = math.prod(shape)
        times = {
            candidate.layout: candidate.sparse_ms(name, nnz[candidate.layout][name])
            for candidate in self.candidates
            if candidate.layout in nnz
        }
        if not times:
            return LayerAdvice(name, shape, None, 1.0, math.inf, dense_ms)
        best = min(times, key=times.__getitem__)
        density = nnz[best][name] / max(numel, 1)
        gains = {
            "time": times[best] < _CLEAR * dense_ms,
            "flops": True,
            "memory": _SPARSE_WORDS * density < _DENSE_WORDS,
        }
        layout = str(best) if density < 1 and gains[self.aim] else None
        return LayerAdvice(name, shape, layout, density, times[best], dense_ms)


def planner(
    case: GivenCase,
    aim: str,
    layouts: Sequence[Layout],
    distribution: str,
    skip: tuple[str, ...],
) -> Planner:
    """Time the layers of a model in each layout.

    Raises:
        ValueError: a pattern of `skip` matches no layer, or there is nothing to make sparse.
    """
    candidates: list[_Candidate] = []
    shapes: dict[str, tuple[int, ...]] = {}
    left: dict[str, float] = {}
    inputs = case.inputs.contiguous(torch.channels_last)
    for layout in layouts:
        fixed = layout.fixed_density
        with warnings.catch_warnings():  # these masks are no advice, and what is left is told below
            warnings.simplefilter("ignore")
            sparsity = _TIMED if fixed is None else 1 - fixed
            model = sparsify(case.build(), sparsity, "uniform", skip=skip, layout=layout)
        shapes = {name: tuple(module.weight_shape) for name, module in sparse_modules(model)}
        left = {part.name: part.share for part in coverage(model).dense}
        found = explain(model, args=inputs.args, kwargs=dict(inputs.kwargs))
        candidates.append(_Candidate(layout, {layer.name: layer for layer in found.layers}))
    counted = flops.count(case.build(), args=case.inputs.args, kwargs=dict(case.inputs.kwargs))
    return Planner(aim, distribution, candidates, shapes, counted, left)


def _along(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return y at x: between two points on their line, beyond all of them along the first slope.

    The first point is that of the dense model, which does not lie on the line of the sparse ones:
    it is used only where there are no two of these, with slope 1. The slope beyond the points is
    never negative: the sum of more work is not less.

    Example:
        >>> _along([(9.0, 20.0), (2.0, 10.0), (4.0, 11.0)], 6.0)
        12.0
        >>> _along([(9.0, 20.0)], 6.0)
        17.0
    """
    dense, *sparse = points
    if len(sparse) < 2:
        near, y = (sparse or [dense])[0]
        return y + x - near
    (x0, y0), (x1, y1) = sparse[:2]
    slope = max((y1 - y0) / (x1 - x0), 0.0) if x0 != x1 else 1.0
    sparse.sort()
    (low, y_low), (high, y_high) = sparse[0], sparse[-1]
    if x <= low:
        return y_low + slope * (x - low)
    if x >= high:
        return y_high + slope * (x - high)
    return float(np.interp(x, [one for one, _ in sparse], [its for _, its in sparse]))
