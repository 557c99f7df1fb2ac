"""The oracle: every op through a dense weight in plain torch, for any floating dtype and device.

It validates the structure on every call and computes half precision in float32, as the compiled
kernels do. Results that are not finite are computed again tap by tap, see `borders`. It is what
they are tested against, and the fallback where they cannot run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.csr import row_indices, validate
from sparsekd.errors import ShapeError
from sparsekd.ops import borders
from sparsekd.ops.checks import conv2d_shape
from sparsekd.ops.gradient_tiles import Tile
from sparsekd.ops.memory_format import in_format_of, matrix, memory_format_of, pixels, rows_cols

_PER_CHANNEL = (0, 2, 3)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _structure(crow: Tensor, col: Tensor, weight_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each nonzero of a structure that is one of this weight."""
    validate(crow, col, *rows_cols(weight_shape))
    return row_indices(crow, col.shape[0]), col


def _flat(row: Tensor, col: Tensor, weight_shape: Sequence[int]) -> Tensor:
    return row * rows_cols(weight_shape)[1] + col


def _dense(values: Tensor, row: Tensor, col: Tensor, weight_shape: Sequence[int]) -> Tensor:
    rows, cols = rows_cols(weight_shape)
    weight = values.new_zeros(rows * cols, dtype=_accumulation_dtype(values.dtype))
    weight[_flat(row, col, weight_shape)] = values.to(weight.dtype)
    return weight.view(list(weight_shape))


def _repaired(result: Tensor, exact: Callable[[], Tensor]) -> Tensor:
    """Return a result with what is not finite in it taken from the one that `exact` makes."""
    finite = result.isfinite()
    return result if finite.all() else torch.where(finite, result, exact().to(result.dtype))


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
    conv = weight_shape, stride, padding, dilation, groups
    structure = _structure(crow, col, weight_shape)
    geometry = borders.Geometry(x.shape[2:], conv2d_shape(x.shape, *conv)[2:], *conv)
    exact = partial(borders.conv2d, x, values, *structure, bias, geometry)
    if borders.reaches_far(geometry):
        y = exact()
    else:
        weight = _dense(values, *structure, weight_shape)
        wide_bias = None if bias is None else bias.to(weight.dtype)
        padded = _pad(x.to(weight.dtype), padding)
        y = _repaired(F.conv2d(padded, weight, wide_bias, stride, 0, dilation, groups), exact)
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


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
    structure = _structure(crow, col, weight_shape)
    n, channels, high, wide = input_shape
    geometry = borders.Geometry(
        (high, wide), grad.shape[2:], weight_shape, stride, padding, dilation, groups
    )
    exact = partial(borders.conv2d_dgrad, grad, values, *structure, geometry)
    if borders.reaches_far(geometry):
        dx = exact()
    else:
        weight = _dense(values, *structure, weight_shape)
        top, bottom, left, right = padding
        padded = weight.new_empty((n, channels, high + top + bottom, wide + left + right))
        dx, _, _ = torch.ops.aten.convolution_backward(
            grad.to(weight.dtype), padded, weight, None,
            stride, [0, 0], dilation, False, [0, 0], groups, [True, False, False],
        )  # fmt: skip
        dx = _repaired(dx[:, :, top : top + high, left : left + wide], exact)
    return dx.to(grad.dtype).contiguous(memory_format=memory_format_of(grad))


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
    structure = _structure(crow, col, weight_shape)
    conv = weight_shape, stride, padding, dilation, groups
    geometry = borders.Geometry(x.shape[2:], grad.shape[2:], *conv)
    exact = partial(borders.conv2d_wgrad, grad, x, *structure, geometry)
    if borders.reaches_far(geometry):
        return exact().to(x.dtype)
    padded = _pad(x.to(_accumulation_dtype(x.dtype)), padding)
    weight = padded.new_empty(weight_shape)
    _, dweight, _ = torch.ops.aten.convolution_backward(
        grad.to(weight.dtype), padded, weight, None,
        stride, [0, 0], dilation, False, [0, 0], groups, [False, True, False],
    )  # fmt: skip
    return _repaired(dweight.reshape(-1)[_flat(*structure, weight_shape)], exact).to(x.dtype)


def _pointwise(weight_shape: Sequence[int]) -> borders.Geometry:
    return borders.Geometry((1, 1), (1, 1), [*weight_shape, 1, 1], [1, 1], [0] * 4, [1, 1], 1)


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    structure = _structure(crow, col, weight_shape)
    weight = _dense(values, *structure, weight_shape)
    wide_bias = None if bias is None else bias.to(weight.dtype)
    y = F.linear(x.to(weight.dtype), weight, wide_bias)

    def exact() -> Tensor:
        geometry = _pointwise(weight_shape)
        return borders.conv2d(pixels(x), values, *structure, bias, geometry).view(y.shape)

    return _repaired(y, exact).to(x.dtype).contiguous()


def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    structure = _structure(crow, col, weight_shape)
    weight = _dense(values, *structure, weight_shape)
    dx = grad.to(weight.dtype) @ weight

    def exact() -> Tensor:
        geometry = _pointwise(weight_shape)
        return borders.conv2d_dgrad(pixels(grad), values, *structure, geometry).view(dx.shape)

    return _repaired(dx, exact).to(grad.dtype).contiguous()


def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    structure = _structure(crow, col, weight_shape)
    dtype = _accumulation_dtype(x.dtype)
    dweight = matrix(grad.to(dtype)).T @ matrix(x.to(dtype))

    def exact() -> Tensor:
        geometry = _pointwise(weight_shape)
        return borders.conv2d_wgrad(pixels(grad), pixels(x), *structure, geometry)

    dvalues = dweight.reshape(-1)[_flat(*structure, weight_shape)]
    return _repaired(dvalues, exact).to(x.dtype)


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
    """Add the dense gradient of `tile` to `out`."""
    outs, (ins, *kernel) = weight_shape[0] // groups, weight_shape[1:]
    sizes, conv = (x.shape[2:], grad.shape[2:]), (stride, padding, dilation)
    far = borders.reaches_far(borders.Geometry(*sizes, weight_shape, *conv, groups))
    maps = x.unflatten(1, (groups, ins))
    row, end = tile.row, tile.row + tile.rows
    channels = slice(tile.channel, tile.channel + tile.channels)
    while row < end:  # whole groups at once, or the part of a group that the tile has
        whole = (end - row) // outs if row % outs == 0 else 0
        step = whole * outs or min(end, (row // outs + 1) * outs) - row
        group, together = row // outs, max(whole, 1)
        upper = grad[:, row : row + step]
        part = maps[:, group : group + together, channels].flatten(1, 2)
        shape = [step, tile.channels, *kernel]
        exact = partial(
            borders.dense_wgrad, upper, part, borders.Geometry(*sizes, shape, *conv, together)
        )
        if far:
            dweight = exact()
        else:
            _, dweight, _ = torch.ops.aten.convolution_backward(
                upper, _pad(part, padding), part.new_empty(shape), None,
                stride, [0, 0], dilation, False, [0, 0], together, [False, True, False],
            )  # fmt: skip
            dweight = _repaired(dweight, exact)
        out[row - tile.row : row - tile.row + step] += dweight.flatten(1)
        row += step


def linear_wgrad_tile(
    grad: Tensor, x: Tensor, out: Tensor, tile: Tile, weight_shape: list[int]
) -> None:
    """Add the dense gradient of `tile` to `out`."""
    rows = matrix(grad)[:, tile.row : tile.row + tile.rows]
    cols = matrix(x)[:, tile.channel : tile.channel + tile.channels]
    out.addmm_(rows.T, cols)


class LargestK:
    """The k best positions outside a structure, over rectangles of scores.

    Several threads may offer; one after the other gets in.
    """

    def __init__(
        self, crow: Tensor, col: Tensor, rows: int, cols: int, k: int, dtype: torch.dtype
    ) -> None:
        free = rows * cols - col.shape[0]
        if not 0 <= k <= free:
            raise ShapeError(f"k: expected 0 <= k <= {free} free positions, got {k}")
        self._cols, self._k = cols, k
        self._taken = _flat(*_structure(crow, col, (rows, cols)), (rows, cols))
        self._position = torch.empty(0, dtype=torch.int64, device=col.device)
        self._score = torch.empty(0, dtype=dtype, device=col.device)
        self._lock = threading.Lock()

    def offer(self, scores: Tensor, row: int, col: int, magnitude: bool) -> None:
        rows = torch.arange(row, row + scores.shape[0], device=scores.device)
        cols = torch.arange(col, col + scores.shape[1], device=scores.device)
        position = (rows[:, None] * self._cols + cols).flatten()
        free = torch.isin(position, self._taken, assume_unique=True, invert=True)
        score = (scores.abs() if magnitude else scores).flatten()[free]
        if score.isnan().any():
            raise ValueError("score: NaN among the positions that could grow")
        with self._lock:
            position, order = torch.cat([self._position, position[free]]).sort()
            score = torch.cat([self._score, score])[order]
            # Ties: the lower position, as the sort by score is stable.
            best = torch.sort(score, descending=True, stable=True).indices[: self._k]
            self._position, self._score = position[best], score[best]

    def positions(self) -> Tensor:
        return self._position.sort().values


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if not x.numel():  # torch warns besides
        return x.new_full(x.shape[1:2], math.nan), x.new_full(x.shape[1:2], math.nan)
    var, mean = torch.var_mean(x, _PER_CHANNEL, correction=0)
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
    if not x.numel():  # torch fails where there are no channels
        return x.new_empty(x.shape)
    y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    if residual is not None:
        y = y + residual
    return (y.relu() if relu else y).contiguous(memory_format=memory_format_of(x))


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
    """Return the gradients of x, the residual (empty without y), weight and bias.

    Differentiable itself, in every tensor but `y`, `mean` and `var`.
    """

    def over_maps(vector: Tensor) -> Tensor:
        return vector[:, None, None]

    if not frozen and x.numel():
        mean, var = batch_moments(x)
    # The deviation of nothing is NaN, the gradient of nothing is zero.
    rstd = over_maps((var + eps).rsqrt()) if x.numel() else over_maps(torch.ones_like(var))
    normal = (x - over_maps(mean)) * rstd
    scaled = normal if weight is None else normal * over_maps(weight)
    if relu:
        out = y if y is not None else scaled if bias is None else scaled + over_maps(bias)
        grad = grad.masked_fill(out.detach() <= 0, 0)
    upper = grad if weight is None else grad * over_maps(weight)
    dx = upper
    if not frozen:
        along = (upper * normal).mean(_PER_CHANNEL, keepdim=True)
        dx = dx - upper.mean(_PER_CHANNEL, keepdim=True) - normal * along
    return (
        in_format_of(x, dx * rstd),
        x.new_empty(0) if y is None else in_format_of(x, grad),
        (grad * normal).sum(_PER_CHANNEL) if param_grads else x.new_empty(0),
        grad.sum(_PER_CHANNEL) if param_grads else x.new_empty(0),
    )


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x
