"""Rewires change what recorded launches of Triton kernels read, and never where it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recorded import Tape, plan_tensors
from torch import Tensor

import sparsekd as skd
from sparsekd import Topology
from sparsekd.errors import UnsupportedError
from sparsekd.nn.masks import initial_mask
from sparsekd.testing import relative_error

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

from sparsekd.ops.gpu import convolution, plan_cache
from sparsekd.ops.gpu import structure as gpu_structure
from sparsekd.ops.gpu.convolution import Conv
from sparsekd.ops.gpu.structure import Structure, find_structure
from sparsekd.ops.triton import gather_plans, shared_plans, tile_plans, tile_size
from sparsekd.ops.triton.tile_plans import Lists

CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "bcsr": ({"layout": "bcsr"}, {"tile_product", "tile_sample", "take_values"}),
    "bcsr, stride": (
        {"layout": "bcsr", "stride": 2},
        {"tile_product", "tile_sample", "take_values"},
    ),
    "bcsr, groups": (
        {"layout": "bcsr", "groups": 2},
        {"tile_product", "tile_sample", "take_values"},
    ),
    "bcsr, one tap": (
        {"layout": "bcsr", "kernel_size": 1, "stride": 2, "in_channels": 96, "out_channels": 80},
        {"tile_product", "tile_sample"},
    ),
    "fanin, wide": (
        {"layout": "fanin:16", "stride": 2},
        {"shared_product", "shared_sample", "tile_product", "take_values"},
    ),
    "fanin, wide, groups": (
        {"layout": "fanin:16", "groups": 2, "sparsity": 0.8},
        {"shared_product", "shared_sample", "row_product", "take_values"},
    ),
    "fanin, blocks": (
        {"layout": "fanin:1x16", "stride": 2},
        {"tile_product", "tile_sample", "shared_product", "take_values"},
    ),
    "fanin, narrow": ({"layout": "fanin", "stride": 2}, {"row_product", "row_sample"}),
    "nm": ({"layout": "nm"}, {"row_product", "row_sample"}),
    "csr": ({"layout": "csr", "stride": 2}, {"row_product", "row_sample"}),
}


def layer_of(case: str) -> skd.nn.SparseConv2d:
    sizes = {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "padding": 1}
    options = {"sparsity": 0.5, **sizes, **CASES[case][0]}
    return skd.make_capturable(skd.nn.SparseConv2d(seed=0, bias=False, **options))


def other_mask(layer: skd.nn.SparseModule, seed: int) -> Tensor:
    """Return a random mask that fits the layout and has as many nonzeros."""
    topology = layer.topology
    return initial_mask(topology.shape, None, topology.sparsity, seed, layer.layout)[0]


def conv_of(layer: skd.nn.SparseConv2d) -> Conv:
    sides = [side for side in layer.padding for _ in range(2)]
    geometry = layer.stride, sides, layer.dilation, layer.groups
    return convolution.conv_of(layer.topology.shape, *geometry)


def make_plans(structure: Structure, conv: Conv, size: tuple[int, int] = (5, 4)) -> None:
    """Make every plan that calls on maps of this size could ask for."""
    out = tuple(
        (size[d] + 2 * conv.padding[2 * d] - conv.dilation[d] * (conv.weight_shape[2 + d] - 1) - 1)
        // conv.stride[d] + 1
        for d in (0, 1)
    )  # fmt: skip
    structure.rows(), structure.cols()
    gather_plans.forward(structure, conv, size, out)
    gather_plans.input_gradient(structure, conv, size, out)
    for most in (16, 32):
        shared_plans.forward(structure, conv, size, out, most)
        shared_plans.input_gradient(structure, conv, size, out, most)
    for padded in (False, True):
        tile_plans.forward(structure, conv, 32, padded=padded)
        tile_plans.input_gradient(structure, conv, size, 32, padded=padded)


def plan(layer: skd.nn.SparseModule, conv: Conv, make: Callable[..., Any] = make_plans) -> None:
    rows, *inner = conv.weight_shape
    found = find_structure(layer.crow_indices, layer.col_indices, rows, math.prod(inner))
    make(found, conv)


def linear_of(mask: Tensor) -> tuple[skd.nn.SparseLinear, Conv]:
    """Return a capturable layer with this mask, and its geometry."""
    layer = skd.make_capturable(skd.nn.SparseLinear(*mask.shape[::-1], mask=mask, bias=False))
    return layer, Conv((*mask.shape, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)


def tiled(grid: Tensor, rows: int, cols: int) -> Tensor:
    return grid.bool().repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def random_grid(rows: int, cols: int, each: int, seed: int = 0) -> Tensor:
    """Return a grid with so many tiles in each row."""
    scores = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(rows, cols).scatter(1, scores.topk(each).indices, 1)


@pytest.fixture(autouse=True)
def no_structures() -> None:
    gpu_structure._known.clear()


@pytest.mark.parametrize("case", CASES)
def test_plans_stay_where_they_are_and_say_what_fresh_ones_do(case: str) -> None:
    layer = layer_of(case)
    conv = conv_of(layer)
    plan(layer, conv)
    before = [(tensor.data_ptr(), tensor.shape) for tensor in plan_tensors()]
    for seed in (1, 2):
        layer.rewire(other_mask(layer, seed))
        assert [(tensor.data_ptr(), tensor.shape) for tensor in plan_tensors()] == before
    renewed = [tensor.clone() for tensor in plan_tensors()]
    gpu_structure._known.clear()
    plan(layer, conv)
    assert all(map(torch.equal, plan_tensors(), renewed))


def assert_recorded_steps_follow(
    layer: skd.nn.SparseModule, conv: Conv, x: Tensor, other: Tensor, patch: pytest.MonkeyPatch
) -> None:
    """Record the three products of a layer, rewire it, replay them: they compute with the new mask.

    Args:
        layer: capturable.
        conv: its geometry.
        x: its input, as maps.
        other: the mask to come.
        patch: for as long as the recording takes.
    """
    from sparsekd.ops.triton import ops as triton

    indices, grad = (layer.crow_indices, layer.col_indices), None

    def products() -> list[Tensor]:
        nonlocal grad
        values = layer.values.detach()
        y = triton.conv2d(x, values, *indices, None, *conv)
        grad = torch.randn_like(y) if grad is None else grad
        dx = triton.conv2d_dgrad(grad, values, *indices, x.shape, *conv)
        return [y, dx, triton.conv2d_wgrad(grad, x, *indices, *conv)]

    products()  # plans are made before anything is recorded
    with Tape(patch) as tape:
        results = products()
    layer.rewire(other)
    with torch.no_grad():
        layer.values.normal_()
        for result in results:
            result.fill_(math.nan)
        tape.replay()
    leaf = x.clone().requires_grad_()
    with skd.backend("reference"):
        y = layer(leaf.view(x.shape[: max(2, layer.topology.mask().ndim)]))
        expected = [y, *torch.autograd.grad(y, (leaf, layer.values), grad.view_as(y))]
    for ours, right in zip(results, expected, strict=True):
        assert relative_error(ours.view_as(right), right) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_recorded_launches_follow_a_rewire(ptx, on_triton, monkeypatch, case: str) -> None:
    torch.manual_seed(0)
    layer = layer_of(case)
    x = torch.randn(2, layer.in_channels, 4, 3)
    assert_recorded_steps_follow(layer, conv_of(layer), x, other_mask(layer, 1), monkeypatch)
    assert set(on_triton) == CASES[case][1]


def test_recorded_launches_follow_tiles_that_spread(ptx, on_triton, monkeypatch) -> None:
    """There is room for them; samples pass over what is not used of it."""
    torch.manual_seed(0)
    crowded = torch.cat([random_grid(32, 4, 3), torch.zeros(32, 4)], 1)
    layer, conv = linear_of(tiled(crowded, 1, 16))
    found: list[Lists] = []
    plan(
        layer,
        conv,
        lambda made, conv: found.append(tile_plans.forward(made, conv, 32, padded=True)),
    )
    assert (int(found[0].lists[-1]), len(found[0].owners)) == (8, 16)
    other, x = tiled(random_grid(32, 8, 3), 1, 16), torch.randn(3, 128, 1, 1)
    assert_recorded_steps_follow(layer, conv, x, other, monkeypatch)
    assert (int(found[0].lists[-1]), len(found[0].owners)) == (16, 16)
    assert set(on_triton) == {"tile_product", "tile_sample", "shared_product", "take_values"}


# -- room -----------------------------------------------------------------------------------------


@st.composite
def masks_of_equal_nnz(draw: st.DrawFn) -> tuple[list[Tensor], Conv]:
    """Draw two masks of tiles, ragged ones too, with as many nonzeros, and a geometry."""
    groups, kernel = draw(st.sampled_from([1, 2])), draw(st.sampled_from([(1, 1), (2, 3)]))
    rows, channels = (draw(st.sampled_from([16, 20, 32, 40])) for _ in range(2))
    tile = [draw(st.sampled_from([1, 2, 8, 16, 20])) for _ in range(2)]
    tile[0] = math.gcd(tile[0], rows) if groups > 1 else tile[0]
    stride = draw(st.sampled_from([1, 2]))
    shape = (rows * groups, channels, *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    areas = skd.layouts.Tiling(torch.Size(shape), *tile)
    unit = math.gcd(*areas.areas().flatten().tolist())
    sizes = areas.areas().flatten().tolist()
    nnz = int(draw(st.floats(0, 1)) * math.prod(shape)) // unit * unit
    found = []
    for _ in range(2):
        chosen, left = torch.zeros(areas.numel, dtype=torch.bool), nnz
        for at in torch.randperm(areas.numel, generator=generator).tolist():
            if sizes[at] <= left:
                chosen[at], left = True, left - sizes[at]
        assume(left == 0)
        found.append(areas.expand(chosen.view(areas.grid)))
    return found, Conv(shape, (stride, stride), (1, 1, 0, 2), (1, 2), groups)


def lists_of(plans: Any) -> list[Lists]:
    """Return every one in a plan."""
    if isinstance(plans, Lists):
        return [plans]
    return [found for part in plans for found in lists_of(part)] if isinstance(plans, tuple) else []


@settings(max_examples=60, deadline=None)
@given(masks_of_equal_nnz())
def test_structures_of_equal_nnz_have_plans_of_equal_shapes(drawn) -> None:
    masks, conv = drawn
    first, second = (Topology.from_mask(mask) for mask in masks)
    structure = Structure(first.crow_indices, first.col_indices, first.rows, first.cols)
    make_plans(structure, conv)
    changed = structure.changed(second.crow_indices, second.col_indices)
    assume(tile_size.find_runs(changed, conv) == tile_size.find_runs(structure, conv))
    for key, kept in structure._plans.items():
        old, new = kept.plan, changed._plans[key].plan
        if old is None or key[0] in ("tiles", "tiles of the input gradient"):
            assert new is None or plan_cache.fits(old, new), key
        else:
            assert plan_cache.fits(old, new), key
        for lists in lists_of(new):
            used = lists.lists[-1]
            assert not lists.owners[used:].any()
            assert lists.slots is None or (lists.slots[used:] == -1).all()
            assert (lists.columns[used:] == (0 if lists.align else -1)).all()


# -- wide chunks ----------------------------------------------------------------------------------


def convolution_of(mask: Tensor, stride: int = 1) -> tuple[Structure, Conv]:
    made = Topology.from_mask(mask)
    structure = Structure(made.crow_indices, made.col_indices, made.rows, made.cols)
    return structure, Conv(tuple(mask.shape), (stride, stride), (1, 1, 1, 1), (1, 1), 1)


@pytest.mark.parametrize("kept", [16, 64, 112, 113, 129, 145, 300, 576])
def test_wide_chunks_add_an_eighth_of_padding_at_most(kept: int) -> None:
    """Products multiply the chunks in use, samples all that there is room for."""
    mask = tiled(random_grid(4, 576, kept), 16, 1).view(64, 64, 3, 3)
    plans = [
        shared_plans.forward(*convolution_of(mask), (8, 8), (8, 8), most).lists for most in (16, 32)
    ]
    assert [lists.k for lists in plans] == [16, 32 if kept > 112 else 16]
    for chunks in (lambda lists: len(lists.owners), lambda lists: int(lists.lists[-1])):
        narrow, wide = (chunks(lists) * lists.k for lists in plans)
        assert wide <= 1.125 * narrow


@pytest.mark.parametrize("stride, columns", [(1, 32), (2, 16)])
def test_phases_of_an_input_gradient_have_shorter_lists(stride: int, columns: int) -> None:
    mask = tiled(random_grid(32 * 9, 4, 2), 1, 16).view(32, 9, 64).transpose(1, 2)
    made = convolution_of(mask.reshape(32, 64, 3, 3), stride)
    plans = shared_plans.input_gradient(*made, (8, 8), (8 // stride, 8 // stride), 32)
    assert [plan.lists.k for plan in plans] == stride**2 * [columns]


# -- refusals -------------------------------------------------------------------------------------


POINT = ((1, 1), (1, 1))
REFUSED = {
    "tiles that are mostly zeros": (
        tiled(torch.cat([random_grid(64, 4, 1), torch.zeros(64, 28)], 1), 1, 16),
        tiled(random_grid(64, 32, 1), 1, 16),
        lambda structure, conv: tile_plans.forward(structure, conv, 32, padded=True),
        "tiles, of which the new structure has none, or too few values in each",
    ),
    "smaller tiles": (
        tiled(random_grid(4, 4, 2), 32, 16),
        tiled(random_grid(8, 4, 2), 16, 16),
        lambda structure, conv: tile_plans.forward(structure, conv, 32),
        "tiles, of which the new structure has others in size or number",
    ),
    "smaller groups of rows": (
        tiled(random_grid(2, 64, 32), 32, 1),
        tiled(random_grid(4, 64, 32), 16, 1),
        lambda structure, conv: shared_plans.forward(structure, conv, *POINT, 16),
        "shared columns, of which the new structure has others in size or number",
    ),
    "no groups of channels": (
        tiled(random_grid(64, 4, 1), 1, 16),
        random_grid(64, 64, 16).bool(),
        lambda structure, conv: shared_plans.input_gradient(structure, conv, *POINT, 16),
        "shared columns of the input gradient, of which the new structure has none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_stay_is_refused_and_nothing_changes(case: str) -> None:
    mask, other, make, reason = REFUSED[case]
    assert other.sum() == mask.sum()
    layer, conv = linear_of(mask)
    layer.values.grad = torch.randn(layer.topology.nnz)
    plan(layer, conv, make)
    topology = layer.topology
    tensors = [*layer.state_dict().values(), layer.values.grad, *plan_tensors()]
    before = [(tensor.data_ptr(), tensor._version, tensor.clone()) for tensor in tensors]
    with pytest.raises(UnsupportedError, match=rf"mask: capturable SparseLinear\(.*{reason}"):
        layer.rewire(other)
    assert layer.topology is topology
    now = [*layer.state_dict().values(), layer.values.grad, *plan_tensors()]
    for tensor, (place, version, copy) in zip(now, before, strict=True):
        assert (tensor.data_ptr(), tensor._version) == (place, version)
        assert torch.equal(tensor, copy)
    layer.rewire(mask)  # as could be before
    skd.make_capturable(layer, False).rewire(other)
    assert torch.equal(layer.topology.mask(), other)


def test_tiles_that_appear_are_not_looked_for() -> None:
    """They may be chance, and launches that were recorded without them go on."""
    layer, conv = linear_of(tiled(random_grid(32, 64, 16), 2, 1))
    plan(layer, conv)
    before = [(tensor.data_ptr(), tensor.shape) for tensor in plan_tensors()]
    for mask in (tiled(random_grid(4, 4, 1), 16, 16), tiled(random_grid(32, 64, 16, 1), 2, 1)):
        layer.rewire(mask)
        assert [(tensor.data_ptr(), tensor.shape) for tensor in plan_tensors()] == before
