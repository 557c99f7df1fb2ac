"""Sparse networks from scratch: grow where a running mean of the dense gradient is largest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import growers
from sparsekd.dst.dynamics import check_fraction
from sparsekd.dst.gradients import NonFiniteGradient
from sparsekd.dst.redistribution import Counts, check_equal_tiles, mean_magnitude, redistribute
from sparsekd.dst.set import SET
from sparsekd.ops.growth import Block
from sparsekd.topology import Topology


class SNFS(SET):
    """SNFS: the smallest weights move to the largest momentum of the dense gradient.

    Each layer's dense gradient is computed on every iteration up to `until` and averaged:
    `m = momentum m + (1 - momentum) g`. That, and one dense tensor per layer, is the cost of the
    method; the layers themselves stay sparse. A gradient that is not finite leaves the mean as it
    was. With a GradScaler the mean is of scaled gradients, which the scale's rare changes disturb.

    Args:
        model: holds sparse modules.
        optimizer: holds their values; its own momentum is another, and starts at 0 for grown
            weights.
        momentum: of the running mean, in [0, 1].
        redistribute: share growth between layers by the mean |m| over each layer's weights,
            instead of keeping every layer's size.
        **options: `drop_fraction`, `every`, `until`, `seed` and `skip_sgd_on_update` of `SET`.

    Raises:
        ValueError: an argument is out of range, or `model` has no sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Sparse Networks from Scratch (arXiv 1907.04840); with a mean of its own and without
        redistribution as the baseline of Rigging the Lottery (arXiv 1911.11134).

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.SNFS(layer, opt, drop_fraction=0.5, every=1, until=10)
        >>> layer(torch.rand(2, 8)).square().sum().backward()
        >>> dst.step(), layer.topology.nnz, dst.mean[""].shape
        (True, 16, torch.Size([4, 8]))
    """

    needs_gradient = True
    saved = ("mean",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        momentum: float = 0.9,
        redistribute: bool = False,
        until: int,
        **options: Any,
    ) -> None:
        check_fraction(momentum=momentum)
        self.momentum, self.redistribute, self.until = momentum, redistribute, until
        self.mean: dict[str, Tensor] = {}
        super().__init__(model, optimizer, until=until, **options)
        if redistribute:
            check_equal_tiles(f"{type(self).__name__} with redistribute=True", self.modules)

    def step(self) -> bool:
        """Average this iteration's gradients, then run `Updater.step`."""
        self._gradients.settle()
        for name in self.layers():
            if super().has_gradient(name):
                self._average(name)
        return super().step()

    def counts(self, fraction: float) -> Counts:
        """Return, for each layer, how many weights are dropped and grown."""
        if not self.redistribute:
            return super().counts(fraction)
        part = {name: m.topology for name, m in self.layers().items() if name in self.mean}
        return redistribute(
            {name: self.grid(name).tiles.nnz for name in part},
            {name: self.grid(name).tiles.numel for name in part},
            {n: mean_magnitude(self.mean[n].view(-1)[t.flat_indices()]) for n, t in part.items()},
            fraction,
        )

    def grow(self, name: str, kept: Topology, k: int) -> Tensor:
        """Return the `k` positions outside `kept` where the mean is largest in magnitude."""
        return growers.largest(self._magnitude(name), kept, k)

    def ranking(self, name: str) -> Iterable[Block]:
        """Yield the magnitude of the mean of every tile."""
        yield 0, 0, self._magnitude(name)

    def has_gradient(self, name: str) -> bool:
        """Return whether layer `name` has taken part in a backward pass yet."""
        return name in self.mean

    def _magnitude(self, name: str) -> Tensor:
        mean = self.mean[name]
        return self.grid(name).pool_magnitude([(0, 0, mean)], mean)

    def collects(self, iteration: int) -> bool:
        return iteration < self.until

    @torch.no_grad()
    def _average(self, name: str) -> None:
        try:
            gradient = self.gradient(name)
        except NonFiniteGradient:
            return
        if name not in self.mean:
            self.mean[name] = torch.zeros_like(gradient)
        self.mean[name].lerp_(gradient, 1 - self.momentum)
