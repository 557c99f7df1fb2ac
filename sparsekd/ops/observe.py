"""Let others see the operands of the ops as they run, in eager and in compiled code alike.

A weight-gradient op is the one place that holds a layer's output gradient together with its input,
after padding and casts. Methods that need the gradient of weights that are not there (RigL) collect
the operands here on the iterations that ask for it; nothing is stored otherwise.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
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


class WeightGradient(NamedTuple):
    """Hold a call of a weight-gradient op: whose it is, in which backward pass, on what."""

    name: str
    backward_pass: int
    grad: Tensor
    x: Tensor
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
    if op not in ("conv2d_wgrad", "linear_wgrad"):
        return None
    grad, x, crow, _, *geometry = args
    name, current = owner(modules, crow), torch._C._current_graph_task_id()
    if name is None or current == -1:  # -1: outside any backward pass
        return None
    return WeightGradient(name, current, grad, x, geometry)


def lasting() -> bool:
    """Say whether the operands of the call at hand will stay as they are.

    They do where the call is the backward pass of one of our own autograd nodes: autograd never
    writes into a tensor that somebody else holds. Compiled code reuses its buffers.
    """
    node = torch._C._current_autograd_node()
    forward = getattr(type(node), "_forward_cls", None)
    return forward is not None and forward.__module__.startswith("sparsekd.")
