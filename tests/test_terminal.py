"""Tables keep every column and every name, however narrow the terminal is."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from contextlib import suppress

import pytest
import torch
from rich.console import Console

from sparsekd import terminal
from sparsekd.terminal import Columns, FittingThreads

HEADER = ("layer", "weight", "fprop", "all passes")
ROWS = [("layer1.0.conv1[0]", "64x64x3x3", "12.3* / 20.1", "30 / 50"), ("fc", "10x4", "-", "")]


def printed(table: Columns, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [200, 120, 80, 60, 50, 40, 31, 24])
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


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_sentences_are_broken_at_spaces_and_names_stay_whole(width: int) -> None:
    rows = [("lottery", "from a dense run, in one go"), ("rigl", "what moves its topology")]
    table = Columns(("recipe", "what it does"), rows, left=2)
    lines = printed(table, width)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    for word in ("lottery", "rigl", "dense", "run,", "topology", "what", "does"):
        assert word in words


def test_a_blank_line_divides_sections() -> None:
    lines = printed(Columns(("a", "b"), [("1", "2"), ("3", "4"), ("5", "6")], sections={2}), 40)
    assert [line.split() for line in lines[2:6]] == [["1", "2"], ["3", "4"], [], ["5", "6"]]


@pytest.mark.parametrize("command", ["recipes", "info"])
def test_a_pipe_gets_every_column(command: str) -> None:
    words = {"recipes": ("rigl", "what it does", "demo"), "info": ("backend", "available", "cpp")}
    call = [sys.executable, "-m", "sparsekd", command]
    result = subprocess.run(call, capture_output=True, text=True, check=True)
    assert "…" not in result.stdout
    for word in words[command]:
        assert word in result.stdout


def test_what_fits_is_one_table_and_what_does_not_repeats_the_names() -> None:
    table = Columns(HEADER, ROWS)
    assert table.groups(120) == [[1, 2, 3]]
    assert table.groups(41) == [[1], [2, 3]]
    assert sum(line.startswith("fc") for line in printed(table, 41)) == 2


def test_a_table_without_lines_shows_its_header() -> None:
    assert printed(Columns(("a", "b"), []), 40)[0] == "a  b"


@pytest.mark.parametrize(
    "busy, most, threads", [(0.0, 2, 2), (0.4, 2, 2), (0.7, 2, 1), (5.0, 2, 1), (2.2, 8, 6)]
)
def test_threads_leave_processors_to_others(monkeypatch, busy, most, threads) -> None:
    seconds = iter(range(9))
    monkeypatch.setattr(terminal, "_busy_time", lambda: ((now := next(seconds)), busy * now))
    before, said = torch.get_num_threads(), []
    try:
        torch.set_num_threads(most)
        fit = FittingThreads(said.append, pause=0.0)
        fit()
        assert torch.get_num_threads() == threads
        assert len(said) == (threads < most)
        fit()
        assert len(said) == (threads < most)  # what has not changed is not told again
        monkeypatch.setattr(terminal, "_busy_time", lambda: (float(next(seconds)), busy))
        fit()
        assert torch.get_num_threads() == most  # the others have ended
    finally:
        torch.set_num_threads(before)


def test_threads_stay_where_the_system_does_not_tell(monkeypatch) -> None:
    monkeypatch.setattr(terminal, "_busy_time", lambda: None)
    before = torch.get_num_threads()
    FittingThreads(pytest.fail, pause=0.0)()
    assert torch.get_num_threads() == before


def warn_of(layer: str, stacklevel: int) -> None:
    warnings.warn(f"{layer} is empty, which nobody has asked for: {layer}", stacklevel=stacklevel)


def test_warnings_of_one_kind_are_one_line_and_a_number() -> None:
    said: list[str] = []
    with suppress(KeyboardInterrupt), terminal.warnings_by_kind(said.append):
        for layer in (*range(30), 0, 0):  # what is said again word for word is not one more
            warn_of(f"conv{layer}", stacklevel=1 + layer % 3)  # whoever is named as the cause
        warnings.warn("once", RuntimeWarning, stacklevel=1)
        warnings.warn(f"also {'very ' * 20}long", stacklevel=1)
        assert len(said) == 3
        raise KeyboardInterrupt
    assert said == [
        "warning: conv0 is empty, which nobody has asked for: conv0",
        "warning: once",
        f"warning: also {'very ' * 20}long",
        "warning: 29 more of the kind: conv0 is empty, which nobody has asked for: conv0",
    ]
    with terminal.warnings_by_kind(said.append):
        warn_of("conv0", stacklevel=1)
    assert len(said) == 5  # each context counts for itself
