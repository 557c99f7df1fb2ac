"""Norms of the units of a sparse weight, for rules that clip or scale unit by unit."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekd.errors import ShapeError
from sparsekd.nn import SparseModule


def unitwise_norm(module: SparseModule, entries: Tensor) -> Tensor:
    """Compute, for each nonzero, the 2-norm of its unit: the row of the weight it belongs to.

    Adaptive gradient clipping and other per-unit rules take this norm over all but the first
    dimension of a dense weight. Rules with one norm per layer need no help: the norm of `values` is
    that of the weight.

    Args:
        module: the sparse layer.
        entries: one number per nonzero: `values`, their gradient, a momentum.

    Shape:
        - entries: `[nnz]`
        - result: `[nnz]`, equal within a row

    Raises:
        ShapeError: `entries` does not have one entry per nonzero.

    Source: Brock et al., High-Performance Large-Scale Image Recognition Without Normalization
        (arXiv 2102.06171), section 4.

    Example:
        >>> import sparsekd as skd
        >>> layer = skd.nn.SparseLinear(2, 2, mask=torch.tensor([[True, True], [False, True]]))
        >>> unitwise_norm(layer, torch.tensor([3.0, 4.0, 2.0])).tolist()
        [5.0, 5.0, 2.0]
    """
    topology = module.topology
    if entries.shape != (topology.nnz,):
        raise ShapeError(
            f"entries: expected shape [{topology.nnz}], one entry per nonzero, "
            f"got {list(entries.shape)}"
        )
    rows = torch.arange(topology.rows, device=topology.device)
    row_of = rows.repeat_interleave(topology.crow_indices.diff()).to(entries.device)
    # In double, since squares of half precision overflow.
    squares = torch.zeros(topology.rows, dtype=torch.float64, device=entries.device)
    squares.index_add_(0, row_of, entries.detach().double().square())
    return squares.sqrt()[row_of].to(entries.dtype)
