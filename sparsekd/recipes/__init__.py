"""Recipes: experiments as data, and the code that runs them in a folder."""

from __future__ import annotations

from sparsekd.recipes.config import (
    DataChoice,
    DistillationChoice,
    ModelChoice,
    Recipe,
)
from sparsekd.recipes.experiment import Experiment, Run, build_model, load_data, plan
from sparsekd.recipes.folder import RunFolder
from sparsekd.recipes.overrides import override
from sparsekd.recipes.presets import RECIPES, get

__all__ = [
    "RECIPES",
    "DataChoice",
    "DistillationChoice",
    "Experiment",
    "ModelChoice",
    "Recipe",
    "Run",
    "RunFolder",
    "build_model",
    "get",
    "load_data",
    "override",
    "plan",
]
