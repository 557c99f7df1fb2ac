"""The form of every data set: three splits of raw images and labels, read in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from sparsekd.data.loader import Loader
from sparsekd.data.samples import Samples
from sparsekd.data.source import Batch, Order, Source, normalise
from sparsekd.errors import DataError

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class Images(Protocol):
    """Raw images addressed by an index tensor: a tensor, or images made on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Split(Source):
    """The raw images and labels of one split, with their normalisation and augmentation.

    Args:
        images: raw images ``[N, C, H, W]``, usually uint8.
        labels: int64 ``[N]``, or a probability of each class, floating-point ``[N, C]``.
        mean: per channel, in units of raw pixels.
        std: per channel, in units of raw pixels.
        augmentation: what `batches(augment=True)` applies to raw images.

    Example:
        >>> from sparsekd import data
        >>> len(data.load("synthetic", train_size=100, val_fraction=0.2).val)
        20
    """

    images: Images
    labels: Tensor
    mean: Tensor
    std: Tensor
    augmentation: Augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> Split:
        """Keep the images at `index`, in that order.

        Args:
            index: int64 positions in this split.

        Returns:
            A split of ``len(index)`` images with the same normalisation and augmentation.
        """
        return replace(self, images=self.images[index], labels=self.labels[index])

    def read(self, order: Order, augment: bool, channels_last: bool) -> Iterator[Batch]:
        """Begin an epoch; see `batches`."""
        positions = order.draw()
        seed = order.draw_seed() if augment else 0
        for number, chosen in order.shares(positions):
            raw = self.images[chosen]
            if augment:
                draw = torch.Generator().manual_seed(seed + number * order.ranks + order.rank)
                raw = self.augmentation(raw, draw)
            yield normalise(raw, self.mean, self.std, channels_last), self.labels[chosen]


@dataclass(frozen=True)
class Dataset:
    """A data set and its three disjoint splits.

    Args:
        name: as given to `load`.
        num_classes: number of labels, which are 0 ... num_classes - 1.
        input_shape: (channels, height, width) of a batch's images.
        train: images to train on, as `as_source` takes them.
        val: images to tune on; empty if `val_fraction` is 0.
        test: images to report on, never used to choose anything.

    Example:
        >>> pairs = [(torch.zeros(1, 2, 2), 0), (torch.ones(1, 2, 2), 1)]
        >>> mine = Dataset("mine", 2, (1, 2, 2), train=pairs, val=[], test=pairs)
        >>> len(mine.train.batches(1)), len(mine.val.batches(1))
        (2, 0)
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    train: Source
    val: Source
    test: Source

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            object.__setattr__(self, name, as_source(getattr(self, name)))


def as_source(data: Any) -> Source:
    """Return what training reads: a split as it is, others by `Samples` or `Loader`.

    Args:
        data: a `Source`, a map-style Dataset of torch (anything with a length that gives an image
            and its label at each index), or a DataLoader (any iterable with a length that gives
            batches).

    Raises:
        DataError: it is none of these.

    Example:
        >>> type(as_source([(torch.zeros(1, 2, 2), 0)])).__name__
        'Samples'
    """
    if isinstance(data, Source):
        return data
    stream = isinstance(data, IterableDataset)  # which has a __getitem__ that raises
    if not stream and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Samples(data)
    if hasattr(data, "__iter__"):
        return Loader(data)
    raise DataError(f"data: expected a Dataset or a DataLoader; found a {type(data).__name__}")


def carve(count: int, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide `count` training images into those kept and those held out.

    Args:
        count: number of images.
        val_fraction: share to hold out, rounded to whole images.
        seed: of the random choice.

    Returns:
        Ascending positions of the training images and of the validation images.

    Example:
        >>> [len(part) for part in carve(50, 0.1, seed=0)]
        [45, 5]
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = round(val_fraction * count)
    return order[held_out:].sort().values, order[:held_out].sort().values


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Measure mean and standard deviation per channel.

    Args:
        images: raw images ``[N, C, H, W]``.

    Returns:
        Float32 mean and standard deviation ``[C]``; a constant channel gets deviation 1.

    Example:
        >>> pixel_statistics(torch.ones(2, 1, 4, 4))
        (tensor([1.]), tensor([1.]))
    """
    std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def build(
    name: str,
    num_classes: int,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    augmentation: Augmentation,
    *,
    seed: int,
    val_fraction: float,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Dataset:
    """Build a data set from images in memory.

    Args:
        name: of the data set.
        num_classes: number of labels.
        train: official training images ``[N, C, H, W]`` and labels ``[N]``.
        test: official test images and labels.
        augmentation: for training batches.
        seed: chooses the validation images.
        val_fraction: share of the training images held out.
        statistics: mean and deviation per channel; None to measure them on the kept images.

    Returns:
        The data set.
    """
    kept, held_out = carve(len(train[1]), val_fraction, seed)
    if statistics is None:
        statistics = pixel_statistics(train[0][kept])
    mean, std = statistics
    official = Split(*train, mean, std, augmentation)
    shape = train[0].shape
    return Dataset(
        name=name,
        num_classes=num_classes,
        input_shape=(shape[1], shape[2], shape[3]),
        train=official.subset(kept),
        val=official.subset(held_out),
        test=Split(*test, mean, std, augmentation),
    )
