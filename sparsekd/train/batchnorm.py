"""BatchNorm over the batch of all ranks: torch's on GPUs, our own on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from sparsekd._torch import BatchNorm
from sparsekd.errors import ShapeError
from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.nn.held import as_class, replace_modules
from sparsekd.train.distributed import ranks


class SyncBatchNorm(BatchNorm):
    """BatchNorm with the statistics of all ranks' images, on CPUs.

    Forward and backward take two small collectives each. Ranks may have shares of different size.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ShapeError(f"input: expected two dimensions or more, got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training or ranks() == 1:
            return super().forward(input)
        x = input.transpose(0, 1).flatten(1)
        sums = all_reduce(torch.cat([x.sum(1), x.new_tensor([x.shape[1]])]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = x - mean[:, None]
        variance = all_reduce(centred.square().sum(1)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        shape = [1, -1] + [1] * (input.ndim - 2)
        scale, shift = torch.rsqrt(variance + self.eps), torch.zeros_like(mean)
        if self.affine:
            scale, shift = scale * self.weight, self.bias
        return (input - mean.view(shape)) * scale.view(shape) + shift.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class _WithAct(nn.Module):
    """What BatchNormAct2d has behind its norm."""

    act: bool

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.act else y


class SyncBatchNormAct2d(_WithAct, SyncBatchNorm):
    """BatchNormAct2d with the statistics of all ranks' images, on CPUs."""


class CudaSyncBatchNormAct2d(_WithAct, nn.SyncBatchNorm):
    """BatchNormAct2d with the statistics of all ranks' images, on GPUs."""


def synchronize(model: nn.Module) -> nn.Module:
    """Make every BatchNorm of a model that of all ranks; parameters and buffers stay the same.

    Args:
        model: changed in place, unless it is itself a BatchNorm.

    Returns:
        The model.

    Example:
        >>> model = synchronize(nn.Sequential(nn.BatchNorm2d(3)))
        >>> type(model[0]).__name__
        'SyncBatchNorm'
    """
    on_gpu = next(model.parameters()).device.type != "cpu"
    plain = nn.SyncBatchNorm if on_gpu else SyncBatchNorm
    with_act = CudaSyncBatchNormAct2d if on_gpu else SyncBatchNormAct2d
    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, BatchNorm):
            new = as_class(module, with_act if isinstance(module, BatchNormAct2d) else plain)
            if on_gpu:
                vars(new)["process_group"] = None  # all ranks
            replacements[module] = new
    return replace_modules(model, replacements, "synchronize")
