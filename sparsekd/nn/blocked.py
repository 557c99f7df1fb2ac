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
from torch.nn import functional as F

from sparsekd import functional
from sparsekd._torch import is_bare
from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.nn.conv import SparseConv2d
from sparsekd.nn.norm_act import FusedBatchNormAct2d, conv_norm_act
from sparsekd.ops import eager, observe
from sparsekd.ops.cpu import blocked as ops
from sparsekd.ops.cpu.blocked import Blocked, Shape, leave
from sparsekd.ops.dispatch.context import forced

__all__ = ["Blocked", "ConvNorm", "call_blocked", "conv_norm_act_blocked", "leave", "run_block"]

_NORMS = (nn.BatchNorm2d, BatchNormAct2d, FusedBatchNormAct2d)
_DENSE_CHANNELS = 4
"""Input channels up to which a dense convolution runs in the layout: those of images."""
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
    return blocked(x) if blocked is not None and is_bare(module) else module(leave(x))


def conv_norm_act_blocked(
    conv: nn.Module, norm: nn.BatchNorm2d, x: Tensor | Blocked, act: nn.Module | None
) -> Tensor | Blocked:
    """Return `act(norm(conv(x)))`, blocked where `x` is and the modules can be.

    Args:
        conv: the convolution.
        norm: behind it.
        x: images `[N, C, H, W]`.
        act: an nn.ReLU, or None.
    """
    if act is None or is_bare(act):
        result = run_block(conv, x, [ConvNorm(conv, norm, act is not None)])
        if result is not None:
            return result
    return conv_norm_act(conv, norm, leave(x), act)


def run_block(
    owner: nn.Module,
    x: Tensor | Blocked,
    main: Sequence[ConvNorm],
    shortcut: ConvNorm | None = None,
    *,
    identity: bool = False,
) -> Blocked | None:
    """Run a residual block, or a convolution and its norm, in the blocked layout.

    Args:
        owner: whose plan it is.
        x: images `[N, C, H, W]`.
        main: the convolutions of the main branch.
        shortcut: what projects the input before it is added; None for nothing.
        identity: whether the input itself is added.

    Returns:
        What the modules would return, to rounding; running statistics are updated as they would
        be. None where the layout does not serve: the modules have to be called then.
    """
    units = [*main, shortcut] if shortcut else list(main)
    tensor, shape = (x.tensor, x.shape) if isinstance(x, Blocked) else (x, x.shape)
    if not _fits(tensor, shape, units):
        return None
    n, c, h, w = shape
    plan = _plan(owner, (n, c, h, w), main, shortcut, identity)
    if plan is None:
        return None
    found = [_parameters(unit) for unit in units]
    plain = partial(
        _plain, [_fixed(unit) for unit in units], [unit.relu for unit in main], identity
    )
    inside = x if isinstance(x, Blocked) else ops.enter(x)
    result = ops.run(plan, inside, found, len(main), main[-1].relu, plain)
    if result is not None:
        for unit in units:
            _count(unit.norm)
    return result


def _fits(x: Tensor, shape: Sequence[int], units: Sequence[ConvNorm]) -> bool:
    """Return whether the kernels take these operands, and nothing else has to see the calls."""
    if type(x) not in (Tensor, nn.Parameter) or len(shape) != 4 or not x.is_cpu:
        return False
    if x.dtype not in (torch.float32, torch.float64):
        return False
    per = ops.lanes(x.dtype)
    if shape[0] < _LEAST_FULL * per * -(-shape[0] // per):
        return False
    if torch.compiler.is_exporting() or not eager.plain((x, x)):
        return False
    if observe.listeners or forced() not in (None, "auto", "cpp"):
        return False
    return all(_unit_fits(unit, x.dtype) for unit in units)


def _unit_fits(unit: ConvNorm, dtype: torch.dtype) -> bool:
    conv, norm, _ = unit
    if type(norm) not in _NORMS or not is_bare(norm) or not is_bare(conv):
        return False
    if type(conv) is nn.Conv2d:
        weight = conv.weight
        if conv.in_channels > _DENSE_CHANNELS or conv.groups != 1 or isinstance(conv.padding, str):
            return False
    elif type(conv) is SparseConv2d:
        weight = conv.values
    else:
        return False
    if conv.padding_mode != "zeros" or weight.dtype != dtype or not weight.is_cpu:
        return False
    return all(own is None or own.dtype == dtype for own in (norm.weight, norm.running_mean))


def _plan(
    owner: nn.Module,
    shape: Shape,
    main: Sequence[ConvNorm],
    shortcut: ConvNorm | None,
    identity: bool,
) -> Any:
    """Return the compiled plan of a block for one shape of input, None if there is none."""
    for unit in (*main, shortcut) if shortcut else main:
        if isinstance(unit.conv, SparseConv2d):
            unit.conv._watch()
    return ops.plan(
        owner,
        [_spec(unit) for unit in main],
        _spec(shortcut) if shortcut else None,
        identity,
        shape,
    )


def _spec(unit: ConvNorm) -> ops.Spec:
    conv: Any = unit.conv
    if isinstance(conv, SparseConv2d):
        indices = conv.crow_indices, conv.col_indices
        shape: Sequence[int] = conv.weight_shape
        sides = tuple(conv._sides)
    else:
        shape = tuple(conv.weight.shape)
        indices = _full(shape[0], math.prod(shape[1:]))
        sides = tuple(side for size in conv.padding for side in (size, size))
    return (*indices, shape, conv.stride, sides, conv.dilation, conv.groups, unit.relu)


@lru_cache(maxsize=64)
def _full(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the indices of a weight without zeros."""
    crow = torch.arange(rows + 1, dtype=torch.int32) * columns
    return crow, torch.arange(columns, dtype=torch.int32).repeat(rows)


def _parameters(unit: ConvNorm) -> ops.ConvNorm:
    norm = unit.norm
    conv: Any = unit.conv
    values = conv.values if isinstance(conv, SparseConv2d) else conv.weight.reshape(-1)
    frozen = not (norm.training or norm.running_mean is None)
    tracked = frozen or (norm.training and norm.track_running_stats)
    rate = 0.0
    if norm.training and norm.track_running_stats:
        rate = norm.momentum if norm.momentum is not None else 0.0
        if norm.momentum is None and norm.num_batches_tracked is not None:
            rate = 1.0 / (float(norm.num_batches_tracked) + 1)
    return ops.ConvNorm(
        values,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        norm.eps,
        rate,
        frozen,
    )


def _count(norm: nn.BatchNorm2d) -> None:
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


def _fixed(unit: ConvNorm) -> Callable[..., Tensor]:
    """Return the convolution and norm as a function of what has gradients, of ordinary ops."""
    norm = unit.norm
    crow, col, shape, stride, sides, dilation, groups, _ = _spec(unit)
    frozen = not (norm.training or norm.running_mean is None)
    mean, var = (norm.running_mean, norm.running_var) if frozen else (None, None)

    def call(
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> Tensor:
        z = functional.convolve(
            x, values, crow, col, bias, shape, stride, sides, dilation, groups,
            padding_mode="zeros", channels_last=True,
        )  # fmt: skip
        return F.batch_norm(z, mean, var, gamma, beta, not frozen, 0.0, norm.eps)

    return call


def _plain(
    units: Sequence[Callable[..., Tensor]],
    relus: Sequence[bool],
    identity: bool,
    x: Tensor,
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """Compute a block by ordinary ops; `relus` are those of the main branch."""
    own = [parameters[4 * i : 4 * i + 4] for i in range(len(units))]
    residual = x if identity else None
    if len(units) > len(relus):
        residual = units[-1](x, *own[-1])
    for i, relu in enumerate(relus):
        x = units[i](x, *own[i])
        if i == len(relus) - 1 and residual is not None:
            x = x + residual
        x = F.relu(x) if relu else x
    return x
