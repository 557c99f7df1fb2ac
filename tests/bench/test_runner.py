"""Rows are appended session by session, and what is there is not measured again."""

from __future__ import annotations

import pytest
from rich.console import Console

from sparsekd.bench.machine import describe
from sparsekd.bench.runner import run
from sparsekd.train import MetricsLog


class Counting:
    """A session that counts how often it is measured."""

    def __init__(self, case, names=("a",)):
        self.case, self.names, self.calls = case, names, 0

    @property
    def name(self):
        return ("layer", self.case, "layer")

    def keys(self):
        return [(name, 0.9) for name in self.names]

    def measure(self):
        self.calls += 1
        return [{"arm": name, "sparsity": 0.9, "ms": 1.0} for name in self.names]


@pytest.fixture
def console():
    return Console(width=100, file=open("/dev/null", "w"))


def test_rows_name_session_and_machine(tmp_path, console):
    log = MetricsLog(tmp_path / "rows.jsonl")
    assert run([Counting("one"), Counting("two")], log, describe(), console)
    rows = log.rows()
    assert [row["case"] for row in rows] == ["one", "two"]
    for row in rows:
        assert {"level", "case", "op", "arm", "sparsity", "ms", "session", "machine"} <= set(row)
        assert {"cpu", "isa", "threads", "torch", "memory_warm", "build", "id"} <= set(
            row["machine"]
        )


def test_only_what_is_missing_is_measured(tmp_path, console):
    log = MetricsLog(tmp_path / "rows.jsonl")
    first, second = Counting("one"), Counting("two")
    assert run([first], log, describe(), console)
    assert run([first, second], log, describe(), console)
    assert (first.calls, second.calls) == (1, 1)
    wider = Counting("one", names=("a", "b"))
    assert run([wider], log, describe(), console)
    assert wider.calls == 1


def test_another_build_or_machine_is_measured_anew(tmp_path, console):
    log = MetricsLog(tmp_path / "rows.jsonl")
    session = Counting("one")
    run([session], log, {"id": "old"}, console)
    run([session], log, {"id": "new"}, console)
    assert session.calls == 2


def test_a_time_limit_stops_between_sessions(tmp_path, console):
    log = MetricsLog(tmp_path / "rows.jsonl")
    sessions = [Counting("one"), Counting("two")]
    assert not run(sessions, log, {"id": "m"}, console, seconds=-1)
    assert log.rows() == []
    assert run(sessions, log, {"id": "m"}, console)


def test_a_session_cut_short_leaves_no_row(tmp_path, console):
    class Stopped(Counting):
        def measure(self):
            raise KeyboardInterrupt

    log = MetricsLog(tmp_path / "rows.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run([Counting("one"), Stopped("two")], log, {"id": "m"}, console)
    assert [row["case"] for row in log.rows()] == ["one"]


def test_a_session_that_raises_has_failed_and_the_others_go_on(tmp_path, console):
    class Lost(Counting):
        def measure(self):
            raise RuntimeError("out of memory\nwith a long story")

    log = MetricsLog(tmp_path / "rows.jsonl")
    assert run([Lost("one", names=("a", "b")), Counting("two")], log, {"id": "m"}, console)
    rows = [(row["case"], row["arm"], row["ms"], row.get("failed")) for row in log.rows()]
    problem = "RuntimeError: out of memory"
    assert rows == [
        ("one", "a", None, problem),
        ("one", "b", None, problem),
        ("two", "a", 1.0, None),
    ]
