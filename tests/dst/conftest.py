"""Small networks for the tests of dynamic sparse training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from sparsekd.nn import SparseConv2d, SparseLinear


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_network() -> Callable[..., nn.Sequential]:
    """Build a network for inputs of shape [N, 4, 6, 6]; its parameters depend on `seed` only."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            SparseConv2d(4, 6, 3, padding=1, groups=2, sparsity=0.5, seed=seed + 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            SparseConv2d(6, 8, 3, stride=2, sparsity=0.7, seed=seed + 2),
            nn.ReLU(),
            nn.Flatten(),
            SparseLinear(32, 5, sparsity=0.6, seed=seed + 3),
        ).to(dtype)

    return make
