"""Modules of every layout: they compute what dense ones do, and keep their structure."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsekd as skd
from sparsekd import Layout
from sparsekd.errors import TopologyError, UnsupportedError
from sparsekd.nn import SparseConv2d, SparseLinear, sparse_modules
from sparsekd.testing import assert_matches_dense

LAYOUTS = [
    Layout("bcsr", block=4),
    Layout("bcsr"),
    Layout("fanin"),
    Layout("fanin", group=4, block=2),
    Layout("nm"),
    Layout("nm", n=1, m=3),
]
ALL = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def sparsity_of(layout: Layout) -> float:
    return 1 - layout.n / layout.m if layout.n else 0.6


CONVOLUTIONS = {
    "three channels": ((3, 10, 3), {"padding": 1}),
    "ragged": ((7, 9, 3), {"stride": 2, "padding": 1}),
    "groups": ((12, 8, 3), {"groups": 2, "dilation": 2}),
    "depthwise": ((6, 12, 3), {"groups": 6}),
    "pointwise": ((20, 17, 1), {"bias": False}),
    "same": ((8, 8, (1, 3)), {"padding": "same", "padding_mode": "circular"}),
}


@ALL
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_match_dense(layout, name):
    size, options = CONVOLUTIONS[name]
    conv = SparseConv2d(*size, **options, layout=layout, sparsity=sparsity_of(layout), seed=3)
    assert layout.fits(conv.topology.mask())
    assert conv.layout == layout
    x = torch.randn(3, size[0], 9, 8, generator=torch.Generator().manual_seed(0))
    assert_matches_dense(conv, x)


@ALL
@pytest.mark.parametrize("size", [(16, 16), (37, 21), (3, 50), (1, 1)])
def test_linear_layers_match_dense(layout, size):
    layer = SparseLinear(*size, layout=layout, sparsity=sparsity_of(layout), seed=1)
    assert layout.fits(layer.topology.mask())
    assert_matches_dense(layer, torch.randn(5, size[0]))


@ALL
def test_from_dense_keeps_the_largest_tiles_with_their_values(layout):
    dense = nn.Conv2d(10, 12, 3)
    sparse = SparseConv2d.from_dense(dense, sparsity=sparsity_of(layout), layout=layout)
    mask = sparse.topology.mask()
    layout.check(mask)
    assert torch.equal(sparse.dense_weight(), dense.weight * mask)
    assert dense.weight[mask].abs().mean() > dense.weight[~mask].abs().mean()
    layer = SparseLinear.from_dense(nn.Linear(9, 7), sparsity=sparsity_of(layout), layout=layout)
    layout.check(layer.topology.mask())


@ALL
@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_sparsify_gives_every_layer_the_layout(layout, criterion):
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.Conv2d(24, 20, 3, groups=4), nn.Conv2d(20, 40, 1), nn.Linear(40, 10)
    )
    twin = copy.deepcopy(model)
    options = {"sparsity": sparsity_of(layout), "distribution": "uniform", "criterion": criterion}
    skd.sparsify(model, layout=layout, **options)
    for name, module in sparse_modules(model):
        assert module.layout == layout
        layout.check(module.topology.mask())
        assert 0 < module.topology.nnz < module.topology.numel
        assert torch.equal(
            module.dense_weight(), twin.get_submodule(name).weight * module.topology.mask()
        )
    with torch.no_grad():
        skd.densify(model)
    assert not dict(sparse_modules(model))
    assert all(type(module) in (nn.Conv2d, nn.Linear) for module in model)


def test_a_network_with_its_layout_by_name_trains():
    model = skd.models.resnet20(num_classes=10)
    skd.sparsify(model, sparsity=0.9, layout="bcsr", init="sparse")
    total = sum(m.topology.numel for _, m in sparse_modules(model))
    stored = sum(m.topology.nnz for _, m in sparse_modules(model))
    assert abs(stored - 0.1 * total) <= 128
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    before = nn.functional.cross_entropy(model(x), y)
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    assert nn.functional.cross_entropy(model(x), y) < before


@ALL
def test_a_mask_that_does_not_fit_is_refused_and_nothing_moves(layout):
    layer = SparseLinear(24, 24, layout=layout, sparsity=sparsity_of(layout))
    before, values = layer.topology, layer.values.detach().clone()
    wrong = before.mask()
    wrong.view(-1)[int((~wrong).view(-1).nonzero()[0])] = True
    with pytest.raises(UnsupportedError, match=f"mask: layout '{layout}'"):
        layer.rewire(wrong)
    assert layer.topology is before
    assert torch.equal(layer.values, values)
    with pytest.raises(UnsupportedError, match=f"mask: layout '{layout}'"):
        SparseLinear(24, 24, mask=wrong, layout=layout)
    model = nn.Sequential(nn.Linear(24, 24))
    with pytest.raises(UnsupportedError, match=r"masks\['0'\]: layout"):
        skd.sparsify(model, masks={"0": wrong}, layout=layout)
    assert type(model[0]) is nn.Linear


@ALL
def test_a_checkpoint_of_another_structure_is_refused_by_name(layout):
    model = nn.Sequential(nn.Linear(24, 24))
    skd.sparsify(model, sparsity=sparsity_of(layout), distribution="uniform", layout=layout)
    wrong = model[0].topology.mask()
    wrong.view(-1)[int(wrong.view(-1).nonzero()[0])] = False
    other = nn.Sequential(SparseLinear(24, 24, mask=wrong))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TopologyError, match=r"^0\.col_indices: layout"):
        model.load_state_dict(other.state_dict())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@ALL
def test_state_travels_between_masks_of_one_layout(layout):
    options = {"layout": layout, "sparsity": sparsity_of(layout)}
    a, b = (SparseLinear(24, 24, seed=seed, **options) for seed in (0, 1))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(a.dense_weight(), b.dense_weight())
    plain = SparseLinear(24, 24, sparsity=0.3)
    plain.load_state_dict(a.state_dict())  # no layout is in a checkpoint
    assert torch.equal(a.dense_weight(), plain.dense_weight())


@ALL
def test_copies_keep_the_layout(layout):
    layer = SparseLinear(24, 24, layout=layout, sparsity=sparsity_of(layout))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.layout == layout
        assert torch.equal(twin.dense_weight(), layer.dense_weight())


def test_a_module_pickled_before_layouts_is_csr():
    layer = SparseLinear(4, 4, sparsity=0.5)
    del layer.__dict__["_layout"]
    assert pickle.loads(pickle.dumps(layer)).layout == Layout()


def test_indices_that_something_else_wrote_must_fit_too():
    layer = SparseLinear(16, 16, layout=Layout("bcsr", block=4), sparsity=0.5)
    other = SparseLinear(16, 16, sparsity=0.0)
    for name in ("crow_indices", "col_indices"):
        setattr(layer, name, getattr(other, name).clone())
    assert layer.topology.nnz == 256
    with torch.no_grad():
        for name in ("crow_indices", "col_indices"):
            setattr(layer, name, getattr(SparseLinear(16, 16, sparsity=0.9), name))
    with pytest.raises(TopologyError, match="col_indices: layout 'bcsr:4'"):
        _ = layer.topology


def test_relayout_goes_where_the_mask_allows():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    skd.sparsify(model, 0.5, "uniform", layout=Layout("bcsr", block=8))
    topologies = [module.topology for _, module in sparse_modules(model)]
    assert skd.relayout(model, Layout("bcsr", block=4)) is model
    assert {str(module.layout) for _, module in sparse_modules(model)} == {"bcsr:4"}
    skd.relayout(model, "csr")
    skd.relayout(model, "bcsr:8")
    assert [module.topology for _, module in sparse_modules(model)] == topologies
    assert all(m.topology is t for (_, m), t in zip(sparse_modules(model), topologies, strict=True))


def test_relayout_changes_all_layers_or_none():
    even = torch.zeros(8, 8, dtype=torch.bool)
    even[:, :2] = True
    torn = even.clone()
    torn[0, 0] = False
    model = nn.Sequential(SparseLinear(8, 8, mask=even), SparseLinear(8, 8, mask=torn))
    with pytest.raises(UnsupportedError, match="1: mask: layout 'fanin:1x1' gives all groups"):
        skd.relayout(model, "fanin")
    assert [str(module.layout) for module in model] == ["csr", "csr"]
    assert str(skd.relayout(model[0], "fanin:8x2").layout) == "fanin:8x2"


def test_the_layout_shows_where_there_is_one():
    assert "layout" not in repr(SparseLinear(4, 4))
    assert "layout='bcsr:16'" in repr(SparseConv2d(32, 32, 3, layout="bcsr"))


def test_the_density_of_nm_is_its_own():
    with pytest.raises(ValueError, match=r"sparsity: layout 'nm:2:4' keeps 2 of 4 .* got 0\.9"):
        SparseLinear(8, 8, layout="nm")
    model = skd.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 400)), 0.5, layout="nm")
    assert [module.topology.density for module in model] == [0.5, 0.5]
