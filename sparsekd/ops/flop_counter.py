"""FLOPs for torch's counter: a multiplication and an addition per nonzero and position."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from sparsekd.ops.register import namespace


@register_flop_formula(namespace.conv2d)
def _conv2d(x: Any, values: list[int], *args: Any, out_shape: list[int], **_: Any) -> int:
    return 2 * values[0] * out_shape[0] * math.prod(out_shape[2:])


@register_flop_formula([namespace.conv2d_dgrad, namespace.conv2d_wgrad])
def _conv2d_gradient(grad: list[int], other: Any, crow: Any, col: list[int], *_: Any, **__: Any):
    return 2 * col[0] * grad[0] * math.prod(grad[2:])


@register_flop_formula([namespace.linear, namespace.linear_dgrad, namespace.linear_wgrad])
def _linear(x: list[int], other: Any, crow: Any, col: list[int], *_: Any, **__: Any) -> int:
    return 2 * col[0] * math.prod(x[:-1])
