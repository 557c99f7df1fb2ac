"""Let Triton's interpreter notice accesses outside of a kernel's tensors.

Installed for every test of a process with TRITON_INTERPRET=1, see conftest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime import interpreter


class OutOfBounds(IndexError):
    """A program accesses memory that belongs to no tensor of the launch."""


class Checked:
    """Stand in for the interpreter's memory, with a check before every access."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.tensors: list[tuple[int, int, str]] = []  # of the launch: start, end, what it is

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, pointers, mask, other, dtype):
        self._check("loads", pointers, mask, np.dtype(dtype).itemsize)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self._check("stores", pointers, mask, values.dtype.itemsize)
        return self._memory.store(pointers, values, mask)

    def atomic_rmw(self, op, pointers, values, mask, semantics):
        self._check("updates", pointers, mask, values.dtype.itemsize)
        return self._memory.atomic_rmw(op, pointers, values, mask, semantics)

    def atomic_cas(self, pointers, expected, values, semantics):
        self._check("updates", pointers, np.True_, values.dtype.itemsize)
        return self._memory.atomic_cas(pointers, expected, values, semantics)

    def _check(self, what: str, pointers, mask, size: int) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        used = pointers[mask.astype(bool)].astype(np.int64)
        inside = np.zeros(used.shape, bool)
        for start, end, _ in self.tensors:
            inside |= (used >= start) & (used + size <= end)
        if inside.all():
            return
        first = int(used[~inside][0])
        start, end, name = min(
            self.tensors, key=lambda t: min(abs(first - t[0]), abs(first - t[1]))
        )
        raise OutOfBounds(
            f"program {interpreter.interpreter_builder.grid_idx} {what} {size} bytes at "
            f"{first - start:+d} of the {end - start} bytes of a tensor {name}, "
            f"and {(~inside).sum()} of {used.size} elements in no tensor at all"
        )


@contextmanager
def checked_bounds() -> Iterator[None]:
    """Check every access that interpreted kernels make."""
    memory, prepare = interpreter._interpreter, interpreter.GridExecutor._init_args_hst
    checked = Checked(memory)

    def note_tensors(self, args, kwargs):
        found = prepare(self, args, kwargs)
        checked.tensors = list(_storages([*found[0], *found[1].values()]))
        return found

    interpreter._interpreter = checked
    interpreter.GridExecutor._init_args_hst = note_tensors
    try:
        yield
    finally:
        interpreter._interpreter = memory
        interpreter.GridExecutor._init_args_hst = prepare


def _storages(values: Any) -> Iterator[tuple[int, int, str]]:
    for value in values:
        if isinstance(value, tuple):
            yield from _storages(value)
        elif hasattr(value, "untyped_storage"):
            storage = value.untyped_storage()
            start = storage.data_ptr()
            yield start, start + storage.nbytes(), f"{tuple(value.shape)} of {value.dtype}"
