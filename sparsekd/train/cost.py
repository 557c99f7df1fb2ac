"""What training costs in operations while the topology changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparsekd import flops
from sparsekd.nn import sparse_modules


class StepCost:
    """Tell at any moment how many operations a network takes to train on an image.

    Counted as in `sparsekd.flops.count`: three forward passes. What forms dense gradients for
    growth, and a teacher, comes on top.

    Args:
        model: the network; `per_image` reads the topology it then has.
        image_shape: channels, height, width.

    Example:
        >>> import sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> StepCost(layer, (8,)).per_image()
        96
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        sparse, count = dict(sparse_modules(model)), flops.count(model, (1, *image_shape))
        self._fixed = sum(3 * layer.flops for layer in count.layers if layer.name not in sparse)
        self._moving = [
            (6 * layer.positions, sparse[layer.name])
            for layer in count.layers
            if layer.name in sparse
        ]

    def per_image(self) -> int:
        """Return the operations of a forward and backward pass with the topology as it is."""
        return self._fixed + sum(cost * module.topology.nnz for cost, module in self._moving)
