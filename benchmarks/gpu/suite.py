"""What is raced on a GPU: whole steps, every convolution of ResNet-18, linear layers.

Levels and races are in the order of their worth, should time run out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from benchmarks.cases import LINEAR_LAYERS, conv_layers
from benchmarks.gpu import networks
from benchmarks.gpu.competitors import COMPETITORS
from benchmarks.gpu.device import describe, gpu
from benchmarks.gpu.races import STEP_LAYOUTS, GpuLayerRace, GpuStepRace
from sparsekd.bench.cases import LayerCase, ModelCase
from sparsekd.bench.results import Results
from sparsekd.bench.suite import BenchConfig, Suite
from sparsekd.bench.tables import Grid, shortfall_grid
from sparsekd.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NETWORKS = "benchmarks.gpu.networks"
_STEPS = tuple(
    ModelCase(f"{_NETWORKS}:{name}", networks.IMAGE, batch=64) for name in ("resnet50", "vit_b")
)
_SMALL_STEPS = tuple(ModelCase(name) for name in ("resnet18", "resnet50", "wrn22_2"))
_TINY_STEPS = (ModelCase("resnet20", (3, 8, 8), batch=2),)
_TINY_LAYERS = (
    LayerCase("conv", 32, 64, size=4, kernel=3, stride=2, batch=2),
    LayerCase("linear", 64, 32, batch=4),
)


def suite(device: torch.device | None = None, *, tiny: bool = False) -> Suite:
    """Return the suite of a device.

    Args:
        device: by default the current GPU, which is looked for when the suite runs.
        tiny: one network at a batch of 2 and a small layer of each kind, as a test runs.
    """

    def layers(config: BenchConfig) -> Iterator[GpuLayerRace]:
        _refuse_choices(config)
        cases = _TINY_LAYERS if tiny else (*conv_layers(("resnet18",)), *LINEAR_LAYERS)
        for op in ("layer", "fprop"):
            for case in cases:
                if op == "layer" or case.kind == "linear":
                    yield GpuLayerRace(case, device or gpu(), config.rounds or 5, op)

    def steps(config: BenchConfig) -> Iterator[GpuStepRace]:
        _refuse_choices(config)
        # Short races: what one has measured is written at its end, and lost if that is too late.
        cases, sparsities = (_TINY_STEPS, (0.9,)) if tiny else (_STEPS, (0.9, 0.95, 0.8))
        for sparsity, layout, case in itertools.product(sparsities, STEP_LAYOUTS, cases):
            where = device or gpu()
            yield GpuStepRace(case, where, config.rounds or 5, (layout,), (sparsity,))

    def small(config: BenchConfig) -> Iterator[GpuStepRace]:
        _refuse_choices(config)
        for case in () if tiny else _SMALL_STEPS:
            yield GpuStepRace(case, device or gpu(), config.rounds or 5)

    return Suite(
        title="The arena on a GPU",
        command="python -m benchmarks.gpu",
        help="Time layers and training steps on a GPU against dense torch in every precision.",
        levels={"step": steps, "layer": layers, "small": small},
        competitors=tuple(COMPETITORS),
        grids=_grids,
        figures=_figures,
        machine=lambda: describe(device or gpu()),
        ours=lambda name: name in COMPETITORS and COMPETITORS[name].ours,
    )


def _refuse_choices(config: BenchConfig) -> None:
    """Raise UnsupportedError for what cannot be chosen on a GPU, instead of leaving it aside."""
    for name in ("networks", "input_shape", "sparsities", "competitors", "batch"):
        if getattr(config, name) is not None:
            raise UnsupportedError(f"{name}: expected none, on a GPU only levels and rounds vary")


def _grids(results: Results) -> list[Grid | None]:
    from benchmarks.gpu.report import grids  # matplotlib: not worth loading to measure

    return [*grids(results), shortfall_grid(results)]


def _figures(results: Results) -> dict[str, Figure | None]:
    from benchmarks.gpu.report import figures

    return figures(results)
