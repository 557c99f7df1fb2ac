"""torch's kernels for 2:4 weights on CPU tensors, decoded by torch's own function; and such masks.

They refuse what those of a GPU refuse: see SparseSemiStructuredOps.cu of PyTorch, and
`can_implement` of CUTLASS.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sparsekd import Topology

_PAIRS = list(itertools.combinations(range(4), 2))
_RUNS = torch.tensor([[place in kept for place in range(4)] for kept in _PAIRS])
# Squares with two nonzeros in every row and every column: 2:4 both ways.
_SQUARES = torch.stack(
    [
        _RUNS[list(rows)]
        for rows in itertools.product(range(len(_RUNS)), repeat=4)
        if (_RUNS[list(rows)].sum(0) == 2).all()
    ]
)


def mask_2to4(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return a random mask with two nonzeros in each run of four columns."""
    generator = torch.Generator().manual_seed(seed)
    return _RUNS[torch.randint(len(_RUNS), (rows, cols // 4), generator=generator)].flatten(1)


def transposable_mask(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Return a random mask that is 2:4, as its transpose is."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(_SQUARES), (rows // 4, cols // 4), generator=generator)
    return _SQUARES[drawn].transpose(1, 2).reshape(rows, cols)


@contextmanager
def decoded() -> Iterator[Counter[str]]:
    """Let torch's kernels run on CPU tensors while the context lasts; count their calls."""
    calls: Counter[str] = Counter()

    def mm(packed: Tensor, metadata: Tensor, other: Tensor, out_dtype: None = None) -> Tensor:
        calls["mm"] += 1
        return _product(packed, metadata, other).to(packed.dtype)

    def addmm(
        bias: Tensor, packed: Tensor, metadata: Tensor, other: Tensor, **options: object
    ) -> Tensor:
        calls["addmm"] += 1
        assert bias.dtype == packed.dtype
        assert bias.is_contiguous()
        return (_product(packed, metadata, other) + bias.float()[:, None]).to(packed.dtype)

    with torch.library._scoped_library("aten", "IMPL", "CPU") as library:
        library.impl("_sparse_semi_structured_mm", mm)
        library.impl("_sparse_semi_structured_addmm", addmm)
        yield calls


def _product(packed: Tensor, metadata: Tensor, other: Tensor) -> Tensor:
    assert packed.dtype == other.dtype
    assert packed.dtype in (torch.float16, torch.bfloat16)
    assert metadata.dtype == torch.int16
    assert packed.is_contiguous()
    assert metadata.is_contiguous()
    assert 1 in other.stride()
    for tensor in (packed, metadata, other):
        assert tensor.data_ptr() % 16 == 0
    rows, kept = packed.shape
    assert metadata.shape == (rows, kept // 8)
    assert other.shape[0] == 2 * kept
    assert rows % 32 == 0
    assert kept % 32 == 0
    assert other.shape[1] % 8 == 0
    assert other.shape[1] > 0
    # As in hardware, metadata selects what is multiplied: zeros of the weight meet nothing.
    stored = sparse_semi_structured_to_dense_cutlass(torch.ones_like(packed), metadata)
    columns = stored.nonzero()[:, 1].view(rows, kept)
    return torch.einsum("rk,rkn->rn", packed.float(), other.float()[columns])


def operands(
    mask: Tensor, dtype: torch.dtype = torch.float16, rows: int = 5, seed: int = 1
) -> tuple[Any, ...]:
    """Return those of a linear layer, without a bias."""
    topology = Topology.from_mask(mask)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, mask.shape[1], generator=generator).to(dtype)
    values = torch.randn(topology.nnz, generator=generator).to(dtype)
    indices = topology.crow_indices, topology.col_indices
    return x, values, *indices, None, list(mask.shape)


def moved(mask: Tensor, fro: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Return a mask with a nonzero moved."""
    assert mask[fro]
    assert not mask[to]
    mask = mask.clone()
    mask[fro], mask[to] = False, True
    return mask
