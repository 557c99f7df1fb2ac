"""Masks of a layout: counts near the target, the largest tiles, one seed a layer."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekd import Layout
from sparsekd.errors import UnsupportedError
from sparsekd.sparsity import (
    apportion,
    fan_in_masks,
    global_layout_masks,
    global_masks,
    layout_masks,
    magnitude_mask,
    magnitude_tiles,
    tile_counts,
)

SHAPES = {"stem": (24, 3, 3, 3), "body": (40, 24, 3, 3), "point": (64, 40, 1, 1), "fc": (10, 64)}
TOTAL = sum(math.prod(shape) for shape in SHAPES.values())
TILED = [
    Layout("bcsr", block=4),
    Layout("bcsr"),
    Layout("fanin"),
    Layout("fanin", group=8, block=2),
]


def nonzeros(masks: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("layout", TILED, ids=str)
@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9])
def test_the_total_is_as_near_as_one_unit(layout, distribution, sparsity):
    masks = layout_masks(SHAPES, sparsity, distribution, layout)
    counts = tile_counts(SHAPES, sparsity, distribution, layout)
    for name, mask in masks.items():
        layout.check(mask)
        tiling = layout.tiling(mask.shape)
        assert int((tiling.pool(mask.int()) > 0).sum()) == counts[name] > 0
    # A tile counts as the mean of its layer; no single unit more or less would come nearer.
    miss = round((1 - sparsity) * TOTAL)
    units: dict[str, tuple[Fraction, int]] = {}
    for name, shape in SHAPES.items():
        tiling = layout.tiling(shape)
        step = tiling.grid[0] if layout.name == "fanin" else 1
        units[name] = (Fraction(math.prod(shape) * step, tiling.numel), step)
        miss -= counts[name] // step * units[name][0]
    for name, (unit, step) in units.items():
        tiles = layout.tiling(SHAPES[name]).numel
        assert counts[name] == tiles or abs(miss - unit) >= abs(miss)
        assert counts[name] == step or abs(miss + unit) >= abs(miss)
    assert sparsity > 0 or nonzeros(masks) == TOTAL


def test_whole_tiles_are_on_target_exactly():
    shapes = {"a": (64, 32, 3, 3), "b": (128, 64)}
    masks = layout_masks(shapes, 0.75, "uniform", Layout("bcsr"))
    assert nonzeros(masks) == round(0.25 * sum(math.prod(s) for s in shapes.values()))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8)])
def test_nm_keeps_n_of_m(n, m):
    layout = Layout("nm", n=n, m=m)
    masks = layout_masks(SHAPES, 1 - n / m, "uniform", layout)
    for name, mask in masks.items():
        layout.check(mask)
        assert int(mask.sum()) == tile_counts(SHAPES, 1 - n / m, "uniform", layout)[name]
    with pytest.raises(ValueError, match=f"sparsity: layout 'nm:{n}:{m}' keeps {n} of {m} weights"):
        tile_counts(SHAPES, 0.9, "uniform", layout)
    assert tile_counts(SHAPES, 1 - n / m, "erk", layout) == tile_counts(
        SHAPES, 1 - n / m, "uniform", layout
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 10**6))
def test_magnitude_keeps_the_largest_tiles(rows, channels, taps, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (rows, channels, 1, taps), generator=generator).double()
    for layout in (Layout("bcsr", block=2), Layout("fanin", group=2, block=3), Layout("nm")):
        sparsity = 0.5
        count = tile_counts({"": weight.shape}, sparsity, "uniform", layout)[""]
        mask = magnitude_tiles(weight, layout, count)
        layout.check(mask)
        tiling = layout.tiling(weight.shape)
        mean = tiling.pool(weight.abs()) / tiling.areas()
        kept = tiling.pool(mask.int()) > 0
        for cell in cells(layout, torch.arange(kept.numel()).view(kept.shape)):
            order = sorted(cell, key=lambda at: (-float(mean.view(-1)[at]), at))
            chosen = [at for at in cell if kept.view(-1)[at]]
            assert sorted(order[: len(chosen)]) == chosen


def cells(layout: Layout, numbers: torch.Tensor) -> list[list[int]]:
    """List the tiles that compete with each other."""
    if layout.name == "bcsr":
        return [numbers.view(-1).tolist()]
    if layout.name == "fanin":
        return numbers.flatten(1).tolist()
    runs = [part.movedim(1, -1).reshape(-1, part.shape[1]) for part in numbers.split(layout.m, 1)]
    return [run for part in runs for run in part.tolist()]


def test_a_layer_does_not_depend_on_the_others():
    layout = Layout("bcsr", block=4)
    alone = layout_masks({"body": SHAPES["body"]}, 0.8, "uniform", layout, seed=3)["body"]
    again = layout_masks({"x": (8, 8), "body": SHAPES["body"]}, 0.8, "uniform", layout, seed=3)
    assert torch.equal(alone, again["body"])
    other = layout_masks({"body": SHAPES["body"]}, 0.8, "uniform", layout, seed=4)["body"]
    assert not torch.equal(alone, other)


def test_blocks_of_one_are_plain_magnitude_pruning():
    weight = torch.randn(7, 9)
    one = Layout("bcsr", block=1)
    assert torch.equal(magnitude_tiles(weight, one, 20), magnitude_mask(weight, 20))
    scores = {"a": weight.abs(), "b": torch.rand(5, 5)}
    ours, plain = global_layout_masks(scores, 30, one), global_masks(scores, 30)
    assert all(torch.equal(ours[name], plain[name]) for name in scores)


def test_fan_in_masks_are_those_of_the_layout():
    drawn = fan_in_masks({"fc": (6, 20)}, {"fc": 30}, seed=2)["fc"]
    assert torch.equal(
        drawn, layout_masks({"fc": (6, 20)}, 0.75, "uniform", Layout("fanin"), seed=2)["fc"]
    )


@pytest.mark.parametrize("layout", [*TILED, Layout("nm")], ids=str)
def test_global_pruning_keeps_the_layout_and_the_total(layout):
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(s, generator=generator) ** 4 for n, s in SHAPES.items()}
    scores["body"] *= 2
    for nnz in (0, TOTAL // 10, TOTAL // 2, TOTAL):
        masks = global_layout_masks(scores, nnz, layout)
        for mask in masks.values():
            layout.check(mask)
        if layout.name == "bcsr":
            assert abs(nonzeros(masks) - nnz) <= math.prod(layout.tile) / 2
        elif layout.name == "fanin":
            assert abs(nonzeros(masks) - nnz) <= 40 * layout.tile[1]
    assert layout.name == "nm" or bool(masks["fc"].all())


def test_tiles_scored_below_zero_never_come_back():
    scores = {"a": torch.tensor([[1.0, -1.0, 2.0, 3.0]]), "b": torch.tensor([[-1.0, -1.0]])}
    for layout in (Layout("bcsr", block=1), Layout("fanin")):
        masks = global_layout_masks(scores, 6, layout)
        assert masks["a"].tolist() == [[True, False, True, True]]
        assert not masks["b"].any()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_apportioned_units_come_near_the_total(data):
    layers = data.draw(st.integers(1, 5))
    names = [str(i) for i in range(layers)]
    room = {n: data.draw(st.integers(0, 20)) for n in names}
    size = {
        n: Fraction(data.draw(st.integers(1, 300)), data.draw(st.integers(1, 3))) for n in names
    }
    quota = {n: data.draw(st.floats(0, 1)) * room[n] for n in names}
    total = round(sum(quota[n] * size[n] for n in names))
    total = min(total, math.floor(sum(room[n] * size[n] for n in names)))
    counts = apportion(quota, room, total, size)
    missing = total - sum(counts[n] * size[n] for n in names)
    assert all(0 <= counts[n] <= room[n] for n in names)
    for n in names:  # no single unit brings it nearer
        if counts[n] < room[n]:
            assert abs(missing - size[n]) >= abs(missing)
        if counts[n] > 0:
            assert abs(missing + size[n]) >= abs(missing)


def test_nan_and_unknown_words_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        magnitude_tiles(torch.full((4, 4), math.nan), Layout("nm"), 8)
    with pytest.raises(UnsupportedError, match="distribution: expected one of"):
        tile_counts(SHAPES, 0.5, "square", Layout("bcsr"))
