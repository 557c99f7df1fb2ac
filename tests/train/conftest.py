"""A network and a data set small enough to train in a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import sparsekd.nn


@pytest.fixture
def build() -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Flatten(), nn.Linear(72, 4)),
        )
        return sparsekd.nn.sparsify(model, sparsity=0.5, skip="8")

    return make
