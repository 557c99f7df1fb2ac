"""Numbers that change over training: drop fractions and sparsities as functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """A number as a function of the training step."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value at every step.

    Example:
        >>> Constant(0.3)(1000)
        0.3
    """

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `initial` at step 0 down to `final` at step `until` and after.

    Raises:
        ValueError: `until` is not positive.

    Source: Evci et al., Rigging the Lottery, section 3 (2).

    Example:
        >>> Cosine(0.3, until=100)(50)
        0.15
    """

    initial: float
    until: int
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.until < 1:
            raise ValueError(f"until: expected a positive step, got {self.until}")

    def __call__(self, step: int) -> float:
        if step >= self.until:
            return self.final
        wave = 0.5 * (1.0 + math.cos(math.pi * max(step, 0) / self.until))
        return self.final + (self.initial - self.final) * wave


@dataclass(frozen=True)
class Polynomial:
    """A polynomial from `initial` to `final`, steep at first; power 3 is the cubic schedule of GMP.

    Args:
        initial: value up to step `begin`.
        final: value from step `end` on.
        begin: last step at `initial`.
        end: first step at `final`.
        power: of the polynomial.

    Raises:
        ValueError: not `0 <= begin < end`.

    Source: Zhu & Gupta, To prune, or not to prune, section 3.

    Example:
        >>> Polynomial(0.0, 0.8, begin=0, end=100)(100)
        0.8
    """

    initial: float
    final: float
    begin: int
    end: int
    power: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(
                f"begin, end: expected 0 <= begin < end, got {self.begin} and {self.end}"
            )

    def __call__(self, step: int) -> float:
        if step <= self.begin:
            return self.initial
        if step >= self.end:
            return self.final
        left = (self.end - step) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**self.power
