"""BatchNorm, residual addition and ReLU as one module, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from sparsekd.tracing import call_module, stays_whole


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm, the addition of a residual and ReLU: `relu(norm(x) + residual)`.

    Parameters, buffers and state_dict are those of nn.BatchNorm2d. `sparsekd.optimize` puts a
    module in its place that computes the three as one op.

    Tools that replace every nn.BatchNorm2d by a norm of another kind drop the ReLU with it;
    `sparsekd.train.synchronize` keeps it.

    Args:
        num_features: channels.
        eps, momentum, affine, track_running_stats, device, dtype: as of nn.BatchNorm2d.
        act: whether there is a ReLU.

    Shape:
        x, residual and the result: ``[N, num_features, H, W]``.

    Source: Ioffe and Szegedy, Batch Normalization (2015), algorithms 1 and 2.

    Example:
        >>> norm, x = BatchNormAct2d(2), torch.ones(1, 2, 3, 3)
        >>> norm(x, residual=x).sum().item()
        18.0
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        act: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise `x`, add the residual and apply the ReLU."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles what `and` joins)
            if isinstance(x, Proxy) and stays_whole(self, BatchNormAct2d.forward, x):
                return call_module(self, x, residual)
        # Written out, as TorchScript has no super().
        self._check_input_dim(x)
        rate = self._count_batch()
        keep = not self.training or self.track_running_stats
        y = F.batch_norm(
            x,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            rate,
            self.eps,
        )
        if residual is not None:
            y = y + residual
        return F.relu(y, inplace=True) if self.act else y

    def _count_batch(self) -> float:
        """Count a batch of training; return how far it moves the running statistics."""
        rate = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                rate = 1.0 / float(self.num_batches_tracked)
        return rate

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


# torch.fx writes the annotations of what it traces into a graph, and cannot pickle strings there.
BatchNormAct2d.forward.__annotations__ = {
    "x": Tensor,
    "residual": Tensor | None,
    "return": Tensor,
}
