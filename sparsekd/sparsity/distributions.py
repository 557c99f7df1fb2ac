"""How many nonzeros each layer gets: uniform, Erdős-Rényi (ER) and ER-kernel (ERK).

Densities are computed in reals and rounded once, by `rounding.apportion`; the total over all
layers is exactly `round((1 - sparsity) * N)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparsekd.errors import UnsupportedError
from sparsekd.sparsity.rounding import apportion, check_sparsity, target_nnz

DISTRIBUTIONS = ("uniform", "er", "erk")


class ErdosRenyi(NamedTuple):
    """An Erdős-Rényi allocation: a layer has density `epsilon * raw`, or 1 if it is in `dense`."""

    epsilon: float
    dense: frozenset[str]
    densities: dict[str, float]


def _raw_density(shape: Sequence[int], kernel: bool) -> float:
    """Return the density of a layer up to the common factor epsilon."""
    sizes = tuple(shape) if kernel else tuple(shape[:2])
    return sum(sizes) / math.prod(sizes)


def erdos_renyi(
    shapes: Mapping[str, Sequence[int]], sparsity: float, *, kernel: bool = True
) -> ErdosRenyi:
    """Set densities by layer size, so that small layers stay denser than large ones.

    A layer's density is proportional to the sum of its sizes over their product, counting the
    kernel's height and width with `kernel=True` (ERK) and only the channels without (ER). Layers
    whose density would exceed 1 become dense, and the others share the weights that are left.

    Args:
        shapes: weight shape per layer, output channels first.
        sparsity: fraction of zeros over all layers together.
        kernel: count the kernel's sizes (ERK). It makes no difference to linear layers.

    Returns:
        The factor `epsilon`, the names of the layers that are `dense`, and all `densities`.

    Raises:
        ValueError: if `sparsity` is outside [0, 1].

    Source: Evci et al., Rigging the Lottery, section 3 (1); Mocanu et al., Scalable training of
    artificial neural networks with adaptive sparse connectivity (SET), for ER.

    Example:
        >>> found = erdos_renyi({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}, 0.9)
        >>> sorted(found.dense), round(found.densities["fc1"], 4)
        (['fc3'], 0.0796)
    """
    density = 1.0 - check_sparsity(sparsity)
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: _raw_density(shape, kernel) for name, shape in shapes.items() if numel[name]}
    budget = density * sum(numel.values())
    dense: set[str] = set()
    epsilon = 0.0
    while open_layers := [name for name in raw if name not in dense]:
        rest = budget - sum(numel[name] for name in dense)
        epsilon = rest / math.fsum(raw[name] * numel[name] for name in open_layers)
        largest = max(raw[name] for name in open_layers)
        if largest * epsilon <= 1.0:
            break
        dense |= {name for name in open_layers if raw[name] == largest}
    densities = {name: 1.0 if name in dense else epsilon * raw.get(name, 0.0) for name in shapes}
    return ErdosRenyi(epsilon, frozenset(dense), densities)


def layer_densities(
    shapes: Mapping[str, Sequence[int]], sparsity: float, distribution: str
) -> dict[str, float]:
    """Return the density of every layer before rounding; arguments and errors as in `allocate`."""
    if distribution == "uniform":
        return dict.fromkeys(shapes, 1.0 - check_sparsity(sparsity))
    if distribution in ("er", "erk"):
        return erdos_renyi(shapes, sparsity, kernel=distribution == "erk").densities
    raise UnsupportedError(
        f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}"
    )


def allocate(
    shapes: Mapping[str, Sequence[int]], sparsity: float, distribution: str = "erk"
) -> dict[str, int]:
    """Compute the number of nonzeros of each layer.

    "uniform" gives all layers the same density; leave a layer out of `shapes` to keep it dense,
    as RigL's uniform setting does with the first one. "er" and "erk" follow `erdos_renyi`.

    Args:
        shapes: weight shape per layer, output channels first.
        sparsity: fraction of zeros over all layers together.
        distribution: "uniform", "er" or "erk".

    Returns:
        Number of nonzeros per layer; they add up to `round((1 - sparsity) * N)` exactly.

    Raises:
        ValueError: if `sparsity` is outside [0, 1].
        UnsupportedError: if `distribution` is not known.

    Source: Evci et al., Rigging the Lottery, section 3 (1).

    Example:
        >>> allocate({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}, 0.9)
        {'fc1': 18714, 'fc2': 6906, 'fc3': 1000}
    """
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    densities = layer_densities(shapes, sparsity, distribution)
    quotas = {name: densities[name] * numel[name] for name in shapes}
    return apportion(quotas, numel, target_nnz(sum(numel.values()), sparsity))
