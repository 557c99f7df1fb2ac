"""A network and a data set small enough to train whole pipelines in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsekd import data
from sparsekd.tickets import Pipeline
from sparsekd.train import Training


def build(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(72, 4)),
        )


@pytest.fixture
def make_pipeline(images: data.Dataset, tmp_path: Path) -> Callable[..., Pipeline]:
    def make(**changes: Any) -> Pipeline:
        training = Training(epochs=3, batch_size=32, milestones=(2,))
        options = {"training": training, "seed": 0, "folder": tmp_path / "seed0", **changes}
        return Pipeline(build, images, **options)

    return make


@pytest.fixture
def pipeline(make_pipeline: Callable[..., Pipeline]) -> Pipeline:
    """A pipeline whose dense run has ended."""
    pipeline = make_pipeline(rewind_epoch=1)
    pipeline.dense_trainer().fit()
    return pipeline
