"""The runs of a recipe: the dense network of each seed, then its tickets, each exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from torch import nn

from sparsekd import data
from sparsekd.dst import METHODS, Updater
from sparsekd.layouts import Layout
from sparsekd.nn import sparse_modules
from sparsekd.recipes.building import build_model
from sparsekd.recipes.config import Recipe
from sparsekd.recipes.folder import RunFolder
from sparsekd.recipes.results import result
from sparsekd.recipes.runs import TrainingRun, identity, plan
from sparsekd.tickets import Masks, Pipeline, SupTickets, collapsed_layers
from sparsekd.train import (
    Reporter,
    StopRequest,
    Trainer,
    distributed,
    evaluate,
    load_state,
    save_model,
)
from sparsekd.train.step_time import time_step


class Experiment:
    """A recipe that runs in a folder, and resumes where an earlier call stopped.

    Args:
        recipe: what to run.
        dataset: as `load_data` gives it.
        folder: opened.
        reporter: receives progress.
        stop: checked after every step.
        before_run: called before a run begins, and before steps are timed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparsekd.recipes import RunFolder, get, load_data
        >>> recipe = get("demo").with_epochs(1)
        >>> with RunFolder(Path(tempfile.mkdtemp()), recipe) as folder:
        ...     experiment = Experiment(recipe, load_data(recipe.data, None), folder)
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: data.Dataset,
        folder: RunFolder,
        *,
        reporter: Reporter | None = None,
        stop: StopRequest | None = None,
        before_run: Callable[[], None] | None = None,
    ) -> None:
        self._before_run = before_run or (lambda: None)
        self._announced: set[str] = set()
        self._asked, self.recipe = recipe, folder.as_meant(recipe)
        self.data = dataset
        self.folder = folder
        self.reporter = reporter or Reporter()
        self.stop = stop or StopRequest()

    def run(self) -> None:
        """Train every run that has not finished, and write its rows.

        Raises:
            Interrupted: a stop was asked for; the state is saved.
            CheckpointError: a file of an earlier call is damaged.
            FloatingPointError: a loss is no longer finite.
        """
        if self.recipe != self._asked:
            self.reporter.message(f"{self.folder.path}: goes on as an earlier version began it")
        images, batch = len(self.data.train), self.recipe.training.batch_size
        if batch > images:
            self.reporter.message(
                f"training.batch_size={batch}: a step takes all {images} training images"
            )
        open_runs = [run for run in plan(self.recipe) if self.folder.result(run.name) is None]
        done = len(plan(self.recipe)) - len(open_runs)
        if done:
            self.reporter.message(f"{done} finished runs found in {self.folder.path}")
        self.reporter.plan(sum(self._epochs(run) for run in open_runs))
        for run in open_runs:
            self.stop.check()
            self._before_run()
            self._train(run)

    def time_steps(self) -> None:
        """Measure a training step of every run of the first seed, sparse and dense, and write it.

        The network is the one that the run ended with.

        Raises:
            Interrupted: a stop was asked for.
        """
        self._before_run()
        timed = {row["run"] for row in self.folder.log.rows() if row["kind"] == "timing"}
        batches = self.data.train.batches(self.recipe.training.batch_size)
        x, y = next(iter(batches))
        for run in plan(self.recipe):
            if run.seed == self.recipe.first_seed and run.name not in timed:
                self.stop.check()
                trainer = self.trainer(run)
                trainer.model.load_state_dict(load_state(self.folder.model_path(run.name)))
                times = time_step(trainer.model, x, y, trainer.objective)
                row = {"kind": "timing", "run": run.name, **identity(run), **asdict(times)}
                self.folder.append(row)

    def _pipeline(self, seed: int) -> Pipeline:
        recipe = self.recipe
        return Pipeline(
            build=lambda seed: build_model(recipe.model, self.data, seed),
            build_narrow=lambda seed, sparsity: build_model(
                recipe.model, self.data, seed, sparsity
            ),
            data=self.data,
            training=recipe.training,
            seed=seed,
            folder=self.folder.path / f"seed{seed}",
            distillation=recipe.kd,
            dynamics=recipe.dynamics,
            superposition=recipe.sup,
            rewind_epoch=recipe.rewind_epoch,
            layout=Layout.parse(recipe.layout),
            layers=recipe.layers,
            skip=recipe.skip,
            init=recipe.init,
            reporter=self.reporter,
            stop=self.stop,
        )

    def trainer(self, run: TrainingRun) -> Trainer:
        """Build the trainer of a run; one that has begun goes on from its saved state.

        Raises:
            CheckpointError: the dense run that it needs has not got that far.
        """
        pipeline = self._pipeline(run.seed)
        if run.method == "dense":
            return pipeline.dense_trainer()
        name, method = run.name.partition("/")[2], METHODS[run.method]
        pipeline = replace(pipeline, dynamics=self.recipe.dynamics_of(method))
        return pipeline.ticket_trainer(method, self._masks(pipeline, run), name, run.sparsity)

    def _masks(self, pipeline: Pipeline, run: TrainingRun) -> Masks:
        if run.round == 0:
            return pipeline.masks(METHODS[run.method], run.sparsity)
        previous, layers = None, METHODS[run.method].layers
        if run.round > 1:
            before = TrainingRun(run.seed, run.method, round=run.round - 1)
            previous = self.folder.model_path(before.name)
        return pipeline.next_masks(previous, self.recipe.prune_rate, layers, allow_collapse=True)

    def _epochs(self, run: TrainingRun) -> int:
        epochs = self.recipe.training.epochs
        if run.method == "dense":
            return epochs
        return epochs - METHODS[run.method].start_epoch(self.recipe.rewind_epoch)

    def _train(self, run: TrainingRun) -> None:
        trainer = self.trainer(run)
        self._warn_of_collapse(run, trainer.model)
        self._announce_updates(run, trainer)
        epochs, done = self.recipe.training.epochs, len(trainer.rows)
        self.reporter.run(run.name, epochs, trainer.epoch, done)
        if isinstance(trainer.dst, SupTickets):
            trainer.keep = self._test_tickets(trainer, trainer.dst)
        self.folder.sync_epochs(run.name, trainer.rows)
        for row in trainer.epochs():
            self.folder.append({"kind": "epoch", "run": run.name, **row})
        model = self._pipeline(run.seed).outcome(trainer)
        if distributed.rank() == 0:
            self._finish(run, model, trainer)
        distributed.wait()  # the next run reads these files on every rank

    def _test_tickets(self, trainer: Trainer, sup: SupTickets) -> Callable[[int, nn.Module], None]:
        """Return what evaluates each ticket of Sup-tickets when its epoch ends, into its row."""

        def keep(epoch: int, model: nn.Module) -> None:
            done, cycles = sup.dst.iteration - sup.cycles.first_phase, sup.cycles
            ticket = cycles.count and done >= 0 and done % cycles.cycle_steps == 0
            if ticket and distributed.rank() == 0:
                trainer.rows[-1]["ticket_test_accuracy"] = evaluate(model, self.data.test).accuracy

        return keep

    def _finish(self, run: TrainingRun, model: nn.Module, trainer: Trainer) -> None:
        row = result(self.recipe, self.data, run, model, trainer)
        # The row comes last: a run counts as finished once it is there, and its files then are.
        save_model(self.folder.model_path(run.name), model)
        self.folder.append(row)
        if trainer.state_path is not None:
            trainer.state_path.unlink(missing_ok=True)
        self.reporter.message(f"{run.name}: test accuracy {row['test_accuracy']:.2%}")

    def _warn_of_collapse(self, run: TrainingRun, model: nn.Module) -> None:
        masks = {name: module.topology.mask() for name, module in sparse_modules(model)}
        for name in collapsed_layers(masks):
            self.reporter.message(f"warning: {run.name}: layer {name} lost every weight")

    def _announce_updates(self, run: TrainingRun, trainer: Trainer) -> None:
        """Say how many updates a method has in its first run: a short run may leave too few."""
        dst = trainer.dst.dst if isinstance(trainer.dst, SupTickets) else trainer.dst
        if isinstance(dst, Updater) and run.method not in self._announced:
            self._announced.add(run.method)
            steps = len(self.data.train.batches(trainer.config.batch_size))
            ahead = dst.updates_ahead((trainer.config.epochs - trainer.start_epoch) * steps)
            every = self.recipe.dynamics.every
            self.reporter.message(f"{run.name}: {ahead} updates of the topology, every={every}")
