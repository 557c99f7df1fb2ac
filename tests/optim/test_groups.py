"""Weight decay and per-unit rules treat sparse weights as the weights they are."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from sparsekd import dst
from sparsekd.errors import ShapeError
from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparse_modules
from sparsekd.optim import param_groups, unitwise_norm


class Everything(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SparseConv2d(2, 4, 3, sparsity=0.5)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.LayerNorm([4, 3]), nn.GroupNorm(2, 4)])
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.embedding = nn.Embedding(5, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.tied = self.conv
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = SparseLinear(4, 3, sparsity=0.5)


def names(model: nn.Module, group: dict) -> set[str]:
    return {
        n for n, p in model.named_parameters() if any(p is member for member in group["params"])
    }


def test_weights_decay_and_nothing_else():
    model = Everything()
    decayed, plain = param_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0
    assert names(model, decayed) == {
        "conv.values",
        "head.values",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "embedding.weight",
        "pos_embed",
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names(model, plain) == trained - names(model, decayed)
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)


def test_options():
    model = Everything()
    decayed, plain = param_groups(
        model, 0.05, no_decay=("pos_embed", "embedding.*", "head.values", "nothing"), lr=0.3
    )
    assert names(model, decayed) == {
        "conv.values",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert decayed["lr"] == plain["lr"] == 0.3
    assert len(param_groups(SparseLinear(4, 4, bias=False), 0.1)) == 1
    assert names(model, param_groups(model, 0.05, no_decay="*")[0]) >= {"conv.values"}
    with pytest.raises(ValueError, match=r"weight_decay.*-1"):
        param_groups(model, -1)
    with pytest.raises(ValueError, match="trainable"):
        param_groups(nn.ReLU(), 0.1)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_decayed_sparse_weights_equal_dense_masked_ones(make, network, batch):
    model = network()
    twin = densify(network())
    optimizers = [make(param_groups(m, 0.3), lr=0.01) for m in (model, twin)]
    masks = {name: module.topology.mask() for name, module in sparse_modules(model)}
    for t in range(10):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            each(batch(t)).square().mean().backward()
        for name, mask in masks.items():
            twin.get_submodule(name).weight.grad.mul_(mask)
        for optimizer in optimizers:
            optimizer.step()
    for name, tensor in densify(model).named_parameters():
        torch.testing.assert_close(tensor, twin.get_parameter(name), rtol=0, atol=1e-9)


def by_dimensions(model: nn.Module) -> list[dict]:
    """Return groups as most trainers make them."""
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("method", [dst.Static, dst.SET, dst.RigL])
def test_an_updater_warns_of_sparse_weights_that_do_not_decay(method, network):
    model = network()
    optimizer = torch.optim.AdamW(by_dimensions(model), lr=0.1)
    with pytest.warns(UserWarning, match=r"skd\.optim\.param_groups"):
        method(model, optimizer, every=2, until=100)


@pytest.mark.parametrize(
    "groups",
    [
        lambda m: param_groups(m, 0.1),
        lambda m: [{"params": list(m.parameters()), "weight_decay": 0.1}],
        lambda m: [{"params": list(m.parameters()), "weight_decay": 0.0}],
        lambda m: [
            {"params": [m[0].values], "weight_decay": 0.1},
            {"params": [p for p in m.parameters() if p is not m[0].values], "weight_decay": 0.0},
        ],
    ],
    ids=["ours", "all", "none", "one-layer"],
)
def test_no_warning_where_decay_is_meant(groups, network):
    model = network()
    optimizer = torch.optim.SGD(groups(model), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dst.SET(model, optimizer, every=2, until=100)


def clip_units_(model: nn.Module, clipping: float = 0.01, eps: float = 1e-3) -> None:
    """Clip each unit's gradient to a share of its weight's norm, as docs/optimizers.md has it."""
    for _, layer in sparse_modules(model):
        most = clipping * unitwise_norm(layer, layer.values).clamp(min=eps)
        norm = unitwise_norm(layer, layer.values.grad)
        layer.values.grad.mul_((most / norm.clamp(min=1e-6)).clamp(max=1))


def clip_dense_units_(weight: Tensor, clipping: float = 0.01, eps: float = 1e-3) -> None:
    def norms(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))

    most = clipping * norms(weight.detach()).clamp(min=eps)
    weight.grad.mul_((most / norms(weight.grad).clamp(min=1e-6)).clamp(max=1))


def test_adaptive_gradient_clipping_equals_that_of_a_dense_masked_model(network, batch):
    model = network()
    twin = densify(network())
    model(batch(0)).mul(10).square().mean().backward()
    twin(batch(0)).mul(10).square().mean().backward()
    clip_units_(model)
    clipped = 0
    for name, module in sparse_modules(model):
        weight, mask = twin.get_submodule(name).weight, module.topology.mask()
        weight.grad.mul_(mask)
        before = weight.grad.clone()
        clip_dense_units_(weight)
        clipped += int((before != weight.grad).sum())
        torch.testing.assert_close(module.values.grad, weight.grad[mask], rtol=0, atol=1e-9)
    assert clipped


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_unitwise_norms_of_odd_layers(dtype):
    empty = SparseLinear(3, 4, mask=torch.zeros(4, 3, dtype=torch.bool), dtype=dtype)
    assert unitwise_norm(empty, empty.values).shape == (0,)
    layer = SparseLinear(3, 2, mask=torch.tensor([[False] * 3, [True] * 3]), dtype=dtype)
    big = torch.full((3,), 300.0, dtype=dtype)  # whose squares overflow in half precision
    torch.testing.assert_close(
        unitwise_norm(layer, big), torch.full((3,), 300 * 3**0.5, dtype=dtype)
    )
    with pytest.raises(ShapeError, match=r"entries: expected shape \[3\].*got \[2\]"):
        unitwise_norm(layer, big[:2])


def test_the_norm_of_values_is_that_of_the_weight():
    layer = SparseConv2d(4, 6, 3, sparsity=0.7).double()
    assert torch.allclose(layer.values.norm(), layer.dense_weight().norm(), rtol=0, atol=1e-12)
