"""The compiled CPU backend: allocate the result, lend the tensors to `sparsekd._C`.

Kernels compute in float32 and float64; half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd._C as _C
from sparsekd.ops import checks, reference
from sparsekd.ops.checks import conv2d_shape
from sparsekd.ops.gradient_tiles import Tile
from sparsekd.ops.memory_format import matrix, memory_format_of

_PLAIN = (Tensor, nn.Parameter)
_WIDE = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
_NARROW = 4  # input channels to a group, below which torch's own grouped kernels are faster


def info() -> dict[str, Any]:
    """Describe the compiled module: its file, instruction set, compiler."""
    return {"file": _C.__file__, **_C.info()}


def peak_flops(threads: int, seconds: float) -> float:
    """Measure the float32 operations a second of independent fused multiply-adds."""
    return _C.peak_flops(threads, seconds)


def read_bandwidth(bytes_each: int, threads: int, seconds: float) -> float:
    """Measure the bytes a second that threads read, each over and over from a buffer of its own."""
    return _C.read_bandwidth(bytes_each, threads, seconds)


def forget(crow: Tensor, col: Tensor) -> None:
    """Drop the plans that the kernels have made for a structure; they are made anew when needed."""
    _C.release(crow, col)


def tile_size(
    crow: Tensor, col: Tensor, weight_shape: Sequence[int], groups: int
) -> tuple[int, int]:
    """Return the size of the tiles that a weight consists of, output by input channels.

    A tile is all nonzero or all zero at one kernel tap; the last of an axis may be smaller.
    """
    rows, channels, *kernel = weight_shape
    taps = math.prod(kernel)
    return _C.tile_size(_vector(crow), _vector(col), rows, channels * taps, taps, groups)


def _array(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _vector(tensor: Tensor) -> Tensor:
    """Return a vector without gaps: only maps and matrices may have strides in the kernels."""
    return _array(tensor.contiguous())


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _vector(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    """Return the rows of `tensor` as a matrix; a view whenever its strides allow one."""
    if tensor.ndim != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return _array(tensor)


def _empty(shape: list[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    dtype = torch.float32 if like.dtype in _HALF else like.dtype
    return torch.empty(shape, dtype=dtype, memory_format=memory_format)


def prepare(op: str, args: tuple[Any, ...]) -> Callable[..., Tensor] | None:
    """Return a function of a product's operands for calls with the same `call_key` as this one.

    It allocates the result and computes, in one call of the compiled module. None where operands
    have to be converted first.

    Args:
        op: one of `PRODUCTS`.
        args: those of its schema, which fit together.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if any(type(t) not in _PLAIN or not t.is_cpu for t in tensors):
        return None
    first, second = args[:2]
    vectors = tensors[1 if second.ndim == 1 else 2 :]
    if first.dtype not in _WIDE or not all(vector.is_contiguous() for vector in vectors):
        return None
    shape = tuple(getattr(checks, op)(*args))
    geometry = checks.geometry(op, args)
    layout = made_in = torch.contiguous_format
    if op in ("conv2d", "conv2d_dgrad"):
        layout = memory_format_of(first)
        made_in = _made_in(layout, geometry[1]) if op == "conv2d_dgrad" else layout
    elif op.startswith("linear"):
        samples = [first, second] if op == "linear_wgrad" else [first]
        if any(s.ndim != 2 and not s.is_contiguous() for s in samples):
            return None
        geometry = ()
    return _C.prepare(op, shape, first.dtype, made_in, layout, *geometry, torch.get_num_threads())


def _made_in(layout: torch.memory_format, stride: Sequence[int]) -> torch.memory_format:
    """Return the format in which an input gradient is made, before it is converted to `layout`.

    Each phase of a stride writes every second pixel: in channels_last those are whole cache lines,
    so contiguous results are faster made there and converted.
    """
    return torch.channels_last if max(stride) > 1 else layout


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
    shape = conv2d_shape(x.shape, weight_shape, stride, padding, dilation, groups)
    y = _empty(shape, x, memory_format_of(x))
    _C.conv2d(
        _array(x), _vector(values), _vector(crow), _vector(col), _optional(bias), y,
        weight_shape, stride, padding, dilation, groups, torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype)


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
    layout = memory_format_of(grad)
    dx = _empty(input_shape, grad, _made_in(layout, stride))
    _C.conv2d_dgrad(
        _array(grad), _vector(values), _vector(crow), _vector(col), dx,
        weight_shape, stride, padding, dilation, groups, torch.get_num_threads(),
    )  # fmt: skip
    return dx.to(grad.dtype).contiguous(memory_format=layout)


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
    dvalues = _empty([col.shape[0]], x, torch.contiguous_format)
    _C.conv2d_wgrad(
        _array(grad), _array(x), _vector(crow), _vector(col), dvalues,
        weight_shape, stride, padding, dilation, groups, torch.get_num_threads(),
    )  # fmt: skip
    return dvalues.to(x.dtype)


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    y = _empty([*x.shape[:-1], weight_shape[0]], x, torch.contiguous_format)
    _C.linear(
        _matrix(x), _vector(values), _vector(crow), _vector(col), _optional(bias),
        _matrix(y), torch.get_num_threads(),
    )  # fmt: skip
    return y.to(x.dtype)


def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    dx = _empty([*grad.shape[:-1], weight_shape[1]], grad, torch.contiguous_format)
    _C.linear_dgrad(
        _matrix(grad), _vector(values), _vector(crow), _vector(col),
        _matrix(dx), torch.get_num_threads(),
    )  # fmt: skip
    return dx.to(grad.dtype)


def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    dvalues = _empty([col.shape[0]], x, torch.contiguous_format)
    _C.linear_wgrad(
        _matrix(grad), _matrix(x), _vector(crow), _vector(col),
        dvalues, torch.get_num_threads(),
    )  # fmt: skip
    return dvalues.to(x.dtype)


def conv2d_wgrad_tile(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    tile: Tile,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    if groups > 1 and weight_shape[1] < _NARROW:  # depthwise: blocks of channels would be empty
        geometry = weight_shape, stride, padding, dilation, groups
        reference.conv2d_wgrad_tile(grad, x, out, tile, *geometry)
        return
    _C.conv2d_wgrad_tile(
        _array(grad), _array(x), tile, out,
        weight_shape, stride, padding, dilation, groups, torch.get_num_threads(),
    )  # fmt: skip


def linear_wgrad_tile(
    grad: Tensor, x: Tensor, out: Tensor, tile: Tile, weight_shape: list[int]
) -> None:
    """Run the layer as a 1x1 convolution of one image, a column of one pixel for each sample."""
    grad, x = (matrix(m).T[None, :, :, None] for m in (grad, x))
    geometry = [*weight_shape, 1, 1], [1, 1], [0] * 4, [1, 1], 1
    conv2d_wgrad_tile(grad, x, out, tile, *geometry)


class LargestK:
    """The k best positions outside a structure, over rectangles of scores."""

    def __init__(
        self, crow: Tensor, col: Tensor, rows: int, cols: int, k: int, dtype: torch.dtype
    ) -> None:
        wide, threads = dtype == torch.float64, torch.get_num_threads()
        self._best = _C.LargestK(_vector(crow), _vector(col), rows, cols, k, wide, threads)

    def offer(self, scores: Tensor, row: int, col: int, magnitude: bool) -> None:
        self._best.offer(_vector(scores), row, col, magnitude)

    def positions(self) -> Tensor:
        return torch.from_numpy(self._best.positions())


def _maps(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=layout)


def _optional_maps(x: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    return None if x is None else _maps(x, layout)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    maps = _maps(x, memory_format_of(x))
    _C.norm_moments(maps, mean, var, torch.get_num_threads())
    return mean, var


def norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    frozen: bool,
) -> Tensor:
    layout = memory_format_of(x)
    maps = _maps(x, layout)
    y = torch.empty_like(maps)
    _C.norm_forward(
        maps, _optional_maps(residual, layout), _optional(weight), _optional(bias),
        _vector(mean), _vector(var), eps, relu, y, torch.get_num_threads(),
    )  # fmt: skip
    return y


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    frozen: bool,
    param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = memory_format_of(x)
    maps = _maps(x, layout)
    dx = torch.empty_like(maps)
    dresidual = x.new_empty(0) if y is None else torch.empty_like(maps)
    length = x.shape[1] if param_grads else 0
    dweight, dbias = x.new_empty(length), x.new_empty(length)
    _C.norm_backward(
        _maps(grad, layout), maps, _optional_maps(y, layout), _optional(weight),
        _optional(bias), _vector(mean), _vector(var), eps, relu, frozen, dx,
        None if y is None else dresidual, dweight if param_grads else None,
        dbias if param_grads else None, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dresidual, dweight, dbias
