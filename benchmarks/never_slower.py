"""Is a training step ever slower than dense, on the path that a user gets by default?

Whole steps (forward, loss, backward, SGD) of six networks from 0 to 98 % sparsity: made sparse by
`sparsify` and prepared by `optimize`, both with their defaults, against dense in both layouts and
in bfloat16, and against the same sparse network without `optimize`; all in turns in one process.
The report lists every cell that is more than 2 % slower than one of the two. Rows are written as
sparsities finish, and the same command goes on after a stop.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import NamedTuple

import typer

from benchmarks.arena.competitors import MAIN, STEPS
from benchmarks.cases import step_cases
from sparsekd.bench.command import command
from sparsekd.bench.results import Results
from sparsekd.bench.steps import StepProblem, StepRace, step_problem
from sparsekd.bench.suite import BenchConfig, Suite, step_races
from sparsekd.bench.tables import Grid, cell, percent, shortfall_grid
from sparsekd.nn import sparsify
from sparsekd.train import Row

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
COMPETITORS = {name: STEPS[name] for name in STEPS if name in (*MAIN, "dense_bf16")}
ALLOWED = 1.02
_LEVEL = "default"


class DefaultRace(StepRace):
    """A race over steps of a network that `sparsify` made sparse with its defaults."""

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return (_LEVEL, self.case.title, "step")

    def problem(self, sparsity: float) -> StepProblem:
        """Build what all competitors are given."""
        return step_problem(self.case, sparsity, sparsify)


class Cell(NamedTuple):
    """The steps of a network at a sparsity.

    Args:
        case: the network.
        sparsity: of the whole network.
        dense_ms: of the better float32 layout.
        bf16: time of dense in bfloat16 over that; None where it was not timed.
        plain: likewise, of the sparse network as it is.
        optimized: likewise, after `optimize`.
        over_plain: time after `optimize` over that before.
    """

    case: str
    sparsity: float
    dense_ms: float
    bf16: float | None
    plain: float
    optimized: float
    over_plain: float

    @property
    def slower(self) -> bool:
        """Whether what a user gets loses by more than the allowed 2 %."""
        return max(self.optimized, self.over_plain) > ALLOWED


def cells(results: Results) -> list[Cell]:
    """Evaluate the rows of each network and sparsity whose three times are there."""
    found = []
    for case in results.cases(_LEVEL):
        bf16 = results.speedup(results.find(_LEVEL, case, "step", "dense_bf16"))
        for sparsity in results.sparsities(_LEVEL):
            plain, ours = (
                results.find(_LEVEL, case, "step", name, sparsity)
                for name in ("sparsekd", "sparsekd_optimized")
            )
            dense = results.dense(ours) if ours else None
            if plain and ours and dense and plain["ms"] and ours["ms"]:
                found.append(
                    Cell(
                        case,
                        sparsity,
                        dense["ms"],
                        1 / bf16 if bf16 else None,
                        _ratio(plain, dense),
                        _ratio(ours, dense),
                        _ratio(ours, plain),
                    )
                )
    return found


def _ratio(one: Row, other: Row) -> float:
    """Return the median ratio of turns that followed each other: drift meets both of a turn."""
    return statistics.median(a / b for a, b in zip(one["times"], other["times"], strict=False))


def _grids(results: Results) -> list[Grid | None]:
    found = cells(results)
    header = ["network, sparsity", "dense, ms", "dense bf16", "plain", "optimized", "over plain"]
    every = Grid(
        "Time of a step over float32 dense in its better layout",
        header,
        [_line(one) for one in found],
        note="Below 1 is faster. Plain is `sparsify` alone; over plain is the time with `optimize` "
        "over that without.",
    )
    slower = [one for one in found if one.slower]
    check = Grid(
        f"{len(slower)} of {len(found)} cells are over {ALLOWED} of dense or of plain",
        header,
        [_line(one) for one in slower],
    )
    return [every, check, shortfall_grid(results)] if found else [shortfall_grid(results)]


def _line(one: Cell) -> list[str]:
    return [
        f"{one.case}, {percent(one.sparsity)}",
        f"{one.dense_ms:.1f}",
        cell(one.bf16, ".2f"),
        *(f"{ratio:.3f}" for ratio in (one.plain, one.optimized, one.over_plain)),
    ]


def _steps(config: BenchConfig) -> Iterator[StepRace]:
    chosen = config.chosen(COMPETITORS, COMPETITORS)
    for case in step_cases(config):
        sparsities = config.sparsities or SPARSITIES
        yield from step_races(DefaultRace, case, sparsities, chosen, config.rounds or 7)


NEVER_SLOWER = Suite(
    title="Never slower than dense",
    command="python -m benchmarks.never_slower",
    help="Time training steps on the default path against dense; list the cells that lose.",
    levels={_LEVEL: _steps},
    competitors=tuple(COMPETITORS),
    grids=_grids,
    figures=lambda results: {},
)

if __name__ == "__main__":
    typer.run(command(NEVER_SLOWER, "runs/never_slower"))
