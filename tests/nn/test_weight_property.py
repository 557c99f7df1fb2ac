"""`weight` of a sparse layer: free to look at, right to compute with, never written to in vain."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.errors import UnsupportedError
from sparsekd.nn import SparseConv2d, SparseLinear

pytestmark = pytest.mark.filterwarnings("ignore:weight of")


class Reader(nn.Module):
    """Layers used through their weights, as Swin, BEiT and others do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.query, self.out = nn.Linear(8, 12), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv.weight.dtype)
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=self.conv.padding).mean((2, 3))
        weights = torch.cat([self.query.weight[:4], self.query.weight[4:]])
        x = F.linear(input=x, weight=weights, bias=self.query.bias)
        return x @ self.out.weight.T


def reader(dtype: torch.dtype = torch.float64) -> Reader:
    torch.manual_seed(0)
    return skd.sparsify(Reader(), sparsity=0.6).to(dtype)


def layers() -> dict[str, skd.nn.SparseModule]:
    return {
        "linear": SparseLinear(6, 4, sparsity=0.5),
        "conv": SparseConv2d(4, 6, 3, groups=2, sparsity=0.7),
    }


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_a_weight_is_costs_nothing(kind, dtype, monkeypatch):
    layer = layers()[kind].to(dtype)
    dense = layer.to_dense().weight
    monkeypatch.setattr(type(layer), "dense_weight", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = layer.weight
        for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "is_leaf"):
            assert getattr(weight, name) == getattr(dense, name), name
        for name in ("size", "dim", "numel", "stride", "element_size", "is_floating_point"):
            assert getattr(weight, name)() == getattr(dense, name)(), name
        assert (weight.size(0), weight.stride(-1), len(weight)) == (dense.size(0), 1, len(dense))
        assert isinstance(weight, Tensor)
        assert torch.is_tensor(weight)
        assert nn.init._calculate_fan_in_and_fan_out(weight) == (
            nn.init._calculate_fan_in_and_fan_out(dense)
        )
        assert torch.equal(torch.zeros_like(weight), torch.zeros_like(dense))
        assert weight.new_zeros(3).dtype == dtype
        assert layer.weight is weight
        assert (layer.bias.dtype, layer.bias.shape) == (dtype, (layer.weight.shape[0],))


def test_computing_with_weights_equals_dense_and_trains_values():
    model = reader()
    dense = skd.densify(copy.deepcopy(model))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    y, expected = model(x), dense(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in skd.nn.sparse_modules(model):
        gradient = dense.get_submodule(name).weight.grad[layer.topology.mask()]
        torch.testing.assert_close(layer.values.grad, gradient, rtol=1e-11, atol=1e-11)


def test_a_weight_kept_aside_follows_its_layer():
    layer = SparseLinear(6, 4, sparsity=0.5).double()
    weight, x = layer.weight, torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.values.mul_(3)
        layer.rewire(~layer.topology.mask())
        layer.values.normal_()
    torch.testing.assert_close(x @ weight.T, x @ layer.dense_weight().T)
    assert layer.float().weight.dtype == torch.float32
    assert weight.dtype in (torch.float32, torch.float64)
    assert SparseLinear(6, 4, sparsity=0.5).weight.sum().isfinite()  # the layer is gone by then


def test_weight_under_compile_export_fx_and_trace():
    model, x = reader(torch.float32), torch.randn(2, 3, 5, 5)
    expected = skd.densify(copy.deepcopy(model))(x)
    close = {"rtol": 1e-5, "atol": 1e-6}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected, **close)
    y.sum().backward()
    assert all(layer.values.grad is not None for _, layer in skd.nn.sparse_modules(model))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, **close)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), expected, **close)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(model, x)
    torch.testing.assert_close(scripted(x), expected, **close)
    with torch.no_grad():
        model.out.values.mul_(2)
    torch.testing.assert_close(compiled(x), 2 * expected, **close)
    torch.testing.assert_close(traced(x), 2 * expected, **close)


def test_weight_under_autocast_inference_vmap_and_functional_call():
    model, x = reader(torch.float32), torch.randn(2, 3, 5, 5)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x.mean((2, 3)), model.query.weight[:, :3]).dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    doubled = {name: 2 * p for name, p in model.named_parameters() if name.startswith("out")}
    torch.testing.assert_close(torch.func.functional_call(model, doubled, (x,)), 2 * expected)
    features = torch.randn(3, 2, 12)
    rows = torch.func.vmap(lambda v: v @ model.out.weight.T)(features)
    torch.testing.assert_close(rows, features @ model.out.dense_weight().T)


WRITES = {
    "init": lambda w: nn.init.xavier_uniform_(w),
    "init.kaiming": lambda w: nn.init.kaiming_normal_(w),
    "init.trunc": lambda w: nn.init.trunc_normal_(w, std=0.02),
    "init.zeros": lambda w: nn.init.zeros_(w),
    "data.normal_": lambda w: w.data.normal_(),
    "data.fill_": lambda w: w.data.fill_(0),
    "detach": lambda w: w.detach().mul_(2),
    "copy_": lambda w: w.copy_(torch.ones(4, 6)),
    "item": lambda w: w.__setitem__(0, 1.0),
    "view": lambda w: w.data.view(-1)[2:].zero_(),
    "transposed": lambda w: w.T.add_(1),
    "row": lambda w: next(iter(w)).zero_(),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "same dtype": lambda w: w.float().clamp_(0),
    "out": lambda w: torch.mul(torch.ones(4, 6), 2, out=w.detach()),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "inplace": lambda w: F.relu(w.detach(), inplace=True),
    "renorm": lambda w: F.embedding(torch.tensor([0]), w, max_norm=0.01),
    "iadd": lambda w: w.__iadd__(1),
    "set data": lambda w: setattr(w, "data", torch.ones(4, 6)),
    "set grad": lambda w: setattr(w, "grad", torch.ones(4, 6)),
    "address": lambda w: w.data_ptr(),
    "storage": lambda w: w.data.untyped_storage(),
}


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_that_would_be_lost_are_refused(name, mode):
    layer = SparseLinear(6, 4, sparsity=0.5)
    before = layer.values.detach().clone()
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    with modes[mode](), pytest.raises(UnsupportedError, match="`values`"):
        WRITES[name](layer.weight)
    assert torch.equal(layer.values, before)


def test_numpy_views_are_read_only():
    layer = SparseLinear(6, 4, sparsity=0.5)
    array = layer.weight.detach().numpy()
    np.testing.assert_array_equal(array, layer.dense_weight().detach().numpy())
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_copies_may_be_written_to():
    layer = SparseLinear(6, 4, sparsity=0.5)
    for copied in (layer.weight.clone(), layer.weight.double(), layer.weight + 0):
        with torch.no_grad():
            assert copied.zero_().sum() == 0
    leaf = layer.weight.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.linear(torch.ones(2, 6), leaf).sum(), leaf)
    assert torch.equal(gradient, torch.full((4, 6), 2.0))


@pytest.mark.parametrize(
    "read",
    [
        lambda layer: layer.weight.grad,
        lambda layer: layer.weight.register_hook(print),
        lambda layer: torch.autograd.grad(layer(torch.ones(1, 6)).sum(), layer.weight),
        lambda layer: layer(torch.ones(1, 6)).sum().backward(inputs=[layer.weight]),
    ],
    ids=["grad", "hook", "autograd.grad", "backward"],
)
def test_gradients_are_those_of_values(read):
    with pytest.raises(UnsupportedError, match="values"):
        read(SparseLinear(6, 4, sparsity=0.5))


@pytest.mark.parametrize("other", [nn.Parameter(torch.ones(4, 6)), torch.ones(4, 6), None])
def test_a_weight_cannot_be_assigned(other):
    layer = SparseLinear(6, 4, sparsity=0.5)
    with pytest.raises(UnsupportedError, match=r"skip=<its name>"):
        layer.weight = other
    assert list(dict(layer.named_parameters())) == ["values", "bias"]


def test_a_sparse_weight_is_no_parameter_of_another_module():
    dense = nn.Linear(6, 4)
    with pytest.raises(TypeError, match="cannot assign"):
        dense.weight = SparseLinear(6, 4).weight


def test_freezing_through_the_weight_freezes_values():
    layer = SparseLinear(6, 4, sparsity=0.5)
    layer.weight.requires_grad = False
    assert not layer.values.requires_grad
    assert not layer.weight.requires_grad
    assert layer.weight.requires_grad_().requires_grad
    assert layer.values.requires_grad


def test_one_warning_a_layer_names_it():
    model = skd.sparsify(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), sparsity=0.5)
    x = torch.ones(1, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            F.linear(F.linear(x, model[0].weight), model[1].weight)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2
    assert "'0'" in texts[0]
    assert "skip='1'" in texts[1]
    assert all(w.filename == __file__ for w in caught)


def test_copies_and_pickles_of_a_layer_have_a_weight_of_their_own():
    layer = SparseLinear(6, 4, sparsity=0.5)
    weight = layer.weight
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.values.zero_()
    assert weight.abs().sum() == 0
    assert twin.weight.abs().sum() > 0
    assert copy.deepcopy(twin.weight).equal(twin.dense_weight())
    stream = io.BytesIO()
    torch.save({"layer": twin, "weight": twin.weight}, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert loaded["layer"].weight.equal(twin.dense_weight())
    assert loaded["weight"].equal(twin.dense_weight())
    assert "weight" not in twin.state_dict()


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.view(4, 6)], ids=["itself", "view"])
def test_an_autograd_function_gets_the_numbers_and_its_gradient_is_not_lost(view):
    layer = SparseLinear(6, 4, sparsity=0.5)
    x = torch.randn(3, 6)
    y = Product.apply(x, view(layer.weight))
    torch.testing.assert_close(y, x @ layer.dense_weight().T)
    with pytest.raises(UnsupportedError, match=r"autograd\.Function; hand .* dense_weight\(\)"):
        y.sum().backward()
    Product.apply(x, layer.dense_weight()).sum().backward()
    expected = torch.ones(3, 4).T @ x
    torch.testing.assert_close(layer.values.grad, expected[layer.topology.mask()])


def test_a_model_that_keeps_a_weight_as_an_attribute_is_copied_whole():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = SparseLinear(6, 6, sparsity=0.5)
            self.tied = self.fc.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) @ self.tied

    model = Tied()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.fc.values.zero_()
        twin.fc.values.mul_(2)
    x = torch.randn(2, 6)
    torch.testing.assert_close(twin(x), twin.fc(x) @ twin.fc.dense_weight())
    assert list(twin.state_dict()) == [
        *("fc.values", "fc.bias", "fc.crow_indices", "fc.col_indices"),
    ]
