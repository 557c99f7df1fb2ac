"""A torch Dataset of single images, loaded by processes of their own while the step computes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate
from torch.utils.data import Dataset as TorchDataset

from sparsekd.data.random_state import RandomState, seed_all
from sparsekd.data.source import Batch, Order, Source, normalise
from sparsekd.errors import DataError

# Four keep up with hundreds of images a second; more would cost memory on machines with many cores.
_MOST_WORKERS = 4


@dataclass(frozen=True)
class Samples(Source):
    """A map-style Dataset of torch, read by the workers of torch's DataLoader.

    What is random in a sample (torch's, Python's and NumPy's global generators) follows from the
    epoch's seed and the sample's index. So an epoch is the same for any number of workers and
    ranks, and one that begins at batch k loads nothing before it.

    Args:
        dataset: gives at each index an image and its label, as a pair or a dictionary of two.
        plain: gives the same images without augmentation; None for `dataset`.
        mean: per channel, in units of raw pixels; None for images that are used as they come.
        std: per channel, in units of raw pixels.
        workers: processes that load; 0 loads between the steps, None takes as many as there are
            processors for each rank, at most 4.

    Example:
        >>> pairs = [(torch.zeros(1, 2, 2), 0), (torch.ones(1, 2, 2), 1)]
        >>> x, y = next(iter(Samples(pairs, workers=0).batches(2)))
        >>> x.shape, y
        (torch.Size([2, 1, 2, 2]), tensor([0, 1]))
    """

    dataset: Any
    plain: Any = None
    mean: Tensor | None = None
    std: Tensor | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise DataError(f"workers: expected at least 0; got {self.workers}")
        if (self.mean is None) != (self.std is None):
            raise DataError("mean, std: expected both or neither")

    def __len__(self) -> int:
        return len(self.dataset)

    def subset(self, index: Tensor) -> Samples:
        """Keep the images at int64 positions `index`, in that order."""
        kept = index.tolist()
        plain = None if self.plain is None else Subset(self.plain, kept)
        return replace(self, dataset=Subset(self.dataset, kept), plain=plain)

    def read(self, order: Order, augment: bool, channels_last: bool) -> Iterator[Batch]:
        """Begin an epoch; see `batches`."""
        positions = order.draw()
        # Without a plain view a pass that shuffles is one of training, with what is random in it.
        training = augment or (self.plain is None and order.shuffle)
        seed = order.draw_seed() if training else 0
        view = self.dataset if augment or self.plain is None else self.plain
        workers = default_workers() if self.workers is None else self.workers
        loader = DataLoader(
            _SeededBatches(view, seed, self.mean, self.std, channels_last),
            batch_size=None,
            sampler=_Shares(order, positions),
            num_workers=min(workers, order.total - order.start),
            collate_fn=_unchanged,
            generator=torch.Generator(),  # leaves the global one alone
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def default_workers() -> int:
    """Return how many processes load where nothing else is said: one a processor, at most four.

    Example:
        >>> 1 <= default_workers() <= 4
        True
    """
    processors = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, processors // here))


@dataclass(frozen=True)
class _Shares:
    """The indices of each batch, as the DataLoader asks for them."""

    order: Order
    positions: Tensor

    def __iter__(self) -> Iterator[list[int]]:
        for _, chosen in self.order.shares(self.positions):
            yield chosen.tolist()


@dataclass(frozen=True)
class _SeededBatches(TorchDataset):
    """Batches by the indices of their samples; a worker has one, and runs it in its process."""

    dataset: Any
    seed: int
    mean: Tensor | None
    std: Tensor | None
    channels_last: bool

    def __getitem__(self, indices: list[int]) -> Any:
        try:
            with RandomState(self.seed).in_use():
                x, y = default_collate([self._sample(index) for index in indices])
        except DataError as error:
            return error  # a worker's traceback would bury what it says
        # Here rather than between two steps: of 16 images of 224 pixels it takes 34 ms.
        if self.mean is not None and self.std is not None:
            x = normalise(x, self.mean, self.std, self.channels_last)
        elif self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y

    def _sample(self, index: int) -> tuple[Any, Any]:
        seed_all(self.seed + index)
        try:
            return pair(self.dataset[index], f"sample {index}")
        except DataError:
            raise
        except Exception as error:
            error.add_note(f"at index {index} of the data set")
            raise


def _unchanged(batch: Any) -> Any:
    return batch


def pair(item: Any, what: str) -> tuple[Any, Any]:
    """Return images and labels of what a Dataset or a DataLoader gives.

    Args:
        item: a pair, or a dictionary of two in the order of images and labels.
        what: it is, for the error.

    Raises:
        DataError: it is something else.

    Example:
        >>> pair({"image": 1, "label": 2}, "sample")
        (1, 2)
    """
    if isinstance(item, Mapping):
        item = tuple(item.values())
    if isinstance(item, Tensor) or not isinstance(item, Sequence) or len(item) != 2:
        found = type(item).__name__
        length = f" of {len(item)}" if isinstance(item, Sequence) else ""
        raise DataError(f"{what}: expected an image and a label; found a {found}{length}")
    return item[0], item[1]
