"""Replacement of modules of a model, in its tree of modules and in lists, dicts and other objects.

A module may also be held where `named_modules` does not look. An old layer left there would keep
computing with its dense weight, which nothing trains. So everything that the attributes of the
model's modules reach is searched; what can be replaced is, and the rest is reported by name.
"""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from sparsekd._torch import REGISTERED, registered

_Module = TypeVar("_Module", bound=nn.Module)
_OPAQUE = (str, bytes, bytearray, int, float, complex, type(None), type, types.ModuleType, range)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)  # fail by themselves when used
_LIMIT = 1_000_000  # objects looked at, for a model that holds its data set
_DEPTH = 60


def as_class(module: nn.Module, cls: type[_Module]) -> _Module:
    """Return a module of another class with the parameters, children and hooks of this one.

    Args:
        module: any module; it goes on working.
        cls: its class, which is not initialised.

    Example:
        >>> class Other(nn.Linear): ...
        >>> layer = nn.Linear(2, 2)
        >>> as_class(layer, Other).weight is layer.weight
        True
    """
    new = cls.__new__(cls)
    vars(new).update(vars(module))
    return new


def replace_modules(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module], call: str
) -> nn.Module:
    """Replace modules in a model's tree of modules and wherever attributes of modules hold them.

    Lists, dicts, sets, deques, tuples, partials, bound methods and plain objects are put right, in
    place where they are mutable. Objects are never searched for, only reached. A warning names
    holders that keep an old module or its weight, which needs the user's hand.

    Args:
        model: changed in place.
        replacements: old module -> new one.
        call: what the user called; the warning starts with it.

    Returns:
        The model; if it is itself replaced, the module in its place.

    Example:
        >>> old, new = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> model = nn.Module()
        >>> model.layers = [old]
        >>> replace_modules(model, {old: new}, "call").layers[0] is new
        True
    """
    model = replacements.get(model, model)
    search = _Search(replacements)
    if replacements:
        search.module(model, "model")
    if search.left:
        warnings.warn(
            f"{call} cannot give every holder of a layer the new one. These keep the old layer, "
            "which the model neither calls nor trains any more; let them look it up in the model "
            "when they need it:" + "".join(f"\n  {where}" for where in search.left),
            stacklevel=4,
        )
    return model


class _Search:
    def __init__(self, replacements: Mapping[nn.Module, nn.Module]) -> None:
        self.new = dict(replacements)
        # Of weights that the new module does not share.
        self.weights = {
            id(weight)
            for old, new in replacements.items()
            for name, weight in registered(old)[0].items()
            if weight is not None and weight is not registered(new)[0].get(name)
        }
        self.left: list[str] = []
        # Object and what takes its place, by id; the object too, or its id would be taken again.
        self.seen: dict[int, tuple[Any, Any]] = {}
        self.depth = 0

    def module(self, module: nn.Module, path: str) -> None:
        """Search the attributes of a module and its children, which may be outside of the tree."""
        if id(module) in self.seen:
            return
        self.seen[id(module)] = module, module
        children = registered(module)[2]
        for name, child in list(children.items()):
            if child in self.new:
                child = children[name] = self.new[child]
            if child is not None:
                self.module(child, f"{path}.{name}")
        self._table(vars(module), f"{path}.", "", REGISTERED)

    def _table(self, table: dict[Any, Any], before: str, after: str, skip: Any = ()) -> None:
        for key, value in list(table.items()):
            if key not in skip and (new := self.value(value, f"{before}{key}{after}")) is not value:
                table[key] = new

    def value(self, value: Any, path: str) -> Any:
        """Search a value, and return its replacement, which is mostly the value itself."""
        if type(value) in _PROXIES or isinstance(value, _OPAQUE):
            return value
        if isinstance(value, nn.Module):
            if value in self.new:
                return self.new[value]
            self.module(value, path)
            return value
        if isinstance(value, Tensor):
            if id(value) in self.weights:
                self.left.append(f"{path} (its weight)")
            return value
        if id(value) in self.seen:
            return self.seen[id(value)][1]
        if len(self.seen) > _LIMIT or self.depth > _DEPTH:
            return value
        self.seen[id(value)] = value, value
        self.depth += 1
        kinds = (search for kind, search in self._searches() if isinstance(value, kind))
        new = next(kinds, self._object)(value, path)
        self.depth -= 1
        self.seen[id(value)] = value, new
        return new

    def _searches(self) -> Iterator[tuple[Any, Callable[[Any, str], Any]]]:
        yield dict, self._dict
        yield (list, deque), self._sequence
        yield (tuple, set, frozenset), self._group
        yield functools.partial, self._partial
        yield types.MethodType, self._method
        yield types.FunctionType, self._function
        yield weakref.ref, self._reference

    def _dict(self, value: dict[Any, Any], path: str) -> Any:
        self._table(value, f"{path}[", "]")
        if any(isinstance(key, nn.Module) and key in self.new for key in value):
            if type(value) not in (dict, OrderedDict, defaultdict):
                self.left.append(f"{path} (a key)")
                return value
            items = [(self.new.get(key, key), item) for key, item in value.items()]
            value.clear()
            value.update(items)
        return value

    def _sequence(self, value: Any, path: str) -> Any:
        for index, item in enumerate(value):
            if (new := self.value(item, f"{path}[{index}]")) is not item:
                value[index] = new
        return value

    def _group(self, value: Any, path: str) -> Any:
        """Search a tuple or a set; both are rebuilt, a set in place, if an item changes."""
        items = list(value)
        new = [self.value(item, f"{path}[{index}]") for index, item in enumerate(items)]
        if all(a is b for a, b in zip(items, new, strict=True)):
            return value
        if isinstance(value, set):
            value.clear()
            value.update(new)
            return value
        if hasattr(value, "_make"):
            return type(value)._make(new)
        if type(value) in (tuple, frozenset):
            return type(value)(new)
        self.left.append(path)
        return value

    def _partial(self, value: Any, path: str) -> Any:
        parts = [value.func, value.args, value.keywords]
        new = [self.value(part, path) for part in parts]
        if all(a is b for a, b in zip(parts, new, strict=True)):
            return value
        return type(value)(new[0], *new[1], **new[2])

    def _method(self, value: types.MethodType, path: str) -> Any:
        owner = value.__self__
        new = self.value(owner, path)
        if new is owner:
            return value
        method = getattr(new, value.__name__, None)
        if isinstance(method, types.MethodType):
            return method
        self.left.append(f"{path} (a method of it)")
        return value

    def _function(self, value: types.FunctionType, path: str) -> Any:
        """Search what a function has closed over; that is not ours to change."""
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        for name, cell in cells.items():
            try:
                held = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            self._report(held, f"{path} ({name} of {value.__qualname__})")
        for held in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            self._report(held, f"{path} (a default of {value.__qualname__})")
        return value

    def _report(self, held: Any, where: str) -> None:
        if self.value(held, where) is not held:
            self.left.append(where)

    def _reference(self, value: Any, path: str) -> Any:
        target = value()
        if not isinstance(target, nn.Module) or target not in self.new:
            return value
        if type(value) is weakref.ref and value.__callback__ is None:
            return weakref.ref(self.new[target])
        self.left.append(f"{path} (a weak reference)")
        return value

    def _object(self, value: Any, path: str) -> Any:
        table = getattr(value, "__dict__", None)
        frozen = is_dataclass(value) and getattr(value, "__dataclass_params__").frozen  # noqa: B009
        if isinstance(table, dict):
            if frozen:
                for name, held in list(table.items()):
                    self._report(held, f"{path}.{name}")
            else:
                self._table(table, f"{path}.", "")
        for name in _slots(type(value)):
            held = getattr(value, name, None)
            if (new := self.value(held, f"{path}.{name}")) is not held:
                try:
                    setattr(value, name, new)
                except (AttributeError, TypeError):
                    self.left.append(f"{path}.{name}")
        return value


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield f"_{base.__name__.lstrip('_')}{name}" if _is_private(name) else name


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")
