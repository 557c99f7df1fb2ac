"""Networks on images of ImageNet's size, for the training steps raced on a GPU."""

from __future__ import annotations

from sparsekd import models

IMAGE = (3, 224, 224)


def resnet50() -> models.ResNet:
    """Build ResNet-50 with the stem for ImageNet, and ten classes as the other networks here."""
    return models.resnet50(10, stem="imagenet")


def vit_b() -> models.VisionTransformer:
    """Build ViT-B/16: 12 blocks of width 768 with twelve heads.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), table 1.

    Example:
        >>> sum(p.numel() for p in vit_b().parameters())
        85806346
    """
    return models.VisionTransformer(
        num_classes=10,
        in_channels=IMAGE[0],
        input_size=IMAGE[1],
        patch_size=16,
        dim=768,
        depth=12,
        heads=12,
    )
