"""Competitors of a benchmark: ways to compute a layer or a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Key = tuple[str, float | None]  # competitor and sparsity
Problem = TypeVar("Problem")
Run = TypeVar("Run")


def runs_anywhere(case: Any) -> str | None:
    """Return None: nothing is missing for any case."""
    return None


@dataclass(frozen=True)
class Competitor(Generic[Problem, Run]):
    """One way to compute a layer or a training step.

    Args:
        name: in rows and options.
        label: in tables and figures.
        build: prepares a problem to be run.
        missing: the reason why it cannot run a case here, None if it can.
        sparse: whether its time depends on the sparsity; a dense one is timed once for all.
        dtype: in which it multiplies.
        least: lowest sparsity it is tried at.
        network: the only network it is timed on; None for all.
    """

    name: str
    label: str
    build: Callable[[Problem], Run]
    missing: Callable[[Any], str | None] = runs_anywhere
    sparse: bool = False
    dtype: torch.dtype = torch.float32
    least: float = 0.0
    network: str | None = None

    def obstacle(self, case: Any, sparsity: float) -> str | None:
        """Return why it is not timed on a case at a sparsity, None if it is."""
        if self.sparse and sparsity < self.least:
            return f"timed from {self.least:.0%} sparsity on"
        return self.missing(case)


Field = Mapping[str, Competitor[Any, Any]]  # by name, in the order of tables


def by_name(*competitors: Competitor[Problem, Run]) -> dict[str, Competitor[Problem, Run]]:
    """Return a table of competitors, in this order."""
    return {competitor.name: competitor for competitor in competitors}


def pairs(competitors: Field, sparsities: Sequence[float]) -> list[Key]:
    """Pair every sparse competitor with every sparsity; a dense one runs once, at none.

    Example:
        >>> from sparsekd.bench.layers import LAYER_COMPETITORS
        >>> two = {name: LAYER_COMPETITORS[name] for name in ("dense_contiguous", "sparsekd")}
        >>> pairs(two, (0.8, 0.9))
        [('dense_contiguous', None), ('sparsekd', 0.8), ('sparsekd', 0.9)]
    """
    dense: list[Key] = [(name, None) for name, entry in competitors.items() if not entry.sparse]
    return dense + [(name, s) for s in sparsities for name, e in competitors.items() if e.sparse]


def is_ours(name: str) -> bool:
    """Return whether a competitor of this name runs kernels of sparsekd.

    Example:
        >>> is_ours("sparsekd_contiguous"), is_ours("dense_bf16")
        (True, False)
    """
    return name.startswith("sparsekd")
