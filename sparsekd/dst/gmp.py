"""Gradual magnitude pruning: start dense, remove the smallest weights along a cubic."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from sparsekd.dst import tile_grid
from sparsekd.dst.base import Updater
from sparsekd.dst.dynamics import Dynamics, at_share, check_positive, never
from sparsekd.sparsity import Polynomial, check_sparsity, target_nnz


class GMP(Updater):
    """Gradual magnitude pruning of the smallest weights, down to `sparsity` at `until`.

    The sparsity follows a cubic that is steep at first: with s_i that of the model at the start,

        s(t) = sparsity + (s_i - sparsity) (1 - (t - begin) / (until - begin))^3

    and the update of iteration t leaves exactly `round((1 - s(t)) N)` weights, N counting those of
    the trainable sparse modules, or as close to it as whole tiles of a layout allow. Start from
    `sparsify(model, sparsity=0)`: pruned weights are neither stored nor computed with from that
    iteration on. If an update is skipped because a gradient is not finite, the next one catches up.

    Args:
        model: holds sparse modules.
        optimizer: holds their values.
        sparsity: fraction of zeros at the end, over all trainable sparse modules.
        every: iterations from one update to the next.
        until: iteration that reaches `sparsity`, rounded down to a multiple of `every`.
        begin: iteration up to which nothing is pruned.
        scope: "global" compares the weights of all layers; "layer" brings every layer to the same
            sparsity by its own magnitudes.
        seed: unused; accepted so that methods are interchangeable.
        skip_sgd_on_update: whether an update takes the place of the optimizer step.

    Raises:
        ValueError: an argument is out of range, the model is sparser than `sparsity` already, or it
            has no sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: Zhu and Gupta, To prune, or not to prune (arXiv 1710.01878), section 3; "global" as in
        the reproduction of Rigging the Lottery (arXiv 2103.15767).

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.GMP(layer, opt, sparsity=0.75, every=1, until=2)
        >>> [(dst.step(), layer.topology.nnz) for _ in range(3)]
        [(True, 11), (True, 8), (False, 8)]
    """

    published: ClassVar[Dynamics] = Dynamics(
        every=1000, prune_from=20_000 / 97_656, prune_until=75_000 / 97_656
    )
    """On CIFAR, as the baseline of RigL: from step 20,000 to 75,000 of 97,656."""

    layouts: ClassVar[tuple[str, ...]] = ("csr", "bcsr", "fanin")
    saved = ("initial_sparsity",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sparsity: float,
        every: int = Dynamics.every,
        until: int,
        begin: int = 0,
        scope: str = "global",
        seed: int = 0,
        skip_sgd_on_update: bool = True,
    ) -> None:
        if scope not in ("global", "layer"):
            raise ValueError(f"scope: expected 'global' or 'layer', got {scope!r}")
        check_positive(every=every, until=until)
        self.sparsity, self.scope = check_sparsity(sparsity), scope
        self.every, self.begin, self.end = every, begin, until // every * every
        # Not super(): GraNet mixes this class with RigL.
        Updater.__init__(
            self, model, optimizer, schedule=never, seed=seed, skip_sgd_on_update=skip_sgd_on_update
        )
        self.initial_sparsity = 1 - self.nnz() / max(self.numel(), 1)
        if self.nnz() < target_nnz(self.numel(), sparsity) - tile_grid.slack(self.grids()):
            raise ValueError(
                f"sparsity: expected at least the model's, {self.initial_sparsity:.4g}, "
                f"got {sparsity!r}"
            )
        for module in self.layers().values():
            module.asked_sparsity = self.sparsity
        self.target(0)  # refuses begin and until out of order
        self.schedule = self._due

    @classmethod
    def options(cls, dynamics: Dynamics, sparsity: float, steps: int) -> dict[str, Any]:
        """Return the arguments of the constructor for a run; see `Updater.options`."""
        until = at_share(dynamics.prune_until, steps)
        every, begin = min(dynamics.every, until), round(dynamics.prune_from * steps)
        return {"every": every, "sparsity": sparsity, "until": until, "begin": begin}

    def updates_ahead(self, steps: int) -> int:
        """Return how many updates are planned in a run of `steps` iterations, from here on."""
        if self.schedule != self._due:
            return super().updates_ahead(steps)
        done = max(self.iteration, self.begin)
        return max(0, min(self.end, steps) // self.every - done // self.every)

    def target(self, iteration: int) -> int:
        """Return the number of weights that the update of this iteration leaves."""
        ramp = Polynomial(self.initial_sparsity, self.sparsity, self.begin, self.end)
        return target_nnz(self.numel(), ramp(iteration))

    def counts(self, fraction: float) -> dict[str, tuple[int, int]]:
        """Return, for each layer, how many weights are pruned; none are grown."""
        return {name: (drop, 0) for name, drop in self.pruned().items()}

    def pruned(self) -> dict[str, int]:
        """Return, for each layer, how many of its smallest tiles this iteration prunes."""
        grids, total = self.grids(), self.nnz()
        target = min(self.target(self.iteration), total)
        if self.scope == "global":
            score = {name: self.tile_score(name) for name in grids}
            return tile_grid.smallest_overall(grids, score, total - target)
        density = target / max(self.numel(), 1)
        quota = {name: density * self.modules[name].topology.numel for name in grids}
        stored = {name: grids[name].tiles.nnz for name in grids}
        kept = tile_grid.in_tiles(grids, quota, stored, target)
        return {name: stored[name] - kept[name] for name in grids}

    def _due(self, iteration: int) -> float | None:
        if iteration % self.every or self.nnz() <= self.target(iteration):
            return None
        return 0.0 if self.nnz() - self.target(iteration) > tile_grid.slack(self.grids()) else None
