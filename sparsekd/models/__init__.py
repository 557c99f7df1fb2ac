"""The networks of the sparse-training literature as plain ``torch.nn`` modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsekd.errors import UnsupportedError
from sparsekd.models.cifar_resnet import resnet20, resnet32, resnet44, resnet56, resnet110
from sparsekd.models.lenet import lenet5, lenet300_100
from sparsekd.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from sparsekd.models.transformer import CharGPT, VisionTransformer, char_gpt, vit_tiny
from sparsekd.models.vgg import VGG, vgg16_bn, vgg19_bn
from sparsekd.models.wide_resnet import WideResNet, wrn22_2, wrn28_10

_FACTORIES = {
    factory.__name__: factory
    for factory in (
        *(resnet20, resnet32, resnet44, resnet56, resnet110),
        *(resnet18, resnet34, resnet50, resnet101, resnet152),
        *(wrn22_2, wrn28_10, lenet300_100, lenet5, vgg16_bn, vgg19_bn, vit_tiny, char_gpt),
    )
}


def names() -> tuple[str, ...]:
    """List the networks that `build` knows.

    Returns:
        The names in a fixed order.

    Example:
        >>> "resnet20" in names()
        True
    """
    return tuple(_FACTORIES)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by name, as recipes and the command line do.

    Args:
        name: one of `names()`.
        **kwargs: arguments of the function of that name.

    Returns:
        The initialised network.

    Raises:
        UnsupportedError: no network has this name.

    Example:
        >>> build("resnet20", num_classes=100).fc.out_features
        100
    """
    if name not in _FACTORIES:
        raise UnsupportedError(f"name: expected one of {', '.join(names())}; got {name!r}")
    return _FACTORIES[name](**kwargs)


def small_dense(name: str, sparsity: float, **kwargs: Any) -> nn.Module:
    """Build the narrow dense network with as many bits as a sparse one, as a control.

    All layers but the last get the same factor fewer channels, the largest for which the network's
    parameters are no more than those of the sparse network, its mask counting as one bit per weight
    of a convolution or linear layer.

    Args:
        name: one of `names()`.
        sparsity: of the convolutions and linear layers of the network to compare with.
        **kwargs: arguments of the function of that name, other than `width`.

    Returns:
        The initialised network.

    Raises:
        UnsupportedError: no network has this name.
        ValueError: `sparsity` is outside [0, 1).

    Source: Evci et al., Rigging the Lottery (2020), section 4, "Small-Dense".

    Example:
        >>> small_dense("resnet20", 0.9).conv1.out_channels
        6
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: expected a number in [0, 1), got {sparsity!r}")
    weights, others = _sizes(name, kwargs, 1.0)
    room = (1 - sparsity) * weights + weights / 32 + others
    if weights + others <= room:  # so few zeros that their mask outweighs them
        return build(name, **kwargs)
    fits, wide = 2**-12, 1.0  # one channel a layer takes less than the mask alone
    while wide - fits > 2**-12:
        middle = (fits + wide) / 2
        if sum(_sizes(name, kwargs, middle)) <= room:
            fits = middle
        else:
            wide = middle
    return build(name, width=fits, **kwargs)


def _sizes(name: str, kwargs: dict[str, Any], width: float) -> tuple[int, int]:
    """Count the weights that could be sparse, and the other parameters."""
    with torch.device("meta"):
        model = build(name, width=width, **kwargs)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    return weights, sum(parameter.numel() for parameter in model.parameters()) - weights


__all__ = [
    "VGG",
    "CharGPT",
    "ResNet",
    "VisionTransformer",
    "WideResNet",
    "build",
    "names",
    "small_dense",
    *_FACTORIES,
]
