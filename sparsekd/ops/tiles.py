"""Find the tiles of a structure and make the lists that tile kernels read; see kernels/tiles.py.

A tile is R neighbouring outputs by C neighbouring input channels at one kernel tap that are all
nonzero. Nothing says in advance what R and C are: they are read off the indices, so a mask that
happens to have structure runs as fast as one that was made with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.errors import UnsupportedError
from sparsekd.ops.cuda_plans import Conv, Plan, Structure, Window, axis_phases

SMALLEST = 16  # side of the smallest product on tensor cores
LARGEST_N, LARGEST_K = 128, 64
SHARED_K = 16  # columns of a chunk that may lie anywhere
_LEAST_FILL = 0.25
_MOST_VALUES = 2**31 - 1024


class Runs(NamedTuple):
    """Hold how many rows share their columns, and how many channels are neighbours in each row."""

    rows: int
    channels: int


class Lists(NamedTuple):
    """Hold a product cut into chunks, on the device; the kernels say what the tensors are.

    `columns` is `chunks` of tiles, or `offsets` of columns that lie anywhere. `slots` int32
    [E, n, k] are the values in the order of the kernel, -1 for zeros, and `places` int32 [values]
    where each value went. `even` and `align` are what the kernels call EVEN_N, EVEN_K and ALIGN.
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


def find_runs(structure: Structure, conv: Conv) -> Runs:
    """Return the largest R and C such that the weight consists of tiles R x C.

    The last tile of the rows, and of the channels of a group, may be smaller.
    """
    made: list[Runs] = []

    def make() -> Runs:
        found = _find_runs(structure, conv)
        # A changed structure keeps the tiles of the old one if it can, so that plans keep their
        # sizes: larger ones may be chance, and gone after the next change.
        if made and not (found.rows % made[0].rows or found.channels % made[0].channels):
            return made[0]
        made[:] = [found]
        return found

    return structure.once(("runs", conv), make)


def _find_runs(structure: Structure, conv: Conv) -> Runs:
    rows, channels, *kernel = conv.weight_shape
    starts = row_starts(structure.crow, structure.col)
    bounds = torch.arange(0, rows, max(rows // conv.groups, 1))
    height = _common(starts, bounds, whole=rows)
    kept = torch.zeros(rows, dtype=torch.bool)
    kept[starts] = True
    taps = math.prod(kernel)
    here = kept[structure.row]
    col = structure.col[here].long()
    key, _ = ((structure.row[here] * taps + col % taps) * channels + col // taps).sort()
    new = torch.ones(len(key) + 1, dtype=torch.bool)
    new[1:-1] = (key.diff() != 1) | (key[1:] % channels == 0)
    ends = (key[new[1:]] + 1) % channels
    return Runs(height, _common(key[new[:-1]] % channels, ends, whole=channels))


def row_starts(crow: Tensor, ids: Tensor) -> Tensor:
    """Return the rows whose list of ids differs from that of the row above, the first included."""
    lengths = crow.diff().long()
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    alike = torch.zeros(len(lengths), dtype=torch.bool)
    alike[1:] = lengths[1:] == lengths[:-1]
    mine = alike[row].nonzero().squeeze(1)
    other = ids[mine] != ids[mine - lengths[row[mine]]]
    alike[row[mine[other]]] = False
    return (~alike).nonzero().squeeze(1)


def _common(*starts: Tensor, whole: int) -> int:
    """Return the largest number that divides all starts; `whole` if there is none but 0."""
    every = torch.cat([s.long() for s in starts]).unique().tolist()
    return math.gcd(*every) or whole


def side(run: int, whole: int, most: int) -> int:
    """Return how many neighbours to compute together: a divisor of their run, at most `most`.

    Kernels compute powers of two; of the divisors that fill one well the largest is taken.

    Args:
        run: how many neighbours are alike.
        whole: how many there are; a run of all of them can be cut anywhere.
        most: the largest power of two that the kernel takes.
    """
    if run >= whole:
        sizes = [size for size in (16, 32, 64, 128) if size <= most]
        return min(sizes, key=lambda size: (-(-whole // size) * size, -size))
    divisors = [d for d in range(1, min(run, most) + 1) if run % d == 0]
    return max(divisors, key=lambda d: (min(d / power_of_two(d), 0.75), d))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`, and at least SMALLEST."""
    return max(SMALLEST, 1 << (number - 1).bit_length())


class _Axis(NamedTuple):
    """Say how the channels of one side of a weight are cut: `size` at a time within each group."""

    groups: int
    channels: int  # of a group
    size: int

    @property
    def parts(self) -> int:
        return -(-self.channels // self.size)

    def part(self, channel: Tensor) -> Tensor:
        """Return the part, of all groups, that a channel lies in."""
        group, within = self.split(channel)
        return group * self.parts + within // self.size

    def split(self, channel: Tensor) -> tuple[Tensor, Tensor]:
        return channel // self.channels, channel % self.channels

    def first_and_count(self, part: Tensor) -> Tensor:
        """Return the first channel of each part and how many it has, int64 [parts, 2]."""
        within = part % self.parts * self.size
        first = part // self.parts * self.channels + within
        return torch.stack([first, (self.channels - within).clamp(max=self.size)], 1)

    @property
    def even(self) -> bool:
        return self.channels % self.size == 0 and self.size == power_of_two(self.size)

    @property
    def align(self) -> int:
        return math.gcd(16, self.size, self.channels if self.groups > 1 else 0)


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
    n_axis, k_axis = (_Axis(conv.groups, *pair) for pair in zip(sizes, sides, strict=True))
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
    size = side(_common(row_starts(crow, offset), whole=rows), rows, LARGEST_N)
    if 2 * min(size, rows) < power_of_two(size):
        return None
    axis, n = _Axis(1, rows, size), power_of_two(size)
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
        even=(axis.even, False),
        align=0,
    )
    return SharedPlan(lists, plan.window)
