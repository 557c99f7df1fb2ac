"""The hyper-parameters of a training run, and its learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

Schedule = Literal["step", "cosine"]


@dataclass(frozen=True)
class Training:
    """Hyper-parameters of a training run by SGD.

    Every epoch number counts from the start of the full schedule. A run that starts at epoch k
    therefore sees the learning rate and the milestones that a full run sees from epoch k on, which
    is what rewinding asks for.

    Args:
        epochs: length of the full schedule.
        batch_size: images per step.
        lr: peak learning rate.
        momentum: of SGD.
        nesterov: use Nesterov momentum.
        weight_decay: of SGD.
        decay_norm_and_bias: apply weight decay to biases and normalisation parameters too.
        schedule: "step" (times `gamma` at each milestone) or "cosine" (to 0 at the end).
        milestones: epochs at which the "step" schedule decays.
        gamma: factor of the "step" schedule.
        warmup: epochs of linear warm-up from 0, step by step.
        tail: last epochs of the run that the schedule leaves to another, such as the cycles of
            Sup-tickets: the cosine reaches 0 before them.
        label_smoothing: of the cross entropy.
        augment: apply the data set's standard augmentation.
        accumulate: backward passes per step; each gets its share of the batch.
        sync_batchnorm: in a distributed run, normalise by the statistics of all ranks.
        channels_last: keep images and dense weights in channels_last, the faster layout of most
            dense convolutions on CPUs.
        optimize: run BatchNorm, residual and ReLU as one op, see `sparsekd.optimize`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> config = Training(epochs=182, lr=0.1, milestones=(90, 135))
        >>> config.learning_rate(100.0)
        0.010000000000000002
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = True
    schedule: Schedule = "step"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: int = 0
    tail: int = 0
    label_smoothing: float = 0.0
    augment: bool = True
    accumulate: int = 1
    sync_batchnorm: bool = False
    channels_last: bool = True
    optimize: bool = True

    def __post_init__(self) -> None:
        _require("epochs", self.epochs >= 1, "at least 1", self.epochs)
        _require("batch_size", self.batch_size >= 1, "at least 1", self.batch_size)
        _require("accumulate", self.accumulate >= 1, "at least 1", self.accumulate)
        _require("lr", 0 < self.lr < math.inf, "a positive number", self.lr)
        _require("momentum", 0 <= self.momentum < 1, "a number in [0, 1)", self.momentum)
        _require(
            "nesterov", self.momentum > 0 or not self.nesterov, "momentum above 0", self.momentum
        )
        decay = self.weight_decay
        _require("weight_decay", 0 <= decay < math.inf, "at least 0", decay)
        known = " or ".join(map(repr, get_args(Schedule)))
        _require("schedule", self.schedule in get_args(Schedule), known, self.schedule)
        ascending = list(self.milestones) == sorted(set(self.milestones))
        _require("milestones", ascending, "ascending epochs", self.milestones)
        _require("gamma", 0 < self.gamma < math.inf, "a positive number", self.gamma)
        _require("tail", 0 <= self.tail <= self.epochs, "0 to epochs", self.tail)
        most = self.epochs - self.tail
        _require("warmup", 0 <= self.warmup <= most, "0 to epochs - tail", self.warmup)
        smoothing = self.label_smoothing
        _require("label_smoothing", 0 <= smoothing < 1, "a number in [0, 1)", smoothing)

    def learning_rate(self, epoch: float) -> float:
        """Return the learning rate at a point of the schedule.

        Args:
            epoch: epochs since the start of the full schedule, with the fraction of the current
                one; the warm-up and the cosine move with every step.

        Returns:
            The learning rate.

        Example:
            >>> Training(epochs=10, lr=0.4, warmup=5).learning_rate(2.5)
            0.2
        """
        if epoch < self.warmup:
            return self.lr * epoch / self.warmup
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        done = (epoch - self.warmup) / max(self.epochs - self.tail - self.warmup, 1)
        return self.lr * (1 + math.cos(math.pi * min(done, 1))) / 2

    def scaled(self, epochs: int) -> Training:
        """Return the same schedule stretched or shortened to another number of epochs.

        Args:
            epochs: new length; milestones and warm-up keep their share of it.

        Returns:
            The new configuration.

        Example:
            >>> Training(epochs=182, milestones=(90, 135)).scaled(20).milestones
            (10, 15)
        """
        share = epochs / self.epochs
        milestones = sorted({max(1, round(m * share)) for m in self.milestones})
        return replace(
            self,
            epochs=epochs,
            milestones=tuple(m for m in milestones if m < epochs),
            warmup=round(self.warmup * share),
            tail=round(self.tail * share),
        )

    def squeezed(self, tail: int) -> Training:
        """Return a run of the same length whose schedule ends `tail` epochs earlier.

        Args:
            tail: epochs to leave to another schedule; milestones and warm-up keep their share of
                the rest.

        Returns:
            The new configuration.

        Example:
            >>> Training(epochs=250, milestones=(125, 187)).squeezed(24).milestones
            (113, 169)
        """
        if tail == 0:
            return self
        return replace(self.scaled(max(self.epochs - tail, 1)), epochs=self.epochs, tail=tail)


def _require(name: str, ok: bool, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")
