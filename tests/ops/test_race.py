"""When a race ends and who wins it, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparsekd.ops import race as race_module
from sparsekd.ops.race import race


class Clock:
    """Stand in for time.perf_counter: time passes only while an arm runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def arm(self, *ms: float) -> Callable[[], int]:
        """Return an arm that takes these times in turn, the last of them ever after."""
        runs = 0

        def run() -> int:
            nonlocal runs
            self.now += ms[min(runs, len(ms) - 1)] / 1e3
            runs += 1
            return runs

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(race_module.time, "perf_counter", clock)
    return clock


def test_a_clear_race_is_short_and_the_first_runs_do_not_count(clock: Clock) -> None:
    times, results = race({"a": clock.arm(500, 10), "b": clock.arm(1, 20)})
    assert times == pytest.approx({"a": 10, "b": 20})
    assert results == {"a": 4, "b": 4}  # one run to warm up and three turns


def test_a_close_race_takes_more_turns(clock: Clock) -> None:
    _, results = race({"a": clock.arm(10), "b": clock.arm(11)})
    assert results == {"a": 10, "b": 10}


def test_short_arms_are_repeated_for_a_while(clock: Clock) -> None:
    _, results = race({"a": clock.arm(0.1), "b": clock.arm(0.4)})
    assert 40 <= results["a"] <= 43


def test_it_goes_on_until_the_fastest_run_was_met_twice(clock: Clock) -> None:
    disturbed = (90, 60, 40, 12, 50, 10, 40, 10)
    times, results = race({"a": clock.arm(*disturbed), "b": clock.arm(30)})
    assert times == pytest.approx({"a": 10, "b": 30})
    assert results["a"] >= len(disturbed)


def test_it_ends_on_a_machine_that_never_rests(clock: Clock) -> None:
    ever_faster = [1000 * 0.8**turn for turn in range(60)]
    _, results = race({"a": clock.arm(*ever_faster), "b": clock.arm(50)})
    assert results["a"] == 4
