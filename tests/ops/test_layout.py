"""The result of a convolution has the memory format of its input, as in torch."""

from __future__ import annotations

import pytest
import torch

import sparsekd as skd


@pytest.mark.parametrize("shape", [(4, 1, 5, 6), (4, 3, 5, 6), (2, 3, 1, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_result_keeps_the_format_of_the_input(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    x = torch.randn(shape).to(memory_format=layout)
    dense = torch.nn.Conv2d(shape[1], 8, 3, padding=1).to(memory_format=layout)
    sparse = skd.nn.SparseConv2d.from_dense(dense, sparsity=0.5)
    assert sparse(x).stride() == dense(x).stride()


def test_one_channel_in_contiguous_memory_can_still_be_viewed_flat() -> None:
    conv = skd.nn.SparseConv2d(1, 8, 3, sparsity=0.5)
    assert conv(torch.randn(4, 1, 5, 6)).view(4, -1).shape == (4, 96)
