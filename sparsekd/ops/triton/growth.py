"""The best positions outside a structure, of scores that come in rectangles."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.kernels import grow
from sparsekd.ops.gpu.structure import find_structure


class LargestK:
    """The k best positions outside a structure, over rectangles of scores."""

    def __init__(
        self, crow: Tensor, col: Tensor, rows: int, cols: int, k: int, dtype: torch.dtype
    ) -> None:
        structure = find_structure(crow, col, rows, cols)
        free = rows * cols - col.shape[0]
        if not 0 <= k <= free:
            raise ShapeError(f"k: expected 0 <= k <= {free} free positions, got {k}")
        if rows * cols > 1 << 32:
            raise UnsupportedError(
                f"score: backend 'triton' supports weights of up to 2^32 positions to grow from, "
                f"got {rows} x {cols}"
            )
        self._cols, self._taken = cols, (structure.rows(), structure.cols())
        self._best = torch.full((k,), grow.TAKEN, dtype=torch.int64, device=col.device)
        self._nan = torch.zeros((), dtype=torch.bool, device=col.device)
        self._lock = threading.Lock()  # one offer after the other

    def offer(self, scores: Tensor, row: int, col: int, magnitude: bool) -> None:
        if scores.device != self._best.device:
            raise UnsupportedError(
                f"score: expected device {self._best.device}, got {scores.device}"
            )
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

    def positions(self) -> Tensor:
        if self._nan.item():
            raise ValueError("score: NaN among the positions that could grow")
        found = self._best[self._best != grow.TAKEN]
        return (~found & 0xFFFFFFFF).sort().values
