"""The tables of the arena, built from rows; printed with rich or written as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsekd.bench.arms import LAYER_ARMS
from sparsekd.bench.cases import PASSES, LayerCase
from sparsekd.bench.results import Results, fit
from sparsekd.bench.roofline import roof
from sparsekd.bench.steps import STEP_ARMS
from sparsekd.bench.waterfall import PARTS
from sparsekd.diagnose.peaks import Peaks
from sparsekd.train import Row

Cell = float | str | None
LAYER_GEOMEANS = (
    "sparsekd",
    "sparsekd_contiguous",
    "sparseprop",
    "torch_csr",
)
OURS = (
    "sparsekd",
    "sparsekd_contiguous",
    "sparsekd_optimized",
    "sparsekd_optimized_contiguous",
)


@dataclass
class Grid:
    """Hold a table: the first column names the line, the others are right-aligned.

    Args:
        title: above it.
        header: of the columns.
        lines: of cells, already text.
        note: below it.
    """

    title: str
    header: Sequence[str]
    lines: list[list[str]] = field(default_factory=list)
    note: str = ""

    def rich(self) -> Table:
        """Return it for a terminal."""
        result = Table(
            title=self.title,
            title_justify="left",
            caption=self.note or None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for number, name in enumerate(self.header):
            result.add_column(name, justify="right" if number else "left", no_wrap=not number)
        for line in self.lines:
            result.add_row(*line)
        return result

    def markdown(self) -> str:
        """Return it as Markdown."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [list(self.header), rule, *self.lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        note = f"\n{self.note}\n" if self.note else ""
        return f"### {self.title}\n\n{body}\n{note}"


def _text(value: Cell, form: str = ".1f", unit: str = "") -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:{form}}{unit}"


def percent(sparsity: float) -> str:
    """Write a sparsity as tables and figures do.

    Example:
        >>> percent(0.9), percent(0.995)
        ('90 %', '99.5 %')
    """
    return f"{100 * sparsity:.4g} %"


def layer_grid(results: Results, kind: str) -> Grid | None:
    """Tell per layer how much faster than dense ours is, and than the best rival.

    Args:
        results: the rows.
        kind: "conv" or "linear".
    """
    cases = layer_cases(results, kind)
    sparsities = results.sparsities("layer")
    if not cases:
        return None
    rivals = ("torch_csr", "sparseprop", "sparselab")
    header = ["layer", "dense ms", "bf16", *map(percent, sparsities), "vs best rival"]
    grid = Grid(
        "Convolutions, forward + backward"
        if kind == "conv"
        else "Linear layers, forward + backward",
        header,
        note="Times faster than float32 dense in its better layout, in turns with it; bf16 is "
        "dense in bfloat16. The last column gives time over the fastest rival's at "
        + " / ".join(percent(s) for s in sparsities if s >= 0.8)
        + ".",
    )
    for case in cases:
        rows = [results.find("layer", case, "layer", "sparsekd", s) for s in sparsities]
        dense = next((results.dense_ms(row) for row in rows if row), None)
        bf16 = results.speedup(results.find("layer", case, "layer", "dense_bf16"))
        ratios = [
            _over_rivals(results, case, s, rivals) for s in sparsities if s >= LAYER_RIVALS_FROM
        ]
        grid.lines.append(
            [case, _text(dense), _text(bf16, ".1f", "x")]
            + [_text(results.speedup(row), ".2f", "x") for row in rows]
            + [" / ".join(_text(ratio, ".1f", "x") for ratio in ratios)]
        )
    for arm in LAYER_GEOMEANS:
        means = [results.geomean(arm, s, cases) for s in sparsities]
        if kind == "conv" and any(mean is not None for mean in means):
            label = LAYER_ARMS[arm].label
            cells = [_text(mean, ".2f", "x") for mean in means]
            grid.lines.append([f"geometric mean, {label}", "", "", *cells, ""])
    return grid


LAYER_RIVALS_FROM = LAYER_ARMS["sparseprop"].least


def layer_cases(results: Results, kind: str) -> list[str]:
    """List the measured layers of a kind."""
    linear = [case for case in results.cases("layer") if case.startswith("linear")]
    if kind == "linear":
        return linear
    return [case for case in results.cases("layer") if case not in linear]


def _over_rivals(
    results: Results, case: str, sparsity: float, rivals: Sequence[str]
) -> float | None:
    ours = results.find("layer", case, "layer", "sparsekd", sparsity)
    theirs = [results.find("layer", case, "layer", rival, sparsity) for rival in rivals]
    times = [row["ms"] for row in theirs if row and row["ms"]]
    return min(times) / ours["ms"] if ours and ours["ms"] and times else None


def step_grid(results: Results, level: str = "step") -> Grid | None:
    """Tell per network what a training step, or an epoch, takes and how much faster ours is."""
    sparsities = results.sparsities(level)
    if not results.cases(level):
        return None
    grid = Grid(
        "Whole training steps" if level == "step" else "Whole epochs",
        ["network", "arm", "dense or 0 %", *map(percent, sparsities)],
        note="Milliseconds and, in brackets, times faster than float32 dense in its better layout. "
        "First convolution and last linear layer dense, the others uniformly sparse.",
    )
    for case in results.cases(level):
        for arm in STEP_ARMS.values():
            rows = {row["sparsity"]: row for row in results.rows(level, arm=arm.name, case=case)}
            if any(row["ms"] is not None for row in rows.values()):
                cells = [_timed(results, rows.get(s)) for s in (None, *sparsities)]
                grid.lines.append([case, arm.label, *cells])
        if level == "epoch":
            grid.title = f"Whole epochs: {next(iter(rows.values()))['op']}" if rows else grid.title
    return grid


def _timed(results: Results, row: Row | None) -> str:
    if row is None or row["ms"] is None:
        return "-"
    return f"{row['ms']:.0f} ({_text(results.speedup(row), '.2f', 'x')})"


def truth_grid(results: Results) -> Grid | None:
    """Tell how much of the operations saved became time saved."""
    lines = []
    for row, dense, arm in best_steps(results):
        saved, gained = 1 - row["flops"] / dense["flops"], 1 - row["ms"] / dense["ms"]
        lines.append(
            [
                f"{row['case']}, {percent(row['sparsity'])}",
                arm,
                f"{dense['flops'] / 1e9:.1f} / {row['flops'] / 1e9:.1f}",
                f"{dense['bytes'] / 1e9:.2f} / {row['bytes'] / 1e9:.2f}",
                f"{dense['ms']:.0f} / {row['ms']:.0f}",
                f"{saved:.1%}",
                f"{gained:.1%}",
                f"{gained / saved:.0%}" if saved else "-",
            ]
        )
    header = ["network", "arm", "GFLOP", "GB", "ms", "FLOPs saved", "time saved", "became time"]
    note = (
        "Dense / sparse, one training step. FLOPs are exact: two for every stored weight, position "
        "and pass, without the first layer's input gradient. Bytes are computed layer by layer, "
        "nothing staying in a cache: two maps and the nonzeros a pass, eight maps for BatchNorm, "
        "five for ReLU, five words a parameter for SGD."
    )
    return Grid("FLOPs against time", header, lines, note) if lines else None


def best_steps(results: Results) -> list[tuple[Row, Row, str]]:
    """Pair the fastest of our arms in each step with dense in its better layout."""
    found = []
    for case in results.cases("step"):
        for sparsity in results.sparsities("step"):
            ours = [results.find("step", case, "step", arm, sparsity) for arm in OURS]
            timed = [row for row in ours if row and row["ms"] is not None]
            if not timed:
                continue
            row = min(timed, key=lambda row: row["ms"])
            dense = results.dense(row)
            if dense is not None:
                found.append((row, dense, STEP_ARMS[row["arm"]].label))
    return found


def roofline_rows(results: Results) -> list[Row]:
    """Hold every sparse pass against its roof.

    Args:
        results: with the rows of the levels "op" and "peaks".

    Returns:
        A row a (layer, pass, sparsity) in the faster of our layouts: `gflops`, `bound`,
        `roof_gflops`, `fraction`, `intensity` (FLOPs a byte of memory).
    """
    measured = [row for row in results.rows("peaks") if "flops" in row]
    if not measured:
        return []
    top = measured[-1]
    peaks = Peaks(top["flops"], top["l2"], top["l3"], top["memory"])
    found = []
    for case in results.cases("op"):
        for name in PASSES:
            for sparsity in results.sparsities("op"):
                ours = [
                    results.find("op", case, name, f"sparsekd_{layout}", sparsity)
                    for layout in ("channels_last", "contiguous")
                ]
                timed = [row for row in ours if row and row["ms"] is not None]
                if not timed:
                    continue
                row = min(timed, key=lambda row: row["ms"])
                limit = roof(
                    LayerCase(**row["layer"]),
                    name,
                    row["nnz"],
                    peaks,
                    l1=top["l1"],
                    last_level=top["last_level"],
                )
                found.append(
                    {
                        "case": case,
                        "op": name,
                        "sparsity": sparsity,
                        "gflops": row["flops"] / row["ms"] / 1e6,
                        "bound": limit.bound,
                        "roof_gflops": limit.flops / limit.seconds / 1e9,
                        "fraction": limit.seconds * 1e3 / row["ms"],
                        "intensity": limit.flops / limit.bytes,
                    }
                )
    return found


def roofline_grid(rows: Sequence[Row]) -> Grid | None:
    """Tell per pass the useful GFLOP/s, the roof above it and the share of it reached."""
    if not rows:
        return None
    sparsities = sorted({row["sparsity"] for row in rows})
    grid = Grid(
        "Useful GFLOP/s of single passes, and the roof they stand against",
        ["layer, pass", *map(percent, sparsities)],
        note="GFLOP/s at the nonzeros, the binding roof and the share of it reached.",
    )
    table = {(row["case"], row["op"], row["sparsity"]): row for row in rows}
    for case, name in dict.fromkeys((row["case"], row["op"]) for row in rows):
        cells = []
        for sparsity in sparsities:
            row = table.get((case, name, sparsity))
            cells.append(
                f"{row['gflops']:.0f} {row['bound']} {row['fraction']:.0%}" if row else "-"
            )
        grid.lines.append([f"{case} {name}", *cells])
    return grid


def waterfall_grid(results: Results) -> Grid | None:
    """Tell where the time of a step goes."""
    rows = [row for row in results.rows("waterfall") if "parts" in row]
    if not rows:
        return None
    header = [part.removeprefix("conv ") for part in PARTS]
    grid = Grid("Where a training step's time goes, ms", ["network: arm", *header, "sum"])
    for row in rows:
        grid.lines.append(
            [waterfall_label(row)]
            + [f"{row['parts'][part]:.0f}" for part in PARTS]
            + [f"{row['ms']:.0f}"]
        )
    return grid


def waterfall_label(row: Row) -> str:
    """Name a bar of the waterfall."""
    at = "" if row["sparsity"] is None else f", {percent(row['sparsity'])}"
    return f"{row['case']}: {STEP_ARMS[row['arm']].label}{at}"


def memory_grid(results: Results) -> Grid | None:
    """Tell the peak memory of a training step."""
    rows = [row for row in results.rows("memory") if "live_mib" in row]
    if not rows:
        return None
    grid = Grid(
        "Peak memory of a training step, MiB",
        ["network", "arm", "live", "of dense", "held", "plans", "resident"],
        note="Held between steps are parameters, gradients, momentum and indices; plans are what "
        "the compiled module keeps beside them; live is both and the tensors of a step at their "
        "peak, against dense in its leaner layout. Resident is the peak of a process over three "
        "steps, with whatever holes the allocator left.",
    )
    for case in results.cases("memory"):
        group = [row for row in rows if row["case"] == case]
        dense = min((r["live_mib"] for r in group if r["sparsity"] is None), default=None)
        for row in group:
            at = "" if row["sparsity"] is None else f", {percent(row['sparsity'])}"
            share = row["live_mib"] / dense if dense else None
            grid.lines.append(
                [
                    case,
                    STEP_ARMS[row["arm"]].label + at,
                    f"{row['live_mib']:.0f}",
                    _text(share, ".2f"),
                    f"{row['held_mib']:.0f}",
                    f"{row['plans_mib']:.0f}",
                    f"{row['peak_mib']:.0f}",
                ]
            )
    return grid


def density_grid(results: Results) -> Grid | None:
    """Tell the line that a step's time follows against density, and its intercept."""
    grid = Grid(
        "Time of a step against density",
        ["network, arm", "at density 0, ms", "per 10 % of density, ms", "R²", "intercept / dense"],
        note="Least squares from 80 % sparsity on; below, some layers run dense. The intercept is "
        "what a step costs without any multiplication in the sparse layers.",
    )
    for case in results.cases("step"):
        for arm in OURS:
            rows = [r for r in results.rows("step", arm=arm, case=case) if r["ms"] is not None]
            line = fit([(1 - row["sparsity"], row["ms"]) for row in rows])
            dense = results.dense_ms(rows[-1]) if rows else None
            if line and dense:
                grid.lines.append(
                    [
                        f"{case}, {STEP_ARMS[arm].label}",
                        f"{line.intercept:.1f}",
                        f"{line.slope / 10:.1f}",
                        f"{line.r2:.3f}",
                        f"{line.intercept / dense:.2f}",
                    ]
                )
    return grid if grid.lines else None


def shortfall_grid(results: Results) -> Grid | None:
    """Tell who has no time and why."""
    counts: dict[tuple[str, str, str], int] = {}
    for outcome, rows in results.shortfalls().items():
        for row in rows:
            key = (row["arm"], outcome, row[outcome])
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        return None
    lines = [[arm, outcome, reason, str(n)] for (arm, outcome, reason), n in sorted(counts.items())]
    return Grid("Arms without a time", ["arm", "what", "why", "rows"], lines)
