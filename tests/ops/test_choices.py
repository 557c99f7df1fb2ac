"""The file of measured choices: shared, damaged, unwritable."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekd

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd.ops.choices import Choice, Choices, default_path, surroundings

SPARSE, DENSE = Choice("cpp", 1.0, 2.0), Choice("dense", 3.0, 1.0)


def test_another_process_knows_what_was_chosen(tmp_path: Path) -> None:
    path = tmp_path / "made" / "here.jsonl"
    first = Choices(path)
    assert first.get("op", 0) is None
    assert first.add("op", 0, SPARSE) == SPARSE
    second = Choices(path)
    assert second.get("op", 0) == SPARSE
    first.add("op", -1, DENSE)
    assert second.get("op", -1) == DENSE  # also what was written after it had read the file
    assert len(second) == 2


def test_whoever_writes_first_decides_for_all(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    first, second = Choices(path), Choices(path)
    assert first.get("op", 0) is None
    assert second.get("op", 0) is None
    assert first.add("op", 0, SPARSE) == SPARSE
    assert second.add("op", 0, DENSE) == SPARSE
    assert second.get("op", 0) == Choices(path).get("op", 0) == SPARSE


WRITER = """
import sys
from pathlib import Path
from sparsekd.ops.choices import Choice, Choices
choices = Choices(Path(sys.argv[1]))
mine = Choice("cpp", float(sys.argv[2]), 0.0)
print([choices.add(f"op {i}", i % 7, mine).cpp_ms for i in range(300)])
"""


def test_processes_that_write_at_once_agree(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    root = Path(sparsekd.__file__).parents[1]
    writers = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, cwd=root) for i in range(3)
    ]
    answers = {writer.communicate(timeout=300)[0] for writer in writers}
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert len(answers) == 1
    assert len(path.read_text().splitlines()) >= 300
    assert len(Choices(path)._known) == 0  # nothing is read before it is asked for
    known = Choices(path)
    assert {known.get(f"op {i}", i % 7).backend for i in range(300)} == {"cpp"}


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\xfe",
        b"{",
        b"[]",
        b"7",
        b'{"kind": "op", "step": 0, "backend": "rm", "cpp_ms": 1, "dense_ms": 1}',
        b'{"kind": "op", "step": "0", "backend": "cpp", "cpp_ms": 1, "dense_ms": 1}',
        b'{"kind": [], "step": 0, "backend": "cpp", "cpp_ms": 1, "dense_ms": 1}',
        b'{"kind": "op", "step": 0, "backend": "cpp", "cpp_ms": "x", "dense_ms": 1}',
        b'{"kind": "op", "step": 0, "backend": "cpp"}',
    ],
)
def test_damaged_lines_cost_no_more_than_themselves(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "choices.jsonl"
    Choices(path).add("before", 0, SPARSE)
    with path.open("ab") as file:
        file.write(damage + b"\n")
    choices = Choices(path)
    assert choices.get("op", 0) is None
    assert choices.add("op", 0, DENSE) == DENSE
    again = Choices(path)
    assert (again.get("before", 0), again.get("op", 0)) == (SPARSE, DENSE)


def test_a_line_that_is_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    line = json.dumps({"kind": "op", "step": 0, "backend": "cpp", "cpp_ms": 1.0, "dense_ms": 2.0})
    path.write_text(line)
    choices = Choices(path)
    assert choices.get("op", 0) is None
    path.write_text(line + "\n")
    assert choices.get("op", 0) == SPARSE


def test_a_file_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    choices = Choices(tmp_path / "file" / "choices.jsonl")
    with caplog.at_level(logging.WARNING):
        assert choices.add("op", 0, SPARSE) == SPARSE
        assert choices.add("op", -1, DENSE) == DENSE
    assert len(caplog.records) == 1
    assert "memory only" in caplog.text
    assert (choices.get("op", 0), choices.get("op", -1)) == (SPARSE, DENSE)


def test_clear_measurements_imply_choices_at_other_densities() -> None:
    choices = Choices(None)
    choices.add("op", -10, Choice("cpp", 1.0, 2.0))
    choices.add("op", -4, Choice("dense", 2.0, 1.0))
    assert choices.follows("op", -11) == "cpp"
    assert choices.follows("op", -3) == "dense"
    assert choices.follows("op", -7) is None
    assert choices.follows("another", -11) is None
    choices.add("op", -20, Choice("dense", 9.0, 1.0))  # contradicts the first
    assert choices.follows("op", -11) is None


@pytest.mark.parametrize("vague", [Choice("cpp", 1.0, 1.2), Choice("cpp")])
def test_vague_or_implied_choices_imply_nothing(vague: Choice) -> None:
    choices = Choices(None)
    choices.add("op", 0, vague)
    assert choices.follows("op", -5) is None


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SPARSEKD_CACHE", raising=False)
    path = default_path()
    assert path is not None
    assert path.parent == tmp_path / "sparsekd"
    monkeypatch.setenv("SPARSEKD_CACHE", str(tmp_path / "mine"))
    assert default_path() == tmp_path / "mine" / path.name
    monkeypatch.setenv("SPARSEKD_CACHE", "off")
    assert default_path() is None


def test_other_kernels_or_another_machine_mean_another_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSEKD_CACHE", str(tmp_path))
    here = surroundings()
    names = {default_path()}
    for fact in here:
        monkeypatch.setattr("sparsekd.ops.choices.surroundings", lambda f=fact: here | {f: "other"})
        names.add(default_path())
    assert len(names) == 1 + len(here)
