"""Let others see the operands of the ops as they run, in eager and in compiled code alike.

A weight-gradient op is the one place that holds a layer's output gradient together with its input,
after padding and casts. Methods that need the gradient of weights that are not there (RigL) collect
the operands here on the iterations that ask for it; nothing is stored otherwise. Where the dense
weight of a layer is asked for and computed with, its own gradient is shown instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Listener(Protocol):
    """See the calls of every op of sparsekd while it is one of the `listeners`."""

    def saw(self, op: str, args: tuple[Any, ...]) -> None:
        """Take note of a call; unless `lasting()`, keep copies of what is to be used later."""


listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def tell(op: str, args: tuple[Any, ...]) -> None:
    """Show a call to all listeners; `args` are those of the op's schema, in order."""
    for listener in listeners:
        listener.saw(op, args)


def owner(modules: Mapping[str, Any], crow: Tensor) -> str | None:
    """Return the name of the sparse module whose structure an op was called with, if it is there.

    Args:
        modules: sparse modules by name.
        crow: of the call.
    """
    address = crow.data_ptr()
    return next((n for n, m in modules.items() if m.crow_indices.data_ptr() == address), None)


def show_gradient(weight: Tensor, crow: Tensor) -> None:
    """Show the listeners the gradient of a dense weight when it forms, as the op `dense_wgrad`.

    Args:
        weight: that was made from the values of a sparse module.
        crow: of its structure.
    """
    if listeners and weight.requires_grad:
        weight.register_hook(lambda grad: tell("dense_wgrad", (grad, crow)))


class WeightGradient(NamedTuple):
    """A call of a weight-gradient op: whose it is, in which backward pass, on what."""

    name: str
    backward_pass: int
    grad: Tensor
    x: Tensor | None
    """The input; None where `grad` is the dense gradient itself."""
    geometry: list[Any]


def weight_gradient(
    modules: Mapping[str, Any], op: str, args: tuple[Any, ...]
) -> WeightGradient | None:
    """Return what a call that was `saw` forms the gradient of, None if it is none of `modules`.

    Args:
        modules: sparse modules by name.
        op: that was called; calls outside any backward pass do not count.
        args: those of its schema.
    """
    if op in ("conv2d_wgrad", "linear_wgrad"):
        grad, x, crow, _, *geometry = args
    elif op == "dense_wgrad":
        (grad, crow), x, geometry = args, None, []
    else:
        return None
    name, current = owner(modules, crow), current_pass()
    if name is None or current == -1:  # -1: outside any backward pass
        return None
    return WeightGradient(name, current, grad, x, geometry)


def current_pass() -> int:
    """Return the number of the backward pass that is running, -1 outside of any."""
    return torch._C._current_graph_task_id()


def at_end_of_pass(callback: Callable[[], None]) -> None:
    """Call back when the backward pass that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def lasting() -> bool:
    """Say whether the operands of the call at hand will stay as they are.

    They do where the call is the backward pass of one of our own autograd nodes: autograd never
    writes into a tensor that somebody else holds. Compiled code reuses its buffers.
    """
    node = torch._C._current_autograd_node()
    forward = getattr(type(node), "_forward_cls", None)
    return forward is not None and forward.__module__.startswith("sparsekd.")
