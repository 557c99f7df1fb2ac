"""The race on a GPU runs anywhere; here on the CPU, where its competitors run on CPU kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from benchmarks.gpu import device, races
from benchmarks.gpu.competitors import COMPETITORS
from benchmarks.gpu.report import LEVELS
from benchmarks.gpu.suite import suite
from sparsekd import cuda_library
from sparsekd.bench.command import command
from sparsekd.bench.machine import describe
from sparsekd.bench.results import Results
from sparsekd.bench.runner import run
from sparsekd.bench.suite import BenchConfig
from sparsekd.errors import UnsupportedError
from sparsekd.train import MetricsLog

CPU = suite(torch.device("cpu"), tiny=True)
QUICK = BenchConfig(rounds=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    console = Console(quiet=True)
    run(CPU.sessions(QUICK), MetricsLog(path), describe(CPU.machine()), console)
    return path


def test_every_competitor_that_can_run_has_a_time(rows: Path) -> None:
    results = Results.read(rows)
    for level in LEVELS:
        for row in results.rows(level):
            assert (row["ms"] is None) == ("skipped" in row), row
    timed = {row["arm"] for row in results.rows("gpu layer") if row["ms"] is not None}
    assert timed == COMPETITORS.keys() - {"torch_24", "torch_bsr"}


def test_speed_ups_are_over_the_fastest_dense_one(rows: Path) -> None:
    results = Results.read(rows)
    for row in results.rows("gpu step"):
        dense = [r["ms"] for r in results.rows("gpu step") if r["baseline"]]
        assert results.speedup(row) == pytest.approx(min(dense) / row["ms"])


def test_the_report_has_tables_and_figures(rows: Path, tmp_path: Path) -> None:
    files = CPU.write(Results.read(rows), tmp_path, rows)
    assert {"gpu_layer.png", "gpu_step.png"} <= {file.name for file in files}
    page = (tmp_path / "README.md").read_text()
    assert "sparsekd bcsr 32, bfloat16" in page
    assert "layer, fprop" in page


def test_wrong_results_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = races._stored

    def broken(layer, competitor):
        stored = real(layer, competitor)
        with torch.no_grad():
            next(stored.parameters())[0] += 1
        return stored

    monkeypatch.setattr(races, "_stored", broken)
    race = CPU.sessions(QUICK)[1]
    refused = [row for row in race.measure() if "skipped" not in row]
    assert refused
    assert all("refused" in row and row["ms"] is None for row in refused), refused


def test_other_kernels_make_other_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_library, "PATH", tmp_path / "library.so")
    before = device.kernels_digest()
    cuda_library.PATH.write_bytes(b"built")
    assert device.kernels_digest() != before


def test_a_kernel_of_ours_that_fails_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of another package, which may not take a shape, does not."""
    rows = tmp_path / "rows.jsonl"
    common = {"level": "gpu layer", "case": "c", "op": "layer", "sparsity": 0.9, "session": "1"}
    app = Typer()
    app.command()(command(suite(), str(tmp_path)))
    for name, code in (("torch_24", 0), ("csr_bf16", 1)):
        row = {**common, "arm": name, "ms": None, "failed": "no", "machine": {"id": "m"}}
        MetricsLog(rows).append(row)
        done = CliRunner().invoke(app, ["--draw", "--rows", str(rows)])
        assert done.exit_code == code, done.output


def test_what_has_no_effect_on_a_gpu_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="sparsities: expected none"):
        CPU.sessions(BenchConfig(sparsities=(0.5,)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="expected one that torch sees as a CUDA device"):
        suite().sessions(BenchConfig())


def test_dense_rows_of_a_gpu_name_their_device() -> None:
    machine = describe({"device": "Some GPU"})
    assert machine["device"] == "Some GPU"
    assert machine["id"] != describe()["id"]
    assert Results([]).machine == {}
