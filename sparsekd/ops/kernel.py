"""The ops below autograd: check a call, show it to the listeners, run it on its backend."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparsekd.ops import checks, growth, observe
from sparsekd.ops.dispatch.backends import PRODUCTS, Decision
from sparsekd.ops.dispatch.cache_key import serial, sizes_of
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
        self._known: dict[tuple[Any, ...], Decision] = {}

    def __call__(self, *args: Any) -> Tensor:
        if observe.listeners:
            observe.listeners.tell(self.name, args)
        return self.decide(args).run(*args)

    def decide(self, args: tuple[Any, ...]) -> Decision:
        """Decide what runs these operands; raise if they do not fit together."""
        facts = forced(), torch.get_num_threads(), serial(args[2], args[3]), sizes_of(args)
        decision = self._known.get(facts)
        if decision is None:
            self._check(*args)
            if len(self._known) >= MOST_KNOWN:  # inputs of ever new shapes
                self._known.clear()
            decision = self._known[facts] = decide(self.name, args)
        return decision


products = {name: Product(name) for name in PRODUCTS}
kernels = SimpleNamespace(**products, grow_topk=kernel("grow_topk", growth.grow_topk))
"""Every op that computes with a weight, by name."""
