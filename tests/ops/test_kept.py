"""Everything kept between calls has a bound, and results do not depend on what is kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekd as skd
from sparsekd import ops

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

from sparsekd.ops.gpu import plan_cache
from sparsekd.ops.gpu import structure as gpu_structure
from sparsekd.ops.gpu.convolution import Conv
from sparsekd.ops.gpu.structure import Structure, find_structure
from sparsekd.ops.triton import gather_plans

MIB = 1 << 20


def use() -> dict[str, Any]:
    return skd.ops.info()["cpp"]


def step(conv: skd.nn.SparseConv2d, high: int, wide: int) -> list[Tensor]:
    """Run forward and backward; return the output and the gradients of input and values."""
    generator = torch.Generator().manual_seed(100 * high + wide)
    x = torch.randn(2, conv.weight_shape[1], high, wide, generator=generator).requires_grad_()
    y = conv(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, conv.values))]


@pytest.fixture
def on_cpp() -> Iterator[None]:
    with skd.backend("cpp"):
        yield


@pytest.mark.usefixtures("on_cpp")
def test_ever_new_sizes_leave_a_bounded_number_of_plans() -> None:
    conv = skd.nn.SparseConv2d(64, 64, 3, padding=1, sparsity=0.9, seed=0)
    own = 8 * conv.topology.nnz  # values and columns
    gc.collect()
    before = use()
    first = step(conv, 5, 5)
    for size in range(5, 69):
        step(conv, size, 7)
    after = use()
    assert after["cached_bytes"] - before["cached_bytes"] < 100 * own
    assert after["cached_plans"] - before["cached_plans"] <= 32
    for ours, expected in zip(step(conv, 5, 5), first, strict=True):
        assert torch.equal(ours, expected), "plans made anew give what the first ones gave"
    del conv
    gc.collect()
    assert use()["cached_plans"] <= before["cached_plans"], "they go with their layer"


@pytest.mark.usefixtures("on_cpp")
def test_ten_sizes_in_turn_are_planned_once() -> None:
    conv = skd.nn.SparseConv2d(16, 16, 3, padding=1, sparsity=0.8, seed=0)
    sizes = [(6 + i, 9) for i in range(10)]
    for high, wide in sizes:
        step(conv, high, wide)
    planned = use()["cached_plans"]
    for high, wide in 3 * sizes:
        step(conv, high, wide)
        assert use()["cached_plans"] == planned
    step(conv, 40, 9)
    assert use()["cached_plans"] > planned - 3, "one more size does not push out the others"


@pytest.mark.usefixtures("on_cpp")
def test_sizes_in_any_order_give_what_dense_torch_gives() -> None:
    conv = skd.nn.SparseConv2d(6, 8, 3, padding=1, stride=2, sparsity=0.6, seed=0).double()
    weight = conv.dense_weight().detach()
    generator = torch.Generator().manual_seed(0)
    for high in torch.randint(1, 40, (150,), generator=generator).tolist():
        x = torch.randn(2, 6, high, 8, dtype=torch.float64, generator=generator)
        x.requires_grad_()
        expected = F.conv2d(x, weight, conv.bias, stride=2, padding=1)
        torch.testing.assert_close(conv(x), expected, rtol=1e-9, atol=1e-9)
        (ours,), (dense,) = (torch.autograd.grad(y.sum(), x) for y in (conv(x), expected))
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("on_cpp")
def test_dropped_indices_take_their_copies_along() -> None:
    gc.collect()
    before = use()
    values, x = torch.ones(2), torch.ones(1, 4)
    living = [(torch.tensor([0, 1, 2]).int(), torch.tensor([1, 3]).int()) for _ in range(100)]
    for crow, col in living:
        ops.linear(x, values, crow, col, None, [2, 4])
    held: list[Tensor] = []
    for i in range(10_000):
        crow, col = torch.tensor([0, 1, 2]).int(), torch.tensor([i % 4, 3]).int()
        assert ops.linear(x, values, crow, col, None, [2, 4]).tolist() == [[1, 1]]
        held = [*held[-50:], crow, col]  # so that addresses are not the same again and again
    after = use()
    assert after["cached_structures"] - before["cached_structures"] < 100 + 100
    assert after["cached_bytes"] - before["cached_bytes"] < MIB
    for crow, col in living:
        ops.linear(x, values, crow, col, None, [2, 4])
    assert use()["cached_structures"] == after["cached_structures"], "the living are all there"


@pytest.mark.usefixtures("on_cpp")
def test_large_dropped_indices_go_before_many_have_come() -> None:
    gc.collect()
    before = use()["cached_bytes"]
    x, rows = torch.ones(1, 1 << 20), [1, 1 << 20]
    held: list[Tensor] = []
    for _ in range(30):  # four megabytes each
        crow, col = torch.tensor([0, 1 << 20]).int(), torch.arange(1 << 20).int()
        ops.linear(x, torch.ones(1 << 20), crow, col, None, rows)
        held = [*held[-2:], crow, col]
    assert use()["cached_bytes"] - before < 64 * MIB


def test_calls_of_ever_new_shapes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsekd.ops.kernel import MOST_KNOWN, products

    assert MOST_KNOWN <= 1 << 12
    monkeypatch.setattr("sparsekd.ops.kernel.MOST_KNOWN", 8)
    monkeypatch.setattr(products["linear"], "_known", {})
    linear = skd.nn.SparseLinear(4, 3, sparsity=0.5)
    for batch in range(50):
        linear(torch.ones(batch, 4))
        assert len(products["linear"]._known) <= 8


# -- plans of GPU kernels: made on the host, so they are counted without a GPU ---------------------

POINTWISE = Conv((3, 4, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
CROW, COL = torch.tensor([0, 2, 2, 3]).int(), torch.tensor([0, 3, 1]).int()


@pytest.fixture
def structures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Structure]]:
    """Make three structures, the only ones that are known while their indices are held."""
    monkeypatch.setattr(gpu_structure, "_known", {})
    held = [(CROW.clone(), COL.clone()) for _ in range(3)]
    yield [find_structure(crow, col, 3, 4) for crow, col in held]
    held.clear()


def plan(structure: Structure, size: int) -> Any:
    return gather_plans.forward(structure, POINTWISE, (size, size), (size, size))


def test_a_structure_keeps_the_latest_of_its_gpu_plans(structures: list[Structure]) -> None:
    structure, other, _ = structures
    kept = plan(other, 1)
    first = plan(structure, 1)
    for size in range(2, 10):
        plan(structure, size)
    for size in range(10, 300):
        plan(structure, size)
        assert plan(structure, 1) is first, "it is used all the time"
    assert len(structure._plans) == plan_cache.MOST_PLANS
    assert gpu_structure.info()["plans"] == plan_cache.MOST_PLANS + 1
    again = plan(structure, 5)
    assert again.window.height == 5
    assert torch.equal(again.offset, plan(other, 5).offset)
    assert plan(other, 1) is kept


def test_all_structures_together_keep_so_many_bytes(
    structures: list[Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_cache, "LATEST_PLANS", 2)
    plan(structures[0], 1)
    each = gpu_structure.info()["bytes"]
    monkeypatch.setattr(plan_cache, "MOST_BYTES", 10 * each)
    for size in range(1, 20):
        for structure in structures:
            plan(structure, size)
        assert gpu_structure.info()["bytes"] <= 10 * each
    assert all(len(structure._plans) >= 2 for structure in structures)
    monkeypatch.setattr(plan_cache, "MOST_BYTES", 0)
    latest = [plan(structure, 19) for structure in structures]
    plan(structures[0], 20)
    assert gpu_structure.info()["bytes"] == 6 * each, "the latest of each stay in any case"
    assert [plan(structure, 19) for structure in structures][1:] == latest[1:]


def test_what_a_recorded_graph_reads_stays(
    structures: list[Structure], monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = structures[0]
    recorded, warmup = plan(structure, 1), plan(structure, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert plan(structure, 1) is recorded
    monkeypatch.setattr(plan_cache, "MOST_BYTES", 0)
    for size in range(3, 300):
        plan(structure, size)
    assert plan(structure, 1) is recorded
    assert plan(structure, 2) is not warmup, "its graph was never recorded"


def test_plans_made_between_preparing_and_rewiring_follow(structures: list[Structure]) -> None:
    """What is prepared has no plan for a size that comes before it is taken."""
    structure = structures[0]
    plan(structure, 1)
    crow, col = torch.tensor([0, 1, 2, 3]).int(), torch.tensor([2, 2, 0]).int()
    changed = structure.changed(crow, col)
    plan(structure, 2)
    structure.replace(changed, structure.versions)
    fresh = Structure(crow, col, 3, 4)
    for size in (1, 2):
        ours, expected = plan(structure, size), plan(fresh, size)
        assert all(torch.equal(ours[i], expected[i]) for i in range(3))


def test_information_names_what_is_kept() -> None:
    found = ops.info()
    assert {"cached_structures", "cached_plans", "cached_bytes"} <= found["cpp"].keys()
    assert {"structures", "plans", "bytes"} == found["gpu_plans"].keys()
