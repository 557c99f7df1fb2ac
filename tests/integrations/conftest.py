"""The data that plain loops and frameworks train on."""

from __future__ import annotations

import pytest
import torch
from plain_loops import BATCHES
from torch import Tensor


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES, 8, 12, generator=generator)
    y = torch.randint(0, 4, (BATCHES, 8), generator=generator)
    return list(zip(x, y, strict=True))
