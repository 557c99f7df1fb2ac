"""The command measures, reports and goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from sparsekd.bench.suite import SUITE, BenchConfig
from sparsekd.cli import app


def call(*arguments):
    threads = torch.get_num_threads()
    try:
        return CliRunner(env={"COLUMNS": "140"}).invoke(app, ["bench", *map(str, arguments)])
    finally:
        torch.set_num_threads(threads)


def test_the_command_measures_reports_and_goes_on(tmp_path):
    rows = tmp_path / "some rows.jsonl"
    options = (
        *("--level", "layer", "--competitor", "sparsekd", "--sparsity", "0.9", "--batch", "4"),
        *("--rounds", "1", "--threads", "1", "--rows", rows),
    )
    first = call(*options)
    assert first.exit_code == 0, first.output
    assert "256>256 8x8 3x3 b4" in first.output
    assert (tmp_path / "speedup_layers.png").exists()
    before = rows.read_bytes()
    assert {json.loads(line)["arm"] for line in before.splitlines()} == {
        "dense_contiguous",
        "sparsekd",
    }
    assert call(*options).exit_code == 0
    assert rows.read_bytes() == before
    drawn = call("--draw", "--rows", rows, "--out", tmp_path / "again")
    assert drawn.exit_code == 0
    assert (tmp_path / "again" / "README.md").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--level", "speed"), "level: expected one of layer, step"),
        (("--network", "alexnet"), "network: expected one of resnet18"),
        (("--competitor", "magic"), "competitor: expected one of"),
        (("--sparsity", "90"), "sparsity: expected numbers in [0, 1), got 90"),
        (("--rounds", "0"), "rounds: expected at least 1"),
        (("--draw",), "expected rows of `sparsekd bench`, found none"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, arguments, message):
    result = call(*arguments, "--rows", tmp_path / "rows.jsonl")
    assert result.exit_code == 2
    assert message in result.output


def test_a_call_has_every_level_and_no_row_twice():
    sessions = SUITE.sessions(BenchConfig())
    keys = [(session.name, key) for session in sessions for key in session.keys()]  # noqa: SIM118
    sparse = [key for key in keys if key[1][1] is not None]
    assert len(set(sparse)) == len(sparse)
    assert list(dict.fromkeys(name[0] for name, _ in keys)) == list(SUITE.levels)


def test_a_network_of_ones_own_is_timed(tmp_path, monkeypatch):
    (tmp_path / "their_network.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    convs = nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()\n"
        "    return nn.Sequential(*convs, nn.Linear(8 * 4 * 4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    result = call(
        *("--level", "step", "--network", "their_network:make", "--input", "2,8,8"),
        *("--competitor", "sparsekd", "--sparsity", "0.5", "--batch", "4", "--rounds", "1"),
    )
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "runs" / "bench" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["arm"] for row in rows} == {"dense_contiguous", "sparsekd"}
    assert all(row["ms"] > 0 for row in rows)
    assert {row["case"] for row in rows} == {"their_network:make 8x8 b4"}


@pytest.mark.parametrize("network", ["no_such_module:make", "sparsekd.models:no_such_function"])
def test_a_factory_that_is_not_there_is_an_error(tmp_path, monkeypatch, network):
    monkeypatch.chdir(tmp_path)
    result = call("--level", "step", "--network", network)
    assert result.exit_code == 2
    assert f"expected package.module:factory, got {network!r}" in " ".join(result.output.split())
