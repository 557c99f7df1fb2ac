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
from benchmarks.gpu.predicted import predicted_ms
from benchmarks.gpu.report import LEVELS
from benchmarks.gpu.suite import suite
from benchmarks.gpu_roofline import H200
from sparsekd import cuda_library
from sparsekd.bench.cases import LayerCase
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
        session = [r for r in MetricsLog(rows).rows() if r["session"] == row["session"]]
        dense = [r["ms"] for r in session if r["baseline"]]
        assert results.speedup(row) == pytest.approx(min(dense) / row["ms"])


def test_the_report_has_tables_and_figures(rows: Path, tmp_path: Path) -> None:
    files = CPU.write(Results.read(rows), tmp_path, rows)
    assert {"gpu_layer.png", "gpu_step.png"} <= {file.name for file in files}
    page = (tmp_path / "README.md").read_text()
    assert "sparsekd bcsr 32, bfloat16" in page
    assert "layer, fprop" in page


def test_steps_begin_with_large_networks_at_90_percent_and_cover_all() -> None:
    config = BenchConfig(levels=("step",))
    sessions = suite(torch.device("cpu")).sessions(config)
    names = [f"benchmarks.gpu.networks:{name} 224x224 b64" for name in ("resnet50", "vit_b")]
    assert [session.name[1] for session in sessions[:2]] == names
    trained = {name: one for name, one in COMPETITORS.items() if one.storage == "weight"}
    dense = {(name, None) for name, one in trained.items() if not one.sparse}
    assert set(sessions[0].keys()) == dense | {
        (name, 0.9) for name in ("csr_fp32", "csr_bf16", "gpu_bf16")
    }
    for name in names:
        keys = [set(session.keys()) for session in sessions if session.name[1] == name]
        assert all(dense < some for some in keys)
        assert set().union(*keys) == dense | {
            (name, s)
            for name, one in trained.items()
            if one.sparse and name != "nm_bf16"
            for s in (0.8, 0.9, 0.95)
        }


def test_predictions_of_a_layer() -> None:
    """A linear layer of 4096 to 2016 features at 4096 rows and 90 %, in milliseconds."""
    case, nnz = LayerCase("linear", 4096, 2016, batch=4096), 0.1 * 2016 * 4096
    shared, l2 = 132 * 128 * 1.83e6, 5120 * 1.83e6  # bytes a millisecond
    products = nnz * 4096
    # Each product is a load, a quarter more is for nonzeros; maps are loaded once for 64 rows,
    # which are 32 times for 2016 of them, and 64 for the 4096 of the transpose.
    forward = (1.25 * 4 * products + 4 * 4096 * 4096 * 32) / shared
    backward = (1.25 * 4 * products + 4 * 2016 * 4096 * 64) / shared
    # Maps for 32 rows, gradients for 32 channels; 3.2 nonzeros of a row share a gradient.
    loads = 4 * 4096 * (4096 * 63 + 2016 * 128)
    sample = ((1.5 + 1 / 3.2) * 4 * products + loads) / shared
    tile_product, tile_sample = 2 * products * (1 / 32 + 1 / 128) / l2, 2 * products * 2 / 32 / l2
    flops = 2 * 4096 * 2016 * 4096
    for name, op, expected in (
        ("csr_fp32", "fprop", forward),
        ("csr_fp32", "layer", forward + backward + sample),
        ("bcsr_bf16", "fprop", tile_product),
        ("bcsr_bf16", "layer", 2 * tile_product + tile_sample),
        ("dense_fp32_last", "fprop", flops / 66.9e9),
        ("dense_tf32", "layer", 3 * flops / 494.7e9),
    ):
        sparsity = 0.9 if COMPETITORS[name].sparse else 0.0
        assert predicted_ms(COMPETITORS[name], case, op, sparsity, H200) == pytest.approx(expected)
    for name in ("fanin_bf16", "torch_bsr", "torch_24", "gpu_bf16", "nm_bf16"):
        assert predicted_ms(COMPETITORS[name], case, "fprop", 0.9, H200) is None


@pytest.mark.parametrize(("name", "shown"), [("NVIDIA H200", True), ("cpu", False)])
def test_predictions_are_shown_for_gpus_with_a_data_sheet(
    rows: Path, name: str, shown: bool
) -> None:
    measured = MetricsLog(rows).rows()
    for row in measured:
        row["machine"]["device"] = name
    results = Results(measured)
    tables = {grid.title: grid for grid in CPU.tables(results)}
    titles = [f"{name}: Predicted, {op}" for op in ("layer", "fprop")]
    assert [title in tables for title in titles] == [shown, shown]
    if shown:
        one = COMPETITORS["csr_bf16"]
        line = next(
            line for line in tables[titles[0]].lines if line[:2] == ["linear 4x64x32", one.label]
        )
        ms = predicted_ms(one, LayerCase("linear", 64, 32, batch=4), "layer", 0.95, H200)
        row = results.find("gpu layer", "linear 4x64x32", "layer", "csr_bf16", 0.95)
        assert line[-1] == f"{ms:.3g} ({row['ms'] / ms:.2f}x)"


def test_wrong_results_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real = races._stored

    def broken(layer, competitor):
        stored = real(layer, competitor)
        with torch.no_grad():
            next(stored.parameters())[0] += 1
        return stored

    monkeypatch.setattr(races, "_stored", broken)
    race = next(
        s for s in CPU.sessions(QUICK) if s.name == ("gpu layer", "linear 4x64x32", "layer")
    )
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
