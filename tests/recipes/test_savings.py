"""What tables and figures say is saved is what the rows say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsekd.recipes.figures import savings_figure
from sparsekd.recipes.report import bars, read_rows, savings_table, table
from sparsekd.recipes.savings import savings

TIMED = {"batch_size": 4, "threads": 1, "rounds": 3, "dense_contiguous_ms": 12.0}


def rows() -> list[dict[str, Any]]:
    """Return a dense run of 1000 FLOPs and 10 s, LT at a quarter, RigL at a tenth; two seeds."""
    results, timings = [], []
    for seed, shift in ((0, 0.0), (1, 0.02)):
        for method, sparsity, accuracy, flops in (
            ("dense", 0.0, 0.9, 1000),
            ("lt", 0.9, 0.88, 250),
            ("rigl", 0.9, 0.8, 100),
        ):
            row = {"run": f"seed{seed}/{method}", "method": method, "sparsity": sparsity}
            result = {"seed": seed, "test_accuracy": accuracy + shift, "flops_train": flops}
            result |= {"flops_train_dense": 1000, "flops_run": flops, "seconds": flops / 100}
            results.append({"kind": "result", **row, **result})
            if seed == 0:
                times = {"sparse_ms": {"lt": 5.0, "rigl": 2.0}.get(method)}
                memory = {"dense": 100, **({} if method == "dense" else {"sparse": 20})}
                times |= {"dense_channels_last_ms": 10.0, "held": memory, "peak": {**memory}}
                timings.append({"kind": "timing", "seed": 0, **row, **TIMED, **times})
    return results + timings


def test_savings_are_of_the_better_dense_step_and_totals_of_the_dense_run() -> None:
    lt, rigl = savings(rows())
    assert (lt.method, lt.sparsity, lt.accuracies) == ("lt", 0.9, (0.88, pytest.approx(0.9)))
    assert (lt.flops, lt.time, lt.speedup) == (0.75, 0.5, 2.0)
    assert (rigl.flops, rigl.time, rigl.speedup) == pytest.approx((0.9, 0.8, 5.0))
    assert (rigl.held, rigl.peak) == (0.8, 0.8)
    assert (lt.total_flops, lt.total_time) == (1.25, 1.25)  # it starts from the dense run
    assert (rigl.total_flops, rigl.total_time) == (0.1, 0.1)


def test_without_a_dense_run_or_a_timing_nothing_is_claimed() -> None:
    alone = [row for row in rows() if row["method"] == "rigl" and row["kind"] == "result"]
    (rigl,) = savings(alone)
    assert rigl.flops == 0.9
    assert (rigl.time, rigl.held, rigl.total_flops, rigl.total_time) == (None, None, None, None)
    assert savings_figure(alone, {"rigl": "RigL"}) is None
    assert "Less time" not in savings_table(alone).note


def test_the_table_tells_who_is_cheaper_than_a_dense_run() -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(savings_table(rows()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in text.splitlines() if line.strip().startswith("RigL")]
    cells = [cell for cell in line.split() if cell != "%"]
    assert cells[1:6] == ["90", "81.00%", "±", "1.41", "90"]
    assert cells[6:] == ["80", "5.00x", "80", "80", "0.10", "0.10"]
    assert "Less time in total than a dense run: RigL." in text
    assert "Steps no faster than dense" not in text
    slow = [{**row, "sparse_ms": 11.0} if row.get("sparse_ms") == 5.0 else row for row in rows()]
    assert "Steps no faster than dense: LT at 90 %." in savings_table(slow).note


def test_bars_are_as_long_as_what_a_step_takes() -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(bars(rows()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    drawn = [line for line in lines if "━" in line]
    lengths = [line.count("━") + line.count("╸") / 2 for line in drawn]
    assert lengths == [5, 10, 2, 4]  # of 20


def test_the_figure_draws_both_savings_and_the_accuracy() -> None:
    figure = savings_figure(rows(), {"lt": "LT", "rigl": "RigL"})
    assert figure is not None
    saved, accuracy = figure.axes
    drawn = [list(line.get_ydata()) for line in saved.lines]
    assert drawn == [[0.75], [0.5], [0.9], pytest.approx([0.8])]
    assert [list(box.lines[0].get_ydata()) for box in accuracy.containers] == [
        pytest.approx([0.89]),
        pytest.approx([0.81]),
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_narrow_terminal_loses_no_column(width: int) -> None:
    measured = read_rows(Path(__file__).parents[2] / "docs/results/compare")
    console = Console(width=width, file=io.StringIO())
    for part in (table(measured), bars(measured), savings_table(measured)):
        console.print(part)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    assert all(len(line) <= width for line in printed.splitlines())
    for text in ("KD + Sup", "(RigL)", "updates", "MFLOPs", "speed", "whole", "90.70% ± 0.35"):
        assert text in printed
