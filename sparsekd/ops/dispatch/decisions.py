"""Which backend runs an op, and why: the one place for all of sparsekd.

`decide` answers for a product on given operands. The kernels are called by it, `explain` shows it,
and measurements are stored under its cache key.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from sparsekd import settings
from sparsekd.errors import BackendError, UnsupportedError
from sparsekd.ops.dispatch.backends import BACKENDS, ELSEWHERE, Backend, Decision, load, module
from sparsekd.ops.dispatch.context import VARIABLE, forced


def decide(op: str, args: tuple[Any, ...]) -> Decision:
    """Decide which backend runs a product, by a measurement now if its cache key is new.

    Args:
        op: one of `backends.PRODUCTS`.
        args: those of its schema.

    Raises:
        BackendError: no backend runs here on tensors like these, or not the one asked for.
        UnsupportedError: it does not take their dtype.
    """
    return backend_of(args[0]).decide(op, args)


def function(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """Return the function of any other op on tensors like `x`; raises what `decide` does."""
    return backend_of(x).function(op)


def backend_of(x: torch.Tensor) -> Backend:
    """Return the backend of a tensor: the one asked for, or that of its device."""
    name = forced() or _automatic(x.device.type)
    if name not in BACKENDS:
        settings.get(VARIABLE)  # which names the variable, where it is the one that is wrong
    module(name)
    chosen = BACKENDS[name]
    if chosen.device is not None and x.device.type != chosen.device:
        raise BackendError(
            f"backend {name!r} runs on device {chosen.device!r}, got a tensor on {x.device}"
        )
    if not x.is_floating_point() or (chosen.dtypes is not None and x.dtype not in chosen.dtypes):
        supported = "floating dtypes" if chosen.dtypes is None else chosen.dtypes
        raise UnsupportedError(f"backend {name!r} supports {supported}, got {x.dtype}")
    return chosen


@cache
def _automatic(device: str) -> str:
    if device == "cuda":
        loaded, reason = load("gpu")
        if loaded is None:
            raise BackendError(
                f"no backend for device 'cuda' ({reason}): {BACKENDS['gpu'].how_to_get}"
            )
        return "gpu"
    if device != "cpu":
        raise BackendError(f"no backend for device {device!r}: {ELSEWHERE}")
    loaded, reason = load("cpp")
    if loaded is not None:
        return "auto"
    warnings.warn(
        f"sparsekd runs on the slow reference backend, its compiled module is missing ({reason}): "
        f"{BACKENDS['cpp'].how_to_get}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"
