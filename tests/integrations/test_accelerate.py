"""A loop of accelerate equals the plain loop bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plain_loops import OPTIONS, assert_same, network, plain, sgd
from torch import nn

import sparsekd as skd


def prepared(accelerate: Any, accumulate: int = 1) -> tuple[Any, Any, Any, Any]:
    from sparsekd.integrations.accelerate import SparseTraining

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    model, optimizer = accelerator.prepare(model, sgd(model))
    sparse = SparseTraining(accelerator, model, optimizer, skd.dst.RigL, **OPTIONS)
    return accelerator, model, optimizer, sparse


def train(accelerator: Any, model: Any, optimizer: Any, sparse: Any, batches: Any) -> None:
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if not sparse.step():
                optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loop_equals_the_plain_one(accelerate, batches, accumulate: int) -> None:
    parts = prepared(accelerate, accumulate)
    batches = batches[:10]
    train(*parts, batches)
    assert_same(parts[1], plain(batches, accumulate))
    assert parts[3].method.iteration == 10 // accumulate


def test_a_resumed_loop_equals_one_without_a_stop(accelerate, batches, tmp_path: Path) -> None:
    first = prepared(accelerate)
    train(*first, batches[:5])
    first[0].save_state(tmp_path)
    second = prepared(accelerate)
    second[0].load_state(tmp_path)
    assert second[3].method.iteration == 5
    train(*second, batches[5:])
    assert_same(second[1], plain(batches))
