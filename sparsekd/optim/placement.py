"""The record of which topology each entry of an optimizer's state belongs to."""

from __future__ import annotations

import weakref

from torch.nn import Parameter
from torch.optim import Optimizer

from sparsekd.topology import Topology


class Placement:
    """The topology that each parameter's optimizer state belongs to, as far as it is known.

    Attributes:
        loads: number of states that the optimizer has loaded. A loaded state belongs to the
            topology that the model has after loading too, so nothing is known in between.
    """

    def __init__(self) -> None:
        self._topologies: dict[Parameter, Topology] = {}
        self.loads = 0

    def put(self, param: Parameter, topology: Topology) -> None:
        """Record that the state of `param` belongs to `topology`, which must not be written to."""
        self._topologies[param] = topology

    def get(self, param: Parameter) -> Topology | None:
        """Return the topology that the state of `param` belongs to, or None if it is unknown."""
        return self._topologies.get(param)

    def forget(self) -> None:
        """Clear the record, since the optimizer has loaded a state."""
        self._topologies.clear()
        self.loads += 1


_placements: weakref.WeakKeyDictionary[Optimizer, Placement] = weakref.WeakKeyDictionary()


def placement(optimizer: Optimizer) -> Placement:
    """Return the record of an optimizer; it lives as long as the optimizer.

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
    """Unwrap an optimizer that another one, such as accelerate's, holds as its `optimizer`.

    Such wrappers are not complete optimizers: they have neither hooks nor the same constructor.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _loaded(optimizer: Optimizer) -> None:
    placement(optimizer).forget()
