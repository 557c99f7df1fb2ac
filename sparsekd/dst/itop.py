"""In-time over-parameterization: the weights that were ever active, and growth of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import growers, replicas
from sparsekd.dst.dynamics import Dynamics
from sparsekd.dst.set import SET
from sparsekd.nn import sparse_modules
from sparsekd.ops.growth import Block
from sparsekd.topology import Topology


class Exploration:
    """A record of the weights that have been active at least once.

    `rate` is R_s of the paper: the density at first, never falling, 1 when every weight has been
    tried. Call `record()` after each step of any method; only layers that were rewired cost work.

    Args:
        model: holds sparse modules.

    Source: Do We Actually Need Dense Over-Parameterization? (arXiv 2102.02887), section 3.

    Example:
        >>> import sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.75, seed=0)
        >>> explored = skd.dst.Exploration(layer)
        >>> delta = layer.rewire(~layer.topology.mask())
        >>> explored.record()
        >>> explored.rate
        1.0
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(sparse_modules(replicas.unwrap(model)))
        self._seen = {name: module.topology for name, module in self._modules.items()}
        self.fired = {name: topology.mask() for name, topology in self._seen.items()}

    def record(self) -> None:
        """Add the weights that are active now."""
        for name, module in self._modules.items():
            topology = module.topology
            if topology is not self._seen[name]:
                self.fired[name] |= topology.mask()
                self._seen[name] = topology

    @property
    def rate(self) -> float:
        """Share of all weights that have been active at least once."""
        numel = sum(mask.numel() for mask in self.fired.values())
        return sum(int(mask.sum()) for mask in self.fired.values()) / max(numel, 1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks of weights that have been active, by layer."""
        return {name: mask.clone() for name, mask in self.fired.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with masks from `state_dict()`."""
        for name, mask in self.fired.items():
            mask.copy_(state[name])


class ITOP(SET):
    """SET that grows positions which were never active first, at random.

    The defaults are the paper's advice for SET on CIFAR at batch size 128: long intervals, a high
    drop fraction that falls slowly, updates to the end. `explored.rate` is the share explored so
    far.

    Args:
        model: holds sparse modules.
        optimizer: holds their values.
        drop_fraction: fraction of a layer's weights to replace at the start, in [0, 1].
        every: iterations from one update to the next.
        until: the first iteration without updates, usually that after the last.
        **options: `seed` and `skip_sgd_on_update` of `SET`.

    Raises:
        ValueError: an argument is out of range, or `model` has no sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Do We Actually Need Dense Over-Parameterization? (arXiv 2102.02887), growth mode
        "random_unfired" of its code.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.75, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.ITOP(layer, opt, drop_fraction=1.0, every=1, until=10**9)
        >>> rates = [dst.explored.rate for _ in range(5) if dst.step() or True]
        >>> rates
        [0.5, 0.75, 1.0, 1.0, 1.0]
    """

    published: ClassVar[Dynamics] = Dynamics(drop_fraction=0.5, every=1500, until=1.0)
    saved = ("fired",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        drop_fraction: float = published.drop_fraction,
        every: int = published.every,
        until: int,
        **options: Any,
    ) -> None:
        self.explored = Exploration(model)
        super().__init__(
            model, optimizer, drop_fraction=drop_fraction, every=every, until=until, **options
        )

    @property
    def fired(self) -> dict[str, Tensor]:
        """Masks of the weights that have been active at least once, by layer."""
        return self.explored.fired

    @fired.setter
    def fired(self, fired: Mapping[str, Tensor]) -> None:
        self.explored.load_state_dict(fired)

    def step(self) -> bool:
        """Run `Updater.step` and record the active weights."""
        self.explored.record()
        try:
            return super().step()
        finally:
            self.explored.record()

    def grow(self, name: str, kept: Topology, k: int) -> Tensor:
        """Draw `k` positions outside `kept`, those that were never active first."""
        fired, mask = self.grid(name).coarsen(self.explored.fired[name]), kept.mask()
        fresh = growers.random(Topology.from_mask(fired | mask), k, self.generator)
        again = growers.random(Topology.from_mask(~fired | mask), k - len(fresh), self.generator)
        return torch.cat([fresh, again]).sort().values

    def ranking(self, name: str) -> Iterable[Block]:
        """Yield a random number for every tile, larger where it was never active."""
        grid = self.grid(name)
        row, column, noise = growers.noise(grid.tiles, self.generator)
        fired = grid.coarsen(self.explored.fired[name]).view_as(noise)
        yield row, column, noise + (~fired).to(noise.dtype)
