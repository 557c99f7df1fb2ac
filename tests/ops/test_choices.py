"""The file of measured choices: shared, damaged, unwritable."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import sparsekd

pytest.importorskip("sparsekd._C", reason="the compiled module is not built")
from sparsekd.ops import store
from sparsekd.ops.dispatch import choices as choices_module
from sparsekd.ops.dispatch.cache_key import Key
from sparsekd.ops.dispatch.choices import Choice, Choices, default_path, surroundings

SPARSE = Choice("cpp", 1.0, 2.0, 0.1, 100, when=1.0)
DENSE = Choice("dense", 3.0, 1.0, 0.1, 100, when=2.0)
GOOD = {"cpp_ms": 1, "dense_ms": 1, "spread": 0, "products": 1, "when": 1}


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
from sparsekd.ops.dispatch.choices import Choice, Choices
choices = Choices(Path(sys.argv[1]))
mine = Choice("cpp", 1 + float(sys.argv[2]), 1.0, 0.0, 1, 1.0)
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
        b'{"kind": "op", "step": 0, "backend": "cpp"}',
        b'{"kind": "op", "step": 0, "backend": "cpp", "cpp_ms": 1, "dense_ms": 2}',  # of old
        *(
            json.dumps({"kind": "op", "step": 0, "backend": "cpp", **GOOD, **damage}).encode()
            for damage in (
                {"backend": "rm"},
                {"step": "0"},
                {"step": [0, "1"]},
                {"step": 0.5},
                {"kind": []},
                {"cpp_ms": "x"},
                {"cpp_ms": 0},
                {"cpp_ms": 10**400},
                {"dense_ms": float("nan")},
                {"spread": -1},
                {"products": 0},
                {"products": 1.5},
                {"when": None},
                {"round": "2"},
            )
        ),
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
    line = json.dumps({"kind": "op", "step": 0, **asdict(SPARSE)})
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


def test_a_later_round_counts_for_all(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    first, second = Choices(path), Choices(path)
    first.add("op", (0, 1), SPARSE)
    assert second.get("op", (0, 1)) == SPARSE
    assert second.add("op", (0, 1), DENSE, again=True) == DENSE
    assert first.add("op", (0, 1), SPARSE) == DENSE  # it had measured for the first time
    assert first.add("op", (0, 1), SPARSE, again=True) == SPARSE
    assert Choices(path).get("op", (0, 1)) == SPARSE
    assert len(first) == len(second) == 1


def test_the_file_stays_short_and_others_go_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_BYTES", 10_000)
    monkeypatch.setattr(store, "MOST_ENTRIES", 20)
    path = tmp_path / "choices.jsonl"
    first, second = Choices(path), Choices(path)
    for n in range(200):
        first.add("op", (0, n), SPARSE)
        second.add(f"op {n}", (0, 0), DENSE)
        assert len(first) <= 20
        assert second.get("op", (0, n)) == SPARSE
        assert path.stat().st_size < 11_000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert Choices(path).get("op", (0, 199)) == SPARSE


def key(density: int, *sizes: int) -> Key:
    return Key("op", (density, *sizes))


def test_clear_measurements_imply_choices_at_other_densities() -> None:
    choices = Choices(None)
    choices.add(*key(-40), SPARSE)
    choices.add(*key(-20), DENSE)

    def implied(density: int) -> str | None:
        found = choices.estimate(key(density), 100)
        return found and found.backend

    assert implied(-50) == "cpp"
    assert implied(-10) == "dense"
    assert implied(-30) is None
    assert choices.estimate(Key("another", (-50,)), 100) is None
    choices.add(*key(-60), DENSE)  # contradicts the first
    assert implied(-50) is None


@pytest.mark.parametrize(
    "vague",
    [Choice("cpp", 1.0, 1.2, 0.0, 100, 1.0), Choice("cpp", 1.0, 2.0, 1.0, 100, 1.0), Choice("cpp")],
)
def test_vague_or_estimated_choices_imply_nothing_far_away(vague: Choice) -> None:
    choices = Choices(None)
    choices.add(*key(0), vague)
    assert choices.estimate(key(-20), 100) is None


def test_like_work_tells_the_times() -> None:
    choices = Choices(None)
    choices.add(*key(0, 10, 10), Choice("cpp", 1.0, 1.2, 0.0, 100, 1.0))
    found = choices.estimate(key(0, 11, 12), 300)
    assert found is not None
    assert (found.backend, found.cpp_ms, found.dense_ms) == pytest.approx(("cpp", 3.0, 3.6))
    assert not found.measured
    assert found.vague
    more = choices.estimate(key(6, 10, 10), 100)  # a third more nonzeros
    assert more is not None
    assert (more.backend, more.cpp_ms) == ("dense", pytest.approx(1.05**6))
    assert choices.estimate(key(0, 14, 13), 500) is None
    assert choices.estimate(key(9, 10, 10), 100) is None


def test_a_choice_whose_spread_is_as_large_as_its_gain_is_not_decided() -> None:
    assert Choice("cpp", 1.0, 1.2, 0.1, 100, 1.0).decided
    assert not Choice("cpp", 1.0, 1.2, 0.2, 100, 1.0).decided
    assert not Choice("cpp", 1.0, 9.0, 0.0, 100).decided  # an estimate


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
        monkeypatch.setattr(choices_module, "surroundings", lambda f=fact: here | {f: "other"})
        names.add(default_path())
    assert len(names) == 1 + len(here)
