"""The sessions of a benchmark run, and the report on their rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsekd.bench.cases import (
    BASELINES,
    NETWORKS,
    REFERENCE,
    AnyCase,
    LayerCase,
    ModelCase,
)
from sparsekd.bench.inference import (
    INFERENCE_COMPETITORS,
    USUAL,
    InferenceRace,
    inference_grids,
)
from sparsekd.bench.inference_cases import InferenceCase
from sparsekd.bench.layers import LAYER_COMPETITORS, LayerRace
from sparsekd.bench.race import Session, is_ours, timed_on
from sparsekd.bench.results import Results
from sparsekd.bench.steps import SHOWCASE, STEP_COMPETITORS, StepCompetitor, StepRace
from sparsekd.bench.tables import Grid, layer_grid, shortfall_grid, step_grid
from sparsekd.diagnose.given import factory
from sparsekd.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH, ROUNDS = 32, 3
SPARSITIES = (0.8, 0.9, 0.98)
BATCHES, THREADS, TURNS = (1, 8, 64), (1, 2), 9  # of inference
LAYERS = (
    LayerCase("conv", 64, 64, size=32, kernel=3, batch=BATCH),
    LayerCase("conv", 256, 64, size=32, batch=BATCH),
    LayerCase("conv", 256, 256, size=8, kernel=3, batch=BATCH),
    LayerCase("linear", 2048, 1000, batch=BATCH),
)
_Competitor = TypeVar("_Competitor")


@dataclass(frozen=True)
class BenchConfig:
    """What a user asks of a benchmark; the suite decides about fields that are None.

    Args:
        levels: of the suite.
        networks: names in `cases.NETWORKS`, or factories as `ModelCase` takes them.
        input_shape: channels, height and width of images for networks.
        sparsities: of every level.
        competitors: their names; the dense reference always runs.
        batch: images or rows.
        rounds: turns of each competitor.
        threads: of the level "inference", which takes one and two by default.
        deepsparse: an interpreter that has DeepSparse.

    Raises:
        UnsupportedError: a value is out of range or a network unknown.
    """

    levels: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    input_shape: tuple[int, int, int] | None = None
    sparsities: tuple[float, ...] | None = None
    competitors: tuple[str, ...] | None = None
    batch: int | None = None
    rounds: int | None = None
    threads: int | None = None
    deepsparse: str | None = None

    def __post_init__(self) -> None:
        for name in self.networks or ():
            factory(name) if ":" in name else check("network", [name], (*NETWORKS, "encoder"))
        for sparsity in self.sparsities or ():
            if not 0 <= sparsity < 1:
                raise UnsupportedError(f"sparsity: expected numbers in [0, 1), got {sparsity}")
        for name, value in (("batch", self.batch), ("rounds", self.rounds)):
            if value is not None and value < 1:
                raise UnsupportedError(f"{name}: expected at least 1, got {value}")

    def models(self, usual: Sequence[str], batch: int) -> Iterator[ModelCase]:
        """Iterate over the networks that were asked for, by default the usual ones."""
        for name in self.networks or usual:
            if name == "encoder":
                raise UnsupportedError("network: encoder is of the level inference alone")
            case = ModelCase(name, batch=self.batch or batch)
            yield replace(case, input_shape=self.input_shape or case.input_shape)

    def layers(self, usual: Sequence[LayerCase]) -> Iterator[LayerCase]:
        """Iterate over layers, in the batch that was asked for."""
        return (replace(case, batch=self.batch or case.batch) for case in usual)

    def chosen(
        self, table: Mapping[str, _Competitor], usual: Collection[str]
    ) -> dict[str, _Competitor]:
        """Take the competitors of a table that were asked for, by default the usual ones."""
        wanted = usual if self.competitors is None else (REFERENCE, *self.competitors)
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

    def tables(self, results: Results) -> list[Grid]:
        """Make the tables that the rows allow."""
        return [grid for grid in self.grids(results) if grid is not None]

    def write(
        self, results: Results, folder: Path, rows: Path, formats: Sequence[str] = ("png",)
    ) -> list[Path]:
        """Write the tables, in README.md, and the figures into a folder; return the files.

        Args:
            results: to report on.
            folder: made if it is not there.
            rows: the file that the results came from, named in the text.
            formats: of the figures; the page shows the PNG files, or else the first format's.
        """
        from sparsekd.plots import save  # matplotlib: not worth loading to print tables

        files = save(self.figures(results), folder, formats)
        shown = "png" if "png" in formats else formats[0]
        pictures = "\n\n".join(
            f"![{path.stem.replace('_', ' ')}]({path.name})"
            for path in files
            if path.suffix == f".{shown}"
        )
        machine = "\n".join(f"- {name}: {value}" for name, value in results.machine.items())
        parts = [
            f"# {self.title}\n",
            f"Written by `{self.command}` from `{rows.name}`; draw it again with `--draw`. All "
            "times are medians of turns that the competitors took in one process, on the same "
            "masks and inputs, after the results of each had been compared with dense torch's.\n",
            pictures + "\n" if files else "",
            *(grid.markdown() for grid in self.tables(results)),
            self.text(results),
            f"### Machine\n\n{machine}\n",
        ]
        page = folder / "README.md"
        page.write_text("\n".join(part for part in parts if part))
        return [page, *files]


def check(name: str, chosen: Sequence[str], known: Collection[str]) -> None:
    """Raise UnsupportedError if a word is not among those known."""
    for word in chosen:
        if word not in known:
            raise UnsupportedError(f"{name}: expected one of {', '.join(known)}; got {word!r}")


def step_races(
    race: Callable[..., StepRace],
    case: AnyCase,
    sparsities: Sequence[float],
    competitors: Mapping[str, StepCompetitor],
    rounds: int,
) -> Iterator[StepRace]:
    """Iterate over the races of a network's training steps, one at each sparsity.

    Args:
        race: makes one of a case, a tuple of sparsities, competitors and rounds.
        case: the network.
        sparsities: one race at each.
        competitors: by name.
        rounds: turns of each.

    All sparsities together would take more memory than most machines have. What is dense beyond
    the references is timed at the first of them only.
    """
    for sparsity in sparsities:
        yield race(case, (sparsity,), competitors, rounds)
        competitors = {n: c for n, c in competitors.items() if c.sparse or n in BASELINES}


def _layers(config: BenchConfig) -> Iterator[LayerRace]:
    competitors = config.chosen(LAYER_COMPETITORS, LAYER_COMPETITORS)
    for case in config.layers(LAYERS):
        yield LayerRace(case, config.sparsities or SPARSITIES, competitors, config.rounds or ROUNDS)


def _steps(config: BenchConfig) -> Iterator[StepRace]:
    for case in config.models((SHOWCASE, "resnet20"), BATCH):
        # Compiling takes longer than all the rest.
        usual = timed_on(case, STEP_COMPETITORS) - {"dense_compiled"}
        chosen = config.chosen(STEP_COMPETITORS, usual)
        sparsities = config.sparsities or SPARSITIES
        yield from step_races(StepRace, case, sparsities, chosen, config.rounds or ROUNDS)


def _inference(config: BenchConfig) -> Iterator[InferenceRace]:
    chosen = config.chosen(INFERENCE_COMPETITORS, USUAL)
    for name, batch, threads in itertools.product(
        config.networks or (SHOWCASE,),
        BATCHES if config.batch is None else (config.batch,),
        THREADS if config.threads is None else (config.threads,),
    ):
        shape = () if name == "encoder" else config.input_shape or ()
        case = InferenceCase(name, batch, threads, shape, config.deepsparse)
        for sparsity in config.sparsities or SPARSITIES:
            yield InferenceRace(case, (sparsity,), chosen, config.rounds or TURNS)


def _grids(results: Results) -> list[Grid | None]:
    return [
        layer_grid(results, "conv", LAYER_COMPETITORS),
        layer_grid(results, "linear", LAYER_COMPETITORS),
        step_grid(results, "step", STEP_COMPETITORS),
        *inference_grids(results),
        shortfall_grid(results),
    ]


def _figures(results: Results) -> dict[str, Figure | None]:
    from sparsekd.bench import figures  # matplotlib: not worth loading to measure

    return {
        "speedup_layers": figures.speedup_layers(results, LAYER_COMPETITORS),
        "speedup_models": figures.speedup_models(results, STEP_COMPETITORS),
        "speedup_inference": figures.speedup_models(results, INFERENCE_COMPETITORS, "inference"),
    }


SUITE = Suite(
    title="sparsekd bench",
    command="sparsekd bench",
    help="""Time layers, training steps and inference against dense engines; show where dense wins.

    \b
    sparsekd bench
    sparsekd bench --level step --network resnet18 --sparsity 0.9,0.95 --batch 64
    sparsekd bench --model net.py:make --input 128,3,32,32 --layout csr,bcsr:16
    sparsekd bench --level inference --network resnet50,encoder --deepsparse ds/bin/python
    sparsekd bench --draw --format pdf
    """,
    levels={"layer": _layers, "step": _steps, "inference": _inference},
    competitors=tuple({**LAYER_COMPETITORS, **STEP_COMPETITORS, **INFERENCE_COMPETITORS}),
    grids=_grids,
    figures=_figures,
)
