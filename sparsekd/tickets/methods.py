"""The ways to train a sparse network, as data: its start, its loss, and how its topology moves."""

from __future__ import annotations

import copy
import difflib
import glob
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sparsekd.layouts import Layout
from sparsekd.nn import sparsify, survey

Source = Literal["init", "reinit", "rewind", "final"]
Start = Literal["pruned", "random", "fan-in", "full", "half", "snip", "grasp", "synflow", "none"]
Moves = Literal[
    "none", "set", "itop", "mest", "snfs", "rigl", "rigl-sg", "rigl-sm", "srigl", "topkast",
    "granet", "gmp", "acdc",
]  # fmt: skip


@dataclass(frozen=True)
class Method:
    """Say how a sparse network starts and trains.

    Args:
        name: on the command line and in result rows.
        label: in tables and figures.
        source: weights, biases and BatchNorm state to start from: the dense run's own
            initialisation ("init"), a fresh one ("reinit"), its checkpoint after epoch k
            ("rewind") or its final state ("final").
        masks: where the first masks come from: the dense run's final weights ("pruned"), chance
            ("random", or with one fan-in a layer "fan-in"), one batch ("snip", "grasp"), no data
            at all ("synflow"). "full" and "half" start with all or half of the weights; "none" is
            a narrower dense network that takes as many bits as the sparse one.
        distil: train with the dense run's final model as teacher.
        iterative: prune in rounds, training in between, instead of once.
        moves: the method of `sparsekd.dst` that moves the topology, "none" to keep it.
        superpose: spend the last part of the run on the cycles of Sup-tickets.

    Example:
        >>> METHODS["kd"].distil
        True
    """

    name: str
    label: str
    source: Source = "init"
    masks: Start = "pruned"
    distil: bool = False
    iterative: bool = False
    moves: Moves = "none"
    superpose: bool = False

    @property
    def needs_dense(self) -> bool:
        """Whether the dense network of the same seed has to be trained first."""
        return self.masks == "pruned" or self.source in ("rewind", "final") or self.distil

    def start_epoch(self, rewind_epoch: int) -> int:
        """Return the epoch of the full schedule at which the ticket starts to train.

        Args:
            rewind_epoch: k of the methods that rewind weights or learning rate.

        Returns:
            0 or `rewind_epoch`.

        Example:
            >>> METHODS["lt"].start_epoch(33), METHODS["lr-rewind"].start_epoch(33)
            (0, 33)
        """
        return rewind_epoch if self.source in ("rewind", "final") else 0


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("lt", "LT"),
        Method("reinit", "Reinit", "reinit"),
        Method("kd", "KD ticket", distil=True),
        Method("rewind", "Weight rewinding", "rewind"),
        Method("lr-rewind", "LR rewinding", "final"),
        Method("kd-rewind", "KD + rewinding", "rewind", distil=True),
        Method("imp", "IMP with rewinding", "rewind", iterative=True),
        Method("static", "Static", masks="random"),
        Method("snip", "SNIP", masks="snip"),
        Method("grasp", "GraSP", masks="grasp"),
        Method("synflow", "SynFlow", masks="synflow"),
        Method("small-dense", "Small-dense", masks="none"),
        Method("set", "SET", masks="random", moves="set"),
        Method("itop", "ITOP (SET)", masks="random", moves="itop"),
        Method("mest", "MEST", masks="random", moves="mest"),
        Method("snfs", "SNFS", masks="random", moves="snfs"),
        Method("rigl", "RigL", masks="random", moves="rigl"),
        Method("rigl-sg", "RigL-SG", masks="random", moves="rigl-sg"),
        Method("rigl-sm", "RigL-SM", masks="random", moves="rigl-sm"),
        Method("srigl", "SRigL", masks="fan-in", moves="srigl"),
        Method("topkast", "Top-KAST", masks="full", moves="topkast"),
        Method("granet", "GraNet", masks="half", moves="granet"),
        Method("gmp", "GMP", masks="full", moves="gmp"),
        Method("acdc", "AC/DC", masks="full", moves="acdc"),
        Method("sup-set", "Sup (SET)", masks="random", moves="set", superpose=True),
        Method("sup-rigl", "Sup (RigL)", masks="random", moves="rigl", superpose=True),
        Method("sup-granet", "Sup (GraNet)", masks="half", moves="granet", superpose=True),
        Method("kd-sup-rigl", "KD + Sup (RigL)", distil=True, moves="rigl", superpose=True),
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


def make_ticket(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
    layout: str | Layout = "csr",
) -> nn.Module:
    """Build a sparse network from a dense one: its state, stored for the unmasked weights only.

    Args:
        model: the dense network; not changed.
        masks: module name -> bool mask; modules without a mask stay dense.
        state: dense state dict to start from (weights, BatchNorm affine and statistics), all of
            it; by default the model's own.
        layout: of the sparse modules; the masks fit it.

    Returns:
        A new network whose stored values equal the dense ones bit for bit.

    Raises:
        RuntimeError: `state` does not fit the model.
        UnsupportedError: a mask does not fit the layout.

    Source: Renda et al., Comparing Rewinding and Fine-tuning (2020), section 2; with the
        initialisation as `state` it is the lottery ticket of Frankle and Carbin (2019).

    Example:
        >>> dense = nn.Sequential(nn.Conv2d(1, 4, 3))
        >>> ticket = make_ticket(dense, {"0": dense[0].weight.detach() > 0})
    """
    ticket = copy.deepcopy(model)
    if state is not None:
        ticket.load_state_dict(dict(state), strict=True)
    found = survey(ticket)
    # That layers without a mask stay dense was asked for here.
    unmasked = [name for name, names in found.aliases.items() if not masks.keys() & set(names)]
    skip = [glob.escape(name) for name in unmasked if name]
    return sparsify(ticket, masks=dict(masks), layout=layout, skip=skip)
