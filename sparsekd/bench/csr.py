"""torch's own CSR tensors as a training layer: products by MKL, the weight gradient sampled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekd.bench.cases import LayerCase
from sparsekd.topology import Topology


class _Product(torch.autograd.Function):
    """Product of a CSR matrix and a dense one; `torch.mm` would make its weight gradient dense."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, topology: Topology) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.topology = topology
        return _matrix(topology.crow_indices, topology.col_indices, values, topology) @ x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        values, x = ctx.saved_tensors
        grad = grads[0].contiguous()
        transposed = ctx.topology.transpose()
        turned = torch.sparse_csr_tensor(
            transposed.crow_indices,
            transposed.col_indices,
            values[transposed.permutation],
            (ctx.topology.cols, ctx.topology.rows),
            check_invariants=False,
        )
        pattern = _matrix(
            ctx.topology.crow_indices, ctx.topology.col_indices, torch.zeros_like(values),
            ctx.topology,
        )  # fmt: skip
        sampled = torch.sparse.sampled_addmm(pattern, grad, x.T, beta=0.0)
        return sampled.values(), turned @ grad, None


def _matrix(crow: Tensor, col: Tensor, values: Tensor, topology: Topology) -> Tensor:
    shape = (topology.rows, topology.cols)
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def missing(case: LayerCase) -> str | None:
    """Return why torch's CSR cannot run a layer here, None if it can."""
    if not torch.backends.mkl.is_available():
        return "this build of torch has no MKL, which its CSR products need"
    if case.kernel > 1:
        return "a kernel of 3x3 by unfolding copies its input nine times"
    return None


def layer(
    weight: Tensor, x: Tensor, grad: Tensor, stride: int, padding: int
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """Build a linear layer or a 1x1 convolution on a CSR weight, for `layers.foreign`."""
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    topology = Topology.from_mask(weight != 0)
    values = weight.reshape(-1)[topology.flat_indices()].requires_grad_()

    def linear(x: Tensor) -> Tensor:
        return _Product.apply(values, x.T.contiguous(), topology).T

    def conv(x: Tensor) -> Tensor:
        columns = x[:, :, ::stride, ::stride].transpose(0, 1).reshape(topology.cols, -1)
        y = _Product.apply(values, columns, topology)
        return y.view(len(weight), len(x), *grad.shape[2:]).transpose(0, 1)

    return linear if weight.ndim == 2 else conv, values, torch.arange(topology.nnz)
