"""Who competes on a layer: dense torch, its CSR tensors, sparsekd, and installed rivals.

An arm turns a `Problem` into a call that runs forward and backward once. All arms of a problem see
the same input, output gradient and masked weight, each in the layout and dtype it likes best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekd._torch import onednn_computes
from sparsekd.bench import csr, rivals
from sparsekd.bench.cases import LayerCase
from sparsekd.nn import SparseConv2d, SparseLinear
from sparsekd.sparsity import generator_for, random_mask
from sparsekd.sparsity.rounding import target_nnz

WEIGHT_GRADIENT = "weight gradient"
RESULTS = ("output", "input gradient", WEIGHT_GRADIENT)


class Maps:
    """Hold input and output gradient of a layer in every layout asked for; all arms share them.

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
        """Return "x" or "grad" in a layout, outside of any graph."""
        if (name, layout, dtype) not in self._copies:
            self._copies[name, layout, dtype] = laid_out(self._drawn[name], layout, dtype)
        return self._copies[name, layout, dtype].detach()


@dataclass(frozen=True)
class Problem:
    """Hold one layer at one sparsity: what every arm is given.

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


def problem(case: LayerCase, sparsity: float, maps: Maps | None = None) -> Problem:
    """Draw maps, weight and mask of a layer, the same ones every time.

    Args:
        case: the layer.
        sparsity: of its weight.
        maps: of an earlier problem of the same layer.

    Returns:
        The problem.

    Example:
        >>> problem(LayerCase("linear", 20, 10, batch=4), 0.9).nnz
        20
    """
    generator = generator_for(0, f"{case.name} weight")
    weight = torch.randn(case.weight_shape, generator=generator) / case.fan_in**0.5
    nnz = target_nnz(case.outs * case.fan_in, sparsity)
    mask = random_mask(case.weight_shape, nnz, generator=generator_for(0, f"{case.name} mask"))
    return Problem(case, maps or Maps(case), weight * mask, mask)


class Run(NamedTuple):
    """Hold what an arm made of a problem.

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


@dataclass(frozen=True)
class LayerArm:
    """Describe one competitor.

    Args:
        name: in rows and options.
        label: in tables and figures.
        build: prepares its run.
        missing: says why it cannot run a layer here, None if it can.
        sparse: whether its time depends on the sparsity; a dense arm is timed once for all.
        dtype: of its operands.
        least: lowest sparsity that it is tried at; below, a rival takes seconds and always loses.
    """

    name: str
    label: str
    build: Callable[[Problem], Run]
    missing: Callable[[LayerCase], str | None]
    sparse: bool
    dtype: torch.dtype = torch.float32
    least: float = 0.0


def _dense(
    layout: torch.memory_format, dtype: torch.dtype = torch.float32
) -> Callable[[Problem], Run]:
    def build(problem: Problem) -> Run:
        case, maps = problem.case, problem.maps
        x, grad = (maps.get(name, layout, dtype) for name in ("x", "grad"))
        weight = laid_out(problem.weight, layout, dtype)
        inputs = (x.requires_grad_(), weight.requires_grad_())

        def call() -> tuple[Tensor, ...]:
            if case.kind == "linear":
                y = F.linear(x, weight)
            else:
                y = F.conv2d(x, weight, None, case.stride, case.padding)
            return (y, *torch.autograd.grad(y, inputs, grad))

        return Run(call, RESULTS, lambda gradient: gradient[problem.mask])

    return build


def _sparsekd(layout: torch.memory_format) -> Callable[[Problem], Run]:
    def build(problem: Problem) -> Run:
        layer = sparse_layer(problem)
        x, grad = (problem.maps.get(name, layout) for name in ("x", "grad"))
        x.requires_grad_()

        def call() -> tuple[Tensor, ...]:
            y = layer(x)
            return (y, *torch.autograd.grad(y, (x, layer.values), grad))

        return Run(call, RESULTS, lambda gradient: gradient)

    return build


def sparse_layer(problem: Problem) -> SparseConv2d | SparseLinear:
    """Build the sparse module of a problem."""
    case = problem.case
    dense: nn.Linear | nn.Conv2d
    if case.kind == "linear":
        dense = nn.Linear(case.channels, case.outs, bias=False)
    else:
        dense = nn.Conv2d(
            case.channels, case.outs, case.kernel, case.stride, case.padding, bias=False
        )
    dense.weight.data = problem.weight
    if isinstance(dense, nn.Linear):
        return SparseLinear.from_dense(dense, problem.mask)
    return SparseConv2d.from_dense(dense, problem.mask)


def _foreign(build: Callable[..., rivals.Layer]) -> Callable[[Problem], Run]:
    """Wrap a layer of another package: contiguous tensors, its own order of the nonzeros."""

    def prepare(problem: Problem) -> Run:
        case = problem.case
        x, grad = (problem.maps.get(name, torch.contiguous_format) for name in ("x", "grad"))
        layer = build(problem.weight, x.requires_grad_(), grad, case.stride, case.padding)

        def call() -> tuple[Tensor, ...]:
            y = layer.forward(x)
            return (y, *torch.autograd.grad(y, (x, layer.values), grad))

        return Run(call, RESULTS, lambda gradient: gradient[layer.order])

    return prepare


def laid_out(
    tensor: Tensor, layout: torch.memory_format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Copy a tensor into a layout; a matrix has only one."""
    layout = layout if tensor.ndim == 4 else torch.contiguous_format
    return tensor.detach().to(dtype).clone(memory_format=layout)


def bf16_missing() -> str | None:
    """Say why bfloat16 is not worth a race here: without instructions for it, it is emulated."""
    if onednn_computes(torch.bfloat16):
        return None
    return "this processor, or the instruction set it is held to, has no bfloat16"


def anywhere(case: LayerCase) -> str | None:
    """Say nothing against any layer."""
    return None


def maps_only(case: LayerCase) -> str | None:
    """Say why an arm in channels_last does not run a linear layer."""
    return "a matrix has no channels_last layout" if case.kind == "linear" else None


_RIVALS = 0.8
_LAST, _CONTIGUOUS = torch.channels_last, torch.contiguous_format
LAYER_ARMS = {
    arm.name: arm
    for arm in (
        LayerArm("dense_contiguous", "dense, contiguous", _dense(_CONTIGUOUS), anywhere, False),
        LayerArm("dense_channels_last", "dense, channels_last", _dense(_LAST), maps_only, False),
        LayerArm(
            "dense_bf16",
            "dense, bfloat16",
            _dense(_LAST, torch.bfloat16),
            lambda case: bf16_missing(),
            False,
            torch.bfloat16,
        ),
        LayerArm(
            "torch_csr", "torch.sparse CSR", _foreign(csr.layer), csr.missing, True, least=_RIVALS
        ),
        LayerArm(
            "sparseprop",
            "SparseProp",
            _foreign(rivals.sparseprop),
            lambda case: rivals.sparseprop_absent(),
            True,
            least=_RIVALS,
        ),
        LayerArm(
            "sparselab",
            "sparselab",
            _foreign(rivals.sparselab),
            rivals.sparselab_missing,
            True,
            least=_RIVALS,
        ),
        LayerArm("sparsekd", "sparsekd, channels_last", _sparsekd(_LAST), anywhere, True),
        LayerArm(
            "sparsekd_contiguous", "sparsekd, contiguous", _sparsekd(_CONTIGUOUS), maps_only, True
        ),
    )
}
