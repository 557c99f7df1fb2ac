"""Operations of training while the topology changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparsekd.diagnose import flops
from sparsekd.nn import sparse_modules


class StepCost:
    """Operations of a training step per image, for a network whose topology may change.

    Counted as in `sparsekd.flops.count`: three times the forward pass. Dense gradients for growth
    and the passes of a teacher are not included.

    Args:
        model: the network; `per_image` reads its current topology.
        image_shape: channels, height, width.

    Example:
        >>> import sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> StepCost(layer, (8,)).per_image()
        96
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        self._count = flops.count(model, (1, *image_shape))
        counted = {layer.name for layer in self._count.layers}
        self._sparse = {name: m for name, m in sparse_modules(model) if name in counted}
        self._nnz: dict[str, int] = {}
        self._train = self._count.train

    def per_image(self) -> int:
        """Count the operations of forward and backward with the current topology."""
        nnz = {name: module.topology.nnz for name, module in self._sparse.items()}
        if nnz != self._nnz:
            self._nnz, self._train = nnz, self._count.at(nnz).train
        return self._train
