"""The dense weight of a sparse module, materialised only when something computes with it.

Code written for dense layers reads `layer.weight`: often only its dtype, device or shape, now and
then to multiply with it. `LazyWeight` answers the former without a dense tensor. Any other use
first materialises the differentiable dense weight, so that gradients reach `values`. Writes into
that temporary tensor are refused, since they would be lost.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor

from sparsekd import _torch
from sparsekd.csr import flat_indices
from sparsekd.errors import UnsupportedError
from sparsekd.nn.stored import StoredWeight, scatter_dense

_FREE_ATTRIBUTES = (
    *("shape", "dtype", "device", "requires_grad", "ndim", "layout", "itemsize", "nbytes"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_sparse_csr"),
    *("is_nested", "is_quantized", "is_mkldnn", "is_leaf", "grad_fn", "output_nr"),
    *("retains_grad", *_torch.FREE_ATTRIBUTES),
)
_FREE_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "__len__"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "get_device", "is_tensor"),
    *("storage_offset", "has_names", "is_inference", "is_conj", "is_neg", "__hash__", "type"),
    *_torch.FREE_METHODS,
)
_FREE: frozenset[Any] = frozenset(
    # What C calls for an attribute; two of them for one attribute are equal.
    [getattr(Tensor, name).__get__ for name in _FREE_ATTRIBUTES if hasattr(Tensor, name)]
)
_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "div", "floordiv", "mod", "pow")
_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in (*_OPERATORS, "and", "or", "xor", "lshift", "rshift")
} | {"__setitem__"}
_ADDRESSES = ("data_ptr", "const_data_ptr", "untyped_storage", "storage", *_torch.STORAGE_METHODS)
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_TENSOR: Any = Tensor  # what mypy takes for plain attributes
_SETTERS: dict[Any, str] = {
    getattr(_TENSOR, name).__set__: name for name in ("data", "grad", "real", "imag")
}
_GET_GRAD = _TENSOR.grad.__get__
_SET_REQUIRES_GRAD = _TENSOR.requires_grad.__set__


class DenseView(Tensor):
    """A tensor that shares memory with a temporary dense weight, and so takes no writes."""

    _inner: Tensor
    _label: str

    @staticmethod
    def of(inner: Tensor, label: str) -> DenseView:
        """Make a view that stands for `inner`."""
        view = _torch.wrapper_tensor(
            DenseView,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )
        view._inner, view._label = inner, label
        _refuse_gradients(view)
        return view

    def _refuse(self, func: Any, name: str) -> None:
        """Refuse, with UnsupportedError, a call whose effect would not reach the layer."""
        if func in _SETTERS or (_is_in_place(name) and name != "requires_grad_"):
            raise _lost(self._label, f"{_SETTERS.get(func, name)} would write into it")
        if name in _ADDRESSES:
            raise _lost(self._label, f"{name} would point into it")

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call without the dense weight; NotImplemented where that cannot be."""
        if _name(func) == "requires_grad_":
            self._inner.requires_grad_(*args[1:], **kwargs)
            return self
        return NotImplemented

    def _dense(self) -> Tensor:
        return self._inner

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], DenseView):
            args[0]._refuse(func, _name(func))
            answer = args[0]._answer(func, args, kwargs)
            if answer is not NotImplemented:
                return answer
        if func in (torch.autograd.grad, torch.autograd.backward):
            _refuse_as_leaf(args, kwargs)
        dense: dict[int, tuple[Tensor, int | None, str]] = {}

        def computed(value: Any) -> Any:
            if isinstance(value, DenseView):
                if id(value) not in dense:
                    found = value._dense()
                    dense[id(value)] = found, _version(found), value._label
                return dense[id(value)][0]
            return value

        result = func(*_map(computed, args), **_map(computed, kwargs))
        for tensor, version, label in dense.values():
            if _version(tensor) != version:
                raise _lost(label, f"{_name(func)} writes into it")
        return _guard(result, [(tensor, label) for tensor, _, label in dense.values()])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise UnsupportedError(
            f"{func}: the weight of a sparse layer has no storage that this call could use; "
            "use dense_weight() of the layer, which has the shape of its `topology`"
        )


class LazyWeight(DenseView):
    """The dense weight of a sparse layer, computed by each use that needs its numbers."""

    # The layer holds this object (see `weight_of`), which therefore must not hold the layer.
    _layer: Callable[[], StoredWeight | None]
    _tables: Sequence[dict[str, Any]]
    _turned: Callable[[Tensor], Tensor]
    _topology_shape: list[int]

    @staticmethod
    def of_layer(layer: StoredWeight) -> LazyWeight:
        """Make the weight of a layer."""
        values = layer.values
        weight = _torch.wrapper_tensor(
            LazyWeight,
            layer.dense_shape,
            dtype=values.dtype,
            device=values.device,
            requires_grad=values.requires_grad,
        )
        weight._layer = weakref.ref(layer)
        weight._tables = _torch.registered(layer)[:2]
        weight._turned, weight._topology_shape = layer._turned, list(layer.weight_shape)
        weight._label = label(layer)
        _refuse_gradients(weight)
        return weight

    def _refuse(self, func: Any, name: str) -> None:
        if func == _GET_GRAD or name in _HOOKS:
            raise UnsupportedError(
                f"weight of {self._label}: gradients reach the layer's `values`, not this dense "
                "weight; use values.grad, one entry per nonzero, and hooks on values"
            )
        super()._refuse(func, name)

    @property
    def _stored(self) -> Tensor:
        layer = self._layer()
        values = self._tables[0]["values"] if layer is None else layer.values
        assert isinstance(values, Tensor)
        return values

    def _fits(self, values: Tensor) -> bool:
        with _torch.plain_tensors():
            return (
                self.dtype == values.dtype
                and self.device == values.device
                and self.requires_grad == values.requires_grad
            )

    def _dense(self) -> Tensor:
        layer = self._layer()
        if layer is not None:
            warn_of_dense(layer)
            if torch.is_inference_mode_enabled():
                # Tensors of that mode do not count what writes into them.
                with torch.inference_mode(False), torch.no_grad():
                    return self._turned(layer.dense_weight())
            return self._turned(layer.dense_weight())
        parameters, buffers = self._tables
        crow, col = buffers["crow_indices"], buffers["col_indices"]
        return self._turned(dense_from_csr(parameters["values"], crow, col, self._topology_shape))

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = _name(func)
        if func in _FREE or (name in _FREE_METHODS and len(args) == 1 and "dtype" not in kwargs):
            return super(DenseView, self).__torch_function__(func, (), args, kwargs)
        if name in ("size", "stride", "is_tensor"):  # with the number of a dimension
            return super(DenseView, self).__torch_function__(func, (), args, kwargs)
        if name.startswith("new_"):
            return func(self._stored, *args[1:], **kwargs)
        if name.endswith("_like"):
            # One number stands for all: only shape, dtype and device are looked at.
            number = self._stored.detach().new_zeros(())
            return func(number.expand(self.shape), *args[1:], **kwargs)
        if func == _torch.version_of:
            return _torch.version_of(self._stored)
        if func == _SET_REQUIRES_GRAD or name == "requires_grad_":
            flag = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
            self._stored.requires_grad_(flag)
            layer = self._layer()
            return None if name != "requires_grad_" or layer is None else weight_of(layer)
        if name == "__deepcopy__" and (layer := self._layer()) is not None:
            return weight_of(copy.deepcopy(layer, args[1]))
        if name == "__repr__" and (layer := self._layer()) is not None:
            return repr(self._turned(layer.dense_weight()))
        return NotImplemented


@torch.fx.wrap
def dense_from_csr(values: Tensor, crow: Tensor, col: Tensor, shape: list[int]) -> Tensor:
    """Return the dense weight of parts that are known to be a structure.

    Args:
        values: one entry per nonzero.
        crow: start of each row.
        col: column of each nonzero.
        shape: of the weight.

    Example:
        >>> crow, col = torch.tensor([0, 0, 1]), torch.tensor([1])
        >>> dense_from_csr(torch.ones(1), crow, col, [2, 2])
        tensor([[0., 0.],
                [0., 1.]])
    """
    return scatter_dense(values, flat_indices(crow, col, math.prod(shape[1:])), shape)


_weights: weakref.WeakKeyDictionary[Any, LazyWeight] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def weight_of(layer: StoredWeight) -> Tensor:
    """Return the weight of a sparse layer for code that expects one.

    Args:
        layer: the layer.

    Returns:
        The same object as long as dtype, device and requires_grad of the layer's values stay. In
        a graph that is being compiled, exported or traced by torch.fx: the dense weight itself.

    Example:
        >>> import sparsekd as skd
        >>> layer = skd.nn.SparseLinear(4, 2, sparsity=0.5)
        >>> weight_of(layer).shape, weight_of(layer) is weight_of(layer)
        (torch.Size([2, 4]), True)
    """
    values = layer.values
    # torch.fx puts a stand-in for the parameter, which is no tensor.
    if torch.compiler.is_compiling() or not isinstance(values, Tensor):
        crow, col = layer.crow_indices, layer.col_indices
        return layer._turned(dense_from_csr(values, crow, col, list(layer.weight_shape)))
    weight = _weights.get(layer)
    if weight is None or not weight._fits(values):
        weight = _weights[layer] = LazyWeight.of_layer(layer)
    return weight


def label(layer: StoredWeight) -> str:
    """Return a layer's name for a message: its class, and its name or sizes.

    Args:
        layer: the layer.

    Example:
        >>> import sparsekd as skd
        >>> label(skd.nn.SparseLinear(4, 2, sparsity=0.5))
        'SparseLinear(in_features=4, out_features=2, bias=True, density=0.5, nnz=4)'
    """
    kind = type(layer).__name__
    return f"{kind} {layer.known_as!r}" if layer.known_as else f"{kind}({layer.extra_repr()})"


def warn_of_dense(layer: StoredWeight) -> None:
    """Warn, once a layer, that something computes with its dense weight.

    Args:
        layer: the layer.
    """
    if layer in _warned:
        return
    _warned.add(layer)
    warnings.warn(
        f"weight of {label(layer)}: code outside of the layer computes with its dense weight, "
        "which is built anew for every use; the numbers are right, but nothing is saved. To keep "
        f"the layer dense: sparsify(..., skip={layer.known_as or '<its name>'!r})",
        stacklevel=_first_foreign_frame(),
    )


def _first_foreign_frame() -> int:
    """Return the `stacklevel` of the code that read the weight, seen from our caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("torch", "sparsekd"):
            break
        level, frame = level + 1, frame.f_back
    return level


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _is_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS


def _lost(label: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"weight of {label}: a dense weight is made for each use and then forgotten, and {what}. "
        "Write to the layer's `values` (one entry per nonzero, in row-major order), or call "
        "reset_parameters(), load_state_dict({'weight': tensor, ...}) or sparsekd.densify"
    )


def _refuse_gradients(tensor: DenseView) -> None:
    """Raise when a gradient arrives at the tensor itself.

    It does only where an autograd.Function was given the tensor as it is: nothing computed the
    dense weight from `values` there.
    """

    def refuse(gradient: Tensor, label: str = tensor._label) -> None:
        raise UnsupportedError(
            f"weight of {label}: its gradient cannot reach the layer's `values` through an "
            "autograd.Function; hand the function dense_weight() of the layer, which has the shape "
            "of its `topology`"
        )

    with _torch.plain_tensors():
        if tensor.requires_grad:
            tensor.register_hook(refuse)


def _refuse_as_leaf(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found: list[DenseView] = []
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else None)
    _map(lambda value: found.append(value) if isinstance(value, LazyWeight) else None, inputs)
    if found:
        raise UnsupportedError(
            f"inputs: the weight of {found[0]._label} is no leaf of the graph; "
            "differentiate with respect to the layer's `values`"
        )


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to all that tuples, lists and dicts hold."""
    if type(tree) in (tuple, list):
        return type(tree)(_map(function, item) for item in tree)
    if type(tree) is dict:
        return {key: _map(function, item) for key, item in tree.items()}
    return function(tree)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else _torch.version_of(tensor)


def _address(tensor: Tensor) -> int:
    """Return where a tensor's memory is, 0 for one that has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # under a transform of torch.func, or no memory behind it
        return 0


def _guard(result: Any, sources: list[tuple[Tensor, str]]) -> Any:
    """Protect the parts of a result that share memory with temporary weights from writes."""
    labels = {address: label for tensor, label in sources if (address := _address(tensor))}

    def guarded(value: Any) -> Any:
        if isinstance(value, np.ndarray) and not value.flags.owndata:
            value.flags.writeable = False
        elif type(value) is Tensor and (found := labels.get(_address(value))) is not None:
            return DenseView.of(value, found)
        return value

    if isinstance(result, Iterator):
        return iter(_map(guarded, list(result)))
    return _map(guarded, result)
