"""Each pass of a convolution by itself: `python -m pytest benchmarks/micro`.

One group a layer and pass; dense is what torch runs for the same pass in channels_last.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsekd import ops
from sparsekd.topology import Topology

LAYERS = {
    "64x64-32x32": (64, 64, 32),
    "256x256-8x8": (256, 256, 8),
    "512x512-4x4": (512, 512, 4),
}
PASSES = ("fprop", "dgrad", "wgrad")
BATCH = 128


def dense_pass(name: str, x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], object]:
    """Return a call of one pass of torch's convolution."""
    if name == "fprop":
        return lambda: torch.nn.functional.conv2d(x, weight, padding=1)
    wanted = [name == "dgrad", name == "wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )


def sparse_pass(name: str, x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], object]:
    """Return a call of one pass of ours, on the nonzeros of `weight`."""
    topology = Topology.from_mask(weight != 0)
    values = weight.contiguous().view(-1)[topology.flat_indices()]
    indices = (topology.crow_indices, topology.col_indices)
    rest = (list(weight.shape), [1, 1], [1] * 4, [1, 1], 1)
    if name == "fprop":
        return lambda: ops.conv2d(x, values, *indices, None, *rest)
    if name == "dgrad":
        return lambda: ops.conv2d_dgrad(grad, values, *indices, list(x.shape), *rest)
    return lambda: ops.conv2d_wgrad(grad, x, *indices, *rest)


@pytest.mark.parametrize("kind", ["dense", "0.8", "0.9", "0.95", "0.98"])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("layer", LAYERS)
def test_pass(benchmark, layer: str, name: str, kind: str) -> None:
    """Time one pass of one layer."""
    benchmark.group = f"{layer} {name}"
    channels, outs, size = LAYERS[layer]
    torch.manual_seed(0)
    x = torch.randn(BATCH, channels, size, size).to(memory_format=torch.channels_last)
    grad = torch.randn(BATCH, outs, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(outs, channels, 3, 3)
    make = dense_pass
    if kind != "dense":
        weight *= torch.rand_like(weight) >= float(kind)
        make = sparse_pass
    benchmark.pedantic(make(name, x, weight, grad), rounds=5, warmup_rounds=1)
