"""Make the lists that the Triton kernels read; see kernels/tiles.py and kernels/gather.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.errors import UnsupportedError
from sparsekd.ops.cuda_plans import Conv, Plan, Structure, Window, axis_phases
from sparsekd.ops.runs import (
    SMALLEST,
    Axis,
    common_divisor,
    find_runs,
    power_of_two,
    row_starts,
    side,
)

LARGEST_N, LARGEST_K = 128, 64
SHARED_K = 16  # columns of a chunk that may lie anywhere
_LEAST_FILL = 0.25
_MOST_VALUES = 2**31 - 1024


class Lists(NamedTuple):
    """Hold a product cut into chunks, on the device; the kernels say what the tensors are.

    `columns` is `chunks` of tiles, or `offsets` of columns that lie anywhere. `slots` int32
    [E, n, k] are the values in the order of the kernel, -1 for zeros, and `places` int32 [values]
    where each value went, for samples; a product has none. `even` and `align` are what the kernels
    call EVEN_N, EVEN_K and ALIGN.
    """

    lists: Tensor
    outputs: Tensor
    owners: Tensor
    columns: Tensor
    slots: Tensor
    places: Tensor
    n: int
    k: int
    even: tuple[bool, bool]
    align: int


class Phase(NamedTuple):
    """Hold the pixels of a map from the `first` on, so many each way, and how they are computed."""

    first: tuple[int, int]
    pixels: tuple[int, int]
    lists: Lists


def is_tiled(structure: Structure, conv: Conv) -> bool:
    """Return whether the weight consists of tiles that fill those of the kernels well."""

    def make() -> bool:
        return _sides(structure, conv, LARGEST_N, LARGEST_K, padded=False) is not None

    return structure.once(("tiled", conv), make)


def forward(structure: Structure, conv: Conv, most_k: int, *, padded: bool = False) -> Lists | None:
    """Return the lists of the forward pass, None where tiles would be mostly zeros.

    The weight gradient is sampled at the same chunks.

    Args:
        structure: of the weight; it keeps the result.
        conv: the layer.
        most_k: the most inputs of a chunk.
        padded: fill up incomplete tiles, on the side where there is no structure.
    """

    def make() -> Lists | None:
        sides = _sides(structure, conv, LARGEST_N, most_k, padded)
        if sides is None:
            return None
        top, _, left, _ = conv.padding
        i, j = _taps(conv)
        offsets = i * conv.dilation[0] - top, j * conv.dilation[1] - left
        every = torch.ones(len(i), dtype=torch.bool)
        lists = _lists(structure, conv, every, sides, offsets, transposed=False)
        return lists if _is_full(structure, lists) else None

    return structure.once(("tiles", conv, most_k, padded), make)


def input_gradient(
    structure: Structure, conv: Conv, size: tuple[int, int], most_k: int, *, padded: bool = False
) -> tuple[Phase, ...] | None:
    """Return the lists of the input gradient for each phase of the stride, see `forward`.

    Input pixels that are `stride` apart meet the same taps: each phase is a product of stride 1,
    which wastes no work on taps that meet nothing.
    """

    def make() -> tuple[Phase, ...] | None:
        sides = _sides(structure, conv, most_k, LARGEST_N, padded)
        if sides is None:
            return None
        made = _input_gradient(structure, conv, size, (sides[1], sides[0]))
        return made if not made or _is_full(structure, made[0].lists) else None

    return structure.once(("tiles dgrad", conv, size, most_k, padded), make)


def _input_gradient(
    structure: Structure, conv: Conv, size: tuple[int, int], sides: tuple[int, int]
) -> tuple[Phase, ...]:
    before, kernel = (conv.padding[0], conv.padding[2]), conv.weight_shape[2:]
    down, across = (
        axis_phases(size[d], before[d], kernel[d], conv.stride[d], conv.dilation[d]) for d in (0, 1)
    )
    i, j = _taps(conv)
    found = []
    for y in down:
        for x in across:
            reached, offsets = y.reaches[i] & x.reaches[j], (y.output[i], x.output[j])
            lists = _lists(structure, conv, reached, sides, offsets, transposed=True)
            pixels = y.pixels, x.pixels
            found.append(Phase((y.first, x.first), pixels, lists))
    return tuple(found)


def _sides(
    structure: Structure, conv: Conv, rows: int, channels: int, padded: bool
) -> tuple[int, int] | None:
    """Return the sides of the tiles to compute, None where there is not enough structure."""
    runs = find_runs(structure, conv)
    wholes = conv.weight_shape[0] // conv.groups, conv.weight_shape[1]
    sides = [
        side(run, whole, most)
        for run, whole, most in zip(runs, wholes, (rows, channels), strict=True)
    ]
    full = [
        2 * min(size, whole) >= power_of_two(size)
        for size, whole in zip(sides, wholes, strict=True)
    ]
    if not (any(full) if padded else all(full)):
        return None
    height, width = (size if fits else SMALLEST for size, fits in zip(sides, full, strict=True))
    return height, width


def _is_full(structure: Structure, lists: Lists) -> bool:
    """Return whether enough of what the kernels multiply are values."""
    return len(structure.col) >= _LEAST_FILL * lists.slots.numel()


def _taps(conv: Conv) -> tuple[Tensor, Tensor]:
    """Return the row and the column in the kernel of each tap."""
    high, wide = conv.weight_shape[2:]
    tap = torch.arange(high * wide)
    return tap // wide, tap % wide


def _lists(
    structure: Structure,
    conv: Conv,
    reached: Tensor,
    sides: tuple[int, int],
    offsets: tuple[Tensor, Tensor],
    *,
    transposed: bool,
) -> Lists:
    """Cut the values at the taps `reached` into chunks of `sides` outputs and inputs.

    Each tap has offsets. There is room for the chunks of all taps: other tiles may be at these
    once the structure has changed, and what has a fixed size can change in place.
    """
    rows, channels, *kernel = conv.weight_shape
    taps = math.prod(kernel)
    col, row = structure.col.long(), structure.row
    tap, channel = col % taps, row // (rows // conv.groups) * channels + col // taps
    out, into = (channel, row) if transposed else (row, channel)
    sizes = (channels, rows // conv.groups) if transposed else (rows // conv.groups, channels)
    n_axis, k_axis = (Axis(conv.groups, *pair) for pair in zip(sizes, sides, strict=True))
    count = k_axis.parts * conv.groups
    key = (n_axis.part(out) * count + k_axis.part(into)) * taps + tap
    room = len(key.unique())
    slots = reached[tap].nonzero().squeeze(1)
    found, entry = key[slots].unique(return_inverse=True)
    n, k = power_of_two(sides[0]), power_of_two(sides[1])
    place = n_axis.split(out)[1] % sides[0] * k + k_axis.split(into)[1] % sides[1]
    inputs = k_axis.first_and_count(found // taps % count)
    chunks = torch.cat([inputs, *(each[found % taps, None] for each in offsets)], dim=1)
    return _upload(
        structure,
        outputs=n_axis.first_and_count(torch.arange(n_axis.parts * conv.groups)),
        owners=found // taps // count,
        columns=chunks,
        slots=slots,
        places=entry * n * k + place[slots],
        shape=(n, k),
        room=room,
        sampled=not transposed,
        even=(n_axis.even, k_axis.even),
        align=math.gcd(n_axis.align, k_axis.align),
    )


def _upload(
    structure: Structure,
    *,
    outputs: Tensor,
    owners: Tensor,
    columns: Tensor,
    slots: Tensor,
    places: Tensor,
    shape: tuple[int, int],
    room: int,
    sampled: bool,
    even: tuple[bool, bool],
    align: int,
) -> Lists:
    """Return lists with room for so many chunks; those that are not used hold no values."""
    if room * math.prod(shape) > _MOST_VALUES:
        raise UnsupportedError(
            f"values: backend 'triton' supports weights of up to {_MOST_VALUES} values with the "
            f"zeros of ragged tiles, got {room * math.prod(shape)}"
        )
    packed = torch.full((room, *shape), -1)
    packed.view(-1)[places] = slots
    lists = torch.zeros(len(outputs) + 1, dtype=torch.int64)
    lists[1:] = torch.bincount(owners, minlength=len(outputs)).cumsum(0)
    unused = room - len(owners)
    owners, columns = F.pad(owners, (0, unused)), F.pad(columns, (0, 0, 0, unused), value=-1)
    if not sampled:
        places = places[:0]
    up = structure.upload
    return Lists(
        up(lists), up(outputs), up(owners), up(columns), up(packed), up(places), *shape, even, align
    )


class SharedPlan(NamedTuple):
    """Hold a product whose columns are shared by groups of rows, and the window of its outputs."""

    lists: Lists
    window: Window


def shared(structure: Structure, key: object, plan: Plan) -> SharedPlan | None:
    """Return a plan with its rows in groups that share their columns, None where few do.

    Args:
        structure: that the plan is of; it keeps the result.
        key: tells the plans of a structure apart.
        plan: row by row.
    """
    return structure.once(("shared", key), lambda: _shared(structure, plan))


def _shared(structure: Structure, plan: Plan) -> SharedPlan | None:
    crow = plan.crow.cpu().long()
    rows, values = len(crow) - 1, int(crow[-1])
    offset = plan.offset.cpu()[:values]
    size = side(common_divisor(row_starts(crow, offset), whole=rows), rows, LARGEST_N)
    if 2 * min(size, rows) < power_of_two(size):
        return None
    axis, n = Axis(1, rows, size), power_of_two(size)
    outputs = axis.first_and_count(torch.arange(axis.parts))
    lengths = crow.diff()[outputs[:, 0]]
    chunks = -(-lengths // SHARED_K)
    owners = torch.repeat_interleave(torch.arange(axis.parts), chunks)
    row = torch.repeat_interleave(torch.arange(rows), crow.diff(), output_size=values)
    column = torch.arange(values) - crow[row]
    entry = (chunks.cumsum(0) - chunks)[row // size] + column // SHARED_K
    offsets = torch.full((len(owners), SHARED_K), -1)
    offsets[entry, column % SHARED_K] = offset.long()
    slots = torch.arange(values) if plan.slots is None else plan.slots.cpu().long()[:values]
    lists = _upload(
        structure,
        outputs=outputs,
        owners=owners,
        columns=offsets,
        slots=slots,
        places=(entry * n + row % size) * SHARED_K + column % SHARED_K,
        shape=(n, SHARED_K),
        room=len(owners),
        sampled=plan.slots is None,
        even=(axis.even, False),
        align=0,
    )
    return SharedPlan(lists, plan.window)
