"""Measuring does not change a run, and survives an interruption."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

from sparsekd.analysis import Probe, gradient_norms
from sparsekd.dst import RigL
from sparsekd.nn import sparsify
from sparsekd.ops import backend
from sparsekd.train import Interrupted, StopRequest, Trainer, Training, make_optimizer, state_hash

CONFIG = Training(2, batch_size=50, augment=False)


def trainer_of(digits, folder=None, stop=None, probed=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten()]
    model = sparsify(nn.Sequential(*layers, nn.Linear(144, 10)), 0.8)
    optimizer = make_optimizer(model, CONFIG)
    dst = RigL(model, optimizer, every=3, until=14)
    x, y = next(iter(digits.train.batches(40)))

    def measure():
        return {"norm": gradient_norms(model, x, y).total}

    probe = Probe(measure, 2, dst, around_updates=True)
    return Trainer(
        model,
        digits.train,
        CONFIG,
        dst=probe if probed else dst,
        optimizer=optimizer,
        folder=folder,
        stop=stop,
    )


def test_a_measured_run_is_the_run_bit_for_bit(digits):
    with backend("cpp"):
        measured, plain = trainer_of(digits), trainer_of(digits, probed=False)
        measured.fit()
        plain.fit()
    assert state_hash(measured.model.state_dict()) == state_hash(plain.model.state_dict())
    kinds = [(row["kind"], row["step"]) for row in measured.dst.rows]
    assert [step for kind, step in kinds if kind == "probe"] == list(range(0, 16, 2))
    assert [step for kind, step in kinds if kind == "update"] == [2, 5, 8, 11]


class StopAfter(StopRequest):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def asked(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.signal = signal.SIGINT
        return super().asked()


def test_an_interrupted_run_keeps_its_measurements(digits, tmp_path):
    with backend("cpp"):
        whole = trainer_of(digits)
        whole.fit()
        with pytest.raises(Interrupted):
            trainer_of(digits, tmp_path, StopAfter(10)).fit()
        resumed = trainer_of(digits, tmp_path)
        assert resumed.dst.rows
        resumed.fit()
    assert resumed.dst.rows == whole.dst.rows


def test_an_update_is_measured_on_both_sides(digits):
    model = sparsify(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dst = RigL(model, optimizer, every=1, until=3)
    probe = Probe(lambda: {"version": model[1].topology.version}, 10, dst, around_updates=True)
    x, y = next(iter(digits.train.batches(40)))
    nn.functional.cross_entropy(model(x), y).backward()
    assert probe.step()
    version = model[1].topology.version
    update = {"before": {"version": 0}, "after": {"version": version}}
    assert probe.rows == [
        {"kind": "probe", "step": 0, "version": 0},
        {"kind": "update", "step": 0, **update},
    ]
    assert version > 0


def test_a_probe_never_measuring_is_refused():
    with pytest.raises(ValueError, match="every"):
        Probe(dict, 0)
