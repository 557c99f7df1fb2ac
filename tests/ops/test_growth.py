"""Dense weight gradients by tiles, and growth from them: equal to torch on the full gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekd as skd
from sparsekd import Topology
from sparsekd.errors import ShapeError
from sparsekd.ops import growth
from sparsekd.ops.gradient_tiles import Tile, tiles
from sparsekd.testing import available_backends


@st.composite
def layers(draw: st.DrawFn) -> tuple[growth.Operands, torch.Tensor]:
    """Draw the operands of a weight gradient, of whole numbers, and what torch makes of them."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).double()

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    ins, outs = groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 40))
    if draw(st.booleans()):
        shape = [outs, ins]
        x, options = numbers(2, 5, ins), []
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = F.linear(x, weight)
    else:
        shape = [outs, ins // groups, draw(st.integers(1, 4)), draw(st.integers(1, 4))]
        stride, dilation = ([draw(st.integers(1, 2)) for _ in range(2)] for _ in range(2))
        top, bottom, left, right = padding = [draw(st.integers(0, 2)) for _ in range(4)]
        layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
        x = numbers(draw(st.integers(1, 3)), ins, 8, 9).contiguous(memory_format=layout)
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        padded = F.pad(x, (left, right, top, bottom))
        y = F.conv2d(padded, weight, None, stride, 0, dilation, groups)
        options = [stride, padding, dilation, groups]
    grad = numbers(*y.shape)
    (expected,) = torch.autograd.grad(y, weight, grad)
    return (grad.to(dtype), x.to(dtype), [shape, *options]), expected.reshape(outs, -1)


def assemble(blocks, shape: tuple[int, int]) -> torch.Tensor:
    """Add up rectangles; positions that none covers stay NaN."""
    dense = torch.full(shape, math.nan, dtype=torch.float64)
    for row, col, block in blocks:
        target = dense[row : row + block.shape[0], col : col + block.shape[1]]
        assert target.isnan().all()
        target.copy_(block)
    return dense


@settings(max_examples=80, deadline=None)
@given(layers())
def test_the_tiles_make_up_the_gradient(case) -> None:
    """The sums of small whole numbers are exact, in bfloat16 too: it is added up in float32."""
    operands, expected = case
    for name in available_backends():
        with skd.backend(name):
            assert torch.equal(assemble(growth.gradient([operands]), expected.shape), expected)


@settings(max_examples=40, deadline=None)
@given(layers())
def test_calls_and_earlier_passes_add_up(case) -> None:
    operands, expected = case
    earlier = torch.ones(expected.shape)
    for name in available_backends():
        with skd.backend(name):
            twice = growth.gradient([operands, operands], earlier.to(operands[0].dtype).float())
            assert torch.equal(assemble(twice, expected.shape), 2 * expected + 1)


@settings(max_examples=80, deadline=None)
@given(layers(), st.sampled_from([0, 0.1, 0.5, 1]), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_growth_takes_what_topk_takes_from_the_full_gradient(case, density, share, seed) -> None:
    """Small whole numbers tie often; of equals the lower positions are to grow."""
    operands, expected = case
    mask = torch.rand(expected.shape, generator=torch.Generator().manual_seed(seed)) < density
    kept = Topology.from_mask(mask)
    k = round(share * (kept.numel - kept.nnz))
    score = expected.abs().masked_fill(mask, -1).flatten()
    best = score.sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(score[best].sort().values, score.topk(k).values.sort().values)
    for name in available_backends():
        with skd.backend(name):
            grown = growth.largest(
                growth.gradient([operands]),
                kept.crow_indices,
                kept.col_indices,
                (kept.rows, kept.cols),
                k,
                magnitude=True,
            )
        assert torch.equal(grown, best)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_of_real_size(backend: str, threads: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(8, 96, 8, 8, dtype=torch.float64, generator=generator)
    x = torch.randn(8, 80, 8, 8, dtype=torch.float64, generator=generator)
    weight = torch.zeros(96, 80, 3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, padding=1), weight, grad)
    kept = Topology.from_mask(torch.rand(weight.shape, generator=generator) < 0.1)
    geometry = [list(weight.shape), [1, 1], [1] * 4, [1, 1], 1]
    grown = growth.largest(
        growth.gradient([(grad, x, geometry)]),
        kept.crow_indices,
        kept.col_indices,
        (kept.rows, kept.cols),
        2000,
        magnitude=True,
    )
    best = expected.abs().masked_fill(kept.mask(), -1).flatten().topk(2000).indices
    assert torch.equal(grown, best.sort().values)


@given(
    st.lists(st.integers(1, 600), min_size=2, max_size=2),
    st.sampled_from([(), (1, 1), (3, 3), (7, 2)]),
    st.sampled_from([1, 1, 2, 5]),
    st.sampled_from([(1, 1), (2, 2)]),
)
def test_tiles_cover_a_weight_once_and_stay_small(channels, kernel, groups, stride) -> None:
    shape = (channels[0] * groups, channels[1], *kernel)
    rows, ins, taps = shape[0], shape[1], math.prod(kernel)
    seen = torch.zeros(rows, ins, dtype=torch.int32)
    cut = tiles(shape, stride, groups)
    for tile in cut:
        part = (
            slice(tile.row, tile.row + tile.rows),
            slice(tile.channel, tile.channel + tile.channels),
        )
        seen[part] += 1
        # A tile has at least one line, and only one that is long may exceed the bound.
        line = taps * (rows if tile.rows == rows else ins)
        size = tile.rows * tile.channels * taps
        half = 2 if rows * ins * taps <= 2 << 16 else 4
        assert size <= max(rows * ins * taps // half, line)
        assert size <= max(1 << 19, line)
    assert (seen == 1).all()


def test_nothing_of_the_layers_size_is_allocated() -> None:
    """The profiler counts what torch allocates; the kernels themselves take a few tiles more."""
    pytest.importorskip("sparsekd._C")
    shape = [256, 128, 3, 3]
    layer = math.prod(shape) * 4
    kept = Topology.from_mask(torch.rand(shape) < 0.1)
    structure = kept.crow_indices, kept.col_indices, (kept.rows, kept.cols)
    geometry = [shape, [1, 1], [1] * 4, [1, 1], 1]
    operands = (torch.randn(2, 256, 6, 6), torch.randn(2, 128, 6, 6), geometry)
    with torch.profiler.profile(profile_memory=True) as profile:
        growth.largest(growth.gradient([operands]), *structure, 100, magnitude=True)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak <= layer // 4 + 4096


def test_nan_is_refused(backend: str) -> None:
    kept = Topology.from_mask(torch.tensor([[True, False, False]]))
    structure = kept.crow_indices, kept.col_indices, (1, 3)
    scores = torch.tensor([[math.nan, 1.0, math.nan]])
    with pytest.raises(ValueError, match="NaN"):
        growth.largest([(0, 0, scores)], *structure, 1, magnitude=True)
    scores[0, 2] = -2.0  # the first one is never looked at
    assert growth.largest([(0, 0, scores)], *structure, 1, magnitude=True).tolist() == [2]


def test_more_than_is_free_is_refused(backend: str) -> None:
    kept = Topology.from_mask(torch.tensor([[True, False, False]]))
    structure = kept.crow_indices, kept.col_indices, (1, 3)
    with pytest.raises(ShapeError, match=r"k: expected 0 <= k <= 2 free positions, got 3"):
        growth.largest([(0, 0, torch.ones(1, 3))], *structure, 3, magnitude=True)


def test_a_tile_outside_the_weight_is_refused() -> None:
    cpp = pytest.importorskip("sparsekd.ops.cpu.cpp")
    grad, x, out = torch.ones(1, 4, 2, 2), torch.ones(1, 3, 2, 2), torch.zeros(2, 3)
    geometry = [4, 3, 1, 1], [1, 1], [0] * 4, [1, 1], 1
    with pytest.raises(ShapeError, match="tile: expected rows and channels of a weight of 4 x 3"):
        cpp.conv2d_wgrad_tile(grad, x, out, Tile(3, 2, 0, 3), *geometry)
    with pytest.raises(ShapeError, match="out: expected shape"):
        cpp.conv2d_wgrad_tile(grad, x, out, Tile(0, 3, 0, 3), *geometry)
