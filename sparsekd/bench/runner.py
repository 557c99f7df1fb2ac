"""Run sessions one after the other, append their rows, and go on where an earlier call stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from sparsekd.bench.race import Session
from sparsekd.train import MetricsLog, Row


def run(
    sessions: Sequence[Session],
    log: MetricsLog,
    machine: dict[str, Any],
    console: Console,
    seconds: float = math.inf,
) -> bool:
    """Measure every session whose rows are not there yet; return whether all are there now.

    Args:
        sessions: what to measure.
        log: where the rows are and go; those of a session are written when all are measured.
        machine: from `machine.describe`; rows of another machine or build do not count.
        console: shows a line a session, and on a terminal a bar.
        seconds: no session begins after this time.
    """
    log.keep(lambda row: True)  # drops a line that a kill cut short
    done = {identity(row) for row in log.rows() if row["machine"]["id"] == machine["id"]}
    start = time.monotonic()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(sessions))
        for session in sessions:
            level, case, op = session.name
            title = f"{level}: {case}" + ("" if op in (level, "step") else f", {op}")
            progress.update(task, description=title)
            wanted = {(*session.name, *key) for key in session.keys()}  # noqa: SIM118
            if not wanted <= done:
                if time.monotonic() - start > seconds:
                    return False
                _measure(session, log, machine, console, title)
            progress.advance(task)
    return True


def identity(row: Row) -> tuple[str, str, str, str, float | None]:
    """Return the fields that identify a row among those of its machine."""
    return row["level"], row["case"], row["op"], row["arm"], row["sparsity"]


def _measure(
    session: Session, log: MetricsLog, machine: dict[str, Any], console: Console, title: str
) -> None:
    start = time.time()
    try:
        rows = session.measure()
    except Exception as error:  # out of memory, perhaps: the sessions after it go on
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        keys = session.keys()
        rows = [{"arm": arm, "sparsity": s, "ms": None, "failed": problem} for arm, s in keys]
    level, case, op = session.name
    stamp = f"{start:.3f}"
    for row in rows:
        log.append(
            {"level": level, "case": case, "op": op, **row, "session": stamp, "machine": machine}
        )
    console.print(f"{title}  {time.time() - start:.1f} s", highlight=False)
    for row in rows:
        for outcome in ("refused", "failed"):
            if outcome in row:
                at = "" if row["sparsity"] is None else f" at {row['sparsity']:.0%}"
                console.print(
                    f"  {row['arm']}{at} {outcome}: {row[outcome]}", style="red", highlight=False
                )
