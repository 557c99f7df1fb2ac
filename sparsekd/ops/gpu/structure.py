"""Validated copies of index tensors, and the plans that GPU kernels read instead of them.

A structure is copied to the host and validated when it is first seen, or has changed since; plans
are made there, one for each geometry, and uploaded. Kernels read only these plans. A structure
that changes in place keeps its plans' places in memory, so that recorded CUDA graphs stay valid:
new plans are made on the host, and written into the old ones when all are known to fit.

Inputs come in ever new sizes, so plans are given up again; `plan_cache` says which.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sparsekd._torch import storage_id, version_of
from sparsekd.csr import row_indices, validate
from sparsekd.errors import UnsupportedError
from sparsekd.ops.gpu.plan_cache import CachedPlan, clock, fits, has_tensors, take_surplus
from sparsekd.ops.memory_format import rows_cols

_MOST_PIXELS = 2**31 - 1024
_temporary: ContextVar[list[tuple[Structure, Hashable]] | None] = ContextVar(
    "temporary", default=None
)


class Structure:
    """A validated copy of index tensors, and the plans made of it.

    `crow`, `col` and `row`, the row of each nonzero, are on the host. Any number of threads may ask
    for plans; each is made by one of them.

    Args:
        crow: start of each row.
        col: column of each nonzero.
        rows: of the matrix.
        cols: of the matrix.

    Raises:
        TopologyError: they are no structure of this matrix.
    """

    def __init__(self, crow: Tensor, col: Tensor, rows: int, cols: int) -> None:
        self._device, self.size = crow.device, (rows, cols)
        self._plans: dict[Hashable, CachedPlan] = {}
        self._lock = threading.RLock()  # a plan may be made of another one
        self._on_host = False
        self._earlier: dict[Hashable, Any] = {}
        # copied first and validated after, so nothing changes between the check and the use
        self.crow, self.col = (t.detach().to("cpu", copy=True) for t in (crow, col))
        validate(self.crow, self.col, rows, cols)
        self.row = row_indices(self.crow, self.col.shape[0])
        self.versions = _versions(crow, col)

    def changed(self, crow: Tensor, col: Tensor) -> Structure:
        """Build the structure of other index tensors of the same shapes, on the host.

        Raises:
            TopologyError: they are no structure of this matrix.
        """
        fresh = type(self)(crow.cpu(), col.cpu(), *self.size)
        fresh._on_host = True
        cached = list(self._plans.items())
        fresh._earlier = {key: entry.plan for key, entry in cached}
        for key, entry in cached:
            fresh._follow(key, entry)
        return fresh

    def _follow(self, key: Hashable, old: CachedPlan) -> Any:
        """Return the plan that replaces one of the structure that this was."""
        # Tiles that were not there are not looked for: they may be chance, and what has run
        # without them runs on.
        if old.plan is None:
            return self._plans.setdefault(key, CachedPlan(old.make, None)).plan
        return self.plan(key, old.make)

    def replace(self, changed: Structure, versions: tuple[int, ...]) -> None:
        """Become what `changed` has returned; plans of equal size stay in their memory."""
        with self._lock:
            self.crow, self.col, self.row = changed.crow, changed.col, changed.row
            # Those that were made since are made anew too, those given up since are not.
            for key, entry in list(self._plans.items()):
                entry.replace(changed._follow(key, entry), self._device)
            self.versions = versions

    def require_places(self, changed: Structure) -> None:
        """Raise UnsupportedError unless every plan keeps its place when it becomes `changed`."""
        for key, entry in list(self._plans.items()):
            new = changed._follow(key, entry)
            if has_tensors(entry.plan) and not fits(entry.plan, new):
                raise UnsupportedError(_refusal(key, new))

    def rows(self) -> Tensor:
        """Return the row of each nonzero, int32 `[nnz]` on the device."""
        return self.plan("rows", lambda structure: structure.upload(structure.row))

    def cols(self) -> Tensor:
        """Return the column of each nonzero, int32 `[nnz]` on the device."""
        return self.plan("cols", lambda structure: structure.upload(structure.col))

    def plan(self, key: Hashable, make: Callable[[Structure], Any]) -> Any:
        """Return a plan of this structure by `make`; it is cached, and made again after eviction.

        Args:
            key: tells plans apart, and starts with a word for what the plan is of.
            make: makes the plan, and is asked again when the structure changes.
        """
        entry = self._plans.get(key)
        if entry is None:
            entry = self._make(key, make)
        entry.used = next(clock)
        if not entry.pinned and _recording():
            with _lock:
                entry.pinned = True
                self._plans.setdefault(key, entry)  # it may have been given up a moment ago
        return entry.plan

    def _make(self, key: Hashable, make: Callable[[Structure], Any]) -> CachedPlan:
        with self._lock:
            entry = self._plans.get(key)
            if entry is not None:  # another thread was faster
                return entry
            entry = self._plans[key] = CachedPlan(make, make(self))
        made = _temporary.get()
        if made is not None:
            made.append((self, key))
        if not self._on_host:
            _trim(self)
        return entry

    @contextmanager
    def temporary_plans(self) -> Iterator[None]:
        """Drop the plans that this thread makes in the context, as backends are only compared."""
        before = _temporary.set([])
        try:
            yield
        finally:
            made = _temporary.get() or []
            _temporary.reset(before)
            with _lock:
                for structure, key in made:
                    if structure is self:
                        self._plans.pop(key, None)

    def earlier(self, key: Hashable) -> Any:
        """Return the plan that the structure had before it changed, None if there was none."""
        return self._earlier.get(key)

    def upload(self, indices: Tensor) -> Tensor:
        """Return indices as int32 on the device."""
        if indices.numel() and int(indices.max()) >= _MOST_PIXELS:
            raise UnsupportedError(
                f"x: backend 'cuda' supports fewer than {_MOST_PIXELS} pixels of all channels of "
                f"an image together, padding included, got {int(indices.max()) + 1} or more"
            )
        return self.to_device(indices.to(torch.int32))

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a tensor of a plan on the device."""
        _refuse_recording()
        return tensor.to(self._device)


def _refusal(key: Any, new: Any) -> str:
    what = key if isinstance(key, str) else key[0]
    missing, others = "has none, or too few values in each", "has others in size or number"
    has = others if has_tensors(new) else missing
    return f"its CUDA graphs may have recorded {what}, of which the new structure {has}"


def _versions(crow: Tensor, col: Tensor) -> tuple[int, ...]:
    """Return counters that change with the tensors; torch has none for inference mode."""
    return tuple(0 if t.is_inference() else version_of(t) for t in (crow, col))


def _recording() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _refuse_recording() -> None:
    """Raise UnsupportedError while a CUDA graph is recorded, which a copy from the host ends."""
    if _recording():
        raise UnsupportedError(
            "x, crow, col: the plans of a structure that is new, or new to inputs of this size, "
            "cannot be made while a CUDA graph is recorded; run the same step before recording it"
        )


_known: dict[tuple[Any, ...], tuple[Structure, list[StorageWeakRef]]] = {}
# Of what is known and which plans are given up; backward passes of several devices come here at
# the same time. Whoever holds it asks for no structure's own lock.
_lock = threading.RLock()


def _trim(structure: Structure) -> None:
    """Evict surplus plans after a structure has got a new one."""
    with _lock:
        gone = take_surplus(structure._plans, [known._plans for known in _structures()])
    if any(entry.bytes for entry in gone):
        _wait(structure)


def _wait(structure: Structure) -> None:
    """Wait before plans are given up: streams other than those they were made on may read them."""
    if structure._plans and structure._device.type == "cuda":
        torch.cuda.synchronize(structure._device)


def _structures() -> list[Structure]:
    return [structure for structure, _ in list(_known.values())]


def info() -> dict[str, int]:
    """Return how many structures and plans are kept for GPU kernels, and the bytes of the plans."""
    structures = _structures()
    kept = [entry for structure in structures for entry in list(structure._plans.values())]
    total = sum(entry.bytes for entry in kept)
    return {"structures": len(structures), "plans": len(kept), "bytes": total}


def find_structure(crow: Tensor, col: Tensor, rows: int, cols: int) -> Structure:
    """Return the validated structure of index tensors, made when they are new, read when changed.

    Storages are told apart by address and versions by torch's counter, so a known structure costs
    neither a look at the device nor a wait for it.

    Raises:
        TopologyError: they are no structure of this matrix.
        UnsupportedError: they are new, or changed, and a CUDA graph is being recorded.
    """
    storages = [tensor.untyped_storage() for tensor in (crow, col)]
    key = (
        *map(storage_id, storages), rows, cols, crow.shape, col.shape,
        crow.stride(), col.stride(), crow.storage_offset(), col.storage_offset(),
    )  # fmt: skip
    known = _known.get(key)
    if known is None:
        _refuse_recording()
        with _lock:
            known = _known.get(key)  # another thread may have been faster
            if known is None:
                gone = [k for k, (_, refs) in _known.items() if any(r.expired() for r in refs)]
                for expired in gone:
                    _wait(_known.pop(expired)[0])
                # A weak reference keeps the address of a storage from being used again.
                refs = [StorageWeakRef(storage) for storage in storages]
                known = _known[key] = Structure(crow, col, rows, cols), refs
    structure, versions = known[0], _versions(crow, col)
    if structure.versions != versions:
        _refuse_recording()
        with structure._lock:
            if structure.versions != versions:
                structure.replace(structure.changed(crow, col), versions)
    return structure


def structure_of(x: Tensor, crow: Tensor, col: Tensor, weight_shape: Sequence[int]) -> Structure:
    """Return the validated structure of a weight that is to meet `x`.

    Raises:
        TopologyError: the index tensors are no structure of this weight.
        UnsupportedError: they are on another device than `x`.
    """
    if crow.device != x.device or col.device != x.device:
        raise UnsupportedError(
            f"crow, col: expected the device of the input, {x.device}, "
            f"got {crow.device} and {col.device}"
        )
    return find_structure(crow, col, *rows_cols(weight_shape))


def prepare_plans(
    crow: Tensor, col: Tensor, new_crow: Tensor, new_col: Tensor
) -> Callable[[], None]:
    """Plan for other indices of the same shapes; change nothing yet.

    Returns:
        A function that puts the plans in place, for when `crow` and `col` hold these indices.

    Raises:
        UnsupportedError: a plan would not keep its place.
    """
    wanted = tuple(storage_id(tensor.untyped_storage()) for tensor in (crow, col))
    with _lock:
        known = [structure for key, (structure, _) in _known.items() if key[:2] == wanted]
    changed = [structure.changed(new_crow, new_col) for structure in known]
    for structure, fresh in zip(known, changed, strict=True):
        structure.require_places(fresh)

    def replace() -> None:
        for structure, fresh in zip(known, changed, strict=True):
            structure.replace(fresh, _versions(crow, col))

    return replace
