"""Every op of the backend "triton" equals masked dense torch, its kernels running on the CPU.

Where TRITON_INTERPRET is set Triton's interpreter runs them, see test_triton_interpreted.py, else
the PTX that Triton compiles them to is executed. Random layers cover everything on the one, what
only the other can show (bfloat16, TF32, compiled code) is kept small.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random

import pytest
import torch
from triton_backend import float32_products

import sparsekd as skd
from sparsekd import Topology, ops
from sparsekd.errors import TopologyError, UnsupportedError
from sparsekd.testing import (
    LayerCase,
    assert_layer_matches_dense,
    dense_results,
    poisoned_memory,
    random_layer,
    relative_error,
    sparse_results,
    with_layout,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, which is faster")
executed = pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot show it")
# float32 as the CPU's kernels are held to; halves are rounded once, after sums in float32. TF32
# has the mantissa of float16, and both factors are rounded to it.
LIMITS = {torch.float32: 2e-5} | {t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16)}
TF32 = 2 * torch.finfo(torch.float16).eps
OVERLAPS = 8  # the gradient of a padding other than zeros is torch's, which adds up several halves
CHUNK = 8

CONV = LayerCase(
    seed=3,
    in_features=48,
    out_features=32,
    batch=(2,),
    density=0.3,
    bias=True,
    dtype=torch.float32,
    layout="channels_last",
    kernel_size=(3, 3),
    map_size=(4, 5),
    options={"padding": 1},
    tile=(16, 16),
)
LINEAR = dataclasses.replace(
    CONV, batch=(19,), kernel_size=None, map_size=(1, 1), options={}, layout="contiguous"
)


def tiled_layer(seed: int) -> LayerCase:
    """Draw a layer of tiles: any sides, ragged ends, groups, every geometry of a convolution."""
    draw = random.Random(seed)
    case = random_layer(seed)
    groups = draw.choice((1, 1, 1, 2)) if case.kernel_size else 1
    tile = draw.choice((8, 16, 16, 24, 32, 48)), draw.choice((1, 2, 8, 16, 16, 20, 32, 48))
    if draw.random() < 0.2:
        tile = tile[1], tile[0]
    options = {**case.options, "groups": groups} if case.kernel_size else {}
    batch = case.batch if math.prod(case.batch) < 9 else (9,)
    return dataclasses.replace(
        case,
        in_features=groups * draw.choice((16, 40, 48)),
        out_features=groups * draw.choice((16, 32, 40)),
        batch=batch,
        options=options,
        empty_rows=False,  # single rows: no group would be left
        tile=tile,
    )


def assert_matches(case: LayerCase, dtype: torch.dtype) -> None:
    padded = case.options.get("padding_mode", "zeros") != "zeros"
    with poisoned_memory():
        limit = LIMITS[dtype] * (OVERLAPS if padded else 1)
        assert_layer_matches_dense(dataclasses.replace(case, dtype=dtype), limit)


@interpreted
@pytest.mark.parametrize(
    "first, dtype", [(i * CHUNK, torch.float32) for i in range(2)] + [(24, torch.float16)]
)
def test_random_layers_equal_masked_dense(on_triton, first: int, dtype: torch.dtype) -> None:
    for seed in range(first, first + CHUNK):
        assert_matches(random_layer(seed), dtype)
    assert on_triton["row_product"]
    assert on_triton["row_sample"]


@interpreted
@pytest.mark.parametrize(
    "first, dtype", [(i * CHUNK, torch.float32) for i in range(2)] + [(24, torch.float16)]
)
def test_random_layers_of_tiles_equal_masked_dense(
    on_triton, first: int, dtype: torch.dtype
) -> None:
    for seed in range(first, first + CHUNK):
        assert_matches(tiled_layer(seed), dtype)
    assert {"tile_product", "tile_sample"} <= set(on_triton)


# Values of a single tap are read where they are; others are copied first.
IN_PLACE = {"tile_product", "tile_sample"}
PACKED = {*IN_PLACE, "take_values"}
KINDS = {
    "tiles": (CONV, PACKED),
    "tiles, ragged": (dataclasses.replace(CONV, in_features=40, out_features=24), PACKED),
    "tiles, stride": (
        dataclasses.replace(CONV, options={"padding": 1, "stride": 2, "dilation": 2}),
        PACKED,
    ),
    "tiles, groups": (
        dataclasses.replace(CONV, in_features=32, options={"groups": 2}),
        PACKED,
    ),
    "tiles, linear": (LINEAR, IN_PLACE),
    "tiles, linear, ragged outputs": (
        dataclasses.replace(LINEAR, in_features=64, out_features=40),
        IN_PLACE,
    ),
    "tiles, linear, ragged inputs": (dataclasses.replace(LINEAR, in_features=40), PACKED),
    "tiles, one tap": (
        dataclasses.replace(
            CONV, in_features=64, kernel_size=(1, 1), options={"groups": 2, "stride": 2}
        ),
        IN_PLACE,
    ),
    "shared columns": (
        dataclasses.replace(CONV, in_features=10, tile=(32, 1), layout="contiguous"),
        {"shared_product", "shared_sample", "tile_product", "take_values"},
    ),
    "shared columns, many": (
        dataclasses.replace(CONV, in_features=24, tile=(32, 1), density=0.6, layout="contiguous"),
        {"shared_product", "shared_sample", "tile_product", "take_values"},
    ),
    "shared columns, linear": (
        dataclasses.replace(LINEAR, tile=(16, 2), density=0.2),
        {"shared_product", "shared_sample", "tile_product", "take_values"},
    ),
    "rows": (
        dataclasses.replace(CONV, in_features=6, out_features=9, tile=(1, 1), map_size=(3, 4)),
        {"row_product", "row_sample"},
    ),
}


@executed
@pytest.mark.parametrize("dtype", [*LIMITS, "tf32"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kernels_equal_masked_dense(on_triton, kind: str, dtype) -> None:
    case, kernels = KINDS[kind]
    if dtype == "tf32":
        with float32_products("tf32"), poisoned_memory():
            assert_layer_matches_dense(case, TF32)
    else:
        assert_matches(case, dtype)
    assert set(on_triton) == kernels


@executed
def test_tf32_is_used_where_torch_is_told_to(on_triton) -> None:
    exact = sparse_results(LINEAR)
    with float32_products("tf32"):
        rounded = sparse_results(LINEAR)
    for name in ("y", "x", "values"):
        assert relative_error(rounded[name], exact[name]) > LIMITS[torch.float32], name


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "permuted"])
def test_any_layout_of_maps_and_of_the_output_gradient(on_triton, layout: str) -> None:
    case = dataclasses.replace(CONV, layout=layout)
    grad = with_layout(torch.randn(2, 32, 4, 5), layout)
    expected, actual = dense_results(case, grad.double()), sparse_results(case, grad)
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor) < LIMITS[torch.float32], name
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    inner = case.tensors()[2].is_contiguous(memory_format=torch.channels_last)
    assert actual["y"].is_contiguous(memory_format=formats[inner])


@interpreted
@pytest.mark.parametrize("block", [24, 48, 64, 128])
@pytest.mark.parametrize("kernel", [None, (1, 1)])
def test_blocks_of_all_sizes(on_triton, block: int, kernel) -> None:
    options = {"stride": 1} if kernel else {}
    case = dataclasses.replace(
        LINEAR, tile=(block, block), in_features=160, out_features=136, density=0.6,
        kernel_size=kernel, map_size=(2, 3), options=options, batch=(3,),
    )  # fmt: skip
    assert_matches(case, torch.float32)
    assert IN_PLACE <= set(on_triton) <= PACKED


@interpreted
def test_sums_in_parts(on_triton) -> None:
    """Weight gradients of few nonzeros at many positions are summed in two stages."""
    for tile, channels in ((1, 1), 2), ((16, 1), 16), ((16, 16), 16):
        case = dataclasses.replace(
            CONV, in_features=channels, out_features=channels, batch=(3,), density=1.0,
            map_size=(9, 10), tile=tile,
        )  # fmt: skip
        assert_matches(case, torch.float32)


# -- structures -----------------------------------------------------------------------------------


@interpreted
def test_gradients_are_differentiable(on_triton) -> None:
    topology, values, x, _ = CONV.tensors()
    gradients = []
    for name in ("triton", "reference"):
        leaves = [values.clone().requires_grad_(), x.clone().requires_grad_()]
        with skd.backend(name):
            y = skd.functional.conv2d(topology, *leaves, padding=1, stride=2)
            inner = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            gradients.append(torch.autograd.grad(sum(g.square().sum() for g in inner), leaves))
    for ours, expected in zip(*gradients, strict=True):
        assert relative_error(ours, expected) < 1e-4


@interpreted
@pytest.mark.parametrize(
    "crow, col",
    [([0, 3, 2, 3], [0, 3, 1]), ([0, 2, 3, 1000], [0, 3, 1]), ([0, 2, 3, 3], [0, 4, 1])],
)
def test_crafted_indices_are_refused_by_every_op(on_triton, crow: list, col: list) -> None:
    structure = [torch.tensor(indices, dtype=torch.int32) for indices in (crow, col)]
    x, y, values = torch.ones(2, 4), torch.ones(2, 3), torch.ones(3)
    maps, upper = x[:, :, None, None], y[:, :, None, None]
    point = ([3, 4, 1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1)
    calls = {
        ops.conv2d: (maps, values, *structure, None, *point),
        ops.conv2d_dgrad: (upper, values, *structure, [2, 4, 1, 1], *point),
        ops.conv2d_wgrad: (upper, maps, *structure, *point),
        ops.linear: (x, values, *structure, None, [3, 4]),
        ops.linear_dgrad: (y, values, *structure, [3, 4]),
        ops.linear_wgrad: (y, x, *structure, [3, 4]),
        ops.grow_topk: (torch.ones(3, 4), *structure, 1),
    }
    for op, args in calls.items():
        with pytest.raises(TopologyError):
            op(*args)


@interpreted
def test_what_is_not_supported_is_refused(on_triton) -> None:
    from sparsekd.ops.triton import ops as triton

    topology = Topology.from_mask(torch.eye(3, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match=r"'triton' supports .*float32.*got torch.float64"):
        skd.functional.linear(topology, torch.ones(3).double(), torch.ones(2, 3).double())
    elsewhere = topology.crow_indices.to("meta"), topology.col_indices
    with pytest.raises(UnsupportedError, match="expected the device of the input, cpu, got meta"):
        triton.linear(torch.ones(2, 3), torch.ones(3), *elsewhere, None, [3, 3])
