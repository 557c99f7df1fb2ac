"""AC/DC: alternate between dense and compressed training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import tile_grid
from sparsekd.dst.base import Updater
from sparsekd.dst.dynamics import Dynamics, at_share, check_positive, never
from sparsekd.sparsity import check_sparsity, target_nnz
from sparsekd.topology import Topology

_COMPRESS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
_DECOMPRESS = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
"""Shares of a run at which its topology is compressed, and stores all weights again in between."""


class ACDC(Updater):
    """Alternating compression to the largest weights of all layers, and decompression to all.

    A compression keeps exactly `round((1 - sparsity) N)` weights, or as close to it as whole tiles
    of a layout allow; a decompression stores all of them again, the new ones at 0. Start from
    `sparsify(model, sparsity=0)`; the last dense phase gives a dense model as a by-product.
    Compressed phases cost what sparse training costs. If a gradient is not finite, the change is
    made in the next iteration instead.

    Args:
        model: holds sparse modules.
        optimizer: holds their values.
        sparsity: fraction of zeros in compressed phases, over all trainable sparse modules.
        compress: iterations that compress, counted from 1.
        decompress: iterations that decompress.
        seed: unused; accepted so that methods are interchangeable.
        skip_sgd_on_update: whether an update takes the place of the optimizer step.

    Raises:
        ValueError: an argument is out of range, an iteration is in both lists, or `model` has no
            sparse module.
        OptimizerStateError: `optimizer` does not hold the values of a trainable sparse module.

    Source: AC/DC: Alternating Compressed/DeCompressed Training (arXiv 2106.12379), section 4.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.0)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> dst = skd.dst.ACDC(layer, opt, sparsity=0.75, compress=(2, 5), decompress=(4,))
        >>> [(dst.step(), layer.topology.nnz)[1] for _ in range(6)]
        [32, 8, 8, 32, 8, 8]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sparsity: float,
        compress: Sequence[int],
        decompress: Sequence[int] = (),
        seed: int = 0,
        skip_sgd_on_update: bool = True,
    ) -> None:
        for iteration in (*compress, *decompress):
            check_positive(**{"compress, decompress": iteration})
        if both := set(compress) & set(decompress):
            raise ValueError(f"compress, decompress: expected no common number, got {min(both)}")
        self.sparsity = check_sparsity(sparsity)
        self.phases = sorted([(t, True) for t in compress] + [(t, False) for t in decompress])
        super().__init__(
            model, optimizer, schedule=never, seed=seed, skip_sgd_on_update=skip_sgd_on_update
        )
        self.schedule = self._due

    @classmethod
    def options(cls, dynamics: Dynamics, sparsity: float, steps: int) -> dict[str, Any]:
        """Return the arguments of the constructor for a run; see `Updater.options`."""
        compress = _iterations(_COMPRESS, steps)
        decompress = sorted(set(_iterations(_DECOMPRESS, steps)) - set(compress))
        return {"sparsity": sparsity, "compress": compress, "decompress": decompress}

    def updates_ahead(self, steps: int) -> int:
        """Return how many updates are planned in a run of `steps` iterations, from here on."""
        return sum(self.iteration < iteration <= steps for iteration, _ in self.phases)

    def compressed(self, iteration: int) -> bool:
        """Return whether the update of this iteration, or the last before it, compresses."""
        return next((sparse for t, sparse in reversed(self.phases) if t <= iteration), False)

    def target(self, iteration: int) -> int:
        """Return the number of weights stored after this iteration."""
        return target_nnz(self.numel(), self.sparsity if self.compressed(iteration) else 0.0)

    def counts(self, fraction: float) -> dict[str, tuple[int, int]]:
        """Return, for each layer, how many weights are dropped or grown."""
        layers = self.layers()
        if not self.compressed(self.iteration):
            tiles = {name: self.grid(name).tiles for name in layers}
            return {name: (0, t.numel - t.nnz) for name, t in tiles.items()}
        surplus = max(0, self.nnz() - self.target(self.iteration))
        score = {name: self.tile_score(name) for name in layers}
        gone = tile_grid.smallest_overall(self.grids(), score, surplus)
        return {name: (drop, 0) for name, drop in gone.items()}

    def grow(self, name: str, kept: Topology, k: int) -> Tensor:
        """Return the first `k` positions outside `kept`; a decompression asks for all of them."""
        return (~kept.mask()).view(-1).nonzero().squeeze(1)[:k]

    def _due(self, iteration: int) -> float | None:
        begun = bool(self.phases) and iteration >= self.phases[0][0]
        off = abs(self.nnz() - self.target(iteration)) if begun else 0
        return 0.0 if off and off > tile_grid.slack(self.grids()) else None


def _iterations(shares: Sequence[float], steps: int) -> list[int]:
    return sorted({at_share(share, steps) for share in shares})
