"""The ops below autograd: check a call, show it to the listeners, run it on its backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparsekd.ops import checks, growth, observe
from sparsekd.ops.dispatch.backends import BACKENDS, PRODUCTS, Decision
from sparsekd.ops.dispatch.cache_key import call_key
from sparsekd.ops.dispatch.context import forced
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.ops.dispatch.decisions import function as function_for

MOST_KNOWN = 1 << 12
"""Decisions kept of an op, about a kilobyte each: those of a network in a dozen sizes."""


def kernel(name: str, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return the function that checks a call, shows it to the listeners and runs it.

    Args:
        name: of the op.
        function: what runs it; by default that of the backend, chosen at each call.
    """
    check = getattr(checks, name)

    def run(*args: Any) -> Any:
        check(*args)
        if observe.listeners:
            observe.listeners.tell(name, args)
        return (function or function_for(name, args[0]))(*args)

    return run


class Product:
    """The kernel of a product, which remembers what was decided for calls alike.

    What these have in common is checked and decided at the first of them. Between two large
    products little of Python is left in the caches, and each object touched costs a trip to
    memory: what takes a microsecond by itself takes five in a training step.

    Args:
        name: of the op.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._check = getattr(checks, name)
        self._known: dict[Hashable, tuple[Decision, Callable[..., Tensor]]] = {}

    def __call__(self, *args: Any) -> Tensor:
        if observe.listeners:
            observe.listeners.tell(self.name, args)
        return self._find(args)[1](*args)

    def decide(self, args: tuple[Any, ...]) -> Decision:
        """Decide what runs these operands; raise if they do not fit together."""
        return self._find(args)[0]

    def _find(self, args: tuple[Any, ...]) -> tuple[Decision, Callable[..., Tensor]]:
        """Return the decision, and the function that calls like this one are prepared with."""
        key = call_key(forced(), torch.get_num_threads(), args)
        known = self._known.get(key)
        if known is None:
            self._check(*args)
            decision = decide(self.name, args)
            backend = BACKENDS[decision.backend]
            itself = decision.run is backend.function(self.name)
            known = decision, backend.prepared(self.name, args) if itself else decision.run
            if len(self._known) >= MOST_KNOWN:  # inputs of ever new shapes
                self._known.clear()
            self._known[key] = known
        return known


products = {name: Product(name) for name in PRODUCTS}
kernels = SimpleNamespace(**products, grow_topk=kernel("grow_topk", growth.grow_topk))
"""Every op that computes with a weight, by name."""
