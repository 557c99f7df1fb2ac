"""Initialisation and argument checks shared by the networks."""

from __future__ import annotations

from torch import nn

from sparsekd.errors import UnsupportedError

STEMS = ("cifar", "imagenet")


def he_init_(model: nn.Module) -> None:
    """Initialise convolutions by He's rule on fan-out and BatchNorm to the identity.

    Args:
        model: the network, initialised in place. Linear layers keep torch's own initialisation.

    Source: He et al., Delving Deep into Rectifiers (2015), section 2.2; fan-out as torchvision.

    Example:
        >>> he_init_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def scaled(channels: int, width: float) -> int:
    """Multiply a number of channels by `width`; at least one is left.

    Args:
        channels: of the network at its published width.
        width: the factor.

    Raises:
        ValueError: `width` is not positive.

    Example:
        >>> scaled(64, 0.26)
        17
    """
    if not width > 0:
        raise ValueError(f"width: expected a positive factor, got {width!r}")
    return max(1, round(channels * width))


def check_stem(stem: str, num_classes: int | None) -> int:
    """Check `stem` and return the number of classes, by default that of the stem's data set.

    Args:
        stem: "cifar" or "imagenet".
        num_classes: the wanted number of classes, or None for 10 ("cifar") or 1000 ("imagenet").

    Returns:
        The number of classes.

    Raises:
        UnsupportedError: another stem.

    Example:
        >>> check_stem("imagenet", None)
        1000
    """
    if stem not in STEMS:
        raise UnsupportedError(f"stem: expected one of {', '.join(map(repr, STEMS))}; got {stem!r}")
    if num_classes is not None:
        return num_classes
    return 10 if stem == "cifar" else 1000
