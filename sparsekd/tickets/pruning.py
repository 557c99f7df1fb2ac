"""Global magnitude pruning with exact counts; networks are only read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor, nn

from sparsekd.dst.registry import Layers
from sparsekd.layouts import Layout, check_layouts
from sparsekd.nn import SparseConv1d, SparseConv2d, SparseLinear, SparseModule
from sparsekd.sparsity import (
    check_fixed_density,
    global_layout_masks,
    global_masks,
    with_layers,
)

Masks = dict[str, Tensor]

PRUNE_RATE = 0.2
"""Fraction of the remaining weights that a round of iterative pruning takes."""


def maskable(
    model: nn.Module, layers: Layers = "convolutions", skip: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Find the layers of a model, dense or sparse, whose weights get masks.

    Args:
        model: any network.
        layers: "convolutions", or "all" for linear layers too.
        skip: names of layers that stay dense, or fnmatch patterns of them.

    Returns:
        Modules by name.

    Raises:
        ValueError: a pattern of `skip` matches no convolution or linear layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
        >>> list(maskable(model)), list(maskable(model, "all"))
        (['0'], ['0', '2'])
    """
    convolutions = nn.Conv2d, SparseConv2d, nn.Conv1d, SparseConv1d
    linear = nn.Linear, SparseLinear
    modules = with_layers(model).named_modules()
    found = {n: m for n, m in modules if isinstance(m, (*convolutions, *linear))}
    skipped: set[str] = set()
    for pattern in skip:
        matches = {name for name in found if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"skip: {pattern!r} matches none of {', '.join(found) or 'no layer'}")
        skipped |= matches
    kinds = (*convolutions, *linear) if layers == "all" else convolutions
    return {n: m for n, m in found.items() if n not in skipped and isinstance(m, kinds)}


def prune(
    model: nn.Module,
    sparsity: float,
    *,
    allow_collapse: bool = False,
    layers: Layers = "convolutions",
    skip: Iterable[str] = (),
    layout: str | Layout = "csr",
) -> Masks:
    """Mask the smallest weights of all convolutions at once, exactly ``floor(sparsity * N)``.

    N counts the weights of every convolution, first layer and shortcuts included; linear layers,
    BatchNorm and biases stay dense. Among equal magnitudes the lower position is kept. The model
    is only read.

    Args:
        model: the trained network.
        sparsity: fraction to prune, in [0, 1).
        allow_collapse: accept a layer that loses every weight.
        layers: that get masks, as `maskable` finds them.
        skip: layers that stay dense, as in `maskable`.
        layout: of the masks. If it has tiles, those of smallest mean magnitude are pruned, and the
            count is met as closely as whole tiles allow.

    Returns:
        Module name -> bool mask of its weight, True where the weight stays.

    Raises:
        ValueError: sparsity is out of range or not that of the layout, the model has no
            convolution, a weight is not finite, or a layer collapsed.

    Source: arXiv 2101.03255 prunes convolutions once, globally, by final magnitude. Its threshold
        rule removes ties as well; this one is exact.

    Example:
        >>> masks = prune(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)), 0.9)
        >>> sum(int(mask.sum()) for mask in masks.values())
        65
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a number in [0, 1), got {sparsity}")
    layout = Layout.parse(layout)
    check_fixed_density(layout, sparsity)
    weights, active = _weights(model, layers, skip)
    everything = {name: torch.ones_like(mask) for name, mask in active.items()}
    drop = math.floor(_as_written(sparsity) * sum(w.numel() for w in weights.values()))
    return _drop_smallest(weights, everything, drop, allow_collapse, layout)


def prune_further(
    model: nn.Module,
    rate: float = PRUNE_RATE,
    *,
    masks: Mapping[str, Tensor] | None = None,
    allow_collapse: bool = False,
    layers: Layers = "convolutions",
    skip: Iterable[str] = (),
    layout: str | Layout = "csr",
) -> Masks:
    """Mask exactly ``ceil(rate * remaining)`` more weights: one round of iterative pruning.

    Args:
        model: the network trained under the current masks, dense or sparse; only read.
        rate: fraction of the remaining convolution weights to prune, in [0, 1).
        masks: the current masks of a dense model; a sparse model carries its own.
        allow_collapse: accept a layer that loses every weight.
        layers: that get masks, as `maskable` finds them.
        skip: layers that stay dense, as in `maskable`.
        layout: of the current masks and the new ones, as in `prune`.

    Returns:
        Module name -> bool mask, each a subset of the current one.

    Raises:
        ValueError: as `prune`, or `masks` does not fit the model.
        UnsupportedError: `layout` is "nm", whose density is fixed.

    Source: Frankle and Carbin, The Lottery Ticket Hypothesis (2019), section 2 and appendix on
        global pruning.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
        >>> masks = prune_further(model, 0.2, masks=prune_further(model, 0.2))
        >>> sum(int(mask.sum()) for mask in masks.values())  # 648 -> 518 -> 414
        414
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate: expected a number in [0, 1), got {rate}")
    layout = Layout.parse(layout)
    check_layouts([("masks", layout)], ("csr", "bcsr", "fanin"), "pruning in rounds")
    weights, active = _weights(model, layers, skip)
    for name, mask in (masks or {}).items():
        if name not in active or mask.shape != active[name].shape:
            raise ValueError(f"masks: {name!r} does not fit a convolution of the model")
        active[name] = active[name] & mask
    remaining = sum(int(mask.sum()) for mask in active.values())
    drop = math.ceil(_as_written(rate) * remaining)
    return _drop_smallest(weights, active, drop, allow_collapse, layout)


def collapsed_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """List the layers that lost every weight.

    Args:
        masks: module name -> bool mask.

    Returns:
        Their names.

    Example:
        >>> collapsed_layers({"conv": torch.zeros(4, 1, 3, 3, dtype=torch.bool)})
        ['conv']
    """
    return [name for name, mask in masks.items() if not mask.any()]


def _as_written(fraction: float) -> Fraction:
    # 0.29 * 100 is 28.999999999999996 in floating point, and its floor one too low.
    return Fraction(repr(float(fraction)))


def _weights(
    model: nn.Module, layers: Layers, skip: Iterable[str]
) -> tuple[dict[str, Tensor], Masks]:
    """Return the dense weight of every layer that gets a mask, and its mask of stored positions."""
    weights: dict[str, Tensor] = {}
    active: Masks = {}
    for name, module in maskable(model, layers, skip).items():
        if isinstance(module, SparseModule):
            weights[name] = module.dense_weight().detach()
            active[name] = module.topology.mask()
        else:
            weights[name] = cast(Tensor, module.weight).detach()
            active[name] = torch.ones_like(weights[name], dtype=torch.bool)
    if not weights:
        kind = "convolution" if layers == "convolutions" else "convolution or linear layer"
        raise ValueError(f"model: expected at least one {kind} to mask, found none")
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"model: the weight of {name!r} is not finite")
    return weights, active


def _drop_smallest(
    weights: Mapping[str, Tensor], active: Masks, drop: int, allow_collapse: bool, layout: Layout
) -> Masks:
    # Pruned positions score below every magnitude, so the kept set stays inside the active one.
    scores = {name: weights[name].abs().masked_fill(~active[name], -1.0) for name in active}
    nnz = sum(int(mask.sum()) for mask in active.values()) - drop
    if layout.unstructured:
        masks = global_masks(scores, nnz)
    else:
        masks = global_layout_masks(scores, nnz, layout)
    if not allow_collapse and (empty := collapsed_layers(masks)):
        raise ValueError(
            f"sparsity: every weight of {', '.join(empty)} would be pruned; "
            "choose a lower sparsity, or allow_collapse=True"
        )
    return masks
