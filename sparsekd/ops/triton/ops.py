"""The Triton backend: find the structure of a weight, and run the kernels that it allows.

Tiles are computed as implicit GEMM on channels_last maps, in place. Columns that lie anywhere are
gathered from packed maps: on tensor cores where groups of rows share them, else row by row.
Kernels accumulate in float32 and round once. They are queued on torch's current stream; nothing
waits for the device, except where a structure is seen for the first time, and growth.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparsekd.errors import UnavailableError
from sparsekd.ops import reference
from sparsekd.ops.borders import Geometry, reaches_far
from sparsekd.ops.checks import conv2d_shape, geometry
from sparsekd.ops.gpu.convolution import Conv, conv_of, covers, new_input_gradient
from sparsekd.ops.gpu.structure import Structure, structure_of
from sparsekd.ops.memory_format import memory_format_of, pixels
from sparsekd.ops.triton import gather_plans, launch, packed_maps, shared_plans, tile_plans
from sparsekd.ops.triton.growth import LargestK
from sparsekd.ops.triton.launch import Pixels
from sparsekd.ops.triton.tile_size import SMALLEST, Runs, find_runs
from sparsekd.ops.triton.tuning import info

__all__ = [
    "LargestK",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "info",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "traits",
]


def _require_device() -> None:
    """Raise UnavailableError where Triton has neither a GPU nor its interpreter to run kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever its search for libcuda, or its C compiler, ends with
        reason = str(error).rstrip(".")
        raise UnavailableError(
            f"Triton is installed, but has no GPU to run on: {reason}"
        ) from error


_require_device()
_NO_PADDING = (0, 0, 0, 0)
_LINEAR = ((1, 1), _NO_PADDING, (1, 1), 1)


def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    if reaches_far(Geometry(x.shape[2:], conv2d_shape(x.shape, *conv)[2:], *conv)):
        rest = weight_shape, stride, padding, dilation, groups
        return reference.conv2d(x, values, crow, col, bias, *rest)
    with _device(x):
        structure = structure_of(x, crow, col, weight_shape)
        return _product(x, values, structure, bias, conv, _conv_precision(x))


def conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    input_shape: list[int],
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    if reaches_far(Geometry(input_shape[2:], grad.shape[2:], *conv)):
        rest = weight_shape, stride, padding, dilation, groups
        return reference.conv2d_dgrad(grad, values, crow, col, input_shape, *rest)
    with _device(grad):
        structure = structure_of(grad, crow, col, weight_shape)
        return _input_gradient(grad, values, structure, input_shape, conv, _conv_precision(grad))


def conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    if reaches_far(Geometry(x.shape[2:], grad.shape[2:], *conv)):
        rest = weight_shape, stride, padding, dilation, groups
        return reference.conv2d_wgrad(grad, x, crow, col, *rest)
    with _device(x):
        structure = structure_of(x, crow, col, weight_shape)
        return _sample(grad, x, structure, conv, _conv_precision(x))


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    conv = _pointwise(weight_shape)
    with _device(x):
        structure = structure_of(x, crow, col, weight_shape)
        y = _product(pixels(x), values, structure, bias, conv, _linear_precision(x))
    return y.reshape(*x.shape[:-1], weight_shape[0])


def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    conv, images = _pointwise(weight_shape), pixels(grad)
    with _device(grad):
        structure = structure_of(grad, crow, col, weight_shape)
        shape = [len(images), weight_shape[1], 1, 1]
        dx = _input_gradient(images, values, structure, shape, conv, _linear_precision(grad))
    return dx.reshape(*grad.shape[:-1], weight_shape[1])


def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    conv = _pointwise(weight_shape)
    with _device(x):
        structure = structure_of(x, crow, col, weight_shape)
        return _sample(pixels(grad), pixels(x), structure, conv, _linear_precision(x))


class Traits(NamedTuple):
    """The properties of a product, besides shapes, that decide how fast these kernels are."""

    structure: Structure
    conv: Conv
    runs: Runs
    arithmetic: str

    @property
    def structured(self) -> bool:
        """Whether the weight has structure that these kernels use: tiles, or shared columns.

        Columns that lie anywhere are only worth the copies of the maps that they need where the
        products run on tensor cores.
        """
        if tile_plans.is_tiled(self.structure, self.conv):
            return True
        return self.arithmetic != "ieee" and 2 * self.runs.rows >= SMALLEST


def traits(op: str, args: tuple[Any, ...]) -> Traits:
    """Find the traits of a product's operands.

    Args:
        op: its name.
        args: those of its schema.
    """
    x, _, crow, col = args[:4]
    shape, *rest = geometry(op, args)
    conv = conv_of(shape, *rest) if rest else _pointwise(shape)
    structure = structure_of(x, crow, col, shape)
    arithmetic = _conv_precision(x) if rest else _linear_precision(x)
    if x.dtype != torch.float32:
        arithmetic = "half"
    return Traits(structure, conv, find_runs(structure, conv), arithmetic)


# -- what the ops have in common ------------------------------------------------------------------


def _pointwise(weight_shape: list[int]) -> Conv:
    return Conv((*weight_shape, 1, 1), *_LINEAR)


def _device(x: Tensor) -> torch.cuda.device_of:
    """Launch on the device of a tensor; does nothing where there is only the CPU."""
    return torch.cuda.device_of(x)


def _conv_precision(x: Tensor) -> str:
    return _precision(x, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]


def _linear_precision(x: Tensor) -> str:
    return _precision(x, torch.backends.cuda.matmul.fp32_precision)


def _precision(x: Tensor, setting: str) -> str:
    return "tf32" if x.dtype == torch.float32 and setting == "tf32" else "ieee"


def _most_k(dtype: torch.dtype) -> int:
    """Return the most inputs of a chunk: 128 bytes of them."""
    return tile_plans.LARGEST_K * 2 // dtype.itemsize


def _most_columns(dtype: torch.dtype) -> int:
    """Return the most columns of a chunk: 64 bytes of them."""
    return 64 // dtype.itemsize


def _product(
    x: Tensor,
    values: Tensor,
    structure: Structure,
    bias: Tensor | None,
    conv: Conv,
    precision: str,
) -> Tensor:
    shape, most = conv2d_shape(x.shape, *conv), _most_k(x.dtype)
    bias = None if bias is None else bias.contiguous()
    lists = tile_plans.forward(structure, conv, most)
    if lists is None:
        sizes = x.shape[2:], shape[2:]
        grouped = shared_plans.forward(structure, conv, *sizes, _most_columns(x.dtype))
        lists = None if grouped else tile_plans.forward(structure, conv, most, padded=True)
        if lists is None:
            packed = packed_maps.pack(x, conv.padding)
            y = packed.new_empty((*shape[1:], x.shape[0]))
            plan = grouped or gather_plans.forward(structure, conv, *sizes)
            packed_maps.gather(plan, values, bias, packed, y, precision)
            return packed_maps.unpack(y, memory_format_of(x))
    y = _channels_inner(x, shape)
    access = launch.Access(not _is_flat(conv), any(conv.padding), conv.stride)
    if y.numel():
        inner = _inner(x, access), _inner(y, access)
        launch.tile_product(lists, values, bias, *inner, access, precision)
    return y.contiguous(memory_format=memory_format_of(x))


def _input_gradient(
    grad: Tensor,
    values: Tensor,
    structure: Structure,
    input_shape: list[int],
    conv: Conv,
    precision: str,
) -> Tensor:
    batch, channels, *size = input_shape
    key, most = (size[0], size[1]), _most_k(grad.dtype)
    phases = tile_plans.input_gradient(structure, conv, key, most)
    if phases is None:
        grouped = shared_plans.input_gradient(
            structure, conv, size, grad.shape[2:], _most_columns(grad.dtype)
        )
        if grouped is None:
            phases = tile_plans.input_gradient(structure, conv, key, most, padded=True)
        if phases is None:
            rows = gather_plans.input_gradient(structure, conv, size, grad.shape[2:])
            packed = packed_maps.pack(grad, rows.padding)
            plans = grouped or rows.phases
            dx = new_input_gradient(packed, (channels, *size, batch), len(plans), conv, size)
            for plan in plans:
                packed_maps.gather(plan, values, None, packed, dx, precision)
            return packed_maps.unpack(dx, memory_format_of(grad))
    dx = _channels_inner(grad, input_shape)
    if not covers(len(phases), conv, size):
        dx.zero_()
    access = launch.Access(not _is_flat(conv), _is_padded(conv), (1, 1))
    x, inner = _inner(grad, access), _inner(dx, access)
    for phase in phases if dx.numel() else ():
        y = inner.grid(phase.first, phase.pixels, conv.stride) if access.spatial else inner
        launch.tile_product(phase.lists, values, None, x, y, access, precision)
    return dx.contiguous(memory_format=memory_format_of(grad))


def _sample(grad: Tensor, x: Tensor, structure: Structure, conv: Conv, precision: str) -> Tensor:
    nnz, most = structure.col.shape[0], _most_k(x.dtype)
    if nnz == 0:
        return x.new_empty(0)
    lists = tile_plans.forward(structure, conv, most)
    if lists is None:
        sizes = x.shape[2:], grad.shape[2:]
        grouped = shared_plans.forward(structure, conv, *sizes, _most_columns(x.dtype))
        lists = None if grouped else tile_plans.forward(structure, conv, most, padded=True)
        if lists is None:
            maps = packed_maps.pack(grad, _NO_PADDING), packed_maps.pack(x, conv.padding)
            plan = grouped or gather_plans.forward(structure, conv, *sizes)
            return packed_maps.gather_sample(structure, plan, *maps, precision)
    access = launch.Access(not _is_flat(conv), any(conv.padding), conv.stride)
    inner = _inner(grad, access), _inner(x, access)
    partial = launch.tile_sample(lists, *inner, access, precision)
    return launch.add_parts(partial, lists.places, x, nnz)


# -- tiles: channels innermost --------------------------------------------------------------------


def _inner(maps: Tensor, access: launch.Access) -> Pixels:
    """Return what kernels read or write: channels_last maps as they are, a copy of others."""
    found = Pixels.of(maps.contiguous(memory_format=torch.channels_last))
    return found if access.spatial else found.flat()


def _channels_inner(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Allocate maps in channels_last."""
    layout = torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _is_flat(conv: Conv) -> bool:
    """Return whether each output reads the input pixel of its own number and no other."""
    return conv.weight_shape[2:] == (1, 1) and conv.stride == (1, 1) and conv.padding == _NO_PADDING


def _is_padded(conv: Conv) -> bool:
    """Return whether taps of the input gradient may read outside of the output gradient."""
    return conv.weight_shape[2:] != (1, 1) or any(conv.padding)
