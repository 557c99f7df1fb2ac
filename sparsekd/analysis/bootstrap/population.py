"""Populations that never run out of samples, and the two worlds drawn from one.

A world is a sequence of positions in the population. The real world visits the same n positions
again and again, in another order each time; the ideal world begins with the same n in the order of
the real world's first pass, and then goes on to new ones. Up to there the two are one and the same
run, and that is the only place where they can be.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsekd.data import Batches, CropFlip, Dataset, Split
from sparsekd.data.dataset import Images, pixel_statistics
from sparsekd.errors import DataError, UnsupportedError
from sparsekd.train import derive_seed

_BLOCK = 128
_BLOCKS_KEPT = 256


class Mixture:
    """Images of a Gaussian mixture, seen through a fixed random decoder; drawn when asked for.

    A class has several modes in a latent space. A sample is a mode with Gaussian noise, decoded by
    two random transposed convolutions, under pixel noise. It depends on the seed and its position
    alone. 256 blocks of 128 samples are kept in memory.

    Args:
        size: number of samples; costs eight bytes each.
        seed: of modes, decoder, labels and noise.
        num_classes: equally likely.
        modes: of each class.
        spread: standard deviation of a sample around its mode; modes themselves have 1.
        noise: standard deviation of the pixels' noise; that of the images is about 1.

    Shape:
        images ``[N, 1, 16, 16]`` float32, labels int64 ``[N]``

    Example:
        >>> population = Mixture(1000)
        >>> a, b = population[torch.tensor([5, 900])], population[torch.tensor([900, 5])]
        >>> torch.equal(a, b.flip(0))
        True
    """

    input_shape = (1, 16, 16)
    latent = 12

    def __init__(
        self,
        size: int,
        seed: int = 0,
        num_classes: int = 10,
        modes: int = 6,
        spread: float = 0.45,
        noise: float = 0.4,
    ) -> None:
        self.num_classes, self.modes, self.spread, self.noise = num_classes, modes, spread, noise
        self.seed = seed
        draw = self._generator("labels")
        self.labels = torch.randint(num_classes, (size,), generator=draw)
        draw = self._generator("decoder")
        self._modes = torch.randn(num_classes, modes, self.latent, generator=draw)
        self._first = torch.randn(self.latent, 16, 4, 4, generator=draw) / self.latent**0.5
        self._second = torch.randn(16, 8, 4, 4, generator=draw) / 8
        self._third = torch.randn(8, 1, 4, 4, generator=draw) / 4
        self._block = functools.lru_cache(maxsize=_BLOCKS_KEPT)(self._draw)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images at these positions."""
        blocks = index // _BLOCK
        images = torch.empty(len(index), *self.input_shape)
        for number in blocks.unique().tolist():
            here = blocks == number
            images[here] = self._block(number)[index[here] - number * _BLOCK]
        return images

    def _draw(self, number: int) -> Tensor:
        labels = self.labels[number * _BLOCK : (number + 1) * _BLOCK]
        draw = self._generator("images", number)
        mode = torch.randint(self.modes, labels.shape, generator=draw)
        latent = torch.randn(len(labels), self.latent, generator=draw) * self.spread
        latent += self._modes[labels, mode]
        x = F.relu(F.conv_transpose2d(latent[:, :, None, None], self._first))
        x = F.relu(F.conv_transpose2d(x, self._second, stride=2, padding=1))
        x = torch.tanh(F.conv_transpose2d(x, self._third, stride=2, padding=1))
        return x + self.noise * torch.randn(x.shape, generator=draw)

    def _generator(self, *purpose: object) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))


@dataclass(frozen=True)
class Picked:
    """Images of a population at given positions, fetched when asked for."""

    images: Images
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Tensor, /) -> Tensor:
        return self.images[self.positions[index]]


class Stream(Split):
    """A split that is read in its own order, whether or not that is asked for."""

    def batches(self, batch_size: int, *, shuffle: bool = False, **options: Any) -> Batches:
        """Iterate over the samples in order; see `Split.batches`."""
        return super().batches(batch_size, shuffle=False, **options)


@dataclass(frozen=True)
class Population:
    """Samples to draw worlds from, and others to test on.

    Args:
        name: in result rows.
        num_classes: number of labels.
        input_shape: of an image.
        samples: in an order without meaning: any n of them are a sample of the population.
        test: further ones, in no world.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    samples: Split
    test: Split

    def stream(self, positions: Tensor) -> Stream:
        """Return the samples at these positions, in this order.

        Args:
            positions: int64; repeats are fine.

        Raises:
            DataError: the population has fewer samples.
        """
        if len(positions) and int(positions.max()) >= len(self.samples):
            raise DataError(
                f"positions: expected fewer than {len(self.samples)} of {self.name}, "
                f"got {int(positions.max())}"
            )
        split = self.samples
        picked = Picked(split.images, positions)
        return Stream(picked, split.labels[positions], split.mean, split.std, split.augmentation)


def mixture_population(size: int, test: int = 5000, seed: int = 0, **options: Any) -> Population:
    """Build the procedural population.

    Args:
        size: samples for the worlds.
        test: samples to test on.
        seed: of everything.
        **options: of `Mixture`.

    Example:
        >>> population = mixture_population(size=10_000, test=100)
        >>> len(population.stream(torch.arange(64))), len(population.test)
        (64, 100)
    """
    images = Mixture(size + test, seed, **options)
    mean, std = pixel_statistics(images[torch.arange(min(4096, len(images)))])
    whole = Split(images, images.labels, mean, std, CropFlip(padding=0, flip=False))
    train, rest = torch.arange(size), torch.arange(size, size + test)
    samples = Split(Picked(images, train), images.labels[train], mean, std, whole.augmentation)
    return Population(
        "mixture", images.num_classes, images.input_shape, samples, whole.subset(rest)
    )


def held_out_population(dataset: Dataset, seed: int = 0) -> Population:
    """Take a data set for a population: samples that the real world does not use count as fresh.

    Valid for as many steps as one pass over all training images takes.

    Args:
        dataset: its training images in another order, and its test images.
        seed: of that order.
    """
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))
    train, test = dataset.train, dataset.test
    if not isinstance(train, Split) or not isinstance(test, Split):
        raise UnsupportedError(f"dataset: expected one in memory, got {dataset.name}")
    shape = dataset.input_shape
    return Population(dataset.name, dataset.num_classes, shape, train.subset(order), test)


def real_world(samples: int, length: int, seed: int) -> Tensor:
    """Return positions that pass over the first `samples` of a population again and again.

    Args:
        samples: n.
        length: of the sequence.
        seed: of the order of each pass.

    Shape:
        int64 ``[length]``

    Example:
        >>> world = real_world(4, 10, seed=0)
        >>> sorted(world[:4].tolist()), sorted(world[4:8].tolist())
        ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    passes = []
    for number in range(-(-length // samples)):
        draw = torch.Generator().manual_seed(derive_seed(seed, "pass", number))
        passes.append(torch.randperm(samples, generator=draw))
    return torch.cat(passes)[:length] if passes else torch.empty(0, dtype=torch.int64)


def ideal_world(samples: int, length: int, seed: int) -> Tensor:
    """Return positions that never repeat, and begin with the first pass of `real_world`.

    Args:
        samples: n.
        length: of the sequence.
        seed: as in `real_world`.

    Shape:
        int64 ``[length]``

    Source: Nakkiran et al., The Deep Bootstrap Framework (arXiv 2010.08127), section 3; that the
        worlds share their first n samples makes the comparison one of pairs.

    Example:
        >>> ideal_world(4, 10, seed=0)[4:].tolist()
        [4, 5, 6, 7, 8, 9]
    """
    first = real_world(samples, min(samples, length), seed)
    return torch.cat([first, torch.arange(samples, max(length, samples))])[:length]
