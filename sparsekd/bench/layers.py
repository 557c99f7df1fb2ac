"""Races over a layer: dense torch, its CSR tensors and sparsekd.

A competitor turns a `LayerProblem` into a call that runs forward and backward. All competitors get
the same input, output gradient and masked weight, each in the memory format and dtype it likes
best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekd._torch import onednn_computes
from sparsekd.bench import csr, gate
from sparsekd.bench.cases import REFERENCE, LayerCase
from sparsekd.bench.race import Competitor, Race, Ready, by_name
from sparsekd.nn import SparseConv2d, SparseLinear
from sparsekd.sparsity import generator_for, random_mask
from sparsekd.sparsity.rounding import target_nnz
from sparsekd.train import Row

Function = Callable[[Tensor], Tensor]
Maps = Callable[..., Tensor]
WEIGHT_GRADIENT = "weight gradient"
RESULTS = ("output", "input gradient", WEIGHT_GRADIENT)
RIVALS_FROM = 0.8
"""Lowest sparsity that other packages are timed at; below, they take seconds and always lose."""


def layer_maps(case: LayerCase) -> Maps:
    """Draw the input and output gradient of a layer.

    Returns:
        A function of "x" or "grad", a memory format and a dtype that lays one of them out, and
        keeps the copy: all competitors share it.
    """
    generator = generator_for(0, case.name)
    shapes = {"x": case.input_shape, "grad": case.output_shape}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return cache(lambda name, *form: laid_out(drawn[name], *form))


@dataclass(frozen=True)
class LayerProblem:
    """One layer at one sparsity: what every competitor is given.

    Args:
        case: the layer.
        maps: its input and the gradient of its output, from `layer_maps`.
        weight: dense, with zeros outside the mask.
        mask: where the nonzeros are.
    """

    case: LayerCase
    maps: Maps
    weight: Tensor
    mask: Tensor

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return int(self.mask.sum())

    def inputs(self, layout: torch.memory_format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the input, which requires a gradient, and the gradient of the output."""
        x, grad = (self.maps(name, layout, dtype) for name in ("x", "grad"))
        return x.detach().requires_grad_(), grad


def layer_problem(case: LayerCase, sparsity: float, maps: Maps | None = None) -> LayerProblem:
    """Draw weight and mask of a layer, and maps if there are none yet, the same ones every time.

    Example:
        >>> layer_problem(LayerCase("linear", 20, 10, batch=4), 0.9).nnz
        20
    """
    generator = generator_for(0, f"{case.name} weight")
    weight = torch.randn(case.weight_shape, generator=generator) / case.fan_in**0.5
    nnz = target_nnz(case.outs * case.fan_in, sparsity)
    mask = random_mask(case.weight_shape, nnz, generator=generator_for(0, f"{case.name} mask"))
    return LayerProblem(case, maps or layer_maps(case), weight * mask, mask)


class LayerRun(NamedTuple):
    """A competitor that is ready to compute a layer.

    Args:
        call: what is timed; returns one tensor a name.
        names: of the results.
        nonzeros: takes the entries of a weight gradient at the mask, in row-major order.
        plain: returns a named result as torch has it, where the call has another layout.
    """

    call: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...]
    nonzeros: Function
    plain: Callable[[str, Tensor], Tensor] = lambda _, result: result

    def results(self) -> dict[str, Tensor]:
        """Run once and name the results."""
        found = {
            name: self.plain(name, result)
            for name, result in zip(self.names, self.call(), strict=True)
        }
        if WEIGHT_GRADIENT in found:
            found[WEIGHT_GRADIENT] = self.nonzeros(found[WEIGHT_GRADIENT])
        return found


LayerCompetitor = Competitor[LayerProblem, LayerRun]
Build = Callable[[LayerProblem], LayerRun]
_Given = tuple[LayerProblem, dict[str, Tensor]]  # with its right results


def _both_passes(
    forward: Function, x: Tensor, weight: Tensor, grad: Tensor, nonzeros: Function
) -> LayerRun:
    def call() -> tuple[Tensor, ...]:
        y = forward(x)
        return (y, *torch.autograd.grad(y, (x, weight), grad))

    return LayerRun(call, RESULTS, nonzeros)


def _dense(layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> Build:
    def build(problem: LayerProblem) -> LayerRun:
        case = problem.case
        x, grad = problem.inputs(layout, dtype)
        weight = laid_out(problem.weight, layout, dtype).requires_grad_()

        def forward(x: Tensor) -> Tensor:
            if case.kind == "linear":
                return F.linear(x, weight)
            return F.conv2d(x, weight, None, case.stride, case.padding)

        return _both_passes(forward, x, weight, grad, lambda gradient: gradient[problem.mask])

    return build


def sparse_layer(problem: LayerProblem) -> SparseConv2d | SparseLinear:
    """Build a layer with the weight of a problem."""
    case = problem.case
    if case.kind == "linear":
        linear = nn.Linear(case.channels, case.outs, bias=False)
        linear.weight.data = problem.weight
        return SparseLinear.from_dense(linear, problem.mask)
    window = (case.kernel, case.stride, case.padding)
    conv = nn.Conv2d(case.channels, case.outs, *window, bias=False)
    conv.weight.data = problem.weight
    return SparseConv2d.from_dense(conv, problem.mask)


def _sparsekd(layout: torch.memory_format) -> Build:
    def build(problem: LayerProblem) -> LayerRun:
        layer = sparse_layer(problem)
        x, grad = problem.inputs(layout, torch.float32)
        return _both_passes(layer, x, layer.values, grad, lambda gradient: gradient)

    return build


def foreign(build: Callable[..., tuple[Function, Tensor, Tensor]]) -> Build:
    """Wrap the layer of another package, which gets contiguous tensors.

    Args:
        build: takes weight, input, output gradient, stride and padding; returns the forward pass,
            the trainable nonzeros, and where among them those of the dense weight are, row by row.
    """

    def prepare(problem: LayerProblem) -> LayerRun:
        case = problem.case
        x, grad = problem.inputs(torch.contiguous_format, torch.float32)
        forward, values, order = build(problem.weight, x, grad, case.stride, case.padding)
        return _both_passes(forward, x, values, grad, lambda gradient: gradient[order])

    return prepare


def laid_out(
    tensor: Tensor, layout: torch.memory_format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Copy a tensor into a memory format; a matrix has only one."""
    layout = layout if tensor.ndim == 4 else torch.contiguous_format
    return tensor.detach().to(dtype).clone(memory_format=layout)


def bf16_missing(case: object) -> str | None:
    """Return why bfloat16 is not timed here: without instructions for it, it is emulated."""
    if onednn_computes(torch.bfloat16):
        return None
    return "this processor, or the instruction set it is held to, has no bfloat16"


def maps_only(case: LayerCase) -> str | None:
    """Return why a competitor in channels_last does not run a linear layer."""
    return "a matrix has no channels_last layout" if case.kind == "linear" else None


_LAST, _CONTIGUOUS, _BF16 = torch.channels_last, torch.contiguous_format, torch.bfloat16
DENSE_LAYERS = by_name(
    LayerCompetitor("dense_contiguous", "dense, contiguous", _dense(_CONTIGUOUS)),
    LayerCompetitor("dense_channels_last", "dense, channels_last", _dense(_LAST), maps_only),
    LayerCompetitor(
        "dense_bf16", "dense, bfloat16", _dense(_LAST, _BF16), bf16_missing, dtype=_BF16
    ),
    LayerCompetitor(
        "torch_csr", "torch.sparse CSR", foreign(csr.layer), csr.missing, True, least=RIVALS_FROM
    ),
)
OUR_LAYERS = by_name(
    LayerCompetitor("sparsekd", "sparsekd, channels_last", _sparsekd(_LAST), sparse=True),
    LayerCompetitor(
        "sparsekd_contiguous", "sparsekd, contiguous", _sparsekd(_CONTIGUOUS), maps_only, True
    ),
)
LAYER_COMPETITORS = {**DENSE_LAYERS, **OUR_LAYERS}


@dataclass(frozen=True)
class LayerRace(Race):
    """A race over forward and backward of one layer."""

    slow = 0.06
    passes = 3

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("layer", self.case.name, "layer")

    def _problems(self) -> Iterator[_Given]:
        maps = layer_maps(self.case)
        for sparsity in self.sparsities:
            problem = layer_problem(self.case, sparsity, maps)
            yield problem, self.competitors[REFERENCE].build(problem).results()

    def _work(self, competitor: LayerCompetitor, given: _Given) -> Row:
        nnz = given[0].nnz if competitor.sparse else given[0].mask.numel()
        return {"nnz": nnz, "flops": self.passes * self.case.flops(nnz), "layer": asdict(self.case)}

    def _ready(self, competitor: LayerCompetitor, given: _Given) -> Ready:
        problem, expected = given
        run = competitor.build(problem)
        bounds = layer_bounds(self.case, competitor.dtype)
        return Ready(run.call, gate.compare(run.results(), expected), bounds)


def layer_bounds(case: LayerCase, dtype: torch.dtype) -> dict[str, float]:
    """Return how far each result of a layer may be off, by the terms of its sums."""
    terms = (case.fan_in, case.outs * case.kernel**2, case.positions)
    return {name: gate.tolerance(n, dtype) for name, n in zip(RESULTS, terms, strict=True)}
