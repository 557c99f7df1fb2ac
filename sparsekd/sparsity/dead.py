"""Layers and output channels that have no weight left."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

_NAMED = 8


def warn_of_dead(
    alive: Mapping[str, Tensor], known: set[str] | None = None, *, stacklevel: int = 1
) -> None:
    """Warn about layers that have no weight left, and about output channels that have none.

    Args:
        alive: layer name -> bool `[rows]`, True for rows of the weight that have a nonzero.
        known: what earlier calls warned about, which is not repeated; this call adds to it.
        stacklevel: as in `warnings.warn`, counted from the caller.

    Example:
        >>> import torch
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn_of_dead({"conv": torch.tensor([True, False, False])})
        >>> "conv (2 of 3)" in str(caught[0].message)
        True
    """
    empty, partly = [], {}
    for name, rows in alive.items():
        living = int(rows.sum())
        if not living and len(rows):
            empty.append(name)
        elif living < len(rows):
            partly[name] = f"{name or 'the layer'} ({len(rows) - living} of {len(rows)})"
    if known is not None:
        empty = [name for name in empty if f"{name}: empty" not in known]
        partly = {name: text for name, text in partly.items() if name not in known}
        known.update(partly, *([name, f"{name}: empty"] for name in empty))
    if empty:
        text = f"no weight is left in {_some(empty)}: nothing passes through"
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel + 1)
    if partly:
        text = (
            "no weight is left in some output channels, which give only their bias, if any: "
            f"{_some(list(partly.values()))}"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel + 1)


def living_rows(mask: Tensor) -> Tensor:
    """Mark the rows of a mask that have a nonzero.

    Args:
        mask: bool, of the weight's shape.

    Returns:
        Bool `[rows]`.

    Example:
        >>> import torch
        >>> living_rows(torch.eye(3, 2, dtype=torch.bool))
        tensor([ True,  True, False])
    """
    return mask.flatten(1).any(1)


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
