"""A network with sparse layers of both kinds, and methods that move it in every way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsekd import dst
from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparsify

Method = Callable[[nn.Module, torch.optim.Optimizer], dst.Updater]


def build(sparsity: float = 0.6) -> nn.Sequential:
    """Build a network in float64; sparsity 0 is what pruning methods start from."""
    torch.manual_seed(0)
    model = nn.Sequential(
        # no bias: its gradient in front of BatchNorm is rounding, of which Rprop takes the sign
        SparseConv2d(4, 6, 3, padding=1, groups=2, bias=False, sparsity=sparsity, seed=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 25, 9),
        nn.Tanh(),
        SparseLinear(9, 7, sparsity=sparsity, seed=2),
    ).double()
    return model if sparsity else sparsify(densify(model), sparsity=0.0, skip="4")


@pytest.fixture
def network() -> Callable[..., nn.Sequential]:
    return build


@pytest.fixture
def batch() -> Callable[[int], Tensor]:
    """Return the images of iteration `t`."""

    def images(t: int) -> Tensor:
        generator = torch.Generator().manual_seed(t)
        return torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=generator)

    return images
