"""Blocks that were prepared for the layout at an earlier call, and whether they still serve.

Which modules a block consists of, whether the kernels take them, with which plan and on which
tensors: finding out takes longer than a small block computes. So it is kept with a watch over the
modules, which sees any change of what they hold: tensors, hyperparameters, hooks, mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsekd._torch import has_global_hook
from sparsekd.nn.stored import StoredWeight
from sparsekd.ops import observe
from sparsekd.ops.cpu.blocked import Plan
from sparsekd.ops.cpu.blocked_map import Blocked, compiled

_Watch: Any = compiled("Watch")
_current_isa: Any = compiled("current_isa")
_MOST = 8  # shapes of input of a block

Run = Callable[[Blocked], "Blocked | None"]


class Prepared(NamedTuple):
    """A block as it runs on inputs of one shape.

    Args:
        run: of blocked images.
        plan: that it runs by.
        needs_moments: whether it needs the moments of its input.
    """

    run: Run
    plan: Plan
    needs_moments: bool


class _Owned:
    """What is prepared of the module that owns a block, for as long as the watch holds."""

    def __init__(self, parts: tuple[Any, ...], watch: Any) -> None:
        # Parts are modules of the owner, or next to it: they are not to be kept alive from here.
        self.parts = [None if part is None else weakref.ref(part) for part in parts]
        self.watch = watch
        self.by_call: dict[Hashable, Prepared] = {}

    def holds(self, parts: tuple[Any, ...]) -> bool:
        if len(parts) != len(self.parts):
            return False
        for part, known in zip(parts, self.parts, strict=True):
            if part is not (None if known is None else known()):
                return False
        return self.watch.holds()


_owned: weakref.WeakKeyDictionary[nn.Module, _Owned] = weakref.WeakKeyDictionary()


def _call(shape: Sequence[int], dtype: torch.dtype) -> Hashable:
    return tuple(shape), dtype, torch.get_num_threads(), _current_isa()


def recall(
    owner: nn.Module, shape: Sequence[int], dtype: torch.dtype, *parts: nn.Module | None
) -> Prepared | None:
    """Return what was prepared for such a call, None if nothing was or something has changed.

    Args:
        owner: whose block it is.
        shape: `[N, C, H, W]` of the input.
        dtype: of the input.
        parts: modules beside the owner that the block consists of.
    """
    owned = _owned.get(owner)
    if owned is None or has_global_hook():
        return None
    prepared = owned.by_call.get(_call(shape, dtype))
    if prepared is None or observe.listeners.watch(prepared.plan.crows):
        return None
    if not owned.holds(parts):
        del _owned[owner]
        return None
    return prepared


def remember(
    owner: nn.Module,
    shape: Sequence[int],
    dtype: torch.dtype,
    prepared: Prepared,
    *parts: nn.Module | None,
) -> None:
    """Keep what was prepared for a call; the arguments are as of `recall`."""
    modules = [m for root in (owner, *parts) if root is not None for m in root.modules()]
    # Copies are looked at in every call: something may average them.
    if any(isinstance(m, StoredWeight) and (m._is_copy or m._topology.written) for m in modules):
        return
    owned = _owned.get(owner)
    if owned is None or not owned.holds(parts):
        owned = _owned[owner] = _Owned(parts, _Watch(modules))
    if len(owned.by_call) >= _MOST:
        owned.by_call.clear()
    owned.by_call[_call(shape, dtype)] = prepared
