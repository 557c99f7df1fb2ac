"""Transforms of torch.func on whole models, against their dense twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, stack_module_state, vmap

import sparsekd as skd

pytestmark = pytest.mark.usefixtures("no_missing_rules")


def double(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    """A small network of both layers; its norm and ReLU run as one op in the sparse form."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(6) if norm else nn.GroupNorm(2, 6)
        self.mix = nn.Conv2d(6, 4, 3, stride=2, groups=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x))).tanh()
        return self.head(self.mix(y).mean((-2, -1)))


def pair(seed: int = 0, norm: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    sparse = skd.sparsify(Net(norm).double(), 0.6, seed=seed)
    return sparse, skd.densify(copy.deepcopy(sparse))


def at_nonzeros(model: nn.Module, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients of the dense model under the names and in the form of the sparse one."""
    result = dict(grads)
    for name, module in skd.nn.sparse_modules(model):
        weight = result.pop(f"{name}.weight")
        flat = weight.flatten(weight.ndim - len(module.weight_shape))
        result[f"{name}.values"] = flat[..., module.topology.flat_indices()]
    return result


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x[None],)), target[None])

    return loss


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_gradients_of_each_sample() -> None:
    sparse, dense = pair()
    x, target = double(5, 2, 6, 6, seed=1), torch.tensor([0, 1, 2, 0, 1])
    got, expected = (
        vmap(grad(loss_of(model)), (None, 0, 0))(parameters(model), x, target)
        for model in (sparse, dense)
    )
    expected = at_nonzeros(sparse, expected)
    assert_equal({k: got[k] for k in sorted(got)}, {k: expected[k] for k in sorted(expected)})


def test_the_tangent_kernel_of_a_model() -> None:
    sparse, dense = pair()
    x = double(4, 2, 6, 6, seed=1)

    def tangent_kernel(model: nn.Module, jacobian: Callable[..., Any]) -> Tensor:
        params = parameters(model)
        each = vmap(jacobian(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0))
        rows = each(params, x)
        if model is dense:
            rows = at_nonzeros(sparse, rows)
        flat = torch.cat([rows[k].flatten(2) for k in sorted(rows)], -1)
        return torch.einsum("nop,mqp->nomq", flat, flat)

    expected = tangent_kernel(dense, jacrev)
    assert_equal(tangent_kernel(sparse, jacrev), expected)
    assert_equal(tangent_kernel(sparse, jacfwd), expected)


def test_an_ensemble_of_models_of_different_topology() -> None:
    pairs = [pair(seed) for seed in range(3)]
    base = copy.deepcopy(pairs[0][0]).to("meta")
    params, buffers = stack_module_state([sparse for sparse, _ in pairs])
    x = double(4, 2, 6, 6, seed=1)

    def call(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(base, (params, buffers), (x,))

    got = vmap(call, (0, 0, None))(params, buffers, x)
    assert_equal(got, torch.stack([dense(x) for _, dense in pairs]))


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_gradients_through_a_fused_norm(training: bool) -> None:
    sparse, dense = pair(norm=True)
    skd.optimize(sparse)
    results = []
    for model in (sparse.train(training), dense.train(training)):
        x = double(3, 2, 6, 6, seed=1).requires_grad_()
        params = dict(model.named_parameters())
        y = model(x)
        vectors = double(4, *y.shape, seed=2)
        for create_graph in (False, True):
            found = torch.autograd.grad(
                y, [x, *params.values()], vectors,
                is_grads_batched=True, retain_graph=True, create_graph=create_graph,
            )  # fmt: skip
            grads = dict(zip(["x", *params], found, strict=True))
            grads = grads if model is sparse else at_nonzeros(sparse, grads)
            results.append({k: grads[k].detach() for k in sorted(grads)})
    assert_equal(results[:2], results[2:])
