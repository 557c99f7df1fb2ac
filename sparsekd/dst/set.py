"""Sparse evolutionary training: drop the smallest weights, grow at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import growers
from sparsekd.dst.base import Updater
from sparsekd.dst.dynamics import Dynamics, cosine
from sparsekd.layouts import LAYOUTS
from sparsekd.ops.growth import Block
from sparsekd.topology import Topology


class SET(Updater):
    """SET: the smallest weights of each layer are replaced by random others.

    Each layer keeps its number of nonzeros exactly. The fraction that is replaced falls from
    `drop_fraction` to 0 along a cosine.

    Args:
        model: holds sparse modules.
        optimizer: holds their values.
        drop_fraction: fraction of a layer's weights to replace at the start, in [0, 1].
        every: iterations from one update to the next.
        until: the first iteration without updates, usually 75 % of all iterations.
        seed: of the random growth.
        skip_sgd_on_update: whether an update takes the place of the optimizer step.

    Raises:
        ValueError: an argument is out of range, or `model` has no sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Sparse Evolutionary Training (arXiv 1707.04780), algorithm 1, with the magnitude drop
    and the cosine of the baseline in Rigging the Lottery (arXiv 1911.11134).

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.SET(layer, opt, drop_fraction=0.5, every=1, until=10)
        >>> dst.step(), layer.topology.nnz
        (True, 16)
    """

    layouts: ClassVar[tuple[str, ...]] = LAYOUTS

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        drop_fraction: float = Dynamics.drop_fraction,
        every: int = Dynamics.every,
        until: int,
        seed: int = 0,
        skip_sgd_on_update: bool = True,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            schedule=cosine(drop_fraction, every, until),
            seed=seed,
            skip_sgd_on_update=skip_sgd_on_update,
        )

    def grow(self, name: str, kept: Topology, k: int) -> Tensor:
        """Draw `k` positions outside `kept`; all sets of them are equally likely."""
        return growers.random(kept, k, self.generator)

    def ranking(self, name: str) -> Iterable[Block]:
        """Yield a random number for every tile."""
        yield growers.noise(self.grid(name).tiles, self.generator)
