"""Rounding of real densities to whole numbers of weights.

Every count of nonzeros in the package comes from here, so a model's total is exactly
`round((1 - sparsity) * N)` and never drifts by a weight per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


def check_sparsity(sparsity: float) -> float:
    """Check that `sparsity` is a fraction, and return it as a float.

    Raises:
        ValueError: if `sparsity` is outside [0, 1] or NaN.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity: expected a number in [0, 1], got {sparsity!r}")
    return float(sparsity)


def target_nnz(numel: int, sparsity: float) -> int:
    """Count the nonzeros of `numel` weights at a given sparsity.

    Args:
        numel: number of weights, zeros included.
        sparsity: fraction of them that is zero.

    Returns:
        `round((1 - sparsity) * numel)`.

    Raises:
        ValueError: if `sparsity` is outside [0, 1].

    Example:
        >>> target_nnz(1000, 0.95)
        50
    """
    return round((1.0 - check_sparsity(sparsity)) * numel)


def apportion(
    quotas: Mapping[str, float],
    capacities: Mapping[str, int],
    total: int,
    sizes: Mapping[str, Fraction | int] | None = None,
    least: int = 0,
) -> dict[str, int]:
    """Turn real quotas into integers with an exact total: floors, then largest remainders.

    Each entry starts at the floor of its quota; the units still missing go one each to the
    entries with the largest fractional part that have room, the earlier entry first on a tie.

    With `sizes` a unit of a layer counts several weights, and the total may be out of reach: units
    are then added or removed as long as that brings the sum closer. It ends up off by at most half
    of the smallest unit that could still be moved.

    Args:
        quotas: real number of units wanted per layer.
        capacities: number of units each layer has.
        total: the sum of the result, in weights.
        sizes: weights per unit, for each layer; None for 1.
        least: units of an entry whose quota is not 0, as far as its capacity goes.

    Returns:
        The count of each layer, in the order of `quotas`, with `0 <= count <= capacity`.

    Raises:
        ValueError: if `total` is negative or exceeds the sum of the capacities.

    Source: largest-remainder (Hamilton) apportionment.

    Example:
        >>> apportion({"a": 1.4, "b": 2.6}, {"a": 3, "b": 3}, 4)
        {'a': 1, 'b': 3}
        >>> apportion({"a": 1.4, "b": 2.6}, {"a": 3, "b": 3}, 90, {"a": 16, "b": 24})
        {'a': 1, 'b': 3}
    """
    weights: Mapping[str, Any] = dict.fromkeys(quotas, 1) if sizes is None else sizes
    room = sum(capacities[name] * weights[name] for name in quotas)
    if not 0 <= total <= room:
        raise ValueError(f"total: expected 0 to {room}, got {total}")
    floor = {name: min(least, capacities[name]) if quotas[name] > 0 else 0 for name in quotas}
    counts = {n: max(floor[n], min(int(quota), capacities[n])) for n, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    missing = total - sum(counts[name] * weights[name] for name in quotas)
    moved = True
    while missing and moved:  # one round suffices unless the quotas do not add up to the total
        moved, step = False, 1 if missing > 0 else -1
        for name in by_remainder if step > 0 else reversed(by_remainder):
            nearer = weights[name] < 2 * step * missing
            if nearer and floor[name] <= counts[name] + step <= capacities[name]:
                counts[name] += step
                missing -= step * weights[name]
                moved = True
    return counts


def nearest_prefix(areas: Tensor, total: int) -> int:
    """Count the entries from the front whose sum is closest to `total`; fewer on a tie.

    Args:
        areas: positive integers.
        total: the sum wanted.

    Shape:
        areas [n]

    Example:
        >>> nearest_prefix(torch.tensor([48, 48, 256]), 100)
        2
    """
    sums = torch.nn.functional.pad(areas.cumsum(0), (1, 0))
    return int((sums - total).abs().argmin())
