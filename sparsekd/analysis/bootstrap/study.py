"""The study of deep bootstrap for sparse networks: does density change the gap, or the speed?

Every method trains twice with equal start, schedule and number of steps: on n samples again and
again, and on fresh ones. The test error of the first is that of the second, plus the gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from sparsekd import models
from sparsekd.analysis.bootstrap.measure import errors
from sparsekd.analysis.bootstrap.population import (
    Population,
    held_out_population,
    ideal_world,
    mixture_population,
    real_world,
)
from sparsekd.analysis.probe import Probe
from sparsekd.analysis.study import Study
from sparsekd.data import Dataset
from sparsekd.dst import RigL
from sparsekd.dst.dynamics import at_share
from sparsekd.nn import sparsify
from sparsekd.tickets import Distillation, make_ticket, prune
from sparsekd.train import (
    Row,
    Trainer,
    Training,
    derive_seed,
    load_state,
    make_optimizer,
    save_model,
)

WORLDS = ("real", "ideal")


@dataclass(frozen=True)
class DeepBootstrap:
    """Settings of the study.

    Args:
        data: "mixture", drawn without end, or a data set whose other images count as fresh.
        network: as `sparsekd.models.build` names it.
        samples: n, of the real world.
        steps: of both worlds.
        batch_size: samples per step.
        methods: "static", "rigl", "lt" and "kd"; the dense network comes in any case.
        sparsities: of all weights of linear layers and convolutions together.
        seeds: runs of each.
        lr: peak of the cosine schedule.
        momentum: of SGD, without weight decay; published runs of 39,000 steps have none.
        every: iterations between two updates of RigL, until 75 % of the steps.
        probes: measurements of a run, at equal distances.
        test: fresh samples to test on, of "mixture".
        delta: training soft-error at which a sample counts as fitted.

    Source: Nakkiran et al., The Deep Bootstrap Framework (arXiv 2010.08127): 39,000 steps of 128,
        n from 5,000 to 50,000.
    """

    data: str = "mixture"
    network: str = "lenet5"
    samples: int = 5000
    steps: int = 12_000
    batch_size: int = 128
    methods: tuple[str, ...] = ("static", "rigl", "lt", "kd")
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    seeds: int = 5
    lr: float = 0.02
    momentum: float = 0.9
    every: int = 100
    probes: int = 60
    test: int = 10_000
    delta: float = 0.01

    grid: ClassVar[tuple[str, ...]] = ("methods", "sparsities", "seeds", "delta")

    # Chosen by position, not by number of images.
    train_images: ClassVar[None] = None

    def __post_init__(self) -> None:
        unknown = set(self.methods) - {"static", "rigl", "lt", "kd"}
        if unknown:
            raise ValueError(f"methods: expected static, rigl, lt or kd, got {min(unknown)!r}")

    def training(self) -> Training:
        """Return the schedule of every run: one pass over a world."""
        return Training(
            1,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=0.0,
            schedule="cosine",
            augment=False,
        )


PRESETS: Mapping[str, DeepBootstrap] = {
    "small": DeepBootstrap(
        network="lenet300_100",
        samples=1000,
        steps=2000,
        batch_size=64,
        sparsities=(0.9, 0.98),
        seeds=2,
        probes=40,
        test=3000,
    ),
    "full": DeepBootstrap(),
    "held-out": DeepBootstrap(data="fashion-mnist", steps=460),
}


@dataclass(frozen=True)
class WorldRun:
    """A run of the study."""

    method: str
    sparsity: float
    world: str
    seed: int

    @property
    def job(self) -> str:
        """Return its name."""
        return f"{self.world}/{self.method}-{self.sparsity:g}-seed{self.seed}"


class BootstrapStudy(Study[DeepBootstrap, Dataset | None]):
    """The runs of a `DeepBootstrap`, each done once.

    Masks of LT and KD tickets are pruned from the real world's dense network and used in both
    worlds; the teacher of each world is its own dense network, so that nothing of the real sample
    reaches the ideal student but the mask.

    Args are those of `Study`; `data` is None for "mixture".
    """

    @cached_property
    def population(self) -> Population:
        """Where both worlds come from."""
        if self.data is not None:
            return held_out_population(self.data)
        size = self.config.steps * self.config.batch_size + self.config.samples
        return mixture_population(size, self.config.test)

    def run(self) -> None:
        """Train what is missing.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            DataError: the data set has fewer images than the ideal world takes.
        """
        config = self.config
        runs = [
            WorldRun(method, sparsity, world, seed)
            for seed in range(config.seeds)
            for method, sparsity in [
                ("dense", 0.0),
                *((m, s) for s in config.sparsities for m in config.methods),
            ]
            for world in WORLDS
        ]
        missing = [run for run in runs if not self.folder.done(run.job)]
        self.reporter.plan(len(missing))
        for run in missing:
            self.stop.check()
            self._train(run)

    def start(self, run: WorldRun) -> nn.Module:
        """Build a network as a run starts it; the same in both worlds.

        Raises:
            CheckpointError: its mask comes from a dense run that is not there.
        """
        model = self._fresh(run.seed)
        if run.method == "dense":
            return model
        if run.method in ("lt", "kd"):
            masks = prune(
                self._dense("real", run.seed), run.sparsity, layers="all", allow_collapse=True
            )
            return make_ticket(model, masks)
        # With the dense initialisation the signal vanishes in the sparsest networks, in any world.
        return sparsify(model, run.sparsity, init="sparse", seed=derive_seed(run.seed, "masks"))

    def _train(self, run: WorldRun) -> None:
        config, model, training = self.config, self.start(run), self.config.training()
        length = config.steps * config.batch_size
        world = real_world if run.world == "real" else ideal_world
        positions = world(config.samples, length, derive_seed(run.seed, "order"))
        sample = self.population.stream(torch.arange(config.samples))

        def measure() -> Row:
            test = errors(model, self.population.test)
            row = {"test_soft": test.soft, "test_error": test.hard, "test_loss": test.loss}
            return row | {"train_soft": errors(model, sample).soft}

        optimizer = make_optimizer(model, training)
        dst = None
        if run.method == "rigl":
            until, seed = at_share(0.75, config.steps), derive_seed(run.seed, "growth")
            dst = RigL(model, optimizer, every=config.every, until=until, seed=seed)
        teacher = self._dense(run.world, run.seed) if run.method == "kd" else None
        probe = Probe(measure, max(1, config.steps // config.probes), dst)
        trainer = Trainer(
            model,
            self.population.stream(positions),
            training,
            seed=derive_seed(run.seed, "train"),
            objective=None if teacher is None else Distillation(teacher),
            dst=probe,
            optimizer=optimizer,
            folder=self._state(run),
            reporter=self.reporter,
            stop=self.stop,
        )
        self.reporter.run(run.job, 1, trainer.epoch, len(trainer.rows))
        trainer.fit()
        probe.record()
        if run.method == "dense":
            save_model(self.folder.model_path(run.job), model)
        about = {
            "population": self.population.name,
            "method": run.method,
            "sparsity": run.sparsity,
            "world": run.world,
            "seed": run.seed,
        }
        self.folder.finish(run.job, [row | about for row in probe.rows])
        (self._state(run) / "training.pt").unlink(missing_ok=True)

    def _state(self, run: WorldRun) -> Path:
        return self.folder.model_path(run.job).parent

    def _dense(self, world: str, seed: int) -> nn.Module:
        model = self._fresh(seed)
        path = self.folder.model_path(WorldRun("dense", 0.0, world, seed).job)
        model.load_state_dict(load_state(path))
        return model

    def _fresh(self, seed: int) -> nn.Module:
        shape = self.population.input_shape
        options: dict[str, Any] = {"in_channels": shape[0]}
        if self.config.network.startswith("lenet"):
            options["input_size"] = shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "init"))
            classes = self.population.num_classes
            return models.build(self.config.network, num_classes=classes, **options)
