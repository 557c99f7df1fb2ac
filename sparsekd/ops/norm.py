"""The ops of BatchNorm with the residual and the ReLU behind it, as torch sees them.

`norm_act` is `act((x - mean) * weight / sqrt(var + eps) + bias + residual)`. Mean and var are
constants if `frozen`. Otherwise they must be what `batch_moments` returned for `x`, and the
gradient of `x` includes the way through them; they come in from outside so that running statistics
can follow before anything is saved for backward, which is when torch's BatchNorm updates them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekd._torch import KeySet, after_autograd, below_autograd, transformed
from sparsekd.ops import checks, reference
from sparsekd.ops.autograd import direct_call, goes_direct, register_autograd
from sparsekd.ops.dispatch.backends import load
from sparsekd.ops.dispatch.context import forced
from sparsekd.ops.eager import plain as is_plain
from sparsekd.ops.kernel import kernel
from sparsekd.ops.memory_format import memory_format_of
from sparsekd.ops.register import library
from sparsekd.ops.schemas import NORM_SCHEMAS


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape).contiguous(memory_format=memory_format_of(x))


def _batch_moments_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    (channels,) = checks.batch_moments(x)
    return x.new_empty(channels), x.new_empty(channels)


def _norm_act_fake(x: Tensor, *args: Any) -> Tensor:
    checks.norm_act(x, *args)
    return _like(x)


def _norm_act_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.norm_act_backward(grad, x, y, *args)
    length = x.shape[1] if args[-1] else 0
    dresidual = x.new_empty(0) if y is None else _like(x)
    return _like(x), dresidual, x.new_empty(length), x.new_empty(length)


_FAKES: dict[str, Callable[..., Any]] = {
    "batch_moments": _batch_moments_fake,
    "norm_act": _norm_act_fake,
    "norm_act_backward": _norm_act_backward_fake,
}
_kernels = {name: kernel(name) for name in _FAKES}
for _name, _fake in _FAKES.items():
    library.define(_name + NORM_SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _kernels[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekd::{_name}", _fake, lib=library)

_ops = torch.ops.sparsekd
batch_moments = _ops.batch_moments.default
norm_act = _ops.norm_act.default
norm_act_backward = _ops.norm_act_backward.default


def _direct(name: str) -> Callable[..., Any]:
    """Return the kernel of an op for calls past the dispatcher, whose operands fit together."""
    general = _kernels[name]

    def run(*args: Any) -> Any:
        here = args[0].is_cpu and forced() in (None, "auto", "cpp")
        compiled = load("cpp")[0] if here else None
        return general(*args) if compiled is None else getattr(compiled, name)(*args)

    return run


def _moments_are_constants(keyset: KeySet, x: Tensor) -> tuple[Tensor, Tensor]:
    with below_autograd():
        return batch_moments.redispatch(keyset & after_autograd, x)


library.impl("batch_moments", _moments_are_constants, "Autograd", with_keyset=True)


def _norm_act_setup(ctx: Any, inputs: list[Any], output: Tensor) -> None:
    """Keep what the gradients need: the output only as the mask of a ReLU behind a residual."""
    x, residual, *vectors = inputs[:6]
    ctx.rest = inputs[6:]
    ctx.relu, ctx.frozen = ctx.rest[1:]
    stored = output if ctx.relu and residual is not None else None
    ctx.save_for_backward(x, stored, *vectors)


def _norm_act_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # The formula in plain torch is what second derivatives go through, and a batch of first ones.
    plain = torch.is_grad_enabled() or transformed(grad)
    run: Any = reference.norm_act_backward if plain else norm_act_backward
    if not plain and goes_direct(ctx, grad):
        run = _direct_backward
    needs = ctx.needs_input_grad
    params = not ctx.frozen or needs[2] or needs[3]
    dx, dresidual, dweight, dbias = run(grad, *ctx.saved_tensors, *ctx.rest, params)
    return (
        dx if needs[0] else None,
        (dresidual if ctx.relu else grad) if needs[1] else None,
        dweight if needs[2] else None,
        dbias if needs[3] else None,
    )


register_autograd(norm_act, _norm_act_backward, _norm_act_setup)
_direct_moments, _direct_backward = _direct("batch_moments"), _direct("norm_act_backward")
_direct_norm_act = direct_call(
    "norm_act", _direct("norm_act"), 6, _norm_act_backward, _norm_act_setup
)


def call_batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the op batch_moments, past the dispatcher where that changes nothing."""
    if is_plain((x, x)):
        return _direct_moments(x)
    with torch.no_grad():
        return batch_moments(x)


def call_norm_act(*args: Any) -> Tensor:
    """Run the op norm_act, past the dispatcher where that changes nothing."""
    return (_direct_norm_act if is_plain(args[:1] * 2) else norm_act)(*args)
