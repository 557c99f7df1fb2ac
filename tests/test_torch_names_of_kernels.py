"""As `test_torch_names.py`: the private names that concern torch's kernels for 2:4 weights."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsekd import _torch
from sparsekd.ops.semi_structured import plans


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_semi_structured_mm_and_addmm_take_what_we_pass(dtype: torch.dtype) -> None:
    packed = torch.empty(32, 32, dtype=dtype, device="meta")
    metadata = torch.empty(32, 4, dtype=torch.int16, device="meta")
    other = torch.empty(8, 64, dtype=dtype, device="meta").t()
    bias = torch.empty(32, dtype=dtype, device="meta")
    for y in (
        _torch.semi_structured_mm(packed, metadata, other),
        _torch.semi_structured_addmm(bias, packed, metadata, other),
    ):
        assert y.shape == (32, 8)
        assert y.is_contiguous()
        assert y.dtype == dtype


def test_metadata_order() -> None:
    """The words of a matrix whose runs differ, packed by torch, lie where the order says."""
    rows, words = 64, 8
    order = _torch.metadata_order(rows, words)
    assert torch.equal(order.sort().values, torch.arange(rows * words))
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    drawn = torch.randint(4, (rows, words * 4), generator=torch.Generator().manual_seed(0))
    _, metadata = sparse_semi_structured_from_dense_cutlass(masks[drawn].flatten(1).half())
    nibbles = torch.tensor([0b0100, 0b1000, 0b1001, 0b1100])[drawn].view(rows, words, 4)
    row_major = (nibbles << torch.tensor([0, 4, 8, 12])).sum(2).to(torch.int16)
    assert torch.equal(metadata.flatten()[order], row_major.flatten())


def test_sizes_are_those_of_torch() -> None:
    """What torch's own class requires of weights, and of the other matrix, is what we do."""
    for dtype in (torch.float16, torch.bfloat16):
        limits = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[dtype]
        weight = limits.sparse_min_rows, limits.sparse_min_cols
        assert (weight, limits.dense_min_rows) == ((plans.ROWS, plans.COLS), plans.OTHER_ROWS)


@pytest.mark.parametrize(
    "cuda, system, capability, expected",
    [
        ("13.0", "linux", (8, 0), True),
        ("13.0", "linux", (8, 9), True),
        ("13.0", "linux", (7, 5), False),
        ("13.0", "linux", (9, 0), False),
        ("13.0", "linux", (12, 0), False),
        ("13.0", "win32", (8, 0), False),
        (None, "linux", (8, 0), False),  # AMD
    ],
)
def test_has_semi_structured(monkeypatch, cuda, system, capability, expected: bool) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has = _torch.has_semi_structured.__wrapped__
    assert has(torch.device("cuda", 0)) == expected
    assert not has(torch.device("cpu"))
