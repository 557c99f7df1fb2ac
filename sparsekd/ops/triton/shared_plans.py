"""Plans of columns, anywhere, that groups of rows share; see kernels/gather.py.

Such a group is a dense product of its rows with the inputs of its columns, gathered from packed
maps. So the columns are cut into chunks, each with the offset of every column and the values of all
rows of the group. Kernels take one step for each chunk, with a barrier: wide chunks take fewer, and
samples read the output gradient less often, but the last chunk of a list is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparsekd.ops.gpu.convolution import Conv
from sparsekd.ops.gpu.structure import Structure
from sparsekd.ops.triton import gather_plans
from sparsekd.ops.triton.gather_plans import GatherPlan, Window
from sparsekd.ops.triton.tile_plans import LARGEST_N, Lists, affordable, upload_lists, well_filled
from sparsekd.ops.triton.tile_size import SMALLEST, Axis, power_of_two

_MOST_PADDING = 1 / 8  # that wide chunks may add to what narrow ones take up


class SharedPlan(NamedTuple):
    """A product whose columns are shared by groups of rows, and the window of its outputs."""

    lists: Lists
    window: Window


def forward(
    structure: Structure,
    conv: Conv,
    input_size: Sequence[int],
    output_size: Sequence[int],
    most: int,
) -> SharedPlan | None:
    """Return the forward pass with rows in groups that share their columns, None where few do.

    The weight gradient is sampled at the same chunks.

    Args:
        structure: of the weight; it keeps the result.
        conv: the layer.
        input_size: of the maps that it reads.
        output_size: of those that it writes.
        most: the most columns of a chunk, a power of two from 16 on.
    """
    sizes = tuple(input_size), tuple(output_size)

    def make(structure: Structure) -> SharedPlan | None:
        rows, _ = well_filled(structure, conv, (LARGEST_N, LARGEST_N))
        if not rows:
            return None
        axis = Axis(conv.groups, conv.weight_shape[0] // conv.groups, rows)
        columns = _columns(structure, axis, most)
        return _shared(structure, gather_plans.forward(structure, conv, *sizes), axis, columns)

    return structure.plan(("shared columns", conv, *sizes, most), make)


def input_gradient(
    structure: Structure,
    conv: Conv,
    input_size: Sequence[int],
    output_size: Sequence[int],
    most: int,
) -> tuple[SharedPlan, ...] | None:
    """Return the input gradient likewise, for each phase of the stride: channels share rows."""
    sizes = tuple(input_size), tuple(output_size)

    def make(structure: Structure) -> tuple[SharedPlan, ...] | None:
        _, channels = well_filled(structure, conv, (LARGEST_N, LARGEST_N))
        if not channels:
            return None
        axis = Axis(conv.groups, conv.weight_shape[1], channels)
        phases = gather_plans.input_gradient(structure, conv, *sizes).phases
        columns = _columns(structure, axis, most, max(len(phases), 1))
        return tuple(_shared(structure, phase, axis, columns) for phase in phases)

    return structure.plan(("shared columns of the input gradient", conv, *sizes, most), make)


def _columns(structure: Structure, axis: Axis, most: int, phases: int = 1) -> int:
    """Return the columns of a chunk, `most` where lists are long enough for it.

    It goes by the mean list and the most that it can take up, and so not by where the values are: a
    recorded plan stays as it is after a rewire.
    """
    mean = len(structure.col) / (axis.groups * axis.channels * phases)
    narrow, wide = mean + SMALLEST - 1, mean + most - 1
    return most if wide <= (1 + _MOST_PADDING) * narrow else SMALLEST


def _shared(structure: Structure, plan: GatherPlan, axis: Axis, columns: int) -> SharedPlan:
    crow = plan.crow.cpu().long()
    rows, values = len(crow) - 1, int(crow[-1])
    outputs = axis.first_and_count(torch.arange(axis.parts * axis.groups))
    chunks = -(-crow.diff()[outputs[:, 0]] // columns)
    row = torch.repeat_interleave(torch.arange(rows), crow.diff(), output_size=values)
    column = torch.arange(values) - crow[row]
    entry = (chunks.cumsum(0) - chunks)[axis.part(row)] + column // columns
    room, n = _room(structure, axis, rows, columns), power_of_two(axis.size)
    offsets = torch.full((room, columns), -1)
    offsets[entry, column % columns] = plan.offset.cpu()[:values].long()
    slots = torch.arange(values) if plan.slots is None else plan.slots.cpu().long()[:values]
    lists = upload_lists(
        structure,
        outputs=outputs,
        owners=torch.repeat_interleave(torch.arange(len(outputs)), chunks),
        columns=offsets,
        slots=slots,
        places=(entry * n + axis.within(row)) * columns + column % columns,
        shape=(n, columns),
        room=room,
        sampled=plan.slots is None,
        even=(axis.even, False),
        align=0,
    )
    return SharedPlan(lists, plan.window)


def _room(structure: Structure, axis: Axis, rows: int, columns: int) -> int:
    """Return the most chunks that the columns of a plan can take up, wherever the values are.

    The first chunk of a group may have a single column; all but the last are full.
    """
    longest = structure.size[0] * structure.size[1] // rows
    more = max(longest - 1, 0) // columns
    chunks = []
    for size, count in axis.sizes:
        chunks += [(size, count * axis.groups), (size * columns, count * axis.groups * more)]
    return affordable(chunks, len(structure.col))
