"""A finished run as a network again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sparsekd.data import Dataset
from sparsekd.errors import CheckpointError
from sparsekd.nn import relayout
from sparsekd.recipes.building import build_model, load_data
from sparsekd.recipes.config import Recipe
from sparsekd.recipes.folder import RunFolder, read_recipe
from sparsekd.tickets import make_ticket
from sparsekd.train import Row, load_state


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its network, what it was trained on, and how it did.

    Args:
        model: as training left it, in eval mode; its pruned layers store their nonzeros only.
        recipe: of the experiment.
        dataset: of the recipe.
        result: the run's row of kind "result".
    """

    model: nn.Module
    recipe: Recipe
    dataset: Dataset
    result: Row

    def build_dense(self) -> nn.Module:
        """Build the network as a plain torch module, with fresh weights."""
        narrow = self.result["method"] == "small-dense"
        sparsity = self.result["sparsity"] if narrow else None
        return build_model(self.recipe.model, self.dataset, self.result["seed"], sparsity).eval()


def load_run(path: str | Path, data_dir: Path | None = None) -> FinishedRun:
    """Load the network of a finished run.

    Args:
        path: folder of the run, as runs/demo/seed0/kd-0.9.
        data_dir: folder of the data files, None for their default.

    Returns:
        The run.

    Raises:
        CheckpointError: it is not the folder of a finished run, or its files are damaged.
        DataError: the data set cannot be loaded.
    """
    folder, name = _locate(Path(path))
    recipe = read_recipe(folder)
    runs = RunFolder(folder, recipe)
    result = runs.result(name)
    if result is None:
        finished = [row["run"] for row in runs.log.rows() if row.get("kind") == "result"]
        raise CheckpointError(f"{path}: {_expected(folder, finished)}")
    dataset = load_data(recipe.data, data_dir)
    run = FinishedRun(nn.Identity(), recipe, dataset, result)
    state = load_state(runs.model_path(name))
    dense = run.build_dense()
    sparse = [key.removesuffix(".values") for key in state if key.endswith(".values")]
    modules = dict(dense.named_modules())
    masks = {}
    for layer in sparse:
        weight = getattr(modules.get(layer), "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise CheckpointError(f"{path}: its layer {layer!r} is none of {recipe.model.name}")
        masks[layer] = torch.ones(weight.shape, dtype=torch.bool)
    model = make_ticket(dense, masks) if masks else dense
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit {recipe.model.name}: {error}") from error
    if masks:
        relayout(model, recipe.layout)
    return FinishedRun(model.eval(), recipe, dataset, result)


def _locate(path: Path) -> tuple[Path, str]:
    """Return the folder of the experiment and the name of the run in it."""
    for folder in (path, *path.absolute().parents):
        if (folder / "config.json").exists():
            name = path.absolute().relative_to(folder.absolute()).as_posix()
            return folder, name
    raise CheckpointError(f"{path}: expected the folder of a run, as runs/demo/seed0/kd-0.9")


def _expected(folder: Path, finished: Sequence[str]) -> str:
    if not finished:
        return f"no run in {folder} has finished"
    shown = ", ".join(finished[:8]) + (", ..." if len(finished) > 8 else "")
    return f"expected the folder of a finished run; {folder} has {shown}"
