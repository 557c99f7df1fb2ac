"""Products of columns that lie anywhere, on packed maps; see kernels/pack.py and gather.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sparsekd.kernels import pack as packing
from sparsekd.ops.gpu.structure import Structure
from sparsekd.ops.triton import launch
from sparsekd.ops.triton.gather_plans import GatherPlan, Window
from sparsekd.ops.triton.shared_plans import SharedPlan

_BLOCK_BYTES = 128  # of a row of a block, and of a column: a cache line


def pack(maps: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Return maps `[N, C, H, W]` of any strides as `[C, high, wide, N]`, padding included.

    Maps that lie in this order already are returned as they are.
    """
    top, bottom, left, right = padding
    images, channels, high, wide = maps.shape
    there = maps.permute(1, 2, 3, 0)
    if not any(padding) and there.is_contiguous():
        return there
    packed = maps.new_empty((channels, high + top + bottom, wide + left + right, images))
    _move(maps, packed, (top, left), unpack=False)
    return packed


def unpack(packed: Tensor, layout: torch.memory_format) -> Tensor:
    """Return packed maps as `[N, C, H, W]` in a memory format."""
    maps = packed.permute(3, 0, 1, 2)
    if not maps.is_contiguous(memory_format=layout):
        maps = torch.empty_like(maps, memory_format=layout)
        _move(maps, packed, (0, 0), unpack=True)
    return maps


def _move(maps: Tensor, packed: Tensor, first: tuple[int, int], *, unpack: bool) -> None:
    """Copy maps to where they lie in packed ones, from pixel `first` on, or back."""
    if not packed.numel():
        return
    channels, high, wide, images = packed.shape
    image, channel, row, pixel = maps.stride()
    in_high, in_wide = maps.shape[2:]
    inner = channel <= min(pixel, image)
    if (in_high, in_wide) == (high, wide) and row == wide * pixel and channel == high * row:
        # All that an image consists of lies in one row, as if it were channels of a single pixel.
        channels, high, wide, in_high, in_wide = channels * high * wide, 1, 1, 1, 1
        channel, row, pixel, inner = pixel, 0, 0, True
    pixels = high * wide
    slow, fast = (channels, pixels * images) if inner else (channels * pixels, images)
    # A square block; where one side is short, the other is longer.
    side = _BLOCK_BYTES // maps.element_size()
    f = min(side, triton.next_power_of_2(fast))
    s = min(side * side // f, triton.next_power_of_2(slow))
    f = min(side * side // s, triton.next_power_of_2(fast))
    packing.move_maps[triton.cdiv(slow, s) * triton.cdiv(fast, f),](
        maps, packed, slow, fast, images, high, wide, in_high, in_wide, *first,
        image, channel, row, pixel,
        UNPACK=unpack, CHANNELS_INNER=inner, BS=s, BF=f, num_warps=4,
    )  # fmt: skip


def gather(
    plan: GatherPlan | SharedPlan,
    values: Tensor,
    bias: Tensor | None,
    x: Tensor,
    y: Tensor,
    precision: str,
) -> None:
    """Write the outputs that a plan names into packed maps `y`."""
    if y.numel() == 0:
        return
    if isinstance(plan, SharedPlan):
        launch.shared_product(plan.lists, plan.window, values, bias, x, y, precision)
    else:
        launch.row_product(plan, values, bias, x, y)


def gather_sample(
    structure: Structure, plan: GatherPlan | SharedPlan, grad: Tensor, x: Tensor, precision: str
) -> Tensor:
    """Return the gradients of the values from packed maps."""
    window, nnz = plan.window, structure.col.shape[0]
    starts = structure.plan(("starts", window), lambda made: made.upload(_starts(window)))
    if isinstance(plan, SharedPlan):
        partial = launch.shared_sample(plan.lists, window, starts, grad, x, precision)
        return launch.add_parts(partial, plan.lists.places, x, nnz)
    partial = launch.row_sample(structure.rows(), plan, starts, grad, x)
    return launch.add_parts(partial, None, x, nnz)


def _starts(window: Window) -> Tensor:
    """Return the packed pixel that each output of a forward pass starts from."""
    above, left = torch.arange(window.height), torch.arange(window.width)
    return (above[:, None] * window.in_row + left * window.in_col).flatten()
