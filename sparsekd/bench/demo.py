"""A race of seconds for newcomers: a network's training step and a layer, dense against sparse."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sparsekd.bench import machine
from sparsekd.bench.cases import BASELINES, LayerCase, ModelCase
from sparsekd.bench.layers import LAYER_COMPETITORS, LayerRace
from sparsekd.bench.race import Field, Session
from sparsekd.bench.results import Results
from sparsekd.bench.runner import run
from sparsekd.bench.steps import STEP_COMPETITORS, StepRace
from sparsekd.bench.suite import step_races
from sparsekd.bench.tables import Grid, cell, percent
from sparsekd.terminal import Columns
from sparsekd.train import MetricsLog, Row

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
NETWORK = ModelCase("wrn22_2", batch=32)
LAYER = LayerCase("linear", 1024, 1024, batch=512)
_ROUNDS = 3


def sessions() -> Iterator[Session]:
    """Iterate over the races: the layer, then the network at one sparsity after the other."""
    yield LayerRace(LAYER, SPARSITIES, _against_dense(LAYER_COMPETITORS, "sparsekd"), _ROUNDS)
    chosen = _against_dense(STEP_COMPETITORS, "sparsekd_optimized")
    yield from step_races(StepRace, NETWORK, SPARSITIES, chosen, _ROUNDS)


def _against_dense(competitors: Field, ours: str) -> Field:
    return {name: competitors[name] for name in (*BASELINES, ours)}


def race(console: Console, before: Callable[[], None] = lambda: None) -> list[Row]:
    """Run the races and show how many times faster than dense each is, as soon as it is known.

    Args:
        console: shows the table; a terminal sees it fill.
        before: called before each race.

    Returns:
        The rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder) / "rows.jsonl")
        shown = Live(table([]), console=console, auto_refresh=False, transient=True)
        with shown, warnings.catch_warnings():
            # Random masks leave some channels empty, which changes nothing about the time.
            warnings.simplefilter("ignore", RuntimeWarning)
            for session in sessions():
                before()
                run([session], log, machine.describe(), Console(quiet=True))
                shown.update(table(log.rows()), refresh=console.is_terminal)
        console.print(table(log.rows()))
        return log.rows()


def table(rows: list[Row]) -> Columns:
    """Build the table of the races that have been run.

    Args:
        rows: of `race`.

    Example:
        >>> table([]).row_count
        2
    """
    results = Results(rows)
    names = {"sparsekd": LAYER.name, "sparsekd_optimized": f"{NETWORK.name}, batch {NETWORK.batch}"}
    lines = []
    for arm, name in names.items():
        ours = {row["sparsity"]: row for row in rows if row["arm"] == arm}
        dense = next((results.dense_ms(row) for row in ours.values()), None)
        speedups = (cell(results.speedup(ours.get(s)), ".1f", "x") for s in SPARSITIES)
        lines.append([name, cell(dense), *speedups])
    threads = f", {rows[-1]['machine']['threads']} threads" if rows else ""
    return Grid(
        "Dense against sparse: forward and backward",
        ["", "dense ms", *map(percent, SPARSITIES)],
        lines,
        "Times faster than float32 dense in its better layout, in turns with it; the network's "
        f"time is that of a whole training step{threads}.",
    ).rich()
