"""Run a BatchNorm and the residual and ReLU behind it as one op, where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekd import ops
from sparsekd._torch import is_bare, transformed

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


def norm_act(
    norm: Callable[[Tensor], Tensor],
    x: Tensor,
    act: Callable[[Tensor], Tensor] | None = None,
    residual: Any = None,
) -> Tensor:
    """Return `act(norm(x) + residual)`.

    It is one op if `norm` is an nn.BatchNorm2d and `act` a ReLU, both without hooks, on float32 or
    float64 maps on the CPU; in every other case the modules are called one after the other.

    Args:
        norm: the normalisation.
        x: its input.
        act: the activation, a module or a function; None for none.
        residual: added before the activation; None for none.

    Shape:
        x, residual and the result: `[N, C, H, W]`.

    Returns:
        What the calls would return, to rounding; running statistics are updated as they would be.

    Source: Ioffe and Szegedy, Batch Normalization (2015), algorithms 1 and 2.

    Example:
        >>> norm, x = nn.BatchNorm2d(2), torch.ones(1, 2, 3, 3)
        >>> norm_act(norm, x, F.relu, residual=x).sum().item()
        18.0
    """
    if type(norm) is nn.BatchNorm2d and _is_relu(act) and _fits(norm, x, residual):
        return _fused(norm, x, residual, relu=act is not None)
    y = norm(x)
    if residual is not None:
        y = y + residual
    return y if act is None else act(y)


def _is_relu(act: Callable[[Tensor], Tensor] | None) -> bool:
    if isinstance(act, nn.Module):
        return type(act) is nn.ReLU and is_bare(act)
    return act is None or is_relu_function(act)


def is_relu_function(act: Any) -> bool:
    """Whether `act` is one of torch's own functions for a ReLU."""
    return any(act is relu for relu in _RELUS)


def _fits(norm: nn.BatchNorm2d, x: Tensor, residual: Any) -> bool:
    """Whether the fused op takes these tensors, and errors and exotic modes are not at stake."""
    if not is_bare(norm) or not _is_plain_tensor(x):
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False  # a graph that is to leave this process holds torch's own ops
    if x.ndim != 4 or x.shape[1] != norm.num_features or not x.numel():
        return False
    if x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu":
        return False
    for own in (norm.weight, norm.running_mean):
        if own is not None and (own.dtype != x.dtype or own.device != x.device):
            return False
    if residual is not None and not (
        _is_plain_tensor(residual)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    ):
        return False
    # A single value has no variance: torch's own error says so.
    if _uses_batch(norm) and x.numel() == x.shape[1]:
        return False
    return not transformed(x)


def _is_plain_tensor(x: Any) -> bool:
    return type(x) is Tensor or type(x) is nn.Parameter


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _fused(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
    frozen = not _uses_batch(norm)
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None or not frozen:
        mean, var = ops.batch_moments(x)
    if norm.training and norm.track_running_stats:
        _track(norm, mean, var, x.numel() // x.shape[1])
    return ops.norm_act(x, residual, norm.weight, norm.bias, mean, var, norm.eps, relu, frozen)


def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as torch does, towards the unbiased variance."""
    rate = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if rate is None:
            rate = 1.0 / float(norm.num_batches_tracked)
    rate = rate or 0.0
    if norm.running_mean is not None and norm.running_var is not None:
        # Through .data: torch's own update does not count as a change of these saved tensors.
        norm.running_mean.data.lerp_(mean, rate)
        norm.running_var.data.lerp_(var * (count / (count - 1)), rate)
