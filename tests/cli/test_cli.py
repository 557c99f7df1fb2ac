"""The command line as a user meets it: output, exit codes, one-line errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparsekd
from sparsekd import models, relayout, sparsify
from sparsekd.cli import app
from sparsekd.train import load_state

_FIVE_STEPS = ["--set", "data.train_images=320", "--set", "training.batch_size=64"]  # an epoch
_SMALL = ["--seeds", "1", "--set", "model.name=resnet20", "--set", "skip="]
_QUICK = [
    *("train", "demo", "--epochs", "1", "--sparsity", "0.9", "--method", "lt,kd", *_SMALL),
    *_FIVE_STEPS,
]
_CALL = [sys.executable, "-c", "from sparsekd.cli import main; main()"]
_ENV = {
    **os.environ,
    "PYTHONPATH": str(Path(sparsekd.__file__).parents[1]),
    "COLUMNS": "120",
    "OMP_NUM_THREADS": "1",
}


def call(*arguments: str):
    threads = torch.get_num_threads()
    try:
        return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(arguments))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a folder"
    result = call(*_QUICK, "--out", str(out), "--threads", "1")
    assert result.exit_code == 0, result.output
    return out, result.output


def test_training_ends_with_the_table_and_the_paths(finished):
    out, output = finished
    for text in ("LT", "KD ticket", "dense", "0.9", "step"):
        assert text in output
    for name in ("accuracy_vs_sparsity", "loss_curves", "density_per_layer"):
        assert f"{out}/figures/{name}.png" in output
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
    assert "keep_memory_warm" in output


def test_training_leaves_configuration_rows_and_models(finished):
    out, _ = finished
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows if row["kind"] == "result"] == [
        "seed0/dense",
        "seed0/lt-0.9",
        "seed0/kd-0.9",
    ]
    timings = [row for row in rows if row["kind"] == "timing"]
    assert len(timings) == 3
    assert all(row["threads"] == 1 for row in timings)
    assert (out / "seed0/kd-0.9/final.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["recipe"]["sparsities"] == [0.9]


def test_the_same_command_again_repeats_nothing(finished):
    out, _ = finished
    before = (out / "metrics.jsonl").read_bytes()
    result = call(*_QUICK, "--out", str(out), "--threads", "1")
    assert result.exit_code == 0
    assert "3 finished runs" in result.output
    assert (out / "metrics.jsonl").read_bytes() == before


def test_fresh_starts_over_and_spares_what_is_not_its_own(tmp_path):
    dense = [*_QUICK, "--set", "methods=", "--out", str(tmp_path)]
    assert call(*dense).exit_code == 0
    keep = tmp_path / "notes.txt"
    keep.write_text("mine")
    assert call(*dense, "--set", "training.lr=0.01").exit_code == 2
    assert call(*dense, "--set", "training.lr=0.01", "--fresh").exit_code == 0
    assert keep.read_text() == "mine"
    assert json.loads((tmp_path / "config.json").read_text())["recipe"]["training"]["lr"] == 0.01


def test_report_draws_from_the_rows_alone(finished):
    out, _ = finished
    figure = out / "figures" / "loss_curves.png"
    figure.unlink()
    result = call("report", str(out))
    assert result.exit_code == 0
    assert "KD ticket" in result.output
    assert figure.exists()


def test_methods_are_compared_and_more_can_join(tmp_path):
    shared = ["--data", "digits", "--sparsity", "0.9", "--seeds", "1", "--epochs", "1"]
    shared += ["--set", "data.train_images=300", "--threads", "1", "--out", str(tmp_path)]
    shared += ["--set", "dynamics.every=1"]
    first = call("compare", "kd-ticket", "gmp", *shared)
    assert first.exit_code == 0, first.output
    second = call("compare", "kd-ticket", "gmp", "rigl", "small-dense", *shared)
    assert second.exit_code == 0, second.output
    assert "3 finished runs" in second.output
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    runs = [row["run"].partition("/")[2] for row in rows if row["kind"] == "result"]
    assert runs == ["dense", "kd-0.9", "gmp-0.9", "rigl-0.9", "small-dense-0.9"]
    for name in ("accuracy_vs_sparsity", "accuracy_vs_flops", "accuracy_vs_time"):
        assert (tmp_path / "figures" / f"{name}.png").exists()
    assert call("compare", "magic", "--out", str(tmp_path)).exit_code == 2


def test_a_recipe_trains_on_a_layout(tmp_path):
    shared = [*_QUICK, "--sparsity", "0.8", "--threads", "1", "--out", str(tmp_path)]
    shared += ["--set", "data.train_images=200", "--set", "dynamics.every=1"]
    result = call(*shared, "--method", "lt,rigl", "--set", "layout=bcsr:8")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "config.json").read_text())["recipe"]["layout"] == "bcsr:8"
    for method in ("lt", "rigl"):
        state = load_state(tmp_path / f"seed0/{method}-0.8/final.safetensors")
        dense = "fc" if method == "lt" else ()  # tickets mask convolutions alone
        model = sparsify(models.resnet20(num_classes=10, in_channels=1), 0.5, skip=dense)
        model.load_state_dict(state)
        assert relayout(model, "bcsr:8") is model
    fixed = call(*shared, "--method", "lt", "--set", "layout=nm")
    assert fixed.exit_code == 2
    assert "layout 'nm:2:4' keeps 2 of 4 weights" in fixed.output
    refused = call(*shared, "--fresh", "--method", "topkast", "--set", "layout=bcsr:8")
    assert refused.exit_code == 2
    assert "method 'topkast' does not support layout 'bcsr:8'; it supports csr" in refused.output


def test_the_reference_backend_can_be_chosen(tmp_path):
    result = call(*_QUICK, "--method", "lt", "--backend", "reference", "--out", str(tmp_path))
    assert result.exit_code == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["sessions"][0]["forced"] == "reference"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "nothing"], "recipe: expected one of demo"),
        (["train", "demo", "--data", "mnist"], "mnist"),
        (["train", "demo", "--data-dir", "/does/not/exist"], "/does/not/exist"),
        (["train", "demo", "--sparsity", "90"], "sparsities"),
        (["train", "demo", "--sparsity", "high"], "expected a number, got 'high'"),
        (["train", "demo", "--method", "magic"], "magic"),
        (["train", "demo", "--epochs", "0"], "epochs"),
        (["train", "demo", "--seeds", "0"], "seeds"),
        (["train", "demo", "--threads", "0"], "--threads"),
        (["train", "demo", "--backend", "tpu"], "tpu"),
        (["train", "demo", "--set", "training.speed=1"], "no field 'speed'"),
        (["train", "demo", "--set", "layout=blocks"], "layout: expected one of csr, bcsr, fanin"),
        (["explain", "resnet20", "--layout", "coo"], "layout: expected one of csr, bcsr, fanin"),
        (["train", "demo", "--set", "model.name=resnet21"], "resnet21"),
        (["recipes", "nothing"], "recipe"),
        (["report", "/does/not/exist"], "/does/not/exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path):
    if arguments[0] == "train":
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_damaged_checkpoint_is_one_line(finished, tmp_path):
    result = call(*_QUICK, "--set", "methods=", "--out", str(tmp_path))
    assert result.exit_code == 0
    path = tmp_path / "seed0/dense/epoch_001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = call(*_QUICK, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "epoch_001.safetensors" in result.stderr


def test_diverging_is_one_line_and_exit_code_1(tmp_path):
    result = call(*_QUICK, "--set", "training.lr=1e30", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "the loss became" in result.stderr


def test_recipes_are_listed_and_shown():
    listing = call("recipes").output
    for name in ("demo", "fashion-mnist", "kd_ticket_cifar10", "kd_ticket_imagenet"):
        assert name in listing
    fields = call("recipes", "kd-ticket-imagenet").output.splitlines()
    assert "kd.until = 60" in fields
    assert "training.milestones = 30,60,80" in fields


def test_every_field_shown_can_be_set():
    for line in call("recipes", "kd_ticket_imagenet").output.splitlines():
        field, _, value = line.partition(" = ")
        if field not in ("name", "description"):
            sparsekd_recipe = sparsekd.recipes.get("kd_ticket_imagenet")
            assert sparsekd.recipes.override(sparsekd_recipe, f"{field}={value}") == sparsekd_recipe


def test_info_names_versions_and_backends():
    output = call("info").output
    for text in ("torch", torch.__version__, "threads", "cpp", "reference"):
        assert text in output


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*_CALL, *arguments], env=_ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_row(out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rows_without_times(out: Path) -> list[dict]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in rows
        if row["kind"] != "timing"
    ]


_TWO_RUNS = [
    *("train", "demo", "--epochs", "2", "--sparsity", "0.9", "--method", "kd", *_SMALL),
    *("--threads", "1", "--backend", "cpp", *_FIVE_STEPS),
]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_an_interrupted_process_resumes_to_the_same_rows(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    result = call(*_TWO_RUNS, "--out", str(whole))
    assert result.exit_code == 0, result.output
    process = start(*_TWO_RUNS, "--out", str(out))
    wait_for_row(out, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"the same command goes on from {out}:\n  sparsekd train demo" in output
    result = call(*_TWO_RUNS, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert rows_without_times(out) == rows_without_times(whole)
    models = [(path / "seed0/kd-0.9/final.safetensors").read_bytes() for path in (out, whole)]
    assert models[0] == models[1]


def test_a_report_has_figures_in_the_formats_asked_for(tmp_path):
    run = tmp_path / "compare"
    shutil.copytree(Path(__file__).parents[2] / "docs/results/compare", run)
    result = CliRunner().invoke(app, ["report", str(run), "--format", "svg"])
    assert result.exit_code == 0, result.output
    drawn = {file.name for file in (run / "figures").glob("*.svg")}
    assert {"accuracy_vs_flops.svg", "loss_curves.svg"} <= drawn
    refused = CliRunner().invoke(app, ["report", str(run), "--format", "gif"])
    assert refused.exit_code == 2
    assert "expected some of png, pdf, svg" in refused.output
