"""Small networks for the tests of dynamic sparse training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsekd.dst import Updater
from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparsify


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


@pytest.fixture
def make_dense_network(make_network) -> Callable[..., nn.Sequential]:
    """Build the same network with every weight stored, as pruning methods start from."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        return sparsify(densify(make_network(seed, dtype)), sparsity=0.0)

    return make


@pytest.fixture
def backward() -> Callable[..., None]:
    """Run one forward and backward pass on images that depend on `seed` only."""

    def run(model: nn.Module, seed: int = 0) -> None:
        x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()

    return run


@pytest.fixture
def train(backward) -> Callable[..., list[bool]]:
    """Train `steps` iterations; return which of them rewired."""

    def run(dst: Updater, steps: int) -> list[bool]:
        rewired = []
        for _ in range(steps):
            dst.optimizer.zero_grad()
            backward(dst.model, dst.iteration)
            rewired.append(dst.step())
            if not rewired[-1]:
                dst.optimizer.step()
        return rewired

    return run
