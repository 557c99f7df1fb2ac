"""When a race ends and who wins it, by a clock that the test sets."""

from __future__ import annotations

import pytest

from sparsekd.ops.dispatch import race as race_module
from sparsekd.ops.dispatch.race import race


class Clock:
    """Stand in for time.perf_counter: time passes only while an arm runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def arm(self, *ms: float) -> Arm:
        """Return an arm that takes these times in turn, the last of them ever after."""
        return Arm(self, ms)


class Arm:
    def __init__(self, clock: Clock, ms: tuple[float, ...]) -> None:
        self.clock, self.ms, self.runs = clock, ms, 0

    def __call__(self) -> None:
        self.clock.now += self.ms[min(self.runs, len(self.ms) - 1)] / 1e3
        self.runs += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(race_module.time, "perf_counter", clock)
    return clock


def test_a_clear_race_is_short_and_the_first_runs_do_not_count(clock: Clock) -> None:
    a, b = clock.arm(500, 10), clock.arm(1, 20)
    assert race({"a": a, "b": b}) == pytest.approx({"a": 10, "b": 20})
    assert a.runs == b.runs == 4  # one run to warm up and three turns


def test_a_close_race_takes_more_turns(clock: Clock) -> None:
    a, b = clock.arm(10), clock.arm(11)
    race({"a": a, "b": b})
    assert a.runs == b.runs == 10


def test_short_arms_are_repeated_for_a_while(clock: Clock) -> None:
    a, b = clock.arm(0.1), clock.arm(0.4)
    race({"a": a, "b": b})
    assert 40 <= a.runs <= 43


def test_it_goes_on_until_the_fastest_run_was_met_twice(clock: Clock) -> None:
    disturbed = (90, 60, 40, 12, 50, 10, 40, 10)
    a = clock.arm(*disturbed)
    assert race({"a": a, "b": clock.arm(30)}) == pytest.approx({"a": 10, "b": 30})
    assert a.runs >= len(disturbed)


def test_it_ends_on_a_machine_that_never_rests(clock: Clock) -> None:
    a = clock.arm(*(1000 * 0.8**turn for turn in range(60)))
    race({"a": a, "b": clock.arm(50)})
    assert a.runs == 4
