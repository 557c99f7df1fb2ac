"""Races of layers and training steps on a GPU, against cuDNN and cuBLAS.

Dense runs in every precision that it has fast units for. A sparse competitor is compared with the
fastest of them all, whatever its own precision, which on tensor cores is most often bfloat16. A
layout has masks of its own, so each is compared with dense torch on its own mask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.competitors import COMPETITORS, CSR, EXACT, GpuCompetitor
from sparsekd.bench import gate
from sparsekd.bench.cases import LayerCase, ModelCase, dense_ends
from sparsekd.bench.layers import RESULTS, WEIGHT_GRADIENT, laid_out, layer_bounds
from sparsekd.bench.race import Entry, Key, Ready, take_turns
from sparsekd.diagnose import flops
from sparsekd.layouts import Layout
from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparsify
from sparsekd.sparsity import generator_for
from sparsekd.train import CrossEntropy, Row
from sparsekd.train.step_time import training_step

SPARSITIES = (0.8, 0.9, 0.95)
STEP_LAYOUTS = ("csr", "bcsr", "fanin")
_SLOW = 0.5  # seconds


def _keys(
    competitors: Mapping[str, GpuCompetitor], sparsities: Sequence[float] = SPARSITIES
) -> list[Key]:
    """Pair every competitor with its sparsities: none if it is dense, one if it is 2:4."""
    keys: list[Key] = []
    for name, one in competitors.items():
        fixed = one.layout is not None and one.layout.name == "nm"
        keys += [(name, s) for s in ((0.5,) if fixed else sparsities if one.sparse else (None,))]
    return keys


@dataclass(frozen=True)
class GpuLayerRace:
    """A race over one layer.

    Args:
        case: the layer.
        device: where.
        rounds: turns of each competitor.
        op: "layer" for forward and backward, "fprop" for inference.
    """

    case: LayerCase
    device: torch.device
    rounds: int
    op: str = "layer"

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("gpu layer", self.case.name, self.op)

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return _keys(COMPETITORS)

    def measure(self) -> list[Row]:
        """Measure them."""
        return take_turns(self._entries(), rounds=self.rounds, slow=_SLOW, device=self.device)

    def _entries(self) -> Iterator[Entry]:
        for name, sparsity in self.keys():
            one = COMPETITORS[name]
            row = {
                "arm": name,
                "sparsity": sparsity,
                "batch": self.case.batch,
                "layer": asdict(self.case),
                "baseline": not one.sparse,
            }
            if reason := one.missing(self.case, self.op, self.device):
                row["skipped"] = reason
            yield row, partial(self._ready, one, sparsity or 0.0)

    def _ready(self, one: GpuCompetitor, sparsity: float) -> Ready:
        layer = _layer(self.case, one.layout or CSR, sparsity, self.device)
        maps = _maps(self.case, self.device)
        expected = _call(densify(copy.deepcopy(layer)).double(), maps, EXACT, self.op)()
        mask = layer.topology.mask()
        call = _call(_stored(layer, one), maps, one, self.op)
        names = RESULTS if self.op == "layer" else RESULTS[:1]
        right = dict(zip(names, expected, strict=True))
        got = dict(zip(names, call(), strict=True))
        if one.sparse and self.op == "layer":
            right[WEIGHT_GRADIENT] = right[WEIGHT_GRADIENT][mask]
        errors = gate.compare(got, right)
        return Ready(call, errors, layer_bounds(self.case, one.precision))


def _layer(
    case: LayerCase, layout: Layout, sparsity: float, device: torch.device
) -> SparseConv2d | SparseLinear:
    """Build the sparse layer of a case, the same one every time."""
    options: dict[str, Any] = {
        "bias": False, "sparsity": sparsity, "layout": layout, "seed": 0, "device": device,
    }  # fmt: skip
    if case.kind == "linear":
        return SparseLinear(case.channels, case.outs, **options)
    where = (case.channels, case.outs, case.kernel, case.stride, case.padding)
    return SparseConv2d(*where, **options)


def _maps(case: LayerCase, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = generator_for(0, case.name)
    shapes = (case.input_shape, case.output_shape)
    x, grad = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return x, grad


def _stored(layer: SparseConv2d | SparseLinear, one: GpuCompetitor) -> nn.Module:
    """Return a layer in the competitor's storage and dtype."""
    if one.sparse and one.storage == "weight":
        return layer.to(one.dtype)
    dense = densify(layer).to(one.dtype)
    if one.channels_last:
        dense = dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if one.layout is not None:
        weight = dense.get_parameter("weight").detach()
        if one.storage == "2:4":
            weight = torch.sparse.to_sparse_semi_structured(weight)
        else:
            weight = weight.to_sparse_bsr(one.layout.tile)
        dense.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return dense


def _call(
    module: nn.Module, maps: tuple[Tensor, Tensor], one: GpuCompetitor, op: str
) -> Callable[[], tuple[Tensor, ...]]:
    """Prepare a layer's forward and backward pass, or its forward pass alone."""
    layout = torch.channels_last if one.channels_last else torch.contiguous_format
    x, grad = (laid_out(tensor, layout, one.dtype) for tensor in maps)

    def forward() -> tuple[Tensor, ...]:
        with one.rules(), torch.no_grad():
            return (module(x),)

    def both() -> tuple[Tensor, ...]:
        with one.rules():
            y = module(x)
            return (y, *torch.autograd.grad(y, inputs, grad))

    if op == "fprop":
        return forward
    inputs = (x.requires_grad_(), next(module.parameters()))
    return both


@dataclass(frozen=True)
class GpuStepRace:
    """A race over whole training steps of one network.

    Args:
        case: the network.
        device: where.
        rounds: turns of each competitor.
        layouts: names of those whose competitors run beside the dense ones.
        sparsities: of these.
    """

    case: ModelCase
    device: torch.device
    rounds: int
    layouts: Collection[str] = STEP_LAYOUTS
    sparsities: Sequence[float] = SPARSITIES

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("gpu step", self.case.title, "step")

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        chosen = {
            name: one
            for name, one in COMPETITORS.items()
            if one.storage == "weight" and (one.layout is None or one.layout.name in self.layouts)
        }
        return _keys(chosen, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them."""
        return take_turns(self._entries(), rounds=self.rounds, slow=_SLOW, device=self.device)

    def _entries(self) -> Iterator[Entry]:
        for name, sparsity in self.keys():
            one = COMPETITORS[name]
            model = self._model(one, sparsity)
            counted = flops.count(
                copy.deepcopy(model).to("meta"), (self.case.batch, *self.case.input_shape)
            )
            row = {
                "arm": name,
                "sparsity": sparsity,
                "batch": self.case.batch,
                "nnz": counted.nnz,
                "flops": counted.train,
                "baseline": not one.sparse,
            }
            yield row, partial(self._ready, one, model)

    def _model(self, one: GpuCompetitor, sparsity: float | None) -> nn.Module:
        model = self.case.build()
        if one.layout is not None and sparsity is not None:
            sparsify(
                model, sparsity, "uniform", skip=dense_ends(model), layout=one.layout, init="sparse"
            )
        return model

    def _ready(self, one: GpuCompetitor, model: nn.Module) -> Ready:
        generator = generator_for(0, self.case.name)
        x = torch.randn(self.case.batch, *self.case.input_shape, generator=generator)
        y = torch.randint(0, 10, (self.case.batch,), generator=generator).to(self.device)
        x = x.to(self.device)
        reference = densify(copy.deepcopy(model)).to(self.device)
        with COMPETITORS["dense_fp32"].rules():
            expected = training_step(reference, CrossEntropy())(x, y)
        model = model.to(self.device)
        if one.channels_last:
            x = x.to(memory_format=torch.channels_last)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = training_step(_Lowered(model, one), CrossEntropy())

        def call() -> Tensor:
            with one.rules():
                return step(x, y)

        # Rounding differences grow through a network; the layers are held to their bounds above.
        bound = {"loss": 16 * torch.finfo(one.precision).eps + 1e-3}
        errors = gate.compare({"loss": call()}, {"loss": expected}, gate.overall_error)
        return Ready(call, errors, bound)


class _Lowered(nn.Module):
    """A model in a competitor's precision: bfloat16 by autocast, the loss behind it in float32."""

    def __init__(self, model: nn.Module, one: GpuCompetitor) -> None:
        super().__init__()
        self.model, self._dtype = model, one.dtype

    def forward(self, x: Tensor) -> Tensor:
        lowered = self._dtype != torch.float32
        with torch.autocast(x.device.type, self._dtype, enabled=lowered):
            return self.model(x).float()
