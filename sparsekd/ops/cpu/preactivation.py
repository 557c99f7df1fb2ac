"""Residual blocks that normalise in front of their convolutions, on blocked maps; see `blocked`.

The map between two such blocks is a sum that no norm has seen. The block that makes it computes its
moments on the way, for the norm in front of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekd._torch import OneLevelFunction
from sparsekd.ops.cpu.blocked import ConvNorm, Plan, count_batches, norm_memory, operands_of
from sparsekd.ops.cpu.blocked_map import Blocked, compiled, empty
from sparsekd.ops.cpu.blocked_ordinary import as_made, by_ordinary_ops, direct

PreActivationPlan: Any = compiled("PreActivationPlan")


@dataclass
class Block:
    """What a block computes with.

    Args:
        plan: of a `PreActivationPlan` for the input.
        front: the norm of the input, whose `values` is not used; None for none.
        units: the convolutions with norms behind them.
        last: values of the convolution whose result is the block's.
        shortcut: values of the convolution that projects the normalised input, or None.
        plain: computes the same from `[N, C, H, W]` and all parameters in a row, with ordinary ops.
    """

    plan: Plan
    front: ConvNorm | None
    units: Sequence[ConvNorm]
    last: Tensor
    shortcut: Tensor | None
    plain: Callable[[Tensor, Sequence[Tensor | None]], Tensor]

    @property
    def parameters(self) -> list[Tensor | None]:
        """What a gradient is wanted of."""
        front = [] if self.front is None else [self.front.gamma, self.front.beta]
        own = [p for unit in self.units for p in unit.parameters]
        return [*front, *own, self.last, self.shortcut]

    def front_operands(self, state: Tensor | None) -> tuple[Any, ...] | None:
        """Return the norm of the input as the plan takes it."""
        return None if self.front is None else (*self.front.norm_operands, state)


def run(block: Block, x: Blocked, *, moments: bool) -> Blocked | None:
    """Run a block.

    Args:
        block: what it computes with.
        x: the input, with moments if its norm uses those of the batch.
        moments: whether those of the result are wanted.

    Returns:
        The result; None if it is not finite. Running statistics have moved only if it is.
    """
    shapes, count = block.plan.shapes, len(block.units)
    maps = []
    for shape in shapes[:count]:
        maps += [empty(shape, x.tensor), x.tensor.new_empty(4 * shape[1])]
    state = None if block.front is None else x.tensor.new_empty(4 * x.shape[1])
    out_shape = shapes[count]
    out = empty(out_shape, x.tensor)
    found = torch.empty(2 * out_shape[1], dtype=torch.float64) if moments else None
    shortcut = None
    if block.shortcut is not None:
        shortcut = (block.shortcut, None, empty(shapes[count + 1], x.tensor))
    stored = x.stored()
    with torch.no_grad():
        finite = block.plan.forward(
            stored, block.front_operands(state), x.moments, operands_of(block.units, maps),
            (block.last, None, out), shortcut, found,
        )  # fmt: skip
    if not finite:
        return None
    with torch.no_grad():
        count_batches(block.units if block.front is None else [block.front, *block.units])
    inputs = [x.tensor, *block.parameters]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        kept = [stored, *maps] if state is None else [stored, *maps, state]
        known = block, x.shape, shapes, x.parts is None
        out = _Node.apply((known, out, kept), *inputs)
    return Blocked(out, out_shape, moments=found)


class _Node(OneLevelFunction):
    @staticmethod
    def forward(ctx: Any, made: tuple[Any, ...], *inputs: Tensor | None) -> Tensor:
        (ctx.block, ctx.shape, ctx.shapes, ctx.whole), out, kept = made
        ctx.inputs = len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (ctx.inputs + 1)
        saved = ctx.saved_tensors
        inputs, needs = saved[: ctx.inputs], ctx.needs_input_grad[1:]
        results = None
        if direct(grad, ctx.block.plan.crows):
            results = _gradients(ctx, as_made(saved), as_made([grad.contiguous()])[0], needs)
        if results is None:
            stored = None if ctx.whole else saved[ctx.inputs].detach()
            results = by_ordinary_ops(ctx.block.plain, ctx.shape, inputs, needs, grad, stored)
        return None, *results


def _gradients(
    ctx: Any, saved: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None] | None:
    """Return the gradients of all inputs; None if one of them is not finite."""
    block: Block = ctx.block
    x, *kept = saved[ctx.inputs :]
    front, state = block.front, None if block.front is None else kept[-1]
    dx = torch.empty_like(x) if needs[0] or front is not None else None
    results: list[Tensor | None] = [dx]
    ahead = None
    if front is not None:
        channels = x.shape[2]
        own = [x.new_empty(channels) if need else None for need in needs[1:3]]
        results += own
        ahead = (*own, torch.empty_like(x))
    memory = []
    for i, unit in enumerate(block.units):
        mine = norm_memory(unit, kept[2 * i + 1], needs[len(results) : len(results) + 4])
        results += mine
        memory.append((*mine, torch.empty_like(kept[2 * i])))
    last = torch.empty_like(block.last)
    bare = shortcut = projected = None
    if block.shortcut is not None:
        bare = torch.empty_like(block.shortcut)
        shortcut = (block.shortcut, None, empty(ctx.shapes[-1], x))
        assert block.plan.projected is not None
        projected = empty(block.plan.projected, x)
    results += [last, bare]
    finite = block.plan.backward(
        x.detach(), block.front_operands(state), operands_of(block.units, kept),
        (block.last, None, grad), shortcut, grad, ahead, memory, last, bare, projected, dx,
    )  # fmt: skip
    if not finite:
        return None
    return [result if need else None for result, need in zip(results, needs, strict=True)]
