"""The backend "semi_structured": its metadata is torch's, and its products those of the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from semi_structured_kernels import mask_2to4, moved, operands, transposable_mask
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import sparsekd as skd
from sparsekd import Topology
from sparsekd.errors import BackendError, UnsupportedError
from sparsekd.ops.dispatch import backends
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.ops.gpu import structure as gpu_structure
from sparsekd.ops.gpu.structure import Structure, find_structure
from sparsekd.ops.semi_structured import plans
from sparsekd.testing import relative_error

SIZES = [(32, 64), (64, 64), (96, 192), (64, 320), (192, 128)]
DTYPES = (torch.float16, torch.bfloat16)
POINT = ([1, 1], [0, 0, 0, 0], [1, 1], 1)


@pytest.fixture(autouse=True)
def no_structures() -> None:
    gpu_structure._known.clear()


def weight_of(mask: Tensor, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Return a dense weight that is zero nowhere else than outside of the mask."""
    drawn = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))
    return ((drawn + 0.5) * mask).to(dtype)


def structure_of(mask: Tensor) -> Structure:
    topology = Topology.from_mask(mask)
    return find_structure(topology.crow_indices, topology.col_indices, *mask.shape)


def upper(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the operands of the input gradient: an output gradient in the place of x."""
    x, *rest, _, shape = args
    return (torch.randn(x.shape[0], shape[0]).to(x.dtype), *rest, shape)


# -- metadata -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_metadata_is_that_of_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    mask = mask_2to4(*shape)
    weight = weight_of(mask, dtype)
    packed, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    found = plans.compressed(structure_of(mask), transposed=False)
    assert found.order is None
    assert torch.equal(found.metadata, metadata)
    values = weight[mask].view(shape[0], -1)
    assert torch.equal(values, packed)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, found.metadata), weight)


@pytest.mark.parametrize("shape", [(64, 32), *SIZES[1:]], ids=str)
def test_metadata_of_the_transpose_is_that_of_torch(shape: tuple[int, int]) -> None:
    mask = transposable_mask(*shape)
    weight = weight_of(mask, torch.float16)
    packed, metadata = sparse_semi_structured_from_dense_cutlass(weight.t().contiguous())
    found = plans.compressed(structure_of(mask), transposed=True)
    assert torch.equal(found.metadata, metadata)
    values = weight[mask].index_select(0, found.order).view(shape[1], -1)
    assert torch.equal(values, packed)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, found.metadata), weight.t())


# -- what it takes --------------------------------------------------------------------------------


FIRST_TWO = torch.tensor([True, True, False, False]).repeat(64, 16)
ONE_OF_FOUR = torch.tensor([True, False, False, False]).repeat(64, 16)
ONE_OF_TWO = torch.tensor([True, False]).repeat(64, 32)
GOOD = mask_2to4(64, 64)
MISSES = {
    "three of a run": operands(moved(FIRST_TWO, (9, 61), (9, 14))),
    "three of a run, a row longer": operands(moved(FIRST_TWO, (0, 0), (1, 63))),
    "1:4": operands(ONE_OF_FOUR),
    "nothing": operands(torch.zeros(64, 64, dtype=torch.bool)),
    "no zeros": operands(torch.ones(64, 64, dtype=torch.bool)),
    "rows": operands(mask_2to4(48, 64)),
    "columns": operands(mask_2to4(64, 96)),
    "columns, no multiple of four": operands(torch.ones(64, 6).bool() & (torch.arange(6) % 2 > 0)),
    "float32": operands(GOOD, torch.float32),
    "no input": operands(GOOD, rows=0),
}


@pytest.mark.parametrize("miss", MISSES)
def test_what_is_not_2to4_in_16_bits_is_left_to_others(on_semi_structured, miss: str) -> None:
    args = MISSES[miss]
    assert decide("linear", args).backend == "reference"
    with skd.backend("reference"):
        expected = skd.ops.linear(*args)
    assert torch.equal(skd.ops.linear(*args), expected)
    assert not on_semi_structured


def test_runs_of_two_are_runs_of_four(on_semi_structured) -> None:
    """A mask that is 1:2 is 2:4, and what torch's class takes for that in 16 bits."""
    assert decide("linear", operands(ONE_OF_TWO)).backend == "semi_structured"


def test_each_product_is_taken_where_its_matrix_is_2to4(on_semi_structured) -> None:
    runs = {}
    for name, mask in {
        "rows": GOOD,
        "both": transposable_mask(64, 64),
        "columns": GOOD.t(),
    }.items():
        args = operands(mask)
        grad = upper(args)
        calls = {"linear": args, "linear_dgrad": grad}
        calls["linear_wgrad"] = (grad[0], args[0], *args[2:4], args[5])
        runs[name] = [op for op in calls if decide(op, calls[op]).backend == "semi_structured"]
    assert runs["rows"] == ["linear"]
    assert runs["both"] == ["linear", "linear_dgrad"]
    assert runs["columns"] == ["linear_dgrad"]


@pytest.mark.parametrize(
    "change",
    [
        {"stride": [2, 2]},
        {"padding": [0, 0, 0, 1]},
        {"layout": torch.contiguous_format},
        {"groups": 2},
        {"kernel": (1, 2)},
    ],
    ids=str,
)
def test_other_convolutions_are_left_to_others(on_semi_structured, change: dict[str, Any]) -> None:
    groups, kernel = change.get("groups", 1), change.get("kernel", (1, 1))
    mask = mask_2to4(64, 64 * math.prod(kernel)).view(64, 64, *kernel)
    _, values, *indices, _, _ = operands(mask.flatten(1))
    x = torch.randn(2, 64 * groups, 3, 4).half()
    x = x.contiguous(memory_format=change.get("layout", torch.channels_last))
    stride, padding, dilation, _ = POINT
    geometry = change.get("stride", stride), change.get("padding", padding), dilation, groups
    args = x, values, *indices, None, list(mask.shape), *geometry
    assert decide("conv2d", args).backend == "reference"


def test_more_rows_than_a_grid_has_blocks_for_are_left_to_others(on_semi_structured) -> None:
    """What is multiplied lies along y of the grid, where CUDA allows 65,535 blocks."""
    mask = transposable_mask(64, 128)
    args, shape = operands(mask), [64, 128, 1, 1]
    grad = upper(args)
    for rows, taken in ((65535 * 128, True), (65535 * 128 + 1, False)):
        x, dy = args[0][:1].expand(rows, -1), grad[0][:1].expand(rows, -1)
        assert backends.can_take("semi_structured", "linear", (x, *args[1:])) == taken
        assert backends.can_take("semi_structured", "linear_dgrad", (dy, *grad[1:])) == taken
    maps = torch.empty(1, 2**12, 2**11, 128, dtype=torch.float16, device="meta").permute(0, 3, 1, 2)
    assert not backends.can_take("semi_structured", "conv2d", (maps, *args[1:5], shape, *POINT))


def test_other_devices_are_left_to_others(on_semi_structured, monkeypatch) -> None:
    module = backends.module("semi_structured")
    monkeypatch.setattr(module, "has_semi_structured", lambda device: False)
    assert decide("linear", operands(GOOD)).backend == "reference"


def test_a_weight_that_is_not_2to4_is_refused_by_the_function_itself(semi_structured) -> None:
    linear = backends.BACKENDS["semi_structured"].function("linear")
    with pytest.raises(UnsupportedError, match="two of every four consecutive input channels"):
        linear(*MISSES["three of a run"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_what_it_needs() -> None:
    with pytest.raises(BackendError, match=r"compute capability 8\.x"):
        backends.module("semi_structured")


def test_whether_a_weight_is_2to4_is_found_once(on_semi_structured, monkeypatch) -> None:
    args = operands(transposable_mask(64, 64))
    for op, given in (("linear", args), ("linear_dgrad", upper(args))):
        assert backends.can_take("semi_structured", op, given)
    monkeypatch.setattr(plans, "_places", lambda *args: pytest.fail("looked again"))
    for op, given in (("linear", args), ("linear_dgrad", upper(args))):
        assert backends.can_take("semi_structured", op, given)


# -- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 5, 8, 19, 64])
@pytest.mark.parametrize("shape", SIZES[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_masked_dense(on_semi_structured, dtype, shape, rows: int, bias) -> None:
    mask = transposable_mask(*shape)
    args = operands(mask, dtype, rows)
    x, values, crow, col, _, weight_shape = args
    dense = torch.zeros(shape, dtype=torch.float64)
    dense[mask] = values.double()
    added = torch.randn(shape[0]).to(dtype) if bias else None
    y = skd.ops.linear(x, values, crow, col, added, weight_shape)
    expected = x.double() @ dense.t() + (added.double() if bias else 0)
    assert y.is_contiguous()
    assert relative_error(y, expected) < torch.finfo(dtype).eps

    grad = upper(args)
    takes = shape[0] % 64 == 0 and shape[1] % 32 == 0
    dx = skd.ops.linear_dgrad(*grad)
    assert relative_error(dx, grad[0].double() @ dense) < torch.finfo(dtype).eps
    assert on_semi_structured == {"addmm" if bias else "mm": 1} | (
        {"mm": 1 if bias else 2} if takes else {}
    )


def test_1x1_convolutions_equal_masked_dense(on_semi_structured) -> None:
    mask = transposable_mask(64, 128)
    _, values, *indices, _, _ = operands(mask)
    shape, dense = [64, 128, 1, 1], torch.zeros(64, 128, dtype=torch.float64)
    dense[mask] = values.double()
    x, grad = (
        torch.randn(2, n, 3, 5).half().contiguous(memory_format=torch.channels_last)
        for n in (128, 64)
    )
    bias = torch.randn(64).half()
    y = skd.ops.conv2d(x, values, *indices, bias, shape, *POINT)
    expected = torch.einsum("rc,nchw->nrhw", dense, x.double()) + bias.double()[:, None, None]
    dx = skd.ops.conv2d_dgrad(grad, values, *indices, [2, 128, 3, 5], shape, *POINT)
    for found, oracle in ((y, expected), (dx, torch.einsum("rc,nrhw->nchw", dense, grad.double()))):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(found, oracle) < torch.finfo(torch.float16).eps
    assert on_semi_structured == {"addmm": 1, "mm": 1}


def test_operands_may_lie_anywhere(on_semi_structured) -> None:
    """Strided and misaligned ones are copied; leading dimensions are kept."""
    x, values, crow, col, _, shape = operands(GOOD, rows=24)
    expected = skd.ops.linear(x, values, crow, col, None, shape)
    wide = torch.full((24, 131), float("nan")).half()
    wide[:, 1:129:2] = x
    shifted = torch.full((values.numel() + 1,), float("nan")).half()[1:].copy_(values)
    y = skd.ops.linear(wide[:, 1:129:2].view(2, 3, 4, 64), shifted, crow, col, None, shape)
    assert torch.equal(y, expected.view(2, 3, 4, 64))
    assert on_semi_structured["mm"] == 2


def test_what_is_not_finite_reaches_what_it_is_connected_to(on_semi_structured) -> None:
    args = operands(GOOD, rows=3)
    args[0][1, 7] = float("inf")
    y = skd.ops.linear(*args)
    assert torch.equal(y[1].isfinite(), ~GOOD[:, 7])
    assert y[[0, 2]].isfinite().all()


def test_training_steps_are_those_of_the_oracle(on_semi_structured) -> None:
    """Of two layers, one of them transposable, with an optimizer that writes into the values."""
    torch.manual_seed(0)
    masks = mask_2to4(64, 128), transposable_mask(64, 64)
    model = nn.Sequential(
        *[skd.nn.SparseLinear(*mask.shape[::-1], mask=mask).to(torch.bfloat16) for mask in masks]
    )
    twin = nn.Sequential(*[layer.to_dense().double() for layer in model])
    for step in range(3):
        x = torch.randn(13, 128).to(torch.bfloat16)
        grads, before = [], on_semi_structured.total()
        for net in (model, twin):
            net.zero_grad()
            inputs = x.to(next(net.parameters()).dtype).detach().requires_grad_()
            y = net(inputs)
            y.square().mean().backward()
            grads.append((y.detach(), inputs.grad))
        for ours, expected in zip(*grads, strict=True):
            assert relative_error(ours, expected) < 0.02, step
        assert on_semi_structured.total() - before == 3
        with torch.no_grad():
            for layer, dense in zip(model, twin, strict=True):
                of_values = dense.weight.grad[layer.topology.mask()]
                assert relative_error(layer.values.grad, of_values) < 0.02, step
                layer.values -= 0.1 * layer.values.grad
                dense.weight[layer.topology.mask()] = layer.values.double()
