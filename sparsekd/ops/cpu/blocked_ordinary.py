"""Blocked maps by ordinary ops: gradients that the kernels do not give, or that others have to see.

These are derivatives of derivatives, batches of gradients, and what is not finite; see `blocked`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sparsekd._torch import transformed
from sparsekd.ops import observe

Shape = tuple[int, int, int, int]


def lanes(dtype: torch.dtype) -> int:
    """Return how many images share a pixel: 64 bytes of them."""
    return 64 // dtype.itemsize


def entered(x: Tensor) -> Tensor:
    """Bring images into the layout by ordinary ops."""
    n, c, h, w = x.shape
    per = lanes(x.dtype)
    if n % per:
        x = torch.cat([x, x.new_zeros((-n % per, c, h, w))])
    return x.reshape(-1, per, c, h, w).permute(0, 3, 2, 4, 1)


def left(x: Tensor, shape: Shape) -> Tensor:
    """Take images out of the layout by ordinary ops."""
    n, c, h, w = shape
    return x.permute(0, 4, 2, 1, 3).reshape(-1, c, h, w)[:n]


def direct(grad: Tensor, crows: Sequence[Tensor] = ()) -> bool:
    """Return whether the kernels may make of a gradient what is wanted of it, seen by nobody.

    Args:
        grad: of the result of a block.
        crows: of the structures of its weights.
    """
    return not (torch.is_grad_enabled() or transformed(grad) or observe.listeners.watch(crows))


def as_made(saved: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return saved tensors with the memory that the kernels expect.

    Hooks of saved tensors may bring them back with another alignment.
    """
    return [t if t is None or t.ndim != 5 or _fits(t) else _copy(t) for t in saved]


def _fits(map: Tensor) -> bool:
    return map.data_ptr() % 64 == 0 and map.is_contiguous()


def _copy(map: Tensor) -> Tensor:
    return map.detach().clone(memory_format=torch.contiguous_format)


def by_ordinary_ops(
    plain: Callable[[Tensor, Sequence[Tensor | None]], Tensor],
    shape: Shape,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
    stored: Tensor | None = None,
) -> list[Tensor | None]:
    """Return the gradients of a block by ordinary ops, which can be differentiated again.

    Args:
        plain: the block, of images `[N, C, H, W]` and its parameters.
        shape: of these images.
        inputs: the blocked images, then the parameters.
        needs: of which of them a gradient is wanted.
        grad: that of the result.
        stored: the numbers of the images, where their tensor only stands for them.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: where the images depend on the parameters, that is left to the nodes before.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        x, *parameters = inputs
        assert x is not None
        if stored is not None:
            x = stored + (x - x.detach())  # zeros, with the gradient
        out = entered(plain(left(x, shape), parameters))
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    calls = _Calls()
    with observe.listeners.before(calls) if observe.listeners else nullcontext():
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    for call in calls.seen:
        observe.listeners.tell(*call)
    return [next(found) if need else None for need in needs]


class _Calls:
    """The calls of ops in a backward pass, for listeners to see as calls of the pass around it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def on_call(self, op: str, args: tuple[Any, ...]) -> bool:
        self.seen.append((op, args))
        return True
