"""Let others see the operands of the ops as they run, in eager and in compiled code alike.

A weight-gradient op is the one place that holds a layer's output gradient together with its input,
after padding and casts. Methods that need the gradient of weights that are not there (RigL) collect
the operands here on the iterations that ask for it; nothing is stored otherwise. Where the dense
weight of a layer is asked for and computed with, its own gradient is shown instead.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sparsekd._torch import current_pass, running_function


class Listener(Protocol):
    """See the calls of every op of sparsekd while it is one of the `listeners`."""

    def saw(self, op: str, args: tuple[Any, ...]) -> None:
        """Take note of a call; unless `lasting()`, keep copies of what is to be used later.

        Calls come from the threads that make them, be it of other models: look whose they are.
        """


class Watcher(Protocol):
    """See calls before the listeners do, and keep them from these."""

    def saw(self, op: str, args: tuple[Any, ...]) -> bool:
        """Take note of a call; return whether nobody else is to see it."""


class Listeners:
    """The listeners that somebody still holds, for any thread to read while others change them.

    A change makes a new tuple, so whoever runs through one is not disturbed. False where there is
    nobody to tell, which ops ask at every call.
    """

    def __init__(self) -> None:
        self._held: tuple[weakref.ref[Listener], ...] = ()
        self._watchers: tuple[Watcher, ...] = ()
        # Taken again by the same thread where a listener dies while it is held.
        self._lock = threading.RLock()

    def __bool__(self) -> bool:
        return bool(self._held or self._watchers)

    def __iter__(self) -> Iterator[Listener]:
        return (listener for ref in self._held if (listener := ref()) is not None)

    def add(self, listener: Listener) -> None:
        """Let a listener see calls from now on, as long as somebody holds it."""
        with self._lock:
            self.discard(listener)
            self._held = (*self._held, weakref.ref(listener, self._drop))

    def discard(self, listener: Listener) -> None:
        """Let it see no more."""
        with self._lock:
            self._held = tuple(ref for ref in self._held if ref() is not listener)

    def _drop(self, dead: weakref.ref[Listener]) -> None:
        with self._lock:
            self._held = tuple(ref for ref in self._held if ref is not dead)

    @contextmanager
    def before(self, watcher: Watcher) -> Iterator[None]:
        """Show calls to a watcher first while the context lasts."""
        with self._lock:
            self._watchers = (*self._watchers, watcher)
        try:
            yield
        finally:
            with self._lock:
                self._watchers = tuple(w for w in self._watchers if w is not watcher)

    def tell(self, op: str, args: tuple[Any, ...]) -> None:
        """Show a call; `args` are those of the op's schema, in order."""
        if any(watcher.saw(op, args) for watcher in self._watchers):
            return
        for listener in self:
            listener.saw(op, args)


listeners = Listeners()


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
        weight.register_hook(lambda grad: listeners.tell("dense_wgrad", (grad, crow)))


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


def lasting() -> bool:
    """Say whether the operands of the call at hand will stay as they are.

    They do where the call is the backward pass of one of our own autograd nodes: autograd never
    writes into a tensor that somebody else holds. Compiled code reuses its buffers.
    """
    function = running_function()
    return function is not None and function.__module__.startswith("sparsekd.")
