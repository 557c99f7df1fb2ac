"""Each pass of some layers by itself: `python -m pytest benchmarks/micro`.

One group a layer and pass. The competitors are those of the arena's level `op`, which takes them in
turns and gives the published figures; here each runs by itself, for work on one kernel.
"""

from __future__ import annotations

import pytest

from benchmarks.arena.passes import PASSES, pass_competitors
from benchmarks.cases import LINEAR_LAYERS
from sparsekd.bench.cases import LayerCase
from sparsekd.bench.layers import layer_problem

LAYERS = (
    LayerCase("conv", 64, 64, size=32, kernel=3),
    LayerCase("conv", 256, 64, size=32),
    LayerCase("conv", 256, 256, size=8, kernel=3),
    LayerCase("conv", 512, 512, size=4, kernel=3),
    LINEAR_LAYERS[0],
)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
ENTRIES = [
    (competitor.name, sparsity)
    for competitor in pass_competitors("fprop").values()
    for sparsity in (SPARSITIES if competitor.sparse else SPARSITIES[:1])
]


@pytest.mark.parametrize("competitor, sparsity", ENTRIES)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda case: case.name)
def test_pass(benchmark, layer: LayerCase, name: str, competitor: str, sparsity: float) -> None:
    """Time one pass of one layer."""
    benchmark.group = f"{layer.name} {name}"
    chosen = pass_competitors(name)[competitor]
    if reason := chosen.missing(layer):
        pytest.skip(reason)
    run = chosen.build(layer_problem(layer, sparsity))
    benchmark.pedantic(run.call, rounds=5, warmup_rounds=1)
