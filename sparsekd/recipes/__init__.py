"""Recipes: experiments as data, and the code that runs them in a folder."""

from __future__ import annotations

from sparsekd.recipes.config import DataChoice, ModelChoice, Recipe
from sparsekd.recipes.experiment import Experiment, TrainingRun, build_model, load_data, plan
from sparsekd.recipes.folder import RunFolder
from sparsekd.recipes.overrides import override
from sparsekd.recipes.presets import RECIPES, get

__all__ = [
    "RECIPES",
    "DataChoice",
    "Experiment",
    "ModelChoice",
    "Recipe",
    "RunFolder",
    "TrainingRun",
    "build_model",
    "get",
    "load_data",
    "override",
    "plan",
]
