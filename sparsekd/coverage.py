"""How much of a model is sparse: what was asked for, what was converted, what stayed dense."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

NAMED_FROM = 0.01
"""Share of a model's weights from which on a parameter that stays dense is worth naming."""

_PRINTED = 12


class DensePart(NamedTuple):
    """A parameter of two or more dimensions that is stored densely.

    `names` are all it has in the model, `share` is its part of all weights, zeros included, and
    `holder` the module that has it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    share: float
    holder: nn.Module

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


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
    """Say how much of a model is sparse.

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
    layers = _sparse_layers(model)
    numel = [math.prod(layer.weight_shape) for layer in layers]
    asked = [getattr(layer, "asked_sparsity", None) for layer in layers]
    stored = sum(layer.values.numel() for layer in layers)
    parts = sorted(dense_parts(model), key=lambda part: -part.share)
    return Coverage(_mean(asked, numel), stored, sum(numel), _total(model), tuple(parts))


def dense_parts(model: nn.Module) -> Iterator[DensePart]:
    """Yield the parameters of two or more dimensions of a model, each once, in its order.

    Args:
        model: any module; weights of sparse layers, which are stored in one dimension, do not
            occur.

    Example:
        >>> [part.name for part in dense_parts(nn.GRU(4, 4, bias=False))]
        ['weight_ih_l0', 'weight_hh_l0']
    """
    total = max(_total(model), 1)
    names: dict[Tensor, list[str]] = defaultdict(list)
    holders: dict[Tensor, nn.Module] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not is_lazy(parameter) and parameter.ndim > 1:
                names[parameter].append(f"{prefix}.{leaf}" if prefix else leaf)
                holders.setdefault(parameter, module)
    for parameter, aliases in names.items():
        share = parameter.numel() / total
        yield DensePart(tuple(aliases), tuple(parameter.shape), share, holders[parameter])


def _mean(asked: Sequence[float | None], numel: Sequence[int]) -> float | None:
    """Return the sparsity that layers were asked for together, None if it is unknown of one."""
    known = [sparsity for sparsity in asked if sparsity is not None]
    if len(known) < len(asked) or not known:
        return None
    if len(set(known)) == 1:  # of one request: that number, without rounding
        return known[0]
    return sum(a * n for a, n in zip(known, numel, strict=True)) / max(sum(numel), 1)


def _total(model: nn.Module) -> int:
    """Return the number of parameters, the zeros of sparse layers included."""
    sizes = {id(p): p.numel() for p in model.parameters() if not is_lazy(p)}
    sizes |= {id(m.values): math.prod(m.weight_shape) for m in _sparse_layers(model)}
    return sum(sizes.values())


def _sparse_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "weight_shape") and hasattr(m, "crow_indices")]
