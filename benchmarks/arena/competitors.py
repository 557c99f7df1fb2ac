"""All competitors on a CPU: those of `sparsekd bench` and other packages."""

from __future__ import annotations

from benchmarks.arena import blocked, rivals
from sparsekd.bench.layers import DENSE_LAYERS, OUR_LAYERS, RIVALS_FROM, LayerCompetitor, foreign
from sparsekd.bench.race import by_name
from sparsekd.bench.steps import DENSE_STEPS, OUR_STEPS, SHOWCASE, StepCompetitor

LAYERS = {
    **DENSE_LAYERS,
    **by_name(
        LayerCompetitor(
            "sparseprop", "SparseProp", foreign(rivals.sparseprop), rivals.sparseprop_missing,
            sparse=True, least=RIVALS_FROM,
        ),
        LayerCompetitor(
            "sparselab", "sparselab", foreign(rivals.sparselab), rivals.sparselab_missing,
            sparse=True, least=RIVALS_FROM,
        ),
    ),
    **OUR_LAYERS,
    **by_name(
        LayerCompetitor(
            "sparsekd_blocked", "sparsekd, blocked layout", blocked.layer, blocked.missing,
            sparse=True,
        )
    ),
}  # fmt: skip

STEPS = {
    **DENSE_STEPS,
    **by_name(
        StepCompetitor(
            "sparseprop", "SparseProp", rivals.sparseprop_step, rivals.sparseprop_missing,
            sparse=True, least=RIVALS_FROM, network=SHOWCASE,
        )
    ),
    **OUR_STEPS,
}  # fmt: skip

MAIN = ("dense_contiguous", "dense_channels_last", "sparsekd", "sparsekd_optimized")
"""Those of a step that long measurements are left to."""
