"""What both GPU backends keep while growth looks for the best positions outside a structure."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.ops.gpu.structure import find_structure


class FreePositions:
    """The k best positions outside a structure so far, as keys that sort like their scores.

    The low half of a key is the complement of its position: of equal scores, the lower position has
    the larger key. A backend makes the keys of each rectangle of scores that it is offered.

    Args:
        crow, col: of the structure.
        rows, cols: of the weight.
        k: how many positions are wanted.
        empty: key that stands for no position.
        nan: where the backend notes that a score was NaN, false or zero at first.

    Raises:
        ShapeError: fewer than `k` positions are free.
    """

    def __init__(
        self, crow: Tensor, col: Tensor, rows: int, cols: int, k: int, *, empty: int, nan: Tensor
    ) -> None:
        structure = find_structure(crow, col, rows, cols)
        free = rows * cols - col.shape[0]
        if not 0 <= k <= free:
            raise ShapeError(f"k: expected 0 <= k <= {free} free positions, got {k}")
        self._cols, self._taken = cols, (structure.rows(), structure.cols())
        self._best = torch.full((k,), empty, dtype=torch.int64, device=col.device)
        self._empty, self._nan = empty, nan
        self._lock = threading.Lock()  # one offer after the other

    def _check_device(self, scores: Tensor) -> None:
        if scores.device != self._best.device:
            raise UnsupportedError(
                f"score: expected device {self._best.device}, got {scores.device}"
            )

    def positions(self) -> Tensor:
        """Return the positions, ascending; raises ValueError if a score was NaN."""
        if self._nan.item():
            raise ValueError("score: NaN among the positions that could grow")
        found = self._best[self._best != self._empty]
        return (~found & 0xFFFFFFFF).sort().values
