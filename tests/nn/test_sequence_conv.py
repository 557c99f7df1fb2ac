"""SparseConv1d against the masked nn.Conv1d: numbers, growth, checkpoints, FLOPs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.nn import SparseConv1d, sparse_modules
from sparsekd.testing import assert_matches_dense

pytestmark = pytest.mark.filterwarnings("ignore:no weight is left")
GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": "same"},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": "same", "padding_mode": "circular", "bias": False},
    {"groups": 2, "padding": 1, "padding_mode": "replicate"},
    {"groups": 6, "stride": 3},
]


def convolution(dtype: torch.dtype = torch.float64, **geometry: object) -> nn.Conv1d:
    torch.manual_seed(0)
    return nn.Conv1d(6, 12, 3, dtype=dtype, **geometry)


def drawn(shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 11), (6, 11), (0, 6, 11)], ids=str)
def test_numbers_are_those_of_the_masked_dense_layer(geometry, shape, backend):
    dense = convolution(**geometry)
    mask = drawn(dense.weight.shape)
    sparse = skd.sparsify(copy.deepcopy(dense), masks={"": mask})
    assert type(sparse) is SparseConv1d
    assert sparse.topology.shape == sparse.weight.shape == dense.weight.shape
    assert torch.equal(sparse.topology.mask(), mask)
    assert sparse.bias is None or torch.equal(sparse.bias, dense.bias)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        dense.weight.mul_(mask)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-12, atol=1e-12)
    assert_matches_dense(sparse, x)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_float32_is_within_1e_5(geometry):
    dense = convolution(torch.float32, **geometry)
    sparse = SparseConv1d.from_dense(dense, drawn(dense.weight.shape))
    assert_matches_dense(sparse, torch.randn(2, 6, 40), limit=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients(geometry):
    sparse = SparseConv1d.from_dense(convolution(**geometry), sparsity=0.5)
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(sparse, {"values": values}, (x,))

    values = sparse.values.detach().clone().requires_grad_()
    torch.autograd.gradcheck(run, (x, values))
    torch.autograd.gradgradcheck(run, (x, values))


@pytest.mark.parametrize("method", ["RigL", "SET"])
def test_growth(method):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 5)).double()
    skd.sparsify(model, sparsity=0.7)
    before = {name: layer.topology for name, layer in sparse_modules(model)}
    twin = skd.densify(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    updater = getattr(skd.dst, method)(model, optimizer, drop_fraction=0.4, every=1, until=9)
    x = torch.randn(3, 4, 16, dtype=torch.float64)
    for each in (model, twin):
        each(x).square().mean().backward()
    assert updater.step()
    for name, layer in sparse_modules(model):
        old, new = before[name].mask(), layer.topology.mask()
        grown, free = new & ~old, ~(new | old)
        assert new.sum() == old.sum()
        assert grown.any()
        if method == "RigL":
            grad = twin.get_submodule(name).weight.grad.abs()
            assert grad[grown].min() >= grad[free].max()


def test_checkpoints_densify_and_nonzero_masks():
    dense = nn.Sequential(convolution(padding=1), nn.Conv1d(12, 4, 1).double())
    sparse = skd.sparsify(copy.deepcopy(dense), sparsity=0.6)
    back = skd.densify(copy.deepcopy(sparse))
    assert [type(module) for module in back] == [nn.Conv1d, nn.Conv1d]
    assert str(back) == str(dense)
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(back(x), sparse(x), rtol=1e-12, atol=1e-12)
    again = skd.sparsify(copy.deepcopy(back), masks="nonzero")
    for (_, one), (_, other) in zip(sparse_modules(sparse), sparse_modules(again), strict=True):
        assert one.topology == other.topology
        assert torch.equal(one.values, other.values)
    other = skd.sparsify(copy.deepcopy(dense), sparsity=0.6, seed=1)
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(x), sparse(x))
    other.load_state_dict(dense.state_dict())
    mask = other[0].topology.mask()
    assert torch.equal(other[0].values, dense[0].weight[mask])


@pytest.mark.parametrize("layout, sparsity", [("bcsr", 0.75), ("fanin", 0.75), ("nm", 0.5)])
def test_layouts(layout, sparsity):
    layer = SparseConv1d(32, 32, 3, padding=1, sparsity=sparsity, layout=layout)
    assert layer.layout.problem(layer.topology.mask()) is None
    assert_matches_dense(layer, torch.randn(2, 32, 20))


def test_flops_are_counted():
    conv = SparseConv1d(4, 8, 3, sparsity=0.75, bias=False)
    count = skd.flops.count(conv, (2, 4, 10))
    assert (count.forward, count.forward_dense) == (2 * 24 * 8 * 2, 2 * 96 * 8 * 2)
    dense = skd.flops.count(conv.to_dense(), (2, 4, 10))
    assert dense.forward == count.forward_dense


def test_graphs():
    model = nn.Sequential(SparseConv1d(4, 8, 3), nn.ReLU())
    x = torch.randn(2, 4, 10)
    traced = torch.fx.symbolic_trace(model)
    assert [type(module) for _, module in sparse_modules(traced)] == [SparseConv1d]
    for run in (traced, torch.export.export(model, (x,)).module()):
        assert torch.equal(run(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_pruning_methods_and_explain():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    batch = torch.randn(10, 4, 10), torch.arange(10) % 5
    masks = skd.sparsity.snip(model, batch, sparsity=0.5)
    assert masks["0"].shape == (8, 4, 3)
    assert sum(int(mask.sum()) for mask in masks.values()) == (96 + 320) // 2
    skd.sparsify(model, masks=masks)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    assert skd.explain(model, (10, 4, 10)).layers[0].name == "0"


def test_wrong_arguments_are_named():
    with pytest.raises(ShapeError, match="kernel_size: expected one number of at least 1"):
        SparseConv1d(4, 4, (3, 3))
    with pytest.raises(ShapeError, match="groups"):
        SparseConv1d(4, 6, 3, groups=4)
    with pytest.raises(UnsupportedError, match="'same' needs stride 1"):
        SparseConv1d(4, 4, 3, stride=2, padding="same")
    with pytest.raises(UnsupportedError, match=r"expected an nn\.Conv1d, got Conv2d"):
        SparseConv1d.from_dense(nn.Conv2d(4, 4, 3), sparsity=0.5)
