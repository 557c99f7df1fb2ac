"""Rows of a study from its run folders, and the tables made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.evidence.studies import Study
from sparsekd.recipes import plan
from sparsekd.recipes.report import LABELS
from sparsekd.train import MetricsLog, Row, write_atomic

BySeed = dict[int, float]


def column(pair: str) -> tuple[str, str]:
    """Split column/method."""
    name, _, method = pair.partition("/")
    return name, method


def collect(study: str, columns: Iterable[str], folder: Path) -> list[Row]:
    """Read the rows of the finished runs of a study, with the names of study and column.

    Args:
        study: its name.
        columns: of the study.
        folder: with a run folder a column.

    Returns:
        The rows of kind "result", in the order of the columns.
    """
    rows: list[Row] = []
    for name in columns:
        path = folder / name / "metrics.jsonl"
        found = MetricsLog(path).rows() if path.exists() else []
        results = [row for row in found if row["kind"] == "result"]
        rows += [{"study": study, "column": name, **row} for row in results]
    return rows


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON lines, all or none."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def accuracies(rows: Sequence[Row]) -> dict[tuple[str, str, float], BySeed]:
    """Return test accuracy in % by (column, method, sparsity), then seed."""
    found: dict[tuple[str, str, float], BySeed] = {}
    for row in rows:
        key = row["column"], row["method"], row["sparsity"]
        found.setdefault(key, {})[row["seed"]] = 100 * row["test_accuracy"]
    return found


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of all runs: a line a column, method and sparsity."""
    lines = [
        "| column | method | sparsity | whole model | test accuracy, % | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for (name, method, sparsity), by_seed in accuracies(rows).items():
        whole = next(
            row["sparsity_whole"]
            for row in rows
            if (row["column"], row["method"], row["sparsity"]) == (name, method, sparsity)
        )
        lines.append(
            f"| {name} | {LABELS.get(method, method)} | {sparsity:.4g} | {whole:.4g} "
            f"| {spread(list(by_seed.values()))} | {listed(by_seed)} |"
        )
    return "\n".join(lines)


def paired(study: Study, rows: Sequence[Row]) -> Iterator[tuple[str, str, float, BySeed]]:
    """Yield the paired differences that answer a study's question.

    Only seeds that both have count.

    Args:
        study: whose pairs are taken.
        rows: of the study, finished or not.

    Yields:
        First column/method, second one, sparsity of the first, and the differences in points.
    """
    found = accuracies(rows)
    for first, second in study.pairs:
        (a, m), (b, n) = column(first), column(second)
        sparsities = zip(study.columns[a].sparsities, study.columns[b].sparsities, strict=True)
        for s, t in sparsities:
            one, other = found.get((a, m, s), {}), found.get((b, n, t), {})
            seeds = sorted(one.keys() & other.keys())
            if seeds:
                yield first, second, s, {seed: one[seed] - other[seed] for seed in seeds}


def differences(study: Study, rows: Sequence[Row]) -> str:
    """Return a Markdown table of paired differences: mean, deviation, each seed, how many up."""
    lines = ["| less | sparsity | difference | seeds | above 0 |", "|---|---|---|---|---|"]
    for first, second, sparsity, pairs in paired(study, rows):
        above = sum(d > 0 for d in pairs.values())
        lines.append(
            f"| {first} less {second} | {sparsity:.4g} | {spread(list(pairs.values()), '+')} "
            f"| {listed(pairs, '+')} | {above} of {len(pairs)} |"
        )
    return "\n".join(lines)


def tickets(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the cheap tickets that were superposed, or nothing without any.

    Numbers are means over seeds; the first ticket is the host's network before the cycles.
    """
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        if row.get("ticket_test_accuracies"):
            key = row["column"], row["method"], row["sparsity"]
            groups.setdefault(key, []).append(row)
    if not groups:
        return ""
    lines = [
        "| column | method | sparsity | single tickets, % | superposed, % | union density |",
        "|---|---|---|---|---|---|",
    ]
    for (name, method, sparsity), group in groups.items():
        by_cycle = zip(*(row["ticket_test_accuracies"] for row in group), strict=True)
        single = ", ".join(f"{100 * statistics.mean(cycle):.2f}" for cycle in by_cycle)
        merged = 100 * statistics.mean(row["test_accuracy"] for row in group)
        density = statistics.mean(row["union_density"] for row in group)
        lines.append(
            f"| {name} | {LABELS[method]} | {sparsity:.4g} | {single} | {merged:.2f} "
            f"| {density:.4f} |"
        )
    return "\n".join(lines)


def times(rows: Sequence[Row]) -> str:
    """Return a Markdown table of seconds of training, by sparse and by dense kernels.

    Args:
        rows: of a study, each with the "backend" that trained it; runs of the dense network, which
            is the same by both, are left out.
    """
    seconds: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        if row["method"] != "dense":
            key = row["method"], row["sparsity"]
            seconds.setdefault(key, {})[row["backend"]] = row["seconds"]
    lines = [
        "| method | sparsity | sparse kernels, s | dense masked, s | times faster |",
        "|---|---|---|---|---|",
    ]
    both = {key: found for key, found in seconds.items() if len(found) == 2}
    named = [(f"{LABELS[m]} | {sparsity:.4g}", found) for (m, sparsity), found in both.items()]
    total = {b: sum(found[b] for found in both.values()) for b in ("sparse", "dense")}
    for label, found in [*named, ("all | ", total)]:
        sparse, dense = found["sparse"], found["dense"]
        faster = f"{dense / sparse:.2f}" if sparse else "-"  # rounds to 0: too short to say
        lines.append(f"| {label} | {sparse:.1f} | {dense:.1f} | {faster} |")
    return "\n".join(lines)


def unfinished(study: Study, rows: Sequence[Row]) -> str:
    """Return how many runs have finished, or nothing where all have."""
    planned = sum(len(plan(recipe)) for recipe in study.columns.values())
    if len(rows) >= planned:
        return ""
    return (
        f"**{len(rows)} of {planned} runs have finished;** the same command trains the others. "
        "Differences of one or two seeds decide nothing."
    )


def page(name: str, study: Study, rows: Sequence[Row]) -> str:
    """Return the page of a study: its question, figure and tables."""
    parts = [
        f"# {name}",
        study.question,
        study.setting,
        f"Written from rows.jsonl by `python -m benchmarks.evidence {name}`.",
        unfinished(study, rows),
        "![differences](differences.png)",
        "Test accuracy of the same seed, in points: mean ± standard deviation, then each seed.",
        differences(study, rows),
        "Whole model is the sparsity over all parameters, the other that of the masked layers.",
        table(rows),
        tickets(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def spread(numbers: Sequence[float], sign: str = "") -> str:
    """Return mean and standard deviation."""
    mean = f"{statistics.mean(numbers):{sign}.2f}"
    return mean if len(numbers) < 2 else f"{mean} ± {statistics.stdev(numbers):.2f}"


def listed(by_seed: BySeed, sign: str = "") -> str:
    """Return the number of each seed, in the order of the seeds."""
    return ", ".join(f"{by_seed[seed]:{sign}.2f}" for seed in sorted(by_seed))
