"""The runs of a recipe: the dense network of each seed, then its tickets, each exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from torch import nn

from sparsekd import data
from sparsekd.diagnose import coverage, flops
from sparsekd.dst import METHODS
from sparsekd.layouts import Layout
from sparsekd.nn import sparse_modules
from sparsekd.recipes.building import build_model
from sparsekd.recipes.config import Recipe
from sparsekd.recipes.folder import RunFolder
from sparsekd.tickets import Masks, Pipeline, collapsed_layers
from sparsekd.train import (
    Reporter,
    Row,
    StopRequest,
    Trainer,
    distributed,
    evaluate,
    load_state,
    save_model,
)
from sparsekd.train.cost import growth_epochs
from sparsekd.train.step_time import time_step


@dataclass(frozen=True)
class TrainingRun:
    """One training run of an experiment.

    Args:
        seed: of the run.
        method: "dense" or a name from `sparsekd.dst.METHODS`.
        sparsity: fraction of the weights pruned in the layers that the method masks.
        round: of an iterative method, counted from 1; 0 for the others.
    """

    seed: int
    method: str
    sparsity: float = 0.0
    round: int = 0

    @property
    def name(self) -> str:
        """The run's subfolder, and its name in the rows."""
        if self.method == "dense":
            return f"seed{self.seed}/dense"
        if self.round:
            return f"seed{self.seed}/{self.method}-round{self.round:02}"
        return f"seed{self.seed}/{self.method}-{self.sparsity:g}"


def plan(recipe: Recipe) -> list[TrainingRun]:
    """List the runs of a recipe in the order in which they run.

    An iterative method has a run per round, up to the first round that reaches the highest
    sparsity asked for.

    Args:
        recipe: the recipe.

    Returns:
        The runs; the dense one of a seed, where a method needs it, comes before its tickets.

    Example:
        >>> from sparsekd.recipes import get
        >>> [run.name for run in plan(get("demo"))][:2]
        ['seed0/dense', 'seed0/lt-0.8']
    """
    runs = []
    methods = [METHODS[name] for name in recipe.methods if name != "dense"]
    dense = len(methods) < max(1, len(recipe.methods)) or any(m.needs_dense for m in methods)
    for seed in range(recipe.first_seed, recipe.first_seed + recipe.seeds):
        if dense:
            runs.append(TrainingRun(seed, "dense"))
        for sparsity in recipe.sparsities:
            runs += [TrainingRun(seed, m.name, sparsity) for m in methods if not m.iterative]
        for method in methods:
            if method.iterative:
                runs += _rounds(seed, method.name, recipe)
    return runs


def _rounds(seed: int, name: str, recipe: Recipe) -> Iterator[TrainingRun]:
    keep = 1 - recipe.prune_rate
    # Published sparsities are 1 - 0.8^k rounded to four digits; do not add a round for the rest.
    last = math.ceil(math.log(1 - max(recipe.sparsities, default=0)) / math.log(keep) - 0.01)
    for number in range(1, last + 1):
        yield TrainingRun(seed, name, round(1 - keep**number, 4), number)


class Experiment:
    """A recipe that runs in a folder, and resumes where an earlier call stopped.

    Args:
        recipe: what to run.
        dataset: as `load_data` gives it.
        folder: opened.
        reporter: receives progress.
        stop: checked after every step.

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
    ) -> None:
        self.recipe = recipe
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
        open_runs = [run for run in plan(self.recipe) if self.folder.result(run.name) is None]
        done = len(plan(self.recipe)) - len(open_runs)
        if done:
            self.reporter.message(f"{done} finished runs found in {self.folder.path}")
        self.reporter.plan(sum(self._epochs(run) for run in open_runs))
        for run in open_runs:
            self.stop.check()
            self._train(run)

    def time_steps(self) -> None:
        """Measure a training step of every run of the first seed, sparse and dense, and write it.

        The network is the one that the run ended with.

        Raises:
            Interrupted: a stop was asked for.
        """
        timed = {row["run"] for row in self.folder.log.rows() if row["kind"] == "timing"}
        batches = self.data.train.batches(self.recipe.training.batch_size)
        x, y = next(iter(batches))
        for run in plan(self.recipe):
            if run.seed == self.recipe.first_seed and run.name not in timed:
                self.stop.check()
                trainer = self._trainer(run)
                trainer.model.load_state_dict(load_state(self.folder.model_path(run.name)))
                times = time_step(trainer.model, x, y, trainer.objective)
                row = {"kind": "timing", "run": run.name, **_identity(run), **asdict(times)}
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
            reporter=self.reporter,
            stop=self.stop,
        )

    def _trainer(self, run: TrainingRun) -> Trainer:
        pipeline = self._pipeline(run.seed)
        if run.method == "dense":
            return pipeline.dense_trainer()
        name = run.name.partition("/")[2]
        method, masks = METHODS[run.method], self._masks(pipeline, run)
        return pipeline.ticket_trainer(method, masks, name, run.sparsity)

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
        trainer = self._trainer(run)
        self._warn_of_collapse(run, trainer.model)
        epochs, done = self.recipe.training.epochs, len(trainer.rows)
        self.reporter.run(run.name, epochs, trainer.epoch, done)
        self.folder.sync_epochs(run.name, trainer.rows)
        for row in trainer.epochs():
            self.folder.append({"kind": "epoch", "run": run.name, **row})
        model = self._pipeline(run.seed).outcome(trainer)
        if distributed.rank() == 0:
            self._finish(run, model, trainer)
        distributed.wait()  # the next run reads these files on every rank

    def _finish(self, run: TrainingRun, model: nn.Module, trainer: Trainer) -> None:
        result = self._result(run, model, trainer)
        # The row comes last: a run counts as finished once it is there, and its files then are.
        save_model(self.folder.model_path(run.name), model)
        self.folder.append(result)
        if trainer.state_path is not None:
            trainer.state_path.unlink(missing_ok=True)
        self.reporter.message(f"{run.name}: test accuracy {result['test_accuracy']:.2%}")

    def _warn_of_collapse(self, run: TrainingRun, model: nn.Module) -> None:
        masks = {name: module.topology.mask() for name, module in sparse_modules(model)}
        for name in collapsed_layers(masks):
            self.reporter.message(f"warning: {run.name}: layer {name} lost every weight")

    def _result(self, run: TrainingRun, model: nn.Module, trainer: Trainer) -> Row:
        rows, test = trainer.rows, evaluate(model, self.data.test)
        cost = flops.count(model, (1, *self.data.input_shape))
        whole = run.method != "dense" and METHODS[run.method].layers == "all"
        masked = [layer for layer in cost.layers if whole or len(layer.shape) == 4]
        return {
            "kind": "result",
            "run": run.name,
            **_identity(run),
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "epochs": len(rows),
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "nnz": sum(layer.nnz for layer in masked),
            "numel": sum(math.prod(layer.shape) for layer in masked),
            "sparsity_whole": coverage(model).whole,
            "flops_train": cost.train,
            "flops_train_dense": cost.train_dense,
            "flops_run": sum(row["flops"] for row in rows)
            + self._extra_flops(run, trainer, cost.forward_dense),
            "density": {layer.name: layer.density for layer in cost.layers},
        }

    def _extra_flops(self, run: TrainingRun, trainer: Trainer, dense: int) -> int:
        """Count the operations of a run's dense gradients for growth, and of its teacher.

        Each costs what a forward pass of the dense network does, `dense` operations an image.
        """
        if run.method == "dense":
            return 0
        method, recipe = METHODS[run.method], self.recipe
        steps = len(self.data.train.batches(recipe.training.batch_size))
        gradients = growth_epochs(method, trainer.rows, steps, recipe.dynamics.until)
        taught = 0
        if method.distil:
            epochs = recipe.training.epochs
            until = epochs if recipe.kd.until is None else min(recipe.kd.until, epochs)
            taught = max(0, until - trainer.start_epoch)
        return round((gradients + taught) * len(self.data.train) * dense)


def _identity(run: TrainingRun) -> Row:
    return {"method": run.method, "sparsity": run.sparsity, "seed": run.seed}
