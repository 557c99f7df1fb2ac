"""What an experiment writes: rows, models, tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sparsekd.recipes import (
    Experiment,
    ModelChoice,
    RunFolder,
    check,
    plan,
)
from sparsekd.recipes.report import read_rows, table
from sparsekd.tickets import Superposition
from sparsekd.train import Reporter, Training, load_state, state_hash


def test_a_run_leaves_its_rows_models_and_configuration(run, finished, tiny):
    rows = read_rows(finished)
    assert [row["run"] for row in rows if row["kind"] == "result"] == [r.name for r in plan(tiny)]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs if row["run"] == "seed0/kd-0.8"] == [1, 2]
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"]["training"]["batch_size"] == 100
    assert config["sessions"][0]["torch"]
    lt, kd = (load_state(finished / f"seed0/{name}-0.8/final.safetensors") for name in ("lt", "kd"))
    assert lt.keys() == kd.keys()
    for name in lt:
        if name.endswith("indices"):  # the same masks, whatever the loss
            assert lt[name].equal(kd[name])
    assert state_hash(lt) != state_hash(kd)
    assert not list(finished.rglob("training.pt"))


def test_a_result_counts_what_it_stores(finished):
    rows = {row["run"]: row for row in read_rows(finished) if row["kind"] == "result"}
    dense, lt = rows["seed0/dense"], rows["seed0/lt-0.8"]
    assert dense["nnz"] == dense["numel"] == lt["numel"]
    assert lt["nnz"] == lt["numel"] - int(0.8 * lt["numel"])
    assert dense["flops_train"] == dense["flops_train_dense"] == lt["flops_train_dense"]
    assert lt["flops_train"] < 0.5 * lt["flops_train_dense"]
    assert lt["density"]["fc"] == 1.0


def test_a_run_counts_its_teacher_and_its_topology(finished):
    rows = {row["run"]: row for row in read_rows(finished) if row["kind"] == "result"}
    dense, lt, kd = (rows[f"seed0/{name}"] for name in ("dense", "lt-0.8", "kd-0.8"))
    images = 2 * 300
    assert dense["flops_run"] == images * dense["flops_train"]
    assert lt["flops_run"] == images * lt["flops_train"]
    assert kd["flops_run"] == lt["flops_run"] + images * dense["flops_train"] // 3


def test_iterative_pruning_runs_and_reports_every_round(run, tmp_path, tiny):
    run(replace(tiny, methods=("imp",), sparsities=(0.36,)), tmp_path)
    rows = [row for row in read_rows(tmp_path) if row["kind"] == "result"]
    assert [row["sparsity"] for row in rows] == [0.0, 0.2, 0.36]
    remaining = rows[0]["numel"]
    for row in rows[1:]:
        remaining -= -(-remaining // 5)
        assert row["nnz"] == remaining
    assert rows[1]["epochs"] == 1  # rewound to epoch 1 of 2


def test_a_run_of_sup_tickets_tells_of_its_tickets(run, tmp_path, tiny):
    sup = Superposition(cycle_count=2, cycle_epochs=1, drop_fraction=0.5)
    training = replace(tiny.training, epochs=3)
    run(replace(tiny, training=training, sup=sup, methods=("sup-set",)), tmp_path)
    rows = read_rows(tmp_path)
    epochs = [row.get("ticket_test_accuracy") for row in rows if row["kind"] == "epoch"]
    (result,) = (row for row in rows if row["kind"] == "result")
    assert result["ticket_test_accuracies"] == epochs  # the host's end, and those of two cycles
    assert len(epochs) == 3
    stored = result["nnz"] / result["numel"]
    assert stored < result["union_density"] <= min(1, 3 * stored) + 1e-3
    assert result["sparsity_masked"] == pytest.approx(0.8, abs=1e-3)
    assert result["density"]["fc"] < 1
    assert result["layers"] == "all"


def test_a_network_without_convolutions_takes_methods_that_mask_linear_layers(
    run, digits, tmp_path, tiny
):
    mlp = replace(tiny, model=ModelChoice("lenet300_100"), methods=("rigl",), training=Training(1))
    run(mlp, tmp_path / "rigl")
    (result,) = (row for row in read_rows(tmp_path / "rigl") if row["kind"] == "result")
    assert result["sparsity_masked"] == pytest.approx(0.8, abs=1e-4)
    assert result["sparsity_whole"] < result["sparsity_masked"]  # biases count there
    with pytest.raises(ValueError, match="kd masks convolutions, the network has none"):
        check(replace(mlp, methods=("kd",)), digits)
    check(replace(mlp, methods=("kd",), layers="all"), digits)
    with pytest.raises(ValueError, match="skip: 'conv1' matches none of fc1, fc2, fc3"):
        check(replace(mlp, skip=("conv1",)), digits)
    run(replace(mlp, methods=("lt",), layers="all"), tmp_path / "all")


def test_the_table_has_a_line_a_method_and_sparsity(finished):
    rows = read_rows(finished)
    cells = {(r["method"], r["sparsity"]) for r in rows if r["kind"] == "result"}
    assert table(rows).row_count == len(cells)


def test_a_collapsed_layer_is_announced(digits, tmp_path, monkeypatch, tiny):
    messages = []
    monkeypatch.setattr(Reporter, "message", lambda self, text: messages.append(text))
    recipe = replace(tiny, training=Training(1, batch_size=300), sparsities=(0.9999,))
    with RunFolder(tmp_path, recipe) as folder:
        Experiment(recipe, digits, folder).run()
    assert any("lost every weight" in message for message in messages)
