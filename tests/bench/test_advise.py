"""Advice follows the times of layers, and what is applied is what was timed."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import sparsekd as skd
from sparsekd.bench.advise import LADDER, advise
from sparsekd.bench.model import bench_model
from sparsekd.bench.planned import Steps, levelled
from sparsekd.bench.prediction import AIMS, Aim, Plan, Step, _along
from sparsekd.cli import app
from sparsekd.diagnose import flops
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


def lines(monkeypatch, dense: float, full: float, empty: float = 0.0):
    """Let every pass take `dense`, and sparse what lies between `empty` and `full` weights."""
    pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

    def time_pass(op, args, backend):
        return PassTimes(backend, 1.0, dense, 1.0, empty, full)

    monkeypatch.setattr(sys.modules["sparsekd.diagnose.explain"], "time_pass", time_pass)


def measured(monkeypatch, dense: float, around: float, scale: float):
    """Let a step take `around` and a share of what its layers take, 8 passes in all."""

    def measure(steps: Steps) -> list[tuple[Plan, Step]]:
        found = [(steps._plans.dense(), Step(dense, 1000, 1000))]
        for plan in steps._chosen:
            count = steps._plans.counted.at(plan.nnz).train
            found.append((plan, Step(around + scale * plan.ms, count, 500 + plan.bytes / 10)))
        return found

    monkeypatch.setattr(Steps, "measure", measure)


def test_the_least_sparsity_that_reaches_the_aim_is_chosen(monkeypatch):
    # A step of 10 ms around the layers, which run in half of their time by themselves.
    lines(monkeypatch, dense=4.0, full=8.0)
    measured(monkeypatch, dense=26.0, around=10.0, scale=0.5)
    x = torch.randn(8, 64)
    found = {
        share: advise(Net(), x, aim=f"time={share}", distribution="uniform")
        for share in (0.8, 0.6, 0.5, 0.4)
    }
    # 8 passes of 8 * density ms: 10 + 32 * density, of 26
    assert {share: one.sparsity for share, one in found.items()} == {
        0.8: 0.7, 0.6: 0.85, 0.5: 0.925, 0.4: 0.98,
    }  # fmt: skip
    for advice in found.values():
        step = 10 + 32 * (1 - advice.sparsity)
        assert advice.predicted_ms == pytest.approx(step, rel=0.02)
        assert advice.measured_ms == pytest.approx(step, rel=0.02)
        assert advice.predicted.bytes == pytest.approx(advice.measured.bytes)
        assert advice.predicted.flops == advice.measured.flops
        assert len(advice.trials) == 1
    assert [one.met for one in found.values()] == [True, True, True, False]
    assert "The aim time=0.6 is met." in str(found[0.6])
    text = str(found[0.4])
    assert "The aim time=0.4 cannot be met: 98 % comes nearest, with 0.411 of the dense" in text


def test_a_plan_that_misses_its_aim_mends_the_prediction_for_the_rungs_above(monkeypatch):
    lines(monkeypatch, dense=4.0, full=8.0)
    measured(monkeypatch, dense=26.0, around=10.0, scale=0.5)
    right = Steps.measure

    def slower(steps: Steps) -> list[tuple[Plan, Step]]:
        """Let whatever is sparser than 80 % but was no probe take 2 ms more."""
        return [
            (plan, replace(step, ms=step.ms + 2 * (plan.sparsity in LADDER)))
            for plan, step in right(steps)
        ]

    monkeypatch.setattr(Steps, "measure", slower)
    advice = advise(Net(), torch.randn(8, 64), aim="time=0.6", distribution="uniform")
    assert [trial.plan.sparsity for trial in advice.trials] == [0.85, 0.9]
    first, second = advice.trials
    assert (first.predicted.ms, first.measured.ms) == pytest.approx((14.8, 16.8), rel=0.02)
    # between 16.8 at 85 % and 11.92 at 94 %, which was a probe
    assert (second.predicted.ms, second.measured.ms) == pytest.approx((14.1, 15.2), rel=0.02)
    assert advice.met


def test_flops_are_counted_and_reach_the_aim_exactly():
    net, x = Net(), torch.randn(8, 64)
    advice = advise(net, x, aim="flops=0.25", rounds=1)
    assert advice.met
    assert advice.sparsity == 0.75
    sparse = advice.apply(net)
    count = flops.count(sparse, x)
    assert advice.measured.flops == advice.predicted.flops == count.train
    assert advice.before.flops == count.train_dense
    lower = advise(net := Net(), x, aim="flops=0.3", rounds=1)
    assert lower.sparsity == 0.7
    assert lower.aim.share is not None
    assert flops.count(lower.apply(net), x).train <= lower.aim.share * count.train_dense


def test_memory_is_predicted_from_steps_with_other_plans():
    net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    advice = advise(net, torch.randn(16, 512), aim="memory=0.5", rounds=1)
    assert advice.met
    assert advice.predicted.bytes == pytest.approx(advice.measured.bytes, rel=0.1)
    assert advice.measured.bytes < 0.5 * advice.before.bytes


def test_predictions_lie_between_what_was_measured_or_along_its_slope():
    sparse = [(0.0, 99.0), (2.0, 10.0), (6.0, 12.0)]
    assert _along(sparse, 1.0) == 9.5
    assert _along(sparse, 8.0) == 13.0
    assert _along([*sparse, (7.0, 20.0)], 8.0) == 20.5
    assert _along([*sparse, (4.0, 20.0)], 5.0) == 16.0
    assert _along([(0.0, 99.0), (2.0, 12.0), (6.0, 10.0)], 8.0) == 10.0
    assert _along([(0.0, 99.0), (2.0, 12.0), (2.0, 10.0)], 3.0) == 13.0
    assert _along([(9.0, 20.0)], 6.0) == 17.0


def test_what_disturbs_a_round_is_no_part_of_a_time():
    quiet = {"a": [10.0, 10.0, 10.0, 10.0], "b": [20.0, 20.0, 20.0, 20.0]}
    busy = {name: [t[0], 3 * t[1], t[2], t[3]] for name, t in quiet.items()}
    assert levelled(quiet) == pytest.approx({"a": 10.0, "b": 20.0})
    assert levelled(busy) == pytest.approx(levelled(quiet))
    drift = {"a": [10.0, 20.0], "b": [20.0, 40.0]}
    assert levelled(drift)["b"] == pytest.approx(2 * levelled(drift)["a"])


def test_each_aim_has_its_own_reason(times):
    times.update({(96, False): (5.0, 4.0), (32, False): (1.0, 4.0), (4, False): (1.0, 4.0)})
    x = torch.randn(8, 64)
    found = {
        aim: advise(Net(), x, aim=aim, sparsity=0.4, distribution="erk", rounds=1) for aim in AIMS
    }
    density = {layer.name: layer.density for layer in found["time"].layers}
    assert density["head"] == 1
    assert density["wide"] < 0.75 < density["narrow"] < 1
    assert {aim: one.dense for aim, one in found.items()} == {
        "time": ("wide", "head"),
        "flops": ("head",),
        "memory": ("narrow", "head"),
    }


def test_layouts_that_prescribe_a_density_have_one_rung():
    x = torch.randn(8, 64)
    advice = advise(Net(), x, aim="flops=0.6", layouts=("nm",), rounds=1)
    assert advice.sparsity == 0.5
    assert {layer.layout for layer in advice.layers} == {"nm:2:4"}
    assert advice.predicted_ms > 0
    both = advise(Net(), x, aim="flops=0.3", layouts=("nm", "csr"), rounds=1)
    assert {layer.layout for layer in both.layers} <= {"csr", None}
    with pytest.raises(ValueError, match=r"sparsity: the layouts allow 50 % only, got 0\.9"):
        advise(Net(), x, layouts=("nm",), rounds=1)


def test_measured_advice_on_a_network_is_applied_as_it_was_timed():
    net = skd.models.resnet20(in_channels=1)
    advice = advise(net, torch.randn(4, 1, 8, 8), sparsity=0.9, rounds=1)
    assert len(advice.layers) == 22
    assert advice.predicted_ms > 0
    assert advice.measured_ms > 0
    sparse = advice.apply(net)
    assert len(list(sparse_modules(sparse))) == 22 - len(advice.dense)
    assert advice.measured.flops == flops.count(sparse, torch.randn(4, 1, 8, 8)).train


def test_what_cannot_be_sparse_is_named():
    net = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 16))
    advice = advise(net, torch.randint(0, 50, (4, 6)), aim="flops", rounds=1)
    assert advice.left == pytest.approx({"0.weight": 1600 / 2128})
    assert "Cannot be sparse, or skipped: 0.weight (75.2%) of the parameters." in str(advice)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_width_loses_a_column_or_a_name(width):
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    advice = advise(net, torch.randn(8, 64), aim="flops=0.5", rounds=1)
    file = io.StringIO()
    Console(width=width, file=file).print(advice)
    printed = " ".join(file.getvalue().split())
    assert all(len(line) <= width for line in file.getvalue().splitlines())
    for word in ("weight", "advice", "sparsity", "96x64", "8x96", "predicted", "measured", "GFLOP"):
        assert word in printed


@pytest.mark.parametrize(
    "aim, message",
    [
        ("speed", "aim: expected one of time, flops, memory, with a share of the dense step"),
        ("speed=0.5", "aim: expected one of time, flops, memory"),
        ("", "aim: expected one of time, flops, memory"),
        ("time=", "aim: expected a share of the dense step between 0 and 1, as time=0.5, got"),
        ("time=0", "between 0 and 1, as time=0.5, got 'time=0'"),
        ("time=1", "between 0 and 1, as time=0.5, got 'time=1'"),
        ("flops=50%", "between 0 and 1, as flops=0.5, got 'flops=50%'"),
        ("memory=nan", "between 0 and 1, as memory=0.5, got 'memory=nan'"),
        ("time=0.5=0.2", "between 0 and 1, as time=0.5"),
    ],
)
def test_a_wrong_aim_is_refused_in_one_line_before_anything_is_timed(
    tmp_path, monkeypatch, aim, message
):
    with pytest.raises(UnsupportedError) as error:
        Aim.parse(aim)
    assert message in str(error.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Linear(8, 4)\n"
    )
    options = ("--model", "own_net.py:make", "--input", "2,8", "--aim", aim)
    result = CliRunner().invoke(app, ["advise", *options])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert message in result.output


def test_words_and_numbers_are_checked():
    x = torch.randn(8, 64)
    with pytest.raises(UnsupportedError, match="aim: expected one of time, flops, memory"):
        advise(Net(), x, aim="speed")
    with pytest.raises(UnsupportedError, match=r"sparsity: the aim time=0\.5 chooses it"):
        advise(Net(), x, aim="time=0.5", sparsity=0.9)
    with pytest.raises(UnsupportedError, match="layout"):
        advise(Net(), x, layouts=("magic",))
    with pytest.raises(UnsupportedError, match="layouts: expected at least one"):
        advise(Net(), x, layouts=())
    with pytest.raises(ValueError, match="sparsity"):
        advise(Net(), x, sparsity=1.5)
    with pytest.raises(UnsupportedError, match="distribution"):
        advise(Net(), x, distribution="even")
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
