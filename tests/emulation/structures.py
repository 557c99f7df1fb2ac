"""Hold what topologies say of a mask against the plain reading of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekd import Topology


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
