"""How much of a model is sparse: requested, converted and left dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sparsekd.nn import sparse_modules
from sparsekd.nn.stored import parameter_count
from sparsekd.sparsity.survey import DensePart, dense_parts

_PRINTED = 12


@dataclass(frozen=True)
class Coverage:
    """How sparse a model is, in its converted layers and as a whole; print it for a summary.

    Args:
        asked: sparsity that `sparsify` or a pruning method was asked for over the converted
            weights; None where masks were given, or layers built by hand.
        nnz: weights that the sparse layers store.
        numel: weights that these layers have, zeros included.
        total: parameters of the whole model, zeros included.
        dense: the parameters of two or more dimensions that are stored densely, largest first.
    """

    asked: float | None
    nnz: int
    numel: int
    total: int
    dense: tuple[DensePart, ...]

    @property
    def converted(self) -> float:
        """Sparsity of the converted weights, 0 without any."""
        return (self.numel - self.nnz) / self.numel if self.numel else 0.0

    @property
    def whole(self) -> float:
        """Sparsity of the whole model: the zeros among all its parameters."""
        return (self.numel - self.nnz) / self.total if self.total else 0.0

    @property
    def line(self) -> str:
        """The sparsities, in a sentence."""
        asked = "" if self.asked is None else f"asked for {self.asked:.4g}: "
        part = self.numel / self.total if self.total else 0.0
        return (
            f"sparsity: {asked}{self.converted:.4g} over the converted weights "
            f"({part:.3g} of the parameters), {self.whole:.4g} over the whole model"
        )

    def __str__(self) -> str:
        lines = [self.line]
        if self.dense:
            lines.append("dense parameters, and their share of all:")
        lines += [f"  {part.name}: {part.share:.2%}" for part in self.dense[:_PRINTED]]
        if rest := self.dense[_PRINTED:]:
            lines.append(f"  and {len(rest)} more: {sum(part.share for part in rest):.2%}")
        return "\n".join(lines)


def coverage(model: nn.Module) -> Coverage:
    """Return how much of a model is sparse.

    Args:
        model: any module.

    Returns:
        Sparsities and what stayed dense; printing it gives a summary.

    Example:
        >>> import sparsekd as skd
        >>> model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Embedding(100, 100))
        >>> found = coverage(skd.sparsify(model, sparsity=0.9, skip="1"))
        >>> found.asked, found.converted, found.whole, found.dense[0].name
        (0.9, 0.9, 0.45, '1.weight')
    """
    layers = [module for _, module in sparse_modules(model)]
    numel = [math.prod(layer.weight_shape) for layer in layers]
    total = parameter_count(model)
    return Coverage(
        asked=_mean([layer.asked_sparsity for layer in layers], numel),
        nnz=sum(layer.values.numel() for layer in layers),
        numel=sum(numel),
        total=total,
        dense=tuple(sorted(dense_parts(model, total), key=lambda part: -part.share)),
    )


def _mean(asked: Sequence[float | None], numel: Sequence[int]) -> float | None:
    """Return the sparsity that layers were asked for together, None if it is unknown of one."""
    known = [sparsity for sparsity in asked if sparsity is not None]
    if len(known) < len(asked) or not known:
        return None
    if len(set(known)) == 1:  # of one request: that number, without rounding
        return known[0]
    return sum(a * n for a, n in zip(known, numel, strict=True)) / max(sum(numel), 1)
