"""What a CUDA graph keeps of a stretch of code: launches with addresses, and torch's own calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ptx_machine import Executable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsekd.ops.gpu import structure as gpu_structure


def plan_tensors() -> list[Tensor]:
    """Return every tensor that the plans of all structures consist of."""
    known = [made._plans.values() for made, _ in gpu_structure._known.values()]
    leaves = tree_leaves([kept.plan for plans in known for kept in plans])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Record, while it is entered, what runs: ``with Tape(monkeypatch) as tape: ...``.

    Launches go through `owner.name`, that of the PTX machine by default.

    A launch is kept as the bytes of its arguments, addresses among them, and torch's calls write
    to where they wrote. Tensors that were made meanwhile are held, as a graph's memory is its own.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, owner: Any = Executable, name: str = "launch"
    ) -> None:
        super().__init__()
        self._owner, self._name = owner, name
        self.launches = 0
        self._calls: list[Callable[[], Any]] = []
        self._held: list[Any] = []
        self._patch = patch

    def __enter__(self) -> Tape:
        launch = getattr(self._owner, self._name)

        def record(*args: Any) -> int:
            self.launches += 1
            self._calls.append(lambda: launch(*args))
            return launch(*args)

        self._patch.setattr(self._owner, self._name, record)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._held.append((args, kwargs, out))
        if func._schema.is_mutable:
            self._calls.append(lambda: func(*args, **kwargs))
        elif not (func.is_view or "empty" in func.name()):
            self._calls.append(lambda: self._write(func(*args, **kwargs), out))
        return out

    @staticmethod
    def _write(found: Any, out: Any) -> None:
        for new, old in zip(tree_leaves(found), tree_leaves(out), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():  # where the calls were recorded
            for call in self._calls:
                call()
