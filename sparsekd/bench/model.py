"""A benchmark of any model: whole steps and layers, dense against sparse at several sparsities."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor, nn

from sparsekd.bench import machine
from sparsekd.bench.cases import BASELINES
from sparsekd.bench.given import LEVEL, Arguments, GivenCase, GivenRace
from sparsekd.bench.race import Key, Session
from sparsekd.bench.results import Results
from sparsekd.bench.runner import run
from sparsekd.bench.steps import STEP_COMPETITORS
from sparsekd.bench.suite import BenchConfig, Suite, step_races
from sparsekd.bench.tables import Grid, cell, percent, shortfall_grid
from sparsekd.diagnose import coverage, explain, flops
from sparsekd.layouts import Layout
from sparsekd.nn import sparse_modules, sparsify
from sparsekd.sparsity import layers_to_prune
from sparsekd.train import MetricsLog, Row

SPARSITIES = (0.8, 0.9, 0.95)
COMPETITORS = {
    name: STEP_COMPETITORS[name]
    for name in (
        "dense_contiguous", "dense_channels_last", "dense_bf16", "sparsekd", "sparsekd_optimized",
    )
}  # fmt: skip
_ROUNDS, _MOST_GAIN = 5, 5


@dataclass(frozen=True)
class LayerTimes:
    """The time of every layer of a model, sparse and dense.

    Args:
        case: the model.
        sparsities: the layers are timed at the middle one; at the others a line through their times
            at several densities tells what they take.
        how: arguments of `sparsify` besides the sparsity.
    """

    case: GivenCase
    sparsities: tuple[float, ...]
    how: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return (LEVEL, self.case.title, f"layers {self.how.get('layout', 'csr')}")

    @property
    def timed(self) -> float:
        """The sparsity that layers are timed at."""
        return self.sparsities[len(self.sparsities) // 2]

    def keys(self) -> list[Key]:
        """List the rows it gives: one, with all layers."""
        return [("layers", self.timed)]

    def measure(self) -> list[Row]:
        """Measure it."""
        nnz = {sparsity: self._nnz(sparsity) for sparsity in self.sparsities}
        model = sparsify(self.case.build(), sparsity=self.timed, **self.how)
        inputs = self.case.inputs.contiguous(torch.channels_last)
        found = explain(model, args=inputs.args, kwargs=dict(inputs.kwargs))
        counted = flops.count(model, args=inputs.args, kwargs=dict(inputs.kwargs))
        operations = {layer.name: 3 * layer.flops_dense for layer in counted.layers}
        layers = [
            {
                "name": layer.name,
                "shape": layer.shape,
                "flops_dense": operations.get(layer.name, 0),
                "ms": layer.ms,
                "dense_ms": layer.dense_ms,
                "bf16_ms": layer.bf16_ms,
                "break_even": layer.break_even,
                "at": [
                    [sparsity, layer.ms_at(count[layer.name])] for sparsity, count in nnz.items()
                ],
            }
            for layer in found.layers
        ]
        dense = [[part.name, part.share] for part in coverage(model).dense]
        row = {"arm": "layers", "sparsity": self.timed, "ms": found.ms, "layers": layers}
        return [{**row, "flops_dense": counted.train_dense, "dense": dense}]

    def _nnz(self, sparsity: float) -> dict[str, int]:
        model = sparsify(copy.deepcopy(self.case.model), sparsity=sparsity, **self.how)
        return {name: layer.values.numel() for name, layer in sparse_modules(model)}


def given_suite(
    case: GivenCase, layouts: Sequence[str] = ("csr",), how: Mapping[str, Any] | None = None
) -> Suite:
    """Return the benchmark of a user's model.

    Args:
        case: the model.
        layouts: of the masks, each raced by itself.
        how: arguments of `sparsify` besides sparsity and layout.

    Raises:
        UnsupportedError: a layout is not known.
        ValueError: the model has no layer that could be sparse.
    """
    layers_to_prune(case.model, (how or {}).get("skip", ()))
    named = [str(Layout.parse(layout)) for layout in layouts]

    def sessions(config: BenchConfig) -> Iterator[Session]:
        sparsities = tuple(sorted(config.sparsities or SPARSITIES))
        chosen = config.chosen(COMPETITORS, COMPETITORS)
        for layout in named:
            given = {**(how or {}), "layout": layout}
            race = partial(GivenRace, how=given)
            yield from step_races(race, case, sparsities, chosen, config.rounds or _ROUNDS)
            yield LayerTimes(case, sparsities, given)
            chosen = {n: c for n, c in chosen.items() if c.sparse or n in BASELINES}

    return Suite(
        title=f"Benchmark of {case.name}",
        command="sparsekd bench --model",
        help="",
        levels={LEVEL: sessions},
        competitors=tuple(COMPETITORS),
        grids=lambda results: grids(results, case.title),
        figures=lambda results: {},
    )


def grids(results: Results, case: str) -> list[Grid | None]:
    """Make the tables of a model: steps, their work and memory, layers."""
    order = list(COMPETITORS)
    steps = [row for row in results.rows(LEVEL, case=case) if row["op"].startswith("step")]
    steps.sort(key=lambda row: order.index(row["arm"]))
    layers = [row for row in results.rows(LEVEL, case=case) if row["op"].startswith("layers")]
    return [
        _step_grid(results, case, steps),
        _work_grid(case, steps),
        *(_layer_grid(row) for row in layers if "layers" in row),
        shortfall_grid(results),
    ]


def _layout(row: Row) -> str:
    return row["op"].partition(" ")[2]


def _step_grid(results: Results, case: str, rows: Sequence[Row]) -> Grid | None:
    sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"] is not None})
    lines: dict[str, dict[float | None, str]] = {}
    for row in rows:
        if row["ms"] is not None:
            sparse = COMPETITORS[row["arm"]].sparse
            label = COMPETITORS[row["arm"]].label + (f", {_layout(row)}" if sparse else "")
            text = f"{row['ms']:.3g} ({cell(results.speedup(row), '.2f', 'x')})"
            lines.setdefault(label, {})[row["sparsity"]] = text
    if not lines:
        return None
    return Grid(
        f"Training steps of {case}",
        ["competitor", "dense", *map(percent, sparsities)],
        [
            [label, *(cells.get(s, "-") for s in (None, *sparsities))]
            for label, cells in lines.items()
        ],
        "Milliseconds of forward, loss, backward and SGD; in brackets times faster than dense "
        "float32 in its better layout.",
    )


def _work_grid(case: str, rows: Sequence[Row]) -> Grid | None:
    timed = {_who(row): row for row in rows if row["ms"] is not None and "live_mib" in row}
    dense = [row for row in timed.values() if row["arm"] in BASELINES]
    if not dense:
        return None
    least = min(dense, key=lambda row: row["live_mib"])
    grid = Grid(
        "Work and memory of a step",
        ["competitor", "GFLOP", "of dense", "held, MiB", "peak, MiB", "of dense"],
        note="Held are parameters, indices, gradients and momentum; the peak has the tensors of a "
        "step, too. Of dense: of float32 dense in the layout that needs less memory.",
    )
    for who, row in timed.items():
        grid.lines.append(
            [
                who,
                f"{row['flops'] / 1e9:.3g}",
                f"{row['flops'] / max(least['flops'], 1):.3f}",
                f"{row['held_mib']:.1f}",
                f"{row['live_mib']:.1f}",
                f"{row['live_mib'] / least['live_mib']:.2f}",
            ]
        )
    return grid


def _who(row: Row) -> str:
    at = "" if row["sparsity"] is None else f", {_layout(row)} {percent(row['sparsity'])}"
    return COMPETITORS[row["arm"]].label + at


def _layer_grid(row: Row) -> Grid:
    sparsities = [sparsity for sparsity, _ in row["layers"][0]["at"]] if row["layers"] else []
    grid = Grid(
        f"Layers, forward and backward, ms ({_layout(row)})",
        ["layer", "weight", "FLOPs", "dense", "bf16", *map(percent, sparsities), "break-even"],
        note=_gains(row),
    )
    for layer in row["layers"]:
        even = layer["break_even"]
        grid.lines.append(
            [
                layer["name"],
                "x".join(map(str, layer["shape"])),
                f"{layer['flops_dense'] / max(row['flops_dense'], 1):.1%}",
                f"{layer['dense_ms']:.3g}",
                cell(layer["bf16_ms"], ".3g"),
                *(cell(ms, ".3g") for _, ms in layer["at"]),
                "never" if even is None else f"{even:.0%}",
            ]
        )
    return grid


def _gains(row: Row) -> str:
    """Say which layers gain most, which lose, and what stays dense."""
    gains = {
        layer["name"]: layer["dense_ms"] - ms
        for layer in row["layers"]
        for sparsity, ms in layer["at"]
        if sparsity == row["sparsity"]
    }
    best = sorted(gains, key=lambda name: -gains[name])[:_MOST_GAIN]
    parts = [
        "Sparse layers on the sparse kernels; the dispatcher runs a layer dense where that is "
        "faster.",
        f"Most to gain at {percent(row['sparsity'])}: "
        + ", ".join(f"{name} ({gains[name]:.3g} ms)" for name in best if gains[name] > 0)
        + ".",
    ]
    lose = [name for name, gain in gains.items() if gain <= 0]
    if lose:
        parts.append(f"Faster dense: {', '.join(lose)}.")
    if row["dense"]:
        stays = ", ".join(f"{name} ({share:.1%} of the parameters)" for name, share in row["dense"])
        parts.append(f"Stays dense: {stays}.")
    return " ".join(parts)


@dataclass(frozen=True)
class ModelBench:
    """What a model takes dense and sparse; print it for tables.

    Args:
        case: title of the model.
        results: the rows; those of steps have `ms`, `times`, `flops`, `nnz`, `held_mib` and
            `live_mib` by `arm`, `sparsity` and layout (`op`), that of layers a list `layers`.
    """

    case: str
    results: Results = field(repr=False)

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return self.results.rows(LEVEL, case=self.case)

    def speedup(self, sparsity: float, layout: str = "csr") -> float | None:
        """Return how many times faster than dense the model is after `optimize`."""
        row = self.results.find(LEVEL, self.case, f"step {layout}", "sparsekd_optimized", sparsity)
        return self.results.speedup(row)

    def _grids(self) -> list[Grid]:
        return [grid for grid in grids(self.results, self.case) if grid is not None]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for grid in self._grids():
            yield grid.rich()

    def __str__(self) -> str:
        return "\n".join(grid.markdown() for grid in self._grids())


def bench_model(
    model: nn.Module,
    *args: Any,
    sparsities: Sequence[float] = SPARSITIES,
    layouts: Sequence[str] = ("csr",),
    loss: Callable[[Any], Tensor] | None = None,
    distribution: str = "erk",
    skip: Sequence[str] = (),
    rounds: int = _ROUNDS,
    **kwargs: Any,
) -> ModelBench:
    """Time training steps and layers of a model, dense against sparse at several sparsities.

    Steps are forward, loss, backward and SGD with momentum: dense in both layouts and, where the
    processor has it, in bfloat16; sparse, and sparse after `optimize`. Competitors take turns, and
    the gradients of each are compared with dense ones first. Layers are timed as `explain` does.
    The model itself is not changed. The process keeps its memory from then on (`keep_memory_warm`).

    Args:
        model: dense.
        *args: its inputs, the batch included.
        sparsities: of the whole model.
        layouts: of the masks, as `sparsify` takes them.
        loss: takes the output and returns the loss; by default the output's own `loss`, or the mean
            square of everything in the output that has a gradient.
        distribution: "uniform", "er" or "erk".
        skip: names or patterns of layers that stay dense.
        rounds: turns of each competitor.
        **kwargs: inputs by name.

    Returns:
        Rows and tables.

    Raises:
        UnsupportedError: a sparsity is outside [0, 1) or a layout not known.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> found = bench_model(net, torch.randn(16, 64), sparsities=(0.9,), rounds=1)
        >>> found.speedup(0.9) > 0
        True
    """
    case = GivenCase(type(model).__name__, model, Arguments(args, kwargs), loss)
    how = {"distribution": distribution, "skip": tuple(skip)}
    config = BenchConfig(sparsities=tuple(sparsities), rounds=rounds)
    suite = given_suite(case, layouts, how)
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder) / "rows.jsonl")
        run(suite.sessions(config), log, machine.describe(), Console(quiet=True))
        return ModelBench(case.title, Results(log.rows()))
