"""Time the competitors of one case against each other: gate first, then in turns, one row each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from sparsekd.bench import gate
from sparsekd.bench.competitor import Key
from sparsekd.timing import interleave
from sparsekd.train import Row

_PAUSE = 0.005  # seconds for another package's idle threads to stop spinning
_LEAST = 0.02  # seconds of a turn


class Session(Protocol):
    """What is measured together: the unit that is skipped when all its rows exist."""

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        ...

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        ...

    def measure(self) -> list[Row]:
        """Measure them."""
        ...


class Ready(NamedTuple):
    """A competitor that is ready to be timed.

    Args:
        call: what is timed.
        errors: relative error of each of its results.
        bounds: the largest error allowed of each.
    """

    call: Callable[[], object]
    errors: Mapping[str, float]
    bounds: Mapping[str, float]


@dataclass(frozen=True)
class Entry:
    """A competitor in a race.

    Args:
        row: what identifies it, and what is known before it runs.
        skipped: why it cannot run, None if it can.
        prepare: builds it and computes its results for the first time.
    """

    row: Row
    skipped: str | None
    prepare: Callable[[], Ready]


def race(
    entries: Iterable[Entry], *, rounds: int, slow: float, device: torch.device | None = None
) -> list[Row]:
    """Compare every competitor's results with the reference, then time those that are right.

    Args:
        entries: one for each competitor and sparsity.
        rounds: turns of each.
        slow: those that take more seconds than this have three turns at most.
        device: where they compute; None is the CPU.

    Returns:
        A row for each entry, in their order: with `ms` (the median), `times` and `error`, or with
        the reason it has none as `skipped`, `refused` (wrong results) or `failed` (it raised).

    Example:
        >>> good = Ready(lambda: None, errors={"output": 0.0}, bounds={"output": 1e-6})
        >>> wrong = Ready(lambda: None, errors={"output": 0.5}, bounds={"output": 1e-6})
        >>> entries = [Entry({"arm": "a"}, None, lambda: good)]
        >>> entries += [Entry({"arm": "b"}, None, lambda: wrong)]
        >>> [sorted(row) for row in race(entries, rounds=1, slow=1.0)]
        [['arm', 'error', 'ms', 'times'], ['arm', 'ms', 'refused']]
    """
    rows: list[Row] = []
    calls: dict[int, Callable[[], object]] = {}
    for number, entry in enumerate(entries):
        outcome, call = _admit(entry)
        rows.append({**entry.row, **outcome})
        if call is not None:
            calls[number] = call
    times = interleave(
        calls, rounds, settle=True, least=_LEAST, pause=_PAUSE, slow=slow, device=device
    )
    for number, turns in times.items():
        rows[number] |= {
            "ms": round(statistics.median(turns), 4),
            "times": [round(turn, 4) for turn in turns],
        }
    return rows


def _admit(entry: Entry) -> tuple[dict[str, Any], Callable[[], object] | None]:
    if entry.skipped:
        return {"ms": None, "skipped": entry.skipped}, None
    try:
        ready = entry.prepare()
    except Exception as error:  # another package's, or a shape it does not take: the race goes on
        return {"ms": None, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}, None
    reason = gate.refusal(ready.errors, ready.bounds)
    if reason:
        return {"ms": None, "refused": reason}, None
    return {"error": float(f"{max(ready.errors.values(), default=0.0):.2g}")}, ready.call
