"""The study of gradient flow: do lottery tickets win by better gradients, or by what they inherit?

Gradual pruning gives a solution and its mask. Runs under that mask start from the weights that the
solution started from (LT), from others (Scratch), or from others of the right scale (Scratch+);
RigL and SET start like Scratch and move the mask. All of them log their gradient norm, and are then
compared with the solution, and with runs of the same method on other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekd import models
from sparsekd.analysis.flow.gradients import gradient_norms
from sparsekd.analysis.flow.hessian import hessian, lanczos
from sparsekd.analysis.flow.solutions import (
    cosine,
    disagreement,
    distance,
    ensemble_accuracy,
    path,
    plane,
    probabilities,
)
from sparsekd.analysis.probe import Probe
from sparsekd.analysis.study import Study
from sparsekd.data import Dataset, Source
from sparsekd.dst import GMP, SET, RigL, Updater
from sparsekd.nn import sparse_modules, sparsify
from sparsekd.tickets import Masks, make_ticket
from sparsekd.train import (
    Row,
    Trainer,
    Training,
    derive_seed,
    evaluate,
    load_state,
    make_optimizer,
    save_model,
)

MOVES: Mapping[str, type[SET]] = {"rigl": RigL, "rigl+": RigL, "set": SET}
"""What moves the topology of a method; the others keep that of the pruned solution."""

METHODS = ("pruned", "lt", "scratch", "scratch+", "set", "rigl", "rigl+")


def _glorot(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


INITS: Mapping[str, Callable[[nn.Module], object]] = {"torch": lambda _: None, "glorot": _glorot}
"""Initialisations of dense networks."""

ALPHAS = tuple(round(-0.2 + 0.05 * number, 2) for number in range(29))


@dataclass(frozen=True)
class GradientFlow:
    """Settings of the study.

    Args:
        data: data set, as `sparsekd.data.load` names it.
        train_images: train on so many of its images; None for all.
        networks: names of networks without skip connections.
        sparsities: of every layer.
        seeds: runs of each method.
        epochs: of a run.
        lr: peak of the cosine schedule.
        weight_decay: of SGD.
        every: iterations between two updates of a topology.
        prune_begin: share of the run after which gradual pruning begins.
        prune_end: share of the run at which it has reached its sparsity.
        drop_fraction: of RigL and SET at the start; falls with the learning rate, to the end.
        probe_every: steps between two measurements of the gradient.
        probe_images: training images that it is measured on.
        hessian_images: training images that the spectrum is measured on.
        init: of dense networks: "torch", torch's own, or "glorot", as the paper's code has it,
            without biases.

    Source: Evci et al., Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win
        (arXiv 2010.03533), whose LeNet-5 runs take 25 epochs of MNIST at 95 %.
    """

    data: str = "fashion-mnist"
    train_images: int | None = None
    networks: tuple[str, ...] = ("lenet300_100", "lenet5")
    sparsities: tuple[float, ...] = (0.95, 0.98)
    seeds: int = 5
    epochs: int = 25
    lr: float = 0.05
    weight_decay: float = 5e-4
    every: int = 100
    prune_begin: float = 0.25
    prune_end: float = 0.6
    drop_fraction: float = 0.3
    probe_every: int = 200
    probe_images: int = 1000
    hessian_images: int = 1000
    init: str = "torch"

    grid: ClassVar[tuple[str, ...]] = ("networks", "sparsities", "seeds")

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, got {self.init!r}")

    def training(self) -> Training:
        """Return the schedule of every run."""
        return Training(
            self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="cosine",
            augment=False,
        )


PRESETS: Mapping[str, GradientFlow] = {
    "small": GradientFlow(
        train_images=10_000,
        networks=("lenet300_100",),
        seeds=3,
        epochs=10,
        every=40,
        probe_every=40,
        hessian_images=500,
    ),
    "full": GradientFlow(),
    "published": GradientFlow(networks=("lenet5",), init="glorot"),
}


@dataclass(frozen=True)
class Place:
    """One network at one sparsity: runs within it are compared."""

    network: str
    sparsity: float

    def job(self, method: str, seed: int) -> str:
        """Return the name of a run."""
        return f"{self.network}-{self.sparsity:g}/{method}-seed{seed}"


class GradientFlowStudy(Study[GradientFlow, Dataset]):
    """The runs and comparisons of a `GradientFlow`, each done once."""

    def run(self) -> None:
        """Train and compare what is missing.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
        """
        config = self.config
        places = [Place(n, s) for n in config.networks for s in config.sparsities]
        jobs = [(p, m, s) for p in places for m in METHODS for s in range(config.seeds)]
        missing = [job for job in jobs if not self.folder.done(job[0].job(*job[1:]))]
        self.reporter.plan(len(missing) * config.epochs)
        for place, method, seed in missing:
            self.stop.check()
            self._train(place, method, seed)
        for place in places:
            # more seeds change what a comparison is of
            name = f"{place.network}-{place.sparsity:g}/comparison-{config.seeds}"
            if not self.folder.done(name):
                self.stop.check()
                self.reporter.message(f"comparing the solutions of {place.network}")
                self.folder.finish(name, list(self._compare(place)))

    def _fresh(self, place: Place, seed: int, purpose: str = "init") -> nn.Module:
        """Build the dense network with an initialisation: "init" is that of pruned solutions."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, purpose))
            shape = self.data.input_shape
            options: dict[str, Any] = {"in_channels": shape[0], "input_size": shape[1]}
            model = models.build(place.network, num_classes=self.data.num_classes, **options)
            INITS[self.config.init](model)
            return model

    def start(self, place: Place, method: str, seed: int) -> nn.Module:
        """Build a network as a method starts it.

        Raises:
            CheckpointError: it starts from the pruned solution, and that is not there.
        """
        if method == "pruned":
            return sparsify(self._fresh(place, seed), sparsity=0.0)
        masks = self._masks(place)
        if method == "lt":
            return make_ticket(self._fresh(place, 0), masks)
        fresh = self._fresh(place, seed, "scratch")
        if method.endswith("+"):
            return sparsify(fresh, masks=masks, init="sparse", seed=derive_seed(seed, "values"))
        return make_ticket(fresh, masks)

    def end(self, place: Place, method: str, seed: int) -> nn.Module:
        """Load the network that a run ended with."""
        model = sparsify(self._fresh(place, seed), sparsity=0.0)
        model.load_state_dict(load_state(self.folder.model_path(place.job(method, seed))))
        return model

    def _masks(self, place: Place) -> Masks:
        solution = self.end(place, "pruned", 0)
        return {name: module.topology.mask() for name, module in sparse_modules(solution)}

    def _updater(
        self,
        method: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        sparsity: float,
        seed: int,
    ) -> Updater | None:
        config, steps = self.config, self._steps()
        if method == "pruned":
            begin, end = (round(x * steps) for x in (config.prune_begin, config.prune_end))
            options: dict[str, Any] = {"begin": begin, "until": end, "scope": "layer"}
            return GMP(model, optimizer, sparsity=sparsity, every=config.every, **options)
        if method not in MOVES:
            return None
        drop, seed = config.drop_fraction, derive_seed(seed, "growth")
        move = MOVES[method]
        return move(
            model, optimizer, drop_fraction=drop, every=config.every, until=steps, seed=seed
        )

    def _steps(self) -> int:
        training = self.config.training()
        return len(self.data.train.batches(training.batch_size)) * training.epochs

    def _train(self, place: Place, method: str, seed: int) -> None:
        config, job = self.config, place.job(method, seed)
        model, training = self.start(place, method, seed), config.training()
        optimizer = make_optimizer(model, training)
        x, y = _first(self.data.train, config.probe_images)

        def measure() -> Row:
            norms = gradient_norms(model, x, y)
            return {"norm": norms.total, "layers": norms.layers}

        updater = self._updater(method, model, optimizer, place.sparsity, seed)
        probe = Probe(measure, config.probe_every, updater, around_updates=True)
        # The pruned solution itself is not to share its order with the runs compared with it.
        order = "pruned" if method == "pruned" else "runs"
        trainer = Trainer(
            model,
            self.data.train,
            training,
            seed=derive_seed(seed, "train", order),
            dst=probe,
            optimizer=optimizer,
            folder=self.folder.model_path(job).parent,
            reporter=self.reporter,
            stop=self.stop,
        )
        self.reporter.run(job, training.epochs, trainer.epoch, len(trainer.rows))
        trainer.fit()
        probe.record()
        save_model(self.folder.model_path(job), model)
        about = {**_about(place), "method": method, "seed": seed}
        self.folder.finish(job, [row | about for row in [*probe.rows, self._result(model)]])
        if trainer.state_path is not None:
            trainer.state_path.unlink(missing_ok=True)

    def _result(self, model: nn.Module) -> Row:
        test, train = evaluate(model, self.data.test), evaluate(model, self.data.train)
        return {
            "kind": "result",
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "train_loss": train.loss,
            "nnz": sum(module.topology.nnz for _, module in sparse_modules(model)),
        }

    def _compare(self, place: Place) -> Iterator[Row]:
        config, about = self.config, _about(place)
        ends = {m: [self.end(place, m, s) for s in range(config.seeds)] for m in METHODS}
        solution, test = ends["pruned"][0], self.data.test
        labels = torch.cat([y for _, y in test.batches(500)])
        guesses = {m: [probabilities(model, test) for model in ends[m]] for m in METHODS}
        for method in METHODS:
            others = [s for s in range(config.seeds) if (method, s) != ("pruned", 0)]
            pairs = list(combinations(guesses[method], 2))
            yield {
                "kind": "group",
                **about,
                "method": method,
                "disagreement": mean(disagreement(a, b) for a, b in pairs) if pairs else None,
                "ensemble_accuracy": ensemble_accuracy(guesses[method], labels),
            }
            for seed in others:
                begin, end = self.start(place, method, seed), ends[method][seed]
                guess = guesses[method][seed]
                yield {
                    "kind": "to_pruned",
                    **about,
                    "method": method,
                    "seed": seed,
                    "distance_start": distance(begin, solution),
                    "distance_end": distance(end, solution),
                    "cosine_start": cosine(begin, solution),
                    "cosine_end": cosine(end, solution),
                    "disagreement": disagreement(guess, guesses["pruned"][0]),
                }
        yield from self._map(place, ends)
        probe = self.data.train.subset(torch.arange(min(config.probe_images, len(self.data.train))))
        for method in ("lt", "scratch"):
            for name, begin in (
                ("start", self.start(place, method, 0)),
                ("end", ends[method][0]),
            ):
                losses = [point.loss for point in path(begin, solution, ALPHAS, probe)]
                about_path = {"method": method, "from": name, "alphas": ALPHAS, "losses": losses}
                yield {"kind": "path", **about, **about_path}
        yield from self._spectra(place, lambda method: ends[method][0])

    def _map(self, place: Place, ends: Mapping[str, list[nn.Module]]) -> Iterator[Row]:
        found = [("pruned", "end", 0, ends["pruned"][0])]
        for method in ("lt", "scratch"):
            for seed, end in enumerate(ends[method]):
                found.append((method, "end", seed, end))
                if method != "lt" or seed == 0:  # all LT runs start at one point
                    found.append((method, "start", seed, self.start(place, method, seed)))
        points = plane([model for *_, model in found])
        for (method, when, seed, _), (x, y) in zip(found, points.tolist(), strict=True):
            row = {"method": method, "when": when, "seed": seed, "x": x, "y": y}
            yield {"kind": "map", **_about(place), **row}

    def _spectra(self, place: Place, end: Callable[[str], nn.Module]) -> Iterator[Row]:
        x, y = _first(self.data.train, self.config.hessian_images)
        for method in ("lt", "scratch", "scratch+"):
            for when, model in (("start", self.start(place, method, 0)), ("end", end(method))):
                spectrum = lanczos(hessian(model, x, y))
                yield {
                    "kind": "spectrum",
                    **_about(place),
                    "method": method,
                    "when": when,
                    "eigenvalues": spectrum.eigenvalues.tolist(),
                    "weights": spectrum.weights.tolist(),
                }


def _about(place: Place) -> Row:
    return {"network": place.network, "sparsity": place.sparsity}


def _first(data: Source, count: int) -> tuple[Tensor, Tensor]:
    """Return the first images of a split as one batch, not augmented."""
    return next(iter(data.batches(min(count, len(data)))))
