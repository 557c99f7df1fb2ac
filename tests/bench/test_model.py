"""Any model is timed dense and sparse, step and layer, from Python and from the command line."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from sparsekd.bench.model import bench_model
from sparsekd.cli import app

SCRIPT = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(50, 32), nn.Dropout(0.5)
        self.hidden, self.head = nn.Linear(32, 64), nn.Linear(64, 5)

    def forward(self, ids, mask=None):
        x = self.drop(torch.relu(self.hidden(self.embedding(ids))))
        return {"logits": self.head(x if mask is None else x * mask[..., None])}

def make():
    return Tagger()

def batch():
    return {"ids": torch.arange(12).view(3, 4), "mask": torch.ones(3, 4)}

def broken():
    raise KeyError("no weights")
"""


class Pair(nn.Module):
    """Take images and numbers; return a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc, self.drop = nn.Linear(16 + 4, 8), nn.Dropout(0.3)

    def forward(self, images, *, numbers):
        x = torch.relu(self.norm(self.conv(images))).mean((2, 3))
        return self.drop(self.fc(torch.cat([x, numbers], 1))), x


def test_a_model_with_several_inputs_and_outputs_is_timed_whole_and_by_layer():
    model = Pair()
    before = copy.deepcopy(model.state_dict())
    found = bench_model(
        model, torch.randn(4, 3, 6, 6), numbers=torch.randn(4, 4),
        sparsities=(0.5, 0.8), layouts=("csr", "bcsr:4"), rounds=1,
    )  # fmt: skip
    assert all(torch.equal(old, model.state_dict()[name]) for name, old in before.items())
    assert not [row for row in found.rows if "failed" in row or "refused" in row]
    steps = {(r["arm"], r["op"], r["sparsity"]): r for r in found.rows if "step" in r["op"]}
    for layout in ("csr", "bcsr:4"):
        for sparsity in (0.5, 0.8):
            ours = steps["sparsekd_optimized", f"step {layout}", sparsity]
            dense = steps["dense_contiguous", f"step {layout}", None]
            assert 0 < ours["flops"] < dense["flops"]
            assert 0 < ours["held_mib"] < ours["live_mib"]
            assert found.speedup(sparsity, layout) > 0
    # 2 * positions * weights, forward and backward
    assert dense["flops"] == 3 * 2 * (4 * 36 * 16 * 27 + 4 * 8 * 20)
    assert len([key for key in steps if key[0] == "dense_bf16"]) <= 1
    layers = next(row for row in found.rows if row["op"] == "layers csr")
    assert [layer["name"] for layer in layers["layers"]] == ["conv", "fc"]
    assert [sparsity for sparsity, _ in layers["layers"][0]["at"]] == [0.5, 0.8]
    text = str(found)
    for part in ("Training steps of Pair 4x3x6x6, 4x4", "Work and memory", "Most to gain at 80 %"):
        assert part in text
    for width in (200, 40):
        console = Console(width=width, file=io.StringIO())
        console.print(found)
        assert isinstance(console.file, io.StringIO)
        printed = console.file.getvalue()
        for word in ("conv", "break-even", "bf16", "held, MiB", "16x3x3x3"):
            assert " ".join(printed.split()).count(word.split()[0]) >= 1, (width, word)


def test_a_loss_of_ones_own_is_what_the_step_minimises():
    calls = []

    def loss(output):
        calls.append(output.shape)
        return output.sum()

    bench_model(nn.Linear(8, 4), torch.randn(2, 8), sparsities=(0.5,), loss=loss, rounds=1)
    assert set(calls) == {(2, 4)}


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tagger.py").write_text(SCRIPT)
    return tmp_path


def call(*arguments):
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, ["bench", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "tagger:make", "--input", "3,4:int64:50"),
        ("--model", "tagger.py:make", "--inputs", "tagger.py:batch"),
    ],
)
def test_the_command_takes_a_factory_and_token_ids_or_a_script(script, arguments):
    options = ("--sparsity", "0.5", "--rounds", "1")
    result = call(*arguments, *options)
    assert result.exit_code == 0, result.output
    lines = (script / "runs" / "bench" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row["ms"] for row in rows if "skipped" not in row)
    assert {row["op"] for row in rows} == {"step csr", "layers csr"}
    assert "hidden" in result.output
    assert "Stays dense: embedding.weight" in " ".join(result.output.split())
    assert call(*arguments, *options).exit_code == 0
    assert (script / "runs" / "bench" / "rows.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "tagger:make"), "expected --input, as 128,3,32,32, or --inputs"),
        (("--model", "tagger:make", "--input", "3,x"), "expected sizes, as 128,3,32,32"),
        (("--model", "tagger:make", "--input", "3,4:complex9"), "expected sizes"),
        (("--model", "tagger:nothing", "--input", "3,4"), "expected package.module:factory"),
        (("--model", "tagger:broken", "--input", "3,4"), "tagger:broken raised KeyError"),
        (("--model", "tagger:batch", "--input", "3,4"), "expected tagger:batch to return a module"),
        (
            ("--model", "tagger:make", "--input", "3,4:int64:50", "--layout", "magic"),
            "layout: expected one of",
        ),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_is_written(script, arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (script / "runs").exists()
