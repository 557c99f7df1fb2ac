"""When a choice is measured, and when it is measured again.

A measurement costs about ten runs of an op and has to pay for itself: it is made when the op has
run for a multiple of that time, and each repetition waits twice as long. It is due early if there
is only an estimate, or if the times of the last measurement varied by as much as the two backends
differ; and earlier still if the op now takes another time than before: slower, or so much faster
than in the measurement that the machine must have been busy then.
"""

from __future__ import annotations

import math

from sparsekd.ops.dispatch.choices import Choice

WINDOW = 16  # runs, of which the fastest counts: what disturbs a run only makes it slower
SOON, LATE = 16, 64  # times as long as a measurement takes
SUSPICION = 4  # sooner by that where something has changed
_RUNS = 8  # of both backends, in an average measurement
_LEAST_TIMING_MS = 20.0
_OFF = 1.5  # by far more than timings vary
_COLD = 4 / 3  # a training step finds less in the caches than a measurement does


class Watch:
    """The times of an op with one cache key as it runs.

    Args:
        choice: which backend runs it, and what is known of its time.
        timing_ms: what the measurement took; None where there was none in this process.
    """

    def __init__(self, choice: Choice, timing_ms: float | None = None) -> None:
        self.choice = choice
        self._soon, self._late = SOON, LATE
        if timing_ms is None:
            timing_ms = _RUNS * ((choice.cpp_ms or 0.0) + (choice.dense_ms or 0.0))
        self._timing_ms = max(timing_ms, _LEAST_TIMING_MS)
        self._begin(0.0)

    def _begin(self, usual: float) -> None:
        """Start to watch the choice, whose backend has taken `usual` ms per product."""
        ms, products = self.choice.ms, self.choice.products
        self._measured = ms / products if ms and self.choice.measured else None
        self._usual = math.inf if self._measured is None else max(usual, self._measured * _COLD)
        self._spent, self._runs, self._fastest, self._rate = 0.0, 0, math.inf, 0.0
        self._off, self.due = False, False

    def ran(self, ms: float, products: int) -> None:
        """Record a run.

        Args:
            ms: that it took.
            products: multiplications of the dense op.
        """
        self._spent += ms
        self._runs += 1
        self._fastest = min(self._fastest, ms / products)
        if self._runs >= WINDOW:
            self._judge()

    def _judge(self) -> None:
        rate, self._runs, self._fastest = self._fastest, 0, math.inf
        self._rate, self._off = rate, self._is_off(rate)
        if not self._off:
            self._usual = min(self._usual, rate)
        self.due = self._spent >= self._patience() * self._timing_ms

    def _patience(self) -> float:
        """Return the multiple of a measurement's time that the op must run before the next one."""
        if not self._off:
            return self._soon if self.choice.vague else self._late
        # a measurement on a busier machine took longer than the next one will
        faster = 1.0 if self._measured is None else min(self._rate / self._measured, 1.0)
        return self._soon * faster / SUSPICION

    def _is_off(self, rate: float) -> bool:
        """Return whether the op now takes another time than before."""
        too_fast = self._measured is not None and rate * _OFF < self._measured
        return too_fast or rate > _OFF * self._usual

    def takes(self, choice: Choice) -> bool:
        """Return whether the outcome of a measurement improves on what is known."""
        return choice.decided or self._off or not self.choice.decided

    def measured(self, choice: Choice, timing_ms: float) -> None:
        """Restart after a measurement, with the next one further away.

        Args:
            choice: that counts from now on.
            timing_ms: what the measurement took.
        """
        routine = self.choice.decided and not self._off
        self._soon, self._late = SOON if routine else 2 * self._soon, 2 * self._late
        self._timing_ms = max(timing_ms, _LEAST_TIMING_MS)
        usual = self._rate if choice.backend == self.choice.backend else 0.0
        self.choice = choice
        self._begin(usual)
