"""Changes to fields of a recipe by dotted names, with types checked."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def override(config: T, assignment: str) -> T:
    """Return a frozen dataclass with one field changed, at any depth.

    Args:
        config: the dataclass, with dataclasses as fields.
        assignment: "a.b=value"; a tuple takes values separated by commas, an optional field
            takes "none".

    Returns:
        The changed copy.

    Raises:
        ValueError: there is no such field, or the value has the wrong type or is out of range.

    Example:
        >>> from sparsekd.recipes import get
        >>> override(get("demo"), "training.lr=0.05").training.lr
        0.05
    """
    path, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set: expected a.b=value, got {assignment!r}")
    return _replace(config, path.strip().split("."), text.strip(), path.strip())


def _replace(config: Any, path: list[str], text: str, full: str) -> Any:
    names = [f.name for f in fields(config)]
    head, *rest = path
    if head not in names:
        close = difflib.get_close_matches(head, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{full}: no field {head!r}, expected one of {', '.join(names)}{hint}")
    current = getattr(config, head)
    if is_dataclass(current):
        if not rest:
            inner = ", ".join(f.name for f in fields(current))
            raise ValueError(f"{full}: expected one of its fields ({inner}), as {full}.FIELD=value")
        return replace(config, **{head: _replace(current, rest, text, full)})
    if rest:
        raise ValueError(f"{full}: {head!r} is a value and has no fields")
    value = _parse(text, get_type_hints(type(config))[head], full)
    return replace(config, **{head: value})


def _parse(text: str, kind: Any, name: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if text.lower() == "none":
            return None
        return _parse(text, next(a for a in args if a is not NoneType), name)
    if origin is tuple:
        return tuple(_parse(part.strip(), args[0], name) for part in text.split(",") if part)
    if origin is Literal:
        if text not in args:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, args))}, got {text!r}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: expected true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        words = {int: "a whole number", float: "a number"}
        raise ValueError(f"{name}: expected {words[kind]}, got {text!r}") from None
