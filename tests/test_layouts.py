"""Layouts: what fits, by the definition in loops; where tiles lie; how they are written."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekd import Layout
from sparsekd.errors import TopologyError, UnsupportedError
from sparsekd.layouts import Tiling
from sparsekd.nn import SparseConv2d, sparse_modules
from sparsekd.sparsity import random_tiles, tile_counts

SHAPES = st.one_of(
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
)
SMALL = st.integers(1, 5)
STRUCTURED = st.one_of(
    st.builds(lambda b: Layout("bcsr", block=b), SMALL),
    st.builds(lambda r, c: Layout("fanin", group=r, block=c), SMALL, SMALL),
    st.builds(lambda n, more: Layout("nm", n=n, m=n + more), st.integers(1, 3), st.integers(0, 3)),
)


def tiles_of(shape: tuple[int, ...], rows: int, channels: int) -> dict[tuple, list[tuple]]:
    """List the positions of each tile, by the definition."""
    found: dict[tuple, list[tuple]] = {}
    for at in itertools.product(*map(range, shape)):
        found.setdefault((at[0] // rows, at[1] // channels, *at[2:]), []).append(at)
    return found


def naive_fits(mask: Tensor, layout: Layout) -> bool:
    if layout.name == "nm":
        runs = tiles_of(mask.shape, 1, layout.m).values()
        return all(sum(bool(mask[p]) for p in run) == min(layout.n, len(run)) for run in runs)
    fans: dict[int, int] = {}
    for tile, places in tiles_of(mask.shape, *layout.tile).items():
        kept = sum(bool(mask[p]) for p in places)
        if kept not in (0, len(places)):
            return False
        fans[tile[0]] = fans.get(tile[0], 0) + (kept > 0)
    return layout.name == "bcsr" or len({fan for fan in fans.values() if fan}) <= 1


@settings(max_examples=300, deadline=None)
@given(SHAPES, STRUCTURED, st.floats(0, 1), st.integers(0, 2), st.integers(0, 10**6))
def test_a_mask_fits_if_the_definition_says_so(shape, layout, sparsity, flips, seed):
    generator = torch.Generator().manual_seed(seed)
    zeros = 1 - layout.n / layout.m if layout.n else sparsity
    count = tile_counts({"": shape}, zeros, "uniform", layout)[""]
    mask = random_tiles(shape, layout, count, generator)
    assert mask.shape == torch.Size(shape)
    assert layout.fits(mask)
    assert naive_fits(mask, layout)
    if mask.numel():
        for at in torch.randint(mask.numel(), (flips,), generator=generator).tolist():
            mask.view(-1)[at] ^= True
    assert layout.fits(mask) == naive_fits(mask, layout)
    if not layout.fits(mask):
        with pytest.raises(UnsupportedError, match=f"layer: layout '{layout}'"):
            layout.check(mask, "layer")


@settings(max_examples=100, deadline=None)
@given(SHAPES, SMALL, SMALL, st.integers(0, 10**6))
def test_tiles_lie_where_the_definition_says(shape, rows, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    tiling = Tiling(torch.Size(shape), rows, channels)
    naive = tiles_of(shape, rows, channels)
    dense = torch.randint(-9, 9, shape, generator=generator)
    pooled, areas = tiling.pool(dense), tiling.areas()
    numbers = torch.arange(tiling.numel).view(tiling.grid)
    spread = tiling.expand(numbers)
    assert len(naive) == tiling.numel
    for tile, places in naive.items():
        assert int(areas[tile]) == len(places)
        assert int(pooled[tile]) == sum(int(dense[p]) for p in places)
        assert {int(spread[p]) for p in places} == {int(numbers[tile])}
    assert torch.equal(tiling.tile_of(torch.arange(dense.numel())), spread.view(-1))


@settings(max_examples=100, deadline=None)
@given(st.data(), SMALL, SMALL)
def test_rectangles_add_up_to_the_whole(data, rows, channels):
    """Growth sees the gradient in rectangles that heed no tile."""
    out, inner, taps = (data.draw(st.integers(1, 9)) for _ in range(3))
    tiling = Tiling(torch.Size([out, inner, taps]), rows, channels)
    dense = torch.randint(-9, 9, (out, inner * taps))
    cut_r, cut_c = data.draw(st.integers(1, out)), data.draw(st.integers(1, inner))
    sums = torch.zeros(tiling.grid, dtype=torch.int64)
    for r, c in itertools.product(range(0, out, cut_r), range(0, inner, cut_c)):
        block = dense[r : r + cut_r, c * taps : (c + cut_c) * taps].contiguous()
        tiling.pool_into(sums, r, c * taps, block)
    assert torch.equal(sums, tiling.pool(dense))


@settings(max_examples=100, deadline=None)
@given(STRUCTURED | st.just(Layout()))
def test_a_layout_reads_what_it_writes(layout):
    assert Layout.parse(str(layout)) == layout
    assert Layout.parse(layout) is layout


@pytest.mark.parametrize("text", ["bcsr:1000000", "fanin:1000000x1000000"])
def test_tiles_larger_than_a_layer_take_no_more_memory_than_it(text):
    layer = SparseConv2d(6, 9, 3, sparsity=0.5, layout=text)
    assert layer.topology.nnz in (4 * 54, 5 * 54)  # half of its taps, whole
    assert layer.layout.fits(layer.topology.mask())
    assert not layer.layout.fits(torch.rand(9, 6, 3, 3) < 0.5)


def test_names_alone_take_the_usual_numbers():
    assert Layout.parse("bcsr").tile == (16, 16)
    assert Layout.parse("fanin").tile == Layout("nm").tile == Layout().tile == (1, 1)
    assert Layout.parse("fanin:32").tile == (32, 1)
    assert Layout.parse("nm") == Layout("nm", n=2, m=4)


@pytest.mark.parametrize(
    ("error", "text", "layout"),
    [
        (UnsupportedError, "expected one of csr, bcsr, fanin, nm, got 'coo'", "coo:3"),
        (UnsupportedError, "expected a name or a Layout, got 16", 16),
        (ValueError, "expected at most 1 numbers, got 'bcsr:4:4'", "bcsr:4:4"),
        (ValueError, "expected whole numbers after the name, got 'nm:2:x'", "nm:2:x"),
        (ValueError, "block: expected a positive integer, got 0", "bcsr:0"),
        (ValueError, "n: expected at most m=2, got 3", "nm:3:2"),
        (ValueError, "expected at most 0 numbers, got 'csr:1'", "csr:1"),
    ],
)
def test_what_is_no_layout_is_refused(error, text, layout):
    with pytest.raises(error, match=text):
        Layout.parse(layout)


def test_numbers_of_another_layout_are_refused():
    with pytest.raises(ValueError, match="group: not a number of layout 'bcsr'; it takes block"):
        Layout("bcsr", group=2)
    with pytest.raises(ValueError, match="block: not a number of layout 'csr'; it takes no"):
        Layout(block=2)


def test_the_first_offending_place_is_named():
    mask = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
    mask[5, 6, 1, 2] = True
    text = "rows 4 to 7, channels 4 to 7, tap \\(1, 2\\) has 1 of its 16 weights"
    with pytest.raises(UnsupportedError, match=text):
        Layout("bcsr", block=4).check(mask)
    with pytest.raises(UnsupportedError, match="keeps 2 weights of row 0, channels 0 to 3, tap"):
        Layout("nm").check(mask)
    uneven = torch.tensor([[False, False], [True, True], [True, False]])
    with pytest.raises(UnsupportedError, match="group 2 has 1 and an earlier one 2"):
        Layout("fanin").check(uneven)


def test_a_mask_that_is_none_is_refused():
    with pytest.raises(TopologyError, match=r"expected a torch\.bool tensor of two or more"):
        Layout("bcsr").fits(torch.ones(4, 4))
    with pytest.raises(TopologyError, match="dimensions"):
        Layout().fits(torch.ones(4, dtype=torch.bool))


def test_the_example_of_the_documentation_runs():
    page = Path(__file__).parents[1] / "docs" / "layouts.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(compile(block, page.name, "exec"), scope)
    assert scope["dst"].last_update
    assert {module.layout for _, module in sparse_modules(scope["model"])} == {Layout()}
