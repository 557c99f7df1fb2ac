"""The operations of a run: exact while the topology changes."""

from __future__ import annotations

import torch
from torch import nn

import sparsekd as skd
from sparsekd.diagnose import flops
from sparsekd.train import CrossEntropy, Trainer, Training
from sparsekd.train.cost import StepCost


def network() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten()]
    return skd.sparsify(nn.Sequential(*body, nn.Linear(8, 4)), sparsity=0.5, skip=["4"])


def test_cost_follows_the_topology() -> None:
    model = network()
    cost = StepCost(model, (1, 8, 8))
    for mask in (model[2].topology.mask(), torch.zeros(8, 4, 3, 3, dtype=torch.bool)):
        model[2].rewire(mask)
        assert cost.per_image() == flops.count(model, (1, 1, 8, 8)).train


def test_a_run_adds_up_every_step_at_its_own_topology() -> None:
    data = skd.data.load("synthetic", num_classes=4, input_shape=(1, 8, 8), train_size=50)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dst = skd.dst.GMP(model, optimizer, sparsity=0.9, every=1, until=2)
    trainer = Trainer(
        model, data.train, Training(2, 15), dst=dst, optimizer=optimizer, objective=CrossEntropy()
    )
    before = flops.count(model, (1, 1, 8, 8))
    rows = trainer.fit()
    after = flops.count(model, (1, 1, 8, 8))
    images = len(data.train)
    assert rows[0]["updates"] + rows[1]["updates"] == 2
    assert after.train * images < rows[0]["flops"] < before.train * images
    assert rows[1]["flops"] == after.train * images
