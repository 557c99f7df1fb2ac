"""Functions on a compressed-row structure: make it, check it, list its positions, transpose it.

On a GPU they run the kernels of `csrc/cuda` if those are built, else torch's.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd import cuda_library
from sparsekd.errors import TopologyError

try:  # torch comes first: the compiled module shares its OpenMP runtime
    from sparsekd._C import release as _release
except ModuleNotFoundError:  # not built; one that is broken raises its own error
    _release = None

_INT32_MAX = 2**31 - 1
MOST_POSITIONS = _INT32_MAX - 1024
"""Of a weight that the kernels of csrc/cuda take, whose threads step past the end; larger masks are
cut, and transposed by torch."""


class TransposedCSR(NamedTuple):
    """A structure by columns, and where each of its slots lies in the original."""

    crow_indices: Tensor
    col_indices: Tensor
    permutation: Tensor


def checked_shape(shape: Sequence[int]) -> torch.Size:
    """Check that int32 can index a weight of this shape; raise TopologyError otherwise."""
    size = torch.Size(shape)
    if len(size) < 2 or min(size) < 0:
        raise TopologyError(
            f"shape: expected two or more dimensions, none negative, got {tuple(shape)}"
        )
    if math.prod(size) > _INT32_MAX:
        raise TopologyError(
            f"shape: {tuple(size)} has {math.prod(size)} elements, "
            f"too many for int32 indices (at most {_INT32_MAX})"
        )
    return size


def compress(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a mask to compressed rows.

    Args:
        mask: bool `[rows, cols]`.

    Returns:
        The start of each row, int32 `[rows + 1]`, and the column of each True entry, int32 `[nnz]`.
    """
    rows, cols = mask.shape
    if rows > 1 and mask.numel() > MOST_POSITIONS:
        (upper, left), (lower, right) = map(compress, mask.tensor_split(2))
        return torch.cat([upper, lower[1:] + upper[-1]]), torch.cat([left, right])
    library = cuda_library.library_for(mask.device)
    if library is None:
        positions = mask.reshape(-1).nonzero().squeeze(1)
        starts = torch.arange(rows + 1, device=mask.device) * cols
        crow = torch.searchsorted(positions, starts, out_int32=True)
        return crow, positions.to(torch.int32, copy=True).remainder_(max(cols, 1))
    mask = mask.contiguous()
    crow = torch.empty(rows + 1, dtype=torch.int32, device=mask.device)
    library.run("mask_crow", mask.device, rows, cols, mask, crow)
    col = crow.new_empty(int(crow[-1]))  # the one wait for the device
    library.run("mask_col", mask.device, rows, cols, mask, crow, col)
    return crow, col


def transpose(crow: Tensor, col: Tensor, cols: int) -> TransposedCSR:
    """Transpose a structure, with the position of each nonzero in the original.

    Args:
        crow: start of each row, int32 `[rows + 1]`.
        col: column of each nonzero, int32 `[nnz]`.
        cols: of the matrix.

    Returns:
        The start of each column, int32 `[cols + 1]`; the row of each nonzero, ascending within a
        column, and its position in `col`, both int32 `[nnz]`.
    """
    rows, nnz = crow.shape[0] - 1, col.shape[0]
    library = cuda_library.library_for(crow.device)
    if library is None or rows * cols > MOST_POSITIONS:
        order = torch.argsort(col, stable=True)
        starts = crow.new_zeros(cols + 1)
        torch.cumsum(torch.bincount(col, minlength=cols), 0, dtype=torch.int32, out=starts[1:])
        rows_of = row_indices(crow, nnz)[order].to(torch.int32)
        return TransposedCSR(starts, rows_of, order.to(torch.int32))
    starts, row, slot = crow.new_empty(cols + 1), crow.new_empty(nnz), crow.new_empty(nnz)
    size = library.size("transpose_scratch", rows, cols)
    scratch = torch.zeros(size, dtype=torch.uint8, device=crow.device)
    library.run("transpose", crow.device, rows, cols, crow, col, scratch, starts, row, slot)
    return TransposedCSR(starts, row, slot)


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


def checksum(crow: Tensor, col: Tensor) -> int | Tensor:
    """Compute a checksum of indices, equal by chance once in 2^32 cases.

    On a GPU it is a tensor, so that only a comparison waits for the device.

    Example:
        >>> crow, col = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [2]))
        >>> checksum(crow, col) == checksum(crow, col - 1)
        False
    """
    if crow.device.type == "cpu":
        return zlib.crc32(col.numpy().data, zlib.crc32(crow.numpy().data))
    return _mixed(crow) * 3 + _mixed(col)


def forget_with(owner: object, crow: Tensor, col: Tensor) -> None:
    """Drop what the compiled module caches of a structure when `owner` is garbage-collected."""
    if _release is not None and crow.device.type == "cpu":
        weakref.finalize(owner, _release, crow, col).atexit = False


def _mixed(indices: Tensor) -> Tensor:
    place = torch.arange(indices.numel(), device=indices.device)
    mixed = (indices ^ (place * 0x1E3779B97F4A7C15)) * 0x3F58476D1CE4E5B9
    return ((mixed ^ (mixed >> 29)) * 0x14D049BB133111EB).sum()
