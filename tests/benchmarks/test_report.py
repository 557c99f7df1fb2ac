"""Tables and figures come from rows, and say what the rows say."""

from __future__ import annotations

import pytest

from benchmarks.arena.suite import ARENA
from benchmarks.arena.tables import fit, roofline_rows
from benchmarks.arena.waterfall import PARTS
from sparsekd.bench.results import Results
from sparsekd.errors import CheckpointError

LAYER = {"kind": "conv", "channels": 64, "outs": 64, "size": 32, "kernel": 3, "stride": 1}
MACHINE = {"id": "m", "isa": "avx2", "cpu": "a processor"}


def row(level, case, op, name, sparsity, ms, **rest):
    return {
        "level": level, "case": case, "op": op, "arm": name, "sparsity": sparsity, "ms": ms,
        "session": f"{level} {case}", "machine": MACHINE, "batch": 128, **rest,
    }  # fmt: skip


def test_a_row_is_held_against_the_dense_one_of_its_own_session():
    def timed(name, sparsity, ms, session):
        return {**row("step", "resnet18", "step", name, sparsity, ms), "session": session}

    results = Results(
        [
            timed("dense_contiguous", None, 90.0, "1"),
            timed("dense_channels_last", None, 100.0, "1"),
            timed("sparsekd", 0.8, 45.0, "1"),
            timed("dense_contiguous", None, 200.0, "2"),
            timed("sparsekd", 0.9, 50.0, "2"),
        ]
    )
    early, late = (results.find("step", "resnet18", "step", "sparsekd", s) for s in (0.8, 0.9))
    assert results.dense(early)["arm"] == "dense_contiguous"
    assert (results.speedup(early), results.speedup(late)) == (2.0, 4.0)


@pytest.fixture
def rows():
    found = [
        row(
            "peaks", "machine", "2 threads", "peaks", None, None,
            flops=1.6e11, l2=1e11, l3=6e10, memory=2.5e10, l1=32768, last_level=1 << 25,
        )
    ]  # fmt: skip
    for case in ("64>64 32x32 3x3", "linear 128x2048x1000"):
        found += [
            row("layer", case, "layer", "dense_contiguous", None, 12.0),
            row("layer", case, "layer", "dense_channels_last", None, 10.0),
            row("layer", case, "layer", "dense_bf16", None, 4.0),
        ]
        for sparsity, ms in ((0.5, 20.0), (0.8, 8.0), (0.9, 5.0)):
            found.append(row("layer", case, "layer", "sparsekd", sparsity, ms))
            found.append(row("layer", case, "layer", "sparseprop", sparsity, 4 * ms))
    for name in ("fprop", "dgrad", "wgrad"):
        for sparsity in (0.8, 0.9):
            nnz = round((1 - sparsity) * 64 * 576)
            found.append(
                row(
                    "op", "64>64 32x32 3x3", name, "sparsekd_channels_last", sparsity, 5.0,
                    nnz=nnz, flops=2 * nnz * 128 * 1024, layer={**LAYER, "batch": 128},
                )
            )  # fmt: skip
    found.append(
        row("step", "resnet18", "step", "dense_contiguous", None, 100.0, flops=10**9, bytes=10**8)
    )
    for sparsity in (0.8, 0.9, 0.95):
        density = 1 - sparsity
        found.append(
            row(
                "step", "resnet18", "step", "sparsekd", sparsity, 10 + 200 * density,
                flops=density * 1e9, bytes=9e7,
            )
        )  # fmt: skip
    parts = dict.fromkeys(PARTS, 1.5)
    found.append(row("waterfall", "resnet18", "step", "sparsekd", 0.9, 13.5, parts=parts))
    sizes = {"peak_mib": 900.0, "held_mib": 120.0, "plans_mib": 0.0, "live_mib": 700.0}
    found.append(row("memory", "resnet18", "step", "dense_contiguous", None, None, **sizes))
    found.append(row("memory", "resnet18", "step", "sparsekd", 0.8, None, **sizes))
    return found


def text(rows):
    return "\n".join(grid.markdown() for grid in ARENA.tables(Results(rows)))


def test_every_figure_and_table_is_made(rows, tmp_path):
    files = ARENA.write(Results(rows), tmp_path, tmp_path / "rows.jsonl")
    assert {file.stem for file in files} == {"README", *ARENA.figures(Results(rows))}
    assert all(file.stat().st_size > 1000 for file in files)
    page = (tmp_path / "README.md").read_text()
    for title in ("Convolutions", "Linear", "training steps", "FLOPs against time", "Peak memory"):
        assert title in page
    assert "160 GFLOP/s" in page
    assert "a processor" in page


def test_no_rows_make_no_figures():
    assert set(ARENA.figures(Results([])).values()) == {None}
    assert ARENA.tables(Results([])) == []


def test_speedups_refer_to_the_better_dense_layout_and_losses_are_shown(rows):
    table = text(rows)
    assert "| 64>64 32x32 3x3 | 10.0 | 2.5x | 0.50x | 1.25x | 2.00x | 4.0x / 4.0x |" in table


def test_the_share_of_saved_flops_that_became_time(rows):
    line = next(line for line in text(rows).splitlines() if line.startswith("| resnet18, 90 %"))
    assert "100 / 30" in line
    assert "90.0%" in line
    assert "78%" in line  # 70 % of the time for 90 % of the operations


def test_the_line_through_density_is_found(rows):
    line = next(
        line for line in text(rows).splitlines() if "at density 0" not in line and "1.000" in line
    )
    assert "| 10.0 | 20.0 | 1.000 | 0.10 |" in line
    assert fit([(0.1, 1.0), (0.2, 2.0)]) is None


def test_passes_are_held_against_their_roof(rows):
    found = roofline_rows(Results(rows))
    assert len(found) == 6
    for entry in found:
        assert entry["fraction"] == pytest.approx(entry["gflops"] / entry["roof_gflops"])


def test_the_newest_row_counts_and_speedups_stay_within_a_session(rows):
    again = row("step", "resnet18", "step", "sparsekd", 0.9, 15.0, flops=1e8, bytes=9e7)
    dense = row("step", "resnet18", "step", "dense_contiguous", None, 60.0, flops=1e9, bytes=1e8)
    for late in (again, dense):
        late["session"] = "later"
    results = Results([*rows, dense, again])
    for sparsity, factor in ((0.9, 4), (0.8, 2)):
        found = results.find("step", "resnet18", "step", "sparsekd", sparsity)
        assert results.speedup(found) == pytest.approx(factor)


def test_rows_of_another_machine_do_not_count(rows):
    other = {**rows[-1], "machine": {**MACHINE, "id": "other"}}
    assert [r["machine"]["id"] for r in Results([*rows, other]).rows("memory")] == ["other"]


def test_competitors_without_a_time_are_listed_with_the_reason(rows):
    rows.append(
        row("layer", "c", "layer", "sparselab", 0.9, None, skipped="sparselab has no convolution")
    )
    assert "| sparselab | skipped | sparselab has no convolution | 1 |" in text(rows)


def test_rows_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="found none"):
        Results.read(tmp_path / "rows.jsonl")
