"""A small experiment, finished, and how to run others."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from sparsekd.ops import backend
from sparsekd.recipes import (
    DataChoice,
    Experiment,
    ModelChoice,
    Recipe,
    RunFolder,
    load_data,
)
from sparsekd.train import Training


@pytest.fixture(scope="session")
def tiny():
    """Return the recipe of two methods on the digits in two epochs."""
    return Recipe(
        "tiny",
        "",
        DataChoice("digits"),
        ModelChoice("resnet20"),
        Training(epochs=2, batch_size=100),
        sparsities=(0.8,),
    )


@pytest.fixture(scope="session")
def digits():
    whole = load_data(DataChoice("digits"), None)
    train, test = whole.train.subset(torch.arange(300)), whole.test.subset(torch.arange(100))
    return replace(whole, train=train, test=test)


@pytest.fixture(scope="session")
def run(digits):
    def run(recipe, path, **options):
        # runs are equal to the bit on one backend; by time, another may be chosen along the way
        with backend("cpp"), RunFolder(path, recipe) as folder:
            Experiment(recipe, digits, folder, **options).run()

    return run


@pytest.fixture(scope="session")
def trained(run, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    run(tiny, path)
    return path


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """Return a copy of the finished experiment, which the tests of a file may add to."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("copy") / "finished")
