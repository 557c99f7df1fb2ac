"""Make the ops known to torch: kernels, fakes, derivatives, autocast and FLOP formulas.

conv2d is bilinear in (x, values): each of conv2d, dgrad and wgrad differentiates into the other
two, so double backward needs no kernel of its own. The same holds for linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsekd._torch import (
    KeySet,
    after_autograd,
    apply_at_this_level,
    below_autograd,
    derivatives_of_outer_levels,
    in_forward_ad,
    in_transform,
    intercepted,
    transformed,
    without_autocast,
)
from sparsekd.errors import UnsupportedError
from sparsekd.ops import checks, growth, observe, transforms
from sparsekd.ops.dispatch.backends import Decision
from sparsekd.ops.dispatch.cache_key import serial, sizes_of
from sparsekd.ops.dispatch.context import asked, followed, forced
from sparsekd.ops.dispatch.decisions import decide
from sparsekd.ops.dispatch.decisions import function as function_for
from sparsekd.ops.eager import plain
from sparsekd.ops.memory_format import memory_format_of
from sparsekd.ops.schemas import SCHEMAS

library = torch.library.Library("sparsekd", "DEF")
_MAPS = ("conv2d", "conv2d_dgrad")
_MOST_KNOWN = 1 << 12  # of an op, about a kilobyte each: a network in a dozen sizes


def kernel(name: str, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return the function that checks a call, shows it to the listeners and runs it.

    Args:
        name: of the op.
        function: what runs it; by default that of the backend, chosen at each call.
    """
    check = getattr(checks, name)

    def run(*args: Any) -> Any:
        check(*args)
        if observe.listeners:
            observe.listeners.tell(name, args)
        return (function or function_for(name, args[0]))(*args)

    return run


class _Product:
    """Run a product: show the call to the listeners, choose a backend, call it.

    What calls alike have in common is checked and chosen once. Between two large products little of
    Python is left in the caches, and each object touched costs a trip to memory: what takes a
    microsecond by itself takes five in a training step.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._check = getattr(checks, name)
        self._known: dict[tuple[Any, ...], Decision] = {}

    def __call__(self, *args: Any) -> Tensor:
        if observe.listeners:
            observe.listeners.tell(self.name, args)
        return self.decide(args).run(*args)

    def decide(self, args: tuple[Any, ...]) -> Decision:
        """Return what runs these operands."""
        facts = forced(), torch.get_num_threads(), serial(args[2], args[3]), sizes_of(args)
        decision = self._known.get(facts)
        if decision is None:
            self._check(*args)
            if len(self._known) >= _MOST_KNOWN:  # inputs of ever new shapes
                self._known.clear()
            decision = self._known[facts] = decide(self.name, args)
        return decision


def _fake(name: str) -> Callable[..., Tensor]:
    check = getattr(checks, name)
    dtype = torch.int64 if name == "grow_topk" else None

    def fake(*args: Any) -> Tensor:
        checks.refuse_onnx()
        layout = memory_format_of(args[0]) if name in _MAPS else torch.contiguous_format
        result = args[0].new_empty(check(*args), dtype=dtype)
        return result.contiguous(memory_format=layout)

    return fake


_kernels = SimpleNamespace(
    **{name: _Product(name) for name in SCHEMAS if name != "grow_topk"},
    grow_topk=kernel("grow_topk", growth.grow_topk),
)
# torch.compile records CUDA graphs by itself, and is to leave these ops out: the first call of a
# structure makes plans and keeps them, neither of which may happen in the memory of a graph.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=_TAGS)
    library.impl(_name, getattr(_kernels, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekd::{_name}", _fake(_name), lib=library)

_ops = torch.ops.sparsekd
conv2d = _ops.conv2d.default
conv2d_dgrad = _ops.conv2d_dgrad.default
conv2d_wgrad = _ops.conv2d_wgrad.default
linear = _ops.linear.default
linear_dgrad = _ops.linear_dgrad.default
linear_wgrad = _ops.linear_wgrad.default
grow_topk = _ops.grow_topk.default
_overloads = SimpleNamespace(**{name: getattr(_ops, name).default for name in SCHEMAS})


def _save(ctx: Any, inputs: list[Any], first_rest: int) -> None:
    """Keep the structure, the non-tensor arguments, and of the two factors what is needed."""
    left, right, crow, col = inputs[:4]
    needs_left, needs_right = ctx.needs_input_grad[:2]
    ctx.save_for_backward(left if needs_right else None, right if needs_left else None, crow, col)
    ctx.rest = inputs[first_rest:]


def _calls(ctx: Any, grad: Tensor) -> SimpleNamespace:
    """Return what a backward pass calls: kernels where its forward could, see `eager`."""
    direct = ctx.direct and type(grad) is Tensor and not torch.is_grad_enabled()
    return _kernels if direct and not (intercepted() or transformed(grad)) else _overloads


# -- conv2d ---------------------------------------------------------------------------------------


def _conv2d_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 5)
    ctx.input_shape = list(inputs[0].shape)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    run = _calls(ctx, grad)
    x, values, crow, col = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = run.conv2d_dgrad(grad, values, crow, col, ctx.input_shape, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dvalues = run.conv2d_wgrad(grad, x, crow, col, *ctx.rest)
    if ctx.needs_input_grad[4]:
        dbias = grad.sum((0, 2, 3))
    return dx, dvalues, None, None, dbias, *[None] * 5


def _conv2d_dgrad_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 5)


def _conv2d_dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    run = _calls(ctx, ddx)
    grad, values, crow, col = ctx.saved_tensors
    dgrad = dvalues = None
    if ctx.needs_input_grad[0]:
        dgrad = run.conv2d(ddx, values, crow, col, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dvalues = run.conv2d_wgrad(grad, ddx, crow, col, *ctx.rest)
    return dgrad, dvalues, *[None] * 8


def _conv2d_wgrad_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 4)
    ctx.input_shape = list(inputs[1].shape)


def _conv2d_wgrad_backward(ctx: Any, ddvalues: Tensor) -> tuple[Any, ...]:
    run = _calls(ctx, ddvalues)
    grad, x, crow, col = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = run.conv2d(x, ddvalues, crow, col, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dx = run.conv2d_dgrad(grad, ddvalues, crow, col, ctx.input_shape, *ctx.rest)
    return dgrad, dx, *[None] * 7


# -- linear ---------------------------------------------------------------------------------------


def _linear_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 5)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    run = _calls(ctx, grad)
    x, values, crow, col = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        dx = run.linear_dgrad(grad, values, crow, col, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dvalues = run.linear_wgrad(grad, x, crow, col, *ctx.rest)
    if ctx.needs_input_grad[4]:
        dbias = grad.sum(tuple(range(grad.ndim - 1))) if grad.ndim > 1 else grad
    return dx, dvalues, None, None, dbias, None


def _linear_dgrad_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 4)


def _linear_dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    run = _calls(ctx, ddx)
    grad, values, crow, col = ctx.saved_tensors
    dgrad = dvalues = None
    if ctx.needs_input_grad[0]:
        dgrad = run.linear(ddx, values, crow, col, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dvalues = run.linear_wgrad(grad, ddx, crow, col, *ctx.rest)
    return dgrad, dvalues, None, None, None


def _linear_wgrad_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    _save(ctx, inputs, 4)


def _linear_wgrad_backward(ctx: Any, ddvalues: Tensor) -> tuple[Any, ...]:
    run = _calls(ctx, ddvalues)
    grad, x, crow, col = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = run.linear(x, ddvalues, crow, col, None, *ctx.rest)
    if ctx.needs_input_grad[1]:
        dx = run.linear_dgrad(grad, ddvalues, crow, col, *ctx.rest)
    return dgrad, dx, None, None, None


def register_autograd(
    op: Any,
    backward: Callable[..., Any],
    setup: Callable[..., None],
    jvp: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Do what torch.library.register_autograd does, without its reading the schema on every call.

    That reading took longer than a whole small layer. Forward-mode differentiation and transforms
    of torch.func, which torch's function does not know, work as well, see `transforms`. Returned is
    what now runs under autograd; it takes the dispatcher's key set, None to go past the dispatcher,
    and the operands.
    """
    name = op.__name__.partition(".")[0]  # without that of the overload

    def below(keyset: KeySet | None, *args: Any) -> Any:
        if keyset is None:
            return getattr(_kernels, name)(*args)
        with below_autograd():
            return op.redispatch(keyset & after_autograd, *args)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args  # last, so that needs_input_grad counts as the op does
            if keyset is not None and in_transform():
                with derivatives_of_outer_levels():
                    result = below(keyset, *inputs)
            else:
                result = below(keyset, *inputs)
            ctx.direct, ctx.asked = keyset is None, asked()
            setup(ctx, inputs, result)
            if in_forward_ad():
                ctx.save_for_forward(*inputs[:4])
                ctx.others = inputs[4:]
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            if ctx.asked is None:
                return *backward(ctx, *grads), None
            with followed(ctx.asked):
                return *backward(ctx, *grads), None

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            if jvp is None:
                raise UnsupportedError(f"{name}: has no forward-mode derivative")
            with derivatives_of_outer_levels():
                primals = map(transforms.without_tangent, (*ctx.saved_tensors, *ctx.others))
                return jvp(list(primals), tangents[:-1])

    Node.__name__ = Node.__qualname__ = f"Sparsekd_{name}"

    def run(keyset: KeySet | None, *args: Any) -> Any:
        if in_forward_ad() or (
            torch.is_grad_enabled()
            and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        ):
            if in_transform():
                return apply_at_this_level(Node, *args, keyset)
            return Node.apply(*args, keyset)
        return below(keyset, *args)

    library.impl(name, run, "Autograd", with_keyset=True)
    return run


def _product(
    name: str, backward: Callable[..., Any], setup: Callable[..., None]
) -> Callable[..., Any]:
    """Register the derivatives of a product and its batching rule."""
    op = getattr(_overloads, name)
    torch.library.register_vmap(f"sparsekd::{name}", transforms.vmap(name, op), lib=library)
    return register_autograd(op, backward, setup, transforms.jvp(name, op))


def _eager(
    name: str, backward: Callable[..., Any], setup: Callable[..., None]
) -> Callable[..., Tensor]:
    """Register a product; return a function like its op that takes short cuts where it can.

    They lead past the dispatcher, see `eager`, and to torch's own layer, derivative included,
    where a backend has a function for weights without zeros.
    """
    run = _product(name, backward, setup)
    op, product = getattr(_overloads, name), getattr(_kernels, name)

    def call(*args: Any) -> Tensor:
        if not plain(args):
            if torch.jit.is_tracing():
                checks.refuse_onnx()
            return op(*args)
        if args[3].shape[0] == math.prod(args[5]) and not observe.listeners:
            whole = product.decide(args).whole
            result = None if whole is None else whole(*args)
            if result is not None:
                return result
        return run(None, *args)

    return call


call_conv2d = _eager("conv2d", _conv2d_backward, _conv2d_setup)
_product("conv2d_dgrad", _conv2d_dgrad_backward, _conv2d_dgrad_setup)
_product("conv2d_wgrad", _conv2d_wgrad_backward, _conv2d_wgrad_setup)
call_linear = _eager("linear", _linear_backward, _linear_setup)
_product("linear_dgrad", _linear_dgrad_backward, _linear_dgrad_setup)
_product("linear_wgrad", _linear_wgrad_backward, _linear_wgrad_setup)


# -- autocast: the factors and the bias take the autocast dtype; kernels accumulate in float32 ----


def _autocast(op: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    done = without_autocast(device)

    def run(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(arg: Any) -> Any:
            # as torch's own rule has it, float64 stays float64
            lowered = isinstance(arg, Tensor) and arg.is_floating_point()
            return arg.to(dtype) if lowered and arg.dtype != torch.float64 else arg

        with done():
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
