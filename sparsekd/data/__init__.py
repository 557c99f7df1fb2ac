"""Data sets in memory, folders of images, and Datasets and DataLoaders of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekd.data.augment import CropFlip
from sparsekd.data.cifar import load_cifar10, load_cifar100
from sparsekd.data.dataset import Dataset, Split, as_source
from sparsekd.data.embedded import load_digits, load_synthetic
from sparsekd.data.idx import load_fashion_mnist
from sparsekd.data.imagefolder import load_imagefolder
from sparsekd.data.loader import Loader
from sparsekd.data.samples import Samples
from sparsekd.data.source import Batches, Source
from sparsekd.data.text import load_text
from sparsekd.errors import DataError, UnsupportedError

_LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": load_digits,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "imagefolder": load_imagefolder,
    "synthetic": load_synthetic,
    "text": load_text,
}


def names() -> tuple[str, ...]:
    """List the data sets that `load` knows.

    Returns:
        The names in a fixed order.

    Example:
        >>> names()[0]
        'digits'
    """
    return tuple(_LOADERS)


def load(
    name: str,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    val_fraction: float = 0.1,
    **options: Any,
) -> Dataset:
    """Load a data set, check it, and split it into train, val and test.

    `val` is carved out of the official training images by a permutation drawn from `seed`; `test`
    is the official test split (for digits a fixed fifth) and does not depend on `seed`.

    Args:
        name: one of `names()`.
        root: folder of the files; digits, synthetic and text need none, fashion-mnist has one.
        seed: chooses the validation images, and the data themselves for synthetic.
        val_fraction: share of the training images held out, in [0, 1).
        **options: synthetic: `num_classes`, `input_shape`, `train_size`, `test_size`, `noise`;
            imagefolder: `image_size`, `scale`, `ratio`, `workers`; text: `context`,
            `train_size`, `test_size`.

    Returns:
        The data set with its three splits.

    Raises:
        UnsupportedError: unknown name, or imagefolder without torchvision.
        DataError: a missing, truncated, corrupt or mislabelled file, or a bad `val_fraction`.

    Example:
        >>> digits = load("digits")
        >>> digits.input_shape, digits.num_classes
        ((1, 8, 8), 10)
        >>> x, y = next(iter(digits.train.batches(64)))
        >>> x.shape
        torch.Size([64, 1, 8, 8])
    """
    if name not in _LOADERS:
        raise UnsupportedError(f"name: expected one of {', '.join(names())}; got {name!r}")
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction: expected a number in [0, 1); got {val_fraction!r}")
    folder = None if root is None else Path(root)
    if folder is not None and not folder.is_dir():
        raise DataError(f"root: expected a folder; found none at {folder}")
    return _LOADERS[name](folder, seed=seed, val_fraction=val_fraction, **options)


__all__ = [
    "Batches",
    "CropFlip",
    "Dataset",
    "Loader",
    "Samples",
    "Source",
    "Split",
    "as_source",
    "load",
    "names",
]
