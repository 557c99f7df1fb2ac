"""On CUDA tensors the structure of a weight decides between the backends "cuda" and "triton"."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_backend import float32_products

import sparsekd as skd
from sparsekd import Topology
from sparsekd.ops import backends


@pytest.fixture
def on_gpu(on_cuda, on_triton, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test on the backend "gpu", on CPU tensors, with both of its backends emulated."""
    entry = dataclasses.replace(backends.BACKENDS["gpu"], device="cpu")
    monkeypatch.setitem(backends.BACKENDS, "gpu", entry)
    backends.load.cache_clear()
    with skd.backend("gpu"):
        yield
    del sys.modules["sparsekd.ops.gpu"]


def operands(tile: tuple[int, int], dtype: torch.dtype) -> tuple[Topology, Tensor, Tensor]:
    grid = (
        torch.rand(64 // tile[0], 64 // tile[1], generator=torch.Generator().manual_seed(0)) < 0.4
    )
    mask = grid.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    topology = Topology.from_mask(mask)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(topology.nnz, generator=generator).to(dtype)
    return topology, values, torch.randn(5, 64, generator=generator).to(dtype)


@pytest.mark.parametrize(
    "tile, dtype, precision, expected",
    [
        ((16, 16), torch.float32, "ieee", "triton"),
        ((32, 16), torch.bfloat16, "ieee", "triton"),
        ((16, 1), torch.float16, "ieee", "triton"),
        ((16, 1), torch.float32, "tf32", "triton"),
        ((16, 1), torch.float32, "ieee", "emulated_cuda"),
        ((1, 16), torch.float16, "ieee", "emulated_cuda"),
        ((1, 1), torch.bfloat16, "ieee", "emulated_cuda"),
    ],
)
def test_structure_decides(on_gpu, tile, dtype, precision: str, expected: str) -> None:
    topology, values, x = operands(tile, dtype)
    structure = topology.crow_indices, topology.col_indices
    with float32_products(precision):
        assert backends.running("linear", (x, values, *structure, None, [64, 64])) == expected


def test_equal_shapes_of_other_structure_run_elsewhere(on_gpu, on_triton) -> None:
    """The choice is made at each call: nothing in the shapes of these two tells them apart."""
    tiled, values, x = operands((16, 16), torch.float32)
    order = torch.randperm(tiled.numel, generator=torch.Generator().manual_seed(2))
    plain = Topology.from_mask(tiled.mask().flatten()[order].view(64, 64))
    for topology, launches in ((tiled, 1), (plain, 1), (tiled, 2)):
        y = skd.functional.linear(topology, values, x)
        assert on_triton["tile_product"] == launches
        dense = torch.zeros(64, 64)
        dense[topology.mask()] = values
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-5, atol=1e-4)
