"""Pooling modules on blocked maps."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsekd.ops.cpu import pooling
from sparsekd.ops.cpu.blocked_map import Blocked


def pool_blocked(module: nn.Module, x: Blocked) -> Blocked | None:
    """Do what a pooling module does.

    Those are nn.MaxPool2d, nn.AvgPool2d and nn.AdaptiveAvgPool2d to one pixel, with the options
    that networks use.

    Args:
        module: any module, without hooks.
        x: maps that the kernels take.

    Returns:
        The pooled maps; None for any other module and option.
    """
    made: Any = module
    if type(module) is nn.AdaptiveAvgPool2d:
        if _pair(made.output_size) != (1, 1):
            return None
        whole = x.shape[2], x.shape[3]
        return pooling.run(x, True, whole, whole, (0, 0))
    if type(module) is nn.MaxPool2d:
        if made.return_indices or _pair(made.dilation) != (1, 1):
            return None
    elif type(module) is nn.AvgPool2d:
        padded = _pair(made.padding) != (0, 0) and not made.count_include_pad
        if padded or made.divisor_override is not None:
            return None
    else:
        return None
    if made.ceil_mode:
        return None
    average = type(module) is nn.AvgPool2d
    sizes = map(_pair, (made.kernel_size, made.stride, made.padding))
    return pooling.run(x, average, *sizes)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
