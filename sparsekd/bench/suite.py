"""The sessions of a benchmark run, and the report on their rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sparsekd.bench.cases import (
    BASELINES,
    BATCH,
    LINEAR_LAYERS,
    MODELS,
    SPARSITIES,
    LayerCase,
    ModelCase,
    conv_layers,
    factory,
)
from sparsekd.bench.competitor import is_ours
from sparsekd.bench.layers import LAYER_COMPETITORS, LayerCompetitor
from sparsekd.bench.race import Session
from sparsekd.bench.races import LayerRace, StepRace
from sparsekd.bench.results import Results
from sparsekd.bench.steps import SHOWCASE, STEP_COMPETITORS, StepCompetitor
from sparsekd.bench.tables import Grid, layer_grid, shortfall_grid, step_grid
from sparsekd.errors import UnsupportedError

FEW = (0.8, 0.9, 0.98)
_QUICK_LAYERS = (
    LayerCase("conv", 64, 64, size=32, kernel=3),
    LayerCase("conv", 256, 64, size=32),
    LayerCase("conv", 256, 256, size=8, kernel=3),
    LayerCase("linear", 2048, 1000, batch=128),
)
_QUICK_BATCH = 32
if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Competitor = TypeVar("_Competitor")


@dataclass(frozen=True)
class BenchConfig:
    """The configuration of a benchmark; fields that are None depend on `quick`.

    Args:
        quick: minutes at a batch of 32 instead of everything at 128.
        levels: of the suite.
        networks: names in `cases.MODELS`, or factories as `ModelCase` takes them.
        input_shape: channels, height and width of images for networks.
        sparsities: of every level.
        competitors: their names; the dense reference always runs.
        batch: images or rows.
        rounds: turns of each competitor.

    Raises:
        UnsupportedError: a value is out of range or a network unknown.
    """

    quick: bool = True
    levels: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    input_shape: tuple[int, int, int] | None = None
    sparsities: tuple[float, ...] | None = None
    competitors: tuple[str, ...] | None = None
    batch: int | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        for name in self.networks or ():
            factory(name) if ":" in name else check("network", [name], MODELS)
        for sparsity in self.sparsities or ():
            if not 0 <= sparsity < 1:
                raise UnsupportedError(f"sparsity: expected numbers in [0, 1), got {sparsity}")
        for name, value in (("batch", self.batch), ("rounds", self.rounds)):
            if value is not None and value < 1:
                raise UnsupportedError(f"{name}: expected at least 1, got {value}")

    def turns(self, usual: int) -> int:
        """Return the turns of each competitor."""
        return self.rounds or (3 if self.quick else usual)

    def models(self, quick: Sequence[str], full: Sequence[str]) -> Iterator[ModelCase]:
        """Iterate over the networks that were asked for, by default some of two lists."""
        batch = self.batch or (_QUICK_BATCH if self.quick else BATCH)
        for name in self.networks or (quick if self.quick else full):
            case = MODELS.get(name) or ModelCase(name)
            yield replace(case, batch=batch, input_shape=self.input_shape or case.input_shape)

    def layers(self) -> Iterator[LayerCase]:
        """Iterate over the layers."""
        if self.quick:
            for case in _QUICK_LAYERS:
                yield replace(case, batch=min(case.batch, self.batch or _QUICK_BATCH))
        else:
            for case in (*conv_layers(), *LINEAR_LAYERS):
                yield replace(case, batch=self.batch or case.batch)

    def chosen(
        self, table: Mapping[str, _Competitor], usual: Collection[str]
    ) -> dict[str, _Competitor]:
        """Take the competitors of a table that were asked for, by default the usual ones."""
        wanted = usual if self.competitors is None else ("dense_contiguous", *self.competitors)
        return {name: competitor for name, competitor in table.items() if name in wanted}


@dataclass(frozen=True)
class Suite:
    """A collection of benchmarks, and the report on them.

    Args:
        title: of the report.
        command: that runs it.
        help: of that command.
        levels: what it can measure: by name, a function that lists the sessions of a config.
        competitors: names that a config may choose from.
        grids: makes the tables that rows allow; None for others.
        figures: likewise, by the name of their file.
        text: makes what the report says besides.
        machine: returns facts that tell rows apart beyond those of `machine.describe`.
        ours: returns whether a competitor runs kernels of sparsekd.
    """

    title: str
    command: str
    help: str
    levels: Mapping[str, Callable[[BenchConfig], Iterator[Session]]]
    competitors: Collection[str]
    grids: Callable[[Results], list[Grid | None]]
    figures: Callable[[Results], dict[str, Figure | None]]
    text: Callable[[Results], str] = lambda results: ""
    machine: Callable[[], Mapping[str, Any]] = dict
    ours: Callable[[str], bool] = is_ours

    def sessions(self, config: BenchConfig) -> list[Session]:
        """List what a config measures, in the order of the levels.

        Raises:
            UnsupportedError: a level or a competitor is unknown; the text lists them.

        Example:
            >>> config = BenchConfig(levels=("step",), networks=("resnet20",), sparsities=(0.9,))
            >>> [session.name for session in SUITE.sessions(config)]
            [('step', 'resnet20 b32', 'step')]
        """
        check("level", config.levels or (), self.levels)
        check("competitor", config.competitors or (), self.competitors)
        wanted = config.levels or self.levels
        chosen = [make for name, make in self.levels.items() if name in wanted]
        return [session for make in chosen for session in make(config)]


def check(name: str, chosen: Sequence[str], known: Collection[str]) -> None:
    """Raise UnsupportedError if a word is not among those known."""
    for word in chosen:
        if word not in known:
            raise UnsupportedError(f"{name}: expected one of {', '.join(known)}; got {word!r}")


def layer_sessions(
    config: BenchConfig, competitors: Mapping[str, LayerCompetitor]
) -> Iterator[LayerRace]:
    """Iterate over the races of layers, forward and backward."""
    sparsities = config.sparsities or (FEW if config.quick else SPARSITIES)
    for case in config.layers():
        yield LayerRace(case, sparsities, config.chosen(competitors, competitors), config.turns(3))


def step_sessions(
    config: BenchConfig,
    competitors: Mapping[str, StepCompetitor],
    race: type[StepRace] = StepRace,
) -> Iterator[StepRace]:
    """Iterate over the races of training steps, each of one network at one sparsity.

    All sparsities of a network together would take more memory than most machines have. What is
    dense beyond the references is timed at the first of them only.
    """
    for case in config.models((SHOWCASE, "resnet20"), tuple(MODELS)):
        usual = {n for n, c in competitors.items() if c.network in (None, case.name)}
        sparsities: tuple[float, ...] = FEW if config.quick else SPARSITIES
        if config.quick:
            usual.discard("dense_compiled")  # compiling takes longer than all the rest
        if case.name == "resnet50":  # takes long, and dense wins below
            sparsities = tuple(s for s in sparsities if s >= FEW[0])
        chosen = config.chosen(competitors, usual)
        for sparsity in config.sparsities or sparsities:
            yield race(case, (sparsity,), chosen, config.turns(5))
            chosen = {n: c for n, c in chosen.items() if c.sparse or n in BASELINES}


def _grids(results: Results) -> list[Grid | None]:
    return [
        layer_grid(results, "conv", LAYER_COMPETITORS),
        layer_grid(results, "linear", LAYER_COMPETITORS),
        step_grid(results, "step", STEP_COMPETITORS),
        shortfall_grid(results),
    ]


def _figures(results: Results) -> dict[str, Figure | None]:
    from sparsekd.bench import figures  # matplotlib: not worth loading to measure

    return {
        "speedup_layers": figures.speedup_layers(results, LAYER_COMPETITORS),
        "speedup_models": figures.speedup_models(results, STEP_COMPETITORS),
    }


SUITE = Suite(
    title="sparsekd bench",
    command="sparsekd bench",
    help="Time layers and training steps of sparsekd against dense torch; show where dense wins.",
    levels={
        "layer": partial(layer_sessions, competitors=LAYER_COMPETITORS),
        "step": partial(step_sessions, competitors=STEP_COMPETITORS),
    },
    competitors=tuple({**LAYER_COMPETITORS, **STEP_COMPETITORS}),
    grids=_grids,
    figures=_figures,
)
