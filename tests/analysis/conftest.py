"""A data set of a few hundred digits, and small sparse networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsekd import data


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    whole = data.load("digits", val_fraction=0)
    train, test = whole.train.subset(torch.arange(400)), whole.test.subset(torch.arange(200))
    return replace(whole, train=train, test=test)
