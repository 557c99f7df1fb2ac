"""What is raced at each level: single passes and layers, whole training steps, whole epochs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from sparsekd import data
from sparsekd.bench import gate
from sparsekd.bench.arms import RESULTS, LayerArm, Maps, Problem, problem
from sparsekd.bench.cases import BASELINES, LayerCase, ModelCase
from sparsekd.bench.race import Entry, Key, Ready, pairs, race
from sparsekd.bench.steps import STEP_ARMS, Contest, StepArm, StepRun, contest, jittered
from sparsekd.bench.traffic import step_bytes, step_flops
from sparsekd.data import Split
from sparsekd.diagnose import flops
from sparsekd.errors import DataError
from sparsekd.memory import trim
from sparsekd.nn import densify
from sparsekd.sparsity import generator_for
from sparsekd.train import Row

Results = dict[str, Tensor]
_REFERENCE = "dense_contiguous"
_SLOW_LAYER, _SLOW_STEP = 0.06, 1.5  # seconds; slower arms take fewer turns


def _too_sparse(arm: LayerArm | StepArm, sparsity: float) -> str | None:
    if arm.sparse and sparsity < arm.least:
        return f"raced from {arm.least:.0%} sparsity on"
    return None


@dataclass(frozen=True)
class LayerRace:
    """Race one layer over all arms and sparsities.

    Args:
        case: the layer.
        sparsities: of its weight.
        arms: the competitors, by name.
        rounds: turns of each.
        op: "fprop", "dgrad", "wgrad", or "layer" for forward and backward.
    """

    case: LayerCase
    sparsities: tuple[float, ...]
    arms: Mapping[str, LayerArm]
    rounds: int
    op: str = "layer"

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("layer" if self.op == "layer" else "op", self.case.name, self.op)

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return pairs(self.arms, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them."""
        return race(self._entries(), rounds=self.rounds, slow=_SLOW_LAYER)

    def _entries(self) -> Iterator[Entry]:
        maps = Maps(self.case)
        for number, sparsity in enumerate(self.sparsities):
            given = problem(self.case, sparsity, maps)
            expected = self.arms[_REFERENCE].build(given).results()
            for arm in self.arms.values():
                if arm.sparse or number == 0:
                    yield Entry(
                        self._row(arm, given, sparsity),
                        arm.missing(self.case) or _too_sparse(arm, sparsity),
                        partial(self._ready, arm, given, expected),
                    )

    def _row(self, arm: LayerArm, given: Problem, sparsity: float) -> Row:
        nnz = given.nnz if arm.sparse else given.mask.numel()
        calls = 3 if self.op == "layer" else 1
        return {
            "arm": arm.name,
            "sparsity": sparsity if arm.sparse else None,
            "batch": self.case.batch,
            "nnz": nnz,
            "flops": calls * self.case.flops(nnz),
            "layer": asdict(self.case),
        }

    def _ready(self, arm: LayerArm, given: Problem, expected: Mapping[str, Tensor]) -> Ready:
        run = arm.build(given)
        case = self.case
        terms = dict(
            zip(RESULTS, (case.fan_in, case.outs * case.kernel**2, case.positions), strict=True)
        )
        bounds = {name: gate.tolerance(terms[name], arm.dtype) for name in expected}
        return Ready(run.call, gate.compare(run.results(), expected), bounds)


@dataclass(frozen=True)
class Epoch:
    """Hold the images of a whole epoch: a stated share of a data set's training split."""

    title: str
    split: Split


def small_epoch(images: int = 3072) -> Epoch:
    """Take some images of Fashion-MNIST, or of the digits where its files are missing.

    Args:
        images: how many at most.

    Returns:
        The epoch.

    Example:
        >>> small_epoch(128).split.subset(torch.arange(2)).labels.shape
        torch.Size([2])
    """
    try:
        source, split = "fashion-mnist", data.load("fashion-mnist").train
    except DataError:
        source, split = "digits", data.load("digits").train
    chosen = split.subset(torch.arange(min(images, len(split))))
    return Epoch(f"{len(chosen)} of {len(split)} images of {source}", chosen)


@dataclass(frozen=True)
class StepRace:
    """Race whole training steps of one network, or whole epochs, over all arms and sparsities.

    Args:
        case: the network.
        sparsities: uniform, first convolution and last linear layer dense.
        arms: the competitors, by name.
        rounds: turns of each.
        epoch: images to go through, augmented, in each call; None for a single step.
    """

    case: ModelCase
    sparsities: tuple[float, ...]
    arms: Mapping[str, StepArm]
    rounds: int
    epoch: Epoch | None = None

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        if self.epoch is None:
            return ("step", self.case.title, "step")
        return ("epoch", self.case.title, self.epoch.title)

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return pairs(self.arms, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them."""
        trim()
        return race(self._entries(), rounds=self.rounds, slow=_SLOW_STEP)

    def _entries(self) -> Iterator[Entry]:
        for number, sparsity in enumerate(self.sparsities):
            given = contest(self.case, sparsity)
            right = [_results(name, given) for name in BASELINES]
            arms = [arm for arm in self.arms.values() if arm.sparse or number == 0]
            if number == 0:
                jitter = {arm.dtype: _jitter(given, right[0], arm.dtype) for arm in arms}
            layout = gate.compare(right[1], right[0], gate.overall_error)
            for arm in arms:
                yield Entry(
                    self._row(arm, given, sparsity),
                    arm.missing() or _too_sparse(arm, sparsity),
                    partial(self._ready, arm, given, right, _larger(layout, jitter[arm.dtype])),
                )

    def _row(self, arm: StepArm, given: Contest, sparsity: float) -> Row:
        shape = (self.case.batch, *self.case.input_shape)
        model = copy.deepcopy(given.model).to("meta")  # counts, nothing computed
        if not arm.sparse:
            model = densify(model)
        counted = flops.count(model, shape)
        return {
            "arm": arm.name,
            "sparsity": sparsity if arm.sparse else None,
            "batch": self.case.batch,
            "nnz": counted.nnz,
            "flops": step_flops(counted),
            "bytes": step_bytes(model, shape),
        }

    def _ready(
        self, arm: StepArm, given: Contest, right: Sequence[Results], noise: Mapping[str, float]
    ) -> Ready:
        run = arm.build(given)
        bounds = gate.step_bounds(noise, arm.dtype)
        errors = _nearest(run.results(given.masks), right)
        call = run.call if self.epoch is None else partial(_train, run, self.epoch.split)
        return Ready(call, {name: errors[name] for name in bounds}, bounds)


def _results(arm: str, given: Contest) -> Results:
    return STEP_ARMS[arm].build(given).results(given.masks)


def _nearest(got: Results, right: Sequence[Results]) -> dict[str, float]:
    """Compare with dense torch in the layout that an arm's results are closest to.

    Torch's BatchNorm rounds differently in the two, which flips ReLUs.
    """
    errors = [gate.compare(got, expected, gate.overall_error) for expected in right]
    return {name: min(error[name] for error in errors) for name in errors[0]}


def _jitter(given: Contest, expected: Results, dtype: torch.dtype) -> dict[str, float]:
    """Measure what rounding alone does, by parameters that differ by a rounding unit."""
    shaken = _results(_REFERENCE, jittered(given, dtype))
    return gate.compare(shaken, expected, gate.overall_error)


def _larger(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: max(a[name], b[name]) for name in a}


def _train(run: StepRun, split: Split) -> None:
    """Train an epoch through the loader, in the layout that the arm's model wants."""
    channels_last = run.x.is_contiguous(memory_format=torch.channels_last)
    batches = split.batches(
        len(run.y),
        shuffle=True,
        augment=True,
        generator=generator_for(0, "epoch"),
        drop_last=True,
        channels_last=channels_last,
    )
    for x, y in batches:
        run.step(x, y)
