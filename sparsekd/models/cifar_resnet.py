"""The thin residual networks of depth 6n+2 for 32x32 images."""

from __future__ import annotations

from sparsekd.models.resnet import BasicBlock, Bottleneck, ResNet

_WIDTHS = (16, 32, 64)


def _thin(
    depth: int, num_classes: int, in_channels: int, width: float, bottleneck: bool = False
) -> ResNet:
    block = Bottleneck if bottleneck else BasicBlock
    depths = ((depth - 2) // (9 if bottleneck else 6),) * 3
    return ResNet(block, depths, _WIDTHS, num_classes, in_channels=in_channels, width=width)


def resnet20(num_classes: int = 10, in_channels: int = 3, *, width: float = 1.0) -> ResNet:
    """Build ResNet-20 for CIFAR: 3 basic blocks per stage of 16, 32 and 64 channels.

    Shortcuts that change shape are projections (option B), as in the lottery-ticket literature.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network.

    Source: He et al., Deep Residual Learning (2016), section 4.2.

    Example:
        >>> resnet20(100).fc.out_features
        100
    """
    return _thin(20, num_classes, in_channels, width)


def resnet32(num_classes: int = 10, in_channels: int = 3, *, width: float = 1.0) -> ResNet:
    """Build ResNet-32 for CIFAR: 5 basic blocks per stage of 16, 32 and 64 channels.

    Shortcuts that change shape are projections (option B), as in the lottery-ticket literature.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network.

    Source: He et al., Deep Residual Learning (2016), section 4.2.

    Example:
        >>> resnet32(100).fc.out_features
        100
    """
    return _thin(32, num_classes, in_channels, width)


def resnet44(num_classes: int = 10, in_channels: int = 3, *, width: float = 1.0) -> ResNet:
    """Build ResNet-44 for CIFAR: 7 basic blocks per stage of 16, 32 and 64 channels.

    Shortcuts that change shape are projections (option B), as in the lottery-ticket literature.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network.

    Source: He et al., Deep Residual Learning (2016), section 4.2.

    Example:
        >>> resnet44(100).fc.out_features
        100
    """
    return _thin(44, num_classes, in_channels, width)


def resnet56(
    num_classes: int = 10, in_channels: int = 3, *, bottleneck: bool = False, width: float = 1.0
) -> ResNet:
    """Build ResNet-56 for CIFAR: 9 basic blocks per stage of 16, 32 and 64 channels.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        bottleneck: use 6 bottlenecks per stage instead, as the KD-ticket code does.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network.

    Source: He et al., Deep Residual Learning (2016), section 4.2.

    Example:
        >>> resnet56(100).fc.out_features
        100
    """
    return _thin(56, num_classes, in_channels, width, bottleneck)


def resnet110(
    num_classes: int = 10, in_channels: int = 3, *, bottleneck: bool = False, width: float = 1.0
) -> ResNet:
    """Build ResNet-110 for CIFAR: 18 basic blocks per stage of 16, 32 and 64 channels.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        bottleneck: use 12 bottlenecks per stage instead, as the KD-ticket code does.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network.

    Source: He et al., Deep Residual Learning (2016), section 4.2.

    Example:
        >>> resnet110(100).fc.out_features
        100
    """
    return _thin(110, num_classes, in_channels, width, bottleneck)
