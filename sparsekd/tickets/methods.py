"""The ways to train a sparse network, as data: its start, its loss, and how its topology moves."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sparsekd.nn import sparsify

Source = Literal["init", "reinit", "rewind", "final", "random"]
Moves = Literal["none", "set", "rigl"]


@dataclass(frozen=True)
class Method:
    """Say how a sparse network starts and trains.

    Args:
        name: on the command line and in result rows.
        label: in tables and figures.
        source: weights, biases and BatchNorm state to start from: the dense run's own
            initialisation ("init"), a fresh one ("reinit"), its checkpoint after epoch k
            ("rewind") or its final state ("final"), all on masks pruned from its final weights;
            "random" is the dense run's initialisation on random masks, which needs no dense run.
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
    source: Source
    distil: bool = False
    iterative: bool = False
    moves: Moves = "none"
    superpose: bool = False

    @property
    def needs_dense(self) -> bool:
        """Whether the dense network of the same seed has to be trained first."""
        return self.source != "random" or self.distil

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
        Method("lt", "LT", "init"),
        Method("reinit", "Reinit", "reinit"),
        Method("kd", "KD ticket", "init", distil=True),
        Method("rewind", "Weight rewinding", "rewind"),
        Method("lr-rewind", "LR rewinding", "final"),
        Method("kd-rewind", "KD + rewinding", "rewind", distil=True),
        Method("imp", "IMP with rewinding", "rewind", iterative=True),
        Method("static", "Static", "random"),
        Method("set", "SET", "random", moves="set"),
        Method("rigl", "RigL", "random", moves="rigl"),
        Method("sup-set", "Sup (SET)", "random", moves="set", superpose=True),
        Method("sup-rigl", "Sup (RigL)", "random", moves="rigl", superpose=True),
        Method("kd-sup-rigl", "KD + Sup (RigL)", "init", True, moves="rigl", superpose=True),
    )
}


def make_ticket(
    model: nn.Module, masks: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build a sparse network from a dense one: its state, stored for the unmasked weights only.

    Args:
        model: the dense network; not changed.
        masks: module name -> bool mask; modules without a mask stay dense.
        state: dense state dict to start from (weights, BatchNorm affine and statistics), all of
            it; by default the model's own.

    Returns:
        A new network whose stored values equal the dense ones bit for bit.

    Raises:
        RuntimeError: `state` does not fit the model.

    Source: Renda et al., Comparing Rewinding and Fine-tuning (2020), section 2; with the
        initialisation as `state` it is the lottery ticket of Frankle and Carbin (2019).

    Example:
        >>> dense = nn.Sequential(nn.Conv2d(1, 4, 3))
        >>> ticket = make_ticket(dense, {"0": dense[0].weight.detach() > 0})
    """
    ticket = copy.deepcopy(model)
    if state is not None:
        ticket.load_state_dict(dict(state), strict=True)
    return sparsify(ticket, masks=dict(masks))
