"""The competitors in a single pass of a layer: torch's kernels and ours, each in both layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd import ops
from sparsekd.bench.layers import (
    RESULTS,
    LayerCompetitor,
    LayerProblem,
    LayerRace,
    LayerRun,
    laid_out,
    maps_only,
)
from sparsekd.bench.race import runs_anywhere
from sparsekd.topology import Topology

PASSES = ("fprop", "dgrad", "wgrad")
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class PassRace(LayerRace):
    """A race over a single pass of one layer.

    Args:
        op: one of `PASSES`, which the competitors compute.
    """

    op: str

    passes = 1

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("op", self.case.name, self.op)


def pass_competitors(name: str) -> dict[str, LayerCompetitor]:
    """List the competitors in one pass.

    Args:
        name: "fprop", "dgrad" or "wgrad".

    Returns:
        The competitors by name.

    Example:
        >>> list(pass_competitors("fprop"))[:2]
        ['dense_contiguous', 'sparsekd_contiguous']
    """
    result = RESULTS[PASSES.index(name)]
    found = {}
    for layout, memory_format in _LAYOUTS.items():
        missing = runs_anywhere if layout == "contiguous" else maps_only
        for kind, build in (("dense", _dense), ("sparsekd", _sparse)):
            found[f"{kind}_{layout}"] = LayerCompetitor(
                f"{kind}_{layout}",
                f"{kind}, {layout}",
                partial(build, name=name, result=result, layout=memory_format),
                missing,
                sparse=kind == "sparsekd",
            )
    return found


def _dense(problem: LayerProblem, name: str, result: str, layout: torch.memory_format) -> LayerRun:
    case = problem.case
    x, grad = (problem.maps(name, layout) for name in ("x", "grad"))
    weight = laid_out(problem.weight, layout)
    stride, padding = [case.stride] * 2, [case.padding] * 2
    call: Callable[[], Tensor]
    if case.kind == "linear":
        call = {
            "fprop": lambda: F.linear(x, weight),
            "dgrad": lambda: grad @ weight,
            "wgrad": lambda: grad.T @ x,
        }[name]
    elif name == "fprop":

        def call() -> Tensor:
            return F.conv2d(x, weight, None, stride, padding)
    else:
        wanted = [name == "dgrad", name == "wgrad", False]

        def call() -> Tensor:
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
            )[wanted.index(True)]

    return LayerRun(lambda: (call(),), (result,), lambda gradient: gradient[problem.mask])


def _sparse(problem: LayerProblem, name: str, result: str, layout: torch.memory_format) -> LayerRun:
    case = problem.case
    x, grad = (problem.maps(name, layout) for name in ("x", "grad"))
    topology = Topology.from_mask(problem.mask)
    indices = (topology.crow_indices, topology.col_indices)
    values = problem.weight.reshape(-1)[topology.flat_indices()]
    shape = list(case.weight_shape)
    window = (shape, [case.stride] * 2, [case.padding] * 4, [1, 1], 1)
    if case.kind == "linear":
        call = {
            "fprop": lambda: ops.linear(x, values, *indices, None, shape),
            "dgrad": lambda: ops.linear_dgrad(grad, values, *indices, shape),
            "wgrad": lambda: ops.linear_wgrad(grad, x, *indices, shape),
        }[name]
    else:
        call = {
            "fprop": lambda: ops.conv2d(x, values, *indices, None, *window),
            "dgrad": lambda: ops.conv2d_dgrad(grad, values, *indices, list(x.shape), *window),
            "wgrad": lambda: ops.conv2d_wgrad(grad, x, *indices, *window),
        }[name]

    def kernel() -> tuple[Tensor]:
        with ops.backend("cpp"):  # the sparse kernel, also where a layer would run dense
            return (call(),)

    return LayerRun(kernel, (result,), lambda gradient: gradient)
