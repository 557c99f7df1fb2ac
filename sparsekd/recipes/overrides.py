"""Changes to fields of a recipe by dotted names, with types checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
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
    if not equals or not path.strip():
        raise ValueError(f"--set: expected a.b=value, got {assignment!r}")
    tree: Any = text.strip()
    for name in reversed(path.strip().split(".")):
        tree = {name: tree}
    return merge(config, tree)


def merge(config: T, tree: Mapping[str, Any], prefix: str = "") -> T:
    """Return a frozen dataclass with many fields changed at once, at any depth.

    Args:
        config: the dataclass, with dataclasses as fields.
        tree: field -> value, or -> the same for a field that is a dataclass: as TOML, YAML and
            JSON files are read. Numbers and lists may be text too, as `override` takes it.
        prefix: of the names in messages.

    Returns:
        The changed copy.

    Raises:
        ValueError: as for `override`.

    Example:
        >>> from sparsekd.recipes import get
        >>> merge(get("demo"), {"seeds": 3, "training": {"lr": 0.05}}).training.lr
        0.05
    """
    changes = {}
    hints = get_type_hints(type(config))
    names = [f.name for f in fields(config)]  # type: ignore[arg-type]
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{full}: no field {name!r}, expected one of {', '.join(names)}{hint}")
        current = getattr(config, name)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                inner = ", ".join(f.name for f in fields(current))
                raise ValueError(
                    f"{full}: expected one of its fields ({inner}), as {full}.FIELD=value"
                )
            changes[name] = merge(current, value, f"{full}.")
        elif isinstance(value, Mapping):
            raise ValueError(f"{full}: {name!r} is a value and has no fields")
        else:
            if _nested(value):
                raise ValueError(f"{full}: expected a list of plain values, got {value!r}")
            changes[name] = _parse(_text(value), hints[name], full)
    return replace(config, **changes)  # type: ignore[type-var]


def _nested(value: Any) -> bool:
    """Return whether a value is a list of lists, which would lose its inner brackets."""
    return isinstance(value, list) and any(isinstance(item, (list, Mapping)) for item in value)


def _text(value: Any) -> str:
    """Return a value of a file as it would be written after --set."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_text, value))
    return str(value)


def _parse(text: str, kind: Any, name: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if text.lower() == "none":
            return None
        return _parse(text, next(a for a in args if a is not NoneType), name)
    if origin is tuple:
        parts = [part.strip() for part in text.split(",") if part]
        if text and not parts:
            raise ValueError(f"{name}: expected at least one, got {text!r}")
        return tuple(_parse(part, args[0], name) for part in parts)
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
