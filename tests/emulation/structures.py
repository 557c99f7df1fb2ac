"""What several tests check: topologies of masks, and what is not finite next to padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import sparsekd as skd
from sparsekd import Topology, functional
from sparsekd.ops.dispatch import backends
from sparsekd.testing import LayerCase, relative_error


def random_mask(rows: int, cols: int, density: float, seed: int = 0) -> Tensor:
    """Return a mask with an empty row and an empty column, unless it is full."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=generator) < density
    if density < 1:
        mask[rows // 2 : rows // 2 + 1] = False
        mask[:, cols // 3 : cols // 3 + 1] = False
    return mask


def assert_topology_says_what_the_mask_does(mask: Tensor) -> None:
    """Compare the indices of a mask's topology and of its transpose, dtypes included."""
    topology = Topology.from_mask(mask)
    matrix = mask.reshape(mask.shape[0], math.prod(mask.shape[1:]))
    assert_indices(topology.crow_indices, starts_of(matrix))
    assert_indices(topology.col_indices, matrix.nonzero()[:, 1])
    transposed = topology.transpose()
    slots = torch.zeros(matrix.shape, dtype=torch.int64, device=mask.device)
    slots[matrix] = torch.arange(topology.nnz, device=mask.device)
    assert_indices(transposed.crow_indices, starts_of(matrix.T))
    assert_indices(transposed.col_indices, matrix.T.nonzero()[:, 1])
    assert_indices(transposed.permutation, slots.T[matrix.T])


def assert_indices(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.int32
    assert found.device == expected.device
    assert torch.equal(found, expected.int())


def starts_of(matrix: Tensor) -> Tensor:
    """Return where each row of a mask starts in the list of its nonzeros."""
    ends = matrix.sum(1).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def assert_padding_meets_nothing(
    case: LayerCase, value: float, limit: float, backend: str = "cuda"
) -> None:
    """Compare with the CPU what a number that is not finite reaches, at borders of the maps."""
    topology, values, x, bias = case.tensors()
    product = functional.conv2d if case.kernel_size else functional.linear
    y = product(topology, values, x, bias, **case.options)
    grad = torch.linspace(-1, 1, y.numel(), dtype=x.dtype).view(y.shape)
    operands = {"values": values, "x": x, "grad": grad, "bias": bias}
    for spoilt in [name for name, tensor in operands.items() if tensor is not None]:
        found = {}
        for name in ("cpp", backend):
            given = {key: None if t is None else t.clone() for key, t in operands.items()}
            for corner in (0, -1):
                given[spoilt][(corner,) * given[spoilt].ndim] = value
            leaves = [given["values"].requires_grad_(), given["x"].requires_grad_()]
            with skd.backend(name):
                y = product(topology, *leaves, given["bias"], **case.options)
                found[name] = [y, *torch.autograd.grad(y, leaves, given["grad"])]
        assert not all(result.isfinite().all() for result in found["cpp"])
        for ours, expected in zip(found[backend], found["cpp"], strict=True):
            assert torch.equal(ours.isnan(), expected.isnan()), spoilt
            assert torch.equal(ours.isinf(), expected.isinf()), spoilt
            same = expected.isfinite()
            assert relative_error(ours[same], expected[same].double()) < limit


def assert_corrects_what_is_not_finite() -> None:
    """Give results to correct to the backend "cuda": wrong ones stay where all of them is finite.

    Whether that is so is found out by the kernels; the call is the same.
    """
    cuda = backends.module("cuda")
    structure = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 2, 1]).int()
    x, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([10.0, 20.0, 30.0])
    grad, shape = torch.tensor([[1.0, -1.0]]), [2, 3]
    for op, args, right in (
        ("linear", (x, values, *structure, None, shape), [[70.0, 60.0]]),
        ("linear_dgrad", (grad, values, *structure, shape), [[10.0, -30.0, 20.0]]),
        ("linear_wgrad", (grad, x, *structure, shape), [1.0, 3.0, -2.0]),
    ):
        for wrong in (5.0, math.nan, math.inf):
            result = torch.full_like(torch.tensor(right), 5.0)
            result.view(-1)[-1] = wrong
            before = result.clone()
            corrected = getattr(cuda, op)(*args, correct=result)
            assert corrected.data_ptr() == result.data_ptr()
            assert torch.equal(corrected, before if wrong == 5.0 else torch.tensor(right)), op
