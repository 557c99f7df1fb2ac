"""An experiment that several processes share, with the locks of its folders between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sparsekd.dst import METHODS
from sparsekd.errors import FolderInUseError
from sparsekd.recipes.building import load_data
from sparsekd.recipes.checks import check
from sparsekd.recipes.config import Recipe
from sparsekd.recipes.experiment import Experiment
from sparsekd.recipes.folder import RunFolder


def parts(recipe: Recipe) -> dict[str, Recipe]:
    """Divide a recipe into experiments that need nothing of each other.

    Methods that need the dense run of a seed stay together; each of the others is by itself.

    Args:
        recipe: the whole.

    Returns:
        Name of its subfolder -> part, in the order of the recipe's seeds.

    Example:
        >>> from sparsekd.recipes import get
        >>> list(parts(replace(get("demo"), methods=("lt", "kd", "rigl"), seeds=2)))
        ['seed0-lt-kd', 'seed0-rigl', 'seed1-lt-kd', 'seed1-rigl']
    """
    dense = tuple(m for m in recipe.methods if m == "dense" or METHODS[m].needs_dense)
    alone = [(m,) for m in recipe.methods if m not in dense]
    return {
        "-".join((f"seed{seed}", *methods)): replace(
            recipe, methods=methods, seeds=1, first_seed=seed
        )
        for seed in range(recipe.first_seed, recipe.first_seed + recipe.seeds)
        for methods in (dense, *alone)
        if methods
    }


def share(
    recipe: Recipe, path: str | Path, *, data_dir: Path | None = None, threads: int | None = None
) -> list[str]:
    """Train the parts of a recipe that no other process trains, and return their names.

    Any number of processes may call this with the same arguments, on any machines that share the
    file system of `path`; a launcher such as submitit starts them. Each part has a subfolder, and
    whoever holds its lock trains it. Parts that have finished, or that another process trains, are
    passed over; what a dead process left behind is resumed by the next call.

    Args:
        recipe: what to run.
        path: folder of the parts; `sparsekd report` reads it.
        data_dir: folder of the data files, None for their default.
        threads: of torch in this process; None leaves them as they are.

    Returns:
        Names of the parts that this process found finished or has trained to the end.

    Raises:
        ValueError: a run of the recipe could not work.
        CheckpointError: a folder holds another experiment, or is damaged.

    Example:
        >>> import tempfile
        >>> from sparsekd.recipes import get
        >>> recipe = replace(get("demo").with_epochs(1), methods=("dense",))
        >>> share(recipe, tempfile.mkdtemp())  # doctest: +SKIP
        ['seed0-dense']
    """
    if threads is not None:
        torch.set_num_threads(threads)
    dataset = load_data(recipe.data, data_dir)
    check(recipe, dataset)
    done = []
    for name, part in parts(recipe).items():
        try:
            with RunFolder(Path(path) / name, part) as folder:
                Experiment(part, dataset, folder).run()
        except FolderInUseError:
            continue
        done.append(name)
    return done
