"""The two LeNets of the pruning literature."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from sparsekd.models._init import scaled


def lenet300_100(
    num_classes: int = 10, in_channels: int = 1, input_size: int = 28, *, width: float = 1.0
) -> nn.Sequential:
    """Build LeNet-300-100, a multilayer perceptron with two hidden layers.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        input_size: height and width of the input.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, input_size, input_size]`` to ``[N, num_classes]``.

    Returns:
        The initialised network with the layers `fc1`, `fc2`, `fc3`.

    Source: LeCun et al., Gradient-Based Learning (1998), section III.C.

    Example:
        >>> lenet300_100().fc1.in_features
        784
    """
    first, second = scaled(300, width), scaled(100, width)
    layers: list[tuple[str, nn.Module]] = [
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(in_channels * input_size * input_size, first)),
        ("relu1", nn.ReLU(inplace=True)),
        ("fc2", nn.Linear(first, second)),
        ("relu2", nn.ReLU(inplace=True)),
        ("fc3", nn.Linear(second, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def lenet5(
    num_classes: int = 10, in_channels: int = 1, input_size: int = 28, *, width: float = 1.0
) -> nn.Sequential:
    """Build LeNet-5 with ReLU and max-pooling.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        input_size: height and width of the input, at least 12.
        width: factor on the number of channels of every layer but the last.

    Shape:
        ``[N, in_channels, input_size, input_size]`` to ``[N, num_classes]``.

    Returns:
        The initialised network with the layers `conv1`, `conv2`, `fc1`, `fc2`, `fc3`.

    Source: LeCun et al., Gradient-Based Learning (1998), section II.B.

    Example:
        >>> sum(p.numel() for p in lenet5().parameters())
        61706
    """
    side = (input_size // 2 - 4) // 2
    one, two, three, four = (scaled(channels, width) for channels in (6, 16, 120, 84))
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(in_channels, one, 5, padding=2)),
        ("relu1", nn.ReLU(inplace=True)),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(one, two, 5)),
        ("relu2", nn.ReLU(inplace=True)),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(two * side * side, three)),
        ("relu3", nn.ReLU(inplace=True)),
        ("fc2", nn.Linear(three, four)),
        ("relu4", nn.ReLU(inplace=True)),
        ("fc3", nn.Linear(four, num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))
