"""The training loop: SGD over epochs, resumable in the middle of an epoch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsekd.data import as_source
from sparsekd.errors import CheckpointError
from sparsekd.nn import optimize
from sparsekd.optim import param_groups
from sparsekd.train import distributed
from sparsekd.train.batchnorm import synchronize
from sparsekd.train.checkpoint import load_training, save_training
from sparsekd.train.config import Training
from sparsekd.train.cost import StepCost
from sparsekd.train.evaluation import correct_predictions, evaluate
from sparsekd.train.interrupt import StopRequest
from sparsekd.train.metrics import Row
from sparsekd.train.objective import CrossEntropy, Objective
from sparsekd.train.progress import Reporter


class DynamicTopology(Protocol):
    """A `sparsekd.dst` method: `step` returns True if it rewired, and SGD is then to skip its step.

    If it has a method `attach`, as those of `sparsekd.dst` do, the trainer passes it the
    DistributedDataParallel wrapper of the model.
    """

    def step(self) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def derive_seed(seed: int, *purpose: object) -> int:
    """Derive an independent seed for one purpose from the seed of a run.

    Args:
        seed: of the run.
        *purpose: what the random numbers are for.

    Returns:
        A seed for `torch.Generator.manual_seed`.

    Example:
        >>> derive_seed(0, "order", 1) != derive_seed(0, "order", 2)
        True
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def make_optimizer(model: nn.Module, config: Training) -> torch.optim.SGD:
    """Build the SGD optimizer of a configuration.

    Args:
        model: its trainable parameters are optimised.
        config: lr, momentum, nesterov, weight_decay and decay_norm_and_bias are read.

    Returns:
        The optimizer; it updates parameters by lists, which gives the same bits as one by one and
        takes less of Python on the CPU, where torch does so only if asked.

    Example:
        >>> optimizer = make_optimizer(nn.Linear(2, 2), Training(epochs=1))
    """
    decay = config.weight_decay
    if config.decay_norm_and_bias:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "weight_decay": decay}]
    else:
        groups = param_groups(model, decay)
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, foreach=True
    )


def to_channels_last(model: nn.Module) -> nn.Module:
    """Move the 4-D parameters of a model to channels_last, in place.

    Args:
        model: any module.

    Returns:
        The model.

    Example:
        >>> conv = to_channels_last(nn.Conv2d(3, 4, 3))
        >>> conv.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Trainer:
    """The training of a model on a split, epoch by epoch, resumed bit-equal after an interruption.

    The order of the data and its augmentation depend on the seed and the epoch alone, so runs that
    differ only in their loss see the same batches. With a `folder`, the state is saved there after
    every epoch and on an interruption; a Trainer built again with the same arguments continues from
    it, and reaches the same numbers as an uninterrupted run with the same number of threads.

    In a distributed run every rank builds the same Trainer: each trains on its share of every batch
    of `config.batch_size` images, and rank 0 writes the state.

    Args:
        model: trained in place; `optimize` and channels_last are applied if `config` says so.
        data: the images to train on: a split of `sparsekd.data`, a Dataset of torch, or a
            DataLoader, whose own batches, order and augmentation are then used.
        config: hyper-parameters.
        seed: of data order, augmentation and dropout.
        start_epoch: first epoch of the schedule to run; k after rewinding to epoch k.
        objective: the loss; cross entropy by default.
        validation: images to evaluate on after each epoch, of the same kinds as `data`; never used
            to select anything. Rank 0 alone reads them.
        dst: a dynamic-topology method attached to the model.
        optimizer: by default the SGD of `config`; pass the one `dst` was built with.
        keep: called with the number of epochs done and the model before an epoch counts as done;
            a resume may call it again for the same epoch.
        folder: for the state of the unfinished run.
        reporter: receives progress.
        stop: checked after every step.

    Raises:
        CheckpointError: the state in `folder` is damaged or of a run with other arguments.
        ValueError: `start_epoch` is outside the schedule.

    Example:
        >>> from sparsekd import data
        >>> digits = data.load("digits")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> rows = Trainer(model, digits.train, Training(epochs=1)).fit()
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        config: Training,
        *,
        seed: int = 0,
        start_epoch: int = 0,
        objective: Objective | None = None,
        validation: Any = None,
        dst: DynamicTopology | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        keep: Callable[[int, nn.Module], None] | None = None,
        folder: Path | None = None,
        reporter: Reporter | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        if not 0 <= start_epoch <= config.epochs:
            raise ValueError(f"start_epoch: expected 0 to {config.epochs}, got {start_epoch}")
        if config.sync_batchnorm:
            model = synchronize(model)
        self.model = optimize(model, channels_last=False) if config.optimize else model
        if config.channels_last:
            to_channels_last(model)
        self.data = as_source(data)
        self.config = config
        self.seed = seed
        self.objective = objective or CrossEntropy(config.label_smoothing)
        self.validation = None if validation is None else as_source(validation)
        self.dst = dst
        self.optimizer = optimizer or make_optimizer(model, config)
        self.keep = keep
        self.state_path = None if folder is None else folder / "training.pt"
        self.reporter = reporter or Reporter()
        self.stop = stop or StopRequest()
        self.rows: list[Row] = []
        self.start_epoch = self.epoch = start_epoch
        self._step = 0
        self._sums = _no_sums()
        self._called = self.model
        self._cost: StepCost | None = None
        purpose = ("model", *([distributed.rank()] if distributed.rank() else []))
        self._rng = torch.Generator().manual_seed(derive_seed(seed, *purpose)).get_state()
        if self.state_path is not None and self.state_path.exists():
            self._restore(load_training(self.state_path))

    def epochs(self) -> Iterator[Row]:
        """Train the remaining epochs and yield one row of metrics after each.

        The row is yielded after the state that contains it was saved.

        Yields:
            epoch (1 = after the first epoch of the full schedule), lr, train_loss,
            train_accuracy, images_per_second, seconds, flops (see `StepCost`), updates (of the
            topology), and val_loss and val_accuracy if
            there is a validation split.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            FloatingPointError: the loss is no longer finite.
        """
        self._called = distributed.replicate(self.model)
        attach = getattr(self.dst, "attach", None)
        if attach is not None and isinstance(self._called, DistributedDataParallel):
            attach(self._called)
        while self.epoch < self.config.epochs:
            self._train_epoch()
            row = self._close_epoch()
            if self.keep is not None:
                self.keep(self.epoch, self.model)
            self.save()
            self.reporter.epoch(self.epoch - 1, _summary(row))
            yield row
            self.stop.check()

    def fit(self) -> list[Row]:
        """Train to the end.

        Returns:
            The rows of all epochs, those before a resume included; see `epochs`.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            FloatingPointError: the loss is no longer finite.
        """
        for _ in self.epochs():
            pass
        return self.rows

    def save(self) -> None:
        """Save the state to the folder, if there is one."""
        if self.state_path is None:
            return
        state = {
            "processes": distributed.ranks(),
            "seed": self.seed,
            "start_epoch": self.start_epoch,
            "config": _plain(self.config),
            "epoch": self.epoch,
            "step": self._step,
            "sums": distributed.collect(_numbers(self._sums)),
            "rng": distributed.collect(self._rng),
            "rows": self.rows,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "dst": None if self.dst is None else self.dst.state_dict(),
        }
        save_training(self.state_path, state)

    def _restore(self, state: dict[str, Any]) -> None:
        ranks = distributed.ranks()
        mine = (ranks, self.seed, self.start_epoch, _plain(self.config), self.dst is None)
        theirs = (
            state.get("processes"),
            state["seed"],
            state["start_epoch"],
            state["config"],
            state["dst"] is None,
        )
        if mine != theirs:
            raise CheckpointError(
                f"{self.state_path}: written by another run: expected {mine}, found {theirs}"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.state_path}: does not fit this model: {error}") from error
        if self.dst is not None:
            self.dst.load_state_dict(state["dst"])
        self.epoch, self._step, self.rows = state["epoch"], state["step"], state["rows"]
        rank = distributed.rank()
        self._rng = state["rng"][rank]
        self._sums = dict(zip(_no_sums(), state["sums"][rank].tolist(), strict=True))

    def _train_epoch(self) -> None:
        order = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        self.data.set_epoch(self.epoch)
        batches = self.data.batches(
            self.config.batch_size,
            shuffle=True,
            augment=self.config.augment,
            generator=order,
            channels_last=self.config.channels_last,
            start=self._step,
            rank=distributed.rank(),
            ranks=distributed.ranks(),
        )
        steps = self._step + len(batches)
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng)
            clock = time.perf_counter()
            for x, y in batches:
                self._train_step(x, y, self.epoch + self._step / steps)
                self._step += 1
                now = time.perf_counter()
                self._sums["seconds"] += now - clock
                clock = now
                seen = self._sums["seen"]
                self.reporter.step(
                    self._step,
                    steps,
                    self._sums["loss"] / seen,
                    self._sums["correct"] / seen,
                    len(y) * distributed.ranks(),
                )
                if self._step < steps and self.stop.asked():
                    self._rng = torch.get_rng_state()
                    self.save()
                    self.stop.check(", state saved")
            self._rng = torch.get_rng_state()

    def _train_step(self, x: Tensor, y: Tensor, position: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(position)
        if self._cost is None:
            self._cost = StepCost(self.model, x.shape[1:])
        self._sums["flops"] += self._cost.per_image() * len(y)
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(
            zip(x.chunk(self.config.accumulate), y.chunk(self.config.accumulate), strict=True)
        )
        for number, (part, labels) in enumerate(parts, start=1):
            with self._reducing(number == len(parts)):
                logits = self._called(part)
                loss = self.objective(logits, part, labels, self.epoch)
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the loss became {value} in epoch {self.epoch + 1}; a lower lr may help"
                    )
                (loss * (len(labels) / len(y))).backward()
            self._sums["loss"] += value * len(labels)
            self._sums["correct"] += correct_predictions(logits, labels)
            self._sums["seen"] += len(labels)
        # Top-KAST moves its topology and steps in the same iteration.
        beside = getattr(self.dst, "due", False)
        beside = beside and not getattr(self.dst, "skip_sgd_on_update", True)
        if self.dst is not None and self.dst.step():
            self._sums["updates"] += 1
        else:
            self._sums["updates"] += beside
            self.optimizer.step()

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are reduced over ranks only if `last` is set."""
        if last or not isinstance(self._called, DistributedDataParallel):
            return nullcontext()
        return self._called.no_sync()

    def _close_epoch(self) -> Row:
        sums = distributed.total(self._sums)
        seconds = sums["seconds"] / distributed.ranks()
        row: Row = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sums["loss"] / sums["seen"],
            "train_accuracy": sums["correct"] / sums["seen"],
            "images_per_second": round(sums["seen"] / seconds, 1),
            "seconds": round(seconds, 3),
            "flops": int(sums["flops"]),
            "updates": int(sums["updates"]) // distributed.ranks(),
        }
        if self.validation is not None and distributed.rank() == 0:
            result = evaluate(self.model, self.validation)
            row |= {"val_loss": result.loss, "val_accuracy": result.accuracy}
        self.rows.append(row)
        self.epoch += 1
        self._step = 0
        self._sums = _no_sums()
        return row


def _no_sums() -> dict[str, float]:
    return {"loss": 0.0, "correct": 0, "seen": 0, "seconds": 0.0, "flops": 0, "updates": 0}


def _numbers(sums: dict[str, float]) -> Tensor:
    return torch.tensor(list(sums.values()), dtype=torch.float64)


def _plain(config: Training) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def _summary(row: Row) -> str:
    text = f"loss {row['train_loss']:.4f}  acc {row['train_accuracy']:.2%}"
    if "val_accuracy" in row:
        text += f"  val acc {row['val_accuracy']:.2%}"
    return f"{text}  {row['images_per_second']:,.0f} images/s"
