"""Make everything around the convolutions cheap: fused BatchNorm, and one memory layout."""

from __future__ import annotations

import torch
from torch import nn

from sparsekd.nn.conv import SparseConv2d
from sparsekd.nn.rewrite import find_sites, fused_class, plain_class
from sparsekd.ops.memory_format import memory_format_of


@torch.no_grad()
def optimize(model: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """Prepare a model for fast steps on the CPU, in place, without changing what it computes.

    Every nn.BatchNorm2d runs as one op with the residual addition and the ReLU that follow it in
    the code of the module that calls it, forward and backward; the results equal the plain ones to
    rounding. The modules themselves stay where and what they are, so state_dict, names, parameters,
    optimizers, `sparsify`, `densify` and rewiring are not concerned. A site goes back to the plain
    calls while a hook is registered on its modules, and on other devices or dtypes.

    Convolutions take the channels_last layout, so that the whole network runs in it whatever the
    layout of the images. Calling this again does nothing; call it after adding modules.

    Args:
        model: any module, sparse or dense.
        channels_last: False leaves the layout of the convolutions as it is.

    Returns:
        The model.

    Example:
        >>> import sparsekd as skd
        >>> model = skd.optimize(skd.sparsify(skd.models.resnet20(), sparsity=0.9))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    for module in model.modules():
        _fuse(module)
        if not channels_last:
            continue
        if isinstance(module, SparseConv2d):
            module.channels_last = True
        elif isinstance(module, nn.Conv2d) and not nn.parameter.is_lazy(module.weight):
            _to_channels_last(module.weight)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Take back the fusion of `optimize`, in place; the layout stays.

    Args:
        model: any module.

    Returns:
        The model, running the methods that were written for it.

    Example:
        >>> import sparsekd as skd
        >>> model = unfuse(skd.optimize(skd.models.resnet20()))
    """
    for module in model.modules():
        module.__class__ = plain_class(module)
    return model


def _fuse(module: nn.Module) -> None:
    if not any(type(part) is nn.BatchNorm2d for part in module.modules()):
        return
    plain = plain_class(module)
    fused = fused_class(plain, find_sites(module, plain))
    if fused is not type(module):
        module.__class__ = fused


def _to_channels_last(weight: torch.Tensor) -> None:
    """Change the layout of a weight; the parameter stays the same object."""
    if weight.ndim == 4 and memory_format_of(weight) is not torch.channels_last:
        # clone also gives a single channel the strides that tell the layout
        weight.data = weight.data.clone(memory_format=torch.channels_last)
