"""Tables keep every column and every name, however narrow the terminal is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparsekd.terminal import Columns

HEADER = ("layer", "weight", "fprop", "all passes")
ROWS = [("layer1.0.conv1[0]", "64x64x3x3", "12.3* / 20.1", "30 / 50"), ("fc", "10x4", "-", "")]


def printed(table: Columns, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [120, 60, 50, 40, 31, 24])
def test_no_width_loses_a_column_a_cell_or_a_name(width: int) -> None:
    table = Columns(HEADER, ROWS, "title", "a note", left=2)
    lines = printed(table, width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    for cell in ("weight", "fprop", "64x64x3x3", "12.3* / 20.1", "30 / 50", "10x4", "passes"):
        assert text.count(cell) == 1, cell
    assert text.count("layer ") >= len(table.groups(width))
    joined = "".join(line[: len(ROWS[0][0])].split(" ")[0] for line in lines)
    assert "layer1.0.conv1[0]" in joined  # also where it goes on in the next line


def test_what_fits_is_one_table_and_what_does_not_repeats_the_names() -> None:
    table = Columns(HEADER, ROWS)
    assert table.groups(120) == [[1, 2, 3]]
    assert table.groups(41) == [[1], [2, 3]]
    assert sum(line.startswith("fc") for line in printed(table, 41)) == 2


def test_a_table_without_lines_shows_its_header() -> None:
    assert printed(Columns(("a", "b"), []), 40)[0] == "a  b"
