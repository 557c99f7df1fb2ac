"""Races over inference: frozen networks, eval mode, and engines that run dense networks."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.bench import gate
from sparsekd.bench.inference_cases import InferenceCase, InferenceProblem
from sparsekd.bench.onnx_engines import ENGINES, Elsewhere
from sparsekd.bench.race import Competitor, Race, Ready, by_name
from sparsekd.bench.results import Results
from sparsekd.bench.steps import jittered_model
from sparsekd.bench.tables import Grid, cell, percent
from sparsekd.diagnose import flops
from sparsekd.frozen import FrozenModule, freeze
from sparsekd.nn import densify
from sparsekd.ops.dispatch.backends import load
from sparsekd.train import Row, to_channels_last

Run = Callable[[], Any]
InferenceCompetitor = Competitor[InferenceProblem, Run]
_LAST = torch.channels_last
_SECONDS = 0.2  # for each of what floors are made of
_FROM_MEMORY = 1 << 29  # bytes, more than caches hold


def _dense(
    wrap: Callable[[nn.Module], Any] | None = None, layout: torch.memory_format | None = None
) -> Callable[[InferenceProblem], Run]:
    def build(problem: InferenceProblem) -> Run:
        model: Any = copy.deepcopy(problem.dense)
        x = problem.x
        if layout is not None:
            model, x = to_channels_last(model), x.contiguous(memory_format=layout)
        return partial(wrap(model) if wrap else model, x)

    return build


def _compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(model)


def _onnx(engine: str) -> Callable[[InferenceProblem], Run]:
    def build(problem: InferenceProblem) -> Run:
        call = ENGINES[engine](problem.onnx, problem.case.batch, problem.case.threads)
        return partial(call, problem.x.numpy())

    return build


def _deepsparse(problem: InferenceProblem) -> Run:
    """Run DeepSparse in its own interpreter; a turn has a message there and back in it."""
    import numpy

    case = problem.case
    assert case.deepsparse
    engine = Elsewhere(
        case.deepsparse, "deepsparse", problem.old_onnx, problem.images, case.threads
    )
    result = torch.from_numpy(numpy.load(engine.result))

    def run() -> Tensor:
        engine()
        return result

    weakref.finalize(run, engine.close)
    return run


def _missing(*packages: str) -> Callable[[InferenceCase], str | None]:
    def missing(case: InferenceCase) -> str | None:
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    return missing


def _of_maps(case: InferenceCase) -> str | None:
    return None if len(case.shape) == 3 else "channels_last is for maps"


def _deepsparse_missing(case: InferenceCase) -> str | None:
    if case.deepsparse:
        return None
    return "no interpreter with DeepSparse was named by --deepsparse"


_COMPILED = ("dense_compiled", "dense_compiled_last")
DENSE_ENGINES = by_name(
    InferenceCompetitor("dense_contiguous", "dense, contiguous", _dense()),
    InferenceCompetitor("dense_channels_last", "dense, channels_last", _dense(None, _LAST),
                        _of_maps),
    InferenceCompetitor("dense_compiled", "dense, torch.compile", _dense(_compiled)),
    InferenceCompetitor("dense_compiled_last", "dense, torch.compile, channels_last",
                        _dense(_compiled, _LAST), _of_maps),
    InferenceCompetitor("onnxruntime", "ONNX Runtime", _onnx("onnxruntime"),
                        _missing("onnxruntime", "onnxscript")),
    InferenceCompetitor("openvino", "OpenVINO", _onnx("openvino"),
                        _missing("openvino", "onnxscript")),
)  # fmt: skip
SPARSE_ENGINES = by_name(
    InferenceCompetitor("deepsparse", "DeepSparse", _deepsparse, _deepsparse_missing, sparse=True),
    InferenceCompetitor("sparsekd_eval", "sparsekd, eval mode",
                        lambda problem: partial(problem.model, problem.x), sparse=True),
    InferenceCompetitor("sparsekd_frozen", "sparsekd, frozen",
                        lambda problem: partial(freeze(problem.model, problem.x), problem.x),
                        sparse=True),
)  # fmt: skip
INFERENCE_COMPETITORS = {**DENSE_ENGINES, **SPARSE_ENGINES}
USUAL = frozenset(INFERENCE_COMPETITORS) - frozenset(_COMPILED)
"""Compiling takes longer than all the rest."""


@dataclass(frozen=True)
class InferenceRace(Race):
    """A race over batches of one network at one sparsity, every engine on the case's threads."""

    least = 0.25  # seconds: a server calls a network again while its weights are in the caches

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("inference", self.case.title, "inference")

    def measure(self) -> list[Row]:
        """Measure the rows."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.case.threads)
        try:
            return super().measure()
        finally:
            torch.set_num_threads(before)

    def _problems(self) -> Iterator[tuple[InferenceProblem, Tensor, float]]:
        for sparsity in self.sparsities:
            problem = InferenceProblem.of(self.case, sparsity)
            dense = problem.dense  # made here: copies of inference mode track no versions
            with torch.inference_mode():
                right = dense(problem.x)
            yield problem, right, _noise(problem, right)

    def _work(self, competitor: Any, given: tuple[InferenceProblem, Tensor, float]) -> Row:
        problem = given[0]
        model = copy.deepcopy(problem.model).to("meta")  # nothing is computed
        counted = flops.count(
            model if competitor.sparse else densify(model), (self.case.batch, *self.case.shape)
        )
        # Speed-ups refer to the fastest dense engine.
        baseline = not competitor.sparse
        return {"nnz": counted.nnz, "flops": counted.forward, "baseline": baseline}

    def _ready(self, competitor: Any, given: tuple[InferenceProblem, Tensor, float]) -> Ready:
        problem, right, noise = given
        run = competitor.build(problem)

        def call() -> object:
            with torch.inference_mode():
                return run()

        error = gate.relative_error(torch.as_tensor(call()), right)
        frozen = getattr(run, "func", None)
        facts = floors(problem, frozen) if isinstance(frozen, FrozenModule) else {}
        return Ready(call, {"output": error}, {"output": 4 * noise}, facts)


def _noise(problem: InferenceProblem, right: Tensor) -> float:
    """Return how far rounding moves the results; a rounding unit at the least."""
    moved = jittered_model(problem.dense, torch.float32)
    with torch.inference_mode():
        error = gate.relative_error(moved(problem.x), right)
    return max(error, torch.finfo(torch.float32).eps)


def floors(problem: InferenceProblem, frozen: FrozenModule) -> Row:
    """Measure what a batch takes at the least, in milliseconds.

    Returns:
        `floor_ms`: the multiplications with nonzeros at this processor's peak; `floor_maps_ms`:
        that, and the result of every layer once from memory.
    """
    cpp, _ = load("cpp")
    if cpp is None:
        return {}
    case = problem.case
    products = case.batch * sum(island.products for island in frozen.islands)
    floor = 2e3 * products / cpp.peak_flops(case.threads, _SECONDS)
    read = cpp.read_bandwidth(_FROM_MEMORY, case.threads, _SECONDS)
    return {"floor_ms": floor, "floor_maps_ms": floor + 1e3 * _map_bytes(problem) / read}


def _map_bytes(problem: InferenceProblem) -> int:
    kept = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.LayerNorm)  # the others become part of these
    sizes: list[int] = []
    hooks = [
        module.register_forward_hook(lambda _, __, y: sizes.append(y.nbytes))
        for module in problem.dense.modules()
        if isinstance(module, kept)
    ]
    with torch.inference_mode():
        problem.dense(problem.x)
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def inference_grids(results: Results) -> list[Grid | None]:
    """Tabulate latency with its spread and factor, and throughput."""
    if not results.rows("inference"):
        return [None]
    return [
        _grid(
            results, "Latency of a batch", _latency,
            "Milliseconds, half of the range between the quartiles, and in brackets times faster "
            "than the fastest dense engine measured in turns with it; below 1 it loses. A turn is "
            "calls for a quarter of a second, one at least. DeepSparse has a process of its own; a "
            "message there and back counts.",
        ),
        _grid(results, "Throughput", _throughput, "Images a second."),
        _floor_grid(results),
    ]  # fmt: skip


def _grid(results: Results, title: str, text: Callable[[Results, Row], str], note: str) -> Grid:
    sparsities = results.sparsities("inference")
    grid = Grid(title, ["network", "engine", "dense", *map(percent, sparsities)], note=note)
    for case in results.cases("inference"):
        for name, competitor in INFERENCE_COMPETITORS.items():
            rows = {r["sparsity"]: r for r in results.rows("inference", name=name, case=case)}
            if any(row["ms"] is not None for row in rows.values()):
                cells = [
                    text(results, rows[s]) if s in rows and rows[s]["ms"] is not None else "-"
                    for s in (None, *sparsities)
                ]
                grid.lines.append([case, competitor.label, *cells])
    return grid


def _floor_grid(results: Results) -> Grid | None:
    sparsities = results.sparsities("inference")
    grid = Grid(
        "How near frozen networks come to their floors",
        ["network", *map(percent, sparsities)],
        note="The multiplications with nonzeros at this processor's peak, and that with every map "
        "read from memory once, over the time of the frozen network.",
    )
    for case in results.cases("inference"):
        rows = {
            row["sparsity"]: row
            for row in results.rows("inference", name="sparsekd_frozen", case=case)
            if row["ms"] and "floor_ms" in row
        }
        if rows:
            cells = [_floors(rows[s]) if s in rows else "-" for s in sparsities]
            grid.lines.append([case, *cells])
    return grid if grid.lines else None


def _floors(row: Row) -> str:
    return ", ".join(f"{row[key] / row['ms']:.0%}" for key in ("floor_ms", "floor_maps_ms"))


def _latency(results: Results, row: Row) -> str:
    factor = cell(results.speedup(row), ".2f", "x")
    return f"{row['ms']:.2f} ±{_spread(row['times']):.2f} ({factor})"


def _spread(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2


def _throughput(results: Results, row: Row) -> str:
    return f"{1e3 * row['batch'] / row['ms']:,.0f}"
