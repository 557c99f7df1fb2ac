"""The cycles at the end of a Sup-tickets run: when, at which learning rates."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from fractions import Fraction

from sparsekd.dst.dynamics import check_fraction, check_positive
from sparsekd.tickets.superposition import Average, check_average

PEAK = 5.0
"""Learning rate in the middle of a cycle over that at its ends."""


@dataclass(frozen=True)
class Cycles:
    """The division of a run into a first phase and `count` cycles of equal length at its end.

    Args:
        total_steps: iterations of the whole run.
        cycle_fraction: largest share of them to spend on cycles.
        cycle_steps: iterations of a cycle; `count` is the number of whole cycles that fit.
        lr: learning rate at both ends of a cycle, and in its middle; None for the host's last rate
            and five times that.
        cycle_count: the number of cycles, instead of a share.

    Raises:
        ValueError: a value is out of range, or the cycles do not fit.

    Source: Superposing Many Tickets into One (arXiv 2205.15322), section 3 and released code.

    Example:
        >>> cycles = Cycles(250, 0.1, 8, (0.001, 0.005))
        >>> cycles.count, cycles.first_phase, cycles.learning_rate(226 + 8 + 4)
        (3, 226, 0.005)
    """

    total_steps: int
    cycle_fraction: float
    cycle_steps: int
    lr: tuple[float, ...] | None = None
    cycle_count: int | None = None

    def __post_init__(self) -> None:
        check_positive(total_steps=self.total_steps, cycle_steps=self.cycle_steps)
        check_fraction(cycle_fraction=self.cycle_fraction)
        if self.lr is not None and (len(self.lr) != 2 or not all(rate >= 0 for rate in self.lr)):
            raise ValueError(f"lr: expected two numbers of at least 0, got {self.lr}")
        if self.cycle_count is not None and self.cycle_count < 0:
            raise ValueError(f"cycle_count: expected at least 0, got {self.cycle_count}")
        if self.first_phase < 0:
            raise ValueError(
                f"cycle_count: {self.cycle_count} cycles of {self.cycle_steps} do not fit into "
                f"{self.total_steps}"
            )

    @property
    def count(self) -> int:
        """Number of cycles; 0 if not even one fits."""
        if self.cycle_count is not None:
            return self.cycle_count
        # As meant: in floating point 0.29 * 100 is less than 29, and 12 / 45 * 45 less than 12.
        share = Fraction(self.cycle_fraction).limit_denominator(1_000_000)
        return int(self.total_steps * share) // self.cycle_steps

    @property
    def first_phase(self) -> int:
        """Number of iterations before the first cycle."""
        return self.total_steps - self.count * self.cycle_steps

    def begins(self, step: int) -> bool:
        """Return whether a cycle begins after `step` iterations."""
        done = step - self.first_phase
        return 0 <= done < self.count * self.cycle_steps and done % self.cycle_steps == 0

    def tickets(self, step: int) -> int:
        """Count the networks to average after `step` iterations.

        The first is the one at the end of the first phase; each cycle adds one.
        """
        if self.count == 0:
            return 0
        done = min(step, self.total_steps) - self.first_phase
        return 0 if done < 0 else 1 + done // self.cycle_steps

    def learning_rate(self, step: int, host_lr: float = 0.0) -> float:
        """Return the learning rate after `step` iterations: a triangle within each cycle.

        Args:
            step: number of iterations done.
            host_lr: the host's last rate, for cycles without rates of their own.
        """
        low, high = (host_lr, PEAK * host_lr) if self.lr is None else self.lr
        done = min(step, self.total_steps) - self.first_phase
        t = done % self.cycle_steps / self.cycle_steps
        return low + (high - low) * (1 - abs(2 * t - 1))


@dataclass(frozen=True)
class Superposition:
    """Hyper-parameters of Sup-tickets, with times in epochs; see `SupTickets`."""

    cycle_fraction: float = 0.1
    cycle_epochs: int = 8
    lr: tuple[float, ...] | None = None
    drop_fraction: float = 0.5
    average: Average = "caa"
    prune_each: bool = False
    cycle_count: int | None = None

    def __post_init__(self) -> None:
        check_average(self.average)
        check_fraction(drop_fraction=self.drop_fraction)
        self.cycles(max(1, self.cycle_epochs * (self.cycle_count or 0)), 1)

    def cycles(self, epochs: int, steps: int) -> Cycles:
        """Return the cycles at the end of `epochs` epochs of `steps` steps."""
        length = self.cycle_epochs * steps
        return Cycles(epochs * steps, self.cycle_fraction, length, self.lr, self.cycle_count)

    def with_host(self, last: float, highest: float) -> Superposition:
        """Return the same with the learning rates that follow from the host's.

        Warns if the host has annealed to nothing.

        Args:
            last: learning rate of the host's last iteration.
            highest: its highest one.

        Example:
            >>> Superposition().with_host(0.001, 0.1).lr
            (0.001, 0.005)
        """
        lr = (last, PEAK * last) if self.lr is None else self.lr
        warn_if_annealed(last, highest, lr[1])
        return replace(self, lr=lr)

    def tail(self, epochs: int) -> int:
        """Return the number of epochs that the cycles take at the end of `epochs`."""
        return self.cycles(epochs, 1).count * self.cycle_epochs


def warn_if_annealed(last: float, highest: float, peak: float | None = None) -> None:
    """Warn if a host's learning rate has fallen to nothing where its cycles begin.

    Args:
        last: the host's last learning rate.
        highest: its highest one.
        peak: in the middle of a cycle; by default five times `last`.

    Example:
        >>> warn_if_annealed(0.001, 0.1)
    """
    if last >= 1e-4 * highest:
        return
    peak = PEAK * last if peak is None else peak
    effect = (
        "hardly train the weights that they grow, so that tickets are their host with some weights "
        "dropped, and averaging them gains nothing"
        if peak < 1e-4 * highest
        else "leave the minimum that the host has settled in, and seldom end in a better one"
    )
    warnings.warn(
        f"Sup-tickets: the host's learning rate ends at {last:.2g}, from {highest:.2g}; cycles "
        f"that rise to {peak:.2g} {effect}. Published hosts end at a 100th to a 1000th of their "
        "rate, by a schedule of steps.",
        RuntimeWarning,
        stacklevel=2,
    )
