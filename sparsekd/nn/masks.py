"""The mask that a new module starts with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.layouts import Layout
from sparsekd.sparsity import (
    generator_for,
    magnitude_mask,
    magnitude_tiles,
    outputs_first,
    random_mask,
    random_tiles,
    target_nnz,
    tile_counts,
)


def initial_mask(
    shape: Sequence[int], mask: Tensor | None, sparsity: float, seed: int, layout: Layout
) -> tuple[Tensor, torch.Generator]:
    """Return the mask of a new module and the generator that goes on to draw its values."""
    generator = generator_for(seed)
    if mask is None and layout.unstructured:
        nnz = target_nnz(torch.Size(shape).numel(), sparsity)
        return random_mask(shape, nnz, generator=generator), generator
    if mask is None:
        count = tile_counts({"": shape}, sparsity, "uniform", layout)[""]
        return random_tiles(shape, layout, count, generator), generator
    if tuple(mask.shape) != tuple(shape):
        raise ShapeError(f"mask: expected shape {list(shape)}, got {list(mask.shape)}")
    return mask, generator


def dense_mask(
    dense: nn.Module, mask: Tensor | None, sparsity: float | None, layout: Layout
) -> Tensor:
    """Return the given mask, or that of the largest weights; its rows are the outputs."""
    weight: Any = dense.weight
    if nn.parameter.is_lazy(weight) or not weight.is_floating_point():
        raise UnsupportedError(
            f"dense: expected an initialised floating-point weight, got {type(weight).__name__} of "
            f"dtype {weight.dtype}"
        )
    if (mask is None) == (sparsity is None):
        raise ValueError("mask, sparsity: expected exactly one of them")
    if mask is not None:
        if mask.shape != weight.shape:
            raise ShapeError(f"mask: expected shape {list(weight.shape)}, got {list(mask.shape)}")
        return outputs_first(dense, mask)
    weight = outputs_first(dense, weight)
    assert sparsity is not None
    if layout.unstructured:
        return magnitude_mask(weight, target_nnz(weight.numel(), sparsity))
    count = tile_counts({"": weight.shape}, sparsity, "uniform", layout)[""]
    return magnitude_tiles(weight, layout, count)
