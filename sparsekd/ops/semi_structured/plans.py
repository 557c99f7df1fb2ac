"""Which weights are 2:4, and what torch's kernels for them read besides the values.

2:4 is two nonzeros in each run of four columns. Stored in row-major order, they are what the
kernels take for the packed weight; what is left of the structure is where in its run each one lies:
two bits a nonzero, the metadata. The transpose has metadata of its own, and its values in another
order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd._torch import metadata_order
from sparsekd.errors import UnsupportedError
from sparsekd.ops.gpu.structure import Structure

ROWS, COLS, OTHER_ROWS = 32, 64, 8
"""What sizes must be multiples of: those of a weight, and the rows of what it is multiplied with.

Source: SparseSemiStructuredTensorCUTLASS of PyTorch, whose kernels these are, in 16 bits.
"""
MOST_OTHER_ROWS = 65535 * 128
"""The most rows of what a weight is multiplied with: a grid has 65,535 blocks along y, of 128.

Source: SparseSemiStructuredOps.cu of PyTorch, and GemmIdentityThreadblockSwizzle of CUTLASS.
"""
_RUN, _KEPT = 4, 2
_RUNS_OF_WORD = 4  # a run has four bits of metadata, a word 16


class Compressed(NamedTuple):
    """What a kernel reads of a structure.

    Args:
        metadata: int16 `[rows, cols / 16]`, in the order of the kernel.
        order: place of each value of the transpose in the values, int32 `[nnz]`; None for the
            weight as it is.
    """

    metadata: Tensor
    order: Tensor | None


def is_compressible(structure: Structure, *, transposed: bool) -> bool:
    """Return whether a structure, or its transpose, is 2:4 throughout; the answer is kept.

    Args:
        structure: of the weight.
        transposed: whether the transpose is meant.
    """
    key = ("whether runs are 2:4", transposed)
    return structure.plan(key, lambda made: _places(made, transposed) is not None)


def compressed(structure: Structure, *, transposed: bool) -> Compressed:
    """Plan the product with a 2:4 weight, or with its transpose.

    Args:
        structure: of the weight; it keeps the plan.
        transposed: whether the transpose is meant.

    Raises:
        UnsupportedError: it is not 2:4.
    """
    key = ("semi-structured metadata", transposed)
    plan = structure.plan(key, lambda made: _compress(made, transposed))
    if not plan:
        raise UnsupportedError(
            "crow, col: backend 'semi_structured' multiplies weights of which exactly two of "
            "every four consecutive "
            f"{'output' if transposed else 'input'} channels are nonzero, got others"
        )
    return plan


def _compress(structure: Structure, transposed: bool) -> Compressed | tuple[()]:
    found = _places(structure, transposed)
    if found is None:
        return ()  # for as long as the structure stays as it is; None would be for good
    places, order = found
    order = None if order is None else structure.upload(order)
    return Compressed(structure.to_device(_metadata(places)), order)


def _places(structure: Structure, transposed: bool) -> tuple[Tensor, Tensor | None] | None:
    """Return the places of nonzeros in their runs, `[rows, runs, 2]`, and their order, if 2:4."""
    (rows, cols), row, col, order = structure.size, structure.row, structure.col, None
    if transposed:
        # Columns of another number of nonzeros are ruled out before anything is sorted.
        if bool((torch.bincount(col, minlength=cols) * _RUN != rows * _KEPT).any()):
            return None
        order = torch.argsort(col, stable=True)
        rows, cols, row, col = cols, rows, col[order], row[order]
    if cols % _RUN or col.shape[0] * _RUN != rows * cols * _KEPT:
        return None
    position = row.long() * cols + col
    if not torch.equal(position // _RUN, torch.arange(col.shape[0]) // _KEPT):
        return None
    return (position % _RUN).view(rows, cols // _RUN, _KEPT), order


def _metadata(places: Tensor) -> Tensor:
    rows, runs, _ = places.shape
    run = places[..., 0] | places[..., 1] << 2
    shifts = torch.arange(_RUNS_OF_WORD) * 4
    words = (run.view(rows, -1, _RUNS_OF_WORD) << shifts).sum(2).to(torch.int16)
    metadata = torch.empty_like(words)
    metadata.view(-1)[metadata_order(rows, runs // _RUNS_OF_WORD)] = words.view(-1)
    return metadata
