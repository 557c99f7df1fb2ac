"""Whole epochs of a network: training steps with the loader around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.arena.steps import ArenaStepRace
from sparsekd import data
from sparsekd.bench.steps import StepRun
from sparsekd.data import Source
from sparsekd.errors import DataError
from sparsekd.sparsity import generator_for


@dataclass(frozen=True)
class Epoch:
    """The images of a whole epoch: a stated share of a data set's training split."""

    title: str
    split: Source


def small_epoch(images: int = 3072) -> Epoch:
    """Take some images of Fashion-MNIST, or of the digits where its files are missing.

    Args:
        images: how many at most.
    """
    try:
        source, split = "fashion-mnist", data.load("fashion-mnist").train
    except DataError:
        source, split = "digits", data.load("digits").train
    chosen = split.subset(torch.arange(min(images, len(split))))
    return Epoch(f"{len(chosen)} of {len(split)} images of {source}", chosen)


@dataclass(frozen=True)
class EpochRace(ArenaStepRace):
    """A race over whole epochs of one network.

    Args:
        epoch: images to go through, augmented, in each call.
    """

    epoch: Epoch

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("epoch", self.case.title, self.epoch.title)

    def timed(self, run: StepRun) -> Callable[[], object]:
        """Return the call that is timed."""
        return partial(_train, run, self.epoch.split)


def _train(run: StepRun, split: Source) -> None:
    """Train an epoch through the loader, in the memory format that the model wants."""
    batches = split.batches(
        len(run.y),
        shuffle=True,
        augment=True,
        generator=generator_for(0, "epoch"),
        drop_last=True,
        channels_last=run.x.is_contiguous(memory_format=torch.channels_last),
    )
    for x, y in batches:
        run.step(x, y)
