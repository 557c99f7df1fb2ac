"""Results too large for the caches are written past them; the numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparsekd as skd

CACHE = skd.ops.info()["cpp"]["l3_bytes"]
CHANNELS, SIDE = 64, 32
IMAGE = CHANNELS * SIDE * SIDE * 4  # bytes

pytestmark = pytest.mark.skipif(
    CACHE > 256 << 20, reason="the last-level cache holds all that a test should allocate"
)


def check_like_parts(run: Callable[[Tensor], Tensor], x: Tensor, row_bytes: int) -> None:
    """Compare a result and its input gradient with those of batches that the caches hold."""
    part = max(1, CACHE // 4 // row_bytes)
    assert len(x) * row_bytes > CACHE // 2
    with skd.backend("cpp"):
        expected = [both(run, piece) for piece in x.split(part)]
        actual = both(run, x)
    for whole, parts in zip(actual, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))


def both(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(y.detach())
    return y.detach(), x.grad


@pytest.fixture(params=[torch.channels_last, torch.contiguous_format])
def maps(request: pytest.FixtureRequest) -> Tensor:
    images = CACHE // 2 // IMAGE + 3
    x = torch.randn(images, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=request.param)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_convolution(maps: Tensor, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    dense = torch.nn.Conv2d(CHANNELS, CHANNELS * stride**2, kernel, stride, kernel // 2)
    layer = skd.nn.sparsify(dense, sparsity=0.95)
    check_like_parts(layer, maps, IMAGE)


def test_linear() -> None:
    torch.manual_seed(0)
    layer = skd.sparsify(torch.nn.Linear(512, 512), sparsity=0.95)
    rows = CACHE // 2 // 2048 + 7
    check_like_parts(layer, torch.randn(rows, 512), 2048)


@pytest.mark.parametrize("relu", [False, True])
def test_norm(maps: Tensor, relu: bool) -> None:
    torch.manual_seed(0)
    mean, var = torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5

    def run(x: Tensor) -> Tensor:
        return skd.ops.norm_act(x, None, None, None, mean, var, 1e-5, relu, True)

    check_like_parts(run, maps, IMAGE)
    with skd.backend("cpp"):
        y = F.batch_norm(maps, mean, var)
        torch.testing.assert_close(run(maps), y.relu() if relu else y)
