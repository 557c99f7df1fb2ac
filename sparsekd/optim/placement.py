"""Which topology the entries of an optimizer's state belong to."""

from __future__ import annotations

import weakref

from torch.nn import Parameter
from torch.optim import Optimizer

from sparsekd.topology import Topology


class Placement:
    """The topology that each parameter's optimizer state belongs to, as far as it is known.

    Attributes:
        loads: how often the optimizer has loaded a state. What it loaded belongs to the topology
            that the model has once it has loaded too, so nothing is known in between.
    """

    def __init__(self) -> None:
        self._topologies: dict[Parameter, Topology] = {}
        self.loads = 0

    def put(self, param: Parameter, topology: Topology) -> None:
        """Note that the state of `param` belongs to `topology`, which nobody may write to."""
        self._topologies[param] = topology

    def get(self, param: Parameter) -> Topology | None:
        """Return the topology that the state of `param` belongs to, None if it is not known."""
        return self._topologies.get(param)

    def forget(self) -> None:
        """Note that the optimizer has loaded a state."""
        self._topologies.clear()
        self.loads += 1


_placements: weakref.WeakKeyDictionary[Optimizer, Placement] = weakref.WeakKeyDictionary()


def placement(optimizer: Optimizer) -> Placement:
    """Return the placement of an optimizer's state, kept for as long as the optimizer lives.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([Parameter(torch.ones(1))], lr=0.1)
        >>> optimizer.load_state_dict(optimizer.state_dict())
        >>> placement(optimizer).loads
        0
        >>> optimizer.load_state_dict(optimizer.state_dict())
        >>> placement(optimizer).loads
        1
    """
    optimizer = unwrapped(optimizer)
    known = _placements.get(optimizer)
    if known is None:
        known = _placements[optimizer] = Placement()
        optimizer.register_load_state_dict_post_hook(_loaded)
    return known


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that does the work, where one wraps it as `optimizer`, as accelerate's.

    Such wrappers are no complete optimizers: they have neither hooks nor its constructor.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _loaded(optimizer: Optimizer) -> None:
    placement(optimizer).forget()
