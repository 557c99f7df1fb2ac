"""What a timing measures; never how fast it is."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparsekd import timing
from sparsekd.nn import densify
from sparsekd.train import CrossEntropy, state_hash
from sparsekd.train.step_time import StepTimes, time_step


def batch():
    return torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)


def test_a_sparse_model_is_timed_against_both_dense_layouts(build, monkeypatch):
    monkeypatch.setattr(timing, "_page_faults", lambda: 0)  # memory has settled: one warm-up
    model = build()
    before = state_hash(model.state_dict())
    calls = []

    def objective(logits, x, y, epoch):
        calls.append(x.is_contiguous())
        return CrossEntropy()(logits, x, y, epoch)

    times = time_step(model, *batch(), objective, rounds=2)
    # three models; two rounds, the one before them, and the one whose memory is counted
    assert len(calls) == 3 * 4
    assert times.sparse_ms > 0
    assert times.dense_ms == min(times.dense_contiguous_ms, times.dense_channels_last_ms) > 0
    assert (times.rounds, times.batch_size, times.threads) == (2, 8, torch.get_num_threads())
    assert state_hash(model.state_dict()) == before
    for kind in (times.held, times.peak):
        assert 0 < kind["sparse"] < kind["dense"]
    parameters = sum(p.numel() for p in densify(copy.deepcopy(model)).parameters())
    buffers = sum(b.nbytes for b in densify(copy.deepcopy(model)).buffers())
    assert times.held["dense"] == 3 * 4 * parameters + buffers  # weights, gradients, momentum
    assert times.peak["dense"] > times.held["dense"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_dense_model_has_no_sparse_time():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    times = time_step(model, *batch(), CrossEntropy(), rounds=1)
    assert isinstance(times, StepTimes)
    assert times.sparse_ms is None
    assert list(times.held) == list(times.peak) == ["dense"]
