"""Calls of eager code, which go straight to a kernel, past torch's dispatcher.

The dispatcher leads a call through Python several times, which costs a third of a millisecond a
layer in a training step, where little of Python is left in the caches between two products. A small
network spends a tenth of its time there, and a GPU waits for what is not queued yet. So eager code
on plain tensors goes without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd._torch import in_forward_ad, in_transform, intercepted, jit_trace, profiled, wrapped
from sparsekd.ops import checks, observe
from sparsekd.ops.autograd import direct
from sparsekd.ops.kernel import products
from sparsekd.ops.register import overloads

_PLAIN = (Tensor, nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_autocast = torch.is_autocast_enabled


def plain(args: tuple[Any, ...]) -> bool:
    """Return whether torch has nothing to add to a call of an op but its derivative.

    That is eager code on plain tensors that no profiler notes by its ops.
    """
    return bare(args) and not profiled()


def bare(args: tuple[Any, ...]) -> bool:
    """Return whether this is eager code on plain CPU or CUDA tensors.

    That is without compiler, tracer, mode, transform or autocast.
    """
    first, second = args[:2]
    return (
        not _is_compiling()
        and type(first) in _PLAIN
        and type(second) in _PLAIN
        and not (wrapped(first) or wrapped(second))
        and (first.is_cpu or first.is_cuda)
        and not _autocast("cpu" if first.is_cpu else "cuda")
        and not intercepted()
        and not in_transform()
        and not in_forward_ad()
        and jit_trace() is None
    )


def _call(name: str) -> Callable[..., Tensor]:
    """Return a function like an op that takes short cuts where it can.

    They lead past the dispatcher and, where a backend has a function for weights without zeros, to
    torch's own layer, derivative included.
    """
    op, product, run = getattr(overloads, name), products[name], direct[name]

    def call(*args: Any) -> Tensor:
        if not plain(args):
            if torch.jit.is_tracing():
                checks.refuse_onnx()
            return op(*args)
        if args[3].shape[0] == math.prod(args[5]) and not observe.listeners.watch(args[2:3]):
            whole = product.decide(args).whole
            result = None if whole is None else whole(*args)
            if result is not None:
                return result
        return run(*args)

    return call


call_conv2d = _call("conv2d")
call_linear = _call("linear")
