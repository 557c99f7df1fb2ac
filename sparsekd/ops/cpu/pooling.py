"""Pooling on blocked maps; see `blocked`.

The gradient of a pooled map meets the ReLU and the norms in front of it on its way, as that of a
block's input does.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekd.errors import ShapeError
from sparsekd.ops.cpu.blocked_map import Blocked, compiled, empty
from sparsekd.ops.cpu.blocked_ordinary import Shape, as_made, by_ordinary_ops, direct

PoolPlan: Any = compiled("PoolPlan")

Pair = tuple[int, int]


def run(x: Blocked, average: bool, kernel: Pair, stride: Pair, padding: Pair) -> Blocked | None:
    """Pool maps.

    Args:
        x: the maps.
        average: of the whole window, padding included; False for its maximum.
        kernel, stride, padding: of the windows, in rows and columns.

    Returns:
        The pooled maps; None where the windows do not fit.
    """
    plan = _plan(average, kernel, stride, padding, tuple(x.shape), torch.get_num_threads())
    if plan is None:
        return None
    out, stored = empty(plan.shape, x.tensor), x.stored()
    with torch.no_grad():
        plan.forward(stored, out)
    if torch.is_grad_enabled() and x.tensor.requires_grad:
        plain = partial(_plain, average, kernel, stride, padding)
        made = plan, plain, x.shape, x.parts is None, out, (stored, *x.normed), x.behind
        out = _Node.apply(made, x.tensor)
    return Blocked(out, plan.shape)


@lru_cache(maxsize=256)
def _plan(
    average: bool, kernel: Pair, stride: Pair, padding: Pair, shape: Shape, threads: int
) -> Any:
    try:
        return PoolPlan(average, kernel, stride, padding, shape, threads)
    except ShapeError:  # which the modules report in their own words
        return None


def _plain(
    average: bool, kernel: Pair, stride: Pair, padding: Pair, x: Tensor, parameters: Any
) -> Tensor:
    pool = F.avg_pool2d if average else F.max_pool2d
    return pool(x, kernel, stride, padding)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: tuple[Any, ...], x: Tensor) -> Tensor:
        *ctx.made, out, kept, ctx.before = made
        ctx.save_for_backward(x, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, plain, shape, whole = ctx.made
        x, stored, *normed = ctx.saved_tensors
        if not direct(grad):
            numbers = None if whole else stored.detach()
            return None, *by_ordinary_ops(plain, shape, [x], [True], grad, numbers)
        (x, *normed), (grad,) = as_made([stored, *normed]), as_made([grad.contiguous()])
        dx, before = torch.empty_like(x), None
        if ctx.before is not None:
            sums = torch.empty(3 * x.shape[2], dtype=torch.float64)
            other = normed[2:] if len(normed) > 2 else (None, None)
            before = (ctx.before.relu, *normed[:2], *other, sums)
        finite = plan.backward(x.detach(), grad, dx, before)
        if before is not None and finite:  # else the block before finds out for itself
            ctx.before.grad, ctx.before.sums = dx, sums
        return None, dx
