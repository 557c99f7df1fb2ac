"""SRigL: RigL under which all neurons of a layer keep one fan-in, and weak ones are ablated."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.csr import row_indices
from sparsekd.dst import growers, scores
from sparsekd.dst.dynamics import check_fraction
from sparsekd.dst.rigl import RigL
from sparsekd.dst.tile_grid import LayerUpdate


class SRigL(RigL):
    """RigL with the same number of weights in every active neuron of a layer.

    An update finds the weights that RigL would keep and those it would grow: the salient ones. A
    neuron with fewer of them than `min_salient` of the fan-in is ablated, all its weights going to
    the others; every other neuron gets its largest kept weights, then its largest gradients, up to
    the one fan-in for which the layer is on target. The layer's number of weights is below its
    target by less than the number of active neurons, since a fan-in is whole.

    Neurons are rows: output channels or output features. Start from `layout="fanin"`, which holds
    the fan-in constant, or from any masks: the first update arrives at a constant fan-in. In a
    layout with tiles a neuron is a group of rows that share their tiles, and all counts are of
    tiles.

    Args:
        model: holds sparse modules; the last one is never ablated.
        optimizer: holds their values.
        min_salient: smallest share of the fan-in that keeps a neuron, in [0, 1]; 0 ablates none.
        **options: `drop_fraction`, `every`, `until`, `seed` and `skip_sgd_on_update` of `RigL`.

    Raises:
        ValueError: an argument is out of range, or `model` has no sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Dynamic Sparse Training with Structured Sparsity (arXiv 2305.02299), section 3.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.SRigL(layer, opt, drop_fraction=0.5, every=1, until=10)
        >>> layer(torch.rand(2, 8)).square().sum().backward()
        >>> dst.step(), layer.topology.mask().sum(1).tolist()
        (True, [4, 4, 4, 4])
    """

    layouts: ClassVar[tuple[str, ...]] = ("csr", "bcsr", "fanin")
    ablates = True
    saved = ("targets",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        min_salient: float = 0.3,
        until: int,
        **options: Any,
    ) -> None:
        check_fraction(min_salient=min_salient)
        self.min_salient = min_salient
        super().__init__(model, optimizer, until=until, **options)
        self.targets = {name: self.grid(name).tiles.nnz for name in self.modules}

    def plan(self, fraction: float) -> dict[str, Tensor]:
        """Return the new mask of each layer that can change, by name."""
        return {
            name: self._constant_fan_in(name, math.floor(fraction * self.grid(name).tiles.nnz))
            for name, module in self.layers().items()
            if self.has_gradient(name) and 0 < module.topology.nnz < module.topology.numel
        }

    def _constant_fan_in(self, name: str, k: int) -> Tensor:
        grid = self.grid(name)
        topology, gradient = grid.tiles, self._magnitude(name)
        magnitude = self.tile_score(name)
        kept = scores.without(topology, scores.smallest(magnitude, k))
        grown = growers.largest(gradient, kept, k)
        rows = torch.cat([row_indices(kept.crow_indices, kept.nnz), grown // topology.cols])
        salient = torch.bincount(rows, minlength=topology.rows)

        active = self._active_neurons(name, salient)
        fan_in = self.targets[name] // int(active.sum())
        # Rank the columns of each row: kept weights by magnitude, then the others by gradient.
        stay = kept.mask().view_as(gradient)
        weight = torch.full_like(gradient, -1.0, dtype=magnitude.dtype).view(-1)
        weight[topology.flat_indices()] = magnitude
        weight = weight.view_as(gradient).where(stay, -1.0)
        order = gradient.sort(dim=1, descending=True, stable=True).indices
        by_weight = weight.gather(1, order).sort(dim=1, descending=True, stable=True).indices
        chosen = order.gather(1, by_weight)[:, :fan_in]
        mask = torch.zeros_like(stay).scatter_(1, chosen, True) & active[:, None]

        new, old = mask.view(-1), topology.mask().view(-1)
        moved = ((old & ~new).nonzero().squeeze(1), (new & ~old).nonzero().squeeze(1))
        dropped, come = (int(grid.areas(positions).sum()) for positions in moved)
        self.last_update[name] = LayerUpdate(dropped, come, 0)
        return grid.expand(mask.view(topology.shape))

    def _magnitude(self, name: str) -> Tensor:
        """Return |gradient| of every tile, `[rows, columns]` of the grid."""
        if self.grid(name).single:
            return self.gradient(name).abs_()
        ((_, _, pooled),) = self.gradient_blocks(name)
        return pooled

    def _active_neurons(self, name: str, salient: Tensor) -> Tensor:
        """Mark the rows that stay active, by the number of salient weights of each."""
        topology, target = self.grid(name).tiles, self.targets[name]
        fan_in = target / max(int(topology.crow_indices.diff().count_nonzero()), 1)
        active = salient >= max(1.0, self.min_salient * fan_in)
        if name == next(reversed(self.modules)):
            active = torch.ones_like(active)
        # At least as many rows as can hold the layer, at most as many as it has weights.
        least, most = -(-target // topology.cols), min(target, topology.rows)
        number = min(max(int(active.sum()), least), most)
        best = salient.sort(descending=True, stable=True).indices[:number]
        return torch.zeros_like(active).index_fill_(0, best, True)
