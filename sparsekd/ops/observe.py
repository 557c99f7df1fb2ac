"""Listeners to the calls of the ops, in eager and in compiled code alike.

A weight-gradient op is the one place that has a layer's output gradient together with its input,
after padding and casts. Methods that need the gradient of weights that are not stored (RigL)
collect these operands on the iterations that need them; nothing is stored otherwise. If the dense
weight of a layer is used in a computation, its own gradient is passed on instead.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from sparsekd._torch import current_pass, running_function


class Listener(Protocol):
    """An observer of the calls of every op, while it is one of the `listeners`."""

    @property
    def watched(self) -> Mapping[str, Any] | None:
        """The sparse modules whose gradients it needs to see, by name; None for all."""

    def on_call(self, op: str, args: tuple[Any, ...]) -> None:
        """Handle a call; unless `lasting()`, operands needed later have to be copied.

        Calls come from any thread and may belong to other models, which the listener has to check.
        """


class Watcher(Protocol):
    """An observer that gets calls before the listeners, and can keep them to itself."""

    def on_call(self, op: str, args: tuple[Any, ...]) -> bool:
        """Handle a call; return True to hide it from the listeners."""


class Listeners:
    """A thread-safe set of listeners, held by weak references.

    A change makes a new tuple, so that iterations over the old one are not disturbed. It is false
    if it is empty, which ops check at every call.
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

    def watch(self, crows: Iterable[Tensor]) -> bool:
        """Return whether somebody needs to see the gradients of sparse weights.

        Args:
            crows: of their structures.
        """
        if not self:
            return False
        if self._watchers:
            return True
        return any(
            listener.watched is None or owner(listener.watched, crow) is not None
            for listener in self
            for crow in crows
        )

    def add(self, listener: Listener) -> None:
        """Add a listener, for as long as something else holds it."""
        with self._lock:
            self.discard(listener)
            self._held = (*self._held, weakref.ref(listener, self._drop))

    def discard(self, listener: Listener) -> None:
        """Remove a listener."""
        with self._lock:
            self._held = tuple(ref for ref in self._held if ref() is not listener)

    def _drop(self, dead: weakref.ref[Listener]) -> None:
        with self._lock:
            self._held = tuple(ref for ref in self._held if ref is not dead)

    @contextmanager
    def before(self, watcher: Watcher) -> Iterator[None]:
        """Pass calls to a watcher first while the context lasts."""
        with self._lock:
            self._watchers = (*self._watchers, watcher)
        try:
            yield
        finally:
            with self._lock:
                self._watchers = tuple(w for w in self._watchers if w is not watcher)

    def tell(self, op: str, args: tuple[Any, ...]) -> None:
        """Pass on a call; `args` are those of the op's schema, in order."""
        if any(watcher.on_call(op, args) for watcher in self._watchers):
            return
        for listener in self:
            listener.on_call(op, args)


listeners = Listeners()


def owner(modules: Mapping[str, Any], crow: Tensor) -> str | None:
    """Find the sparse module whose structure an op was called with.

    Args:
        modules: sparse modules by name.
        crow: of the call.
    """
    address = crow.data_ptr()
    return next((n for n, m in modules.items() if m.crow_indices.data_ptr() == address), None)


def show_gradient(weight: Tensor, crow: Tensor) -> None:
    """Pass the gradient of a dense weight to the listeners, as a call of the op `dense_wgrad`.

    Args:
        weight: that was made from the values of a sparse module.
        crow: of its structure.
    """
    if listeners and weight.requires_grad:
        weight.register_hook(lambda grad: listeners.tell("dense_wgrad", (grad, crow)))


class WeightGradient(NamedTuple):
    """A call of a weight-gradient op: its module, its backward pass, its operands."""

    name: str
    backward_pass: int
    grad: Tensor
    x: Tensor | None
    """The input; None where `grad` is the dense gradient itself."""
    geometry: list[Any]


def weight_gradient(
    modules: Mapping[str, Any], op: str, args: tuple[Any, ...]
) -> WeightGradient | None:
    """Interpret a call as a weight gradient; None if it is none, or of no layer in `modules`.

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
    """Return whether the operands of the current call will not be overwritten.

    They are safe if the call is the backward of one of our own autograd nodes: autograd never
    writes into a tensor that something else holds. Compiled code reuses its buffers.
    """
    function = running_function()
    return function is not None and function.__module__.startswith("sparsekd.")
