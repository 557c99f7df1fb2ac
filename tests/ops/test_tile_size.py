"""The tiles that a weight consists of are found in its indices; dispatch and explain know them."""

from __future__ import annotations

import pytest
import torch

import sparsekd as skd
from sparsekd.diagnose.breakeven import _with_density
from sparsekd.sparsity.tiles import random_tiles, tile_counts

dispatch = pytest.importorskip(
    "sparsekd.ops.dispatch.auto", reason="the compiled module is not built"
)


@pytest.mark.parametrize(
    "name, shape, groups, found",
    [
        ("bcsr:8", (32, 24, 3, 3), 1, (8, 8)),
        ("fanin:16", (32, 24, 3, 3), 1, (16, 1)),
        ("fanin:8x4", (32, 24), 1, (8, 4)),
        ("bcsr:16", (24, 24, 3, 3), 1, (16, 16)),
        ("fanin:16", (32, 24, 1, 1), 4, (8, 1)),
        ("fanin", (32, 24, 3, 3), 1, (1, 1)),
        ("csr", (32, 24, 3, 3), 1, (1, 1)),
    ],
)
def test_tiles_are_found_in_the_indices(
    name: str, shape: tuple[int, ...], groups: int, found: tuple[int, int]
) -> None:
    layout = skd.Layout.parse(name)
    count = tile_counts({"": shape}, 0.7, "uniform", layout)[""]
    generator = torch.Generator().manual_seed(0)
    mask = random_tiles(shape, layout, count, generator)
    topology = skd.Topology.from_mask(mask)
    args = topology.crow_indices, topology.col_indices, shape, groups
    assert dispatch.cpp.tile_size(*args) == found


def test_tile_size_checks_what_it_is_asked() -> None:
    crow, col = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    with pytest.raises(ValueError, match="groups"):
        dispatch.cpp.tile_size(crow, col, (2, 4), 3)
    with pytest.raises(ValueError, match="out of range"):
        dispatch.cpp.tile_size(crow, col, (2, 2), 1)


def test_weights_of_tiles_are_a_kind_of_their_own() -> None:
    def kind(layout: str) -> str:
        conv = skd.nn.SparseConv2d(32, 32, 3, sparsity=0.75, seed=0, layout=layout)
        x = torch.randn(2, 32, 8, 8)
        indices = conv.crow_indices, conv.col_indices
        args = (x, conv.values, *indices, conv.bias, [32, 32, 3, 3], [1, 1], [0] * 4, [1, 1], 1)
        return dispatch.key_of("conv2d", args).kind

    assert "tiles" not in kind("csr")
    assert "tiles=16x16" in kind("bcsr")
    assert "tiles=8x1" in kind("fanin:8")


def test_explain_shows_the_tiles() -> None:
    model = torch.nn.Sequential(
        skd.nn.SparseConv2d(32, 32, 3, sparsity=0.75, seed=0, layout="bcsr"),
        torch.nn.Flatten(),
        skd.nn.SparseLinear(32 * 16, 16, sparsity=0.75, seed=0),
    )
    found = skd.explain(model, (2, 32, 6, 6))
    assert [report.tile for report in found.layers] == [(16, 16), (1, 1)]
    lines = str(found).splitlines()
    assert "16x16" in lines[1]
    assert "none" in lines[2]


def test_probes_of_explain_have_the_tiles_of_the_weight() -> None:
    conv = skd.nn.SparseConv2d(64, 64, 3, sparsity=0.75, seed=0, layout="bcsr")
    indices, window = (conv.crow_indices, conv.col_indices), ([1, 1], [0] * 4, [1, 1], 1)
    args = (torch.randn(2, 64, 5, 5), conv.values, *indices, None, [64, 64, 3, 3], *window)
    probe = _with_density("conv2d", args, (64, 64, 3, 3), 0.5)
    assert dispatch.cpp.tile_size(probe[2], probe[3], (64, 64, 3, 3), 1) == (16, 16)
    assert 0.3 < probe[3].shape[0] / conv.topology.numel < 0.7
