"""Advice follows the times of layers, and what is applied is what was timed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparsekd as skd
from sparsekd.bench.advise import AIMS, advise
from sparsekd.bench.model import bench_model
from sparsekd.cli import app
from sparsekd.diagnose.breakeven import PassTimes
from sparsekd.errors import UnsupportedError
from sparsekd.nn import SparseLinear, sparse_modules
from sparsekd.ops.checks import geometry


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 96), nn.Linear(96, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.relu(self.narrow(torch.relu(self.wide(x)))))


@pytest.fixture
def times(monkeypatch):
    """Let a layer's passes take what a test says: by rows of its weight and by its tiles."""
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
    given: dict[tuple[int, bool], tuple[float, float]] = {}

    def time_pass(op, args, backend):
        rows = geometry(op, args)[0][0]
        tiled = sys.modules["sparsekd.diagnose.explain"]._tile_size(op, args) != (1, 1)
        sparse, dense = given[rows, tiled]
        return PassTimes(backend, sparse, dense, sparse, sparse, sparse)

    monkeypatch.setattr(sys.modules["sparsekd.diagnose.explain"], "time_pass", time_pass)
    return given


def test_layers_that_lose_stay_dense_and_each_takes_its_best_layout(times):
    times.update(
        {
            (96, False): (1.0, 4.0), (96, True): (0.5, 4.0),
            (32, False): (1.0, 4.0), (32, True): (2.0, 4.0),
            (4, False): (1.0, 1.0), (4, True): (1.0, 1.0),
        }
    )  # fmt: skip
    net = Net()
    advice = advise(
        net, torch.randn(8, 64), sparsity=0.75, distribution="uniform",
        layouts=("csr", "bcsr:4"), rounds=1,
    )  # fmt: skip
    assert {layer.name: layer.layout for layer in advice.layers} == {
        "wide": "bcsr:4", "narrow": "csr", "head": None,
    }  # fmt: skip
    assert advice.dense == ("head",)
    assert "Dense, as sparse would lose: head." in str(advice)
    # two passes of the first layer, three of the others, against all of them in csr
    wide, narrow, head = advice.layers
    assert (wide.sparse_ms, narrow.sparse_ms, head.dense_ms) == (2 * 0.5, 3.0, 3.0)
    assert advice.measured_ms > 0
    sparse = advice.apply(net)
    layers = dict(sparse_modules(sparse))
    assert sorted(layers) == ["narrow", "wide"]
    assert isinstance(sparse.head, nn.Linear)
    assert str(layers["wide"].layout) == "bcsr:4"
    for name, layer in layers.items():
        assert torch.equal(layer.topology.mask(), advice.masks[name])
        assert layer.topology.sparsity == pytest.approx(0.75, abs=0.01)


def test_the_prediction_adds_what_the_plan_changes_to_a_measured_step(times, monkeypatch):
    advising = sys.modules["sparsekd.bench.advise"]
    steps = {"dense_contiguous": 30.0, "dense_channels_last": 20.0, "probe": 12.0, "plan": 9.0}
    monkeypatch.setattr(advising, "_race", lambda *args: steps)
    times.update({(96, False): (1.0, 4.0), (32, False): (1.0, 4.0), (4, False): (2.0, 1.0)})
    advice = advise(Net(), torch.randn(8, 64), sparsity=0.75, distribution="uniform")
    assert advice.dense == ("head",)
    assert advice.predicted_ms == 12.0 - 3 * (2.0 - 1.0)
    assert (advice.measured_ms, advice.dense_ms) == (9.0, 20.0)


def test_each_aim_has_its_own_reason(times):
    times.update({(96, False): (5.0, 4.0), (32, False): (1.0, 4.0)})
    times[4, True] = (1.0, 4.0)  # a weight without zeros is a tile
    x = torch.randn(8, 64)
    dense = {
        aim: advise(Net(), x, aim=aim, sparsity=0.4, distribution="erk", rounds=1) for aim in AIMS
    }
    density = {layer.name: layer.density for layer in dense["time"].layers}
    assert density["head"] == 1
    assert density["wide"] < 0.75 < density["narrow"] < 1
    assert {aim: one.dense for aim, one in dense.items()} == {
        "time": ("wide",),
        "flops": ("head",),
        "memory": ("narrow", "head"),
    }


def test_measured_advice_on_a_network_is_applied_as_it_was_timed():
    net = skd.models.resnet20(in_channels=1)
    advice = advise(net, torch.randn(4, 1, 8, 8), sparsity=0.9, rounds=1)
    assert len(advice.layers) == 22
    assert advice.predicted_ms > 0
    assert advice.measured_ms > 0
    sparse = advice.apply(net)
    assert len(list(sparse_modules(sparse))) == 22 - len(advice.dense)


def test_words_and_numbers_are_checked():
    x = torch.randn(8, 64)
    with pytest.raises(UnsupportedError, match="aim: expected one of time, flops, memory"):
        advise(Net(), x, aim="speed")
    with pytest.raises(UnsupportedError, match="layout"):
        advise(Net(), x, layouts=("magic",))
    with pytest.raises(ValueError, match="sparsity"):
        advise(Net(), x, sparsity=1.5)
    with pytest.raises(UnsupportedError, match="sparsity"):
        bench_model(Net(), x, sparsities=(1.0,))


def test_a_layer_by_itself_can_be_the_model():
    layer = nn.Linear(64, 32)
    advice = advise(layer, torch.randn(8, 64), aim="flops", sparsity=0.9, rounds=1)
    assert isinstance(advice.apply(layer), SparseLinear)


@pytest.mark.parametrize("command", ["advise", "explain"])
def test_the_commands_take_a_model(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))\n"
    )
    threads = torch.get_num_threads()
    options = ("--model", "own_net:make", "--input", "16,64", "--threads", "1")
    result = CliRunner(env={"COLUMNS": "140"}).invoke(app, [command, *options])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "96x64" in result.output
    refused = CliRunner().invoke(app, [command, "--model", "own_net:make", "--input", "16,x"])
    assert refused.exit_code == 2
    assert "expected sizes" in " ".join(refused.output.split())
