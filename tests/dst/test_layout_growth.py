"""One update of RigL in every layout, against its definition in loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sparsekd import Layout, dst
from sparsekd.dst import Updater
from sparsekd.nn import SparseConv2d, SparseLinear

BCSR, FANIN, TILED_FANIN, NM = map(Layout.parse, ("bcsr:4", "fanin", "fanin:4x2", "nm:2:4"))


def naive_tiles(shape: tuple[int, ...], layout: Layout) -> list[list[tuple]]:
    """List the positions of every tile, in the order of the grid."""
    rows, channels = layout.tile
    found: dict[tuple, list[tuple]] = {}
    for at in itertools.product(*map(range, shape)):
        found.setdefault((at[0] // rows, at[1] // channels, *at[2:]), []).append(at)
    return [found[tile] for tile in sorted(found)]


def naive_cell(place: tuple, layout: Layout) -> tuple:
    """Name the cell in which a tile with its first weight at `place` competes."""
    if layout.name == "fanin":
        return (place[0] // layout.group,)
    return (place[0], place[1] // layout.m, *place[2:]) if layout.name == "nm" else ()


def naive_rigl(weight: Tensor, mask: Tensor, gradient: Tensor, layout: Layout, f: float) -> Tensor:
    tiles = naive_tiles(mask.shape, layout)
    mean = lambda x, t: sum(abs(float(x[p])) for p in tiles[t]) / len(tiles[t])  # noqa: E731
    stored = [t for t, places in enumerate(tiles) if mask[places[0]]]
    cell = [naive_cell(places[0], layout) for places in tiles]
    order = sorted(stored, key=lambda t: (mean(weight, t), t))
    k = math.floor(f * len(stored))
    if layout.name == "fanin":
        groups = {cell[t] for t in stored}
        each = k // max(len(groups), 1)
        dropped = [t for g in groups for t in [s for s in order if cell[s] == g][:each]]
    else:
        dropped = order[:k]
    kept = set(stored) - set(dropped)
    quota: dict[tuple, int] = {}
    for t in dropped:
        quota[cell[t]] = quota.get(cell[t], 0) + 1
    grown = []
    for name, count in quota.items():
        free = [t for t in range(len(tiles)) if cell[t] == name and t not in kept]
        grown += sorted(free, key=lambda t: (-mean(gradient, t), t))[:count]
    new = torch.zeros_like(mask)
    for t in [*kept, *grown]:
        for place in tiles[t]:
            new[place] = True
    return new


@pytest.mark.parametrize("layout", [BCSR, Layout.parse("bcsr:3"), FANIN, TILED_FANIN, NM], ids=str)
@pytest.mark.parametrize(
    "shape, options",
    [
        ((10, 9, 3), {"padding": 1}),
        ((3, 9, 3), {"stride": 2}),
        ((12, 8, 3), {"groups": 2, "dilation": 2}),
        ((30, 21, 1), {}),
    ],
)
def test_rigl_follows_the_definition(layout, shape, options):
    torch.manual_seed(0)
    conv = SparseConv2d(*shape, **options, sparsity=0.5, layout=layout, seed=2).double()
    twin = conv.to_dense()
    opt = torch.optim.SGD(conv.parameters(), lr=0.1)
    updater = dst.RigL(conv, opt, every=1, until=10)
    updater.schedule = lambda iteration: 0.7
    mask, weight = conv.topology.mask(), conv.dense_weight().detach()
    x = torch.randn(2, shape[0], 7, 7, dtype=torch.float64)
    target = torch.randn(conv(x).shape, dtype=torch.float64)
    for module in (conv, twin):
        (module(x) * target).sum().backward()
    expected = naive_rigl(weight, mask, twin.weight.grad, layout, 0.7)
    assert updater.step()
    assert torch.equal(conv.topology.mask(), expected)
    assert not torch.equal(expected, mask)
    assert torch.equal(conv.dense_weight(), weight * expected)


@pytest.mark.parametrize("layout", [BCSR, TILED_FANIN, FANIN, NM], ids=str)
def test_growth_stores_no_dense_gradient(layout, monkeypatch):
    monkeypatch.setattr(Updater, "gradient", None)
    layer = SparseLinear(40, 30, sparsity=0.5, layout=layout)
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    updater = dst.RigL(layer, opt, every=1, until=10)
    layer(torch.randn(4, 40)).square().sum().backward()
    assert updater.step()
