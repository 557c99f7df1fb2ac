"""Rows of predicted and measured steps, and their table."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from benchmarks import advice


@pytest.fixture
def command(monkeypatch):
    small = advice.Network(lambda: nn.Sequential(nn.Linear(64, 32)), lambda: torch.randn(4, 64))
    monkeypatch.setitem(advice.NETWORKS, "small", small)
    app = typer.Typer()
    app.command()(advice.main)
    return lambda *words: CliRunner(env={"COLUMNS": "140"}).invoke(app, list(map(str, words)))


def test_every_plan_that_was_measured_is_a_row_and_a_line(command, tmp_path):
    rows = tmp_path / "rows.jsonl"
    options = ("--network", "small", "--aim", "flops=0.5,flops=0.1", "--rounds", 1, "--rows", rows)
    result = command(*options)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["aim"], row["sparsity"]) for row in found] == [
        ("flops=0.5", 0.5),
        ("flops=0.1", 0.9),
    ]
    for row in found:
        assert min(row["dense_ms"], row["predicted_ms"], row["ms"]) > 0
        off = f"{row['predicted_ms'] / row['ms'] - 1:+.1%}"
        assert off in result.output
    assert command("--draw", "--rows", rows).output == result.output
    before = rows.read_bytes()
    assert command(*options).output == result.output  # what has rows is not measured again
    assert rows.read_bytes() == before
    command(*options, "--fresh")
    assert len(rows.read_text().splitlines()) == 4


def test_an_unknown_network_is_told_in_a_line(command, tmp_path):
    result = command("--network", "lenet", "--rows", tmp_path / "rows.jsonl")
    assert result.exit_code == 2
    assert "--network: expected some of resnet18" in result.output
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_networks_are_of_several_families():
    for name in ("resnet18", "wrn22_2", "vgg16_bn"):
        net = advice.NETWORKS[name]
        assert net.build()(net.inputs()[:2]).shape[0] == 2
