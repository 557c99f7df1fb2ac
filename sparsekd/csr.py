"""Plain functions on a compressed-row structure: check it, and list its positions."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekd.errors import TopologyError


def row_indices(crow: Tensor, nnz: int) -> Tensor:
    """Return the row of each nonzero, int64 `[nnz]`."""
    rows = torch.arange(crow.shape[0] - 1, device=crow.device)
    return torch.repeat_interleave(rows, crow.diff(), output_size=nnz)


def flat_indices(crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """Return the position of each nonzero in the flat weight, int64 `[nnz]`."""
    return row_indices(crow, col.shape[0]) * cols + col


def validate(crow: Tensor, col: Tensor, rows: int, cols: int) -> None:
    """Raise TopologyError unless (crow, col) is a CSR structure of `rows` x `cols`."""
    for name, tensor in (("crow_indices", crow), ("col_indices", col)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TopologyError(f"{name}: expected dtype int32 or int64, got {tensor.dtype}")
        if tensor.ndim != 1:
            raise TopologyError(f"{name}: expected one dimension, got shape {list(tensor.shape)}")
    if crow.device != col.device:
        raise TopologyError(f"crow_indices is on {crow.device} but col_indices on {col.device}")
    nnz = col.shape[0]
    if crow.shape[0] != rows + 1:
        raise TopologyError(
            f"crow_indices: expected length rows + 1 = {rows + 1}, got {crow.shape[0]}"
        )
    if crow[0] != 0:
        raise TopologyError(f"crow_indices: expected to start at 0, got {crow[0].item()}")
    if crow[-1] != nnz:
        raise TopologyError(
            f"crow_indices: expected to end at nnz = {nnz}, the length of col_indices, "
            f"got {crow[-1].item()}"
        )
    falling = (crow[1:] < crow[:-1]).nonzero()
    if len(falling):
        row = int(falling[0])
        raise TopologyError(
            f"crow_indices: not monotone, falls from {crow[row].item()} to "
            f"{crow[row + 1].item()} at row {row}"
        )
    outside = ((col < 0) | (col >= cols)).nonzero()
    if len(outside):
        slot = int(outside[0])
        raise TopologyError(
            f"col_indices: out of range, expected 0 <= column < {cols}, "
            f"got {col[slot].item()} at position {slot}"
        )
    _validate_order(crow, col)


def _validate_order(crow: Tensor, col: Tensor) -> None:
    row = row_indices(crow, col.shape[0])
    wrong = ((row[1:] == row[:-1]) & (col[1:] <= col[:-1])).nonzero()
    if len(wrong):
        slot = int(wrong[0]) + 1
        before, here = col[slot - 1].item(), col[slot].item()
        what = "duplicated" if before == here else "not sorted"
        raise TopologyError(
            f"col_indices: {what} within row {row[slot].item()}: column {here} follows {before} "
            f"at position {slot}"
        )
