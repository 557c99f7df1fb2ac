"""Weights that train without taking part in the forward pass, beside those of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekd.dst import replicas
from sparsekd.dst.passes import Passes
from sparsekd.errors import UnsupportedError
from sparsekd.nn import SparseModule
from sparsekd.ops import observe
from sparsekd.optim.fresh import fresh_state
from sparsekd.topology import Topology

Pair = tuple[Tensor, Tensor]


class BackwardOnly:
    """The weights that the forward pass of each layer leaves out.

    Some are in training: a parameter of their own, in the group of the layer's values, whose
    gradient is computed whenever that of the values is. The others rest, in one dense copy per
    layer that takes part in no computation. At first all of them rest.

    Args:
        layers: sparse modules by name.
        optimizer: holds their values, and from now on these parameters.

    Attributes:
        parameters: of the weights in training, by layer.
        topologies: where these are, by layer.
        resting: the last known value of every weight that is in no parameter, by layer.
    """

    def __init__(self, layers: Mapping[str, SparseModule], optimizer: Optimizer) -> None:
        self.layers, self.optimizer = dict(layers), optimizer
        self.parameters: dict[str, nn.Parameter] = {}
        self.topologies: dict[str, Topology] = {}
        self.resting: dict[str, Tensor] = {}
        self._passes: dict[str, Passes[Tensor]] = {}
        self._left: dict[str, Tensor] = {}  # what the passes have left in each parameter's gradient
        for name, module in self.layers.items():
            self.resting[name] = module.dense_weight().detach().clone()
            self._place(name, torch.zeros_like(self.resting[name], dtype=torch.bool))
            self.parameters[name] = nn.Parameter(module.values.detach().new_empty(0))
            self._group(module.values).append(self.parameters[name])
            self._passes[name] = Passes(module.values, partial(self._add, name))
        observe.listeners.add(self)

    @property
    def watched(self) -> Mapping[str, SparseModule]:
        """The layers whose gradients it needs to see, by name."""
        return self.layers

    def stop(self) -> None:
        """Stop computing gradients."""
        observe.listeners.discard(self)
        for passes in self._passes.values():
            passes.close()
        for parameter in self.parameters.values():
            parameter.grad = None

    def weights(self, name: str) -> Tensor:
        """Return all weights of a layer in its shape: of the forward pass, in training, at rest."""
        module, all_weights = self.layers[name], self.resting[name].clone()
        flat = all_weights.view(-1)
        flat[self.topologies[name].flat_indices()] = self.parameters[name].detach()
        flat[module.topology.flat_indices()] = module.values.detach()
        return all_weights

    def on_call(self, op: str, args: tuple[Any, ...]) -> None:
        """Compute the gradient of a layer's parameter beside that of its values.

        It counts once the backward pass has written that of the values; see `Passes`.
        """
        seen = observe.weight_gradient(self.layers, op, args)
        if seen is None:
            return
        name, current, grad, x, geometry = seen
        topology, passes = self.topologies[name], self._passes[name]
        if not passes.known(current):
            self._follow(name)
        if x is None:
            part = grad.detach().reshape(-1)[topology.flat_indices()]
        else:
            kernel = getattr(torch.ops.sparsekd, op)
            indices = topology.crow_indices, topology.col_indices
            part = kernel(grad.detach(), x.detach(), *indices, *geometry)
        passes.add(current, part.to(self.parameters[name].dtype))

    def settle(self) -> list[str]:
        """Drop gradients if those of the values were zeroed since the last backward pass.

        Returns:
            The layers whose values have a gradient that no backward pass has written.
        """
        for name in self.layers:
            self._follow(name)
        return [name for name, passes in self._passes.items() if passes.foreign]

    def renew(self) -> None:
        """Note the current gradients of all values as those that backward passes have left."""
        for name, passes in self._passes.items():
            passes.renew()
            self._note(name)

    def reduce_gradients(self) -> None:
        """Average gradients over all ranks, since DistributedDataParallel does not know them."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                replicas.mean_(parameter.grad)

    def prepare_rewire(self, name: str, inner: Tensor, outer: Tensor) -> Callable[[], None]:
        """Check that a layer can compute with mask `inner` and train `outer` too, the rest resting.

        Returns:
            What does so. Values, gradients and optimizer state move along, weights that come from
            rest get the state of a new parameter.

        Raises:
            UnsupportedError: the layer is capturable, so its tensors must stay where they are.
        """
        if self.layers[name].capturable:
            raise UnsupportedError(
                f"model: TopKAST moves gradients and optimizer state to other tensors, which layer "
                f"{name!r} must keep, as it is capturable; make_capturable(model, False) lifts this"
            )
        return partial(self._rewire, name, inner, outer)

    def _rewire(self, name: str, inner: Tensor, outer: Tensor) -> None:
        module, parameter = self.layers[name], self.parameters[name]
        self.resting[name] = self.weights(name)
        old = (module.topology.flat_indices(), self.topologies[name].flat_indices())
        new = (inner.view(-1).nonzero().squeeze(1), outer.view(-1).nonzero().squeeze(1))
        weights = self.resting[name].view(-1)
        grads = _move((module.values.grad, parameter.grad), old, new, weights)
        states = [self.optimizer.state.get(p, {}) for p in (module.values, parameter)]
        fresh = fresh_state(self.optimizer, module.values) if states[0] else {}
        moved = {
            key: _move((value, states[1].get(key)), old, new, weights, fresh.get(key, 0))
            for key, value in states[0].items()
            if isinstance(value, Tensor) and value.shape == module.values.shape
        }
        module.rewire(inner)
        module.values.copy_(weights[new[0]])
        parameter.data = weights[new[1]]
        module.values.grad, parameter.grad = grads
        for key, tensors in moved.items():
            for state, tensor in zip(states, tensors, strict=True):
                if key in state:
                    state[key] = tensor
        self._place(name, outer)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return these weights and their positions; the optimizer has its own state."""
        return {
            "resting": {name: weight.clone() for name, weight in self.resting.items()},
            "extra": {name: p.detach().clone() for name, p in self.parameters.items()},
            "outer": {name: outer.mask() for name, outer in self.topologies.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, parameter in self.parameters.items():
            self.resting[name].copy_(state["resting"][name])
            parameter.data = state["extra"][name].to(parameter.device, parameter.dtype, copy=True)
            self._place(name, state["outer"][name])

    def _add(self, name: str, parts: list[Tensor]) -> None:
        parameter = self.parameters[name]
        for part in parts:
            parameter.grad = part if parameter.grad is None else parameter.grad + part
        self._note(name)

    def _note(self, name: str) -> None:
        grad = self.parameters[name].grad
        if grad is not None:
            self._left[name] = grad.detach().clone()

    def _follow(self, name: str) -> None:
        """Apply to the gradient of a parameter what was done to that of the values."""
        parameter, factor = self.parameters[name], self._passes[name].follow()
        if factor == 0.0:
            parameter.grad = None  # gradients were zeroed: start afresh
        elif factor != 1.0 and parameter.grad is not None:
            # What scales all gradients of the optimizer has scaled this one as well.
            if torch.equal(parameter.grad, self._left[name]):
                parameter.grad = parameter.grad * factor
            self._note(name)

    def _place(self, name: str, mask: Tensor) -> None:
        self.topologies[name] = Topology.from_mask(mask)

    def _group(self, values: nn.Parameter) -> list[nn.Parameter]:
        groups = (group["params"] for group in self.optimizer.param_groups)
        return next(params for params in groups if any(held is values for held in params))


def _move(
    pair: tuple[Tensor | None, Tensor | None], old: Pair, new: Pair, like: Tensor, fill: float = 0
) -> Any:
    """Carry one number per weight from the old sets to the new; weights from neither get `fill`."""
    if pair[0] is None and pair[1] is None:
        return None, None
    flat = torch.full_like(like, fill)
    for tensor, positions in zip(pair, old, strict=True):
        if tensor is not None:
            flat[positions] = tensor.to(flat.dtype)
    return flat[new[0]], flat[new[1]]
