"""What import-linter cannot see: who imports the compiled module."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import sparsekd

PACKAGE = Path(sparsekd.__file__).parent


def imported_names(path: Path) -> set[str]:
    """List every module and every name that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module or "")
    return found


def test_only_ops_and_topology_import_the_compiled_module():
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith("sparsekd._C") for name in imported_names(path))
    }
    assert users == {"ops", "topology.py"}


def test_a_checkout_on_the_path_is_no_package_kernels(monkeypatch):
    """Others look for a package of that name; ours answers under its own name only."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    kernels = importlib.import_module("kernels")
    assert not hasattr(kernels, "Kernel")
    for name in ("table", "gather"):
        with pytest.raises(ImportError, match=f"kernels.{name}"):
            importlib.import_module(f"kernels.{name}")
