"""The ops of sparsekd as torch sees them, and the backends that run them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sparsekd.ops.dispatch.backends import backend, info
from sparsekd.ops.norm import batch_moments, norm_act, norm_act_backward
from sparsekd.ops.register import (
    call_conv2d,
    call_linear,
    conv2d,
    conv2d_dgrad,
    conv2d_wgrad,
    grow_topk,
    linear,
    linear_dgrad,
    linear_wgrad,
)

try:
    from sparsekd.ops.cuda.plans import prepare_plans
except ImportError:  # without the compiled module no GPU kernel has plans

    def prepare_plans(
        crow: Tensor, col: Tensor, new_crow: Tensor, new_col: Tensor
    ) -> Callable[[], None]:
        """Return what has nothing to do."""
        return lambda: None


__all__ = [
    "backend",
    "batch_moments",
    "call_conv2d",
    "call_linear",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "grow_topk",
    "info",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "norm_act",
    "norm_act_backward",
]
