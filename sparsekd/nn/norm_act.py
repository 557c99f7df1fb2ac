"""BatchNorm with the residual addition and ReLU behind it as one op, where that changes nothing.

The op normalises, adds and applies the ReLU in one pass over the maps; its backward pass needs the
result alone to know where the ReLU was active. It takes plain float32 and float64 maps on the CPU.
Everything else (hooks, transforms, graphs that leave the process, other dtypes and devices) runs as
the plain calls, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from sparsekd import ops
from sparsekd._torch import is_bare, transformed
from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.tracing import call_module, stays_whole

LEAST = 1 << 14
"""Elements of maps from which the op pays: below, its node takes longer than torch's modules."""

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


def norm_act(
    norm: Callable[[Tensor], Tensor],
    x: Tensor,
    act: Callable[[Tensor], Tensor] | None = None,
    residual: Any = None,
) -> Tensor:
    """Return `act(norm(x) + residual)`.

    It is one op if `norm` is an nn.BatchNorm2d and `act` a ReLU, both without hooks, on float32 or
    float64 maps of at least `LEAST` elements on the CPU; in every other case the modules are called
    one after the other.

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
    if (
        type(norm) is nn.BatchNorm2d
        and fits(norm, x, residual)
        and is_bare(norm)
        and is_relu_or_none(act)
    ):
        return fused(norm, x, residual, relu=act is not None)
    y = norm(x)
    if residual is not None:
        y = y + residual
    return y if act is None else act(y)


def conv_norm_act(
    conv: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    x: Tensor,
    act: Callable[[Tensor], Tensor] | None = None,
    residual: Any = None,
) -> Tensor:
    """Return `act(norm(conv(x)) + residual)`, from the norm on as `norm_act` does.

    Args:
        conv: the convolution, dense or sparse.
        norm: as of `norm_act`.
        x: input of the convolution.
        act: as of `norm_act`.
        residual: as of `norm_act`.

    Example:
        >>> conv, norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
        >>> conv_norm_act(conv, norm, torch.randn(4, 1, 3, 3), F.relu).shape
        torch.Size([4, 2, 3, 3])
    """
    return norm_act(norm, conv(x), act, residual)


class FusedBatchNormAct2d(BatchNormAct2d):
    """BatchNorm, residual addition and ReLU as one op on the CPU.

    The same as `sparsekd.models.norm_act.BatchNormAct2d`, which is in plain torch, and with the
    same arguments, parameters and state_dict; where the op does not apply it computes that.

    Example:
        >>> norm, x = FusedBatchNormAct2d(2), torch.ones(1, 2, 3, 3)
        >>> norm(x, residual=x).sum().item()
        18.0
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise `x`, add the residual and apply the ReLU."""
        if fits(self, x, residual):
            return fused(self, x, residual, relu=self.act)
        if isinstance(x, Proxy) and stays_whole(self, FusedBatchNormAct2d.forward, x):
            return call_module(self, x, residual)
        return super().forward(x, residual)


FusedBatchNormAct2d.forward.__annotations__ = BatchNormAct2d.forward.__annotations__


def is_relu_or_none(act: Any) -> bool:
    """Return whether `act` is None, a ReLU without hooks, or one of torch's functions for it.

    Args:
        act: an activation.

    Example:
        >>> is_relu_or_none(nn.ReLU()), is_relu_or_none(nn.ReLU6())
        (True, False)
    """
    if isinstance(act, nn.Module):
        return type(act) is nn.ReLU and is_bare(act)
    return act is None or any(act is relu for relu in _RELUS)


def fits(norm: nn.BatchNorm2d, x: Tensor, residual: Any) -> bool:
    """Return whether the op supports these tensors, with no error or special mode involved.

    Args:
        norm: the normalisation.
        x: its input.
        residual: added behind it; None for none.
    """
    if not _is_plain_tensor(x):
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False  # a graph that is to leave this process holds torch's own ops
    if not torch.compiler.is_compiling() and x.numel() < LEAST:
        return False
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


def fused(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
    """Run the op, and update the running statistics as torch does.

    Args:
        norm: the normalisation.
        x: its input, which `fits`.
        residual: added behind it; None for none.
        relu: whether a ReLU follows.
    """
    frozen = not _uses_batch(norm)
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None or not frozen:
        mean, var = ops.call_batch_moments(x)
    if norm.training and norm.track_running_stats:
        _track(norm, mean, var, x.numel() // x.shape[1])
    statistics = mean, var, norm.eps
    return ops.call_norm_act(x, residual, norm.weight, norm.bias, *statistics, relu, frozen)


def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running statistics as torch does, with the unbiased variance."""
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
