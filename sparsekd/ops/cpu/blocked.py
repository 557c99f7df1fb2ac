"""Residual blocks on blocked maps: the layout of the CPU kernels, kept from layer to layer.

A blocked map is a tensor [N / lanes, H, C, W, lanes] of 64-byte pixels: the same pixel of 16 images
in float32, of 8 in float64. One autograd node runs a whole residual block in it. It keeps what its
convolutions give and four numbers for each channel; everything else is computed again on the way.

Where the kernels give something that is not finite, the node steps back: zeros that stand for
padding may have met an infinite weight, and the ordinary ops know the borders.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd._torch import direct_apply, transformed, version_of
from sparsekd.errors import ShapeError
from sparsekd.ops.cpu.blocked_ordinary import (
    Shape,
    as_made,
    by_ordinary_ops,
    direct,
    entered,
    lanes,
    left,
)

try:
    import sparsekd._C as _C
except ModuleNotFoundError:  # not built: blocks run as the modules they consist of
    _C = None

AVAILABLE = _C is not None


def compiled(name: str) -> Any:
    """Return a class of the compiled module, or None where that is not built."""
    return None if _C is None else getattr(_C, name)


BlockPlan: Any = compiled("BlockPlan")
_MOST_PLANS = 8  # shapes of input of a block


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


@dataclass
class Blocked:
    """Images in the blocked layout.

    Args:
        tensor: `[N / lanes, H, C, W, lanes]`, with its gradient.
        shape: `[N, C, H, W]`.
        behind: of the block that made it, if one has.
        normed: what each norm that ends this block normalises, and its state; one norm or two.
        moments: mean and variance of each channel, `[2 C]` in float64, if they are known.
    """

    tensor: Tensor
    shape: Shape
    behind: Behind | None = None
    normed: tuple[Tensor, ...] = ()
    moments: Tensor | None = None


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
        return _Leave.apply(grad.contiguous(), ctx.shape)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Shape) -> Tensor:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        _C.leave(x, out, torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return entered(grad) if transformed(grad) else _Enter.apply(grad), None


def enter(x: Tensor) -> Blocked:
    """Bring images [N, C, H, W] of any strides into the blocked layout, differentiably."""
    return Blocked(_Enter.apply(x), tuple(x.shape))  # type: ignore[arg-type]


def leave(x: Tensor | Blocked) -> Tensor:
    """Return images [N, C, H, W], in channels_last if they come from the blocked layout."""
    return _Leave.apply(x.tensor, x.shape) if isinstance(x, Blocked) else x


Spec = tuple[Any, ...]
"""Of a convolution: crow, col, weight shape, stride, padding (top, bottom, left, right), dilation,
groups, and whether a ReLU follows."""


class Plan:
    """A compiled plan of a block, with what each call would have to ask it for.

    Args:
        compiled: the plan.
        shapes: `[N, C, H, W]` of each convolution's result.
        projected: that of the gradient through the shortcut's convolution, None without one.
    """

    def __init__(self, compiled: Any, projects: bool) -> None:
        self.forward, self.backward = compiled.forward, compiled.backward
        self.shapes: list[Shape] = [tuple(shape) for shape in compiled.shapes]
        self.projected: Shape | None = tuple(compiled.projected) if projects else None


class _Plans:
    """The plans of one block, for the structures that it has now."""

    def __init__(self, indices: list[Tensor]) -> None:
        self.indices, self.versions = indices, [_version(index) for index in indices]
        self.by_call: dict[Any, Any] = {}

    def hold_for(self, indices: list[Tensor]) -> bool:
        return len(indices) == len(self.indices) and all(
            a is b and _version(a) == version
            for a, b, version in zip(indices, self.indices, self.versions, strict=True)
        )


def _version(index: Tensor) -> int:
    return 0 if index.is_inference() else version_of(index)


_plans: weakref.WeakKeyDictionary[Any, _Plans] = weakref.WeakKeyDictionary()


def plan(
    kind: Callable[..., Any],
    owner: Any,
    main: list[Spec],
    shortcut: Spec | None,
    identity: bool,
    shape: Shape,
) -> Plan | None:
    """Return the compiled plan of a block, None if the kernels do not take it.

    Args:
        kind: of plan; takes what follows and the number of threads.
        owner: what keeps the plan, for as long as its structures stay.
        main: the convolutions of the main branch.
        shortcut: the one that projects the input before it is added.
        identity: whether the input itself is added.
        shape: `[N, C, H, W]` of the input.
    """
    specs = [*main, shortcut] if shortcut else main
    indices = [index for spec in specs for index in spec[:2]]
    known = _plans.get(owner)
    if known is None or not known.hold_for(indices):
        known = _plans[owner] = _Plans(indices)
    threads = torch.get_num_threads()
    key = shape, threads, _C.current_isa(), identity, tuple(spec[2:] for spec in specs)
    if key not in known.by_call:
        if len(known.by_call) >= _MOST_PLANS:
            known.by_call.clear()
        try:
            made = kind(main, shortcut, identity, shape, threads)
            known.by_call[key] = Plan(made, shortcut is not None) if made.supported else None
        except ShapeError:  # which the modules report in their own words
            known.by_call[key] = None
    return known.by_call[key]


@dataclass
class ConvNorm:
    """A convolution with the norm behind it, as the kernels take them.

    Args:
        values: `[nnz]`, of the weight.
        bias: `[Co]` or None, as are the next four.
        gamma, beta: the norm's weight and bias.
        mean, var: its running statistics.
        eps: of the norm.
        rate: by which the running statistics move.
        frozen: whether they normalise.
        batches: counts the batches that have moved them; None where none does.
    """

    values: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    rate: float
    frozen: bool
    batches: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What a gradient is wanted of."""
        return self.values, self.bias, self.gamma, self.beta

    @property
    def norm_operands(self) -> tuple[Any, ...]:
        """The norm as a compiled plan takes it."""
        return self.gamma, self.beta, self.mean, self.var, self.eps, self.rate, self.frozen


def run(
    plan: Plan,
    x: Blocked,
    units: Sequence[ConvNorm],
    count: int,
    relu: bool,
    plain: Callable[[Tensor, Sequence[Tensor | None]], Tensor],
) -> Blocked | None:
    """Run a residual block.

    Args:
        plan: of a `BlockPlan` for this input.
        x: the input.
        units: the convolutions in order, that of the shortcut last.
        count: how many belong to the main branch.
        relu: whether one ends the block.
        plain: computes the same from `[N, C, H, W]` and all `parameters` in a row, with ordinary
            ops; for derivatives of derivatives.

    Returns:
        The result; None if it is not finite. Running statistics have moved only if it is.
    """
    shapes = plan.shapes
    maps = []
    for shape in shapes:
        maps += [empty(shape, x.tensor), x.tensor.new_empty(4 * shape[1])]
    out_shape = shapes[count - 1]
    out = empty(out_shape, x.tensor)
    with torch.no_grad():
        operands = operands_of(units, maps)
        if not plan.forward(x.tensor, out, operands[:count], operands[count:]):
            return None
        count_batches(units)
    inputs = [x.tensor, *(p for unit in units for p in unit.parameters)]
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
        return Blocked(out, out_shape)
    behind = Behind(relu)
    made = (plan, units, count, plain, x.shape), (out, *maps, *x.normed), x.behind, behind
    tensor = _apply(made, *inputs)
    last = 2 * count - 2
    return Blocked(tensor, out_shape, behind, (*maps[last : last + 2], *maps[2 * count :]))


def count_batches(norms: Sequence[ConvNorm]) -> None:
    """Count a batch where running statistics have moved.

    That is before the node is made: hooks of saved tensors may raise there, as checkpointing does.
    """
    for norm in norms:
        if norm.batches is not None:
            norm.batches.add_(1)


def operands_of(units: Sequence[ConvNorm], maps: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """Return convolutions as a plan takes them; `maps` has the result and state of each."""
    return [
        (unit.values, unit.bias, *unit.norm_operands, maps[2 * i], maps[2 * i + 1])
        for i, unit in enumerate(units)
    ]


def norm_memory(unit: ConvNorm, state: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Return memory for the gradients of a convolution's `parameters`, where they are needed.

    The values have it always, as their gradient comes along.
    """
    channels = state.shape[0] // 4
    return [
        torch.empty_like(unit.values),
        *(state.new_empty(channels) if need else None for need in needs[1:]),
    ]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: tuple[Any, ...], *inputs: Tensor | None) -> Tensor:
        ctx.made, maps, ctx.before, ctx.behind = made
        ctx.save_for_backward(*inputs, *maps)
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)
        return maps[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (ctx.inputs + 1)
        saved = ctx.saved_tensors
        results = None
        if direct(grad):
            results = _gradients(ctx, as_made(saved), as_made([grad.contiguous()])[0])
        if results is None:
            *_, plain, shape = ctx.made
            inputs, needs = saved[: ctx.inputs], ctx.needs_input_grad[1:]
            results = by_ordinary_ops(plain, shape, inputs, needs, grad)
        return None, *results


_apply = direct_apply(_Node)


def _gradients(ctx: Any, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None] | None:
    """Return the gradients of all inputs; None if one of them is not finite."""
    plan, units, count, *_ = ctx.made
    needs = ctx.needs_input_grad[1:]
    x = saved[0]
    out, *maps = saved[ctx.inputs :]
    maps, ahead = maps[: 2 * len(units)], maps[2 * len(units) :]
    results: list[Tensor | None] = [torch.empty_like(x) if needs[0] else None]
    memory = []
    for i, unit in enumerate(units):
        own = norm_memory(unit, maps[2 * i + 1], needs[4 * i + 1 : 4 * i + 5])
        results += own
        scratch = torch.empty_like(maps[2 * i]) if i < count - 1 else None
        memory.append((*own, scratch))
    sums = ctx.behind.take(grad)
    gated = torch.empty_like(out) if sums is None else None
    projected = None
    if len(units) > count and needs[0]:
        assert plan.projected is not None
        projected = empty(plan.projected, x)
    before = None
    if ctx.before is not None and needs[0]:
        wanted = torch.empty(3 * x.shape[2], dtype=torch.float64)
        other = ahead[2:] if len(ahead) > 2 else (None, None)
        before = (ctx.before.relu, *ahead[:2], *other, wanted)
    operands = operands_of(units, maps)
    finite = plan.backward(
        x.detach(), out, operands[:count], operands[count:], grad, sums, gated,
        memory[:count], memory[count:], projected, results[0], before,
    )  # fmt: skip
    if not finite:
        return None
    if before is not None:
        ctx.before.grad, ctx.before.sums = results[0], wanted
    return [result if need else None for result, need in zip(results, needs, strict=True)]
