"""Wrong invocations: one line that says what to do, exit status 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparsekd
from sparsekd.cli import app
from sparsekd.train import MetricsLog
from sparsekd.train.working_folder import lock_folder

_ENV = {**os.environ, "PYTHONPATH": str(Path(sparsekd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
_CALL = [sys.executable, "-m", "sparsekd"]
_RIGL = ("train", "demo", "--method", "rigl", "--sparsity", "0.9")
_SHORT = [
    *("train", "demo", "--epochs", "1", "--sparsity", "0.9", "--threads", "1", "--seeds", "1"),
    *("--method", "kd", "--set", "data.train_images=128"),
]


def call(*arguments: str):
    threads = torch.get_num_threads()
    try:
        return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(arguments))
    finally:
        torch.set_num_threads(threads)


MISTAKES = [
    # options
    (("train",), "Missing argument 'recipe'"),
    (("train", "demo", "--no-such-flag"), "No such option: --no-such-flag"),
    (("trian", "demo"), "No such command 'trian'"),
    (("train", "demo", "--seeds", "many"), "--seeds"),
    (("train", "demo", "--threads", "100000"), "--threads: expected at least 1 and at most"),
    (("explain", "resnet20", "--threads", "0"), "--threads: expected at least 1"),
    (("bench", "--threads", "-2"), "--threads: expected at least 1"),
    # values
    (("train", "demo", "--sparsity", "nan"), "sparsities: expected numbers in [0, 1), got nan"),
    (("train", "demo", "--sparsity", ""), "sparsities: expected at least one for reinit"),
    (("train", "demo", "--first-seed", "-3"), "first_seed: expected at least 0, got -3"),
    ((*_RIGL, "--set", "dynamics.every=0"), "every: expected a positive integer, got 0"),
    ((*_RIGL, "--set", "dynamics.drop_fraction=2"), "drop_fraction: expected 0 to 1, got 2.0"),
    ((*_RIGL, "--set", "dynamics.until=-1"), "until: expected 0 to 1, got -1.0"),
    (("train", "demo", "--set", "kd.until=0"), "until: expected at least 1 epoch"),
    (("train", "demo", "--set", "training.lr=inf"), "lr: expected a positive number, got inf"),
    (("train", "demo", "--method", ","), "methods: expected at least one"),
    (("train", "demo", "--set", "=3"), "--set: expected a.b=value, got '=3'"),
    # what does not fit together
    (
        ("train", "demo", "--set", "model.name=lenet5", "--set", "skip="),
        "model.name=lenet5: does not take the 1x8x8",
    ),
    (("train", "demo", "--set", "model.stem=cifar"), "wrn22_2 does not fit digits"),
    (
        ("train", "demo", "--set", "data.train_images=5000"),
        "--set data.train_images=none trains on all",
    ),
    (("train", "demo", "--set", "layout=nm"), "layout 'nm:2:4' keeps 2 of 4 weights"),
    (
        ("train", "demo", "--method", "topkast", "--set", "layout=bcsr"),
        "method 'topkast' does not support layout",
    ),
    # runs that would not be what their name says
    ((*_RIGL, "--epochs", "1", "--set", "dynamics.every=100"), "0 updates of the topology"),
    ((*_RIGL, "--set", "dynamics.until=0"), "raise dynamics.until"),
    (
        ("train", "demo", "--method", "sup-rigl", "--set", "sup.cycle_epochs=8"),
        "0 cycles of Sup-tickets fit",
    ),
    # folders and files
    (("train", "demo", "--out", "/proc/runs"), "choose a folder that can be written by --out"),
    (("report", "."), "expected the rows of a finished run"),
    (("bench", "--draw", "--rows", "/dev/null/rows.jsonl"), "/dev/null/rows.jsonl"),
    # networks
    (("explain", "resnet21"), "resnet21"),
    (("explain", "resnet20", "--input", "3,32"), "--input: expected channels,height,width"),
    (("explain", "resnet20", "--batch", "0"), "--batch"),
    (("bench", "--network", "resnet20", "--input", "a,b,c"), "--input: expected channels"),
    (("recipes", "demmo"), "expected one of demo"),
    (("recipes", "--toml"), "--toml: expected the name of a recipe"),
    (("explain", "resnet20", "--inputs", "net.py:batch"), "--inputs: expected a --model"),
    (
        ("explain", "resnet20", "--sparsity", "1.0"),
        "--sparsity: expected a number in [0, 1), got 1",
    ),
    # bench
    (("bench", "--sparsity", "1.0"), "sparsity: expected numbers in [0, 1), got 1.0"),
    (("bench", "--sparsity", "90%"), "--sparsity: expected numbers, as 0.8,0.9, got '90%'"),
    (("bench", "--sparsity", ","), "--sparsity: expected numbers"),
    (("bench", "--level", ""), "--level: expected at least one, got ''"),
    (("bench", "--competitor", "nosuch"), "competitor: expected one of dense_contiguous"),
    (("bench", "--rounds", "0"), "rounds: expected at least 1, got 0"),
    (("bench", "--seconds", "nan"), "--seconds: expected a positive number, got nan"),
    (("bench", "--layout", "bcsr"), "--layout: expected a --model that it is for"),
    (("bench", "--network", "nothere.mod:make"), "No module named 'nothere'"),
    # analyze
    (("analyze", "gradient-flow", "--threads", "10000"), "--threads: expected at least 1"),
    (("analyze", "gradient-flow", "--sparsity", "90%"), "sparsities: expected numbers"),
    (("analyze", "gradient-flow", "--preset", "tiny"), "--preset: expected one of small, full"),
    (("analyze", "gradient-flow", "--network", ""), "--network: expected some of lenet300_100"),
    (("analyze", "bases", "--density", "1.5"), "densities: expected numbers in (0, 1), got 1.5"),
    (("analyze", "bootstrap", "--out", "/proc/x"), "choose a folder that can be written by --out"),
    # export, report, demo, compare
    (("export", "x", "--to", "dense"), "x: expected the folder of a run"),
    (("export", "x", "--to", ""), "--to: expected one of dense, onnx, torch-export"),
    (("report", ".", "--format", "gif"), "format: expected some of png, pdf, svg"),
    (("report", ".", "--log", "nosuch"), "--log: expected names among csv, tensorboard"),
    (("demo", "--threads", "0"), "--threads: expected at least 1"),
    (("demo", "--out", "/proc/x"), "choose a folder that can be written by --out"),
    (("compare", "rigll"), "did you mean rigl?"),
    (("compare", "rigl", "--recipe", "nothere.toml"), "No such file or directory: 'nothere.toml'"),
    # train
    (("train", "demo", "--data", "mnistt"), "data.name: expected one of digits"),
    (("train", "demo", "--set", "model.name=resnet21"), "model.name: expected one of resnet20"),
    (("train", "demo", "--set", "data.image_size=3"), "data.image_size: only imagefolder has it"),
    (("train", "demo", "--set", "name=../up"), "name: expected one without slashes"),
    (("train", "demo", "--backend", "nosuch"), "backend: expected one of auto, cpp"),
]

_NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))

def raises():
    raise KeyError("k")

def nothing():
    return nn.ReLU()

def number():
    return 3
"""
_OWN = ("--model", "net.py:make")
# what lies in the folder, the command, the message
MISTAKES_IN_FILES = [
    (_NET, ("explain", *_OWN, "--input", "2,3,9,9"), "input: the model does not take 2x3x9x9"),
    (_NET, ("advise", *_OWN, "--input", "2,4,8,8"), "input: the model does not take 2x4x8x8"),
    (_NET, ("bench", *_OWN, "--input", "2,3,8,8:int64:9"), "input: the model does not take"),
    (_NET, ("bench", *_OWN, "--inputs", "net.py:number"), "input: the model does not take it"),
    (_NET, ("bench", *_OWN, "--inputs", "net.py:raises"), "inputs: net.py:raises raised KeyError"),
    (_NET, ("bench", *_OWN), "expected --input, as 128,3,32,32"),
    (_NET, ("bench", *_OWN, "--input", "2,3,8,8", "--network", "resnet20"), "--network: expected"),
    (_NET, ("bench", "--model", "net.py:nothing", "--input", "2,3"), "to convert, found none"),
    (_NET, ("bench", "--model", "net.py:raises", "--input", "2,3"), "raised KeyError: 'k'"),
    (
        _NET,
        ("explain", "--model", "net.py:number", "--input", "2,3"),
        "to return a module, got int",
    ),
    ("def make(:", ("explain", *_OWN, "--input", "2,3"), "invalid syntax (net.py, line 1)"),
    (_NET, ("bench", "--rows", "net.py/rows.jsonl"), "choose a folder that can be written"),
    (_NET, ("bench", "--draw", "--rows", "net.py"), "net.py: line 1 is not JSON"),
    (_NET, ("demo", "--out", "net.py"), "choose a folder that can be written by --out"),
    (_NET, ("export", "net.py", "--to", "dense"), "net.py: expected the folder of a run"),
    (_NET, ("report", "net.py"), "expected the rows of a finished run, found none"),
    ("", ("train", "my.toml"), "my.toml: recipe: expected the recipe to start from"),
    ("a = ", ("train", "my.toml"), "my.toml: Invalid value"),
    (b"\xff\xfe\x00", ("train", "my.toml"), "my.toml: 'utf-8' codec can't decode"),
    (
        'recipe = "demo"\nsparsities = [[0.9]]',
        ("train", "my.toml"),
        "expected a list of plain values",
    ),
    ('recipe = "demo"\nsparsities = [1.0]', ("train", "my.toml"), "my.toml: sparsities: expected"),
    ("recipe: [", ("train", "my.yaml"), "my.yaml: "),
    ("[", ("report", "my.toml"), "expected the rows of a finished run"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, arguments, message",
    MISTAKES_IN_FILES,
    ids=[f"{number} {' '.join(row[1])}" for number, row in enumerate(MISTAKES_IN_FILES)],
)
def test_a_mistake_in_a_file_is_one_line_too(content, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [word for word in arguments if word.startswith("my.")] or ["net.py"]
    file = tmp_path / names[0]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    left = [path for path in tmp_path.iterdir() if path.name != "__pycache__"]
    assert left == [file]


def test_a_model_that_needs_more_memory_than_there_is_is_one_line():
    result = call("explain", "lenet300_100", "--input", "1,28,28", "--batch", str(10**12))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: not enough memory: ")


def test_each_kind_of_warning_is_shown_once_and_counted(tmp_path):
    sparsities = "0.98,0.99,0.995"
    result = call(*_SHORT, "--sparsity", sparsities, "--method", "reinit", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    first, more = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    channels = "no weight is left in some output channels, which give only their bias,"
    assert first.startswith(f"warning: {channels} if any: ")
    assert more == f"warning: 2 more of the kind: {channels} ..."


def test_a_batch_larger_than_the_set_is_said(tmp_path):
    wide = [*_SHORT, "--method", "dense", "--set", "training.batch_size=1000"]
    result = call(*wide, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "training.batch_size=1000: a step takes all 128 training images" in result.stdout
    rows = MetricsLog(tmp_path / "out/metrics.jsonl").rows()
    assert [row["kind"] for row in rows] == ["epoch", "result", "timing"]


def test_a_run_that_diverges_is_one_line(tmp_path):
    wild = [*_SHORT, "--method", "dense", "--set", "training.lr=1e30", "--out", str(tmp_path)]
    for _ in range(2):  # the second goes on from what the first has left
        result = call(*wild)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert "lower" in line


def test_the_suggested_setting_mends_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = [*_SHORT, "--epochs", "2", "--method", "rigl", "--set", "training.batch_size=32"]
    refused = call(*wrong, "--set", "dynamics.every=100", "--out", "out")
    assert refused.exit_code == 2
    assert "rigl: 0 updates of the topology fall into the run, which has 8 steps" in refused.stderr
    assert "--set dynamics.every=1 makes 5" in refused.stderr
    mended = call(*wrong, "--set", "dynamics.every=1", "--out", "out")  # the folder is free
    assert mended.exit_code == 0, mended.output
    rows = MetricsLog(Path("out/metrics.jsonl")).rows()
    assert sum(row["updates"] for row in rows if row["kind"] == "epoch") == 5
    lines = mended.stdout.splitlines()
    lines = [line.split() for line in lines if line.startswith("RigL")]
    assert ["RigL", "0.9", "5"] in [line[:3] for line in lines]


def test_a_refused_setting_leaves_a_folder_as_it_was(tmp_path):
    out = tmp_path / "out"
    assert call(*_SHORT, "--method", "dense", "--out", str(out)).exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for more in (["--fresh", "--set", "model.name=lenet5"], ["--set", "training.lr=0.01"]):
        refused = call(*_SHORT, "--method", "dense", *more, "--out", str(out))
        assert refused.exit_code == 2
        after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert after == before


def test_damage_names_what_to_remove_and_removing_it_mends(tmp_path):
    out = tmp_path / "out"
    assert call(*_SHORT, "--method", "dense", "--out", str(out)).exit_code == 0
    model = out / "seed0/dense/epoch_001.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-100])
    refused = call(*_SHORT, "--method", "lt", "--out", str(out))
    assert refused.exit_code == 2
    assert "remove the folder it lies in" in refused.stderr
    shutil.rmtree(model.parent)
    assert call(*_SHORT, "--method", "lt", "--out", str(out)).exit_code == 0
    assert model.read_bytes() == whole


def test_a_folder_in_use_says_what_to_do(tmp_path):
    with lock_folder(tmp_path):
        for arguments in ([*_SHORT, "--out"], ["analyze", "bootstrap", "--out"]):
            result = call(*arguments, str(tmp_path))
            assert result.exit_code == 2
            (line,) = result.stderr.splitlines()
            assert "wait until it is done, or choose another --out" in line
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "epoch"}\nnonsense\n{}\n')
    result = call("report", str(tmp_path))
    assert result.exit_code == 2
    assert "line 2 is not JSON" in result.stderr
    assert "remove this line" in result.stderr


def test_rows_that_cannot_be_read_leave_the_folder_as_it_was(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("nonsense\n")
    refused = call(*_SHORT, "--method", "dense", "--out", str(tmp_path))
    assert refused.exit_code == 2
    assert "line 1 is not JSON" in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "metrics.jsonl"}
    file.unlink()
    assert call(*_SHORT, "--method", "dense", "--out", str(tmp_path)).exit_code == 0


@pytest.mark.parametrize(
    "row, message",
    [('{"kind": "result"}', "line 1 lacks"), ("[1]", "line 1 is not a JSON object")],
)
def test_rows_of_something_else_are_named(row, message, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{row}\n")
    for arguments in (("report", str(tmp_path)), ("bench", "--draw", "--rows", str(file))):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert message in line
        assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_full_disk_is_one_line_that_says_what_to_do(tmp_path):
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from sparsekd.cli import main; main()"
    )
    arguments = [*_SHORT, "--method", "dense", "--out", str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=_ENV, capture_output=True, text=True
    )
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert "free some space and the same command goes on" in line
    assert not list(tmp_path.rglob("*.tmp"))


def test_help_version_and_brackets():
    for arguments in (["-h"], ["train", "-h"], ["bench", "--help"], []):
        result = call(*arguments)
        assert result.exit_code == 0
        assert "Usage: " in result.stdout
    for command in (
        *("train", "compare", "report", "recipes", "export", "bench", "explain", "advise"),
        *("info", "demo", "analyze"),
        *("analyze gradient-flow", "analyze bases", "analyze bootstrap"),
    ):
        shown = call(*command.split(), "-h")
        assert shown.exit_code == 0
        assert f"\n  sparsekd {command}" in shown.stdout  # an example
    assert "--install-completion" in call("-h").stdout
    assert f"torch {torch.__version__}" in call("--version").stdout


def test_markup_does_not_eat_text(capsys):
    sparsekd.terminal.console().print("pip install 'sparsekd[bench]' [default: 3]")
    with sparsekd.train.ProgressReporter(sparsekd.terminal.console()) as reporter:
        reporter.message("[bench]")
    printed = capsys.readouterr().out
    assert "sparsekd[bench]" in printed
    assert "[default: 3]" in printed
    assert "\n[bench]\n" in printed


def test_recipes_come_in_groups():
    output = call("recipes").stdout
    titles = ["To begin with", "As published", "tickets from a dense run", "topologies that move"]
    assert [title for title in titles if title in output] == titles
    assert sorted(titles, key=output.index) == titles
    for name in sparsekd.recipes.RECIPES:
        assert f"\n{name} " in output


def test_a_run_folder_says_how_to_go_on(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"recipe": {}}))
    result = call(*_SHORT, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "--fresh starts over" in result.stderr
