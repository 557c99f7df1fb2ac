"""VGG with BatchNorm, for ImageNet as torchvision builds it and for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsekd.models._init import check_stem, he_init_, scaled


def _features(
    depths: Sequence[int], in_channels: int, last_pool: bool, width: float
) -> nn.Sequential:
    """Stack 3x3 convolutions, `depths` of them per resolution, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    channels = in_channels
    for depth, base in zip(depths, (64, 128, 256, 512, 512), strict=True):
        inner = scaled(base, width)
        for _ in range(depth):
            layers += [
                nn.Conv2d(channels, inner, 3, padding=1),
                nn.BatchNorm2d(inner),
                nn.ReLU(inplace=True),
            ]
            channels = inner
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*(layers if last_pool else layers[:-1]))


def _imagenet_classifier(num_classes: int, width: float) -> nn.Sequential:
    hidden = scaled(4096, width)
    classifier = nn.Sequential(
        nn.Linear(scaled(512, width) * 7 * 7, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, num_classes),
    )
    for module in classifier:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
    return classifier


class VGG(nn.Module):
    """VGG network with BatchNorm.

    With ``stem="imagenet"`` layers, names and shapes are torchvision's. With ``stem="cifar"`` the
    last max-pool gives way to global average pooling and one linear layer classifies, the form
    common in the pruning literature; the names under `features` stay the same.

    Args:
        depths: convolutions at each of the five resolutions.
        num_classes: outputs; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" or "imagenet".
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``; H and W at least 16 (cifar) or 32.

    Raises:
        UnsupportedError: unknown stem.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks (2015), table 1.

    Example:
        >>> VGG((1, 1, 1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int | None = None,
        stem: str = "cifar",
        in_channels: int = 3,
        *,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        num_classes = check_stem(stem, num_classes)
        imagenet = stem == "imagenet"
        self.features = _features(depths, in_channels, imagenet, width)
        self.avgpool = nn.AdaptiveAvgPool2d(7 if imagenet else 1)
        self.classifier = (
            _imagenet_classifier(num_classes, width)
            if imagenet
            else nn.Linear(scaled(512, width), num_classes)
        )
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images `x`."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def vgg16_bn(
    num_classes: int | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    *,
    width: float = 1.0,
) -> VGG:
    """Build VGG-16 with BatchNorm.

    Args:
        num_classes: outputs; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" or "imagenet", see `VGG`.
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network; with the imagenet stem it loads torchvision's state dict.

    Raises:
        UnsupportedError: unknown stem.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks (2015), table 1, D.

    Example:
        >>> vgg16_bn(100).classifier.out_features
        100
    """
    return VGG((2, 2, 3, 3, 3), num_classes, stem, in_channels, width=width)


def vgg19_bn(
    num_classes: int | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    *,
    width: float = 1.0,
) -> VGG:
    """Build VGG-19 with BatchNorm.

    Args:
        num_classes: outputs; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" or "imagenet", see `VGG`.
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network; with the imagenet stem it loads torchvision's state dict.

    Raises:
        UnsupportedError: unknown stem.

    Source: Simonyan and Zisserman, Very Deep Convolutional Networks (2015), table 1, E.

    Example:
        >>> vgg19_bn(100).classifier.out_features
        100
    """
    return VGG((2, 2, 4, 4, 4), num_classes, stem, in_channels, width=width)
