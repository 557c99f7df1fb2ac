"""A whole training step of some networks: `python -m pytest benchmarks/e2e`.

One group a network. The arms are those of `sparsekd bench --level step`, which takes them in turns
and gives the published figures; here each runs by itself, for work on one of them.
"""

from __future__ import annotations

import pytest

from sparsekd.bench.cases import MODELS
from sparsekd.bench.steps import STEP_ARMS, contest

CONTESTS = [
    (arm.name, sparsity)
    for arm in STEP_ARMS.values()
    for sparsity in ((0.8, 0.9, 0.98) if arm.sparse else (0.8,))
]


@pytest.mark.parametrize("arm, sparsity", CONTESTS)
@pytest.mark.parametrize("network", ["resnet18", "resnet20"])
def test_step(benchmark, network: str, arm: str, sparsity: float) -> None:
    """Time one training step of one network."""
    benchmark.group = network
    chosen = STEP_ARMS[arm]
    if reason := chosen.missing():
        pytest.skip(reason)
    run = chosen.build(contest(MODELS[network], sparsity))
    benchmark.pedantic(run.call, rounds=3, warmup_rounds=1)
