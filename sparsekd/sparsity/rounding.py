"""The one rule by which real densities become whole numbers of weights.

Every count of nonzeros in the package comes from here, so a model's total is exactly
`round((1 - sparsity) * N)` and never drifts by a weight per layer.
"""

from __future__ import annotations

from collections.abc import Mapping


def check_sparsity(sparsity: float) -> float:
    """Return `sparsity` as a float, or raise if it is no fraction.

    Raises:
        ValueError: if `sparsity` is outside [0, 1] or NaN.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity: expected a number in [0, 1], got {sparsity!r}")
    return float(sparsity)


def target_nnz(numel: int, sparsity: float) -> int:
    """Count the weights that stay when `numel` weights are made `sparsity` sparse.

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
    quotas: Mapping[str, float], capacities: Mapping[str, int], total: int
) -> dict[str, int]:
    """Turn real quotas into integers with an exact total: floors, then largest remainders.

    Each entry starts at the floor of its quota; the weights still missing go one each to the
    entries with the largest fractional part that have room, the earlier entry first on a tie.

    Args:
        quotas: real number of weights wanted per layer.
        capacities: number of weights each layer has.
        total: the sum of the result.

    Returns:
        The count of each layer, in the order of `quotas`, with `0 <= count <= capacity`.

    Raises:
        ValueError: if `total` is negative or exceeds the sum of the capacities.

    Source: largest-remainder (Hamilton) apportionment.

    Example:
        >>> apportion({"a": 1.4, "b": 2.6}, {"a": 3, "b": 3}, 4)
        {'a': 1, 'b': 3}
    """
    if not 0 <= total <= sum(capacities[name] for name in quotas):
        raise ValueError(
            f"total: expected 0 to {sum(capacities[name] for name in quotas)}, got {total}"
        )
    counts = {name: min(int(quota), capacities[name]) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    missing = total - sum(counts.values())
    while missing:  # one round suffices unless the quotas do not add up to the total
        step = 1 if missing > 0 else -1
        for name in by_remainder if step > 0 else reversed(by_remainder):
            if missing and 0 <= counts[name] + step <= capacities[name]:
                counts[name] += step
                missing -= step
    return counts
