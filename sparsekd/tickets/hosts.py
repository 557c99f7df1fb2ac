"""Attach to a model the method of `sparsekd.dst` that a run names, and cycles of Sup-tickets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from sparsekd import dst
from sparsekd.dst.dynamics import Periodic
from sparsekd.sparsity import Constant
from sparsekd.tickets.methods import Method
from sparsekd.tickets.sup import Cycles, SupTickets
from sparsekd.tickets.superposition import Average, check_average

UPDATERS: dict[str, type[dst.Updater]] = {
    "set": dst.SET,
    "itop": dst.ITOP,
    "mest": dst.MEST,
    "snfs": dst.SNFS,
    "rigl": dst.RigL,
    "rigl-sg": dst.RigLSG,
    "rigl-sm": dst.RigLSM,
    "srigl": dst.SRigL,
    "topkast": dst.TopKAST,
    "granet": dst.GraNet,
    "gmp": dst.GMP,
    "acdc": dst.ACDC,
}
# shares of training at which AC/DC compresses, and stores all weights again in between
_COMPRESS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85)
_DECOMPRESS = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)


@dataclass(frozen=True)
class Dynamics:
    """Hold the hyper-parameters of methods that move their topology.

    Args:
        distribution: of the nonzeros over the layers, for random masks.
        drop_fraction: fraction of a layer's weights to move at the start.
        decay: "cosine" lets it fall to 0, "constant" keeps it.
        every: iterations from one update to the next.
        until: share of the run, less the cycles of Sup-tickets, after which the topology rests.
        prune_until: share of it at which GMP and GraNet have reached their sparsity.
        backward: of Top-KAST, how many times as many weights get a gradient as compute.
    """

    distribution: Literal["uniform", "er", "erk"] = "erk"
    drop_fraction: float = 0.3
    decay: Literal["cosine", "constant"] = "cosine"
    every: int = 100
    until: float = 0.75
    prune_until: float = 0.5
    backward: float = 2.0

    def options(self, moves: str, sparsity: float, steps: int) -> dict[str, Any]:
        """Return the arguments of a method's updater in a phase of so many steps.

        Args:
            moves: as in `Method`, not "none".
            sparsity: at the end.
            steps: of the phase; an update that would not happen in it happens at its end.

        Example:
            >>> Dynamics().options("gmp", 0.9, steps=1000)
            {'every': 100, 'sparsity': 0.9, 'until': 500}
        """
        until, pruned = (max(1, round(share * steps)) for share in (self.until, self.prune_until))
        every: dict[str, Any] = {"every": self.every}
        match moves:
            case "gmp":
                return {"every": min(self.every, pruned), "sparsity": sparsity, "until": pruned}
            case "acdc":
                compress = _iterations(_COMPRESS, steps)
                decompress = sorted(set(_iterations(_DECOMPRESS, steps)) - set(compress))
                return {"sparsity": sparsity, "compress": compress, "decompress": decompress}
            case "mest":
                return every | {"sparsity": sparsity, "until": steps}
            case "topkast":
                backward = max(0.0, 1 - self.backward * (1 - sparsity))
                extra = {"sparsity": sparsity, "backward_sparsity": backward, "until": until}
                return every | extra | {"distribution": self.distribution}
        moving = {"drop_fraction": self.drop_fraction, "until": until}
        if moves == "granet":
            every = {"every": min(self.every, pruned)}
            moving |= {"sparsity": sparsity, "prune_until": pruned}
        return every | moving


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
    sparsity: float,
    epochs: int,
    steps: int,
    dynamics: Dynamics,
    superposition: Superposition,
    seed: int,
) -> dst.Updater | SupTickets | None:
    """Build what moves a model's topology while it trains.

    Args:
        method: names the updater, and says whether it runs in the cycles of Sup-tickets.
        model: holds sparse modules.
        optimizer: holds their values.
        sparsity: of the sparse modules at the end, for methods that do not start with it.
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
        >>> options |= {"sparsity": 0.9, "epochs": 100, "steps": 9}
        >>> sup = attach(skd.tickets.METHODS["sup-set"], layer, opt, **options)
        >>> sup.cycles.count, sup.cycles.first_phase
        (1, 828)
    """
    if method.moves == "none":
        return None
    cycles = superposition.cycles(epochs, steps)
    steps_with_updates = cycles.first_phase if method.superpose else cycles.total_steps
    options = dynamics.options(method.moves, sparsity, steps_with_updates)
    host = UPDATERS[method.moves](model, optimizer, seed=seed, **options)
    if dynamics.decay == "constant" and "drop_fraction" in options:
        fraction = Constant(dynamics.drop_fraction)
        host.schedule = Periodic(fraction, options["every"], options["until"])
    if not method.superpose:
        return host
    return SupTickets(
        model,
        optimizer,
        host,
        total_steps=cycles.total_steps,
        cycle_fraction=cycles.cycle_fraction,
        cycle_steps=cycles.cycle_steps,
        lr=cycles.lr,
        drop_fraction=superposition.drop_fraction,
        average=superposition.average,
        prune_each=superposition.prune_each,
    )


def _iterations(shares: Sequence[float], steps: int) -> list[int]:
    return sorted({max(1, round(share * steps)) for share in shares})
