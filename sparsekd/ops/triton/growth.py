"""The best positions outside a structure, of scores that come in rectangles."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekd.errors import UnsupportedError
from sparsekd.kernels import grow
from sparsekd.ops.gpu.growth import FreePositions


class LargestK(FreePositions):
    """The k best positions outside a structure, over rectangles of scores."""

    def __init__(
        self, crow: Tensor, col: Tensor, rows: int, cols: int, k: int, dtype: torch.dtype
    ) -> None:
        nan = torch.zeros((), dtype=torch.bool, device=col.device)
        super().__init__(crow, col, rows, cols, k, empty=grow.TAKEN, nan=nan)
        if rows * cols > 1 << 32:
            raise UnsupportedError(
                f"score: backend 'triton' supports weights of up to 2^32 positions to grow from, "
                f"got {rows} x {cols}"
            )

    def offer(self, scores: Tensor, row: int, col: int, magnitude: bool) -> None:
        self._check_device(scores)
        if not scores.numel():
            return
        keys = self._best.new_empty(len(self._best) + scores.numel())
        with torch.cuda.device_of(scores):
            self._write_keys(scores.contiguous(), keys[len(self._best) :], row, col, magnitude)
        with self._lock:
            keys[: len(self._best)] = self._best
            self._nan |= (keys >= grow.NAN).any()
            self._best = keys.topk(len(self._best), sorted=False).values

    def _write_keys(
        self, scores: Tensor, keys: Tensor, row: int, col: int, magnitude: bool
    ) -> None:
        (rows, cols), nnz = scores.shape, self._taken[0].shape[0]
        grow.score_keys[(-(-keys.numel() // grow.BLOCK),)](
            scores, keys, keys.numel(), row, col, cols, self._cols,
            MAGNITUDE=magnitude, BLOCK=grow.BLOCK,
        )  # fmt: skip
        if nnz:
            grow.exclude_taken[(-(-nnz // grow.BLOCK),)](
                *self._taken, keys, nnz, row, rows, col, cols,
                TAKEN=grow.TAKEN, BLOCK=grow.BLOCK,
            )  # fmt: skip
