"""Derivatives of the products, and how an op gets one without torch's reading its schema.

conv2d is bilinear in (x, values): each of conv2d, dgrad and wgrad differentiates into the other
two, so double backward needs no kernel of its own. The same holds for linear. What the six
products call in a backward pass is a kernel where their forward went straight to one (`eager`),
and an op, which torch sees, everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sparsekd._torch import (
    KeySet,
    OneLevelFunction,
    after_autograd,
    apply_at_this_level,
    below_autograd,
    derivatives_of_outer_levels,
    in_forward_ad,
    in_transform,
    intercepted,
    profiled,
    transformed,
)
from sparsekd.errors import UnsupportedError
from sparsekd.ops import transforms
from sparsekd.ops.dispatch.context import asked, followed
from sparsekd.ops.kernel import kernels
from sparsekd.ops.register import library, overloads

Setup = Callable[..., None]
Backward = Callable[..., tuple[Any, ...]]


def register_autograd(
    op: Any,
    backward: Backward,
    setup: Setup,
    jvp: Callable[..., Any] | None = None,
) -> None:
    """Do what torch.library.register_autograd does, without its reading the schema on every call.

    That reading took longer than a whole small layer. Forward-mode differentiation and transforms
    of torch.func, which torch's function does not know, work as well, see `transforms`.

    Args:
        op: an overload.
        backward: returns the gradients of the first operands, of the context and that of the
            result; the others have none.
        setup: keeps in the context what `backward` needs of the operands and the result.
        jvp: the rule of forward-mode differentiation, if it has one.
    """
    name = op.__name__.partition(".")[0]  # without that of the overload

    def below(keyset: KeySet, *args: Any) -> Any:
        with below_autograd():
            return op.redispatch(keyset & after_autograd, *args)

    class Node(OneLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args  # last, so that needs_input_grad counts as the op does
            if in_transform():
                with derivatives_of_outer_levels():
                    result = below(keyset, *inputs)
            else:
                result = below(keyset, *inputs)
            ctx.direct, ctx.asked = False, asked()
            setup(ctx, inputs, result)
            if in_forward_ad():
                ctx.save_for_forward(*inputs[:4])
                ctx.others = inputs[4:]
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            found = _where_asked(ctx, backward, grads)
            return *found, *[None] * (len(ctx.needs_input_grad) - len(found))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            if jvp is None:
                raise UnsupportedError(f"{name}: has no forward-mode derivative")
            with derivatives_of_outer_levels():
                primals = map(transforms.without_tangent, (*ctx.saved_tensors, *ctx.others))
                return jvp(list(primals), tangents[:-1])

    Node.__name__ = Node.__qualname__ = f"Sparsekd_{name}"

    def run(keyset: KeySet, *args: Any) -> Any:
        if in_forward_ad() or (
            torch.is_grad_enabled()
            and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        ):
            if in_transform():
                return apply_at_this_level(Node, *args, keyset)
            return Node.apply(*args, keyset)
        return below(keyset, *args)

    library.impl(name, run, "Autograd", with_keyset=True)


def direct_call(
    name: str, kernel: Callable[..., Any], count: int, backward: Backward, setup: Setup
) -> Callable[..., Any]:
    """Return an op with its derivative for eager calls, which go past the dispatcher.

    The node that it makes is the one of `register_autograd`, but for what only transforms and the
    dispatcher need; and it takes everything that is no tensor as one argument, since torch looks
    at each.

    Args:
        name: of the op.
        kernel: what runs it below autograd.
        count: of its operands that may be tensors, which come first.
        backward, setup: as of `register_autograd`.
    """

    without = [None] * (count + 1)

    class Node(OneLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            inputs = *args[:count], *args[count]
            result = kernel(*inputs)
            ctx.direct, ctx.asked = True, asked()
            setup(ctx, inputs, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            found = _where_asked(ctx, backward, grads)
            return *found, *without[len(found) :]

    Node.__name__ = Node.__qualname__ = f"Sparsekd_{name}"
    apply = Node.apply

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for arg in args[:count]:
                if arg is not None and arg.requires_grad:
                    return apply(*args[:count], args[count:])
        return kernel(*args)

    return call


def _where_asked(ctx: Any, backward: Backward, grads: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Run a backward pass on the backend that its forward pass was asked to run on."""
    if ctx.asked is None:
        return backward(ctx, *grads)
    with followed(ctx.asked):
        return backward(ctx, *grads)


def _save(ctx: Any, inputs: Sequence[Any], first_rest: int) -> None:
    """Keep the structure, the non-tensor arguments, and of the two factors what is needed."""
    left, right, crow, col = inputs[:4]
    needs_left, needs_right = ctx.needs_input_grad[:2]
    ctx.save_for_backward(left if needs_right else None, right if needs_left else None, crow, col)
    ctx.rest = inputs[first_rest:]


def _calls(ctx: Any, grad: Tensor) -> SimpleNamespace:
    """Return the calls of a backward pass: kernels if its forward used them, see `eager`."""
    return kernels if goes_direct(ctx, grad) else overloads


def goes_direct(ctx: Any, grad: Tensor) -> bool:
    """Return whether a backward pass may go past the dispatcher, as its forward pass has."""
    direct = ctx.direct and type(grad) is Tensor and not torch.is_grad_enabled()
    return direct and not (intercepted() or profiled() or transformed(grad))


def _formulas(kind: str) -> dict[str, tuple[Backward, Setup]]:
    """Return the derivatives of "conv2d" or "linear" and of its two gradients, by name.

    The operands are `(left, right, crow, col, ...)`. Only the input gradient of a convolution takes
    one argument more, the shape of the input.
    """
    dgrad, wgrad, conv = f"{kind}_dgrad", f"{kind}_wgrad", kind == "conv2d"

    def forward_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        _save(ctx, inputs, 5)
        ctx.input_shape = [inputs[0].shape] if conv else ()

    def forward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        run = _calls(ctx, grad)
        x, values, crow, col = ctx.saved_tensors
        dx = dvalues = dbias = None
        needs = ctx.needs_input_grad
        if needs[0]:
            dx = getattr(run, dgrad)(grad, values, crow, col, *ctx.input_shape, *ctx.rest)
        if needs[1]:
            dvalues = getattr(run, wgrad)(grad, x, crow, col, *ctx.rest)
        if needs[4]:
            over = (0, 2, 3) if conv else tuple(range(grad.ndim - 1))
            dbias = grad.sum(over) if over else grad
        return dx, dvalues, None, None, dbias

    def dgrad_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        _save(ctx, inputs, 5 if conv else 4)

    def dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
        run = _calls(ctx, ddx)
        grad, values, crow, col = ctx.saved_tensors
        ddgrad = dvalues = None
        if ctx.needs_input_grad[0]:
            ddgrad = getattr(run, kind)(ddx, values, crow, col, None, *ctx.rest)
        if ctx.needs_input_grad[1]:
            dvalues = getattr(run, wgrad)(grad, ddx, crow, col, *ctx.rest)
        return ddgrad, dvalues

    def wgrad_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        _save(ctx, inputs, 4)
        ctx.input_shape = [inputs[1].shape] if conv else ()

    def wgrad_backward(ctx: Any, ddvalues: Tensor) -> tuple[Any, ...]:
        run = _calls(ctx, ddvalues)
        grad, x, crow, col = ctx.saved_tensors
        ddgrad = dx = None
        if ctx.needs_input_grad[0]:
            ddgrad = getattr(run, kind)(x, ddvalues, crow, col, None, *ctx.rest)
        if ctx.needs_input_grad[1]:
            dx = getattr(run, dgrad)(grad, ddvalues, crow, col, *ctx.input_shape, *ctx.rest)
        return ddgrad, dx

    return {
        kind: (forward_backward, forward_setup),
        dgrad: (dgrad_backward, dgrad_setup),
        wgrad: (wgrad_backward, wgrad_setup),
    }


def _register_product(name: str, backward: Backward, setup: Setup) -> None:
    """Register the derivatives of a product and its batching rule."""
    op = getattr(overloads, name)
    torch.library.register_vmap(f"sparsekd::{name}", transforms.vmap(name, op), lib=library)
    register_autograd(op, backward, setup, transforms.jvp(name, op))


direct: dict[str, Callable[..., Any]] = {}
"""Layers as eager code calls them, by the name of their op, see `direct_call`."""

for _kind in ("conv2d", "linear"):
    for _name, _rules in _formulas(_kind).items():
        _register_product(_name, *_rules)
    direct[_kind] = direct_call(_kind, getattr(kernels, _kind), 5, *_formulas(_kind)[_kind])
