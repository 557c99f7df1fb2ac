"""Growth without a stored dense gradient: its tiles, and the best positions over all of them.

The dense gradient of a layer is computed one tile at a time, into one buffer, from the operands of
its weight gradient. A selection reads each tile while it is there and keeps only the k best free
positions so far, so that the largest thing held is a tile, a quarter of most weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekd.ops.dispatch.decisions import function
from sparsekd.ops.gradient_tiles import tiles

Operands = tuple[Tensor, Tensor, list[Any]]
"""grad, x and what follows the structure in the schema of the weight-gradient op that took them."""

Block = tuple[int, int, Tensor]
"""First row, first column and entries of a rectangle of a weight seen as `[rows, cols]`."""


def gradient(operands: Sequence[Operands], earlier: Tensor | None = None) -> Iterator[Block]:
    """Yield a dense weight gradient tile by tile, in float32 or better.

    It is the sum over all operands, and over what `earlier` holds. Nothing larger than a tile is
    allocated: a rectangle is overwritten when the next one is asked for.

    Args:
        operands: of calls of one layer's weight-gradient op, at least one.
        earlier: a dense gradient `[rows, cols]` to add, or None.
    """
    dtype = torch.float32
    for grad, x, _ in operands:
        dtype = torch.promote_types(torch.promote_types(grad.dtype, x.dtype), dtype)
    operands = [(grad.to(dtype), x.to(dtype), geometry) for grad, x, geometry in operands]
    shape, *conv = operands[0][2]
    taps, cut = math.prod(shape[2:]), (conv[0], conv[-1]) if conv else ()
    buffer = operands[0][0].new_empty(0)
    for tile in tiles(shape, *cut):
        row, col, rows, cols = tile.row, tile.channel * taps, tile.rows, tile.channels * taps
        if buffer.numel() < rows * cols:
            buffer = buffer.new_empty(rows * cols)
        block = buffer[: rows * cols].view(rows, cols)
        if earlier is None:
            block.zero_()
        else:
            block.copy_(earlier[row : row + rows, col : col + cols])
        for grad, x, geometry in operands:
            if grad.numel() == 0:
                continue  # an empty batch
            op = "conv2d_wgrad_tile" if geometry[1:] else "linear_wgrad_tile"
            function(op, grad)(grad, x, block, tile, *geometry)
        yield row, col, block


def largest(
    blocks: Iterable[Block],
    crow: Tensor,
    col: Tensor,
    shape: tuple[int, int],
    k: int,
    *,
    magnitude: bool,
) -> Tensor:
    """Return the `k` best positions outside a structure, for scores that come in rectangles.

    The rectangles may come in any order and are read once; equal scores go to the lower position.

    Args:
        blocks: the scores.
        crow: where each row of the structure starts in `col`.
        col: the columns whose scores are never looked at.
        shape: rows and columns of the weight.
        k: how many, at most the number of free positions.
        magnitude: rank by absolute value.

    Returns:
        int64 `[k]` positions in the flat weight, ascending.

    Raises:
        ValueError: the score of a free position is NaN.
        ShapeError: fewer than `k` positions are free.
    """
    best: Any = None
    for row, column, scores in blocks:
        if best is None:
            best = function("LargestK", scores)(crow, col, *shape, k, scores.dtype)
        best.offer(scores, row, column, magnitude)
    return crow.new_empty(0, dtype=torch.int64) if best is None else best.positions()


def grow_topk(score: Tensor, crow: Tensor, col: Tensor, k: int) -> Tensor:
    """Return the `k` best positions outside a structure, for scores in one tensor."""
    rows = crow.shape[0] - 1
    cols = score.numel() // max(rows, 1)
    blocks = [(0, 0, score.reshape(rows, cols))]
    return largest(blocks, crow, col, (rows, cols), k, magnitude=False)
