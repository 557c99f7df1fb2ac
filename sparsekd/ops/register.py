"""Make the ops known to torch: kernels, fakes, derivatives, autocast and FLOP formulas.

conv2d is bilinear in (x, values): each of conv2d, dgrad and wgrad differentiates into the other
two, so double backward needs no kernel of its own. The same holds for linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsekd.ops import checks, observe
from sparsekd.ops.backends import choose
from sparsekd.ops.layout import memory_format_of
from sparsekd.ops.schemas import SCHEMAS

library = torch.library.Library("sparsekd", "DEF")
_MAPS = ("conv2d", "conv2d_dgrad")


def kernel(name: str) -> Callable[..., Any]:
    """Return the function that checks a call, shows it to the listeners and runs it."""
    check = getattr(checks, name)

    def run(*args: Any) -> Any:
        check(*args)
        if observe.listeners:
            observe.tell(name, args)
        return choose(name, args[0])(*args)

    return run


def _fake(name: str) -> Callable[..., Tensor]:
    check = getattr(checks, name)
    dtype = torch.int64 if name == "grow_topk" else None

    def fake(*args: Any) -> Tensor:
        layout = memory_format_of(args[0]) if name in _MAPS else torch.contiguous_format
        result = args[0].new_empty(check(*args), dtype=dtype)
        return result.contiguous(memory_format=layout)

    return fake


for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, kernel(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekd::{_name}", _fake(_name), lib=library)

_ops = torch.ops.sparsekd
conv2d = _ops.conv2d.default
conv2d_dgrad = _ops.conv2d_dgrad.default
conv2d_wgrad = _ops.conv2d_wgrad.default
linear = _ops.linear.default
linear_dgrad = _ops.linear_dgrad.default
linear_wgrad = _ops.linear_wgrad.default
grow_topk = _ops.grow_topk.default


def _save(ctx: Any, inputs: list[Any], first_rest: int) -> None:
    """Keep the structure, the non-tensor arguments, and of the two factors what is needed."""
    left, right, crow, col = inputs[:4]
    needs_left, needs_right = ctx.needs_input_grad[:2]
    ctx.save_for_backward(left if needs_right else None, right if needs_left else None, crow, col)
    ctx.rest = inputs[first_rest:]


# -- conv2d ---------------------------------------------------------------------------------------


def _conv2d_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 5)
    ctx.input_shape = list(inputs[0].shape)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, crow, col = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = conv2d_dgrad(grad, values, crow, col, ctx.input_shape, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dvalues = conv2d_wgrad(grad, x, crow, col, *ctx.rest)
    if ctx.needs_input_grad[4]:
        dbias = grad.sum((0, 2, 3))
    return dx, dvalues, None, None, dbias, *[None] * 5


def _conv2d_dgrad_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 5)


def _conv2d_dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    grad, values, crow, col = ctx.saved_tensors
    dgrad = dvalues = None
    if ctx.needs_input_grad[0]:
        dgrad = conv2d(ddx, values, crow, col, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dvalues = conv2d_wgrad(grad, ddx, crow, col, *ctx.rest)
    return dgrad, dvalues, *[None] * 8


def _conv2d_wgrad_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 4)
    ctx.input_shape = list(inputs[1].shape)


def _conv2d_wgrad_backward(ctx: Any, ddvalues: Tensor) -> tuple[Any, ...]:
    grad, x, crow, col = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = conv2d(x, ddvalues, crow, col, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dx = conv2d_dgrad(grad, ddvalues, crow, col, ctx.input_shape, *ctx.rest)
    return dgrad, dx, *[None] * 7


# -- linear ---------------------------------------------------------------------------------------


def _linear_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 5)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, crow, col = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = linear_dgrad(grad, values, crow, col, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dvalues = linear_wgrad(grad, x, crow, col, *ctx.rest)
    if ctx.needs_input_grad[4]:
        dbias = grad.sum(tuple(range(grad.ndim - 1))) if grad.ndim > 1 else grad
    return dx, dvalues, None, None, dbias, None


def _linear_dgrad_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 4)


def _linear_dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    grad, values, crow, col = ctx.saved_tensors
    dgrad = dvalues = None
    if ctx.needs_input_grad[0]:
        dgrad = linear(ddx, values, crow, col, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dvalues = linear_wgrad(grad, ddx, crow, col, *ctx.rest)
    return dgrad, dvalues, None, None, None


def _linear_wgrad_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 4)


def _linear_wgrad_backward(ctx: Any, ddvalues: Tensor) -> tuple[Any, ...]:
    grad, x, crow, col = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = linear(x, ddvalues, crow, col, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dx = linear_dgrad(grad, ddvalues, crow, col, *ctx.rest)
    return dgrad, dx, None, None, None


def register_autograd(
    op: torch._ops.OpOverload, backward: Callable[..., Any], setup: Callable[..., None]
) -> None:
    """Do what torch.library.register_autograd does, without its reading the schema on every call.

    That reading took longer than a whole small layer.
    """

    def below(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args  # last, so that needs_input_grad counts as the op does
            result = below(keyset, *inputs)
            setup(ctx, inputs, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            return *backward(ctx, *grads), None

    Node.__name__ = Node.__qualname__ = f"Sparsekd_{op._opname}"

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            return Node.apply(*args, keyset)
        return below(keyset, *args)

    library.impl(op._opname, run, "Autograd", with_keyset=True)


register_autograd(conv2d, _conv2d_backward, _conv2d_setup)
register_autograd(conv2d_dgrad, _conv2d_dgrad_backward, _conv2d_dgrad_setup)
register_autograd(conv2d_wgrad, _conv2d_wgrad_backward, _conv2d_wgrad_setup)
register_autograd(linear, _linear_backward, _linear_setup)
register_autograd(linear_dgrad, _linear_dgrad_backward, _linear_dgrad_setup)
register_autograd(linear_wgrad, _linear_wgrad_backward, _linear_wgrad_setup)


# -- autocast: the factors and the bias take the autocast dtype; kernels accumulate in float32 ----


def _autocast(op: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def run(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(arg: Any) -> Any:
            # as torch's own rule has it, float64 stays float64
            lowered = isinstance(arg, Tensor) and arg.is_floating_point()
            return arg.to(dtype) if lowered and arg.dtype != torch.float64 else arg

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*map(cast, args))

    return run


for _device in ("cpu", "cuda"):
    library.impl("conv2d", _autocast(conv2d, _device), f"Autocast{_device.upper()}")
    library.impl("linear", _autocast(linear, _device), f"Autocast{_device.upper()}")


# -- FLOPs: one multiplication and one addition per nonzero and position --------------------------


def _conv2d_flops(x: Any, values: list[int], *args: Any, out_shape: list[int], **_: Any) -> int:
    return 2 * values[0] * out_shape[0] * math.prod(out_shape[2:])


def _conv2d_grad_flops(grad: list[int], other: Any, crow: Any, col: list[int], *_: Any, **__: Any):
    return 2 * col[0] * grad[0] * math.prod(grad[2:])


def _linear_flops(x: list[int], other: Any, crow: Any, col: list[int], *_: Any, **__: Any) -> int:
    return 2 * col[0] * math.prod(x[:-1])


register_flop_formula(_ops.conv2d)(_conv2d_flops)
register_flop_formula([_ops.conv2d_dgrad, _ops.conv2d_wgrad])(_conv2d_grad_flops)
register_flop_formula([_ops.linear, _ops.linear_dgrad, _ops.linear_wgrad])(_linear_flops)
