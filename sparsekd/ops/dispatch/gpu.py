"""The backend "gpu" of CUDA tensors: csrc/cuda, Triton's or torch's kernels, as `gpu_chooser` says.

Where only one of the first two can run it runs everything but what torch's kernels for 2:4 take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsekd.errors import UnavailableError
from sparsekd.ops.dispatch.backends import (
    BACKENDS,
    BY_STRUCTURE,
    PRODUCTS,
    Decision,
    can_take,
    load,
)
from sparsekd.ops.single import Single

_missing = {name: reason for name in ("cuda", "triton") if (reason := load(name)[1])}
_there = [BACKENDS[name] for name in ("cuda", "triton") if name not in _missing]
if not _there:
    raise UnavailableError("; ".join(_missing.values()))


@Single
def chooser() -> Any:
    """Return the chooser of this process, or None if there is nothing to choose."""
    if _missing:
        return None
    from sparsekd.ops.dispatch import gpu_chooser  # which needs Triton

    return gpu_chooser.chooser()


def decide(op: str, args: tuple[Any, ...]) -> Decision:
    """Decide which backend runs a product on these operands.

    Its function decides anew at every call: the choice depends on the structure of the weight and
    on torch's settings of precision, and may wait until no CUDA graph is being recorded.

    Args:
        op: its name.
        args: those of its schema.
    """
    choice = chooser()
    if choice is not None:
        return replace(choice.decide(op, args), run=_DECIDING[op])
    if can_take("semi_structured", op, args):
        return replace(BACKENDS["semi_structured"].decide(op, args), reason=BY_STRUCTURE)
    return replace(_there[0].decide(op, args), reason="the only backend that can run here")


def _deciding(op: str) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        return chooser().decide(op, args).run(*args)

    return run


_DECIDING = {op: _deciding(op) for op in PRODUCTS}


def info() -> dict[str, Any]:
    """Return the path of the file of choices and how many are known; empty without a choice."""
    choice = chooser()
    return {} if choice is None else choice.store.info()


LargestK = _there[0].function("LargestK")
