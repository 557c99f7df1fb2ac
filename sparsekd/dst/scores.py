"""Rules for dropping weights: pure functions of flat tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekd.ops import growth
from sparsekd.sparsity import nearest_prefix
from sparsekd.topology import Topology


def magnitude(values: Tensor) -> Tensor:
    """Return `|values|`, detached, in float32 or better.

    Example:
        >>> magnitude(torch.tensor([-2.0, 1.0])).tolist()
        [2.0, 1.0]
    """
    score = values.detach().abs()
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score


def smallest(score: Tensor, k: int) -> Tensor:
    """Return the slots of exactly the `k` smallest scores; among equal ones the lower slots.

    Slots rather than a threshold, because freshly grown weights are all 0 and tie.

    Args:
        score: one number per weight.
        k: how many.

    Shape:
        - score: `[nnz]`
        - result: int64 `[k]`, ascending

    Raises:
        ValueError: a score is NaN, or `k` is not in [0, nnz].

    Example:
        >>> smallest(torch.tensor([0.0, 2.0, 0.0, 1.0]), 3).tolist()
        [0, 2, 3]
    """
    if not 0 <= k <= len(score):
        raise ValueError(f"k: expected 0 to {len(score)}, got {k}")
    row = torch.zeros(2, dtype=torch.int32, device=score.device)  # a structure of one empty row
    blocks = [(0, 0, -score[None])]
    return growth.largest(blocks, row, row[:0], (1, len(score)), k, magnitude=False)


def largest_in_cells(score: Tensor, cell: Tensor, quota: Tensor) -> Tensor:
    """Mark the largest scores of every cell, as many as its quota; of equal ones the first.

    Args:
        score: numbers, none NaN.
        cell: the cell of each.
        quota: how many each cell gets; one that has fewer scores marks them all.

    Shape:
        - score, cell, result: `[n]`
        - quota: `[cells]`

    Returns:
        bool, True where marked.

    Example:
        >>> score, cell = torch.tensor([1.0, 3.0, 3.0, 2.0]), torch.tensor([0, 0, 0, 1])
        >>> largest_in_cells(score, cell, torch.tensor([1, 2])).tolist()
        [False, True, False, True]
    """
    order = score.argsort(descending=True, stable=True)
    order = order[cell[order].argsort(stable=True)]
    ordered = cell[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    marked = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    marked[order[rank < quota[ordered]]] = True
    return marked


def smallest_overall(
    scores: Mapping[str, Tensor], k: int, areas: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """Count, for each layer, its share of the `k` smallest scores of all layers.

    Among equal scores those of an earlier layer go first.

    Args:
        scores: one number per weight, or per tile, by layer; all of one device.
        k: how many weights over all layers.
        areas: weights of each tile; the sum then comes as near to `k` as whole tiles do. None
            where scores are of weights.

    Raises:
        ValueError: a score is NaN, or `k` is not in [0, number of scores].

    Example:
        >>> smallest_overall({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.0, 2.0])}, 3)
        {'a': 1, 'b': 2}
    """
    flat = torch.cat(list(scores.values()))
    if areas is None:
        gone = smallest(flat, k)
    else:
        order = flat.argsort(stable=True)
        gone = order[: nearest_prefix(torch.cat([areas[name] for name in scores])[order], k)]
    ends = torch.tensor([len(score) for score in scores.values()]).cumsum(0).to(gone.device)
    layer = torch.searchsorted(ends, gone, right=True)
    return dict(zip(scores, torch.bincount(layer, minlength=len(scores)).tolist(), strict=True))


def without(topology: Topology, slots: Tensor) -> Topology:
    """Return `topology` less the nonzeros in `slots`.

    Example:
        >>> full = Topology.from_mask(torch.ones(2, 2, dtype=torch.bool))
        >>> without(full, torch.tensor([0, 3])).flat_indices().tolist()
        [1, 2]
    """
    keep = torch.ones(topology.nnz, dtype=torch.bool, device=topology.device)
    keep[slots] = False
    kept_before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    crow = kept_before[topology.crow_indices]
    return Topology(crow, topology.col_indices[keep], topology.shape)
