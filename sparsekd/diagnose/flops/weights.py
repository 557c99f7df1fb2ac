"""Attribution of operations to weights.

A dispatch mode sees every op of a run and tracks which tensors derive from one parameter alone, by
views, casts and the like: they stand for that parameter. A product with one of them counts for the
parameter, and its result is an activation. If no operand stands for a parameter, a product in a
layer counts for the layer's weight; a product of two activations has no weight.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekd._torch import DispatchMode
from sparsekd.diagnose.flops.formulas import RECURRENT
from sparsekd.diagnose.flops.rows import FlopCount, LayerFlops, ProductFlops
from sparsekd.diagnose.inputs import tensors_in
from sparsekd.nn import SparseModule

_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_SPARSE = ("sparsekd::conv2d", "sparsekd::linear")
# Where these write is no part of what they make.
_WRITES = ("aten::scatter", "aten::scatter_", "aten::index_put", "aten::index_put_")


@dataclass(frozen=True)
class _Weight:
    """A parameter, and its name in each module that owns it.

    Args:
        tensor: the parameter; the values of a sparse module.
        sparse: that module.
        labels: by owner.
    """

    tensor: Tensor
    sparse: SparseModule | None = None
    labels: dict[nn.Module, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return tuple(self.tensor.shape) if self.sparse is None else self.sparse.dense_shape

    def label(self, module: nn.Module | None) -> str:
        """Return the name that the running module gives it, else that of its first owner."""
        if module is not None and module in self.labels:
            return self.labels[module]
        return next(iter(self.labels.values()))


class Attribution(DispatchMode):
    """A FLOP counter's operations by weight of a model; entered after the counter.

    Args:
        model: that runs within.
        counter: that is running.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter
        self._names = {module: name for name, module in model.named_modules()}
        # Tensors that no input went into, and the weight that each is a function of, None for a
        # constant. They are held, so that their ids stay their own.
        self._known: dict[int, tuple[Tensor, _Weight | None]] = {}
        for buffer in model.buffers():
            self._known[id(buffer)] = buffer, None
        for weight in _weights(self._names):
            self._known[id(weight.tensor)] = weight.tensor, weight
        self._shapes: dict[nn.Module, tuple[int, ...] | None] = {
            module: _layer_shape(module) for module in self._names if isinstance(module, _LAYERS)
        }
        self._running: list[nn.Module] = []
        self._hooks = ExitStack()
        self._layers: dict[tuple[str, tuple[int, ...]], LayerFlops] = {}
        self._products: dict[str, int] = {}

    def __enter__(self) -> Any:
        for module in self._names:
            if not isinstance(module, torch.jit.ScriptModule):
                before = module.register_forward_pre_hook(self._enter, prepend=True)
                after = module.register_forward_hook(self._leave, always_call=True)
                self._hooks.callback(before.remove)
                self._hooks.callback(after.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def result(self) -> FlopCount:
        """Return the rows, in the order of their first operation."""
        products = (ProductFlops(name, flops) for name, flops in self._products.items() if flops)
        return FlopCount(tuple(self._layers.values()), tuple(products))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        flops = self._counter.get_total_flops() - before
        op = func.name().split(".")[0]
        # One without nonzeros or without inputs counts, with no operations.
        if flops or getattr(func, "overloadpacket", None) in self._counter.flop_registry:
            self._attribute(op, flops, list(tensors_in(_factors(op, args))), result)
        else:
            self._follow(op, list(tensors_in((args, kwargs))), result)
        return result

    def _follow(self, op: str, operands: list[Tensor], result: Any) -> None:
        """Track results that derive from tracked tensors alone; drop those that mix in an input."""
        if op in _WRITES:
            operands = [t for t in operands if t.is_floating_point() or t.is_complex()]
        sources = [self._known.get(id(t)) for t in operands]
        known = [source for source in sources if source is not None]
        weights = [(tensor.numel(), weight) for tensor, weight in known if weight is not None]
        weight = max(weights, key=lambda pair: pair[0])[1] if weights else None
        for tensor in tensors_in(result):
            if len(known) == len(sources):
                self._known[id(tensor)] = tensor, weight
            else:
                self._known.pop(id(tensor), None)

    def _attribute(self, op: str, flops: int, factors: list[Tensor], result: Any) -> None:
        module = self._running[-1] if self._running else None
        if isinstance(module, SparseModule):
            self._add_sparse(self._names[module], module, result)
            return
        found = [(t, self._known[id(t)][1]) for t in factors if id(t) in self._known]
        weights = [(t, w) for t, w in found if w is not None and (t.ndim > 1 or op in _SPARSE)]
        if op in _SPARSE and weights and (sparse := weights[0][1].sparse) is not None:
            self._add_sparse(weights[0][1].label(module), sparse, result)
            return
        if op not in RECURRENT:
            weights = weights[-1:]  # the input comes first, and may be a parameter as well
        parts = [_part(tensor, weight, module) for tensor, weight in weights]
        name = "" if module is None else self._names[module]
        shape = None if module is None else self._shapes.get(module)
        if not parts and shape is not None:
            parts = [(name, shape)]
        positions, rest = divmod(flops, max(2 * sum(prod(shape) for _, shape in parts), 1))
        if not parts or rest:
            self._products[name] = self._products.get(name, 0) + flops
            return
        for name, shape in parts:
            self._add(LayerFlops(name, shape, prod(shape), positions))

    def _add_sparse(self, name: str, module: SparseModule, result: Tensor) -> None:
        positions = result.numel() // max(module.topology.shape[0], 1)
        self._add(LayerFlops(name, module.dense_shape, module.topology.nnz, positions))

    def _add(self, row: LayerFlops) -> None:
        key = row.name, row.shape
        sofar = self._layers.get(key)
        calls = row.positions if sofar is None else sofar.positions + row.positions
        self._layers[key] = replace(row, positions=calls)


def _factors(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the operands of an op that may be weights it multiplies by."""
    if "attention" in op:
        return ()
    if op in RECURRENT:
        return args[1:5]
    # torch.addmm and its like begin with what they add to
    return args[1:3] if op.startswith(("aten::add", "aten::baddbmm")) else args[:2]


def _weights(names: dict[nn.Module, str]) -> list[_Weight]:
    found: dict[int, _Weight] = {}
    for module, name in names.items():
        sparse = module if isinstance(module, SparseModule) else None
        for key, parameter in module.named_parameters(recurse=False):
            values = sparse is not None and key == "values"
            weight = found.setdefault(id(parameter), _Weight(parameter, sparse if values else None))
            weight.labels[module] = _label(name, key, module)
    return list(found.values())


def _label(name: str, key: str, module: nn.Module) -> str:
    """Return the name of a weight: its layer, or module and parameter if a module has several."""
    owner, parametrized, rest = f".{name}.".partition(".parametrizations.")
    if parametrized:
        name, key = owner.strip("."), rest.split(".")[0]
    if key == "weight" or isinstance(module, (*_LAYERS, SparseModule)):
        return name
    return f"{name}.{key}".removeprefix(".")


def _layer_shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = None if isinstance(module, nn.modules.lazy.LazyModuleMixin) else module.weight
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _part(tensor: Tensor, weight: _Weight, module: nn.Module | None) -> tuple[str, tuple[int, ...]]:
    """Return name and shape of the part of a weight that an operand covers, mostly all of it."""
    name, shape = weight.label(module), weight.shape
    if weight.sparse is not None:
        name = f"{name}.weight".removeprefix(".")  # read as a dense tensor
    sizes = [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    number, row = prod(n for n, _ in sizes), max(prod(shape[1:]), 1)
    if number == prod(shape):
        return name, shape
    if number % row or 1 + sum((n - 1) * step for n, step in sizes) != number:
        return f"{name}[part of {number}]", (number,)
    shared = tensor.untyped_storage().data_ptr() == weight.tensor.untyped_storage().data_ptr()
    begin = (tensor.storage_offset() - shared * weight.tensor.storage_offset()) // row
    return f"{name}[{begin}:{begin + number // row}]", (number // row, *shape[1:])
