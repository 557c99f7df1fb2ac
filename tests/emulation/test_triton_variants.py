"""How many variants of a kernel Triton compiles while batches change in size."""

from __future__ import annotations

import pytest
import torch

import sparsekd as skd

triton = pytest.importorskip("triton", reason="needs Triton")

from sparsekd.kernels import gather, gemm  # noqa: E402

KERNELS = {"tile_product": gemm.tile_product} | {
    name: getattr(gather, name) for name in ("shared_product", "row_product")
}
BATCHES = (16, 13, 7, 9)  # an epoch ends with what is left over


def variants(name: str) -> int:
    """Return how many variants of a kernel there are."""
    return sum(len(cache[0]) for cache in KERNELS[name].device_caches.values())


def step(conv: skd.nn.SparseConv2d, batch: int) -> None:
    x = torch.randn(batch, 32, 10, 10).to(memory_format=torch.channels_last).requires_grad_()
    conv(x).sum().backward()


@pytest.mark.parametrize(
    "layout, product, most",
    [("bcsr:16", "tile_product", 1), ("fanin:16", "shared_product", 2), ("csr", "row_product", 2)],
)
def test_ragged_batches_compile_few_variants(
    ptx, on_triton, layout: str, product: str, most: int
) -> None:
    """Packed maps have vectors along images: a batch is a multiple of 16 or not."""
    conv = skd.nn.SparseConv2d(32, 32, 3, padding=1, sparsity=0.7, layout=layout, seed=0)
    KERNELS[product].device_caches.clear()  # other tests may have compiled the same
    step(conv, BATCHES[0])
    first = variants(product)
    assert first > 0
    for batch in BATCHES[1:]:
        step(conv, batch)
    assert variants(product) <= most * first
