"""Weights made of tiles, whose rows the kernels compute together, equal masked dense torch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sparsekd as skd
from sparsekd.testing import (
    LayerCase,
    assert_layer_matches_dense,
    poisoned_memory,
    random_layer,
    sparse_results,
)

core = pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

SIDES = (1, 2, 3, 4, 5, 8, 16, 24, 32)
LIMITS = {torch.float32: 2e-5, torch.float64: 1e-11}


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in core.info()["isas"]:
        pytest.skip(f"this processor has no {request.param}")
    core.set_isa(request.param)
    try:
        with skd.backend("cpp"):
            yield request.param
    finally:
        core.set_isa("auto")


def tiled_layer(seed: int) -> LayerCase:
    """Draw a layer from the whole supported set, of more channels, with a mask in tiles."""
    draw = random.Random(seed)
    case = random_layer(seed)
    times = draw.choice((1, 1, 3, 5))
    return dataclasses.replace(
        case,
        in_features=case.in_features * times,
        out_features=case.out_features * times,
        tile=(draw.choice(SIDES), draw.choice(SIDES)),
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_random_tiles_equal_masked_dense(isa: str, threads: int) -> None:
    torch.set_num_threads(threads)
    with poisoned_memory():
        for seed in range(1000 * threads, 1000 * threads + 80):
            case = tiled_layer(seed)
            assert_layer_matches_dense(case, LIMITS[case.dtype])


def layer(tile: tuple[int, int], **changes: Any) -> LayerCase:
    case = LayerCase(
        seed=3,
        in_features=48,
        out_features=44,
        batch=(19,),
        density=0.3,
        bias=True,
        dtype=torch.float32,
        layout="channels_last",
        kernel_size=(3, 3),
        map_size=(9, 9),
        options={"padding": 1},
        tile=tile,
    )
    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize("tile", [(4, 1), (2, 2), (16, 16), (32, 1), (6, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_more_channels_than_a_panel(isa: str, tile: tuple[int, int], stride: int) -> None:
    for dtype, limit in LIMITS.items():
        case = layer(tile, dtype=dtype, options={"padding": 1, "stride": stride})
        assert_layer_matches_dense(case, limit)
        linear = dataclasses.replace(case, kernel_size=None, options={}, layout="contiguous")
        assert_layer_matches_dense(linear, limit)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything_is_one_tile(isa: str, density: float) -> None:
    assert_layer_matches_dense(layer((1, 1), density=density), LIMITS[torch.float32])


def test_groups_do_not_share_their_inputs(isa: str) -> None:
    options = {"padding": 1, "groups": 4}
    case = layer((64, 16), options=options, density=0.6)  # the same columns in every group
    assert_layer_matches_dense(case, LIMITS[torch.float32])


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_bits_from_run_to_run(isa: str, threads: int) -> None:
    torch.set_num_threads(threads)
    first = sparse_results(layer((16, 16)))
    again = sparse_results(layer((16, 16)))
    assert all(torch.equal(first[name], again[name]) for name in first)
