"""The row that a finished run leaves."""

from __future__ import annotations

import math

from torch import nn

from sparsekd.data import Dataset, Source
from sparsekd.diagnose import coverage, flops
from sparsekd.dst import METHODS
from sparsekd.dst.registry import Layers
from sparsekd.recipes.config import Recipe
from sparsekd.recipes.runs import TrainingRun, identity
from sparsekd.tickets import SupTickets, maskable
from sparsekd.train import Row, Trainer, evaluate
from sparsekd.train.cost import growth_epochs


def result(
    recipe: Recipe, dataset: Dataset, run: TrainingRun, model: nn.Module, trainer: Trainer
) -> Row:
    """Return the row of a finished run; this is where the test split is read.

    Args:
        recipe: of the run.
        dataset: of the recipe.
        run: that has finished.
        model: its outcome.
        trainer: of the run.
    """
    rows, test = trainer.rows, evaluate(model, dataset.test)
    cost = flops.count(model, (1, *dataset.input_shape))
    layers = _layers(recipe, run)
    names = maskable(model, layers, recipe.skip)
    masked = [layer for layer in cost.layers if layer.name in names]
    nnz, numel = sum(x.nnz for x in masked), sum(math.prod(x.shape) for x in masked)
    return {
        "kind": "result",
        "run": run.name,
        **identity(run),
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "epochs": len(rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "layers": layers,
        "nnz": nnz,
        "numel": numel,
        "sparsity_masked": 1 - nnz / max(numel, 1),
        "sparsity_whole": coverage(model).whole,
        "flops_train": cost.train,
        "flops_train_dense": cost.train_dense,
        "flops_run": sum(row["flops"] for row in rows)
        + _extra_flops(recipe, dataset.train, run, trainer, cost.forward_dense),
        "density": {layer.name: layer.density for layer in cost.layers},
        **_tickets(trainer),
    }


def _layers(recipe: Recipe, run: TrainingRun) -> Layers:
    """Return which layers a run masks; for the dense one, which its tickets may."""
    names = recipe.methods if run.method == "dense" else (run.method,)
    kinds = {recipe.layers or METHODS[n].layers for n in names if n != "dense"}
    return "convolutions" if kinds == {"convolutions"} else "all"


def _extra_flops(
    recipe: Recipe, images: Source, run: TrainingRun, trainer: Trainer, dense: int
) -> int:
    """Count the operations of a run's dense gradients for growth, and of its teacher.

    Each costs what a forward pass of the dense network does, `dense` operations an image.
    """
    if run.method == "dense":
        return 0
    method = METHODS[run.method]
    steps = len(images.batches(recipe.training.batch_size))
    gradients = growth_epochs(method, trainer.rows, steps, recipe.dynamics_of(method).until)
    taught = 0
    if method.distil:
        epochs = recipe.training.epochs
        until = epochs if recipe.kd.until is None else min(recipe.kd.until, epochs)
        taught = max(0, until - trainer.start_epoch)
    return round((gradients + taught) * len(images) * dense)


def _tickets(trainer: Trainer) -> Row:
    """Return what a run of Sup-tickets tells about its tickets before they are superposed."""
    if not isinstance(trainer.dst, SupTickets):
        return {}
    accuracies = [r["ticket_test_accuracy"] for r in trainer.rows if "ticket_test_accuracy" in r]
    return {"ticket_test_accuracies": accuracies, "union_density": trainer.dst.union_density}
