"""Maps in the blocked layout: how blocks hand them on, and the ways into the layout and out of it.

See `blocked`. A map need not be stored: where it is the end of a block, the next one can read it
from what it is computed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekd._torch import transformed
from sparsekd.ops.cpu.blocked_ordinary import Shape, entered, lanes, left

try:
    import sparsekd._C as _C
except ModuleNotFoundError:  # not built: blocks run as the modules they consist of
    _C = None

AVAILABLE = _C is not None


def compiled(name: str) -> Any:
    """Return a class of the compiled module, or None where that is not built."""
    return None if _C is None else getattr(_C, name)


def sizes(shape: Shape, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of a blocked map of images [N, C, H, W]."""
    n, c, h, w = shape
    per = lanes(dtype)
    return -(-n // per), h, c, w, per


def empty(shape: Shape, like: Tensor) -> Tensor:
    """Return memory for a blocked map of images [N, C, H, W]."""
    return torch.empty(sizes(shape, like.dtype), dtype=like.dtype)


@dataclass
class Behind:
    """What the block that made a map tells the one that reads it, and is told in turn.

    The gradient of the map passes the ReLU of the block that made it and meets the norms in front
    of that, which need sums of it. The reader has it in registers, so it does both.
    """

    relu: bool
    grad: Tensor | None = None
    sums: Tensor | None = None

    def take(self, grad: Tensor) -> Tensor | None:
        """Return the sums if `grad` is what the reader has prepared: nobody else added to it."""
        sums = self.sums if grad is self.grad else None
        self.grad = self.sums = None
        return sums


class Parts(NamedTuple):
    """What a map that is not stored is computed from: `relu?(norm(z) + relu?(norm?(branch)))`.

    Args:
        tensors: what the last convolution gives and the state of the norm behind it; what is added
            and the state of the norm behind that, each None where there is none.
        branch_relu: whether a ReLU follows on what is added.
        relu: whether one follows the addition.
    """

    tensors: Sequence[Tensor | None]
    branch_relu: bool
    relu: bool


def joined(parts: Parts, shape: Shape) -> Tensor:
    """Return the map of images [N, C, H, W] that parts make, without its gradient."""
    z = parts.tensors[0]
    assert z is not None
    with torch.no_grad():
        out = torch.empty_like(z)
        _C.join(parts, out, shape, torch.get_num_threads())
    return out


@dataclass
class Blocked:
    """Images in the blocked layout.

    Args:
        tensor: `[N / lanes, H, C, W, lanes]`, with its gradient. Its numbers are those of the map
            unless this has `parts`: then it only stands for the map, and `stored` has the numbers.
        shape: `[N, C, H, W]`.
        behind: of the block that made it, if one has.
        normed: what each norm that ends this block normalises, and its state; one norm or two.
        moments: mean and variance of each channel, `[2 C]` in float64, if they are known.
        parts: what the map is computed from where it is not stored.
    """

    tensor: Tensor
    shape: Shape
    behind: Behind | None = None
    normed: tuple[Tensor, ...] = ()
    moments: Tensor | None = None
    parts: Parts | None = None

    def stored(self) -> Tensor:
        """Return the numbers of the map for somebody who cannot read its parts."""
        return self.tensor if self.parts is None else joined(self.parts, self.shape)

    @property
    def operand(self) -> Tensor | Parts:
        """The map as a compiled plan of a block takes it."""
        return self.tensor if self.parts is None else self.parts


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = tuple(x.shape)
        out = empty(ctx.shape, x)
        _C.enter(x, out, torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if transformed(grad):
            return left(grad, ctx.shape)
        grad = grad.contiguous()
        return _Leave.apply(grad, ctx.shape, grad)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Shape, stored: Tensor) -> Tensor:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        _C.leave(stored, out, torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return entered(grad) if transformed(grad) else _Enter.apply(grad), None, None


def enter(x: Tensor) -> Blocked:
    """Bring images [N, C, H, W] of any strides into the blocked layout, differentiably."""
    return Blocked(_Enter.apply(x), tuple(x.shape))  # type: ignore[arg-type]


def leave(x: Tensor | Blocked) -> Tensor:
    """Return images [N, C, H, W], in channels_last if they come from the blocked layout."""
    return _Leave.apply(x.tensor, x.shape, x.stored()) if isinstance(x, Blocked) else x
