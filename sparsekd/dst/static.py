"""A fixed topology: the baseline of every dynamic method."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst.base import Updater
from sparsekd.dst.dynamics import never
from sparsekd.layouts import LAYOUTS


class Static(Updater):
    """Training with a fixed topology; `step()` always returns False.

    Args:
        model: holds sparse modules.
        optimizer: holds their values.
        **unused: arguments of the dynamic methods, so that methods are interchangeable.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> skd.dst.Static(layer, torch.optim.SGD(layer.parameters(), lr=0.1)).step()
        False
    """

    layouts = LAYOUTS

    def __init__(self, model: nn.Module, optimizer: Optimizer, **unused: object) -> None:
        super().__init__(model, optimizer, schedule=never)

    def plan(self, fraction: float) -> dict[str, Tensor]:
        """Change no layer, whatever the schedule: the cycles of Sup-tickets bring their own."""
        return {}
