"""The ops of sparsekd as torch sees them, and the backends that run them."""

from __future__ import annotations

import sparsekd.ops.flop_counter  # noqa: F401  registers the formulas
from sparsekd.ops.cpu.frozen import frozen_network
from sparsekd.ops.dispatch.context import backend
from sparsekd.ops.dispatch.info import info
from sparsekd.ops.eager import call_conv2d, call_linear
from sparsekd.ops.gpu.structure import prepare_plans
from sparsekd.ops.norm import (
    batch_moments,
    call_batch_moments,
    call_norm_act,
    norm_act,
    norm_act_backward,
)
from sparsekd.ops.register import (
    conv2d,
    conv2d_dgrad,
    conv2d_wgrad,
    grow_topk,
    linear,
    linear_dgrad,
    linear_wgrad,
)

__all__ = [
    "backend",
    "batch_moments",
    "call_batch_moments",
    "call_conv2d",
    "call_linear",
    "call_norm_act",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "frozen_network",
    "grow_topk",
    "info",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "norm_act",
    "norm_act_backward",
    "prepare_plans",
]
