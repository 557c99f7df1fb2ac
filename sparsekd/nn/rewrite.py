"""Find the BatchNorms in a module's methods and let each run with what follows it.

The source of a method is rewritten, not traced: `self.relu(self.bn1(x))` becomes a call of
`norm_act`, and `out = self.bn2(out)`, `out += identity`, `out = self.relu(out)` become one call at
the place of the last. Everything else, control flow above all, stays the user's code, and
`norm_act` looks at the modules at run time, so a site that turns out to be another one computes
what it says. A method without source, or whose source is not what runs, stays as it is.
"""

from __future__ import annotations
import __future__

import ast
import copyreg
import inspect
import types
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sparsekd._torch import registered
from sparsekd.nn.norm import is_relu_function, norm_act
from sparsekd.nn.sites import NORM_ACT, RELU, Sites, rewrite


@dataclass(frozen=True)
class _Method:
    function: types.FunctionType
    tree: ast.FunctionDef

    @property
    def self_name(self) -> str:
        return self.tree.args.args[0].arg


# -- which callees are norms ----------------------------------------------------------------------


def find_sites(module: nn.Module, cls: type) -> Sites:
    """Resolve the callees in the methods of `cls` on one instance.

    Args:
        module: the instance.
        cls: its class, before any rewriting.

    Returns:
        The sites; no norms where there is nothing to do.
    """
    norms, relus = set(), set()
    for method in _methods(cls):
        loops = _loop_names(method, module)
        for call in ast.walk(method.tree):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            if isinstance(call.func, ast.Name) and call.func.id in loops:
                norms.add(name)
                relus.add(name)
                continue
            for found in _resolve(call.func, module, method.self_name):
                if type(found) is nn.BatchNorm2d:
                    norms.add(name)
                elif type(found) is nn.ReLU or is_relu_function(found):
                    relus.add(name)
    return Sites(frozenset(norms), frozenset(relus))


def _resolve(expression: ast.expr, module: nn.Module, self_name: str) -> list[Any]:
    """Return the objects that a chain like `self.blocks[i].bn` may stand for, for any `i`."""
    if isinstance(expression, ast.Name):
        return [module] if expression.id == self_name else []
    if isinstance(expression, ast.Attribute):
        owners = _resolve(expression.value, module, self_name)
        # Only what modules hold: anything else could run code to answer.
        return [
            found
            for owner in owners
            if isinstance(owner, nn.Module)
            for table in (registered(owner)[2], vars(owner))
            if (found := table.get(expression.attr)) is not None
        ]
    if isinstance(expression, ast.Subscript):
        owners = _resolve(expression.value, module, self_name)
        return [item for owner in owners if _is_container(owner) for item in owner.children()]
    return []


def _is_container(module: Any) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)


def _loop_names(method: _Method, module: nn.Module) -> set[str]:
    """Return the variables of loops over containers that hold a norm."""
    names: set[str] = set()
    for loop in ast.walk(method.tree):
        if not isinstance(loop, ast.For):
            continue
        found = [
            child
            for node in ast.walk(loop.iter)
            if isinstance(node, ast.expr)
            for owner in _resolve(node, module, method.self_name)
            if _is_container(owner)
            for child in owner.children()
        ]
        if any(type(child) is nn.BatchNorm2d for child in found):
            names |= {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}
    return names


@lru_cache(maxsize=1024)  # classes that are made at run time come without end
def _methods(cls: type) -> tuple[_Method, ...]:
    """Return the methods of a class with their source; those of torch's base class aside."""
    seen: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            seen.setdefault(name, value)
    parsed = (_parse(value) for value in seen.values() if isinstance(value, types.FunctionType))
    return tuple(method for method in parsed if method is not None)


def _parse(function: types.FunctionType) -> _Method | None:
    """Parse a method; None without source, or where the source is not what runs."""
    try:
        source = inspect.getsource(function)
        tree = ast.parse("if True:\n" + source if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return None
    node: Any = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    if not isinstance(node, ast.FunctionDef) or node.decorator_list or not node.args.args:
        return None
    ast.increment_lineno(node, function.__code__.co_firstlineno - node.lineno)
    method = _Method(function, node)
    if any(isinstance(n, ast.Yield | ast.YieldFrom | ast.Await) for n in ast.walk(node)):
        return None
    code = _compile(method, node)
    return method if code is not None and _outline(code) == _outline(function.__code__) else None


def _outline(code: types.CodeType) -> tuple[Any, ...]:
    """Return what tells a function from an edited one; bytecode also depends on its module."""
    constants = [repr(c) for c in code.co_consts if not isinstance(c, types.CodeType)]
    lines = sorted({line for *_, line in code.co_lines() if line is not None})
    return code.co_names, code.co_varnames, code.co_freevars, constants, lines


# -- a class with rewritten methods ---------------------------------------------------------------


@lru_cache(maxsize=1024)  # classes that are made at run time come without end
def fused_class(cls: type, sites: Sites) -> type:
    """Return a subclass of `cls` whose methods run each norm with what follows it.

    It has the name of `cls`, and its instances are copied and pickled as instances of `cls` that
    are rewritten again on arrival.

    Args:
        cls: a module class.
        sites: from `find_sites`.

    Returns:
        The subclass, or `cls` itself where no method changes.
    """
    methods: dict[str, Any] = {}
    if getattr(cls, "forward", None) is nn.Sequential.forward:
        methods["forward"] = _sequential_forward
    for method in _methods(cls) if sites.norms else ():
        tree = rewrite(method.tree, sites)
        code = None if tree is None else _compile(method, tree)
        if code is not None:
            methods[method.function.__name__] = _with_code(method.function, code)
    if not methods:
        return cls
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_sparsekd_plain": cls,
        "_sparsekd_sites": sites,
        **methods,
    }
    return types.new_class(cls.__name__, (cls,), exec_body=lambda space: space.update(body))


def plain_class(module: nn.Module) -> type:
    """Return the class of a module before any rewriting."""
    return getattr(type(module), "_sparsekd_plain", type(module))


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    cls: Any = type(self)
    reduced = super(cls, self).__reduce_ex__(max(2, protocol))
    if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
        return _renew, (cls._sparsekd_plain, cls._sparsekd_sites, *reduced[1][1:]), *reduced[2:]
    return reduced


def _renew(cls: type, sites: Sites, *args: Any) -> Any:
    target = fused_class(cls, sites)
    return target.__new__(target, *args)


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:
    norm = None
    for module in self:
        if norm is not None:
            act = module if type(module) is nn.ReLU else None
            input, norm = norm_act(norm, input, act), None
            if act is not None:
                continue
        if type(module) is nn.BatchNorm2d:
            norm = module
        else:
            input = module(input)
    return input if norm is None else norm_act(norm, input)


def _compile(method: _Method, tree: ast.FunctionDef) -> types.CodeType | None:
    """Compile a method's tree with the closure it has, and the two names of this module."""
    cells = (*method.function.__code__.co_freevars, NORM_ACT, RELU)
    factory = ast.parse(f"def factory({', '.join(cells)}):\n    pass").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body = [tree]
    flags = method.function.__code__.co_flags & _future_flags()
    file = method.function.__code__.co_filename
    module = ast.fix_missing_locations(ast.Module([factory], []))
    code: Any = compile(module, file, "exec", flags, dont_inherit=True)
    for wanted in ("factory", tree.name):
        inner = [c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == wanted]
        if len(inner) != 1:
            return None
        code = inner[0]
    return code if set(code.co_freevars) <= set(cells) else None


def _future_flags() -> int:
    return sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


def _with_code(function: types.FunctionType, code: types.CodeType) -> types.FunctionType:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {NORM_ACT: types.CellType(norm_act), RELU: types.CellType(torch.relu)}
    closure = tuple(cells[name] for name in code.co_freevars)
    new = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    for name in ("__doc__", "__annotations__", "__qualname__", "__module__"):
        setattr(new, name, getattr(function, name))
    return new
