"""The line in density and the list of cells that lose come from rows; both commands resume."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.arena.tables import density_line, density_points
from benchmarks.cases import STEP_CASES, step_cases
from benchmarks.density_line import DENSITY_LINE
from benchmarks.never_slower import NEVER_SLOWER, cells
from sparsekd.bench.command import command
from sparsekd.bench.results import Results
from sparsekd.bench.steps import step_problem
from sparsekd.bench.suite import BenchConfig
from sparsekd.nn import sparsify

MACHINE = {"id": "m", "cpu": "a processor"}


def row(level, name, sparsity, times, session):
    return {
        "level": level, "case": "resnet18", "op": "step", "arm": name, "sparsity": sparsity,
        "ms": sorted(times)[len(times) // 2], "times": times, "session": session, "batch": 128,
        "machine": MACHINE, "flops": 1000 * (1 - (sparsity or 0)),
    }  # fmt: skip


def call(suite, *arguments):
    app, threads = typer.Typer(), torch.get_num_threads()
    app.command()(command(suite, "runs/none"))
    try:
        return CliRunner(env={"COLUMNS": "160"}).invoke(app, list(map(str, arguments)))
    finally:
        torch.set_num_threads(threads)


def test_the_networks_are_those_whose_steps_are_published():
    titles = [case.title for case in step_cases(BenchConfig())]
    assert titles == [
        "resnet18", "wrn22_2", "resnet50 b64", "resnet20 28x28", "resnet20 8x8 b64", "vgg16_bn",
    ]  # fmt: skip
    assert len(titles) == len(set(titles)) == len(STEP_CASES)
    small = step_cases(BenchConfig(networks=("resnet20",), input_shape=(1, 8, 8), batch=4))
    assert [case.title for case in small] == ["resnet20 8x8 b4"]
    other = step_cases(BenchConfig(networks=("resnet20",), input_shape=(3, 16, 16)))
    assert [case.title for case in other] == ["resnet20 16x16"]
    for suite, sparsities in ((DENSITY_LINE, 4), (NEVER_SLOWER, 7)):
        assert len(suite.sessions(BenchConfig())) == sparsities * len(STEP_CASES)


@pytest.mark.parametrize("suite", [DENSITY_LINE, NEVER_SLOWER], ids=lambda suite: suite.title)
def test_a_run_that_was_stopped_goes_on_and_reports(suite, tmp_path):
    rows = tmp_path / "rows.jsonl"
    options = (
        *("--network", "resnet20", "--input", "1,8,8", "--batch", "4", "--rounds", "1"),
        *("--sparsity", "0.8,0.9,0.95", "--threads", "1", "--rows", rows),
    )
    whole = call(suite, *options)
    assert whole.exit_code == 0, whole.output
    lines = rows.read_bytes().splitlines(keepends=True)
    found = [json.loads(line) for line in lines]
    assert {(r["arm"], r["sparsity"]) for r in found if r["sparsity"] is not None} == {
        (name, s) for name in ("sparsekd", "sparsekd_optimized") for s in (0.8, 0.9, 0.95)
    }
    assert {r["arm"] for r in found if r["sparsity"] is None} == {
        "dense_contiguous", "dense_channels_last", "dense_bf16",
    }  # fmt: skip
    # A kill in the middle of the second sparsity, and of a line.
    second = next(n for n, r in enumerate(found) if r["sparsity"] == 0.9)
    rows.write_bytes(b"".join(lines[: second + 1]) + lines[second + 1][:40])
    again = call(suite, *options)
    assert again.exit_code == 0, again.output
    kept = rows.read_bytes().splitlines(keepends=True)
    assert kept[: second + 1] == lines[: second + 1]
    sessions = [json.loads(line)["session"] for line in kept]
    assert len(set(sessions)) == 4  # the first, the one cut short, and two anew
    assert "resnet20 8x8 b4" in again.output


def test_each_time_of_the_line_is_held_against_the_dense_step_of_its_own_session():
    found = []
    for number, density in enumerate((0.2, 0.1, 0.05, 0.02)):
        dense = 100.0 * (1 + number)  # a machine that slows down
        session = str(number)
        found.append(row("step", "dense_contiguous", None, [2 * dense], session))
        found.append(row("step", "dense_channels_last", None, [dense], session))
        found.append(
            row("step", "sparsekd", 1 - density, [dense * (0.05 + 1.5 * density)], session)
        )
    results = Results(found)
    line, _ = density_line(results, "resnet18", "sparsekd")
    assert line is not None
    assert (line.intercept, line.slope, line.r2) == pytest.approx((0.05, 1.5, 1.0))
    assert density_points(results, "resnet18", "sparsekd")[0] == pytest.approx((0.02, 0.08))
    table = next(g for g in DENSITY_LINE.tables(results) if "density" in g.title)
    assert table.lines[0][-3:] == ["0.05", "1.50", "20.0x"]
    figure = DENSITY_LINE.figures(results)["density_line"]
    assert figure is not None
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["plain: 0.050 + 1.50 d"]


@pytest.mark.parametrize(
    "plain, ours, slower",
    [
        ((0.9, 0.9), (0.9, 0.9), False),
        ((1.1, 1.1), (1.01, 1.01), False),  # plain may lose: `optimize` is the default path
        ((1.1, 1.1), (1.03, 1.03), True),
        ((0.5, 0.5), (0.52, 0.52), True),  # faster than dense, but slower than without `optimize`
        ((0.5, 0.5), (0.5, 0.53), False),  # one turn of three was disturbed
    ],
)
def test_every_cell_that_loses_is_listed(plain, ours, slower):
    def turns(pair):
        return [100 * pair[0], 100 * pair[0], 100 * pair[1]]

    results = Results(
        [
            row("default", "dense_contiguous", None, [100.0] * 3, "1"),
            row("default", "dense_channels_last", None, [180.0] * 3, "1"),
            row("default", "dense_bf16", None, [25.0] * 3, "1"),
            row("default", "sparsekd", 0.7, turns(plain), "1"),
            row("default", "sparsekd_optimized", 0.7, turns(ours), "1"),
        ]
    )
    (cell,) = cells(results)
    assert (cell.slower, cell.bf16, cell.dense_ms) == (slower, 0.25, 100.0)
    every, check, *_ = NEVER_SLOWER.tables(results)
    assert check.lines == (every.lines if slower else [])
    assert check.title.startswith(f"{int(slower)} of 1 cells")


def test_the_default_path_is_sparsify_without_arguments():
    (case,) = step_cases(BenchConfig(networks=("resnet20",), input_shape=(1, 8, 8), batch=2))
    masks = step_problem(case, 0.9, sparsify).masks
    expected = step_problem(case, 0.9).model
    assert len(masks) == 22  # the first convolution and the last layer, too
    assert len({mask.float().mean().item() for mask in masks.values()}) > 4  # ERK
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.1 * total)
    assert isinstance(expected.conv1, torch.nn.Conv2d)
