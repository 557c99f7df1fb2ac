"""Time the arms of one case against each other: gate first, then in turns, one row an arm."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from sparsekd.bench import gate
from sparsekd.timing import interleave
from sparsekd.train import Row

Key = tuple[str, float | None]  # arm and sparsity
_PAUSE = 0.005  # seconds for another package's idle threads to stop spinning
_LEAST = 0.02  # seconds of a turn


class Arm(Protocol):
    """Be one of the competitors, at whatever level."""

    @property
    def sparse(self) -> bool: ...


class Session(Protocol):
    """Be what is measured together: the unit that is skipped when all its rows exist."""

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


def pairs(arms: Mapping[str, Arm], sparsities: Sequence[float]) -> list[Key]:
    """Pair every sparse arm with every sparsity; a dense one runs once, at none.

    Example:
        >>> from sparsekd.bench.arms import LAYER_ARMS
        >>> two = {name: LAYER_ARMS[name] for name in ("dense_contiguous", "sparsekd")}
        >>> pairs(two, (0.8, 0.9))
        [('dense_contiguous', None), ('sparsekd', 0.8), ('sparsekd', 0.9)]
    """
    dense: list[Key] = [(name, None) for name, arm in arms.items() if not arm.sparse]
    return dense + [(name, s) for s in sparsities for name, arm in arms.items() if arm.sparse]


class Ready(NamedTuple):
    """Hold an arm that is ready to run.

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
    """Describe one arm in a race.

    Args:
        row: what identifies it, and what is known before it runs.
        skipped: why it cannot run, None if it can.
        prepare: builds it and computes its results once.
    """

    row: Row
    skipped: str | None
    prepare: Callable[[], Ready]


def race(
    entries: Iterable[Entry],
    *,
    rounds: int,
    slow: float,
    device: torch.device | None = None,
) -> list[Row]:
    """Hold every arm's results against the reference, then time those that are right.

    Args:
        entries: one an arm and sparsity.
        rounds: turns of each arm.
        slow: arms that take more seconds than this have three turns at most.
        device: where they compute; the CPU if there is none.

    Returns:
        A row an entry, in their order: with `ms` (the median), `times` and `error`, or with the
        reason it has none as `skipped`, `refused` (wrong results) or `failed` (it raised).

    Example:
        >>> good = Ready(lambda: None, errors={"output": 0.0}, bounds={"output": 1e-6})
        >>> wrong = Ready(lambda: None, errors={"output": 0.5}, bounds={"output": 1e-6})
        >>> entries = [Entry({"arm": "a"}, None, lambda: good)]
        >>> entries += [Entry({"arm": "b"}, None, lambda: wrong)]
        >>> [sorted(row) for row in race(entries, rounds=1, slow=1.0)]
        [['arm', 'error', 'ms', 'times'], ['arm', 'ms', 'refused']]
    """
    rows: list[Row] = []
    calls: dict[str, Callable[[], object]] = {}
    for number, entry in enumerate(entries):
        outcome, call = _admit(entry)
        rows.append({**entry.row, **outcome})
        if call is not None:
            calls[str(number)] = call
    times = interleave(
        calls, rounds, settle=True, least=_LEAST, pause=_PAUSE, slow=slow, device=device
    )
    for key, turns in times.items():
        rows[int(key)] |= {
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
