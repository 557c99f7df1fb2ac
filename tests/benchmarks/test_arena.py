"""What the arena counts, profiles and reads from the system."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

import sparsekd as skd
from benchmarks.arena import roofline
from benchmarks.arena.competitors import STEPS
from benchmarks.arena.peak_memory import PeakMemory
from benchmarks.arena.peaks import Peaks, measure_peaks
from benchmarks.arena.steps import step_bytes
from benchmarks.arena.suite import ARENA
from benchmarks.arena.waterfall import PARTS, Waterfall, split_backward, step_parts
from benchmarks.cases import MODELS, conv_layers
from sparsekd.bench.cases import LayerCase, ModelCase, dense_ends
from sparsekd.bench.steps import step_flops
from sparsekd.bench.suite import SUITE, BenchConfig
from sparsekd.errors import ShapeError
from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.ops.cpu import cpp


def test_the_layer_set_is_every_distinct_convolution_behind_the_stems():
    layers = conv_layers()
    assert len(set(layers)) == len(layers) == 28
    assert LayerCase("conv", 64, 64, 32, 3) in layers
    assert LayerCase("conv", 1024, 2048, 8, 1, stride=2) in layers
    assert all(case.channels > 3 for case in layers)
    # ResNet-18 runs 4 + 3 of its blocks' convolutions on these shapes: its FLOPs follow from them.
    model = skd.models.resnet18()
    counted = skd.flops.count(model, (128, 3, 32, 32)).layers
    shapes = {(case.weight_shape, case.positions) for case in layers}
    assert all((layer.shape, layer.positions) in shapes for layer in counted[1:-1])


def test_every_network_has_a_first_convolution_and_a_last_linear_layer():
    for case in MODELS.values():
        first, last = dense_ends(case.build())
        assert isinstance(case.build().get_submodule(first), nn.Conv2d), last


def test_a_step_of_the_first_layer_has_no_input_gradient():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 1, bias=False))
    counted = skd.flops.count(model, (2, 3, 4, 4))
    assert step_flops(counted) == 2 * 32 * (2 * 12 + 3 * 20)


def test_bytes_of_a_step_count_the_relu_in_a_norm():
    conv = nn.Conv2d(4, 8, 1, bias=False)
    apart = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())
    joined = nn.Sequential(conv, BatchNormAct2d(8))
    assert step_bytes(joined, (2, 4, 4, 4)) == step_bytes(apart, (2, 4, 4, 4))
    plain, unused = nn.Sequential(conv, nn.BatchNorm2d(8)), BatchNormAct2d(8, act=False)
    assert step_bytes(nn.Sequential(conv, unused), (2, 4, 4, 4)) == step_bytes(plain, (2, 4, 4, 4))


def test_bytes_of_a_step_follow_maps_nonzeros_and_parameters():
    model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    conv, norm, relu = 3 * (2 * 16 * 4 + 2 * 16 * 8 + 32), 8 * 256, 5 * 256
    assert step_bytes(model, (2, 4, 4, 4)) == 4 * (conv + norm + relu + 5 * (32 + 16))
    skd.sparsify(model, sparsity=0.5, distribution="uniform")
    assert step_bytes(model, (2, 4, 4, 4)) == 4 * (conv + norm + relu + 5 * (16 + 16))
    assert model.training


@pytest.mark.parametrize("name", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("case", conv_layers()[::5], ids=lambda case: case.name)
def test_no_roof_is_lower_than_another_bound(name, case):
    peaks = Peaks(flops=2e11, l2=2e11, l3=1e11, memory=3e10)
    numel = math.prod(case.weight_shape)
    previous = 0.0
    for nnz in (numel // 50, numel // 10, numel // 2):
        limit = roofline.roof(case, name, nnz, peaks, l1=32768, last_level=1 << 25)
        assert limit.flops == case.flops(nnz)
        assert limit.seconds >= limit.flops / peaks.flops
        assert limit.seconds >= limit.l2_bytes / peaks.l2
        assert limit.seconds >= previous  # more nonzeros never cost less
        previous = limit.seconds


def test_a_roof_names_what_binds():
    def bound(**changed):
        peaks = Peaks(**{"flops": 1e12, "l2": 1e12, "l3": 1e12, "memory": 1e12, **changed})
        case = LayerCase("conv", 64, 64, 32, 3)
        return roofline.roof(case, "fprop", 3686, peaks, l1=32768, last_level=0).bound

    assert bound(flops=1e9) == "compute"
    assert bound(l2=1e9) == "L2"
    assert bound(memory=1e9) == "DRAM"


def test_the_machine_has_roofs():
    peaks = measure_peaks(seconds=0.003)
    assert all(math.isfinite(roof) and roof > 0 for roof in vars(peaks).values())


@pytest.mark.parametrize(
    "call",
    [
        lambda: cpp.peak_flops(0, 0.1),
        lambda: cpp.peak_flops(1, 0.0),
        lambda: cpp.peak_flops(1, math.nan),
        lambda: cpp.read_bandwidth(0, 1, 0.1),
        lambda: cpp.read_bandwidth(1 << 40, 1, 0.1),
        lambda: cpp.read_bandwidth((1 << 32) // 2 + 1, 2, 0.1),
    ],
)
def test_senseless_measurements_are_refused(call):
    with pytest.raises(ShapeError, match="expected"):
        call()


def test_a_profile_divides_all_of_the_time():
    rows = Waterfall(
        ModelCase("resnet20", (1, 8, 8), batch=4),
        (0.9,),
        {name: STEPS[name] for name in ("dense_channels_last", "sparsekd")},
        rounds=1,
    ).measure()
    for row in rows:
        assert row["ms"] == pytest.approx(sum(row["parts"].values()), abs=1e-2)
        for part in PARTS:
            assert row["parts"][part] > 0, (row["arm"], part)


def test_splitting_the_backward_of_convolutions_changes_no_gradient():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 7, 7, requires_grad=True)
    expected = torch.autograd.grad(conv(x).square().sum(), (x, *conv.parameters()))
    split_backward(conv)
    found = torch.autograd.grad(conv(x).square().sum(), (x, *conv.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    parts = step_parts(lambda: conv(x).sum().backward(), rounds=1)
    assert parts["conv dgrad"] > 0
    assert parts["conv wgrad"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_a_process_of_its_own():
    case = ModelCase("resnet20", batch=8)
    rows = PeakMemory(case, (0.9,), {"sparsekd": STEPS["sparsekd"]}).measure()
    assert [(row["arm"], row["sparsity"]) for row in rows] == [("sparsekd", 0.9)]
    assert rows[0]["peak_mib"] >= rows[0]["before_mib"] > 50
    assert 0 < rows[0]["held_mib"] < 10
    assert rows[0]["held_mib"] + rows[0]["plans_mib"] < rows[0]["live_mib"] < rows[0]["peak_mib"]


def test_a_call_has_every_level_and_no_row_twice():
    for config in (BenchConfig(networks=("resnet20",), sparsities=(0.9,), batch=32), BenchConfig()):
        sessions = ARENA.sessions(config)
        names = [session.name for session in sessions]
        keys = [(session.name, key) for session in sessions for key in session.keys()]  # noqa: SIM118
        sparse = [key for key in keys if key[1][1] is not None]
        assert len(set(sparse)) == len(sparse)
        assert list(dict.fromkeys(name[0] for name in names)) == list(ARENA.levels)
    assert len(sessions) > 3 * len(SUITE.sessions(BenchConfig()))
