"""What the compiled kernels do with the tensors they are lent: read them, and leave them alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsekd as skd
from sparsekd.errors import UnsupportedError
from sparsekd.nn import SparseConv2d, SparseLinear, densify

pytest.importorskip("sparsekd._C")


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    layers = [SparseConv2d(4, 8, 3, padding=1, sparsity=0.5, seed=0), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, SparseLinear(128, 5, sparsity=0.5, seed=1)).to(dtype)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return what FSDP shards; indices stay whole, and are immutable."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*model.parameters(), *gradients]


@pytest.mark.parametrize("kernels", ["cpp", "dense", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_storages_stay_resizable(kernels, dtype):
    model = network(dtype)
    x = torch.randn(2, 4, 4, 4, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = skd.dst.RigL(model, optimizer, every=1, until=9)
    with skd.backend(kernels):
        y = model(x)
        y.sum().backward()
        updater.step()
    for tensor in [x, x.grad, y, *tensors_of(model)]:
        assert tensor.untyped_storage().resizable()


def test_storages_of_norms_stay_resizable():
    ops = torch.ops.sparsekd
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    weight, bias = torch.ones(3), torch.zeros(3)
    with skd.backend("cpp"):
        mean, var = ops.batch_moments(x)
        y = ops.norm_act(x, residual, weight, bias, mean, var, 1e-5, True, False)
        results = ops.norm_act_backward(y, x, y, weight, bias, mean, var, 1e-5, True, False, True)
    for tensor in [x, residual, weight, bias, mean, var, y, *results]:
        assert tensor.untyped_storage().resizable()


@pytest.mark.parametrize("offset", [0, 7])
def test_a_freed_storage_is_refused(offset):
    layer = SparseLinear(16, 8, sparsity=0.5, seed=0)
    x = torch.randn(3, 16)
    layer(x)  # checked, chosen and planned
    flat = torch.zeros(layer.values.numel() + offset)
    layer.values.data = flat[offset:]
    flat.untyped_storage().resize_(0)
    with skd.backend("cpp"), pytest.raises(UnsupportedError, match="storage has been freed"):
        layer(x)


def test_a_lazily_negated_input_is_refused_or_right():
    layer = SparseLinear(16, 8, sparsity=0.5, seed=0).double()
    twin = densify(copy.deepcopy(nn.Sequential(layer)))
    x = torch.randn(3, 16, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    with skd.backend("cpp"), pytest.raises(UnsupportedError, match="negative bit"):
        layer(x)
    torch.testing.assert_close(layer(x.resolve_neg()), twin(x), rtol=0, atol=1e-12)


def test_other_objects_than_tensors_are_refused():
    import sparsekd._C as kernels

    layer = SparseLinear(16, 8, sparsity=0.5, seed=0)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        kernels.release(layer.crow_indices.tolist(), layer.col_indices)
    with pytest.raises(UnsupportedError, match="expected a tensor on the CPU"):
        kernels.release(layer.crow_indices.to("meta"), layer.col_indices)
