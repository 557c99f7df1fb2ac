"""What structures become for the CUDA kernels: for each nonzero, the site of the input it meets.

A structure is copied to the host and validated when it is first seen, or has changed since; plans
are made there, once for each geometry, and uploaded. Kernels read only these plans. A structure
that changes in place keeps its plans' places in memory, so that recorded CUDA graphs stay valid:
new plans are made on the host, and written into the old ones once all are known to fit.

Inputs come in ever new sizes, so plans are given up again; `kept_plans` says which.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import sparsekd._C as _C
from sparsekd.csr import row_indices
from sparsekd.errors import UnsupportedError
from sparsekd.ops.cuda.kept import Kept, clock, fits, has_tensors, take_surplus
from sparsekd.ops.memory_format import rows_cols

_MOST_SITES = 2**31 - 1024
_trial: ContextVar[list[tuple[Structure, Hashable]] | None] = ContextVar("trial", default=None)


class Conv(NamedTuple):
    """Hold what of a convolution plans depend on."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def conv_of(
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Conv:
    """Return what a schema's lists say of a convolution, in a form that keys can hold."""
    return Conv(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)


class Window(NamedTuple):
    """Name the outputs of a product and, in sites, where they and their inputs are; see api.h."""

    height: int
    width: int
    in_row: int
    in_col: int
    out_origin: int
    out_row: int
    out_col: int


class Plan(NamedTuple):
    """Hold a product: rows of nonzeros, for each the offset of its site, and rows by their length.

    `slots`, if there are any, say which of the weight's values belong to the nonzeros.
    """

    crow: Tensor
    offset: Tensor
    order: Tensor
    slots: Tensor | None
    window: Window


class InputGradient(NamedTuple):
    """Hold one plan for each phase of the stride, and how the output gradient is padded."""

    padding: tuple[int, int, int, int]
    phases: tuple[Plan, ...]


class Structure:
    """Hold a validated copy of index tensors, and the plans made of it.

    `crow`, `col` and `row`, the row of each nonzero, are on the host. Any number of threads may ask
    for plans; each is made once.

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
        self._plans: dict[Hashable, Kept] = {}
        self._lock = threading.RLock()  # a plan may be made of another one
        self._on_host = False
        self._earlier: dict[Hashable, Any] = {}
        # copied first and validated after, so nothing changes between the check and the use
        host = [tensor.detach().to("cpu", copy=True) for tensor in (crow, col)]
        _C.validate(*host, *self.size)
        self.crow, self.col = host
        self.row = row_indices(self.crow, self.col.shape[0])
        self.versions = _versions(crow, col)

    def changed(self, crow: Tensor, col: Tensor) -> Structure:
        """Return what index tensors of the same shapes make of this structure, on the host.

        Raises:
            TopologyError: they are no structure of this matrix.
        """
        fresh = type(self)(crow.cpu(), col.cpu(), *self.size)
        fresh._on_host = True
        held = list(self._plans.items())
        fresh._earlier = {key: kept.plan for key, kept in held}
        for key, kept in held:
            fresh._follow(key, kept)
        return fresh

    def _follow(self, key: Hashable, old: Kept) -> Any:
        """Return the plan that takes the place of one of the structure that this has been."""
        # Tiles that were not there are not looked for: they may be chance, and what has run
        # without them runs on.
        if old.plan is None:
            return self._plans.setdefault(key, Kept(old.make, None)).plan
        return self.once(key, old.make)

    def adopt(self, changed: Structure, versions: tuple[int, ...]) -> None:
        """Become what `changed` has returned; plans that keep their sizes keep their places."""
        with self._lock:
            self.crow, self.col, self.row = changed.crow, changed.col, changed.row
            # Those that were made since are made anew too, those given up since are not.
            for key, kept in list(self._plans.items()):
                kept.replace(changed._follow(key, kept), self._device)
            self.versions = versions

    def require_places(self, changed: Structure) -> None:
        """Raise UnsupportedError unless every plan keeps its place when it becomes `changed`."""
        for key, kept in list(self._plans.items()):
            new = changed._follow(key, kept)
            if has_tensors(kept.plan) and not fits(kept.plan, new):
                raise UnsupportedError(_refusal(key, new))

    def rows(self) -> Tensor:
        """Return the row of each nonzero, int32 `[nnz]` on the device."""
        return self.once("rows", lambda structure: structure.upload(structure.row))

    def cols(self) -> Tensor:
        """Return the column of each nonzero, int32 `[nnz]` on the device."""
        return self.once("cols", lambda structure: structure.upload(structure.col))

    def forward(self, conv: Conv, input_size: Sequence[int], output_size: Sequence[int]) -> Plan:
        """Plan the forward pass; the weight gradient meets the same sites."""
        sizes = tuple(input_size), tuple(output_size)
        return self.once(("rows", conv, *sizes), lambda made: made._forward(conv, *sizes))

    def input_gradient(
        self, conv: Conv, input_size: Sequence[int], output_size: Sequence[int]
    ) -> InputGradient:
        """Plan the input gradient, a product with the transpose."""
        sizes = tuple(input_size), tuple(output_size)
        key = ("rows of the input gradient", conv, *sizes)
        return self.once(key, lambda made: made._input_gradient(conv, *sizes))

    def once(self, key: Hashable, make: Callable[[Structure], Any]) -> Any:
        """Return what `make` makes of this structure, once for each key.

        Args:
            key: tells plans apart, and starts with a word for what the plan is of.
            make: makes the plan, and is asked again when the structure changes.
        """
        kept = self._plans.get(key)
        if kept is None:
            kept = self._keep(key, make)
        kept.used = next(clock)
        if not kept.pinned and _recording():
            with _lock:
                kept.pinned = True
                self._plans.setdefault(key, kept)  # it may have been given up a moment ago
        return kept.plan

    def _keep(self, key: Hashable, make: Callable[[Structure], Any]) -> Kept:
        with self._lock:
            kept = self._plans.get(key)
            if kept is not None:  # another thread was faster
                return kept
            kept = self._plans[key] = Kept(make, make(self))
        made = _trial.get()
        if made is not None:
            made.append((self, key))
        if not self._on_host:
            _trim(self)
        return kept

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Forget the plans that this thread makes in it: some are of a way not taken."""
        before = _trial.set([])
        try:
            yield
        finally:
            made = _trial.get() or []
            _trial.reset(before)
            with _lock:
                for structure, key in made:
                    if structure is self:
                        self._plans.pop(key, None)

    def earlier(self, key: Hashable) -> Any:
        """Return the plan that the structure had before it changed, None if there was none."""
        return self._earlier.get(key)

    def _taps(self, conv: Conv) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input channel, and the place in the kernel, of each nonzero."""
        rows, channels, high, wide = conv.weight_shape
        tap = self.col % (high * wide)
        group = self.row // (rows // conv.groups)
        return group * channels + self.col // (high * wide), tap // wide, tap % wide

    def _forward(self, conv: Conv, input_size: Sequence[int], output_size: Sequence[int]) -> Plan:
        top, bottom, left, right = conv.padding
        high, wide = input_size[0] + top + bottom, input_size[1] + left + right
        channel, i, j = self._taps(conv)
        offset = (channel * high + i * conv.dilation[0]) * wide + j * conv.dilation[1]
        in_row, in_col = conv.stride[0] * wide, conv.stride[1]
        window = Window(output_size[0], output_size[1], in_row, in_col, 0, output_size[1], 1)
        return self._plan(self.crow, offset, None, window)

    def _input_gradient(
        self, conv: Conv, input_size: Sequence[int], output_size: Sequence[int]
    ) -> InputGradient:
        channels, *kernel = conv.weight_shape[1:]
        before = conv.padding[0], conv.padding[2]
        axes = [
            axis_phases(input_size[d], before[d], kernel[d], conv.stride[d], conv.dilation[d])
            for d in (0, 1)
        ]
        (top, bottom), (left, right) = (
            _reach(axis, size) for axis, size in zip(axes, output_size, strict=True)
        )
        high, wide = output_size[0] + top + bottom, output_size[1] + left + right
        channel, i, j = self._taps(conv)
        phases = []
        for down in axes[0]:
            for across in axes[1]:
                reached = (down.reaches[i] & across.reaches[j]).nonzero().squeeze(1)
                slots = reached[torch.argsort(channel[reached], stable=True)]
                lengths = torch.bincount(channel[slots], minlength=channels * conv.groups)
                crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
                y = down.output[i[slots]] + top
                offset = (self.row[slots] * high + y) * wide + across.output[j[slots]] + left
                window = Window(
                    down.pixels, across.pixels, wide, 1,
                    down.first * input_size[1] + across.first,
                    conv.stride[0] * input_size[1], conv.stride[1],
                )  # fmt: skip
                phases.append(self._plan(crow, offset, slots, window))
        return InputGradient((top, bottom, left, right), tuple(phases))

    def _plan(self, crow: Tensor, offset: Tensor, slots: Tensor | None, window: Window) -> Plan:
        order = torch.argsort(crow.diff(), descending=True, stable=True)
        upload = self.upload
        if slots is not None:
            # Room for all nonzeros: other taps may be reached once the structure has changed.
            unused = [0, self.col.shape[0] - slots.shape[0]]
            slots, offset = (torch.nn.functional.pad(t, unused) for t in (slots, offset))
        which = None if slots is None else upload(slots)
        return Plan(upload(crow), upload(offset), upload(order), which, window)

    def upload(self, indices: Tensor) -> Tensor:
        """Return indices as int32 on the device."""
        _refuse_recording()
        if indices.numel() and int(indices.max()) >= _MOST_SITES:
            raise UnsupportedError(
                f"x: backend 'cuda' supports fewer than {_MOST_SITES} pixels of all channels of an "
                f"image together, padding included, got {int(indices.max()) + 1} or more"
            )
        return indices.to(torch.int32).to(self._device)


def new_input_gradient(
    like: Tensor, shape: Sequence[int], phases: int, conv: Conv, size: Sequence[int]
) -> Tensor:
    """Return memory for an input gradient that so many phases write: zeros unless they are all."""
    every = min(conv.stride[0], size[0]) * min(conv.stride[1], size[1])
    return like.new_empty(shape) if phases == every else like.new_zeros(shape)


class AxisPhase(NamedTuple):
    """Hold the pixels of an axis that meet the same taps: `first`, and every stride-th after it.

    `output[t]` is the output position in which tap `t`, if it `reaches` them, meets the first one.
    """

    first: int
    pixels: int
    reaches: Tensor
    output: Tensor


def axis_phases(size: int, before: int, kernel: int, stride: int, dilation: int) -> list[AxisPhase]:
    """Return the phases of an axis that taps reach; a stride longer than the kernel has others."""
    taps = torch.arange(kernel) * dilation
    reached = set(((taps - before) % stride).tolist())
    found = []
    for first in sorted(first for first in reached if first < size):
        distance = first + before - taps
        output = torch.div(distance, stride, rounding_mode="floor")
        pixels = len(range(first, size, stride))
        found.append(AxisPhase(first, pixels, distance % stride == 0, output))
    return found


def _reach(phases: list[AxisPhase], size: int) -> tuple[int, int]:
    """Return by how much outputs that the phases meet lie before the first and after the last."""
    before = after = 0
    for phase in phases:
        met = phase.output[phase.reaches]
        if len(met):
            before = max(before, -int(met.min()))
            after = max(after, int(met.max()) + phase.pixels - size)
    return before, after


def _refusal(key: Any, new: Any) -> str:
    what = key if isinstance(key, str) else key[0]
    has = "has none, or too few values in each" if new is None else "has others in size or number"
    return f"its CUDA graphs may have recorded {what}, of which the new structure {has}"


def _versions(crow: Tensor, col: Tensor) -> tuple[int, ...]:
    """Return what changes with the tensors; nothing does for those of torch's inference mode."""
    return tuple(0 if t.is_inference() else t._version for t in (crow, col))


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
# once. Whoever holds it asks for no structure's own lock.
_lock = threading.RLock()


def _trim(structure: Structure) -> None:
    """Give up the plans that are too many now that a structure has a new one."""
    with _lock:
        gone = take_surplus(structure._plans, [known._plans for known in _structures()])
    if any(kept.bytes for kept in gone) and structure._device.type == "cuda":
        torch.cuda.synchronize(structure._device)  # streams other than their own may read them


def _structures() -> list[Structure]:
    return [structure for structure, _ in list(_known.values())]


def info() -> dict[str, int]:
    """Return how many structures and plans are kept for GPU kernels, and the bytes of the plans."""
    structures = _structures()
    kept = [kept for structure in structures for kept in list(structure._plans.values())]
    total = sum(one.bytes for one in kept)
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
        *[storage._cdata for storage in storages], rows, cols, crow.shape, col.shape,
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
                    del _known[expired]
                # A weak reference keeps the address of a storage from being used again.
                refs = [StorageWeakRef(storage) for storage in storages]
                known = _known[key] = Structure(crow, col, rows, cols), refs
    structure, versions = known[0], _versions(crow, col)
    if structure.versions != versions:
        _refuse_recording()
        with structure._lock:
            if structure.versions != versions:
                structure.adopt(structure.changed(crow, col), versions)
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
        What takes the plans over, for when `crow` and `col` hold these indices.

    Raises:
        UnsupportedError: a plan would not keep its place.
    """
    wanted = tuple(tensor.untyped_storage()._cdata for tensor in (crow, col))
    with _lock:
        known = [structure for key, (structure, _) in _known.items() if key[:2] == wanted]
    changed = [structure.changed(new_crow, new_col) for structure in known]
    for structure, fresh in zip(known, changed, strict=True):
        structure.require_places(fresh)

    def adopt() -> None:
        for structure, fresh in zip(known, changed, strict=True):
            structure.adopt(fresh, _versions(crow, col))

    return adopt
