"""MEST: prune a little below the target by magnitude and gradient, regrow at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import growers, scores, tile_grid
from sparsekd.dst.base import Updater
from sparsekd.dst.dynamics import Dynamics, Periodic, check_fraction, check_positive
from sparsekd.ops.growth import Block
from sparsekd.sparsity import target_nnz
from sparsekd.topology import Topology


class MEST(Updater):
    """Periodic pruning to one sparsity, and random regrowth to a lower one.

    With e falling in steps, 1 until 9/16 of training, 1/2 until 3/4 and 0 from there, an update
    prunes each layer by `|w| + gradient_weight |g|` to the sparsity `sparsity + e mutation` and
    grows it to `sparsity - e extra`. `mutation` alone is the paper's elastic mutation (EM): the
    memory is that of `sparsity` throughout. `extra` alone is EM with soft memory bound (EM&S):
    more weights train and are pruned in the end. Layers keep the proportions they start with.

    Args:
        model: holds sparse modules.
        optimizer: holds their values.
        sparsity: fraction of zeros at the end, over all trainable sparse modules.
        mutation: by how much sparser an update prunes before it regrows.
        extra: by how much denser the model trains at first.
        gradient_weight: lambda of the score.
        every: iterations from one update to the next; the paper's five epochs.
        until: number of iterations of the whole training.
        seed: of the random growth.
        skip_sgd_on_update: whether an update takes the place of the optimizer step.

    Raises:
        ValueError: an argument is out of range, or `model` has no sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: MEST (arXiv 2110.14032) and its code.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(10, 10, sparsity=0.9, seed=0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.MEST(layer, opt, sparsity=0.9, mutation=0, extra=0.1, every=1, until=8)
        >>> [(dst.step(), layer.topology.nnz)[1] for _ in range(7)]
        [20, 20, 20, 20, 15, 10, 10]
    """

    layouts: ClassVar[tuple[str, ...]] = ("csr", "bcsr", "fanin")
    saved = ("proportions",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sparsity: float,
        mutation: float = 0.02,
        extra: float = 0.0,
        gradient_weight: float = 0.0,
        every: int,
        until: int,
        seed: int = 0,
        skip_sgd_on_update: bool = True,
    ) -> None:
        check_positive(every=every, until=until)
        check_fraction(sparsity=sparsity, mutation=mutation, extra=extra)
        self.sparsity, self.gradient_weight = sparsity, gradient_weight
        self.mutation, self.extra = min(mutation, 1 - sparsity), min(extra, sparsity)
        super().__init__(
            model,
            optimizer,
            schedule=Periodic(lambda t: elasticity(t / until), every, until),
            seed=seed,
            skip_sgd_on_update=skip_sgd_on_update,
        )
        self.proportions = {name: module.topology.nnz for name, module in self.layers().items()}

    @classmethod
    def options(cls, dynamics: Dynamics, sparsity: float, steps: int) -> dict[str, Any]:
        """Return the arguments of the constructor for a run; see `Updater.options`."""
        return {"every": dynamics.every, "sparsity": sparsity, "until": steps}

    def counts(self, fraction: float) -> dict[str, tuple[int, int]]:
        """Return, for each layer, how many weights are dropped and grown; `fraction` is e."""
        tiles = {name: self.grid(name).tiles for name in self.layers()}
        numel = {name: t.numel for name, t in tiles.items()}
        after = self._allocate(self.sparsity - fraction * self.extra, numel)
        kept = self._allocate(self.sparsity + fraction * self.mutation, after)
        counts = {}
        for name, t in tiles.items():
            drop = max(0, t.nnz - kept[name])
            counts[name] = (drop, after[name] - t.nnz + drop)
        return counts

    def drop_score(self, name: str) -> Tensor:
        """Return `|w| + gradient_weight |g|`."""
        score, gradient = super().drop_score(name), self.modules[name].values.grad
        if gradient is None or not self.gradient_weight:
            return score
        return score + self.gradient_weight * scores.magnitude(gradient)

    def grow(self, name: str, kept: Topology, k: int) -> Tensor:
        """Draw `k` positions outside `kept`, each set of them being equally likely."""
        return growers.random(kept, k, self.generator)

    def ranking(self, name: str) -> Iterable[Block]:
        """Yield a random number for every tile."""
        yield growers.noise(self.grid(name).tiles, self.generator)

    def _allocate(self, sparsity: float, room: dict[str, int]) -> dict[str, int]:
        total = target_nnz(self.numel(), sparsity)
        share = total / max(sum(self.proportions.values()), 1)
        quota = {name: share * weights for name, weights in self.proportions.items()}
        return tile_grid.in_tiles(self.grids(), quota, room, total)


def elasticity(progress: float) -> float:
    """Return e, the share of `mutation` and `extra` that applies at this part of training.

    Example:
        >>> [elasticity(epoch / 160) for epoch in (89, 90, 119, 120)]
        [1.0, 0.5, 0.5, 0.0]
    """
    return 1.0 if progress < 9 / 16 else 0.5 if progress < 3 / 4 else 0.0
