"""What a user sees of a run, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparsekd.train import ProgressReporter, progress


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def train(reporter, clock, seconds_a_step, epochs=2, done=0):
    reporter.run("seed0/lt", 3, done, done)
    for epoch in range(done, done + epochs):
        for step in range(1, 5):
            clock.now += seconds_a_step
            reporter.step(step, 4, 0.5, 0.75, 100)
        reporter.epoch(epoch, "loss 0.5")


def test_a_log_gets_a_line_an_epoch_with_the_total_eta(clock):
    out = io.StringIO()
    with ProgressReporter(Console(file=out, width=120)) as reporter:
        reporter.plan(epochs=6)
        train(reporter, clock, 10)
    assert out.getvalue().splitlines() == [
        "seed0/lt epoch 1/3  loss 0.5  ETA total 0:03:20",
        "seed0/lt epoch 2/3  loss 0.5  ETA total 0:02:40",
    ]


def test_a_long_epoch_gets_a_line_a_minute(clock):
    out = io.StringIO()
    with ProgressReporter(Console(file=out, width=120)) as reporter:
        reporter.plan(epochs=3)
        train(reporter, clock, 40, epochs=1)
    assert out.getvalue().splitlines()[0] == (
        "seed0/lt epoch 1/3 step 2/4  loss 0.500  acc 75.0%  2 images/s  "
        "ETA epoch 0:01:20, total 0:06:40"
    )


def test_epochs_of_an_earlier_process_do_not_count_as_trained_in_no_time(clock):
    out = io.StringIO()
    with ProgressReporter(Console(file=out, width=120)) as reporter:
        reporter.plan(epochs=6)
        train(reporter, clock, 10, epochs=1, done=2)
    assert out.getvalue().strip() == "seed0/lt epoch 3/3  loss 0.5  ETA total 0:02:00"


def test_a_terminal_gets_bars(clock):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with ProgressReporter(console) as reporter:
        reporter.plan(epochs=2)
        train(reporter, clock, 10)
    for text in ("seed0/lt epoch 2/3", "loss 0.500", "acc 75.0%", "10 images/s", "ETA", "total"):
        assert text in out.getvalue()
