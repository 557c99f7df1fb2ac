"""The API reference has every public name once, and the site every page."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NAMES = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
]
PACKAGES = ("nn", "dst", "tickets", "optim", "sparsity", "flops", "models", "data", "recipes")
HOUSED = {
    "sparsekd.tickets.kd_loss": "sparsekd.kd_loss",
    "sparsekd.sparsity.survey": "sparsekd.nn.survey",
    "sparsekd.sparsity.Survey": "sparsekd.nn.Survey",
} | {
    f"sparsekd.nn.{name}": f"sparsekd.{name}"
    for name in ("densify", "make_capturable", "optimize", "relayout", "sparsify")
}
"""Names with a page under the shorter of two paths."""


def find(path: str) -> Any:
    found: Any = importlib.import_module("sparsekd")
    for part in path.split(".")[1:]:
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(f"{found.__name__}.{part}")
    return found


def public(package: str) -> set[str]:
    names = {f"{package}.{name}" for name in find(package).__all__ if not name.startswith("__")}
    values = {n for n in names if isinstance(find(n), int | tuple | dict)}
    modules = {n for n in names if isinstance(find(n), ModuleType)}
    return names - modules - values


@pytest.mark.parametrize("package", ["sparsekd", *(f"sparsekd.{name}" for name in PACKAGES)])
def test_every_public_name_is_in_the_reference(package):
    assert {HOUSED.get(name, name) for name in public(package)} - set(NAMES) == set()


def test_names_of_the_reference_exist_once():
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    objects = {name: find(name) for name in NAMES}
    assert [name for name, one in objects.items() if not (one.__doc__ or "").strip()] == []


def test_the_site_lists_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/-]+\.md", text.partition("nav:\n  - sparsekd")[2]))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages - {"index.md"} == listed - {"index.md", "contributing.md", "changelog.md"}


def test_the_readme_is_two_screens_and_the_front_page_shows_its_table():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 100
    assert readme.count("<!-- figures: begin") == readme.count("<!-- figures: end -->") == 1
    assert (DOCS / "index.md").read_text().count("<!-- figures -->") == 1
