"""A DataLoader of the user's own, read as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from sparsekd.data.random_state import RandomState
from sparsekd.data.samples import pair
from sparsekd.data.source import Batch, Batches, Order, Source, check_share
from sparsekd.errors import DataError, UnsupportedError


class Loader(Source):
    """A DataLoader, or another iterable with a length, whose batches are taken as they come.

    Batch size, order and augmentation are the loader's own. Each epoch seeds the generators that
    it draws from (its own, if it has any, and the global ones), and begun epochs are resumed by
    loading once more what is behind; with a seeded loader that gives the same batches, bit for bit.
    Where its order depends on the epoch (`set_epoch`), it is told. Several ranks need a
    DistributedSampler, or a stream that divides itself.

    Args:
        loader: gives batches: images and labels, as a pair or a dictionary of two.

    Raises:
        DataError: it has no length.

    Example:
        >>> pairs = [(torch.zeros(1, 2, 2), 0), (torch.ones(1, 2, 2), 1)]
        >>> loader = Loader(torch.utils.data.DataLoader(pairs, batch_size=2))
        >>> len(loader.batches(batch_size=64))
        1
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        try:
            self._length = len(loader)  # type: ignore[arg-type]
        except TypeError as error:
            raise DataError(
                f"loader: expected one with a length, which the schedule counts in ({error}); "
                "WebDataset's has one after with_epoch(batches).with_length(batches)"
            ) from error

    def __len__(self) -> int:
        """Number of images; of a stream without one, batches times their size."""
        dataset = getattr(self.loader, "dataset", None)
        try:
            return len(dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return self._length * (getattr(self.loader, "batch_size", None) or 1)

    def subset(self, index: Tensor) -> Source:
        """Refuse: a DataLoader has no positions."""
        raise UnsupportedError(
            "subset: a DataLoader cannot be divided; supported: give the Dataset instead"
        )

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler, the dataset or the loader itself, whichever wants to know."""
        for holder in self._parts("dataset"):
            tell = getattr(holder, "set_epoch", None)
            if tell is not None:
                tell(epoch)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        channels_last: bool = False,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
        **_: bool,
    ) -> Batches:
        """Iterate over the loader once per `iter()`; see `Source.batches` for the arguments.

        Args:
            batch_size: not read, nor are `shuffle`, `augment` and `drop_last`.
            generator: gives the seed of an epoch.
            channels_last: give the images in channels_last memory format.
            start: number of batches to load and leave out, to resume an epoch.
            rank: enters the seed.
            ranks: more than one needs a loader that reads its share.

        Raises:
            DataError: several ranks would all read the same.
        """
        check_share(start, self._length, rank, ranks)
        if ranks > 1 and not self._divides():
            raise DataError(
                "loader: expected each rank to read its own share; give it a DistributedSampler, "
                "or give the Dataset instead"
            )
        order = Order(len(self), 1, False, generator, start, self._length, rank, ranks)
        return Batches(self._length - start, partial(self.read, order, False, channels_last))

    def read(self, order: Order, augment: bool, channels_last: bool) -> Iterator[Batch]:
        """Begin an epoch; see `batches`."""
        seed = order.draw_seed()
        for holder in self._parts():
            own = getattr(holder, "generator", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(seed)
        state = RandomState(seed + order.rank)
        with state.in_use():
            batches = iter(self.loader)
        for number in range(order.total):
            with state.in_use():
                batch = next(batches, None)
            if batch is None:
                raise DataError(f"loader: expected {order.total} batches; it ended after {number}")
            if number < order.start:
                continue
            x, y = pair(batch, "batch")
            if not isinstance(y, Tensor) or y.ndim == 0:
                raise DataError(
                    f"batch: expected tensors of images and labels; found a {type(y).__name__} for "
                    "labels; put a Dataset of single images into a DataLoader"
                )
            if channels_last and x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            yield x, y

    def _parts(self, *more: str) -> list[Any]:
        names = ("sampler", "batch_sampler", *more)
        return [self.loader, *(getattr(self.loader, name, None) for name in names)]

    def _divides(self) -> bool:
        if any(hasattr(holder, "num_replicas") for holder in self._parts()):
            return True
        dataset = getattr(self.loader, "dataset", None)
        return dataset is None or isinstance(dataset, IterableDataset)
