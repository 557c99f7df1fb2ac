"""Plans of tiles for the Triton kernels; see kernels/gemm.py.

A weight is cut into tiles of n outputs by k input channels at one kernel tap, each a chunk: one
multiplication for the tensor cores. A plan lists the chunks of every n outputs, with the offset of
their tap, and says where in the packed values each weight goes; what a chunk has beyond the weights
of its tile are zeros. Sizes follow from the layer, its nonzeros and its tiles alone, with room for
the chunks of any mask that has these, so that a recorded CUDA graph survives a rewire.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.errors import UnsupportedError
from sparsekd.ops.gpu.convolution import Conv, input_phases
from sparsekd.ops.gpu.structure import Structure
from sparsekd.ops.triton.tile_size import SMALLEST, Axis, find_runs, power_of_two, side

LARGEST_N, LARGEST_K = 128, 64
_LEAST_FILL = 0.25  # of the tiles of a new plan
_HELD_FILL = 0.125  # and after the structure has changed, so that plans do not come and go
_MOST_VALUES = 2**31 - 1024


class Lists(NamedTuple):
    """A product cut into chunks, on the device; the kernels describe the tensors.

    `columns` is `chunks` of tiles, or `offsets` of columns that lie anywhere. `slots` int32
    [E, n, k] are the values in the order of the kernel, -1 for zeros, unless it reads them
    `in_place`, and `places` int32 [values] where the sums of a sample have each value; a product
    has none. `even`, `align`, `in_place` and `filled` are what the kernels call EVEN_N, EVEN_K,
    ALIGN, IN_PLACE and FILLED.
    """

    lists: Tensor
    outputs: Tensor
    owners: Tensor
    columns: Tensor
    slots: Tensor | None
    places: Tensor
    n: int
    k: int
    even: tuple[bool, bool]
    align: int
    in_place: str
    filled: bool

    @property
    def size(self) -> int:
        """How many values all chunks have, with their zeros."""
        return self.columns.shape[0] * self.n * self.k


class Phase(NamedTuple):
    """A grid of pixels of a map, from the `first` on, and how they are computed."""

    first: tuple[int, int]
    pixels: tuple[int, int]
    lists: Lists


def is_tiled(structure: Structure, conv: Conv) -> bool:
    """Return whether the weight consists of tiles that fill those of the kernels well."""

    def make(structure: Structure) -> bool:
        return _sides(structure, conv, (LARGEST_N, LARGEST_K), padded=False) is not None

    return structure.plan(("whether there are tiles", conv), make)


def forward(structure: Structure, conv: Conv, most_k: int, *, padded: bool = False) -> Lists | None:
    """Return the lists of the forward pass, None where tiles would be mostly zeros.

    The weight gradient is sampled at the same chunks.

    Args:
        structure: of the weight; it keeps the result.
        conv: the layer.
        most_k: the most inputs of a chunk.
        padded: fill up incomplete tiles, on the side where there is no structure.
    """
    key = ("tiles", conv, most_k, padded)

    def make(structure: Structure) -> Lists | None:
        fill = _LEAST_FILL if structure.earlier(key) is None else _HELD_FILL
        cut = _cut(structure, conv, (LARGEST_N, most_k), padded, fill, transposed=False)
        if cut is None:
            return None
        top, _, left, _ = conv.padding
        i, j = _taps(conv)
        offsets = i * conv.dilation[0] - top, j * conv.dilation[1] - left
        every = torch.ones(len(i), dtype=torch.bool)
        return _lists(structure, conv, cut, every, offsets, sampled=True)

    return structure.plan(key, make)


def input_gradient(
    structure: Structure, conv: Conv, size: tuple[int, int], most_k: int, *, padded: bool = False
) -> tuple[Phase, ...] | None:
    """Return the lists of the input gradient for each phase of the stride, see `forward`.

    Input pixels that are `stride` apart meet the same taps: each phase is a product of stride 1,
    which wastes no work on taps that meet nothing.
    """
    key = ("tiles of the input gradient", conv, size, most_k, padded)

    def make(structure: Structure) -> tuple[Phase, ...] | None:
        fill = _LEAST_FILL if structure.earlier(key) is None else _HELD_FILL
        cut = _cut(structure, conv, (most_k, LARGEST_N), padded, fill, transposed=True)
        return None if cut is None else _input_gradient(structure, conv, size, cut)

    return structure.plan(key, make)


def _input_gradient(
    structure: Structure, conv: Conv, size: tuple[int, int], cut: _Cut
) -> tuple[Phase, ...]:
    down, across = input_phases(conv, size)
    i, j = _taps(conv)
    found = []
    for y in down:
        for x in across:
            reached, offsets = y.reaches[i] & x.reaches[j], (y.output[i], x.output[j])
            lists = _lists(structure, conv, cut, reached, offsets, sampled=False)
            found.append(Phase((y.first, x.first), (y.pixels, x.pixels), lists))
    return tuple(found)


class _Side(NamedTuple):
    """The rows or channels of a tile, and whether they are nonzero together."""

    size: int
    full: bool


def _sides(
    structure: Structure, conv: Conv, most: tuple[int, int], padded: bool
) -> tuple[_Side, _Side] | None:
    """Return the rows and the channels of the tiles to compute, None without enough structure."""
    rows, channels = (
        _Side(size, True) if size else _Side(SMALLEST, False)
        for size in well_filled(structure, conv, most)
    )
    enough = rows.full or channels.full if padded else rows.full and channels.full
    return (rows, channels) if enough else None


def well_filled(structure: Structure, conv: Conv, most: tuple[int, int]) -> list[int]:
    """Return the rows, and the channels, to compute together, 0 where a kernel is half empty."""
    wholes = conv.weight_shape[0] // conv.groups, conv.weight_shape[1]
    sizes = map(side, find_runs(structure, conv), wholes, most)
    return [
        size if 2 * min(size, whole) >= power_of_two(size) else 0
        for size, whole in zip(sizes, wholes, strict=True)
    ]


class _Cut(NamedTuple):
    """The values of a weight arranged in tiles, outputs of the product by inputs.

    `key` names the tile and the tap of each value, `place` says where in the tile it is, `in_place`
    how they lie in memory if kernels can read them there, and `filled` whether zeros make up for
    values that tiles lack. There is `room` for the tiles of every structure of as many values: what
    has a fixed size can change in place.
    """

    n_axis: Axis
    k_axis: Axis
    tap: Tensor
    key: Tensor
    place: Tensor
    room: int
    in_place: str
    filled: bool


def _cut(
    structure: Structure,
    conv: Conv,
    most: tuple[int, int],
    padded: bool,
    fill: float,
    *,
    transposed: bool,
) -> _Cut | None:
    """Cut a weight into tiles of at most so many rows and channels, None where few are values."""
    sides = _sides(structure, conv, most, padded)
    if sides is None:
        return None
    taps, col, row = math.prod(conv.weight_shape[2:]), structure.col.long(), structure.row
    each = conv.weight_shape[0] // conv.groups, conv.weight_shape[1]
    channel = row // each[0] * each[1] + col // taps
    axes = [Axis(conv.groups, *pair) for pair in zip(each, [s.size for s in sides], strict=True)]
    pairs = list(zip(axes, (row, channel), strict=True))
    (n_axis, out), (k_axis, into) = reversed(pairs) if transposed else pairs
    n, k = power_of_two(n_axis.size), power_of_two(k_axis.size)
    inputs = k_axis.parts * conv.groups
    key = (n_axis.part(out) * inputs + k_axis.part(into)) * taps + col % taps
    if len(col) < fill * len(key.unique()) * n * k:
        return None
    possible = _possible(axes, [s.full for s in sides], taps, len(col))
    room = min(possible, int(len(col) / (_HELD_FILL * n * k)))
    place = n_axis.within(out) * k + k_axis.within(into)
    whole = taps == 1 and not padded and axes[1].even
    in_place = ("n" if transposed else "k") if whole else ""
    return _Cut(n_axis, k_axis, col % taps, key, place, room, in_place, padded)


def _possible(axes: list[Axis], full: list[bool], taps: int, values: int) -> int:
    """Return the most tiles that so many values can make.

    Args:
        axes: of the rows and the channels.
        full: for each, whether a tile has all of them; else it may have a single one.
        taps: of the kernel.
        values: how many there are.
    """
    high, wide = (
        axis.sizes if whole else [(1, axis.parts)] for axis, whole in zip(axes, full, strict=True)
    )
    times = axes[0].groups * taps
    tiles = [(rows * cols, down * across * times) for rows, down in high for cols, across in wide]
    return affordable(tiles, values)


def affordable(things: list[tuple[int, int]], budget: int) -> int:
    """Return how many things a budget buys, the cheapest first."""
    bought = 0
    for price, count in sorted(things):
        more = min(count, budget // price)
        bought, budget = bought + more, budget - more * price
    return bought


def _taps(conv: Conv) -> tuple[Tensor, Tensor]:
    """Return the row and the column in the kernel of each tap."""
    high, wide = conv.weight_shape[2:]
    tap = torch.arange(high * wide)
    return tap // wide, tap % wide


def _lists(
    structure: Structure,
    conv: Conv,
    cut: _Cut,
    reached: Tensor,
    offsets: tuple[Tensor, Tensor],
    *,
    sampled: bool,
) -> Lists:
    """Make chunks of the tiles at the taps `reached`; each tap has offsets."""
    n_axis, k_axis, taps = cut.n_axis, cut.k_axis, len(reached)
    slots = reached[cut.tap].nonzero().squeeze(1)
    found, entry = cut.key[slots].unique(return_inverse=True)
    tile, tap = found // taps, found % taps
    inputs = k_axis.parts * conv.groups
    n, k = power_of_two(n_axis.size), power_of_two(k_axis.size)
    # In row-major order the first value of a tile is the one in its first row and column.
    value = torch.zeros_like(found).scatter_reduce(0, entry, slots, "amin", include_self=False)
    step = structure.crow.diff()[structure.row[value]]
    chunks = [
        k_axis.first_and_count(tile % inputs),
        *(each[tap, None] for each in offsets),
        *(each[:, None] for each in (value, step)),
    ]
    return upload_lists(
        structure,
        outputs=n_axis.first_and_count(torch.arange(n_axis.parts * conv.groups)),
        owners=tile // inputs,
        columns=torch.cat(chunks, dim=1),
        slots=slots,
        places=entry * n * k + cut.place[slots],
        shape=(n, k),
        room=cut.room,
        sampled=sampled,
        even=(n_axis.even, k_axis.even),
        align=math.gcd(n_axis.align, k_axis.align),
        in_place=cut.in_place,
        filled=cut.filled,
    )


def upload_lists(
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
    in_place: str = "",
    filled: bool = False,
) -> Lists:
    """Return lists with room for so many chunks.

    No list has those that are not used. Samples run over all chunks, so these are the first one of
    the first list, without values and, in tiles, without inputs.
    """
    if room * math.prod(shape) > _MOST_VALUES:
        raise UnsupportedError(
            f"values: backend 'triton' supports weights of up to {_MOST_VALUES} values with the "
            f"zeros of ragged tiles, got {room * math.prod(shape)}"
        )
    packed = None
    if not in_place:
        packed = torch.full((room, *shape), -1)
        packed.view(-1)[places] = slots
    lists = torch.zeros(len(outputs) + 1, dtype=torch.int64)
    lists[1:] = torch.bincount(owners, minlength=len(outputs)).cumsum(0)
    owners = F.pad(owners, (0, room - len(owners)))
    columns = F.pad(columns, (0, 0, 0, room - len(columns)))
    if not sampled:
        places = places[:0]
    up = structure.upload
    return Lists(
        up(lists), up(outputs), up(owners), up(columns), None if packed is None else up(packed),
        up(places), *shape, even, align, in_place, filled,
    )  # fmt: skip
