"""RigL: drop the smallest weights, grow where the dense gradient is largest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from sparsekd.dst import growers
from sparsekd.dst.dynamics import Dynamics
from sparsekd.dst.set import SET
from sparsekd.ops.growth import Block
from sparsekd.topology import Topology


class RigL(SET):
    """RigL: the smallest weights of each layer move to the largest gradients.

    The gradient is the dense one whose entries at the nonzeros are `values.grad` (of all backward
    passes since the gradients were zeroed), before the drop. It is computed on update iterations
    only, tile by tile, and never stored for a whole layer: only the best candidates of each tile
    are kept. A layer that took no part in the backward pass does not change.

    Args:
        model: holds sparse modules.
        optimizer: holds their values.
        drop_fraction: fraction of a layer's weights to move at the start, in [0, 1].
        every: iterations from one update to the next.
        until: the first iteration without updates, usually 75 % of all iterations.
        seed: unused by RigL itself; seeds the generator that subclasses draw from.
        skip_sgd_on_update: whether an update takes the place of the optimizer step.

    Raises:
        ValueError: an argument is out of range, or `model` has no sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Rigging the Lottery (arXiv 1911.11134), algorithm 1.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.RigL(layer, opt, drop_fraction=0.5, every=1, until=10)
        >>> layer(torch.rand(2, 8)).square().sum().backward()
        >>> dst.step(), layer.topology.nnz
        (True, 16)
    """

    published: ClassVar[Dynamics] = Dynamics()
    needs_gradient = True

    def grow(self, name: str, kept: Topology, k: int) -> Tensor:
        """Return the `k` positions outside `kept` where the gradient is largest in magnitude."""
        return growers.largest_magnitude(self.gradient_blocks(name), kept, k)

    def ranking(self, name: str) -> Iterable[Block]:
        """Yield the gradient of every tile."""
        return self.gradient_blocks(name)
