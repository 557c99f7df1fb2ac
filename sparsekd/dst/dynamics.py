"""When a topology changes, and by how much: hyper-parameters, and the schedules made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sparsekd.sparsity import Cosine, Schedule

UpdateSchedule = Callable[[int], "float | None"]
"""Iteration, counted from 1 -> drop fraction of its update, or None where there is none."""


def never(iteration: int) -> None:
    """Update at no iteration."""


def check_positive(**numbers: int) -> None:
    """Check that all numbers are positive integers; ValueError names the argument."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_fraction(**numbers: float) -> None:
    """Check that all numbers are in [0, 1]; ValueError names the argument."""
    for name, value in numbers.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected 0 to 1, got {value!r}")


@dataclass(frozen=True)
class Periodic:
    """A schedule of updates every `every` iterations, before iteration `until`.

    Args:
        fraction: iteration -> drop fraction.
        every: iterations from one update to the next.
        until: the first iteration without updates.

    Raises:
        ValueError: `every` or `until` is not a positive integer.

    Example:
        >>> from sparsekd.sparsity import Constant
        >>> schedule = Periodic(Constant(0.5), every=10, until=30)
        >>> [t for t in range(1, 40) if schedule(t) is not None]
        [10, 20]
    """

    fraction: Schedule
    every: int
    until: int

    def __post_init__(self) -> None:
        check_positive(every=self.every, until=self.until)

    def __call__(self, iteration: int) -> float | None:
        due = iteration % self.every == 0 and iteration < self.until
        return self.fraction(iteration) if due else None


def cosine(drop_fraction: float, every: int, until: int) -> Periodic:
    """Return the schedule of RigL: the fraction falls from `drop_fraction` to 0 along a cosine.

    Args:
        drop_fraction: the fraction at iteration 0, in [0, 1].
        every: iterations from one update to the next.
        until: the first iteration that updates no more, usually 75 % of all iterations.

    Raises:
        ValueError: an argument is out of range.

    Source: Rigging the Lottery (arXiv 1911.11134), section 3, `f_decay`.

    Example:
        >>> cosine(0.3, every=100, until=400)(200)
        0.15
    """
    check_fraction(drop_fraction=drop_fraction)
    return Periodic(Cosine(drop_fraction, until), every, until)


@dataclass(frozen=True)
class Dynamics:
    """Hyper-parameters of methods that move their topology, whatever the length of a run.

    The defaults are those of RigL on CIFAR-10.

    Args:
        distribution: of the nonzeros over the layers, for random masks.
        drop_fraction: fraction of a layer's weights to move at the start.
        decay: "cosine" lets it fall to 0, "constant" keeps it.
        every: iterations from one update to the next.
        until: share of the run, less the cycles of Sup-tickets, after which the topology rests.
        prune_from: share of it up to which GMP and GraNet prune nothing.
        prune_until: share of it at which they have reached their sparsity.
        backward: of Top-KAST, how many times as many weights get a gradient as compute.

    Raises:
        ValueError: a value is out of range.

    Source: Rigging the Lottery (arXiv 1911.11134), section 4.
    """

    distribution: Literal["uniform", "er", "erk"] = "erk"
    drop_fraction: float = 0.3
    decay: Literal["cosine", "constant"] = "cosine"
    every: int = 100
    until: float = 0.75
    prune_until: float = 0.5
    backward: float = 2.0
    prune_from: float = 0.0

    def __post_init__(self) -> None:
        check_positive(every=self.every)
        check_fraction(
            drop_fraction=self.drop_fraction, until=self.until, prune_until=self.prune_until
        )
        if not self.backward >= 1:
            raise ValueError(f"backward: expected at least 1, got {self.backward}")


def at_share(share: float, steps: int) -> int:
    """Return the iteration at a share of a run, at least 1.

    Example:
        >>> at_share(0.75, 1000), at_share(0.0, 1000)
        (750, 1)
    """
    return max(1, round(share * steps))
