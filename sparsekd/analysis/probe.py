"""Measurements while a network trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsekd.dst import Updater
from sparsekd.train import Row


class Probe:
    """Measurements of a run at fixed steps, and before and after each move of its topology.

    Pass it to `sparsekd.train.Trainer` as `dst`, with the method that moves the topology inside.
    The rows are part of the trainer's state, so an interrupted run goes on with them. `measure`
    must leave the model and torch's global generator as they are.

    Args:
        measure: takes one measurement.
        every: steps from one measurement to the next, starting before the first step.
        dst: the method; None for a fixed topology.
        around_updates: measure before and after every update too.

    Example:
        >>> probe = Probe(lambda: {"loss": 0.5}, every=2)
        >>> [probe.step() for _ in range(3)]
        [False, False, False]
        >>> probe.rows
        [{'kind': 'probe', 'step': 0, 'loss': 0.5}, {'kind': 'probe', 'step': 2, 'loss': 0.5}]
    """

    def __init__(
        self,
        measure: Callable[[], Row],
        every: int,
        dst: Updater | None = None,
        *,
        around_updates: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        self.measure = measure
        self.every = every
        self.dst = dst
        self.around_updates = around_updates
        self.steps = 0
        self.rows: list[Row] = []

    def step(self) -> bool:
        """Measure if it is time to, and let the method inside take its step."""
        if self.steps % self.every == 0:
            self.record()
        before = self.steps
        self.steps += 1
        if self.dst is None:
            return False
        if not (self.around_updates and self.dst.due):
            return self.dst.step()
        old = self.measure()
        moved = self.dst.step()
        if moved:
            new = self.measure()
            self.rows.append({"kind": "update", "step": before, "before": old, "after": new})
        return moved

    def record(self) -> None:
        """Add a measurement now, in a row of kind "probe"."""
        self.rows.append({"kind": "probe", "step": self.steps, **self.measure()})

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far and the state of the method inside."""
        inner = None if self.dst is None else self.dst.state_dict()
        return {"steps": self.steps, "rows": self.rows, "dst": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.steps, self.rows = state["steps"], state["rows"]
        if self.dst is not None:
            self.dst.load_state_dict(state["dst"])
