"""Residual networks: the ImageNet family and the thin 6n+2 family for CIFAR, from one class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsekd.models._init import check_stem, he_init_, scaled
from sparsekd.models.norm_act import BatchNormAct2d


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Project the shortcut (option B), or None where the identity fits."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, added to the identity or a projected shortcut.

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions and of the output.
        stride: stride of the first convolution and of the shortcut.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, width, ceil(H / stride), ceil(W / stride)]``.

    Source: He et al., Deep Residual Learning (2016), section 3.3, figure 5 left.

    Example:
        >>> BasicBlock(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride)
        self.bn1 = BatchNormAct2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = BatchNormAct2d(width)
        self.downsample = _downsample(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `x`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(out), shortcut)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, added to the identity or a projected shortcut.

    The stride sits on the 3x3 convolution ("v1.5"), as in torchvision and the RigL experiments.

    Args:
        in_channels: channels of the input.
        width: channels inside the bottleneck; the output has ``4 * width``.
        stride: stride of the 3x3 convolution and of the shortcut.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, 4 * width, ceil(H / stride), ceil(W / stride)]``.

    Source: He et al., Deep Residual Learning (2016), section 4.1, figure 5 right.

    Example:
        >>> Bottleneck(16, 8)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 8, 8])
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = BatchNormAct2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = BatchNormAct2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = BatchNormAct2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `x`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return self.bn3(self.conv3(out), shortcut)


class ResNet(nn.Module):
    """Residual network with torchvision's parameter names.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks per stage; every stage but the first halves the resolution.
        widths: width of each stage.
        num_classes: outputs of `fc`; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" for a 3x3 convolution of stride 1, "imagenet" for 7x7 stride 2 and max-pool.
        in_channels: channels of the input.
        zero_init_residual: start the last BatchNorm of every block at 0.
        width: factor on `widths`.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``, any H and W.

    Raises:
        UnsupportedError: unknown stem.

    Source: He et al., Deep Residual Learning (2016), table 1 and section 4.2.

    Example:
        >>> net = ResNet(BasicBlock, (1, 1), (8, 16), num_classes=10)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int | None = None,
        *,
        stem: str = "cifar",
        in_channels: int = 3,
        zero_init_residual: bool = False,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        num_classes = check_stem(stem, num_classes)
        widths = [scaled(channels, width) for channels in widths]
        channels = widths[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = _conv3x3(in_channels, channels)
        self.bn1 = BatchNormAct2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()

        self.stages = tuple(f"layer{stage}" for stage in range(1, len(depths) + 1))
        for name, depth, inner in zip(self.stages, depths, widths, strict=True):
            blocks = []
            for index in range(depth):
                stride = 2 if name != "layer1" and index == 0 else 1
                blocks.append(block(channels, inner, stride))
                channels = inner * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

        he_init_(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images `x`."""
        x = self.maxpool(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(
    num_classes: int | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    *,
    zero_init_residual: bool = False,
    width: float = 1.0,
) -> ResNet:
    """Build ResNet-18 (basic blocks), parameter names as in torchvision.

    Args:
        num_classes: outputs; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" or "imagenet", see `ResNet`.
        in_channels: channels of the input.
        zero_init_residual: start the last BatchNorm of every block at 0.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network; with the imagenet stem it loads torchvision's state dict.

    Raises:
        UnsupportedError: unknown stem.

    Source: He et al., Deep Residual Learning (2016), table 1.

    Example:
        >>> resnet18(100).fc.out_features
        100
    """
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        num_classes=num_classes,
        stem=stem,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
        width=width,
    )


def resnet34(
    num_classes: int | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    *,
    zero_init_residual: bool = False,
    width: float = 1.0,
) -> ResNet:
    """Build ResNet-34 (basic blocks), parameter names as in torchvision.

    Args:
        num_classes: outputs; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" or "imagenet", see `ResNet`.
        in_channels: channels of the input.
        zero_init_residual: start the last BatchNorm of every block at 0.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network; with the imagenet stem it loads torchvision's state dict.

    Raises:
        UnsupportedError: unknown stem.

    Source: He et al., Deep Residual Learning (2016), table 1.

    Example:
        >>> resnet34(100).fc.out_features
        100
    """
    return ResNet(
        BasicBlock,
        (3, 4, 6, 3),
        num_classes=num_classes,
        stem=stem,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
        width=width,
    )


def resnet50(
    num_classes: int | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    *,
    zero_init_residual: bool = False,
    width: float = 1.0,
) -> ResNet:
    """Build ResNet-50 (bottlenecks, v1.5), parameter names as in torchvision.

    Args:
        num_classes: outputs; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" or "imagenet", see `ResNet`.
        in_channels: channels of the input.
        zero_init_residual: start the last BatchNorm of every block at 0.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network; with the imagenet stem it loads torchvision's state dict.

    Raises:
        UnsupportedError: unknown stem.

    Source: He et al., Deep Residual Learning (2016), table 1.

    Example:
        >>> resnet50(100).fc.out_features
        100
    """
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        num_classes=num_classes,
        stem=stem,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
        width=width,
    )


def resnet101(
    num_classes: int | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    *,
    zero_init_residual: bool = False,
    width: float = 1.0,
) -> ResNet:
    """Build ResNet-101 (bottlenecks, v1.5), parameter names as in torchvision.

    Args:
        num_classes: outputs; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" or "imagenet", see `ResNet`.
        in_channels: channels of the input.
        zero_init_residual: start the last BatchNorm of every block at 0.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network; with the imagenet stem it loads torchvision's state dict.

    Raises:
        UnsupportedError: unknown stem.

    Source: He et al., Deep Residual Learning (2016), table 1.

    Example:
        >>> resnet101(100).fc.out_features
        100
    """
    return ResNet(
        Bottleneck,
        (3, 4, 23, 3),
        num_classes=num_classes,
        stem=stem,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
        width=width,
    )


def resnet152(
    num_classes: int | None = None,
    stem: str = "cifar",
    in_channels: int = 3,
    *,
    zero_init_residual: bool = False,
    width: float = 1.0,
) -> ResNet:
    """Build ResNet-152 (bottlenecks, v1.5), parameter names as in torchvision.

    Args:
        num_classes: outputs; None for 10 (cifar stem) or 1000 (imagenet stem).
        stem: "cifar" or "imagenet", see `ResNet`.
        in_channels: channels of the input.
        zero_init_residual: start the last BatchNorm of every block at 0.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network; with the imagenet stem it loads torchvision's state dict.

    Raises:
        UnsupportedError: unknown stem.

    Source: He et al., Deep Residual Learning (2016), table 1.

    Example:
        >>> resnet152(100).fc.out_features
        100
    """
    return ResNet(
        Bottleneck,
        (3, 8, 36, 3),
        num_classes=num_classes,
        stem=stem,
        in_channels=in_channels,
        zero_init_residual=zero_init_residual,
        width=width,
    )
