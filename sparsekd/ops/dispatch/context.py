"""The backend that a user asks for: `backend(...)`, and SPARSEKD_BACKEND outside of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

from sparsekd._torch import environment, environment_key
from sparsekd.ops.dispatch import backends

VARIABLE = "SPARSEKD_BACKEND"

# Of the thread or the asyncio task at hand: contexts of others may end in any order.
_override: ContextVar[str | None] = ContextVar("sparsekd.backend", default=None)
_KEY = environment_key(VARIABLE)


def forced() -> str | None:
    """Return the backend asked for by `backend(...)` or SPARSEKD_BACKEND, None for automatic."""
    override = _override.get()
    if override is not None or _KEY not in environment:
        return override
    return os.environ[VARIABLE] or None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of sparsekd on the named backend while the context lasts.

    It holds for the thread, or the asyncio task, that enters it, and for the backward passes that
    it runs inside; other threads are not affected, nor are those that it starts. A backward pass
    that comes to another thread runs on the backend that its forward pass was asked to run on:
    autograd has threads of its own for CUDA tensors. Outside, the environment variable
    SPARSEKD_BACKEND decides, and without it CPU tensors get "auto" and CUDA tensors "gpu".

    Args:
        name: "auto" for whichever of "cpp" and "dense" measures faster, op by op; "cpp" for the
            sparse kernels and nothing else; "dense" for torch's kernels on a weight that is
            densified for each call; "reference". On GPUs, "triton" or "cuda" for the sparse kernels
            and nothing else; "dense_cuda" for torch's on a weight that is densified for each call;
            "semi_structured" for torch's where a weight is 2:4 and they take the product; "gpu" for
            whichever of these measures fastest, op by op.

    Raises:
        BackendError: there is no such backend, or it cannot run here; the message says how to get
            it.

    Example:
        >>> import torch
        >>> import sparsekd as skd
        >>> with skd.backend("reference"):
        ...     y = skd.nn.SparseLinear(8, 4, sparsity=0.5)(torch.ones(2, 8))
    """
    backends.module(name)
    before = _override.get()
    _override.set(name)
    try:
        yield
    finally:
        _override.set(before)


class Asked(NamedTuple):
    """A backend that `backend(...)` asked for, and the thread it was asked for on."""

    name: str
    thread: int


def asked() -> Asked | None:
    """Return the current `backend(...)` for `followed`; None, as nearly always, outside of any."""
    name = _override.get()
    return None if name is None else Asked(name, threading.get_ident())


def followed(forward: Asked) -> AbstractContextManager[None]:
    """Run a backward pass, where it has come to another thread, as its forward pass was asked to.

    Args:
        forward: `asked()` of the forward pass.
    """
    elsewhere = forward.thread != threading.get_ident()
    return backend(forward.name) if elsewhere and _override.get() is None else nullcontext()
