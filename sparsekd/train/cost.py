"""Operations of training while the topology changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparsekd.diagnose import flops
from sparsekd.dst import Method
from sparsekd.nn import sparse_modules
from sparsekd.train.metrics import Row


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


def growth_epochs(method: Method, rows: Sequence[Row], steps: int, until: float) -> float:
    """Count the dense gradients of a run, in epochs' worth of images.

    Args:
        method: says when it forms them.
        rows: of the run's epochs.
        steps: of an epoch.
        until: share of the run after which the topology rests.

    Example:
        >>> from sparsekd.dst import METHODS
        >>> growth_epochs(METHODS["rigl"], [{"updates": 3}, {"updates": 2}], steps=10, until=0.75)
        0.5
    """
    match method.dense_gradients:
        case "steps":
            return len(rows) * until
        case "updates":
            return sum(row["updates"] for row in rows) / steps
    return 0.0
