"""What is raced on a GPU: every convolution of ResNet-18, linear layers, whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from benchmarks.cases import LINEAR_LAYERS, conv_layers
from benchmarks.gpu.competitors import COMPETITORS
from benchmarks.gpu.device import describe, gpu
from benchmarks.gpu.races import GpuLayerRace, GpuStepRace
from sparsekd.bench.cases import LayerCase, ModelCase
from sparsekd.bench.results import Results
from sparsekd.bench.suite import BenchConfig, Suite
from sparsekd.bench.tables import Grid, shortfall_grid
from sparsekd.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TINY_LAYERS = (
    LayerCase("conv", 32, 64, size=4, kernel=3, stride=2, batch=2),
    LayerCase("linear", 64, 32, batch=4),
)


def suite(device: torch.device | None = None, *, tiny: bool = False) -> Suite:
    """Return the suite of a device.

    Args:
        device: by default the current GPU, which is looked for when the suite runs.
        tiny: a small layer of each kind and one network at a batch of 2, as a test runs.
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
        names = ("resnet18", "resnet50", "wrn22_2")
        cases = [ModelCase(name) for name in names]
        if tiny:
            cases = [ModelCase("resnet20", (3, 8, 8), batch=2)]
        for case in cases:
            yield GpuStepRace(case, device or gpu(), config.rounds or 5)

    return Suite(
        title="The arena on a GPU",
        command="python -m benchmarks.gpu",
        help="Time layers and training steps on a GPU against dense torch in every precision.",
        levels={"layer": layers, "step": steps},
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
