"""RigL between layers: growth goes where the mean gradient or momentum is largest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst.rigl import RigL
from sparsekd.errors import UnsupportedError
from sparsekd.layouts import check_layouts
from sparsekd.nn import SparseModule
from sparsekd.sparsity import apportion

Counts = dict[str, tuple[int, int]]

FULLEST = 0.99
"""Share of its free positions that a layer may grow while another layer has room."""

NEARLY_DENSE = 0.2
"""Sparsity below which an important layer drops no larger fraction than its sparsity."""


def redistribute(
    nnz: Mapping[str, int], numel: Mapping[str, int], importance: Mapping[str, float], f: float
) -> Counts:
    """Share what all layers drop between them, in proportion to their importance.

    Args:
        nnz: weights stored, by layer.
        numel: weights, zeros included.
        importance: not negative; where all are 0, every layer regrows what it dropped.
        f: fraction of its weights that a layer drops.

    Returns:
        By layer how many weights it loses and gains; both add up to the same number.

    Source: arXiv 2103.15767, released code; here with integers that add up exactly.

    Example:
        >>> redistribute({"a": 10, "b": 10}, {"a": 99, "b": 99}, {"a": 3.0, "b": 1.0}, 0.4)
        {'a': (4, 6), 'b': (4, 2)}
    """
    total = math.fsum(importance.values())
    drop = {}
    for name, stored in nnz.items():
        drop[name], free = math.floor(f * stored), numel[name] - stored
        if free < NEARLY_DENSE * numel[name] and importance[name] * len(nnz) > total:
            drop[name] = min(drop[name], stored * free // numel[name])
    dropped = sum(drop.values())
    room = {name: numel[name] - nnz[name] + drop[name] for name in nnz}
    quota = {name: dropped * importance[name] / total if total else drop[name] for name in nnz}
    grow = apportion(_level(quota, room), room, dropped)
    return {name: (drop[name], grow[name]) for name in nnz}


def _level(quota: Mapping[str, float], room: Mapping[str, int]) -> dict[str, float]:
    """Spread what exceeds the limit of a layer equally over the others."""
    level, below = dict(quota), set(quota)
    while full := {name for name in below if level[name] > FULLEST * room[name]}:
        excess = math.fsum(level[name] - FULLEST * room[name] for name in full)
        below -= full
        level |= {name: FULLEST * room[name] for name in full}
        level |= {name: level[name] + excess / len(below) for name in below}
    return level


class RigLSG(RigL):
    """RigL with growth shared between layers by mean |gradient|: RigL-SG.

    The weights that all layers drop are grown in proportion to the mean |gradient| over each
    layer's weights: the total (of tiles, if the layout has them) is kept exactly while layers
    change size. Takes the arguments of `RigL`; layers that store every weight take part too.

    Source: reproduction of Rigging the Lottery (arXiv 2103.15767), after Sparse Networks from
        Scratch (arXiv 1907.04840).

    Example:
        >>> import torch, sparsekd as skd
        >>> model = torch.nn.Sequential(skd.nn.SparseLinear(8, 8), skd.nn.SparseLinear(8, 4))
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> dst = skd.dst.RigLSG(model, opt, drop_fraction=0.5, every=1, until=10)
        >>> before = dst.nnz()
        >>> model(torch.rand(2, 8)).square().sum().backward()
        >>> dst.step(), dst.nnz() == before
        (True, True)
    """

    layouts = ("csr", "bcsr")

    def __init__(self, model: nn.Module, optimizer: Optimizer, **options: Any) -> None:
        super().__init__(model, optimizer, **options)
        check_equal_tiles(type(self).__name__, self.modules)

    def counts(self, fraction: float) -> Counts:
        """Return, for each layer, how many weights are dropped, and its share of growth."""
        part = [name for name in self.layers() if self.has_gradient(name)]
        return redistribute(
            {name: self.grid(name).tiles.nnz for name in part},
            {name: self.grid(name).tiles.numel for name in part},
            {name: mean_magnitude(self.importance(name)) for name in part},
            fraction,
        )

    def importance(self, name: str) -> Tensor:
        """Return one number per weight; a layer's share of growth is that of its mean magnitude."""
        gradient = self.modules[name].values.grad
        assert gradient is not None  # the layer took part in the backward pass
        return gradient


class RigLSM(RigLSG):
    """RigL with growth shared between layers by mean |momentum|: RigL-SM.

    As `RigLSG`, by the optimizer's momentum (or Adam's first moment) instead of the gradient of one
    batch; by the gradient as long as there is none.

    Source: as `RigLSG`.

    Example:
        >>> import torch, sparsekd as skd
        >>> model = torch.nn.Sequential(skd.nn.SparseLinear(8, 8), skd.nn.SparseLinear(8, 4))
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> dst = skd.dst.RigLSM(model, opt, drop_fraction=0.5, every=2, until=10)
        >>> model(torch.rand(2, 8)).square().sum().backward()
        >>> dst.step(), dst.importance("0").shape == model[0].values.shape
        (False, True)
    """

    def importance(self, name: str) -> Tensor:
        """Return the momentum of each weight."""
        state = self.optimizer.state.get(self.modules[name].values, {})
        for key in ("momentum_buffer", "exp_avg"):
            if state.get(key) is not None:
                return state[key]
        return super().importance(name)


def check_equal_tiles(who: str, modules: Mapping[str, SparseModule]) -> None:
    """Check that all modules have one layout, in which single tiles can move.

    What one layer loses another gains, tile by tile, and the number of tiles stays.
    """
    layouts = {name: module.layout for name, module in modules.items()}
    check_layouts(layouts.items(), ("csr", "bcsr"), who)
    if len(set(layouts.values())) > 1:
        raise UnsupportedError(
            f"{who} moves tiles between layers and supports one layout in all of them, got "
            + ", ".join(sorted(str(layout) for layout in set(layouts.values())))
        )


def mean_magnitude(importance: Tensor) -> float:
    """Return the mean of the magnitudes, 0 for a layer without weights."""
    return float(importance.detach().abs().mean()) if len(importance) else 0.0
