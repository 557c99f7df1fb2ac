"""What `sparsekd bench --device cuda` races: layers and training steps against cuDNN and cuBLAS.

Dense runs in every precision that it has fast units for. A sparse arm is compared with the fastest
of them all, whatever its own precision, which on tensor cores is most often bfloat16. A layout has
masks of its own, so each arm is held against dense torch on its own mask.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd import cuda_library, ops
from sparsekd.bench import gate
from sparsekd.bench.arms import RESULTS, WEIGHT_GRADIENT, laid_out
from sparsekd.bench.cases import LINEAR_LAYERS, LayerCase, ModelCase, conv_layers, dense_ends
from sparsekd.bench.gpu_arms import ARMS, CSR, EXACT, GpuArm
from sparsekd.bench.race import Entry, Key, Ready, race
from sparsekd.diagnose import flops
from sparsekd.layouts import Layout
from sparsekd.nn import SparseConv2d, SparseLinear, densify, sparsify
from sparsekd.sparsity import generator_for
from sparsekd.train import CrossEntropy, Row
from sparsekd.train.step_time import training_step

LEVELS = ("gpu layer", "gpu step")
SPARSITIES = (0.8, 0.9, 0.95)
_SLOW = 0.5  # seconds


def _keys(arms: Mapping[str, GpuArm]) -> list[Key]:
    """Pair every arm with its sparsities: none if it is dense, one if it is 2:4."""
    keys: list[Key] = []
    for name, arm in arms.items():
        fixed = arm.layout is not None and arm.layout.name == "nm"
        keys += [(name, s) for s in ((0.5,) if fixed else SPARSITIES if arm.sparse else (None,))]
    return keys


def sessions(device: torch.device, rounds: int = 5, quick: bool = False) -> list[Any]:
    """List what is raced on a device: every convolution of ResNet-18, linear layers, whole steps.

    Args:
        device: where.
        rounds: turns of each arm.
        quick: the smallest layer of each kind and one network, at a batch of 2, as a test runs.
    """
    layers = [*conv_layers(("resnet18",)), *LINEAR_LAYERS]
    models = [ModelCase("resnet18"), ModelCase("resnet50"), ModelCase("wrn22_2")]
    if quick:
        layers = [
            LayerCase("conv", 32, 64, size=4, kernel=3, stride=2, batch=2),
            LayerCase("linear", 64, 32, batch=4),
        ]
        models = [ModelCase("resnet20", (3, 8, 8), batch=2)]
    races: list[Any] = [GpuLayerRace(case, device, rounds) for case in layers]
    races += [
        GpuLayerRace(case, device, rounds, op="fprop") for case in layers if case.kind == "linear"
    ]
    return races + [GpuStepRace(case, device, rounds) for case in models]


@dataclass(frozen=True)
class GpuLayerRace:
    """Race one layer over all arms and sparsities.

    Args:
        case: the layer.
        device: where.
        rounds: turns of each arm.
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
        return _keys(ARMS)

    def measure(self) -> list[Row]:
        """Measure them."""
        return race(self._entries(), rounds=self.rounds, slow=_SLOW, device=self.device)

    def _entries(self) -> Iterator[Entry]:
        for name, sparsity in self.keys():
            arm = ARMS[name]
            row = {
                "arm": name,
                "sparsity": sparsity,
                "batch": self.case.batch,
                "layer": asdict(self.case),
                "baseline": not arm.sparse,
            }
            missing = arm.missing(self.case, self.op, self.device)
            yield Entry(row, missing, partial(self._ready, arm, sparsity or 0.0))

    def _ready(self, arm: GpuArm, sparsity: float) -> Ready:
        layer = _layer(self.case, arm.layout or CSR, sparsity, self.device)
        maps = _maps(self.case, self.device)
        expected = _call(densify(copy.deepcopy(layer)).double(), maps, EXACT, self.op)()
        mask = layer.topology.mask()
        call = _call(_stored(layer, arm), maps, arm, self.op)
        terms = (self.case.fan_in, self.case.outs * self.case.kernel**2, self.case.positions)
        bounds = {
            name: gate.tolerance(count, arm.precision)
            for name, count in zip(RESULTS, terms, strict=True)
        }
        names = RESULTS if self.op == "layer" else RESULTS[:1]
        right = dict(zip(names, expected, strict=True))
        got = dict(zip(names, call(), strict=True))
        if arm.sparse and self.op == "layer":
            right[WEIGHT_GRADIENT] = right[WEIGHT_GRADIENT][mask]
        errors = gate.compare(got, right)
        return Ready(call, errors, {name: bounds[name] for name in errors})


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


def _stored(layer: SparseConv2d | SparseLinear, arm: GpuArm) -> nn.Module:
    """Return a layer in the arm's storage and dtype."""
    if arm.sparse and arm.storage == "weight":
        return layer.to(arm.dtype)
    dense = densify(layer).to(arm.dtype)
    if arm.channels_last:
        dense = dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if arm.layout is not None:
        weight = dense.get_parameter("weight").detach()
        if arm.storage == "2:4":
            weight = torch.sparse.to_sparse_semi_structured(weight)
        else:
            weight = weight.to_sparse_bsr(arm.layout.tile)
        dense.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return dense


def _call(
    module: nn.Module, maps: tuple[Tensor, Tensor], arm: GpuArm, op: str
) -> Callable[[], tuple[Tensor, ...]]:
    """Prepare a layer's forward and backward pass, or its forward pass alone."""
    layout = torch.channels_last if arm.channels_last else torch.contiguous_format
    x, grad = (laid_out(tensor, layout, arm.dtype) for tensor in maps)

    def forward() -> tuple[Tensor, ...]:
        with arm.rules(), torch.no_grad():
            return (module(x),)

    def both() -> tuple[Tensor, ...]:
        with arm.rules():
            y = module(x)
            return (y, *torch.autograd.grad(y, inputs, grad))

    if op == "fprop":
        return forward
    inputs = (x.requires_grad_(), next(module.parameters()))
    return both


@dataclass(frozen=True)
class GpuStepRace:
    """Race whole training steps of one network over all arms and sparsities.

    Args:
        case: the network.
        device: where.
        rounds: turns of each arm.
    """

    case: ModelCase
    device: torch.device
    rounds: int

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("gpu step", self.case.title, "step")

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return _keys({name: arm for name, arm in ARMS.items() if arm.storage == "weight"})

    def measure(self) -> list[Row]:
        """Measure them."""
        return race(self._entries(), rounds=self.rounds, slow=_SLOW, device=self.device)

    def _entries(self) -> Iterator[Entry]:
        for name, sparsity in self.keys():
            arm = ARMS[name]
            model = self._model(arm, sparsity)
            counted = flops.count(
                copy.deepcopy(model).to("meta"), (self.case.batch, *self.case.input_shape)
            )
            row = {
                "arm": name,
                "sparsity": sparsity,
                "batch": self.case.batch,
                "nnz": counted.nnz,
                "flops": counted.train,
                "baseline": not arm.sparse,
            }
            yield Entry(row, None, partial(self._ready, arm, model))

    def _model(self, arm: GpuArm, sparsity: float | None) -> nn.Module:
        model = self.case.build()
        if arm.layout is not None and sparsity is not None:
            sparsify(
                model, sparsity, "uniform", skip=dense_ends(model), layout=arm.layout, init="sparse"
            )
        return model

    def _ready(self, arm: GpuArm, model: nn.Module) -> Ready:
        generator = generator_for(0, self.case.name)
        x = torch.randn(self.case.batch, *self.case.input_shape, generator=generator)
        y = torch.randint(0, 10, (self.case.batch,), generator=generator).to(self.device)
        x = x.to(self.device)
        reference = densify(copy.deepcopy(model)).to(self.device)
        with ARMS["dense_fp32"].rules():
            expected = training_step(reference, CrossEntropy())(x, y)
        model = model.to(self.device)
        if arm.channels_last:
            x = x.to(memory_format=torch.channels_last)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = training_step(_Lowered(model, arm), CrossEntropy())

        def call() -> Tensor:
            with arm.rules():
                return step(x, y)

        # Rounding differences grow through a network; the layers are held to their bounds above.
        bound = {"loss": 16 * torch.finfo(arm.precision).eps + 1e-3}
        errors = gate.compare({"loss": call()}, {"loss": expected}, gate.overall_error)
        return Ready(call, errors, bound)


class _Lowered(nn.Module):
    """Run a model in an arm's precision: bfloat16 by autocast, the loss behind it in float32."""

    def __init__(self, model: nn.Module, arm: GpuArm) -> None:
        super().__init__()
        self.model, self._dtype = model, arm.dtype

    def forward(self, x: Tensor) -> Tensor:
        lowered = self._dtype != torch.float32
        with torch.autocast(x.device.type, self._dtype, enabled=lowered):
            return self.model(x).float()


def describe(device: torch.device) -> dict[str, Any]:
    """Describe a device, for the rows measured on it.

    Example:
        >>> describe(torch.device("cpu"))["device"]
        'cpu'
    """
    if device.type != "cuda":
        return {"device": device.type}
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": kernels_digest(),
        "backends": ", ".join(name for name, b in ops.info()["backends"].items() if b["available"]),
    }


def kernels_digest() -> str:
    """Return a digest of the GPU kernels, so that rows of others are never taken for theirs.

    Example:
        >>> len(kernels_digest())
        8
    """
    sources = sorted((Path(ops.__file__).parents[1] / "kernels").glob("*.py"))
    digest = hashlib.blake2b(digest_size=4)
    for path in (cuda_library.PATH, *sources):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def arms_of(rows: Sequence[Row]) -> list[GpuArm]:
    """List the arms that rows are of, in the order of `ARMS`.

    Example:
        >>> [arm.label for arm in arms_of([{"arm": "dense_tf32"}])]
        ['dense, TF32']
    """
    present = {row["arm"] for row in rows}
    return [arm for name, arm in ARMS.items() if name in present]
