"""The compatibility table: a quarter of what it says is tried, and all of it with `-m thorough`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.compatibility import TRIED, Case, attempt
from tools.compatibility_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs/compatibility.md"


def table() -> dict[str, list[str]]:
    """Return the results of the page by package and model."""
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 3 + len(TRIED)]
    return {f"{package}-{model}": found for package, _, model, *found in cells[2:]}


def selected() -> list[Any]:
    """Return the trials; of four neighbours one runs always, and the others are thorough.

    The offset moves by one a model, so that each of the six things is tried with some model.
    """
    trials = [
        (model, what, found[j], (i + j) % 4 > 0)
        for i, (model, found) in enumerate(table().items())
        for j, what in enumerate(TRIED)
        if found[j] != "not tried"
    ]
    marks = {False: (), True: (pytest.mark.thorough,)}
    return [pytest.param(m, w, r, marks=marks[rest], id=f"{m}-{w}") for m, w, r, rest in trials]


@pytest.mark.parametrize("name, what, result", selected())
def test_what_the_table_says(name: str, what: str, result: str, request) -> None:
    request.getfixturevalue(name.partition("-")[0])
    assert attempt(Case(name), what) == result


def test_the_table_has_models_of_the_script() -> None:
    assert list(table()) == [name for name in MODELS if name in table()]
    assert len(table()) > 4
