"""Recipes in TOML and YAML files: a recipe that ships, and what differs from it."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sparsekd.recipes.config import Recipe
from sparsekd.recipes.overrides import merge
from sparsekd.recipes.presets import get
from sparsekd.train.optional import need

SUFFIXES = (".toml", ".yaml", ".yml")


def read_file(path: Path) -> Recipe:
    """Read a recipe from a file.

    The file names a recipe that ships as `recipe` and lists the fields that differ, `training`,
    `data` and the like as tables. Its name, and so the folder of its runs, is that of the file.

    Args:
        path: ends in .toml, .yaml or .yml.

    Returns:
        The recipe.

    Raises:
        ValueError: the file is not TOML or YAML, a field is not known, or its value is wrong.
        OSError: the file cannot be read.
        UnavailableError: YAML without PyYAML.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.toml"
        >>> _ = path.write_text('''
        ... recipe = "demo"
        ... sparsities = [0.9, 0.98]
        ... [training]
        ... epochs = 4
        ... ''')
        >>> recipe = read_file(path)
        >>> recipe.name, recipe.training.epochs, recipe.sparsities
        ('mine', 4, (0.9, 0.98))
    """
    content = path.read_bytes()
    try:
        text = content.decode()  # raises a ValueError too
        tree = _parse(path, text)
        base = tree.pop("recipe", None)
        if not isinstance(base, str):
            raise ValueError(
                'recipe: expected the recipe to start from, as recipe = "demo"; '
                "`sparsekd recipes` lists them"
            )
        return merge(get(base), {"name": path.stem, **tree})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"expected a name that ends in {', '.join(SUFFIXES)}")
    yaml = need("yaml", "yaml")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError("expected fields and their values")
    return tree


def to_toml(recipe: Recipe) -> str:
    """Write every field of a recipe that ships as a file that `read_file` takes.

    Args:
        recipe: one of `RECIPES`.

    Returns:
        The text.

    Example:
        >>> to_toml(get("demo")).splitlines()[:2]
        ['recipe = "demo"', 'methods = ["reinit", "lt", "kd", "rigl", "sup-rigl"]']
    """
    lines, tables = [f"recipe = {_toml(recipe.name)}"], []
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if is_dataclass(value):
            inner = [f"{f.name} = {_toml(getattr(value, f.name))}" for f in fields(value)]
            tables += ["", f"[{field.name}]", *inner]
        elif field.name not in ("name", "description"):
            lines.append(f"{field.name} = {_toml(value)}")
    return "\n".join([*lines, *tables, ""])


def _toml(value: Any) -> str:
    # The JSON of strings, numbers, booleans and lists is TOML; None is written as --set takes it.
    return json.dumps("none" if value is None else value)
