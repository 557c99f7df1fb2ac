"""Products with a weight-sparse matrix: `spmm`, `sddmm`, `linear`, `conv2d`.

Each takes a `Topology` and the `values` of its nonzeros. All are differentiable, twice and more,
in `values` and in the dense operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from sparsekd import ops
from sparsekd._torch import transformed
from sparsekd.errors import ShapeError, UnsupportedError
from sparsekd.ops.memory_format import in_format_of
from sparsekd.topology import Topology

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def spmm(topology: Topology, values: Tensor, x: Tensor) -> Tensor:
    """Multiply the sparse matrix by a dense one.

    Args:
        topology: positions of the nonzeros; a weight of more dimensions counts as `[rows, cols]`.
        values: their values.
        x: the dense matrix.

    Shape:
        - values: `[nnz]`
        - x: `[cols, n]`
        - result: `[rows, n]`

    Raises:
        ShapeError: a shape does not fit; the message names the argument.

    Source: Gale et al., Sparse GPU Kernels for Deep Learning (SC 2020), section 5.

    Example:
        >>> import torch
        >>> topology = Topology.from_mask(torch.eye(3, dtype=torch.bool))
        >>> spmm(topology, torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 1)).flatten().tolist()
        [1.0, 2.0, 3.0]
    """
    _check_matrix("x", x, topology.cols, None)
    return _linear(topology, values, x.T, None).T


def sddmm(topology: Topology, a: Tensor, b: Tensor) -> Tensor:
    """Compute the entries of a dense matrix product at the nonzeros only.

    Args:
        topology: positions of the entries to compute.
        a: the left factor.
        b: the right factor.

    Shape:
        - a: `[rows, k]`
        - b: `[k, cols]`
        - result: `[nnz]`

    Raises:
        ShapeError: a shape does not fit; the message names the argument.

    Source: Gale et al., Sparse GPU Kernels for Deep Learning (SC 2020), section 6.

    Example:
        >>> import torch
        >>> topology = Topology.from_mask(torch.eye(2, dtype=torch.bool))
        >>> sddmm(topology, torch.ones(2, 5), torch.ones(5, 2)).tolist()
        [5.0, 5.0]
    """
    _check_matrix("a", a, topology.rows, None)
    _check_matrix("b", b, a.shape[1], topology.cols)
    shape = [topology.rows, topology.cols]
    return ops.linear_wgrad(a.T, b, topology.crow_indices, topology.col_indices, shape)


def linear(topology: Topology, values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a weight-sparse linear layer, `x @ weight.T + bias`.

    Args:
        topology: positions of the nonzeros of the weight `[out, in]`.
        values: their values.
        x: the input; any leading dimensions, or none.
        bias: added to every row, or None.

    Shape:
        - values: `[nnz]`
        - x: `[..., in]`
        - bias: `[out]`
        - result: `[..., out]`

    Raises:
        ShapeError: a shape does not fit; the message names the argument.
        UnsupportedError: dtypes or devices differ, or the backend does not support them.

    Example:
        >>> import torch
        >>> topology = Topology.from_mask(torch.ones(2, 3, dtype=torch.bool))
        >>> linear(topology, torch.ones(6), torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """
    return _linear(topology, values, x, bias)


def conv2d(
    topology: Topology,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Apply a weight-sparse convolution.

    Args:
        topology: positions of the nonzeros of the weight `[C_out, C_in/groups, kh, kw]`.
        values: their values.
        x: the input, batched or not; the result has its memory format.
        bias: added to every output channel, or None.
        stride: one number or `(vertical, horizontal)`.
        padding: one number, `(vertical, horizontal)`, `(top, bottom, left, right)`, "valid" or
            "same" (stride 1 only; an odd total puts the extra at the bottom and the right).
        dilation: one number or `(vertical, horizontal)`.
        groups: number of groups of channels.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Shape:
        - values: `[nnz]`
        - x: `[N, C_in, H, W]` or `[C_in, H, W]`
        - bias: `[C_out]`
        - result: `[N, C_out, H_out, W_out]` or `[C_out, H_out, W_out]`

    Raises:
        ShapeError: a shape does not fit; the message names the argument.
        UnsupportedError: dtypes or devices differ, or the backend does not support them.

    Source: Chetlur et al., cuDNN: Efficient Primitives for Deep Learning (2014), section 3, for
    convolution as an implicit matrix product.

    Example:
        >>> import torch
        >>> topology = Topology.from_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool))
        >>> conv2d(topology, torch.ones(108), torch.ones(2, 3, 8, 8), padding=1).shape
        torch.Size([2, 4, 8, 8])
    """
    if len(topology.shape) != 4:
        raise ShapeError(f"topology: expected a 4-D weight, got {list(topology.shape)}")
    step, dilate = _pair("stride", stride), _pair("dilation", dilation)
    sides = resolve_padding(padding, topology.shape[2:], step, dilate)
    crow, col, shape = topology.crow_indices, topology.col_indices, list(topology.shape)
    geometry = step, sides, dilate, groups
    return convolve(x, values, crow, col, bias, shape, *geometry, padding_mode=padding_mode)


@torch.fx.wrap
def convolve(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    padding_mode: str = "zeros",
    channels_last: bool = False,
) -> Tensor:
    """Apply the op conv2d to a batch or a single image, in any padding mode.

    torch.fx traces this as one call, since a symbolic trace cannot branch on the shape of `x`.

    Args:
        x: the input, batched or not.
        values, crow, col, bias, weight_shape, stride, padding, dilation, groups: those of the op.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        channels_last: whether the result shall have that memory format.

    Shape:
        - x: `[N, C_in, H, W]` or `[C_in, H, W]`
        - result: `[N, C_out, H_out, W_out]` or `[C_out, H_out, W_out]`

    Example:
        >>> topology = Topology.from_mask(torch.ones(4, 3, 1, 1, dtype=torch.bool))
        >>> crow, col = topology.crow_indices, topology.col_indices
        >>> geometry = [4, 3, 1, 1], [1, 1], [0, 0, 0, 0], [1, 1], 1
        >>> convolve(torch.ones(3, 8, 8), torch.ones(12), crow, col, None, *geometry).shape
        torch.Size([4, 8, 8])
    """
    maps = x[None] if x.ndim == 3 else x
    if channels_last and maps.stride(1) != 1 and not transformed(maps):
        maps = maps.clone(memory_format=torch.channels_last)
    if padding_mode != "zeros":
        maps, padding = pad_input(maps, padding, padding_mode), [0, 0, 0, 0]
    y = ops.call_conv2d(
        maps, values, crow, col, bias, weight_shape, stride, padding, dilation, groups
    )
    return y[0] if x.ndim == 3 else y


def resolve_padding(
    padding: int | str | Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Convert any form of padding to `[top, bottom, left, right]`.

    Raises:
        ShapeError: a sequence of neither two nor four numbers.
        UnsupportedError: an unknown word, or "same" with a stride.

    Example:
        >>> resolve_padding("same", (2, 3), (1, 1), (1, 1))
        [0, 1, 1, 1]
    """
    if isinstance(padding, int):
        return [padding] * 4
    if not isinstance(padding, str):
        if len(padding) == 2:
            return [padding[0], padding[0], padding[1], padding[1]]
        if len(padding) == 4:
            return list(padding)
        raise ShapeError(f"padding: expected one, two or four numbers, got {tuple(padding)}")
    if padding == "valid":
        return [0] * 4
    if padding != "same":
        raise UnsupportedError(f"padding: expected 'same', 'valid' or numbers, got {padding!r}")
    if max(stride) > 1:
        raise UnsupportedError(f"padding: 'same' needs stride 1, got stride {tuple(stride)}")
    sides = []
    for size, step in zip(kernel_size, dilation, strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return sides


def pad_input(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """Pad maps by `[top, bottom, left, right]` in any padding mode, keeping the memory format.

    Raises:
        UnsupportedError: an unknown mode.

    Example:
        >>> import torch
        >>> pad_input(torch.ones(1, 1, 2, 2), [0, 1, 0, 1], "circular").shape
        torch.Size([1, 1, 3, 3])
    """
    if mode not in PADDING_MODES:
        raise UnsupportedError(f"padding_mode: expected one of {PADDING_MODES}, got {mode!r}")
    if not any(padding):
        return x
    top, bottom, left, right = padding
    padded = F.pad(x, (left, right, top, bottom), mode=mode)
    return in_format_of(x, padded)  # circular would lose it


def _linear(topology: Topology, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    shape = [topology.rows, topology.cols]
    return ops.call_linear(x, values, topology.crow_indices, topology.col_indices, bias, shape)


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    if len(value) != 2:
        raise ShapeError(f"{name}: expected one or two numbers, got {tuple(value)}")
    return list(value)


def _check_matrix(name: str, matrix: Tensor, rows: int, cols: int | None) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != rows or cols not in (None, matrix.shape[1]):
        wanted = [rows, "n" if cols is None else cols]
        raise ShapeError(f"{name}: expected shape {wanted}, got {list(matrix.shape)}")
