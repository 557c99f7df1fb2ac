"""Attach to a model the method of `sparsekd.dst` that a run names, and cycles of Sup-tickets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from sparsekd.dst import SET, RigL, Updater
from sparsekd.dst.schedules import Periodic
from sparsekd.sparsity import Constant
from sparsekd.tickets.methods import Method
from sparsekd.tickets.sup import Cycles, SupTickets
from sparsekd.tickets.superposition import Average, check_average

_UPDATERS: dict[str, type[SET]] = {"set": SET, "rigl": RigL}


@dataclass(frozen=True)
class Dynamics:
    """Hold the hyper-parameters of methods that move their topology.

    Args:
        distribution: of the nonzeros over the layers, for random masks.
        drop_fraction: fraction of a layer's weights to move at the start.
        decay: "cosine" lets it fall to 0, "constant" keeps it.
        every: iterations from one update to the next.
        until: share of the run, less the cycles of Sup-tickets, after which the topology rests.
    """

    distribution: Literal["uniform", "er", "erk"] = "erk"
    drop_fraction: float = 0.3
    decay: Literal["cosine", "constant"] = "cosine"
    every: int = 100
    until: float = 0.75


@dataclass(frozen=True)
class Superposition:
    """Hold the hyper-parameters of Sup-tickets, with times in epochs; see `SupTickets`."""

    cycle_fraction: float = 0.1
    cycle_epochs: int = 8
    lr: tuple[float, ...] = (0.001, 0.005)
    drop_fraction: float = 0.5
    average: Average = "caa"
    prune_each: bool = False

    def __post_init__(self) -> None:
        check_average(self.average)
        self.cycles(1, 1)

    def cycles(self, epochs: int, steps: int) -> Cycles:
        """Return the cycles at the end of `epochs` epochs of `steps` steps."""
        return Cycles(epochs * steps, self.cycle_fraction, self.cycle_epochs * steps, self.lr)

    def tail(self, epochs: int) -> int:
        """Return how many epochs the cycles take at the end of `epochs`."""
        return self.cycles(epochs, 1).count * self.cycle_epochs


def attach(
    method: Method,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    epochs: int,
    steps: int,
    dynamics: Dynamics,
    superposition: Superposition,
    seed: int,
) -> Updater | SupTickets | None:
    """Build what moves a model's topology while it trains.

    Args:
        method: names the updater, and says whether it runs in the cycles of Sup-tickets.
        model: holds sparse modules.
        optimizer: holds their values.
        epochs: of the run.
        steps: of an epoch.
        dynamics: hyper-parameters of the updater.
        superposition: hyper-parameters of the cycles.
        seed: of random growth.

    Returns:
        What the trainer steps, or None if the topology stays.

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4)
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> options = {"dynamics": Dynamics(), "superposition": Superposition(), "seed": 0}
        >>> sup = attach(skd.tickets.METHODS["sup-set"], layer, opt, epochs=100, steps=9, **options)
        >>> sup.cycles.count, sup.cycles.first_phase
        (1, 828)
    """
    if method.moves == "none":
        return None
    cycles = superposition.cycles(epochs, steps)
    steps_with_updates = cycles.first_phase if method.superpose else cycles.total_steps
    every, until = dynamics.every, max(1, round(dynamics.until * steps_with_updates))
    dst = _UPDATERS[method.moves](
        model,
        optimizer,
        drop_fraction=dynamics.drop_fraction,
        every=every,
        until=until,
        seed=seed,
    )
    if dynamics.decay == "constant":
        dst.schedule = Periodic(Constant(dynamics.drop_fraction), every, until)
    if not method.superpose:
        return dst
    return SupTickets(
        model,
        optimizer,
        dst,
        total_steps=cycles.total_steps,
        cycle_fraction=cycles.cycle_fraction,
        cycle_steps=cycles.cycle_steps,
        lr=cycles.lr,
        drop_fraction=superposition.drop_fraction,
        average=superposition.average,
        prune_each=superposition.prune_each,
    )
