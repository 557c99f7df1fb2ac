"""Modules that keep their activations in the blocked layout of the CPU kernels.

A module takes part by a method `forward_blocked`, which takes and returns either ordinary images or
blocked ones (`Blocked`); its `forward` takes and returns ordinary ones alone. Whoever calls modules
one after the other uses `call_blocked`: blocked activations then go from one to the next as long as
the modules take them, and become ordinary images in front of any other module and of one with
hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn import functional as F

from sparsekd import functional
from sparsekd._torch import is_bare, profiled
from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.nn.blocked_choice import Trial, case_of, entered, fresh, fused_norm, measure
from sparsekd.nn.conv import SparseConv2d
from sparsekd.nn.norm_act import FusedBatchNormAct2d, conv_norm_act, is_relu_or_none
from sparsekd.nn.pooling import pool_blocked
from sparsekd.nn.prepared import Prepared, recall, remember
from sparsekd.ops import eager
from sparsekd.ops.cpu import blocked as ops
from sparsekd.ops.cpu.blocked_map import AVAILABLE, Blocked, enter, leave
from sparsekd.ops.cpu.blocked_ordinary import lanes
from sparsekd.ops.dispatch.context import forced

_NORMS = (nn.BatchNorm2d, BatchNormAct2d, FusedBatchNormAct2d)
_LEAST_FULL = 0.6
"""Share of the lanes that must hold images."""


class ConvNorm(NamedTuple):
    """A convolution, the norm behind it, and whether a ReLU follows.

    That of the last one in a block follows the addition.
    """

    conv: nn.Module
    norm: nn.BatchNorm2d
    relu: bool


def call_blocked(module: nn.Module, x: Tensor | Blocked) -> Tensor | Blocked:
    """Call a module on ordinary or blocked images `[N, C, H, W]`, whichever it takes."""
    blocked = getattr(module, "forward_blocked", None)
    if blocked is not None and is_bare(module) and (isinstance(x, Blocked) or eager.bare((x, x))):
        if not profiled():
            return blocked(x)
        with record_function(f"sparsekd::{type(module).__name__}"):
            return blocked(x)
    if isinstance(x, Blocked) and is_bare(module) and input_fits(x.tensor, x.shape):
        pooled = pool_blocked(module, x)
        if pooled is not None:
            return pooled
    return module(leave(x))  # which tracers and modes want to see


def conv_norm_act_blocked(
    conv: nn.Module,
    norm: nn.BatchNorm2d,
    x: Tensor | Blocked,
    act: Callable[[Tensor], Tensor] | None,
    then: nn.Module | None = None,
) -> Tensor | Blocked:
    """Return `act(norm(conv(x)))`, blocked where `x` is and the modules can be.

    Args:
        conv: the convolution.
        norm: behind it.
        x: images `[N, C, H, W]`.
        act: the activation; None for none.
        then: the convolution that reads the result, if one does.
    """
    parts = (norm, act) if act is None or isinstance(act, nn.Module) else None
    result = None if parts is None else run_again(conv, x, *parts)
    if result is not None:
        return result
    if is_relu_or_none(act):
        unit = ConvNorm(conv, norm, act is not None)
        result = run_block(conv, x, [unit], then=then, parts=parts)
        if result is not None:
            return result
    return conv_norm_act(conv, norm, leave(x), act)


def run_again(owner: nn.Module, x: Tensor | Blocked, *parts: nn.Module | None) -> Blocked | None:
    """Run a block as it was prepared at an earlier call.

    Args:
        owner: as of `run_block`, as is `x`.
        x: images `[N, C, H, W]`.
        parts: modules beside the owner that the block consists of.

    Returns:
        What `run_block` would; None also where nothing is prepared, or something has changed since.
    """
    tensor, shape = (x.tensor, x.shape) if isinstance(x, Blocked) else (x, x.shape)
    if not input_fits(tensor, shape):
        return None
    prepared = recall(owner, shape, tensor.dtype, *parts)
    if prepared is None:
        return None
    return prepared.run(entered(x, prepared.needs_moments))


def run_block(
    owner: nn.Module,
    x: Tensor | Blocked,
    main: Sequence[ConvNorm],
    shortcut: ConvNorm | None = None,
    *,
    identity: bool = False,
    then: nn.Module | None = None,
    parts: tuple[nn.Module | None, ...] | None = None,
) -> Blocked | None:
    """Run a residual block, or a convolution and its norm, in the blocked layout.

    Args:
        owner: whose plan it is.
        x: images `[N, C, H, W]`.
        main: the convolutions of the main branch.
        shortcut: what projects the input before it is added; None for nothing.
        identity: whether the input itself is added.
        then: the convolution that reads its result, if that is known.
        parts: modules beside the owner that the block consists of, where it consists of nothing
            else: `run_again` runs it then.

    Returns:
        What the modules would return, to rounding; running statistics are updated as they would
        be. None where the layout does not serve: the modules have to be called then.
    """
    units = [*main, shortcut] if shortcut else list(main)
    tensor, shape = (x.tensor, x.shape) if isinstance(x, Blocked) else (x, x.shape)
    if not input_fits(tensor, shape):
        return None
    case = case_of(owner, x, [unit.conv for unit in units], then)
    if case.layout is False:
        return None
    if not all(conv_fits(u.conv, tensor.dtype) and norm_fits(u.norm, tensor.dtype) for u in units):
        return None
    if any(unit.norm.num_features != unit.conv.out_channels for unit in units):
        return None
    n, c, h, w = shape
    specs = [spec_of(unit.conv, unit.relu) for unit in units]
    projection = specs[-1] if shortcut else None
    plan = ops.plan(ops.BlockPlan, owner, specs[: len(main)], projection, identity, (n, c, h, w))
    if plan is None:
        return None
    found = [parameters_of(unit) for unit in units]
    plain = partial(_plain, specs, found, len(main), identity)
    count, relu = len(main), main[-1].relu

    def trial() -> Trial:
        own = [fresh(unit) for unit in found]
        return Trial(
            specs, plan, [p for unit in own for p in unit.parameters],
            lambda inside: ops.run(plan, inside, own, count, relu, plain),
            partial(_fused, specs, own, count, identity),
        )  # fmt: skip

    if case.layout is None and not measure(case, x, trial):
        return None

    def run(inside: Blocked) -> Blocked | None:  # holds no module, see `prepared`
        return ops.run(plan, inside, found, count, relu, plain)

    if parts is not None and all(lasts(unit.conv, unit.norm) for unit in units):
        remember(owner, shape, tensor.dtype, Prepared(run, plan, False), *parts)
    return run(x if isinstance(x, Blocked) else enter(x))


def lasts(conv: nn.Module | None, norm: nn.BatchNorm2d | None) -> bool:
    """Return whether the kernels may take the same operands again in the next call."""
    if conv is not None and not isinstance(conv, SparseConv2d):
        return False  # a weight without zeros is reshaped for each
    return norm is None or norm.momentum is not None


def input_fits(x: Tensor, shape: Sequence[int]) -> bool:
    """Return whether the kernels take such images, and nothing else has to see the calls."""
    if not AVAILABLE or type(x) not in (Tensor, nn.Parameter):
        return False
    if len(shape) != 4 or not x.is_cpu:
        return False
    if x.dtype not in (torch.float32, torch.float64):
        return False
    per = lanes(x.dtype)
    if shape[0] < _LEAST_FULL * per * -(-shape[0] // per):
        return False
    if torch.compiler.is_exporting() or not eager.bare((x, x)):
        return False
    return forced() in (None, "auto", "cpp")


def norm_fits(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether the kernels can do what a norm does."""
    if type(norm) not in _NORMS or not is_bare(norm):
        return False
    return all(own is None or own.dtype == dtype for own in (norm.weight, norm.running_mean))


def conv_fits(conv: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether the kernels can do what a convolution does, and are the place for it."""
    if not is_bare(conv):
        return False
    if type(conv) is nn.Conv2d:
        weight = conv.weight
        if conv.groups != 1 or isinstance(conv.padding, str):
            return False
    elif type(conv) is SparseConv2d:
        weight = conv.values
    else:
        return False
    if type(weight) not in (Tensor, nn.Parameter) or conv.padding_mode != "zeros":
        return False
    return weight.dtype == dtype and weight.is_cpu


def spec_of(conv: Any, relu: bool) -> ops.Spec:
    """Return a convolution as plans take it, and whether a ReLU follows its norm."""
    if isinstance(conv, SparseConv2d):
        conv._watch()
        indices = conv.crow_indices, conv.col_indices
        shape: Sequence[int] = conv.weight_shape
        sides = tuple(conv._sides)
    else:
        shape = tuple(conv.weight.shape)
        indices = _full(shape[0], math.prod(shape[1:]))
        sides = tuple(side for size in conv.padding for side in (size, size))
    return (*indices, shape, conv.stride, sides, conv.dilation, conv.groups, relu)


@lru_cache(maxsize=64)
def _full(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the indices of a weight without zeros."""
    crow = torch.arange(rows + 1, dtype=torch.int32) * columns
    return crow, torch.arange(columns, dtype=torch.int32).repeat(rows)


def values_of(conv: Any) -> Tensor:
    """Return the nonzeros of a convolution's weight in row-major order, with their gradient."""
    return conv.values if isinstance(conv, SparseConv2d) else conv.weight.reshape(-1)


def parameters_of(unit: ConvNorm) -> ops.ConvNorm:
    """Return a convolution and its norm as the kernels take them."""
    conv: Any = unit.conv
    return norm_parameters(unit.norm, values_of(conv), conv.bias)


def norm_parameters(norm: nn.BatchNorm2d, values: Tensor, bias: Tensor | None) -> ops.ConvNorm:
    """Return a norm, behind a convolution of these values, as the kernels take them."""
    frozen = not (norm.training or norm.running_mean is None)
    counts = norm.training and norm.track_running_stats
    rate = 0.0
    if counts and norm.momentum is not None:
        rate = norm.momentum
    elif counts and norm.num_batches_tracked is not None:
        rate = 1.0 / (float(norm.num_batches_tracked) + 1)
    mean, var = (norm.running_mean, norm.running_var) if frozen or counts else (None, None)
    batches = norm.num_batches_tracked if counts else None
    return ops.ConvNorm(
        values, bias, norm.weight, norm.bias, mean, var, norm.eps, rate, frozen, batches
    )


def plain_conv(spec: ops.Spec, x: Tensor, values: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return a convolution by the op that has derivatives of all orders."""
    assert values is not None
    crow, col, shape, stride, sides, dilation, groups, _ = spec
    return functional.convolve(
        x, values, crow, col, bias, shape, stride, sides, dilation, groups, channels_last=True
    )


def plain_norm(norm: ops.ConvNorm, z: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """Return what a norm does, by torch's op; the running statistics stay."""
    mean, var = (norm.mean, norm.var) if norm.frozen else (None, None)
    return F.batch_norm(z, mean, var, gamma, beta, not norm.frozen, 0.0, norm.eps)


def _plain(
    specs: Sequence[ops.Spec],
    norms: Sequence[ops.ConvNorm],
    count: int,
    identity: bool,
    x: Tensor,
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """Compute a block by ordinary ops; the main branch has `count` convolutions."""

    def unit(i: int, x: Tensor) -> Tensor:
        values, bias, gamma, beta = parameters[4 * i : 4 * i + 4]
        return plain_norm(norms[i], plain_conv(specs[i], x, values, bias), gamma, beta)

    residual = x if identity else None
    if len(specs) > count:
        residual = unit(count, x)
    for i, spec in enumerate(specs[:count]):
        x = unit(i, x)
        if i == count - 1 and residual is not None:
            x = x + residual
        x = F.relu(x) if spec[-1] else x
    return x


def _fused(
    specs: Sequence[ops.Spec],
    units: Sequence[ops.ConvNorm],
    count: int,
    identity: bool,
    x: Tensor,
) -> Tensor:
    """Compute a block as its modules do outside of the layout; for measurements."""

    def conv(i: int, x: Tensor) -> Tensor:
        return plain_conv(specs[i], x, units[i].values, units[i].bias)

    residual = x if identity else None
    if len(specs) > count:
        residual = fused_norm(units[count], conv(count, x), relu=False)
    for i, spec in enumerate(specs[:count]):
        last = residual if i == count - 1 else None
        x = fused_norm(units[i], conv(i, x), last, relu=spec[-1])
    return x
