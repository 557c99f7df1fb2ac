"""Rewrite the tree of a method so that each norm runs together with what follows it.

First statements are joined: `out = self.bn(out)`, `out += identity`, `out = self.relu(out)` become
`out = self.relu(self.bn(out) + identity)`, where nothing between them can tell the difference. Then
expressions of that form become calls of `norm_act`.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass

NORM_ACT, RELU = "_sparsekd_norm_act", "_sparsekd_relu"
_RELU_NAMES = ("relu", "relu_")
_SIMPLE = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)
_CONDITIONAL = (
    *(ast.IfExp, ast.BoolOp, ast.Lambda, ast.NamedExpr),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
)
_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.FunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Sites:
    """The source of the callees of a module's methods that are norms, and that are ReLUs."""

    norms: frozenset[str]
    relus: frozenset[str]

    def norm_call(self, node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
        """Return norm and input of `norm(x)`."""
        match node:
            case ast.Call(func=func, args=[argument], keywords=[]):
                if ast.unparse(func) in self.norms and not isinstance(argument, ast.Starred):
                    return func, argument
        return None

    def relu_call(self, node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
        """Return ReLU and argument of `self.act(x)`, `F.relu(x, inplace=True)` or `x.relu()`."""
        match node:
            case ast.Call(func=ast.Attribute(value, "relu" | "relu_"), args=[], keywords=[]):
                return ast.Name(RELU, ast.Load()), value
            case ast.Call(func=func, args=[argument], keywords=[] | [ast.keyword("inplace")]):
                last = func.attr if isinstance(func, ast.Attribute) else ast.unparse(func)
                if ast.unparse(func) in self.relus or last in _RELU_NAMES:
                    return func, argument
        return None


def rewrite(tree: ast.FunctionDef, sites: Sites) -> ast.FunctionDef | None:
    """Return a rewritten copy of a function, None if nothing in it changes."""
    if any(isinstance(n, ast.Global | ast.Nonlocal) for n in ast.walk(tree)):
        return None
    tree = copy.deepcopy(tree)
    loads = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_load(n)]
    for node in list(ast.walk(tree)):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                for index in range(len(statements)):
                    _join(statements, index, sites, loads)
    fuser = _Fuser(sites)
    tree = fuser.visit(tree)
    return tree if fuser.found else None


class _Fuser(ast.NodeTransformer):
    """Turn `relu(norm(x) + y)`, `relu(norm(x))` and `norm(x)` into calls of `norm_act`."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.found = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        relu, argument = self.sites.relu_call(node) or (None, node)
        added = _sum(argument) if relu is not None else None
        for term, residual in ((argument, None), *_orders(added)):
            found = self.sites.norm_call(term)
            if found is None:
                continue
            self.found = True
            norm, x = found
            parts = [norm, x] + ([] if relu is None else [relu])
            arguments = [self.visit(part) for part in parts]
            keywords = [ast.keyword("residual", self.visit(residual))] if residual else []
            call = ast.Call(ast.Name(NORM_ACT, ast.Load()), arguments, keywords)
            return ast.copy_location(call, node)
        return self.generic_visit(node)


def _sum(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """Return the terms of `a + b`, `torch.add(a, b)`, `a.add(b)` or `a.add_(b)`."""
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return left, right
        case ast.Call(
            func=ast.Attribute(ast.Name("torch"), "add"), args=[left, right], keywords=[]
        ):
            return left, right
        case ast.Call(func=ast.Attribute(left, "add" | "add_"), args=[right], keywords=[]):
            return left, right
    return None


def _orders(
    terms: tuple[ast.expr, ast.expr] | None,
) -> list[tuple[ast.expr, ast.expr]]:
    """Return which term may be the norm: the second only behind a name, which has no effects."""
    if terms is None:
        return []
    left, right = terms
    return [(left, right), (right, left)] if isinstance(left, ast.Name) else [(left, right)]


def _join(statements: list[ast.stmt], index: int, sites: Sites, loads: list[str]) -> None:
    """Move the norm of `v = norm(x)` to where a ReLU takes `v`; until then `v` is `x`."""
    match statements[index]:
        case ast.Assign(targets=[ast.Name(name)], value=value):
            found = sites.norm_call(value)
        case _:
            return
    if found is None:
        return
    norm, x = found
    # A call returns a tensor of its own; what a name stands for could be changed meanwhile.
    guarded = set() if isinstance(x, ast.Call) else _names(x) - {name}
    term: ast.expr = ast.Call(norm, [ast.Name(name, ast.Load())], [])
    edits: dict[int, ast.stmt] = {index: _assign(name, x, statements[index])}
    for later in range(index + 1, len(statements)):
        statement = statements[later]
        mentioned = _names(statement)
        if name not in mentioned:
            if guarded & mentioned or any(isinstance(n, _LEAVING) for n in ast.walk(statement)):
                return
            continue
        if not isinstance(statement, _SIMPLE):
            return
        residual = _added_to(statement, name)
        if residual is not None and len(edits) == 1 and not guarded & _names(residual):
            other = f"_sparsekd_{name}"
            edits[later] = _assign(other, residual, statement)
            term = ast.BinOp(term, ast.Add(), ast.Name(other, ast.Load()))
            if not isinstance(residual, ast.Call):
                guarded |= _names(residual)
            continue
        joined = _take(statement, name, term, sites, loads.count(name) == 1)
        if joined is not None:
            for at, edit in {**edits, later: joined}.items():
                statements[at] = ast.copy_location(edit, statements[at])
        return


def _take(
    statement: ast.stmt, name: str, term: ast.expr, sites: Sites, only_load: bool
) -> ast.stmt | None:
    """Put `term` for `v` where a statement applies a ReLU to it and nobody reads `v` after."""
    nodes = list(ast.walk(statement))
    if any(isinstance(n, _CONDITIONAL) for n in nodes):
        return None
    if sum(isinstance(n, ast.Name) and n.id == name and _is_load(n) for n in nodes) != 1:
        return None
    match statement:
        case ast.Assign(targets=[ast.Name(target)]) if target == name:
            pass
        case ast.Return():
            pass
        case _ if not only_load:
            return None
    joined = copy.deepcopy(statement)
    for node in ast.walk(joined):
        found = sites.relu_call(node)
        if found is None:
            continue
        _, argument = found
        for value, _ in ((argument, None), *_orders(_sum(argument))):
            if isinstance(value, ast.Name) and value.id == name:
                if isinstance(term, ast.BinOp) and value is not argument:
                    return None
                _Replace(value, term).visit(joined)
                return joined
    return None


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.copy_location(self.new, node)
        return self.generic_visit(node)


def _added_to(statement: ast.stmt, name: str) -> ast.expr | None:
    """Return what `v += r`, `v = v + r` or `v = r + v` adds, if that does not mention `v`."""
    match statement:
        case ast.AugAssign(ast.Name(target), ast.Add(), residual) if target == name:
            terms = [residual]
        case ast.Assign(targets=[ast.Name(target)], value=value) if target == name:
            terms = [
                other
                for term, other in _orders_of(value)
                if isinstance(term, ast.Name) and term.id == name
            ]
        case _:
            return None
    terms = [term for term in terms if name not in _names(term)]
    return terms[0] if len(terms) == 1 else None


def _orders_of(value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    terms = _sum(value)
    return [] if terms is None else [terms, terms[::-1]]


def _assign(name: str, value: ast.expr, place: ast.stmt) -> ast.stmt:
    if isinstance(value, ast.Name) and value.id == name:
        return ast.Pass()
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)
