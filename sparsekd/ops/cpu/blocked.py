"""Residual blocks on blocked maps: the layout of the CPU kernels, kept from layer to layer.

A blocked map is a tensor [N / lanes, H, C, W, lanes] of 64-byte pixels: the same pixel of 16 images
in float32, of 8 in float64. One autograd node runs a whole residual block in it. It keeps what its
convolutions give and four numbers for each channel; everything else is computed again on the way.
Where the next block can read its result from these (`Parts`), that is never stored either.

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

from sparsekd._torch import OneLevelFunction, version_of
from sparsekd.errors import ShapeError
from sparsekd.ops import observe
from sparsekd.ops.cpu.blocked_map import Behind, Blocked, Parts, compiled, empty, joined
from sparsekd.ops.cpu.blocked_ordinary import Shape, as_made, by_ordinary_ops, direct

BlockPlan: Any = compiled("BlockPlan")
current_isa: Any = compiled("current_isa")
_MOST_PLANS = 8  # shapes of input of a block

Spec = tuple[Any, ...]
"""Of a convolution: crow, col, weight shape, stride, padding (top, bottom, left, right), dilation,
groups, and whether a ReLU follows."""


class Plan:
    """A compiled plan of a block, with what each call would have to ask it for.

    Args:
        compiled: the plan.
        shapes: `[N, C, H, W]` of each convolution's result.
        projected: that of the gradient through the shortcut's convolution, None without one.
        identity: whether the input itself is added.
        crows: of the structures of its weights.
    """

    def __init__(self, compiled: Any, projects: bool, identity: bool, crows: list[Tensor]) -> None:
        self.identity, self.crows = identity, crows
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

    None also while somebody needs to see the gradients of its weights, which stay inside.

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
    key = shape, threads, current_isa(), identity, tuple(spec[2:] for spec in specs)
    if key not in known.by_call:
        if len(known.by_call) >= _MOST_PLANS:
            known.by_call.clear()
        try:
            made = kind(main, shortcut, identity, shape, threads)
            projects = shortcut is not None
            crows = indices[::2]
            made = Plan(made, projects, identity, crows) if made.supported else None
            known.by_call[key] = made
        except ShapeError:  # which the modules report in their own words
            known.by_call[key] = None
    found = known.by_call[key]
    return None if found is None or observe.listeners.watch(found.crows) else found


def forget(owner: Any) -> None:
    """Drop the plans of a block; they are made anew when needed."""
    _plans.pop(owner, None)


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
    last = 2 * count - 2
    normed = (*maps[last : last + 2], *maps[2 * count :])
    parts = _parts(plan, x, normed, relu)
    out = empty(out_shape, x.tensor) if parts is None else None
    with torch.no_grad():
        operands = operands_of(units, maps)
        if not plan.forward(x.operand, out, operands[:count], operands[count:]):
            return None
        count_batches(units)
    tensor = maps[last] if out is None else out
    inputs = [x.tensor, *(p for unit in units for p in unit.parameters)]
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)):
        return Blocked(tensor, out_shape, parts=parts)
    behind = Behind(relu)
    read = Parts((), False, False) if x.parts is None else x.parts
    kept = tensor, *maps, *x.normed, *read.tensors
    known = plan, units, count, relu, x.parts and x.parts._replace(tensors=()), plain, x.shape
    tensor = _Node.apply((known, kept, x.behind, behind), *inputs)
    return Blocked(tensor, out_shape, behind, normed, parts=parts)


def _parts(plan: Plan, x: Blocked, normed: Sequence[Tensor], relu: bool) -> Parts | None:
    """Return what the result of a block can be read from; None where that is more than two maps.

    Args:
        plan: of the block.
        x: the block's input.
        normed: what the block's last norms normalise, and their states.
        relu: whether one ends the block.
    """
    if plan.projected is not None:
        return Parts(normed, False, relu)
    if not plan.identity:
        return Parts((*normed, None, None), False, relu)
    if x.parts is None:
        return Parts((*normed, x.tensor, None), False, relu)
    if x.parts.tensors[2] is None:
        return Parts((*normed, *x.parts.tensors[:2]), x.parts.relu, relu)
    return None


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


class _Node(OneLevelFunction):
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
        if direct(grad, ctx.made[0].crows):
            results = _gradients(ctx, as_made(saved), as_made([grad.contiguous()])[0])
        if results is None:
            *_, parts, plain, shape = ctx.made
            inputs, needs = saved[: ctx.inputs], ctx.needs_input_grad[1:]
            stored = None
            if parts is not None:
                stored = joined(parts._replace(tensors=as_made(saved[-4:])), shape)
            results = by_ordinary_ops(plain, shape, inputs, needs, grad, stored)
        return None, *results


def _gradients(ctx: Any, saved: Sequence[Tensor], grad: Tensor) -> list[Tensor | None] | None:
    """Return the gradients of all inputs; None if one of them is not finite."""
    plan, units, count, relu, parts, *_ = ctx.made
    needs = ctx.needs_input_grad[1:]
    x = Blocked(saved[0].detach(), ctx.made[-1])
    result, *maps = saved[ctx.inputs :]
    maps, ahead = maps[: 2 * len(units)], maps[2 * len(units) :]
    if parts is not None:
        ahead, read = ahead[:-4], ahead[-4:]
        x.parts = parts._replace(tensors=read)
    results: list[Tensor | None] = [torch.empty_like(x.tensor) if needs[0] else None]
    memory = []
    for i, unit in enumerate(units):
        own = norm_memory(unit, maps[2 * i + 1], needs[4 * i + 1 : 4 * i + 5])
        results += own
        scratch = torch.empty_like(maps[2 * i]) if i < count - 1 else None
        memory.append((*own, scratch))
    sums = ctx.behind.take(grad)
    gated = None
    made_of = _parts(plan, x, (*maps[2 * count - 2 : 2 * count], *maps[2 * count :]), relu)
    out = result if made_of is None else None
    if sums is None:
        gated = torch.empty_like(result)
        out = result if made_of is None else joined(made_of, plan.shapes[count - 1])
    projected = None
    if len(units) > count and needs[0]:
        assert plan.projected is not None
        projected = empty(plan.projected, x.tensor)
    before = None
    if ctx.before is not None and needs[0]:
        wanted = torch.empty(3 * x.shape[1], dtype=torch.float64)
        other = ahead[2:] if len(ahead) > 2 else (None, None)
        before = (ctx.before.relu, *ahead[:2], *other, wanted)
    operands = operands_of(units, maps)
    finite = plan.backward(
        x.operand, out, operands[:count], operands[count:], grad, sums, gated,
        memory[:count], memory[count:], projected, results[0], before,
    )  # fmt: skip
    if not finite:
        return None
    if before is not None:
        ctx.before.grad, ctx.before.sums = results[0], wanted
    return [result if need else None for result, need in zip(results, needs, strict=True)]
