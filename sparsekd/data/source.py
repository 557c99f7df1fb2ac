"""What training reads its batches from, and the order of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsekd.errors import DataError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batches:
    """The batches of an epoch; each `iter()` begins the epoch anew.

    Args:
        length: number of batches.
        begin: returns an iterator over them.

    Example:
        >>> len(Batches(0, lambda: iter([])))
        0
    """

    length: int
    begin: Callable[[], Iterator[Batch]]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return self.begin()


@dataclass(frozen=True)
class Order:
    """Which images make up each batch of an epoch, and which of them a rank reads.

    Args:
        count: number of images.
        batch_size: of all ranks together.
        shuffle: draw a new order for every epoch.
        generator: source of randomness; None for torch's global one.
        start: first batch to read.
        total: number of batches of the whole epoch.
        rank: the share to read.
        ranks: number of shares.
    """

    count: int
    batch_size: int
    shuffle: bool
    generator: torch.Generator | None
    start: int
    total: int
    rank: int
    ranks: int

    def draw(self) -> Tensor:
        """Return all positions, int64 ``[count]``, in the order of an epoch."""
        if self.shuffle:
            return torch.randperm(self.count, generator=self.generator)
        return torch.arange(self.count)

    def draw_seed(self) -> int:
        """Return a seed for what else an epoch draws."""
        return int(torch.randint(2**62, (), generator=self.generator))

    def shares(self, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each batch from `start` on, and this rank's positions in it.

        Args:
            positions: as `draw` returned them.
        """
        for number in range(self.start, self.total):
            chosen = positions[number * self.batch_size : (number + 1) * self.batch_size]
            borrowed = positions[: -len(chosen) % self.ranks]
            yield number, torch.cat([chosen, borrowed])[self.rank :: self.ranks]


class Source(ABC):
    """Images and labels that are read in batches: in memory, from a Dataset, from a DataLoader."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def subset(self, index: Tensor) -> Source:
        """Keep the images at int64 positions `index`, in that order."""

    @abstractmethod
    def read(self, order: Order, augment: bool, channels_last: bool) -> Iterator[Batch]:
        """Begin an epoch; `batches` says what the arguments mean."""

    def set_epoch(self, epoch: int) -> None:  # noqa: B027 - most sources need not know
        """Tell the number of the epoch that begins, to a source whose order depends on it."""

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
        """Iterate over the images once per `iter()`, in batches.

        An epoch draws from `generator` at its start alone: the order of the images, and a seed
        from which the augmentation of each batch or image is derived. So the generator's state at
        the start of an epoch and the number of batches done are enough to resume it exactly.

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
        count = len(self)
        total = count // batch_size if drop_last else -(-count // batch_size)
        check_share(start, total, rank, ranks)
        order = Order(count, batch_size, shuffle, generator, start, total, rank, ranks)
        return Batches(total - start, partial(self.read, order, augment, channels_last))


def check_share(start: int, total: int, rank: int, ranks: int) -> None:
    """Refuse a start outside an epoch of `total` batches, or a rank that there is not.

    Example:
        >>> check_share(0, 10, rank=1, ranks=2)
    """
    if not 0 <= start <= total:
        raise DataError(f"start: expected a number of batches in [0, {total}]; got {start}")
    if not 0 <= rank < ranks:
        raise DataError(f"rank: expected a number in [0, {ranks}); got {rank}")


def normalise(raw: Tensor, mean: Tensor, std: Tensor, channels_last: bool) -> Tensor:
    """Subtract the mean of each channel and divide by its deviation.

    Args:
        raw: images ``[N, C, H, W]`` of any dtype, which stay as they are.
        mean: float32 ``[C]``, in units of raw pixels.
        std: float32 ``[C]``, in units of raw pixels.
        channels_last: memory format of the result.

    Returns:
        float32 ``[N, C, H, W]``.

    Example:
        >>> normalise(torch.full((1, 1, 1, 1), 6), torch.ones(1), torch.ones(1) * 2, False).item()
        2.5
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = raw.to(torch.float32, memory_format=layout, copy=True)
    return x.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
