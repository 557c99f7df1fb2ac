"""The tables of a benchmark, built from rows; printed with rich or written as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsekd.bench.layers import RIVALS_FROM
from sparsekd.bench.race import Field, is_ours
from sparsekd.bench.results import Results
from sparsekd.terminal import Columns
from sparsekd.train import Row


@dataclass
class Grid:
    """A table: the first column names the line, the others are right-aligned.

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

    def rich(self) -> Columns:
        """Return it for a terminal."""
        return Columns(self.header, self.lines, self.title, self.note)

    def markdown(self) -> str:
        """Return it as Markdown."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [list(self.header), rule, *self.lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        note = f"\n{self.note}\n" if self.note else ""
        return f"### {self.title}\n\n{body}\n{note}"


def cell(value: float | None, form: str = ".1f", unit: str = "") -> str:
    """Write a number into a cell; a dash stands for what was not measured."""
    return "-" if value is None else f"{value:{form}}{unit}"


def percent(sparsity: float) -> str:
    """Write a sparsity as tables and figures do.

    Example:
        >>> percent(0.9), percent(0.995)
        ('90 %', '99.5 %')
    """
    return f"{100 * sparsity:.4g} %"


def layer_grid(results: Results, kind: str, competitors: Field) -> Grid | None:
    """Tabulate how much faster than dense layers of a kind are, and than the best other package."""
    cases = layer_cases(results, kind)
    sparsities = results.sparsities("layer")
    if not cases:
        return None
    title = "Convolutions" if kind == "conv" else "Linear layers"
    rivals = [name for name, entry in competitors.items() if entry.sparse and not is_ours(name)]
    late = [s for s in sparsities if s >= RIVALS_FROM]
    grid = Grid(
        f"{title}, forward + backward",
        ["layer", "dense ms", "bf16", *map(percent, sparsities), "vs best rival"],
        note="Times faster than float32 dense in its better layout, in turns with it; bf16 is "
        "dense in bfloat16. The last column gives time over the fastest rival's at "
        + " / ".join(map(percent, late))
        + ".",
    )
    for case in cases:
        rows = [results.find("layer", case, "layer", "sparsekd", s) for s in sparsities]
        dense = next((results.dense_ms(row) for row in rows if row), None)
        bf16 = results.speedup(results.find("layer", case, "layer", "dense_bf16"))
        ratios = [_over_rivals(results, case, s, rivals) for s in late]
        grid.lines.append(
            [case, cell(dense), cell(bf16, ".1f", "x")]
            + [cell(results.speedup(row), ".2f", "x") for row in rows]
            + [" / ".join(cell(ratio, ".1f", "x") for ratio in ratios)]
        )
    for name in geomeans(competitors) if kind == "conv" else ():
        means = [results.geomean(name, s, cases) for s in sparsities]
        if any(mean is not None for mean in means):
            cells = [cell(mean, ".2f", "x") for mean in means]
            label = f"geometric mean, {competitors[name].label}"
            grid.lines.append([label, "", "", *cells, ""])
    return grid


def geomeans(competitors: Field) -> list[str]:
    """List the sparse competitors that means over layers are shown of, ours first."""
    sparse = [name for name, competitor in competitors.items() if competitor.sparse]
    return sorted(sparse, key=lambda name: not is_ours(name))


def layer_cases(results: Results, kind: str) -> list[str]:
    """List the measured layers of a kind."""
    cases = results.cases("layer")
    return [case for case in cases if case.startswith("linear") == (kind == "linear")]


def _over_rivals(
    results: Results, case: str, sparsity: float, rivals: Sequence[str]
) -> float | None:
    ours = results.find("layer", case, "layer", "sparsekd", sparsity)
    theirs = [results.find("layer", case, "layer", rival, sparsity) for rival in rivals]
    times = [row["ms"] for row in theirs if row and row["ms"]]
    return min(times) / ours["ms"] if ours and ours["ms"] and times else None


def step_grid(results: Results, level: str, competitors: Field) -> Grid | None:
    """Tabulate what the level "step" or "epoch" takes and how much faster than dense it is."""
    measured, sparsities = results.rows(level), results.sparsities(level)
    if not measured:
        return None
    grid = Grid(
        "Whole training steps" if level == "step" else f"Whole epochs: {measured[-1]['op']}",
        ["network", "competitor", "dense or 0 %", *map(percent, sparsities)],
        note="Milliseconds and, in brackets, times faster than float32 dense in its better layout. "
        "First convolution and last linear layer dense, the others uniformly sparse.",
    )
    for case in results.cases(level):
        for name, competitor in competitors.items():
            rows = {row["sparsity"]: row for row in results.rows(level, name=name, case=case)}
            if any(row["ms"] is not None for row in rows.values()):
                cells = [_timed(results, rows.get(s)) for s in (None, *sparsities)]
                grid.lines.append([case, competitor.label, *cells])
    return grid


def _timed(results: Results, row: Row | None) -> str:
    if row is None or row["ms"] is None:
        return "-"
    return f"{row['ms']:.0f} ({cell(results.speedup(row), '.2f', 'x')})"


def shortfall_grid(results: Results) -> Grid | None:
    """Tabulate which competitors have no time and why."""
    counts = Counter((row["arm"], what, row[what]) for what, row in results.shortfalls())
    lines = [[*key, str(count)] for key, count in sorted(counts.items())]
    header = ["competitor", "what", "why", "rows"]
    return Grid("Competitors without a time", header, lines) if lines else None
