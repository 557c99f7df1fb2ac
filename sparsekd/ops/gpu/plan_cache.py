"""The cache of plans of GPU kernels: how many are kept, and how one replaces another.

Inputs come in ever new sizes, and each takes plans of its own. They are given up again, least
recently used first, but for those that recorded CUDA graphs read: a graph has their addresses, so
a plan whose structure changes is written into the tensors that it had.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

MOST_PLANS = 64
"""Of one structure. An input size takes two to five, so those of ten sizes stay."""
LATEST_PLANS = 16
"""Of one structure: what the size at hand needs, which a model of any size keeps."""
MOST_BYTES = 256 << 20
"""Of all structures together, except where their latest plans alone take more."""

clock = itertools.count(1)


class CachedPlan:
    """A plan that is kept between calls.

    Args:
        make: makes it of a structure, and is asked again when the structure changes.
        plan: what it made.
    """

    __slots__ = ("bytes", "make", "pinned", "plan", "used")

    def __init__(self, make: Callable[[Any], Any], plan: Any) -> None:
        self.make, self.plan = make, plan
        self.bytes = tensor_bytes(plan)
        self.used = next(clock)
        self.pinned = False  # a recorded CUDA graph reads it

    def replace(self, plan: Any, device: torch.device) -> None:
        """Put another plan in its place, in the tensors of the old one where they fit."""
        self.plan = overwrite(self.plan, plan, device)
        self.bytes = tensor_bytes(self.plan)


Plans = dict[Hashable, CachedPlan]  # of one structure


def take_surplus(added_to: Plans, every: Iterable[Plans]) -> list[CachedPlan]:
    """Evict the surplus plans, and return them.

    Args:
        added_to: those of the structure that has a new one.
        every: those of all structures.
    """
    taken = [added_to.pop(key) for key, _ in _oldest(added_to, MOST_PLANS)]
    every = list(every)
    total = sum(kept.bytes for plans in every for kept in list(plans.values()))
    if total > MOST_BYTES:
        spare = [
            (kept, plans, key) for plans in every for key, kept in _oldest(plans, LATEST_PLANS)
        ]
        for kept, plans, key in sorted(spare, key=lambda entry: entry[0].used):
            if total <= MOST_BYTES:
                break
            taken.append(plans.pop(key))
            total -= kept.bytes
    return taken


def _oldest(plans: Plans, most: int) -> list[tuple[Hashable, CachedPlan]]:
    """Return the plans beyond the latest that may be evicted, the oldest first."""
    ordered = sorted(plans.items(), key=lambda item: item[1].used)
    return [(key, kept) for key, kept in ordered[: max(len(plans) - most, 0)] if not kept.pinned]


def tensor_bytes(plan: Any) -> int:
    """Return the bytes of the tensors of a plan."""
    if isinstance(plan, Tensor):
        return plan.nbytes
    return sum(map(tensor_bytes, plan)) if isinstance(plan, tuple) else 0


def has_tensors(plan: Any) -> bool:
    """Return whether a plan is, or has, a tensor."""
    return isinstance(plan, Tensor) or (isinstance(plan, tuple) and any(map(has_tensors, plan)))


def fits(old: Any, new: Any) -> bool:
    """Return whether a plan can be written into another, and kernels be launched with it alike."""
    if isinstance(old, Tensor):
        return isinstance(new, Tensor) and old.shape == new.shape
    if isinstance(old, tuple):
        return type(old) is type(new) and len(old) == len(new) and all(map(fits, old, new))
    return bool(old == new)


def overwrite(old: Any, new: Any, device: torch.device) -> Any:
    """Return a plan on the device, in the tensors of another one where they fit."""
    if isinstance(new, Tensor):
        in_place = isinstance(old, Tensor) and old.shape == new.shape
        return old.copy_(new) if in_place else new.to(device)
    if not isinstance(new, tuple):
        return new
    alike = isinstance(old, tuple) and len(old) == len(new)
    pairs = zip(old if alike else [None] * len(new), new, strict=True)
    parts = [overwrite(*pair, device) for pair in pairs]
    return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
