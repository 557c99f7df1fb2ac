"""Masks of a layout: how many tiles each layer keeps, and which.

Every count of tiles in the package comes from `tile_counts` or from `rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparsekd.layouts import Layout, Tiling
from sparsekd.sparsity.distributions import layer_densities
from sparsekd.sparsity.masks import generator_for, random_mask, topk_mask
from sparsekd.sparsity.rounding import apportion, check_sparsity, nearest_prefix, target_nnz


def check_fixed_density(layout: Layout, sparsity: float) -> None:
    """Check a sparsity against layout "nm", which fixes the density of every layer at n/m.

    Args:
        layout: any; others than "nm" pass.
        sparsity: fraction of zeros over all layers.

    Raises:
        ValueError: `sparsity` is not 1 - n/m.
    """
    if layout.fixed_density is None:
        return
    zeros = 1 - layout.fixed_density
    if abs(check_sparsity(sparsity) - zeros) > 1e-9:
        raise ValueError(
            f"sparsity: layout {str(layout)!r} keeps {layout.n} of {layout.m} weights, "
            f"expected {zeros:g}, got {sparsity!r}"
        )


def tile_counts(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    distribution: str,
    layout: Layout,
) -> dict[str, int]:
    """Compute the number of tiles of each layer.

    Densities are those of `allocate`. The unit of a layer is a tile, for "fanin" a tile in each
    group of rows; where some tiles are ragged, each counts as the layer's mean tile. Units are
    rounded by `apportion`, so the total over all layers is within half of the smallest unit of
    `round((1 - sparsity) * N)` weights. A layer whose density is not 0 gets at least one unit.

    Args:
        shapes: weight shape per layer, output channels first.
        sparsity: fraction of zeros over all layers together.
        distribution: "uniform", "er" or "erk".
        layout: of the masks; "nm" fixes the same density in every layer, whatever the distribution.

    Returns:
        Number of tiles per layer; for "csr" and "nm" a tile is a weight.

    Raises:
        ValueError: if `sparsity` is outside [0, 1], or not that of "nm".
        UnsupportedError: if `distribution` is not known.

    Example:
        >>> tile_counts({"a": (64, 64, 3, 3), "b": (64, 3, 3, 3)}, 0.9, "erk", Layout("bcsr"))
        {'a': 10, 'b': 27}
    """
    check_fixed_density(layout, sparsity)
    if layout.fixed_density is not None:
        kept = {n: layout.runs(shape).areas().clamp(max=layout.n) for n, shape in shapes.items()}
        return {name: int(count.sum()) for name, count in kept.items()}
    densities = layer_densities(shapes, sparsity, distribution)
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    step = {name: _step(shape, layout) for name, shape in shapes.items()}
    units = {n: layout.tiling(shape).numel // max(step[n], 1) for n, shape in shapes.items()}
    kept_units = apportion(
        {name: densities[name] * units[name] for name in shapes},
        units,
        target_nnz(sum(numel.values()), sparsity),
        {name: Fraction(numel[name], max(units[name], 1)) for name in shapes},
        least=0 if layout.unstructured else 1,
    )
    return {name: kept_units[name] * step[name] for name in shapes}


def best_tiles(score: Tensor, layout: Layout, count: int) -> Tensor:
    """Select the tiles of largest score that form a valid mask of the layout.

    "fanin" and "nm" select the same number of tiles in each cell, a group of rows or a run of
    channels: scores are viewed as `[out, cells, tiles of a cell, taps]`, padded with -inf to whole
    cells, and sorted within each cell. Among equal scores the lower position is kept.

    Args:
        score: one number per tile, as `Layout.tiling` cuts the weight; without NaN.
        layout: "bcsr" keeps the `count` best, "fanin" the best of each group of rows, "nm" the
            best of each run.
        count: number of tiles, for "fanin" a multiple of the groups of rows; not read for "nm".

    Returns:
        Bool tensor of the shape of `score`.

    Raises:
        ValueError: if a score is NaN, or `count` exceeds the number of tiles.

    Example:
        >>> best_tiles(torch.tensor([[3.0, 1.0, 2.0], [9.0, 8.0, 7.0]]), Layout("fanin"), 2)
        tensor([[ True, False, False],
                [ True, False, False]])
    """
    if not layout.in_cells:
        return topk_mask(score, count)
    if score.isnan().any():
        raise ValueError("score: expected numbers, got NaN")
    out, inner, *kernel = score.shape
    cells, keep = layout.cells(score.shape), layout.n or count // max(out, 1)
    ends = score.new_full((out, -inner % (layout.m or 1), *kernel), -math.inf)
    whole = torch.cat([score, ends], 1)
    best = whole.reshape(cells).sort(dim=2, descending=True, stable=True).indices[:, :, :keep]
    kept = torch.zeros(cells, dtype=torch.bool, device=score.device).scatter_(2, best, True)
    return kept.view(whole.shape)[:, :inner].contiguous()


def random_tiles(
    shape: Sequence[int], layout: Layout, count: int, generator: torch.Generator
) -> Tensor:
    """Draw a random mask of a layout; all its masks are equally likely.

    Args:
        shape: of the weight.
        layout: of the mask.
        count: number of tiles, as `tile_counts` gives it.
        generator: CPU generator.

    Returns:
        Bool tensor of that shape.
    """
    tiling = layout.tiling(shape)
    if layout.in_cells:
        noise = torch.rand(tiling.grid, generator=generator, device="cpu")
        return tiling.expand(best_tiles(noise, layout, count))
    return tiling.expand(random_mask(tiling.grid, count, generator=generator))


def magnitude_tiles(weight: Tensor, layout: Layout, count: int) -> Tensor:
    """Keep the tiles of largest mean magnitude that form a valid mask of the layout.

    The mean rather than the sum, so that the smaller tiles at the ends can compete.

    Args:
        weight: of any device.
        layout: of the mask.
        count: number of tiles, as `tile_counts` gives it.

    Returns:
        Bool tensor of the weight's shape and device.

    Raises:
        ValueError: if the weight holds NaN.

    Example:
        >>> magnitude_tiles(torch.tensor([[1.0, -3.0, 0.0, 0.5, 2.0]]), Layout("nm"), 3)
        tensor([[ True,  True, False, False,  True]])
    """
    return layout.tiling(weight.shape).expand(best_tiles(tile_means(weight, layout), layout, count))


def tile_means(weight: Tensor, layout: Layout) -> Tensor:
    """Compute the mean magnitude of every tile, in float32 or better."""
    magnitude = weight.detach().abs()
    if magnitude.dtype in (torch.float16, torch.bfloat16):
        magnitude = magnitude.float()
    if layout.tile == (1, 1):
        return magnitude
    tiling = layout.tiling(weight.shape)
    return tiling.pool(magnitude) / tiling.areas(weight.device)


def layout_masks(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    distribution: str,
    layout: Layout,
    *,
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Make one mask of a layout per layer, random or by magnitude.

    Args:
        shapes: weight shape per layer.
        sparsity: fraction of zeros over all layers together.
        distribution: "uniform", "er" or "erk".
        layout: of every mask.
        seed: each layer draws from its own generator of `seed` and its name.
        weights: weight per layer; if given, the tiles of largest magnitude are kept.

    Returns:
        Bool mask per layer, with the tiles of `tile_counts`.

    Raises:
        ValueError, UnsupportedError: as `tile_counts`.

    Example:
        >>> masks = layout_masks({"fc": (40, 40)}, 0.75, "uniform", Layout("bcsr", block=8))
        >>> int(masks["fc"].sum())
        384
    """
    counts = tile_counts(shapes, sparsity, distribution, layout)
    if weights is None:
        return {
            name: random_tiles(shape, layout, counts[name], generator_for(seed, name))
            for name, shape in shapes.items()
        }
    return {name: magnitude_tiles(weights[name], layout, counts[name]) for name in shapes}


def global_layout_masks(
    scores: Mapping[str, Tensor], nnz: int, layout: Layout
) -> dict[str, Tensor]:
    """Keep the tiles of largest mean score over all layers together.

    "fanin" rounds each layer's share to the same number in all groups of rows; "nm" compares
    nothing between layers and keeps the best of each run.

    Args:
        scores: score per weight and layer, not negative; all of one device. A tile whose score is
            negative is never kept.
        nnz: number of weights over all layers; met as closely as whole tiles allow.
        layout: of the masks.

    Returns:
        Bool mask per layer.

    Raises:
        ValueError: if a score is NaN.

    Example:
        >>> scores = {"a": torch.ones(4, 4), "b": torch.full((4, 4), 2.0)}
        >>> masks = global_layout_masks(scores, 20, Layout("bcsr", block=2))
        >>> masks["a"].sum().item(), masks["b"].sum().item()
        (4, 16)
    """
    tilings = {name: layout.tiling(score.shape) for name, score in scores.items()}
    means = {n: tilings[n].pool(s) / tilings[n].areas(s.device) for n, s in scores.items()}
    count = dict.fromkeys(scores, 0)
    if layout.fixed_density is None:
        count = _largest_overall(means, tilings, nnz, layout)
    return {n: tilings[n].expand(best_tiles(means[n], layout, count[n])) for n in scores}


def _largest_overall(
    means: Mapping[str, Tensor], tilings: Mapping[str, Tiling], nnz: int, layout: Layout
) -> dict[str, int]:
    flat = torch.cat([mean.view(-1) for mean in means.values()])
    areas = torch.cat([tilings[n].areas(flat.device).view(-1) for n in means])
    if flat.isnan().any():
        raise ValueError("score: expected numbers, got NaN")
    order = flat.argsort(descending=True, stable=True)
    order = order[: int((flat >= 0).sum())]
    kept = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    kept[order[: nearest_prefix(areas[order], nnz)]] = True
    parts = kept.split([mean.numel() for mean in means.values()])
    count = {name: int(part.sum()) for name, part in zip(means, parts, strict=True)}
    step = {name: _step(tilings[name].shape, layout) for name in means}
    if max(step.values()) <= 1:
        return count
    able = {n: int((mean.flatten(1) >= 0).sum(1).amin()) for n, mean in means.items()}
    area = {n: Fraction(math.prod(t.shape), max(t.numel, 1)) for n, t in tilings.items()}
    units = apportion(
        {name: count[name] / step[name] for name in means},
        able,
        min(nnz, math.floor(sum(able[n] * step[n] * area[n] for n in means))),
        {name: area[name] * step[name] for name in means},
    )
    return {name: units[name] * step[name] for name in means}


def _step(shape: Sequence[int], layout: Layout) -> int:
    """Return the number of tiles that are added or removed together."""
    return layout.tiling(shape).grid[0] if layout.even else 1


def fan_in_masks(
    shapes: Mapping[str, Sequence[int]], nnz: Mapping[str, int], *, seed: int = 0
) -> dict[str, Tensor]:
    """Draw one mask per layer in which every row has the same number of ones.

    The number of a layer is `round(nnz / rows)`, at least one where `nnz` is not 0, so the layer's
    total is only near `nnz`.

    Args:
        shapes: weight shape per layer, output channels first.
        nnz: number of ones wanted per layer, as `allocate` gives it.
        seed: seed of all layers.

    Returns:
        Bool mask per layer.

    Source: Lasby et al., Dynamic Sparse Training with Structured Sparsity (arXiv 2305.02299).

    Example:
        >>> fan_in_masks({"fc": (3, 10)}, {"fc": 7})["fc"].sum(1)
        tensor([2, 2, 2])
    """
    layout, masks = Layout("fanin"), {}
    for name, shape in shapes.items():
        rows, cols = shape[0], math.prod(shape[1:])
        fan_in = min(cols, max(round(nnz[name] / max(rows, 1)), min(nnz[name], 1)))
        masks[name] = random_tiles(shape, layout, fan_in * rows, generator_for(seed, name))
    return masks
