"""A whole training step of some networks: `python -m pytest benchmarks/e2e`.

One group a network. The competitors are those of the arena's level `step`, which takes them in
turns and gives the published figures; here each runs by itself, for work on one of them.
"""

from __future__ import annotations

import pytest

from benchmarks.arena.competitors import STEPS
from benchmarks.cases import MODELS
from sparsekd.bench.steps import step_problem

ENTRIES = [
    (competitor.name, sparsity)
    for competitor in STEPS.values()
    for sparsity in ((0.8, 0.9, 0.98) if competitor.sparse else (0.8,))
]


@pytest.mark.parametrize("competitor, sparsity", ENTRIES)
@pytest.mark.parametrize("network", ["resnet18", "resnet20"])
def test_step(benchmark, network: str, competitor: str, sparsity: float) -> None:
    """Time one training step of one network."""
    benchmark.group = network
    chosen = STEPS[competitor]
    if reason := chosen.missing(MODELS[network]):
        pytest.skip(reason)
    run = chosen.build(step_problem(MODELS[network], sparsity))
    benchmark.pedantic(run.call, rounds=3, warmup_rounds=1)
