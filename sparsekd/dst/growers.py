"""Rules for growth: pure functions that select positions outside a structure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparsekd.dst import scores
from sparsekd.ops import growth
from sparsekd.topology import Topology


def random(kept: Topology, k: int, generator: torch.Generator) -> Tensor:
    """Return exactly `k` positions outside `kept`, uniformly at random.

    Args:
        kept: the structure to grow from.
        k: how many; clamped to the number of free positions.
        generator: a CPU generator, so that every device draws the same positions.

    Returns:
        int64 `[k]` positions in the flat weight, ascending.

    Source: Sparse Evolutionary Training (arXiv 1707.04780), algorithm 1.

    Example:
        >>> kept = Topology.from_mask(torch.tensor([[True, False], [True, True]]))
        >>> random(kept, 1, torch.Generator().manual_seed(0)).tolist()
        [1]
    """
    taken = kept.flat_indices()
    # The r-th free position is r plus the number of taken positions before it.
    gaps = taken - torch.arange(len(taken), device=taken.device)
    rank = torch.randperm(kept.numel - kept.nnz, generator=generator)[:k].sort().values
    rank = rank.to(taken.device)
    return rank + torch.searchsorted(gaps, rank, right=True)


def noise(tiles: Topology, generator: torch.Generator) -> growth.Block:
    """Return a random number in (0, 1] for every position, as one rectangle.

    Args:
        tiles: gives shape and device.
        generator: a CPU generator, so that every device draws the same numbers.
    """
    drawn = torch.rand(tiles.rows, tiles.cols, dtype=torch.float64, generator=generator)
    return 0, 0, 1 - drawn.to(tiles.device)


def largest(score: Tensor, kept: Topology, k: int) -> Tensor:
    """Return the positions of the `k` largest scores outside `kept`; ties go to the lower position.

    Args:
        score: one number per position of the dense weight, without NaN.
        kept: the structure to grow from; its own scores are never looked at.
        k: how many; clamped to the number of free positions.

    Shape:
        - score: `[kept.numel]`, or any shape with that many elements

    Returns:
        int64 `[k]` positions in the flat weight, ascending.

    Source: Rigging the Lottery (arXiv 1911.11134), algorithm 1.

    Example:
        >>> kept = Topology.from_mask(torch.tensor([[True, False], [False, False]]))
        >>> largest(torch.tensor([9.0, 0.0, 2.0, 1.0]), kept, 2).tolist()
        [2, 3]
    """
    k = min(k, kept.numel - kept.nnz)
    score = score.reshape(kept.rows, kept.cols)
    return torch.ops.sparsekd.grow_topk(score, kept.crow_indices, kept.col_indices, k)


def largest_magnitude(blocks: Iterable[growth.Block], kept: Topology, k: int) -> Tensor:
    """Apply `largest` to the absolute values of numbers that come in rectangles.

    Args:
        blocks: `(row, column, entries)` of rectangles that cover the weight, seen as
            `[rows, cols]`, once; in any order, without NaN. Each is read before the next is asked
            for.
        kept: the structure to grow from.
        k: how many; clamped to the number of free positions.

    Returns:
        int64 `[k]` positions in the flat weight, ascending.

    Source: Rigging the Lottery (arXiv 1911.11134), algorithm 1.

    Example:
        >>> kept = Topology.from_mask(torch.tensor([[True, False], [False, False]]))
        >>> halves = [(0, 1, torch.tensor([[1.0], [-3.0]])), (0, 0, torch.tensor([[9.0], [2.0]]))]
        >>> largest_magnitude(halves, kept, 2).tolist()
        [2, 3]
    """
    k = min(k, kept.numel - kept.nnz)
    shape = kept.rows, kept.cols
    crow, col = kept.crow_indices, kept.col_indices
    return growth.largest(blocks, crow, col, shape, k, magnitude=True)


def largest_in_cells(
    blocks: Iterable[growth.Block],
    kept: Topology,
    cell_of: Callable[[Tensor], Tensor],
    quota: Tensor,
) -> Tensor:
    """Return the positions outside `kept` of largest magnitude, a given number in every cell.

    Of equal magnitudes the lower position is taken. Besides one rectangle only the best so far
    are held.

    Args:
        blocks: as in `largest_magnitude`.
        kept: the structure to grow from.
        cell_of: flat positions -> the cell of each.
        quota: how many each cell gets, `[cells]`; one with fewer free positions gets them all.

    Returns:
        int64 positions in the flat weight, ascending.

    Example:
        >>> kept = Topology.from_mask(torch.tensor([[True, False, False], [False, False, True]]))
        >>> block = (0, 0, torch.tensor([[9.0, 1.0, -2.0], [1.0, 1.0, 0.0]]))
        >>> largest_in_cells([block], kept, lambda at: at // 3, torch.tensor([1, 1])).tolist()
        [2, 3]
    """
    free = ~kept.mask().view(kept.rows, kept.cols)
    best = torch.empty(0, dtype=torch.int64, device=kept.device)
    score: Tensor | None = None
    for row, column, block in blocks:
        high, wide = block.shape
        row_start = torch.arange(row, row + high, device=kept.device)[:, None] * kept.cols
        at = row_start + torch.arange(column, column + wide, device=kept.device)
        cell = cell_of(at)
        inside = free[row : row + high, column : column + wide] & (quota[cell] > 0)
        if score is not None:  # most of what follows cannot enter: do not sort it
            inside &= block.abs() >= _lowest_to_enter(score, cell_of(best), quota)[cell]
        at, found = torch.cat([best, at[inside]]), block[inside].abs()
        at, order = at.sort()
        score = (found if score is None else torch.cat([score, found]))[order]
        stay = scores.largest_in_cells(score, cell_of(at), quota)
        best, score = at[stay], score[stay]
    return best


def _lowest_to_enter(best: Tensor, cell: Tensor, quota: Tensor) -> Tensor:
    """Return, for each cell, the lowest of its best scores, or 0 if its quota is not filled yet."""
    lowest = best.new_full(quota.shape, torch.inf).scatter_reduce_(0, cell, best, "amin")
    filled = torch.bincount(cell, minlength=len(quota)) >= quota
    return lowest.where(filled, 0.0)
