"""GraNet: gradual pruning, with part of the weights regrown by gradient."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from sparsekd.dst.dynamics import Dynamics, Periodic, at_share, check_fraction, check_positive
from sparsekd.dst.gmp import GMP
from sparsekd.dst.rigl import RigL
from sparsekd.sparsity import Cosine


class GraNet(GMP, RigL):
    """Gradual global pruning along a cubic, with weights moved as in RigL after each pruning.

    Every `every` iterations the smallest weights of all layers are pruned to the cubic of `GMP`;
    then each layer drops a fraction of its smallest remaining weights and grows as many where the
    gradient is largest. The second part continues until `until`. Dense-to-sparse training starts
    from `sparsify(model, sparsity=0)`, sparse-to-sparse from, say, `sparsity=0.5`.

    Args:
        model: holds sparse modules.
        optimizer: holds their values.
        sparsity: fraction of zeros at the end, over all trainable sparse modules.
        drop_fraction: fraction of a layer's weights to move at the start, in [0, 1].
        every: iterations from one update to the next.
        until: the first iteration without updates, usually that after the last.
        prune_until: iteration that reaches `sparsity`, rounded down to a multiple of `every`; None
            for that of the last update.
        begin: iteration up to which nothing is pruned.
        final_drop_fraction: end value of `drop_fraction`, which falls along a cosine.
        seed: unused by GraNet itself; seeds the generator that subclasses draw from.
        skip_sgd_on_update: whether an update takes the place of the optimizer step.

    Raises:
        ValueError: an argument is out of range, the model is sparser than `sparsity` already, or it
            has no sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Sparse Training via Boosting Pruning Plasticity (arXiv 2106.10404) and its code.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.GraNet(layer, opt, sparsity=0.75, every=1, until=3)
        >>> layer(torch.rand(2, 8)).square().sum().backward()
        >>> dst.step(), layer.topology.nnz, dst.last_update[""].grown
        (True, 11, 4)
    """

    published: ClassVar[Dynamics] = Dynamics(
        drop_fraction=0.5, every=1000, until=1.0, prune_until=110 / 160
    )
    """On CIFAR: pruning ends at epoch 110 of 160, weights move to the end."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sparsity: float,
        drop_fraction: float = published.drop_fraction,
        every: int = published.every,
        until: int,
        prune_until: int | None = None,
        begin: int = 0,
        final_drop_fraction: float = 0.005,
        seed: int = 0,
        skip_sgd_on_update: bool = True,
    ) -> None:
        check_positive(every=every, until=until)
        check_fraction(drop_fraction=drop_fraction, final_drop_fraction=final_drop_fraction)
        super().__init__(
            model,
            optimizer,
            sparsity=sparsity,
            every=every,
            until=until - 1 if prune_until is None else min(prune_until, until - 1),
            begin=begin,
            seed=seed,
            skip_sgd_on_update=skip_sgd_on_update,
        )
        self.schedule = Periodic(Cosine(drop_fraction, until, final_drop_fraction), every, until)

    @classmethod
    def options(cls, dynamics: Dynamics, sparsity: float, steps: int) -> dict[str, Any]:
        """Return the arguments of the constructor for a run; see `Updater.options`."""
        pruned = super().options(dynamics, sparsity, steps)
        return {
            "every": pruned["every"],
            "drop_fraction": dynamics.drop_fraction,
            "until": at_share(dynamics.until, steps),
            "sparsity": sparsity,
            "prune_until": pruned["until"],
            "begin": pruned["begin"],
        }

    def counts(self, fraction: float) -> dict[str, tuple[int, int]]:
        """Return, for each layer, how many weights are pruned and moved, and how many grown."""
        counts = {}
        for name, pruned in self.pruned().items():
            moved = self.replaceable(name, fraction, pruned)
            counts[name] = (pruned + moved, moved)
        return counts
