"""`sparsekd export`: what it writes does as well as the run did."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import sparsekd as skd
from sparsekd.cli import app
from sparsekd.recipes import load_run
from sparsekd.train import evaluate, load_state

_TRAIN = [
    *("train", "demo", "--epochs", "2", "--sparsity", "0.9", "--method", "kd,rigl,small-dense"),
    *("--seeds", "1", "--set", "model.name=resnet20", "--set", "skip="),
    *("--threads", "1", "--set", "data.train_images=256", "--set", "dynamics.every=2"),
]
_RUNS = ["seed0/dense", "seed0/kd-0.9", "seed0/rigl-0.9", "seed0/small-dense-0.9"]


def call(*arguments: str):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a folder"
    result = call(*_TRAIN, "--out", str(folder))
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("name", _RUNS)
def test_a_run_is_loaded_as_it_ended(out, name):
    run = load_run(out / name)
    assert run.result["run"] == name
    test = run.dataset.test
    accuracy = evaluate(run.model, test).accuracy
    assert abs(accuracy - run.result["test_accuracy"]) * len(test) <= 1
    layers = [module for _, module in skd.nn.sparse_modules(run.model)]
    stored = sum(layer.topology.nnz for layer in layers)
    if "dense" in name:
        assert not layers
    else:
        assert stored == run.result["nnz"]


@pytest.mark.parametrize("name", _RUNS[1:])
def test_a_dense_state_dict_fits_the_plain_network(out, name, tmp_path):
    file = tmp_path / "dense.safetensors"
    result = call("export", str(out / name), "--to", "dense", "--out", str(file))
    assert result.exit_code == 0, result.output
    run = load_run(out / name)
    plain = run.build_dense()
    plain.load_state_dict(load_state(file), strict=True)
    images = next(iter(run.dataset.test.batches(20)))[0]
    torch.testing.assert_close(plain(images), run.model(images))
    images, accuracy = len(run.dataset.test), f"{run.result['test_accuracy']:.2%}"
    assert result.stdout.rstrip().endswith(f"of {images} images; the run had {accuracy}")


def test_an_exported_program_computes_with_the_nonzeros(out):
    folder = out / "seed0/kd-0.9"
    result = call("export", str(folder), "--to", "torch-export")
    assert result.exit_code == 0, result.output
    program = torch.export.load(folder / "model.pt2")
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("sparsekd" in name for name in called)
    run = load_run(folder)
    for size in (1, 7):  # another batch than the one it was exported with
        images = next(iter(run.dataset.test.batches(size)))[0]
        torch.testing.assert_close(program.module()(images), run.model(images))


def test_a_frozen_network_needs_no_model(out):
    folder = out / "seed0/kd-0.9"
    result = call("export", str(folder), "--to", "frozen")
    assert result.exit_code == 0, result.output
    run = load_run(folder)
    images = next(iter(run.dataset.test.batches(7)))[0]
    with torch.inference_mode():
        torch.testing.assert_close(
            skd.load_frozen(folder / "network.frozen")(images), run.model(images)
        )


def test_int8_weights_keep_the_accuracy_in_a_smaller_file(out):
    folder = out / "seed0/kd-0.9"
    for format in ("frozen", "frozen-int8"):
        result = call("export", str(folder), "--to", format)
        assert result.exit_code == 0, result.output
    sizes = [(folder / name).stat().st_size for name in ("network.frozen", "network.int8.frozen")]
    assert sizes[1] < 0.75 * sizes[0]
    assert "int8" in str(skd.load_frozen(folder / "network.int8.frozen"))


def test_an_onnx_file_runs_in_onnxruntime(out):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"torch's exporter needs {package}")
    runtime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    folder = out / "seed0/rigl-0.9"
    result = call("export", str(folder), "--to", "onnx")
    assert result.exit_code == 0, result.output
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    run = load_run(folder)
    images = next(iter(run.dataset.test.batches(7)))[0]
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), run.model(images), rtol=1e-4, atol=1e-4)
    assert [file.name for file in folder.glob("model.onnx*")] == ["model.onnx"]  # in one file


def test_a_file_that_does_worse_than_the_run_is_refused_and_not_written(out, tmp_path):
    rows = (out / "metrics.jsonl").read_text()
    changed = []
    for line in rows.splitlines():
        row = json.loads(line)
        if row["kind"] == "result" and row["run"] == "seed0/kd-0.9":
            row["test_accuracy"] += 0.02
        changed.append(json.dumps(row))
    (out / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    file = tmp_path / "dense.safetensors"
    result = call("export", str(out / "seed0/kd-0.9"), "--to", "dense", "--out", str(file))
    (out / "metrics.jsonl").write_text(rows)
    assert result.exit_code == 2
    assert "not written: its accuracy would be" in result.stderr
    assert not list(tmp_path.iterdir())


def test_mistakes_name_what_is_expected(out, monkeypatch):
    wrong = call("export", str(out), "--to", "dense")
    assert wrong.exit_code == 2
    assert "seed0/dense, seed0/kd-0.9" in wrong.stderr
    assert call("export", str(out / "seed0/lt-0.9"), "--to", "dense").exit_code == 2
    assert call("export", "/does/not/exist", "--to", "dense").exit_code == 2
    format = call("export", str(out / "seed0/dense"), "--to", "tflite")
    assert "--to: expected one of dense, onnx, torch-export" in format.stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    missing = call("export", str(out / "seed0/dense"), "--to", "onnx")
    assert missing.exit_code == 2
    assert "pip install 'sparsekd[onnx]' has it" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1
