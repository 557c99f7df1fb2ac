"""Optimizer state that follows topology changes made outside of an updater."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from sparsekd.errors import OptimizerStateError, TopologyError
from sparsekd.nn import SparseModule, sparse_modules
from sparsekd.optim.placement import placement
from sparsekd.optim.remap import check_held, check_remappable, holds, remap_
from sparsekd.topology import Topology, TopologyDelta


@contextmanager
def follow(optimizer: Optimizer, model: nn.Module) -> Iterator[dict[str, TopologyDelta]]:
    """Carry optimizer state through all topology changes of a model inside the `with` block.

    For loading a checkpoint while the optimizer goes on, for rewiring by hand, for copying masks
    from another model. Survivors keep their state and grown weights get that of a new parameter, as
    with `remap_`. If the optimizer state comes from the same checkpoint, load it after the block,
    or load both without `follow`: they fit already.

    Args:
        optimizer: holds the values of the sparse modules; for values it does not hold, the delta is
            reported and nothing else done.
        model: holds sparse modules.

    Yields:
        A dict that is filled at the end of the block: name of each changed layer -> its delta.

    Raises:
        OptimizerStateError: the state of a layer cannot follow (raised before anything changes), or
            the layer now has another Parameter (`load_state_dict(..., assign=True)`).

    Example:
        >>> import torch, sparsekd as skd
        >>> layer = skd.nn.SparseLinear(8, 4, sparsity=0.5, seed=0)
        >>> best = skd.nn.SparseLinear(8, 4, sparsity=0.75, seed=1).state_dict()
        >>> opt = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> layer(torch.ones(2, 8)).sum().backward(); opt.step()
        >>> with skd.optim.follow(opt, layer) as deltas:
        ...     _ = layer.load_state_dict(best)
        >>> opt.state[layer.values]["momentum_buffer"].shape, deltas[""].new.nnz
        (torch.Size([8]), 8)
    """
    before = {}
    for name, module in sparse_modules(model):
        if holds(optimizer, module.values):
            check_remappable(optimizer, module.values, _values_of(name))
        # A copy: what happens may write into the tensors at hand.
        before[name] = module, module.values, copy.deepcopy(module.topology)
    deltas: dict[str, TopologyDelta] = {}
    try:
        yield deltas
    finally:  # a load that fails has changed the layers before the one that did not fit
        for name, (module, values, old) in before.items():
            if old != module.topology:
                deltas[name] = TopologyDelta.between(old, module.topology)
                if holds(optimizer, values):
                    _check_same(optimizer, module, values, name)
                    remap_(optimizer, values, deltas[name])


class Followed:
    """The layers of an updater, with optimizer state that catches up with changes from outside.

    Args:
        modules: sparse modules by name.
        optimizer: holds their values.
    """

    def __init__(self, modules: Mapping[str, SparseModule], optimizer: Optimizer) -> None:
        self._modules, self._optimizer = modules, optimizer
        self._placement = placement(optimizer)
        self._seen: dict[str, Topology] = {}
        self._loads = -1
        self.settle()

    def settle(self) -> None:
        """Record that the optimizer state belongs to the current topologies."""
        for module in self._modules.values():
            self._note(module)
        self._see()

    def changed(self) -> list[str]:
        """List the layers whose optimizer state belongs to an earlier topology.

        Raises:
            OptimizerStateError: loaded state does not fit the layer, or the positions that its
                entries belong to are unknown.
        """
        if self._loads == self._placement.loads and all(
            module._topology is self._seen[name] for name, module in self._modules.items()
        ):
            return []
        names = [name for name, module in self._modules.items() if self._moved(name, module)]
        if not names:
            self._see()
        return names

    def carry(self, name: str) -> TopologyDelta:
        """Carry the optimizer state of one changed layer, and return the delta."""
        module = self._modules[name]
        check_held(self._optimizer, module.values, _values_of(name))
        old = self._placement.get(module.values)
        assert old is not None
        delta = TopologyDelta.between(old, module.topology)
        remap_(self._optimizer, module.values, delta)
        self._note(module)
        return delta

    def _moved(self, name: str, module: SparseModule) -> bool:
        if not holds(self._optimizer, module.values):
            if module.values.requires_grad:
                check_held(self._optimizer, module.values, _values_of(name))
            return False
        known = self._placement.get(module.values)
        if known is not None and (
            known.accept_if_equal() or self._optimizer.state.get(module.values)
        ):
            return self._differs(known, name, module)
        check_remappable(self._optimizer, module.values, _values_of(name))
        self._note(module)
        return False

    def _differs(self, known: Topology, name: str, module: SparseModule) -> bool:
        try:
            return known != module.topology
        except TopologyError:
            raise OptimizerStateError(
                f"{_values_of(name)}: its index tensors were overwritten in place, so it cannot be "
                "told which weight each entry of the optimizer's state belongs to; change a "
                "topology by rewire or load_state_dict, or inside `with skd.optim.follow(...)`"
            ) from None

    def _note(self, module: SparseModule) -> None:
        topology = module.topology
        if module.capturable:  # its tensors are written to by the next rewire
            topology = copy.deepcopy(topology)
        self._placement.put(module.values, topology)

    def _see(self) -> None:
        self._seen = {name: module._topology for name, module in self._modules.items()}
        self._loads = self._placement.loads


def _check_same(
    optimizer: Optimizer, module: SparseModule, values: nn.Parameter, name: str
) -> None:
    if module.values is not values:
        raise OptimizerStateError(
            f"{_values_of(name)}: expected the Parameter that this {type(optimizer).__name__} "
            "holds, got another one; load without assign=True"
        )


def _values_of(name: str) -> str:
    return f"{name}.values" if name else "values"
