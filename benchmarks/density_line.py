"""The line that a training step's time follows against density: intercept + slope * density.

Whole steps (forward, loss, backward, SGD) of six networks at 80, 90, 95 and 98 % sparsity: dense in
both layouts and in bfloat16, the sparse network as it is and after `optimize`, in turns in one
process. Rows are written as sparsities finish, and the same command goes on after a stop; it prints
the speed-ups over the better float32 dense and the lines, and draws them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from benchmarks.arena.competitors import MAIN, STEPS
from benchmarks.arena.tables import density_grid
from benchmarks.cases import step_cases
from sparsekd.bench.command import command
from sparsekd.bench.results import Results
from sparsekd.bench.steps import StepRace
from sparsekd.bench.suite import BenchConfig, Suite, step_races
from sparsekd.bench.tables import Grid, shortfall_grid, step_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
COMPETITORS = {name: STEPS[name] for name in STEPS if name in (*MAIN, "dense_bf16")}


def _steps(config: BenchConfig) -> Iterator[StepRace]:
    chosen = config.chosen(COMPETITORS, COMPETITORS)
    for case in step_cases(config):
        sparsities = config.sparsities or SPARSITIES
        yield from step_races(StepRace, case, sparsities, chosen, config.rounds or 5)


def _grids(results: Results) -> list[Grid | None]:
    return [
        step_grid(results, "step", COMPETITORS),
        density_grid(results),
        shortfall_grid(results),
    ]


def _figures(results: Results) -> dict[str, Figure | None]:
    # matplotlib: not needed to measure
    from benchmarks.arena.figures import flops_and_time, time_and_density

    return {
        "flops_and_time": flops_and_time(results),
        "density_line": time_and_density(results),
    }


DENSITY_LINE = Suite(
    title="The line in density",
    command="python -m benchmarks.density_line",
    help="Time training steps against density and fit a line: the fixed cost, and the slope.",
    levels={"step": _steps},
    competitors=tuple(COMPETITORS),
    grids=_grids,
    figures=_figures,
)

if __name__ == "__main__":
    typer.run(command(DENSITY_LINE, "runs/density_line"))
