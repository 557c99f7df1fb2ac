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
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import sparsekd as skd
from sparsekd.ops import backends
from sparsekd.testing import (
    LayerCase,
    assert_layer_matches_dense,
    poisoned_memory,
    random_layer,
)

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("sparsekd._C", reason="the compiled module is not built")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, which is faster")
executed = pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot show it")
KERNELS = ("tile_product", "tile_sample", "shared_product", "shared_sample",
           "row_product", "row_sample")  # fmt: skip
# float32 as the CPU's kernels are held to; halves are rounded once, after sums in float32. TF32
# has the mantissa of float16, and both factors are rounded to it.
LIMITS = {torch.float32: 2e-5} | {t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16)}
TF32 = 2 * torch.finfo(torch.float16).eps
OVERLAPS = 8  # the gradient of a padding other than zeros is torch's, which adds up several halves
CHUNK = 12

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


@pytest.fixture
def on_triton(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Counter[str]]:
    """Run the test on the backend "triton", on CPU tensors; count the launches by kernel."""
    if not INTERPRETED:
        request.getfixturevalue("ptx")
    from sparsekd.ops import triton_launch

    entry = dataclasses.replace(backends.BACKENDS["triton"], device="cpu")
    monkeypatch.setitem(backends.BACKENDS, "triton", entry)
    backends._load.cache_clear()
    launches: Counter[str] = Counter()
    for name in KERNELS:
        monkeypatch.setattr(triton_launch, name, counting(launches, name, triton_launch))
    with skd.backend("triton"), float32_products("ieee"):
        yield launches
    monkeypatch.undo()
    del sys.modules["sparsekd.ops.triton"]  # imported because of the driver, which goes now
    backends._load.cache_clear()


def counting(launches: Counter[str], name: str, module) -> Callable:
    launch = getattr(module, name)

    def run(*args, **kwargs):
        launches[name] += 1
        return launch(*args, **kwargs)

    return run


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set torch's precision of products in float32, "ieee" or "tf32"."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


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
        in_features=groups * draw.choice((16, 40, 48, 96)),
        out_features=groups * draw.choice((16, 32, 40, 96)),
        batch=batch,
        options=options,
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
    assert {"tile_product", "tile_sample", "shared_product"} <= set(on_triton)


KINDS = {
    "tiles": (CONV, {"tile_product", "tile_sample"}),
    "tiles, ragged": (
        dataclasses.replace(CONV, in_features=40, out_features=24),
        {"tile_product", "tile_sample"},
    ),
    "tiles, stride": (
        dataclasses.replace(CONV, options={"padding": 1, "stride": 2, "dilation": 2}),
        {"tile_product", "tile_sample"},
    ),
    "tiles, groups": (
        dataclasses.replace(CONV, in_features=32, options={"groups": 2}),
        {"tile_product", "tile_sample"},
    ),
    "tiles, linear": (LINEAR, {"tile_product", "tile_sample"}),
    "shared columns": (
        dataclasses.replace(CONV, in_features=10, tile=(32, 1), layout="contiguous"),
        {"shared_product", "shared_sample", "tile_product"},
    ),
    "shared columns, linear": (
        dataclasses.replace(LINEAR, tile=(16, 2), density=0.2),
        {"shared_product", "shared_sample", "tile_product"},
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
