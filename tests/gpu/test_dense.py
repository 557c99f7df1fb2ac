"""Torch's kernels with densified weights, on a real GPU: `make gpu-check`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

import sparsekd as skd
from sparsekd import Topology
from sparsekd.testing import (
    assert_layer_matches_dense,
    available_backends,
    poisoned_memory,
    random_layer,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
# cuBLAS and cuDNN may round sums of parts; the gradient of a padding other than zeros adds up
# several halves.
LIMITS = {torch.float32: 2e-5} | {
    dtype: 8 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)
}


@pytest.fixture(autouse=True)
def on_dense() -> Iterator[None]:
    if "dense_cuda" not in available_backends():
        pytest.skip(f"backend dense_cuda: {skd.ops.info()['backends']['dense_cuda']}")
    with skd.backend("dense_cuda"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_random_layers_equal_masked_dense(seed: int, dtype: torch.dtype) -> None:
    case = dataclasses.replace(random_layer(seed), dtype=dtype)
    with poisoned_memory():
        assert_layer_matches_dense(case, LIMITS[dtype], device=DEVICE)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_bad_row_leaves_the_others_alone(value: float) -> None:
    topology = Topology.from_mask(torch.eye(6, 10, dtype=torch.bool, device=DEVICE))
    x, values = torch.ones(4, 10, device=DEVICE), torch.ones(6, device=DEVICE, requires_grad=True)
    x[2, 3] = value
    y = skd.functional.linear(topology, values, x)
    finite = torch.ones(4, 6, dtype=torch.bool, device=DEVICE)
    finite[2, 3] = False
    assert torch.equal(y.isfinite(), finite)
    (dvalues,) = torch.autograd.grad(y.sum(), values)
    assert dvalues.isfinite().tolist() == [True, True, True, False, True, True]


def test_nothing_waits_for_the_device() -> None:
    layer = skd.nn.SparseConv2d(8, 16, 3, padding=1, sparsity=0.5, seed=0, device=DEVICE)
    x = torch.randn(4, 8, 9, 9, device=DEVICE, requires_grad=True)
    for waits in ("default", "error"):  # plans are made in the first pass
        torch.cuda.set_sync_debug_mode(waits)
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
