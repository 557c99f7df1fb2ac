"""Data sets that need no files: scikit-learn's digits, and synthetic images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekd.data.augment import CropFlip
from sparsekd.data.dataset import Dataset, build


def load_digits(root: Path | None, *, seed: int, val_fraction: float) -> Dataset:
    """Load the 1,797 handwritten 8x8 digits that ship with scikit-learn.

    Args:
        root: not used; the images are part of scikit-learn.
        seed: chooses the validation images.
        val_fraction: share of the training images held out.

    Returns:
        The data set; its test split is a fixed fifth of the images.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (1998).

    Example:
        >>> len(load_digits(None, seed=0, val_fraction=0.1).test)
        359
    """
    from sklearn.datasets import load_digits as read

    digits = read()
    images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    # The same test images for every seed, so that runs with different seeds can be compared.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return build(
        "digits",
        10,
        (images[train], labels[train]),
        (images[test], labels[test]),
        CropFlip(padding=1, flip=False),
        seed=seed,
        val_fraction=val_fraction,
    )


def load_synthetic(
    root: Path | None,
    *,
    seed: int,
    val_fraction: float,
    num_classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    train_size: int = 2048,
    test_size: int = 512,
    noise: float = 1.0,
) -> Dataset:
    """Draw images of smooth class prototypes under Gaussian noise.

    Args:
        root: not used.
        seed: of prototypes, noise, labels and the validation split.
        val_fraction: share of the training images held out.
        num_classes: number of prototypes.
        input_shape: (channels, height, width).
        train_size: number of training images, validation included.
        test_size: number of test images.
        noise: standard deviation of the noise; a prototype's own is 1.

    Returns:
        The data set; every class occurs equally often, give or take one image.

    Example:
        >>> load_synthetic(None, seed=0, val_fraction=0, num_classes=3).num_classes
        3
    """
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = input_shape
    coarse = torch.randn(num_classes, channels, 4, 4, generator=generator)
    prototypes = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    prototypes = prototypes / prototypes.std(dim=(1, 2, 3), keepdim=True)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % num_classes
        labels = labels[torch.randperm(count, generator=generator)]
        images = torch.randn(count, *input_shape, generator=generator)
        return images.mul_(noise).add_(prototypes[labels]), labels

    train, test = draw(train_size), draw(test_size)
    return build(
        "synthetic",
        num_classes,
        train,
        test,
        CropFlip(padding=0, flip=False),
        seed=seed,
        val_fraction=val_fraction,
    )
