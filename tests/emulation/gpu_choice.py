"""What tests of the backend "gpu" share: choosers with a clock of their own, and operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekd import Topology
from sparsekd.ops.dispatch import backends
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.ops.dispatch.gpu_chooser import Chooser, Measured
from sparsekd.ops.store import Store


def choose_with(
    patch: pytest.MonkeyPatch, clock_on: Callable[[torch.device], Any], path: Path | None = None
) -> Chooser:
    """Put a chooser with a clock in the place of the process's."""
    gpu = backends.module("gpu")
    made = Chooser(Store(path, Measured.of), clock_on)
    patch.setattr(gpu, "chooser", lambda: made)
    return made


def running(op: str, args: tuple[Any, ...]) -> str:
    return decide(op, args).backend


class Stopwatch:
    """Answer that a backend took a time, and count.

    Attributes:
        timed: what ran, in order.
    """

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = {"dense_cuda": 10.0, **milliseconds}
        self.timed: list[str] = []

    def __call__(self, device: torch.device) -> Callable[[partial], float]:
        return self.clock

    def clock(self, run: partial) -> float:
        run()
        parts = {"triton": "triton", "semi_structured": "semi_structured", "dense": "dense_cuda"}
        kinds = [name for part, name in parts.items() if part in run.func.__module__]
        name = kinds[0] if kinds else "cuda"
        self.timed.append(name)
        return self.milliseconds[name]


def operands(tile: tuple[int, int], dtype: torch.dtype) -> tuple[Topology, Tensor, Tensor]:
    grid = (
        torch.rand(64 // tile[0], 64 // tile[1], generator=torch.Generator().manual_seed(0)) < 0.4
    )
    mask = grid.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    topology = Topology.from_mask(mask)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(topology.nnz, generator=generator).to(dtype)
    return topology, values, torch.randn(5, 64, generator=generator).to(dtype)


def linear_args(tile: tuple[int, int] = (16, 16)) -> tuple[Any, ...]:
    topology, values, x = operands(tile, torch.float16)
    return x, values, topology.crow_indices, topology.col_indices, None, [64, 64]
