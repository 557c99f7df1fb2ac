"""SparseConv1D: the linear layer of GPT-2, whose dense weight is stored as [in, out]."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparsekd as skd
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.nn import SparseConv1D, SparseLinear, sparse_modules
from sparsekd.sparsity import grasp, magnitude_mask, snip, survey, synflow, target_nnz
from sparsekd.testing import assert_matches_dense

pytestmark = pytest.mark.filterwarnings(
    "ignore:weight of", "ignore:no weight is left", "ignore:sparsify leaves"
)
SIZES = [(24, 48), (32, 32), (48, 16)]


@pytest.fixture(scope="module", autouse=True)
def conv1d(transformers: ModuleType) -> Any:
    """Return the class, or skip where transformers is missing."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def layer(conv1d: Any, nx: int = 24, nf: int = 48, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    dense = conv1d(nf, nx).double()
    nn.init.normal_(dense.weight)
    nn.init.normal_(dense.bias)
    return dense


def network(conv1d: Any) -> nn.Sequential:
    return nn.Sequential(layer(conv1d, 24, 48), nn.Tanh(), layer(conv1d, 48, 8, seed=1))


def linear_twin(model: nn.Sequential) -> nn.Sequential:
    """Return the network with an nn.Linear of the same numbers for each Conv1D."""
    twin = copy.deepcopy(model)
    for index, module in enumerate(model):
        if type(module).__name__ == "Conv1D":
            twin[index] = linear = nn.Linear(module.nx, module.nf, dtype=torch.float64)
            with torch.no_grad():
                linear.weight.copy_(module.weight.t())
                linear.bias.copy_(module.bias)
    return twin


def drawn_mask(nx: int, nf: int) -> Tensor:
    return torch.rand(nx, nf, generator=torch.Generator().manual_seed(5)) < 0.3


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nx, nf", SIZES)
def test_numbers_are_those_of_the_masked_dense_layer(conv1d, nx, nf):
    dense, mask = layer(conv1d, nx, nf), drawn_mask(nx, nf)
    sparse = skd.sparsify(copy.deepcopy(dense), masks={"": mask})
    assert type(sparse) is SparseConv1D
    assert sparse.topology.shape == (nf, nx)
    assert torch.equal(sparse.topology.mask(), mask.t())
    assert (sparse.nx, sparse.nf) == (sparse.in_features, sparse.out_features) == (nx, nf)
    x = torch.randn(2, 5, nx, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    weight = (dense.weight.detach() * mask).requires_grad_()
    expected = other @ weight + dense.bias
    seed = torch.randn_like(expected)
    found = sparse(x)
    close(found, expected)
    found.backward(seed)
    expected.backward(seed)
    close(x.grad, other.grad)
    close(sparse.values.grad, weight.grad.t()[mask.t()])
    close(sparse.bias.grad, dense.bias.grad)
    assert_matches_dense(sparse, x.detach())


@pytest.mark.parametrize("nx, nf", SIZES)
def test_weight_has_the_dense_order(conv1d, nx, nf, monkeypatch):
    dense, mask = layer(conv1d, nx, nf), drawn_mask(nx, nf)
    sparse = SparseConv1D.from_dense(dense, mask)
    expected = (dense.weight * mask).detach()
    with monkeypatch.context() as patch:
        patch.setattr(SparseConv1D, "dense_weight", None)
        weight = sparse.weight
        assert weight.shape == expected.shape == sparse.dense_shape
        assert weight.stride() == expected.stride()
        assert (weight.dtype, weight.is_contiguous()) == (torch.float64, True)
        assert torch.zeros_like(weight).shape == expected.shape
    close(weight.detach().clone(), expected)
    close(weight.view(-1) + 0, expected.view(-1))
    assert repr(weight) == repr(sparse.dense_weight().t().contiguous())
    close(sparse.dense_weight().detach(), expected.t())
    x = torch.randn(3, nx, dtype=torch.float64)
    close(torch.addmm(sparse.bias, x, sparse.weight), sparse(x))
    (x @ sparse.weight).sum().backward()
    close(sparse.values.grad, x.sum(0).expand(nf, nx)[mask.t()])
    with pytest.raises(UnsupportedError):
        sparse.weight[0] = 0
    alone = copy.deepcopy(sparse).weight  # its layer is gone
    close(alone + 0, expected)


def test_weight_in_graphs(conv1d):
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = layer(conv1d, 16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x) + x @ self.proj.weight

    model = skd.sparsify(Reader(), sparsity=0.7)
    x = torch.randn(3, 16, dtype=torch.float64)
    dense = skd.densify(copy.deepcopy(model))
    close(model(x), dense(x))
    traced = torch.fx.symbolic_trace(model)
    close(traced(x), dense(x))
    assert [type(m) for _, m in sparse_modules(traced)] == [SparseConv1D]
    close(torch.export.export(model, (x,)).module()(x), dense(x))


@pytest.mark.parametrize("nx, nf", SIZES)
def test_dense_checkpoints_load_transposed(conv1d, nx, nf):
    dense = layer(conv1d, nx, nf, seed=3)
    sparse = SparseConv1D.from_dense(layer(conv1d, nx, nf), drawn_mask(nx, nf))
    sparse.load_state_dict(dense.state_dict())
    mask = sparse.topology.mask()
    close(sparse.values.detach(), dense.weight.detach().t()[mask])
    close(sparse.weight + 0, dense.weight * mask.t())
    back = layer(conv1d, nx, nf, seed=4)
    back.load_state_dict(sparse.to_dense().state_dict())
    x = torch.randn(3, nx, dtype=torch.float64)
    close(back(x), sparse(x))


def test_dense_checkpoints_are_assigned_transposed(conv1d):
    dense = layer(conv1d, 32, 32, seed=3)
    state = {"weight": dense.weight.detach().t().contiguous().t(), "bias": dense.bias.detach()}
    sparse = SparseConv1D(32, 32, sparsity=0.5, device="meta")
    sparse.load_state_dict(state, assign=True)
    close(sparse.weight + 0, dense.weight * sparse.topology.mask().t())
    assert sparse.bias.data_ptr() == dense.bias.data_ptr()


def test_sparse_checkpoints_and_sizes(conv1d):
    sparse = SparseConv1D.from_dense(layer(conv1d), drawn_mask(24, 48))
    other = SparseConv1D(24, 48, sparsity=0.5, dtype=torch.float64)
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other.weight + 0, sparse.weight + 0)
    before = other.state_dict()
    for state in (layer(conv1d, 48, 24).state_dict(), layer(conv1d, 24, 40).state_dict()):
        shape = str(list(state["weight"].shape)).replace("[", r"\[")
        with pytest.raises(RuntimeError, match=rf"weight: .*{shape}.*shape .*\[24, 48\]"):
            other.load_state_dict(state)
    wide = SparseConv1D(30, 48, sparsity=0.5, dtype=torch.float64).state_dict()
    with pytest.raises(RuntimeError, match=r"weight: .*\[30, 48\].*\[24, 48\]"):
        other.load_state_dict(wide)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize("nx, nf", SIZES)
def test_back_to_dense(conv1d, nx, nf):
    dense, mask = layer(conv1d, nx, nf), drawn_mask(nx, nf)
    dense.bias.requires_grad_(False)
    bias = dense.bias
    state = torch.get_rng_state()
    again = skd.densify(skd.sparsify(copy.copy(dense), masks={"": mask}))
    assert torch.equal(state, torch.get_rng_state())
    assert type(again) is conv1d
    assert (again.nx, again.nf) == (nx, nf)
    assert again.bias is bias
    assert again.weight.is_contiguous()
    assert torch.equal(again.weight, dense.weight * mask)
    bare = SparseConv1D(nx, nf, bias=False, sparsity=0.5)
    x = torch.randn(3, nx)
    torch.testing.assert_close(skd.densify(bare)(x), bare(x))


def test_copies_and_pickles(conv1d):
    sparse = SparseConv1D.from_dense(layer(conv1d), sparsity=0.8)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    x = torch.randn(3, 24, dtype=torch.float64)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), loaded):
        assert type(twin) is SparseConv1D
        assert torch.equal(twin(x), sparse(x))
        assert torch.equal(twin.weight + 0, sparse.weight + 0)


def test_magnitude_is_per_layer_whatever_the_order(conv1d):
    dense = layer(conv1d)
    sparse = SparseConv1D.from_dense(dense, sparsity=0.9)
    expected = magnitude_mask(dense.weight, target_nnz(24 * 48, 0.9))
    assert torch.equal(sparse.topology.mask().t(), expected)


@pytest.mark.parametrize("criterion", ["random", "magnitude"])
@pytest.mark.parametrize(
    "layout, sparsity", [("csr", 0.8), ("bcsr", 0.5), ("fanin", 0.8), ("nm", 0.5)]
)
def test_drawn_masks_are_those_of_the_linear_twin(conv1d, criterion, layout, sparsity):
    model = network(conv1d)
    twin = skd.sparsify(linear_twin(model), sparsity, criterion=criterion, layout=layout)
    skd.sparsify(model, sparsity, criterion=criterion, layout=layout)
    pairs = zip(sparse_modules(model), sparse_modules(twin), strict=True)
    for (name, found), (same, expected) in pairs:
        assert (name, type(found), type(expected)) == (same, SparseConv1D, SparseLinear)
        assert found.topology == expected.topology
        assert str(found.layout) == str(expected.layout)
        if layout == "fanin":
            assert len(set(found.topology.mask().sum(1).tolist())) == 1
    x = torch.randn(4, 24, dtype=torch.float64)
    close(model(x), twin(x))
    close(model(x), skd.densify(copy.deepcopy(model))(x))


@pytest.mark.parametrize(
    "score, options", [(snip, {}), (snip, {"distribution": "erk"}), (grasp, {}), (synflow, {})]
)
def test_masks_at_init_have_the_dense_order(conv1d, score, options):
    model = network(conv1d)
    model[1] = nn.Softplus()  # whose slope is never so small that scores are equal
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    batch = x, torch.arange(16) % 8
    masks = score(model, batch, 0.8, **options)
    expected = score(linear_twin(model), batch, 0.8, **options)
    assert {name: mask.shape for name, mask in masks.items()} == {"0": (24, 48), "2": (48, 8)}
    for name, mask in masks.items():
        assert torch.equal(mask.t(), expected[name])
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_submodule(name).weight.mul_(mask)
    close(skd.sparsify(model, masks=masks)(x), dense(x))


def test_masks_of_another_shape_are_refused(conv1d):
    dense = layer(conv1d)
    with pytest.raises(ShapeError, match=r"expected shape \[24, 48\], got \[48, 24\]"):
        skd.sparsify(nn.Sequential(dense), masks={"0": torch.ones(48, 24, dtype=torch.bool)})
    with pytest.raises(ShapeError, match=r"expected shape \[24, 48\], got \[48, 24\]"):
        SparseConv1D.from_dense(dense, torch.ones(48, 24, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="expected a Conv1D"):
        SparseConv1D.from_dense(nn.Linear(4, 4), sparsity=0.5)
    with pytest.raises(UnsupportedError, match=r"expected an nn\.Linear"):
        SparseLinear.from_dense(dense, sparsity=0.5)


def test_what_is_no_plain_conv1d_is_left_alone(conv1d):
    class Derived(conv1d):
        pass

    tied = layer(conv1d, 8, 8)
    tied.weight = (embedding := nn.Embedding(8, 8).double()).weight
    model = nn.ModuleDict(
        {
            "derived": Derived(8, 8),
            "tied": tied,
            "embedding": embedding,
            "parametrised": parametrize.register_parametrization(
                conv1d(8, 8), "weight", nn.Identity()
            ),
            "plain": conv1d(8, 8),
        }
    )
    found = survey(model)
    assert list(found.convertible) == ["plain"]
    assert set(found.left_alone) == {"derived", "tied", "parametrised"}
    with pytest.warns(UserWarning, match="tied: its weight is shared with another module"):
        skd.sparsify(model, sparsity=0.5)
    assert [name for name, _ in sparse_modules(model)] == ["plain"]


def test_one_layer_in_two_places_is_converted_once(conv1d):
    shared = layer(conv1d, 16, 16)
    model = skd.sparsify(nn.Sequential(shared, nn.Tanh(), shared), sparsity=0.5)
    assert model[0] is model[2]


def test_a_rewire_moves_outputs_and_inputs(conv1d):
    sparse = SparseConv1D.from_dense(layer(conv1d), drawn_mask(24, 48))
    before = sparse.weight + 0
    kept = drawn_mask(24, 48) & (torch.arange(48) % 2 == 0)
    sparse.rewire(kept.t())
    close(sparse.weight + 0, before * kept)


def test_layouts_change_and_updates_follow_the_dense_gradient(conv1d):
    model = skd.optimize(skd.sparsify(network(conv1d), sparsity=0.5, layout="bcsr:8"))
    skd.relayout(model, "csr")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = skd.dst.RigL(model, optimizer, drop_fraction=0.3, every=1, until=100)
    before = {name: module.topology.mask() for name, module in sparse_modules(model)}
    twin = skd.densify(copy.deepcopy(model))
    x = torch.randn(16, 24, dtype=torch.float64)
    for each in (model, twin):
        F.cross_entropy(each(x), torch.arange(16) % 8).backward()
    assert method.step()
    for name, module in sparse_modules(model):
        mask, grad = module.topology.mask(), twin.get_submodule(name).weight.grad.t().abs()
        grown, free = mask & ~before[name], ~(mask | before[name])
        assert grown.any()
        assert grad[grown].min() >= grad[free].max() * (1 - 1e-9)


def test_coverage_and_flops(conv1d):
    model = network(conv1d)
    inputs = (2, 5, 24)
    dense = skd.flops.count(model, inputs)
    assert dense.forward == 2 * 10 * (24 * 48 + 48 * 8)
    skd.sparsify(model, sparsity=0.75)
    found = skd.flops.count(model, inputs)
    assert found.forward_dense == dense.forward
    assert found.forward * 4 == dense.forward
    assert [row.name for row in found.layers] == ["0", "2"]
    for row, full in zip(found.layers, dense.layers, strict=True):
        assert (row.name, row.shape, row.positions) == (full.name, full.shape, full.positions)
    coverage = skd.coverage(model)
    assert (coverage.asked, coverage.converted, coverage.dense) == (0.75, 0.75, ())


def test_flops_of_a_part_of_the_weight(conv1d):
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = layer(conv1d, 24, 48)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.proj.weight[:12])

    dense = skd.flops.count(Reader(), (5, 48))
    found = skd.flops.count(skd.sparsify(Reader(), sparsity=0.5), (5, 48))
    assert found.forward == dense.forward == 2 * 5 * 12 * 48
    assert [row.name for row in dense.layers] == ["proj[0:12]"]
    assert [row.name for row in found.layers] == ["proj.weight[0:12]"]


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification"])
def test_gpt2(transformers, kind):
    options = {"n_embd": 32, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, **options)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skd.sparsify(model, sparsity=0.8)
    names = [name.split(".h.0.")[-1].removeprefix("h.0.") for name, _ in sparse_modules(model)]
    expected = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names == expected + (["score"] if "Classification" in kind else [])
    ids = torch.tensor([[5, 3, 11, 2], [4, 9, 12, 7]])
    dense = skd.densify(copy.deepcopy(model))
    with torch.no_grad():
        close(model(ids)[0], dense(ids)[0])


def test_sparsify_does_not_import_transformers():
    code = (
        "import sys, torch, sparsekd as skd; "
        "skd.densify(skd.sparsify(torch.nn.Linear(8, 8), 0.5)); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
