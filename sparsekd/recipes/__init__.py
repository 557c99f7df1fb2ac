"""Recipes: experiments as data, and the code that runs them in a folder."""

from __future__ import annotations

from sparsekd.recipes.building import build_model, load_data
from sparsekd.recipes.checks import check
from sparsekd.recipes.config import DataChoice, ModelChoice, Recipe
from sparsekd.recipes.experiment import Experiment
from sparsekd.recipes.export import export
from sparsekd.recipes.folder import RunFolder
from sparsekd.recipes.loading import FinishedRun, load_run
from sparsekd.recipes.overrides import override
from sparsekd.recipes.presets import GROUPS, RECIPES, get
from sparsekd.recipes.runs import TrainingRun, plan
from sparsekd.recipes.sharing import share

__all__ = [
    "GROUPS",
    "RECIPES",
    "DataChoice",
    "Experiment",
    "FinishedRun",
    "ModelChoice",
    "Recipe",
    "RunFolder",
    "TrainingRun",
    "build_model",
    "check",
    "export",
    "get",
    "load_data",
    "load_run",
    "override",
    "plan",
    "share",
]
