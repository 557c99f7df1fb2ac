"""Races over inference: engines agree, each runs where it is, and a loss is shown as one."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparsekd.bench.inference import (
    INFERENCE_COMPETITORS,
    InferenceRace,
    inference_grids,
)
from sparsekd.bench.inference_cases import InferenceCase, InferenceProblem, encoder
from sparsekd.bench.onnx_engines import Elsewhere
from sparsekd.bench.results import Results
from sparsekd.cli import app

pytestmark = pytest.mark.filterwarnings("ignore:no weight is left in some output channels")
CASE = InferenceCase("resnet20", batch=2, threads=1)


def test_all_engines_of_this_environment_agree():
    eager = {n: c for n, c in INFERENCE_COMPETITORS.items() if "compiled" not in n}
    rows = InferenceRace(CASE, (0.9,), eager, 2).measure()
    by_name = {row["arm"]: row for row in rows}
    assert list(by_name) == list(eager)
    for name in ("dense_contiguous", "dense_channels_last", "sparsekd_eval", "sparsekd_frozen"):
        assert by_name[name]["ms"] > 0, by_name[name]
        assert len(by_name[name]["times"]) == 2
    for name in ("onnxruntime", "openvino"):
        needed = all(importlib.util.find_spec(package) for package in (name, "onnxscript"))
        assert ("ms" if needed else "skipped") in by_name[name]
    assert by_name["deepsparse"]["skipped"].endswith("named by --deepsparse")
    assert by_name["sparsekd_frozen"]["sparsity"] == 0.9
    assert by_name["onnxruntime"]["sparsity"] is None
    assert [name for name, row in by_name.items() if row["baseline"]] == [
        name for name, entry in eager.items() if not entry.sparse
    ]


def test_wrong_results_get_no_time(monkeypatch: pytest.MonkeyPatch):
    frozen = INFERENCE_COMPETITORS["sparsekd_frozen"]

    def build(problem: InferenceProblem):
        run = frozen.build(problem)
        return lambda: run() * 1.001

    wrong = type(frozen)("sparsekd_frozen", "", build, sparse=True)
    reference = {"dense_contiguous": INFERENCE_COMPETITORS["dense_contiguous"]}
    rows = InferenceRace(CASE, (0.9,), {**reference, "sparsekd_frozen": wrong}, 1).measure()
    assert rows[0]["ms"]
    assert "output differs by" in rows[1]["refused"]


def test_the_encoder_and_threads():
    case = InferenceCase("encoder", batch=1, threads=2)
    assert case.title == "encoder 128x768 b1, 2 threads"
    with torch.inference_mode():
        assert encoder(1)(torch.zeros(1, 128, 768)).shape == (1, 128, 768)


def test_an_engine_in_another_process():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    problem = InferenceProblem.of(CASE, 0.9)
    engine = Elsewhere(sys.executable, "onnxruntime", problem.onnx, problem.images, 1)
    engine()
    engine()
    with torch.inference_mode():
        right = problem.model(problem.x)
    torch.testing.assert_close(torch.from_numpy(np.load(engine.result)), right)
    engine.close()
    with pytest.raises((RuntimeError, ValueError, OSError)):
        engine()


def test_an_engine_that_is_not_there():
    problem = InferenceProblem.of(CASE, 0.9)
    with pytest.raises(RuntimeError, match="KeyError: 'none'"):
        Elsewhere(sys.executable, "none", "model.onnx", problem.images, 1)


def test_tables_show_spread_throughput_and_losses():
    machine = {"id": "a"}
    common = {"level": "inference", "case": "net b8, 1 thread", "op": "inference", "batch": 8}
    common |= {"session": "1", "machine": machine}
    rows = [
        {"arm": "dense_contiguous", "sparsity": None, "ms": 8.0, "times": [7, 8, 9, 8]},
        {"arm": "onnxruntime", "sparsity": None, "ms": 4.0, "times": [4.0]},
        {"arm": "sparsekd_frozen", "sparsity": 0.9, "ms": 2.0, "times": [2.0, 2.5, 1.5]}
        | {"floor_ms": 0.5, "floor_maps_ms": 1.0},
        {"arm": "sparsekd_frozen", "sparsity": 0.5, "ms": 5.0, "times": [5.0]},
        {"arm": "deepsparse", "sparsity": 0.9, "ms": None, "skipped": "not here"},
    ]
    rows = [common | row | {"baseline": row["sparsity"] is None} for row in rows]
    latency, throughput, floors = inference_grids(Results(rows))
    assert latency is not None
    assert throughput is not None
    assert floors is not None
    assert latency.header == ["network", "engine", "dense", "50 %", "90 %"]
    assert [line[1:] for line in latency.lines] == [
        ["dense, contiguous", "8.00 ±0.25 (0.50x)", "-", "-"],
        ["ONNX Runtime", "4.00 ±0.00 (1.00x)", "-", "-"],
        ["sparsekd, frozen", "-", "5.00 ±0.00 (0.80x)", "2.00 ±0.25 (2.00x)"],
    ]
    assert throughput.lines[-1][-1] == "4,000"
    assert floors.lines == [["net b8, 1 thread", "-", "25%, 50%"]]


def test_the_command(tmp_path):
    threads = torch.get_num_threads()
    try:
        result = CliRunner(env={"COLUMNS": "140"}).invoke(
            app,
            [
                *("bench", "--level", "inference", "--network", "resnet20", "--batch", "2"),
                *("--competitor", "sparsekd_frozen,deepsparse", "--sparsity", "0.9,0.95"),
                *("--rounds", "1", "--threads", "1", "--rows", str(tmp_path / "rows.jsonl")),
            ],
        )
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "Latency of a batch" in result.output
    assert "come to their floors" in result.output
    assert "resnet20 32x32 b2, 1 thread" in result.output
    assert "named by --deepsparse" in result.output
    assert (tmp_path / "speedup_inference.png").exists()


def test_the_encoder_is_for_inference_alone(tmp_path):
    arguments = ["bench", "--level", "step", "--network", "encoder"]
    result = CliRunner().invoke(app, [*arguments, "--rows", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 2
    assert "of the level inference alone" in result.output
