"""The rules of the ops for vmap and forward-mode differentiation.

All six products are bilinear in their first two operands. So a tangent is two products more, and a
batch of either the maps or the samples alone is a larger batch of the same op. What is batched in
its weight runs entry by entry, as does a weight gradient, which is one vector for each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsekd.ops import checks

_WITH_BIAS = ("conv2d", "linear")


def jvp(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    """Return the rule of forward-mode differentiation of a product.

    It takes the primal operands, and the tangents of the first five in the same order.
    """

    def rule(operands: Sequence[Any], tangents: Sequence[Tensor | None]) -> Tensor | None:
        left, right, crow, col, fifth, *rest = operands
        if name in _WITH_BIAS:
            fifth = None
        dleft, dright, dbias = tangents[0], tangents[1], tangents[4]
        parts = []
        if dleft is not None:
            parts.append(op(dleft, right, crow, col, fifth, *rest))
        if dright is not None:
            parts.append(op(left, dright, crow, col, fifth, *rest))
        if name in _WITH_BIAS and dbias is not None:
            shape = getattr(checks, name)(left, right, crow, col, None, *rest)
            parts.append(_over_outputs(name, dbias).expand(shape))
        return sum(parts[1:], start=parts[0]) if parts else None

    return rule


def without_tangent(tensor: Any) -> Any:
    """Return a tensor without its tangent of the innermost level; anything else as it is."""
    return forward_ad.unpack_dual(tensor).primal if isinstance(tensor, Tensor) else tensor


def vmap(name: str, op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Return the batching rule of a product, as torch.library.register_vmap takes it."""
    fold = _FOLDS.get(name)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        # Only tensors are batched; a list of numbers has a list of None.
        dims = [dim if isinstance(dim, int) else None for dim in in_dims]
        if fold is not None and not any(dim is not None for dim in dims[1:4]):
            return fold(name, op, info.batch_size, dims, args), 0
        return _one_by_one(name, op, info.batch_size, dims, args), 0

    return rule


def _fold_linear(
    name: str, op: Callable[..., Tensor], size: int, dims: list[int | None], args: tuple[Any, ...]
) -> Tensor:
    """Turn the batch into one more leading dimension."""
    x, *rest = args
    return _with_bias(name, op, size, dims, x if dims[0] is None else x.movedim(dims[0], 0), rest)


def _fold_maps(
    name: str, op: Callable[..., Tensor], size: int, dims: list[int | None], args: tuple[Any, ...]
) -> Tensor:
    """Merge the batch into the batch of maps."""
    x, *rest = args
    if dims[0] is None:
        return _with_bias(name, op, size, dims, x, rest)
    x = x.movedim(dims[0], 0)
    batch, maps = x.shape[:2]
    if name == "conv2d_dgrad":
        rest[3] = [batch * maps, *rest[3][1:]]

    def run(x: Tensor, *rest: Any) -> Tensor:
        return op(x.flatten(0, 1), *rest).unflatten(0, (batch, maps))

    return _with_bias(name, run, size, dims, x, rest)


def _with_bias(
    name: str,
    op: Callable[..., Tensor],
    size: int,
    dims: list[int | None],
    x: Tensor,
    rest: Sequence[Any],
) -> Tensor:
    """Run `op`, and add the bias where it is batched."""
    if name not in _WITH_BIAS or dims[4] is None:
        return op(x, *rest)
    bias = rest[3].movedim(dims[4], 0)
    y = op(x, *rest[:3], None, *rest[4:])
    if dims[0] is None:
        y = y[None]
    bias = _over_outputs(name, bias)
    return y + bias.view(size, *[1] * (y.ndim - bias.ndim), *bias.shape[1:])


def _over_outputs(name: str, bias: Tensor) -> Tensor:
    """Return a bias, or several, so that it broadcasts over the outputs."""
    return bias[..., None, None] if name == "conv2d" else bias


def _one_by_one(
    name: str, op: Callable[..., Tensor], size: int, dims: list[int | None], args: tuple[Any, ...]
) -> Tensor:
    def entry(index: int) -> list[Any]:
        return [
            arg if dim is None else arg.select(dim, index)
            for arg, dim in zip(args, dims, strict=True)
        ]

    if size == 0:
        like = [
            arg if dim is None else arg.new_empty([n for d, n in enumerate(arg.shape) if d != dim])
            for arg, dim in zip(args, dims, strict=True)
        ]
        return args[0].new_empty([0, *getattr(checks, name)(*like)])
    return torch.stack([op(*entry(index)) for index in range(size)])


_FOLDS = {
    "conv2d": _fold_maps,
    "conv2d_dgrad": _fold_maps,
    "linear": _fold_linear,
    "linear_dgrad": _fold_linear,
}
