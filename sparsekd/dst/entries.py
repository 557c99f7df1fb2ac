"""What a dense gradient has to be at the nonzeros: the gradient of a layer's values."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekd.csr import row_indices
from sparsekd.dst import replicas
from sparsekd.topology import Topology

AGREE = 2.0**-7
"""Relative error up to which exchanged gradients are taken for the mean: half precision's, as
communication hooks compress to it."""


FEW = 8
"""Entries below which two gradients may be multiples of each other by chance."""


class Entries:
    """The entries of a dense gradient at the nonzeros, `values.grad`, and how to bring it there.

    Besides what the loop does to `.grad`, which `Passes` follows, a hook of the values may have
    scaled what the passes added to it. A term that depends on the values alone, such as weight
    decay in the loss, adds to the entries and leaves the rest of the gradient as it is. Under
    `torch.distributed` the collective that averages all of it is part of making this.

    Args:
        topology: of the layer.
        grad: of its values.
        left: what the backward passes of this process have left in it.
        added: the entries of the gradient that is made of their operands.
    """

    def __init__(self, topology: Topology, grad: Tensor, left: Tensor, added: Tensor) -> None:
        self._row = row_indices(topology.crow_indices, topology.nnz)
        self._col = topology.col_indices.long()
        self.values, self.foreign = grad.detach(), False
        if replicas.several():
            everything = torch.stack([t.detach().double() for t in (grad, left, added)])
            self.values, left, added = replicas.mean_(everything)
            self.foreign = _factor(self.values, left) is None
        factor = _factor(self.values, added) if topology.nnz >= FEW else None
        if factor is None and replicas.several():
            factor = _factor(self.values, left)
        self.factor = 1.0 if factor is None or abs(factor - 1) <= AGREE else factor

    def write_into(self, row: int, col: int, block: Tensor) -> None:
        """Bring a rectangle of the gradient that the passes have added up to what `.grad` says."""
        if self.factor != 1.0:
            block.mul_(self.factor)
        rows, cols = self._row - row, self._col - col
        inside = (rows >= 0) & (rows < block.shape[0]) & (cols >= 0) & (cols < block.shape[1])
        block[rows[inside], cols[inside]] = self.values[inside].to(block.dtype)


def _factor(grad: Tensor, of: Tensor) -> float | None:
    """Return the factor from one gradient to another, None where it is no multiple of it."""
    grad, of = grad.double(), of.double()
    length = float(of.norm())
    if not length:
        return None if bool(grad.any()) else 1.0
    factor = float(torch.dot(grad / length, of / length))
    near = float((grad - factor * of).norm()) <= AGREE * float(grad.norm())
    return factor if near and factor else None
