"""The gate: right results pass, wrong ones do not, however small the wrong part is."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekd.bench import gate, steps
from sparsekd.bench.cases import ModelCase


def test_float32_rounding_passes_and_a_single_wrong_entry_does_not():
    torch.manual_seed(0)
    a, b = torch.randn(64, 576), torch.randn(576, 64)
    exact = (a.double() @ b.double()).float()
    bounds = {"output": gate.tolerance(576, torch.float32)}
    assert gate.refusal(gate.compare({"output": a @ b}, {"output": exact}), bounds) is None
    wrong = a @ b
    wrong[3, 5] += 0.01 * exact.abs().max()
    reason = gate.refusal(gate.compare({"output": wrong}, {"output": exact}), bounds)
    assert reason is not None
    assert reason.startswith("output differs by 1.0e-02")


def test_bfloat16_operands_get_the_room_they_need_and_no_more():
    torch.manual_seed(0)
    a, b = torch.randn(64, 576), torch.randn(576, 64)
    rounded = a.bfloat16().float() @ b.bfloat16().float()
    errors = gate.compare({"output": rounded}, {"output": a @ b})
    assert gate.refusal(errors, {"output": gate.tolerance(576, torch.bfloat16)}) is None
    assert gate.refusal(errors, {"output": gate.tolerance(576, torch.float32)}) is not None


@pytest.mark.parametrize("got", [torch.full((3,), math.nan), torch.ones(2), torch.ones(3, 1)])
@pytest.mark.parametrize("error", [gate.relative_error, gate.overall_error])
def test_nan_and_wrong_shapes_are_infinitely_wrong(got, error):
    assert error(got, torch.ones(3)) == math.inf


def test_what_is_missing_is_refused():
    errors = gate.compare({}, {"weight gradient": torch.ones(2)})
    assert "weight gradient differs by inf" in (gate.refusal(errors, {"weight gradient": 1}) or "")


def test_bounds_of_a_step_hold_every_gradient_that_is_more_than_rounding():
    noise = {"loss": 0.0, "a": 1e-5, "b": 2e-2, "c": 1e-3, "all rounding": 0.7}
    bounds = gate.step_bounds(noise, torch.float32)
    assert set(bounds) == {"loss", "a", "b", "c"}
    assert bounds["a"] == pytest.approx(8e-3)  # the median gradient's
    assert bounds["b"] == pytest.approx(0.16)
    assert all(bound < 1 for bound in bounds.values())
    assert set(gate.step_bounds(noise, torch.bfloat16)) == {"loss"}


def test_a_relu_a_few_rounding_units_from_its_kink_counts_as_rounding():
    model, x = torch.nn.Linear(2, 1000, bias=False), torch.ones(1, 2)
    with torch.no_grad():
        model.weight[:] = torch.tensor([1.0, 6 * torch.finfo(torch.float32).eps - 1])
    assert (model(x) > 0).all()
    problem = steps.StepProblem(ModelCase("none", (2,)), model, x, x)
    assert (steps.jittered(problem, torch.float32).model(x) <= 0).any()
