"""The study of generalized tickets: how much of a network is left in which basis.

A dense network is trained, its weights are written in a basis, and the largest coefficients are
kept. From the initialisation's own coefficients (LT) or from those of another (Reinit) what is kept
is trained again, by the same schedule. In the basis of the weights that is the ordinary ticket, and
runs on sparse layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sparsekd import models
from sparsekd.analysis.bases.basis import BASES, Basis
from sparsekd.analysis.bases.compact import (
    factorize,
    narrow,
    plain,
    sparse_layers,
    unit_masks,
    units_within,
)
from sparsekd.analysis.bases.ticket import (
    encode,
    make_bases,
    make_basis_ticket,
    prune_coefficients,
    rank_masks,
    stored_numbers,
)
from sparsekd.analysis.study import Study
from sparsekd.data import Dataset
from sparsekd.tickets import Masks, make_ticket
from sparsekd.timing import interleave
from sparsekd.train import (
    CrossEntropy,
    Row,
    Trainer,
    Training,
    derive_seed,
    evaluate,
    load_state,
    save_model,
)
from sparsekd.train.step_time import training_step

STARTS = ("lt", "reinit")


@dataclass(frozen=True)
class BasisTickets:
    """Settings of the study.

    Args:
        data: data set, as `sparsekd.data.load` names it.
        train_images: train on so many of its images; None for all.
        networks: names of networks that are chains of layers.
        bases: keys of `BASES`.
        densities: shares of the numbers to store, over all layers together; for whole units and
            for the SVD, at most so many.
        seeds: of each run.
        epochs: of a run, the dense one included.
        lr: peak of the cosine schedule.
        weight_decay: of SGD, on coefficients as on weights.
    """

    data: str = "fashion-mnist"
    train_images: int | None = None
    networks: tuple[str, ...] = ("lenet300_100", "lenet5")
    bases: tuple[str, ...] = tuple(BASES)
    densities: tuple[float, ...] = (0.2, 0.1, 0.05, 0.02, 0.01)
    seeds: int = 5
    epochs: int = 20
    lr: float = 0.05
    weight_decay: float = 5e-4

    grid: ClassVar[tuple[str, ...]] = ("networks", "bases", "densities", "seeds")

    def training(self) -> Training:
        """Return the schedule of every run."""
        return Training(
            self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="cosine",
            augment=False,
            channels_last=False,
        )


PRESETS: Mapping[str, BasisTickets] = {
    "small": BasisTickets(
        data="digits",
        networks=("lenet300_100",),
        densities=(0.1, 0.05, 0.02, 0.01),
        seeds=3,
        epochs=40,
    ),
    "full": BasisTickets(),
}


@dataclass(frozen=True)
class TicketRun:
    """A ticket of the study: its network, basis, start, share of numbers kept, and seed."""

    network: str
    basis: str
    start: str
    density: float
    seed: int

    @property
    def job(self) -> str:
        """Return its name."""
        return f"{self.network}/{self.basis}-{self.start}-{self.density:g}-seed{self.seed}"


class BasisStudy(Study[BasisTickets, Dataset]):
    """The runs of a `BasisTickets`, each done once."""

    def run(self) -> None:
        """Train what is missing.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
        """
        config = self.config
        dense = [(n, s) for n in config.networks for s in range(config.seeds)]
        dense = [place for place in dense if not self.folder.done(_dense_job(*place))]
        tickets = [
            TicketRun(network, basis, start, density, seed)
            for network in config.networks
            for seed in range(config.seeds)
            for density in config.densities
            for basis in config.bases
            for start in STARTS
        ]
        tickets = [run for run in tickets if not self.folder.done(run.job)]
        self.reporter.plan((len(dense) + len(tickets)) * config.epochs)
        for network, seed in dense:
            self.stop.check()
            model, job = self._fresh(network, seed, "init"), _dense_job(network, seed)
            result = self._fit(model, seed, job)
            save_model(self.folder.model_path(job), model)
            self._finish(job, [{**result, "network": network, "seed": seed, "basis": "dense"}])
        for run in tickets:
            self.stop.check()
            self._finish(run.job, [self._train(run)])

    def time(self) -> None:
        """Time a training step of every ticket of the first seed in each of its forms.

        Raises:
            Interrupted: a stop was asked for.
        """
        for network in self.config.networks:
            for density in self.config.densities:
                job = f"{network}/timing-{density:g}"
                if not self.folder.done(job):
                    self.stop.check()
                    self.reporter.message(f"timing {network} at density {density:g}")
                    self.folder.finish(job, [self._time(network, density)])

    def _time(self, network: str, density: float) -> Row:
        forms: dict[str, nn.Module] = {"dense": self._fresh(network, 0, "init")}
        for kind in self.config.bases:
            run = TicketRun(network, kind, "lt", density, 0)
            ticket, masks = self.ticket(run)
            forms[f"{kind}, as parametrized"] = ticket
            small = self.compact(run, ticket, masks)
            if small is not None:
                forms[f"{kind}, converted"] = small
        x, y = next(iter(self.data.train.batches(self.config.training().batch_size)))
        objective = CrossEntropy()
        calls: dict[str, Callable[[], object]] = {}
        for name, model in forms.items():
            calls[name] = partial(training_step(model, objective), x, y)
        times = interleave(calls, rounds=15, settle=True)
        return {
            "kind": "timing",
            "network": network,
            "density": density,
            "batch_size": len(y),
            "threads": torch.get_num_threads(),
            "ms": {name: round(median(taken), 3) for name, taken in times.items()},
        }

    def ticket(self, run: TicketRun) -> tuple[nn.Module, Masks]:
        """Build a ticket as it starts, parametrized in its basis, and its masks.

        Raises:
            CheckpointError: the dense run of the seed is not there.
        """
        trained = self._trained(run.network, run.seed)
        bases, masks = self._masks(run, trained)
        fresh = self._fresh(run.network, run.seed, "init" if run.start == "lt" else "reinit")
        return make_basis_ticket(fresh, bases, masks), masks

    def compact(self, run: TicketRun, ticket: nn.Module, masks: Masks) -> nn.Module | None:
        """Convert a ticket to the network that computes with no more than it stores, if one does.

        Returns:
            Sparse layers for single weights, a narrower network for units, factors for the SVD;
            None for other bases, whose weights are dense.
        """
        if run.basis == "identity":
            return sparse_layers(ticket, masks)
        if run.basis == "svd":
            return factorize(ticket)
        if run.basis == "units":
            chain = cast(nn.Sequential, plain(ticket))
            keep = {name: mask.flatten(1).any(1) for name, mask in masks.items()}
            return narrow(chain, keep)
        return None

    def _masks(self, run: TicketRun, trained: nn.Module) -> tuple[dict[str, Basis], Masks]:
        bases = make_bases(trained, run.basis, seed=derive_seed(run.seed, "basis") % 2**31)
        if run.basis == "units":
            chain = cast(nn.Sequential, trained)
            return bases, unit_masks(chain, units_within(chain, run.density))
        coefficients = encode(trained, bases)
        if run.basis == "svd":
            shapes = {name: tuple(c.shape) for name, c in coefficients.items()}
            return bases, rank_masks(shapes, run.density)
        return bases, prune_coefficients(coefficients, 1 - run.density)

    def _train(self, run: TicketRun) -> Row:
        ticket, masks = self.ticket(run)
        if run.basis == "identity":
            ticket = make_ticket(plain(ticket), masks)  # the same numbers, on sparse layers
        small = None if run.basis == "identity" else self.compact(run, ticket, masks)
        row = {
            "network": run.network,
            "basis": run.basis,
            "start": run.start,
            "density": run.density,
            "seed": run.seed,
            "kept": sum(int(mask.sum()) for mask in masks.values()),
            "stored": stored_numbers(run.basis, masks),
            "weights": sum(mask.numel() for mask in masks.values()),
            "parameters_converted": None if small is None else _count(small),
        }
        return {**self._fit(ticket, run.seed, run.job), **row}

    def _fit(self, model: nn.Module, seed: int, job: str) -> Row:
        training = self.config.training()
        trainer = Trainer(
            model,
            self.data.train,
            training,
            seed=derive_seed(seed, "train"),
            folder=self._state(job),
            reporter=self.reporter,
            stop=self.stop,
        )
        self.reporter.run(job, training.epochs, trainer.epoch, len(trainer.rows))
        trainer.fit()
        test = evaluate(model, self.data.test)
        return {
            "kind": "result",
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "train_accuracy": trainer.rows[-1]["train_accuracy"],
        }

    def _finish(self, job: str, rows: list[Row]) -> None:
        self.folder.finish(job, rows)
        (self._state(job) / "training.pt").unlink(missing_ok=True)

    def _state(self, job: str) -> Path:
        return self.folder.model_path(job).parent

    def _trained(self, network: str, seed: int) -> nn.Module:
        model = self._fresh(network, seed, "init")
        model.load_state_dict(load_state(self.folder.model_path(_dense_job(network, seed))))
        return model

    def _fresh(self, network: str, seed: int, purpose: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, purpose))
            shape = self.data.input_shape
            options: dict[str, Any] = {"in_channels": shape[0], "input_size": shape[1]}
            return models.build(network, num_classes=self.data.num_classes, **options)


def _dense_job(network: str, seed: int) -> str:
    return f"{network}/dense-seed{seed}"


def _count(model: nn.Module) -> int:
    """Count the numbers of all weights, without biases."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.ndim > 1]
    return sum(p.numel() for p in parameters)
