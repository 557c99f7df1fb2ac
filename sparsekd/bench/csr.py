"""torch's own CSR tensors as a training layer: products by MKL, the weight gradient sampled."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekd.bench.cases import LayerCase
from sparsekd.csr import TransposedCSR
from sparsekd.topology import Topology


class _Product(torch.autograd.Function):
    """Product of a CSR matrix and a dense one; `torch.mm` would make its weight gradient dense."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, topology: Topology) -> Tensor:
        ctx.save_for_backward(values, x)
        ctx.topology = topology
        return _matrix(topology, values) @ x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        values, x = ctx.saved_tensors
        grad = grads[0].contiguous()
        structure = ctx.topology.transpose()
        shape = (ctx.topology.cols, ctx.topology.rows)
        transposed = _csr(structure, values[structure.permutation], shape)
        pattern = _matrix(ctx.topology, torch.zeros_like(values))
        sampled = torch.sparse.sampled_addmm(pattern, grad, x.T, beta=0.0)
        return sampled.values(), transposed @ grad, None


def _matrix(topology: Topology, values: Tensor) -> Tensor:
    return _csr(topology, values, (topology.rows, topology.cols))


def _csr(structure: Topology | TransposedCSR, values: Tensor, shape: tuple[int, int]) -> Tensor:
    indices = (structure.crow_indices, structure.col_indices)
    return torch.sparse_csr_tensor(*indices, values, shape, check_invariants=False)


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
