"""The competitors on a layer: dense torch, its CSR tensors and sparsekd.

A competitor turns a `LayerProblem` into a call that runs forward and backward. All competitors get
the same input, output gradient and masked weight, each in the memory format and dtype it likes
best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekd._torch import onednn_computes
from sparsekd.bench import csr
from sparsekd.bench.cases import LayerCase
from sparsekd.bench.competitor import Competitor, by_name
from sparsekd.nn import SparseConv2d, SparseLinear
from sparsekd.sparsity import generator_for, random_mask
from sparsekd.sparsity.rounding import target_nnz

WEIGHT_GRADIENT = "weight gradient"
RESULTS = ("output", "input gradient", WEIGHT_GRADIENT)
RIVALS_FROM = 0.8
"""Lowest sparsity that other packages are timed at; below, they take seconds and always lose."""


class Maps:
    """Input and output gradient of a layer in any memory format, shared by all competitors.

    Args:
        case: the layer; its maps are drawn at once, contiguous and in float32.
    """

    def __init__(self, case: LayerCase) -> None:
        generator = generator_for(0, case.name)
        self._drawn = {
            "x": torch.randn(case.input_shape, generator=generator),
            "grad": torch.randn(case.output_shape, generator=generator),
        }
        self._copies: dict[tuple[str, torch.memory_format, torch.dtype], Tensor] = {}

    def get(
        self, name: str, layout: torch.memory_format, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return "x" or "grad" in a memory format, outside of any graph."""
        if (name, layout, dtype) not in self._copies:
            self._copies[name, layout, dtype] = laid_out(self._drawn[name], layout, dtype)
        return self._copies[name, layout, dtype].detach()


@dataclass(frozen=True)
class LayerProblem:
    """One layer at one sparsity: what every competitor is given.

    Args:
        case: the layer.
        maps: its input and the gradient of its output.
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
        x, grad = (self.maps.get(name, layout, dtype) for name in ("x", "grad"))
        return x.requires_grad_(), grad


def layer_problem(case: LayerCase, sparsity: float, maps: Maps | None = None) -> LayerProblem:
    """Draw maps, weight and mask of a layer, the same ones every time.

    Args:
        case: the layer.
        sparsity: of its weight.
        maps: of an earlier problem of the same layer.

    Example:
        >>> layer_problem(LayerCase("linear", 20, 10, batch=4), 0.9).nnz
        20
    """
    generator = generator_for(0, f"{case.name} weight")
    weight = torch.randn(case.weight_shape, generator=generator) / case.fan_in**0.5
    nnz = target_nnz(case.outs * case.fan_in, sparsity)
    mask = random_mask(case.weight_shape, nnz, generator=generator_for(0, f"{case.name} mask"))
    return LayerProblem(case, maps or Maps(case), weight * mask, mask)


class LayerRun(NamedTuple):
    """A competitor that is ready to compute a layer.

    Args:
        call: what is timed; returns one tensor a name.
        names: of the results.
        nonzeros: takes the entries of a weight gradient at the mask, in row-major order.
    """

    call: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...]
    nonzeros: Callable[[Tensor], Tensor]

    def results(self) -> dict[str, Tensor]:
        """Run once and name the results."""
        found = dict(zip(self.names, self.call(), strict=True))
        if WEIGHT_GRADIENT in found:
            found[WEIGHT_GRADIENT] = self.nonzeros(found[WEIGHT_GRADIENT])
        return found


LayerCompetitor = Competitor[LayerProblem, LayerRun]
Build = Callable[[LayerProblem], LayerRun]


def _both_passes(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    nonzeros: Callable[[Tensor], Tensor],
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


def _sparsekd(layout: torch.memory_format) -> Build:
    def build(problem: LayerProblem) -> LayerRun:
        layer = sparse_layer(problem)
        x, grad = problem.inputs(layout, torch.float32)
        return _both_passes(layer, x, layer.values, grad, lambda gradient: gradient)

    return build


def sparse_layer(problem: LayerProblem) -> SparseConv2d | SparseLinear:
    """Build the sparse module of a problem."""
    case = problem.case
    if case.kind == "linear":
        linear = nn.Linear(case.channels, case.outs, bias=False)
        linear.weight.data = problem.weight
        return SparseLinear.from_dense(linear, problem.mask)
    window = (case.kernel, case.stride, case.padding)
    conv = nn.Conv2d(case.channels, case.outs, *window, bias=False)
    conv.weight.data = problem.weight
    return SparseConv2d.from_dense(conv, problem.mask)


def foreign(build: Callable[..., tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]) -> Build:
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
