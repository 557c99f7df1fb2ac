"""The peak of a step's memory counts every tensor once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsekd.train.step_memory import held, peak
from sparsekd.train.step_time import training_step

MIB = 2**20


def test_gradients_of_the_step_before_are_not_counted_beside_the_new_ones():
    model, x = nn.Linear(512, 512, bias=False), torch.randn(2, 512)
    step = training_step(model, lambda output, x, y, epoch: output.square().mean())
    step(x, x)
    assert held(model) == 3 * MIB  # weight, gradient, momentum
    for _ in range(2):
        assert peak(model, lambda: step(x, x)) == pytest.approx(3 * MIB, rel=0.02)
        assert held(model) == 3 * MIB


def test_activations_are_counted_at_their_most():
    model = nn.Sequential(nn.Linear(8, 512, bias=False), nn.Tanh(), nn.Linear(512, 8, bias=False))
    x = torch.randn(1024, 8)
    step = training_step(model, lambda output, x, y, epoch: output.square().mean())
    step(x, x)
    # the hidden layer before and after the activation, or its value and both gradients
    assert 2 * 2 * MIB < peak(model, lambda: step(x, x)) < 4 * 2 * MIB
