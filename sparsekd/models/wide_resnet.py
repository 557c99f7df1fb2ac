"""Wide residual networks with pre-activation blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekd.models._init import he_init_, scaled
from sparsekd.models.norm_act import BatchNormAct2d


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, added to the shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.

    Args:
        in_channels: channels of the input.
        width: channels of the output.
        stride: stride of the first convolution and of the shortcut.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, width, ceil(H / stride), ceil(W / stride)]``.

    Source: Zagoruyko and Komodakis, Wide Residual Networks (2016), figure 1c.

    Example:
        >>> PreActivationBlock(16, 32, stride=2)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = BatchNormAct2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `x`."""
        # The None makes it an error to put a norm without ReLU in the place of one of these.
        activated = self.bn1(x, None)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.bn2(self.conv1(activated), None)
        return self.conv2(out) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-widen without dropout.

    Args:
        depth: 6n + 4 layers, n blocks in each of three stages.
        widen: factor on the widths 16, 32, 64.
        num_classes: outputs.
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Source: Zagoruyko and Komodakis, Wide Residual Networks (2016), table 1.

    Example:
        >>> WideResNet(10, 1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        blocks_per_stage = (depth - 4) // 6
        channels = scaled(16, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        stages = []
        for stage, base in enumerate((16, 32, 64)):
            blocks, inner = [], scaled(base * widen, width)
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(PreActivationBlock(channels, inner, stride))
                channels = inner
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = BatchNormAct2d(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the images `x`."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.bn(x)), 1))


def wrn22_2(num_classes: int = 10, in_channels: int = 3, *, width: float = 1.0) -> WideResNet:
    """Build WRN-22-2, the CIFAR-10 network of the RigL experiments.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network.

    Source: Evci et al., Rigging the Lottery (2020), section 4.2.

    Example:
        >>> wrn22_2(100).fc.out_features
        100
    """
    return WideResNet(22, 2, num_classes, in_channels, width=width)


def wrn28_10(num_classes: int = 10, in_channels: int = 3, *, width: float = 1.0) -> WideResNet:
    """Build WRN-28-10 without dropout.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Returns:
        The initialised network.

    Source: Zagoruyko and Komodakis, Wide Residual Networks (2016), table 5.

    Example:
        >>> wrn28_10(100).fc.out_features
        100
    """
    return WideResNet(28, 10, num_classes, in_channels, width=width)
