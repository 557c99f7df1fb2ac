"""The table of training methods: a row per method, whatever part of the package runs it.

The command line, recipes, pipelines, FLOP counts, tables and figures know a method by its row
alone, so a new method is a file with its updater and a row here: docs/adding-a-method.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sparsekd.dst.acdc import ACDC
from sparsekd.dst.base import Updater
from sparsekd.dst.dynamics import Dynamics
from sparsekd.dst.gmp import GMP
from sparsekd.dst.granet import GraNet
from sparsekd.dst.itop import ITOP
from sparsekd.dst.mest import MEST
from sparsekd.dst.redistribution import RigLSG, RigLSM
from sparsekd.dst.rigl import RigL
from sparsekd.dst.set import SET
from sparsekd.dst.snfs import SNFS
from sparsekd.dst.srigl import SRigL
from sparsekd.dst.topkast import TopKAST

Start = Literal["pruned", "random", "fan-in", "full", "half", "snip", "grasp", "synflow", "none"]
Layers = Literal["convolutions", "all"]
Source = Literal["init", "reinit", "rewind", "final"]
DenseGradients = Literal["never", "updates", "steps", "partly"]


@dataclass(frozen=True)
class Method:
    """A way to train a sparse network: where it starts, how its topology moves, what that costs.

    Args:
        name: on the command line and in result rows.
        label: in tables and figures.
        updater: the class that moves the topology; None where it stays as it is.
        start: origin of the first masks: the dense run's final weights ("pruned"), chance
            ("random", or "fan-in" with one fan-in in a layer), one batch ("snip", "grasp"), no data
            at all ("synflow"); "full" and "half" start with all or half of the weights. "none" is
            a narrower dense network that takes as many bits as the sparse one.
        dense_gradients: that growth forms besides those of the stored weights: "never", at its
            "updates", or at all "steps" until the topology rests; "partly" is of the weights that
            Top-KAST trains without computing with them.
        layers: that get masks in its paper: "convolutions", or "all" for linear layers too.
        dynamics: hyper-parameters of its paper, on CIFAR.
        source: of weights, biases and BatchNorm state at the start: the dense run's own
            initialisation ("init"), a fresh one ("reinit"), its checkpoint after epoch k
            ("rewind") or its final state ("final").
        distil: train with the dense run's final model as teacher.
        iterative: prune in rounds with training in between, instead of at one go.
        superpose: end the run with the cycles of Sup-tickets.

    Raises:
        ValueError: `dense_gradients` contradicts what the updater asks for.

    Example:
        >>> METHODS["kd"].distil
        True
    """

    name: str
    label: str
    updater: type[Updater] | None = None
    start: Start = "pruned"
    dense_gradients: DenseGradients = "never"
    layers: Layers = "all"
    dynamics: Dynamics = field(default_factory=Dynamics)
    source: Source = "init"
    distil: bool = False
    iterative: bool = False
    superpose: bool = False

    def __post_init__(self) -> None:
        reads = self.updater is not None and self.updater.needs_gradient
        if reads != (self.dense_gradients in ("updates", "steps")):
            raise ValueError(
                f"dense_gradients: expected {'updates or steps' if reads else 'never or partly'} "
                f"for {self.name}, got {self.dense_gradients}"
            )

    @property
    def needs_dense(self) -> bool:
        """Whether the dense network of the same seed has to be trained first."""
        return self.start == "pruned" or self.source in ("rewind", "final") or self.distil

    def start_epoch(self, rewind_epoch: int) -> int:
        """Return the epoch of the full schedule at which training starts.

        Args:
            rewind_epoch: k of the methods that rewind weights or learning rate.

        Returns:
            0 or `rewind_epoch`.

        Example:
            >>> METHODS["lt"].start_epoch(33), METHODS["lr-rewind"].start_epoch(33)
            (0, 33)
        """
        return rewind_epoch if self.source in ("rewind", "final") else 0

    def start_sparsity(self, sparsity: float) -> float:
        """Return the sparsity of the first masks of a run that ends at `sparsity`.

        Example:
            >>> [METHODS[name].start_sparsity(0.9) for name in ("gmp", "granet", "rigl")]
            [0.0, 0.5, 0.9]
        """
        return {"full": 0.0, "half": min(0.5, sparsity)}.get(self.start, sparsity)


# arXiv 2205.15322: half of the weights move at each update, to the end; on GraNet pruning ends at
# epoch 110 of the 226 before the cycles.
_SUP = Dynamics(drop_fraction=0.5, decay="constant", every=1000, until=1.0)
_SUP_GRANET = replace(_SUP, prune_until=110 / 226)

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        # tickets: masks pruned from a trained dense network, of its convolutions alone as in the
        # paper of the KD ticket; iterative pruning takes linear layers too, as Frankle's does
        Method("lt", "LT", layers="convolutions"),
        Method("reinit", "Reinit", layers="convolutions", source="reinit"),
        Method("kd", "KD ticket", layers="convolutions", distil=True),
        Method("rewind", "Weight rewinding", layers="convolutions", source="rewind"),
        Method("lr-rewind", "LR rewinding", layers="convolutions", source="final"),
        Method("kd-rewind", "KD + rewinding", layers="convolutions", source="rewind", distil=True),
        Method("imp", "IMP with rewinding", source="rewind", iterative=True),
        # masks that stay as they were at initialisation
        Method("static", "Static", start="random"),
        Method("snip", "SNIP", start="snip"),
        Method("grasp", "GraSP", start="grasp"),
        Method("synflow", "SynFlow", start="synflow"),
        Method("small-dense", "Small-dense", start="none"),
        # topologies that move
        Method("set", "SET", SET, "random"),
        Method("itop", "ITOP (SET)", ITOP, "random", dynamics=ITOP.published),
        Method("mest", "MEST", MEST, "random"),
        Method("snfs", "SNFS", SNFS, "random", "steps"),
        Method("rigl", "RigL", RigL, "random", "updates", dynamics=RigL.published),
        Method("rigl-sg", "RigL-SG", RigLSG, "random", "updates"),
        Method("rigl-sm", "RigL-SM", RigLSM, "random", "updates"),
        Method("srigl", "SRigL", SRigL, "fan-in", "updates"),
        Method("topkast", "Top-KAST", TopKAST, "full", "partly"),
        Method("granet", "GraNet", GraNet, "half", "updates", dynamics=GraNet.published),
        Method("gmp", "GMP", GMP, "full", dynamics=GMP.published),
        Method("acdc", "AC/DC", ACDC, "full"),
        # the same with the cycles of Sup-tickets at the end
        Method("sup-set", "Sup (SET)", SET, "random", dynamics=_SUP, superpose=True),
        Method("sup-rigl", "Sup (RigL)", RigL, "random", "updates", dynamics=_SUP, superpose=True),
        Method(
            "sup-granet",
            "Sup (GraNet)",
            GraNet,
            "half",
            "updates",
            dynamics=_SUP_GRANET,
            superpose=True,
        ),
        Method(
            "kd-sup-rigl",
            "KD + Sup (RigL)",
            RigL,
            dense_gradients="updates",
            layers="convolutions",  # it starts from a KD ticket
            dynamics=_SUP,
            distil=True,
            superpose=True,
        ),
    )
}


def find_method(name: str) -> Method:
    """Return a method by name; "kd-ticket" and "lt-ticket" are those without the word.

    Args:
        name: as in `METHODS`, or with "-ticket" or "-tickets" at its end.

    Raises:
        ValueError: there is no such method.

    Example:
        >>> find_method("kd-ticket").name
        'kd'
    """
    short = name.removesuffix("s").removesuffix("-ticket")
    if name not in METHODS and short not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"methods: expected names among {', '.join(METHODS)}, got {name!r}{hint}")
    return METHODS[name if name in METHODS else short]
