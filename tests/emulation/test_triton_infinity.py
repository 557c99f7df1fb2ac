"""Infinity and NaN reach what has them among its terms, and nothing else, on the backend "triton".

The padding of a map is no term, and neither are the zeros that fill up a tile. Layers of every kind
of kernel are compared with the CPU's kernels.
"""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
import torch.nn.functional as F
from structures import assert_padding_meets_nothing
from triton_backend import float32_products

import sparsekd as skd
from sparsekd import Topology, functional
from sparsekd.testing import LayerCase

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TF32 = torch.finfo(torch.float16).eps

TILES = LayerCase(
    seed=3,
    in_features=32,
    out_features=32,
    batch=(3,),
    density=0.4,
    bias=True,
    dtype=torch.float32,
    layout="channels_last",
    kernel_size=(3, 3),
    map_size=(4, 5),
    options={"padding": (1, 2), "stride": (1, 2)},
    tile=(16, 16),
)
LINEAR = dataclasses.replace(
    TILES, batch=(19,), kernel_size=None, map_size=(1, 1), options={}, layout="contiguous"
)
KINDS = {
    "tiles": (TILES, {"tile_product", "tile_sample"}),
    "tiles, one tap": (
        dataclasses.replace(
            TILES, kernel_size=(1, 1), in_features=64, options={"padding": (1, 0, 2, 0)}
        ),
        {"tile_product", "tile_sample"},
    ),
    "tiles, ragged": (
        dataclasses.replace(TILES, in_features=40, out_features=24),
        {"tile_product", "tile_sample"},
    ),
    "tiles, filled up": (
        dataclasses.replace(TILES, tile=(1, 16), density=0.6),
        {"tile_product", "tile_sample", "shared_product"},
    ),
    "tiles, linear, filled up": (
        dataclasses.replace(LINEAR, tile=(1, 16), density=0.6),
        {"tile_product", "tile_sample", "shared_product"},
    ),
    "shared columns": (
        dataclasses.replace(TILES, in_features=10, tile=(32, 1)),
        {"shared_product", "shared_sample", "tile_product"},
    ),
    "rows": (
        dataclasses.replace(TILES, in_features=6, out_features=9, tile=(1, 1)),
        {"row_product", "row_sample"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_infinity_reaches_what_has_it_among_its_terms(on_triton, kind: str) -> None:
    if INTERPRETED and kind not in ("tiles, one tap", "rows"):
        pytest.skip("takes the interpreter long")
    case, kernels = KINDS[kind]
    dtype = torch.float16 if INTERPRETED else torch.bfloat16  # of which the interpreter has no sums
    assert_padding_meets_nothing(case, math.inf, 2e-5, "triton")
    halves = dataclasses.replace(case, dtype=dtype)
    assert_padding_meets_nothing(halves, math.nan, 2 * torch.finfo(dtype).eps, "triton")
    assert kernels == set(on_triton) - {"take_values"}


@pytest.mark.parametrize("kernel", ["tile_product", "shared_product"])
def test_results_that_overflow_do_not_depend_on_others(on_triton, kernel: str) -> None:
    """Sums of 65520 round to infinity in float16 or do not, by the order of their terms."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 32, 5, 5, generator=generator) * 3000).half()
    weight = (torch.randn(16, 32, 3, 3, generator=generator) * 3000).half()
    mask = torch.ones(16, 32, 3, 3, dtype=torch.bool)
    if kernel == "shared_product":
        mask &= torch.rand(32, 3, 3, generator=generator) < 0.7
        mask[:, 29:, 1, 1] = True
    weight *= mask
    weight[:, 29:, 1, 1] = 0
    for channel, power in (29, 14), (30, 5), (31, -5):
        x[0, channel, 1, 1] = 2.0**power
        rest = 65520 - F.conv2d(x.double(), weight.double(), padding=1)[0, :, 1, 1]
        weight[:, channel, 1, 1] = rest / 2.0**power
    topology = Topology.from_mask(mask)
    with skd.backend("triton"):
        alone = functional.conv2d(topology, weight[mask], x, padding=1)
        x[0, 0, 4, 4] = math.inf
        beside = functional.conv2d(topology, weight[mask], x, padding=1)
    assert kernel in on_triton
    assert 0 < alone[0, :, 1, 1].isinf().sum() < 16
    assert not beside[:, :, 3:, 3:].isfinite().any()
    beside[:, :, 3:, 3:] = alone[:, :, 3:, 3:]
    assert torch.equal(beside, alone)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no TF32")
def test_products_in_tf32_are_exact_too(on_triton) -> None:
    for kind in ("tiles", "tiles, linear, filled up"):
        with float32_products("tf32"):
            assert_padding_meets_nothing(KINDS[kind][0], math.inf, 4 * TF32, "triton")
