"""Products of columns that lie anywhere, on maps packed for them; see sparsekd.kernels.gather."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekd.ops.gpu.gather_plans import GatherPlan, Window
from sparsekd.ops.gpu.structure import Structure
from sparsekd.ops.triton import launch
from sparsekd.ops.triton.shared_plans import SharedPlan


def pack(maps: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Return `[channels, height, width, images]`, padding included."""
    maps = maps.permute(1, 2, 3, 0)
    top, bottom, left, right = padding
    if not any(padding):
        return maps.contiguous()
    channels, high, wide, images = maps.shape
    packed = maps.new_zeros((channels, high + top + bottom, wide + left + right, images))
    packed[:, top : top + high, left : left + wide] = maps
    return packed


def unpack(packed: Tensor, layout: torch.memory_format) -> Tensor:
    """Return packed maps as `[N, C, H, W]` in a memory format."""
    return packed.permute(3, 0, 1, 2).contiguous(memory_format=layout)


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
        weight = launch.pack_values(values, plan.lists)
        launch.shared_product(plan.lists, plan.window, weight, bias, x, y, precision)
    else:
        launch.row_product(plan, values, bias, x, y)


def gather_sample(
    structure: Structure, plan: GatherPlan | SharedPlan, grad: Tensor, x: Tensor, precision: str
) -> Tensor:
    """Return the gradients of the values from packed maps."""
    window, nnz = plan.window, structure.col.shape[0]
    starts = structure.plan(("starts", window), lambda made: made.upload(_starts(window)))
    if isinstance(plan, SharedPlan):
        partial = launch.shared_sample(plan.lists, starts, grad, x, precision)
        return launch.add_parts(partial, plan.lists.places, x, nnz)
    partial = launch.row_sample(structure.rows(), plan.offset, starts, grad, x)
    return launch.add_parts(partial, None, x, nnz)


def _starts(window: Window) -> Tensor:
    """Return the packed pixel that each output of a forward pass starts from."""
    above, left = torch.arange(window.height), torch.arange(window.width)
    return (above[:, None] * window.in_row + left * window.in_col).flatten()
