"""The levels of the arena and its report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.arena import rivals, tables
from benchmarks.arena.competitors import LAYERS, MAIN, STEPS
from benchmarks.arena.epoch import EpochRace, small_epoch
from benchmarks.arena.passes import PASSES, PassRace, pass_competitors
from benchmarks.arena.peak_memory import PeakMemory
from benchmarks.arena.peaks import PeakSession
from benchmarks.arena.steps import ArenaStepRace
from benchmarks.arena.waterfall import Waterfall
from benchmarks.cases import LINEAR_LAYERS, MODELS, SPARSITIES, conv_layers
from sparsekd.bench.cases import BATCH, ModelCase
from sparsekd.bench.layers import LayerRace
from sparsekd.bench.race import timed_on
from sparsekd.bench.results import Results
from sparsekd.bench.steps import SHOWCASE, StepRace
from sparsekd.bench.suite import BenchConfig, Suite, step_races
from sparsekd.bench.tables import Grid, layer_grid, shortfall_grid, step_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PASSES_OF_CONVS = ("dense_contiguous", "dense_channels_last", "sparsekd_channels_last")


def _peaks(config: BenchConfig) -> Iterator[PeakSession]:
    yield PeakSession()


def _passes(config: BenchConfig) -> Iterator[PassRace]:
    sparsities = config.sparsities or SPARSITIES
    for case in config.layers((*conv_layers(), *LINEAR_LAYERS)):
        for name in PASSES:
            competitors = pass_competitors(name)
            usual = _PASSES_OF_CONVS if case.kind == "conv" else competitors
            chosen = config.chosen(competitors, usual)
            yield PassRace(case, sparsities, chosen, config.rounds or 5, name)


def _layers(config: BenchConfig) -> Iterator[LayerRace]:
    competitors = config.chosen(LAYERS, LAYERS)
    for case in config.layers((*conv_layers(), *LINEAR_LAYERS)):
        yield LayerRace(case, config.sparsities or SPARSITIES, competitors, config.rounds or 3)


def _steps(config: BenchConfig) -> Iterator[StepRace]:
    for case in config.models(tuple(MODELS), BATCH):
        # ResNet-50 takes long, and dense wins below.
        usual = tuple(s for s in SPARSITIES if s >= 0.8 or case.name != "resnet50")
        chosen = config.chosen(STEPS, timed_on(case, STEPS))
        rounds = config.rounds or 5
        yield from step_races(ArenaStepRace, case, config.sparsities or usual, chosen, rounds)


def _epochs(config: BenchConfig) -> Iterator[EpochRace]:
    case = ModelCase("resnet20", (1, 28, 28), config.batch or BATCH)
    epoch = small_epoch(6144)
    competitors = config.chosen(STEPS, MAIN)
    sparsities = config.sparsities or (0.9, 0.98)
    yield EpochRace(case, sparsities, competitors, config.rounds or 3, epoch)


def _waterfalls(config: BenchConfig) -> Iterator[Waterfall]:
    competitors = config.chosen(STEPS, MAIN[1:])
    for case in config.models((SHOWCASE, "resnet50"), BATCH):
        yield Waterfall(case, config.sparsities or (0.9,), competitors, config.rounds or 3)


def _memory(config: BenchConfig) -> Iterator[PeakMemory]:
    competitors = config.chosen(STEPS, MAIN)
    for case in config.models((SHOWCASE,), BATCH):
        yield PeakMemory(case, config.sparsities or (0.5, 0.8, 0.9), competitors)


def _grids(results: Results) -> list[Grid | None]:
    return [
        layer_grid(results, "conv", LAYERS),
        layer_grid(results, "linear", LAYERS),
        step_grid(results, "step", STEPS),
        step_grid(results, "epoch", STEPS),
        tables.truth_grid(results),
        tables.density_grid(results),
        tables.waterfall_grid(results),
        tables.memory_grid(results),
        tables.roofline_grid(tables.roofline_rows(results)),
        shortfall_grid(results),
    ]


def _figures(results: Results) -> dict[str, Figure | None]:
    from benchmarks.arena import figures  # matplotlib: not worth loading to measure
    from sparsekd.bench.figures import speedup_layers, speedup_models

    return {
        "speedup_layers": speedup_layers(results, LAYERS),
        "speedup_models": speedup_models(results, STEPS),
        "roofline": figures.roofline(results),
        "waterfall": figures.waterfall(results),
        "flops_and_time": figures.flops_and_time(results),
        "time_and_density": figures.time_and_density(results),
    }


def _roofs(results: Results) -> str:
    rows = results.rows("peaks")
    if not rows or "flops" not in rows[-1]:
        return ""
    top = rows[-1]
    return (
        f"### Roofs\n\nMeasured on {top['op']}: {top['flops'] / 1e9:.0f} GFLOP/s of independent "
        f"fused multiply-adds; reading {top['l2'] / 1e9:.0f} GB/s from L2, {top['l3'] / 1e9:.0f} "
        f"from L3, {top['memory'] / 1e9:.0f} from memory. `benchmarks/arena/roofline.py` says what "
        "a pass must move.\n"
    )


ARENA = Suite(
    title="The arena",
    command="python -m benchmarks.arena",
    help="Time sparsekd against dense torch and installed packages: all published CPU figures.",
    levels={
        "peaks": _peaks,
        "op": _passes,
        "layer": _layers,
        "step": _steps,
        "epoch": _epochs,
        "waterfall": _waterfalls,
        "memory": _memory,
    },
    competitors=tuple({**LAYERS, **STEPS, **pass_competitors("fprop")}),
    grids=_grids,
    figures=_figures,
    text=_roofs,
    machine=rivals.versions,
)
