"""The networks of the sparse-training literature as plain ``torch.nn`` modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsekd.errors import UnsupportedError
from sparsekd.models.cifar_resnet import resnet20, resnet32, resnet44, resnet56, resnet110
from sparsekd.models.lenet import lenet5, lenet300_100
from sparsekd.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from sparsekd.models.vgg import VGG, vgg16_bn, vgg19_bn
from sparsekd.models.wide_resnet import WideResNet, wrn22_2, wrn28_10

_FACTORIES = {
    factory.__name__: factory
    for factory in (
        *(resnet20, resnet32, resnet44, resnet56, resnet110),
        *(resnet18, resnet34, resnet50, resnet101, resnet152),
        *(wrn22_2, wrn28_10, lenet300_100, lenet5, vgg16_bn, vgg19_bn),
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


__all__ = [
    "VGG",
    "ResNet",
    "WideResNet",
    "build",
    "lenet5",
    "lenet300_100",
    "names",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "vgg16_bn",
    "vgg19_bn",
    "wrn22_2",
    "wrn28_10",
]
