"""The runs of a recipe, in order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparsekd.dst import METHODS
from sparsekd.recipes.config import Recipe
from sparsekd.train import Row


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
        ['seed0/dense', 'seed0/reinit-0.9']
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


def identity(run: TrainingRun) -> Row:
    """Return the fields by which a row names its run."""
    return {"method": run.method, "sparsity": run.sparsity, "seed": run.seed}
