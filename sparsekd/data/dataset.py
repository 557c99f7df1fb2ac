"""The form of every data set: three splits of raw images and labels, read in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sparsekd.errors import DataError

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class Images(Protocol):
    """Raw images addressed by an index tensor: a tensor, or files decoded on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Split:
    """The raw images and labels of one split, with their normalisation and augmentation.

    Args:
        images: raw images ``[N, C, H, W]``, usually uint8.
        labels: int64 ``[N]``, or a probability of each class, floating-point ``[N, C]``.
        mean: per channel, in units of raw pixels.
        std: per channel, in units of raw pixels.
        augmentation: what `batches(augment=True)` applies to raw images.
        preparation: what `batches(augment=False)` applies to raw images; None for nothing.

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
    preparation: Callable[[Tensor], Tensor] | None = None

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

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> Batches:
        """Iterate over the split once per `iter()`, in batches.

        An epoch draws twice from `generator`, at its start: the order of the images, and a seed
        from which each batch derives its own augmentation. So the generator's state at the start of
        an epoch and the number of batches done are enough to resume the epoch exactly.

        Args:
            batch_size: images per batch, at least 1.
            shuffle: draw a new order for every epoch.
            augment: augment the images.
            generator: source of randomness; None for torch's global one.
            drop_last: leave out a last batch that is not full.
            channels_last: give the images in channels_last memory format.
            start: number of batches to skip, to resume an epoch.
            rank: the share of every batch to read; `batch_size` counts all shares.
            ranks: number of shares. They have equal size: a batch that does not divide borrows
                images from the start of the epoch.

        Shape:
            Yields x ``[B, C, H, W]`` float32, normalised, and y ``[B]`` int64 or the labels'
            ``[B, C]``, with B the size of a share.

        Returns:
            An iterable with a length.

        Raises:
            DataError: `batch_size` below 1, `start` outside the epoch, `rank` not below `ranks`.

        Example:
            >>> from sparsekd import data
            >>> len(data.load("digits").train.batches(100))
            13
        """
        if batch_size < 1:
            raise DataError(f"batch_size: expected at least 1; got {batch_size}")
        total = len(self) // batch_size if drop_last else -(-len(self) // batch_size)
        if not 0 <= start <= total:
            raise DataError(f"start: expected a number of batches in [0, {total}]; got {start}")
        if not 0 <= rank < ranks:
            raise DataError(f"rank: expected a number in [0, {ranks}); got {rank}")
        layout = (augment, generator, channels_last, start, total, rank, ranks)
        return Batches(self, batch_size, shuffle, *layout)


@dataclass(frozen=True)
class Batches:
    """An iterable over the batches of a split, made by `Split.batches`."""

    split: Split
    batch_size: int
    shuffle: bool
    augment: bool
    generator: torch.Generator | None
    channels_last: bool
    start: int
    total: int
    rank: int
    ranks: int

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        split, size = self.split, self.batch_size
        count = len(split)
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=self.generator)
        seed = 0
        if self.augment:
            seed = int(torch.randint(2**62, (), generator=self.generator))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        mean, std = split.mean.view(-1, 1, 1), split.std.view(-1, 1, 1)
        for number in range(self.start, self.total):
            chosen = order[number * size : (number + 1) * size]
            borrowed = order[: -len(chosen) % self.ranks]
            chosen = torch.cat([chosen, borrowed])[self.rank :: self.ranks]
            raw = split.images[chosen]
            if self.augment:
                draw = torch.Generator().manual_seed(seed + number * self.ranks + self.rank)
                raw = split.augmentation(raw, draw)
            elif split.preparation is not None:
                raw = split.preparation(raw)
            x = raw.to(torch.float32, memory_format=layout, copy=True)
            yield x.sub_(mean).div_(std), split.labels[chosen]


@dataclass(frozen=True)
class Dataset:
    """A data set and its three disjoint splits.

    Args:
        name: as given to `load`.
        num_classes: number of labels, which are 0 ... num_classes - 1.
        input_shape: (channels, height, width) of a batch's images.
        train: images to train on.
        val: images to tune on; empty if `val_fraction` is 0.
        test: images to report on, never used to choose anything.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    train: Split
    val: Split
    test: Split


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
